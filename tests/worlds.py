"""Process groups for tests: forks of this process, which has already imported torch, with gloo on 127.0.0.1."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from processes import forked

from penchant.distributed.world import World, join

HANGS = 900.0  # seconds; even a machine overloaded tenfold takes less


def in_world(
    call: Callable[[World], Any],
    folder: Path,
    size: int = 2,
    seconds: float = HANGS,
    timeout: float = HANGS,
    context: int = 1,
) -> list[Any]:
    """Run `call` on each rank, and return the results (tensors and plain values). A rank's error is an AssertionError here.

    Args:
        folder: for the results; seconds: time limit of the whole call; timeout: how long ranks wait for each other;
            context: number of processes that share each pass.
    """
    import torch.distributed as dist

    folder.mkdir(parents=True, exist_ok=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def child(rank: int) -> None:
        os.environ.update(
            meeting, RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size)
        )
        torch.set_num_threads(1)
        with join(timeout, context) as world:
            torch.save(call(world), folder / f"{rank}.pt")

    children = [forked(lambda rank=rank: child(rank)) for rank in range(size)]
    end = time.monotonic() + seconds
    while any(c.exitcode is None for c in children) and time.monotonic() < end:
        time.sleep(0.02)
        if any(c.exitcode for c in children):
            break
    codes = [c.exitcode for c in children]
    for c in children:
        c.kill()
        c.join()
    assert codes == [0] * size, f"exit codes {codes}"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
