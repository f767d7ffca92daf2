"""What goes through shared memory is what collectives of torch bring, whatever the sizes and whoever is slow."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from worlds import in_world

from penchant.distributed import exchange
from penchant.distributed.exchange import Exchange, Gather, ReduceScatter
from penchant.distributed.world import World

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd")


def vector(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(10 * count + rank)).to(dtype)


def sent(world: World) -> dict[str, Any]:
    """Whether each gather and each sum is right, of vectors that are below and above a slot's size."""
    exchange.SLOT = 96
    made = Exchange.of(world)
    assert made is not None
    group, found = dist.group.WORLD, {}
    for round_ in range(12):
        for count, dtype in ((1, torch.float32), (7, torch.float64), (50, torch.float32), (50, torch.bfloat16)):
            if random.Random(round_ + world.rank).random() < 0.3:
                time.sleep(0.01)
            whole = torch.empty(world.size * count, dtype=dtype)
            mine = whole[world.rank * count :][:count].copy_(vector(world.rank, count, dtype))
            Gather(made)(whole, mine, group)
            right = torch.cat([vector(r, count, dtype) for r in range(world.size)])
            out = torch.empty(count, dtype=dtype)
            of_all = [vector(r, world.size * count, dtype) for r in range(world.size)]
            ReduceScatter(made)(out, of_all[world.rank].clone(), group, dist.ReduceOp.SUM)
            total = of_all[0] + of_all[1] + of_all[2]
            equal = torch.equal(whole, right), torch.equal(out, total[world.rank * count :][:count])
            found[f"{round_} {count} {dtype}"] = equal
    with pytest.raises(NotImplementedError):
        ReduceScatter(made)(out, out, group, dist.ReduceOp.MAX)
    found["once"] = (Exchange.of(world) is made, True)

    Exchange.of.cache_clear()
    real = os.memfd_create
    if world.rank == 1:  # a system without
        os.memfd_create = lambda _: (_ for _ in ()).throw(OSError)  # type: ignore[assignment]
    found["one that cannot"] = (Exchange.of(world) is None, True)
    os.memfd_create = real
    Exchange.of.cache_clear()
    real_open = os.open
    if world.rank == 2:  # the same numbers, on another machine, are another file

        def elsewhere(path: str, flags: int) -> int:
            other = real("other")
            os.ftruncate(other, 2 * exchange.SLOT)
            return other

        os.open = elsewhere  # type: ignore[assignment]
    found["one that is elsewhere"] = (Exchange.of(world) is None, True)
    os.open = real_open
    return found


def test_vectors_go_through_shared_memory_whole(tmp_path: Path) -> None:
    for found in in_world(sent, tmp_path, size=3):
        assert {name: equal for name, equal in found.items() if equal != (True, True)} == {}
