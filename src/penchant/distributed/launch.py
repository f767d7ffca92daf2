"""Starting the processes of one machine by torch's own agent, and how they end: one sentence, one exit code."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from penchant.base.lazy import torch
from penchant.base.mistakes import mistake
from penchant.distributed.world import (
    CRASH,
    MACHINE,
    World,
    described,
    end_now,
    error_of,
    lost_another,
    record,
    store,
)
from penchant.errors import PenchantError, TrainingStopped

LAUNCHED = "PENCHANT_LAUNCHED"  # set where the launcher prints what a process has to say
LATE = 3.0  # seconds within which all that wait for one rank give up
LOOK = 1.0  # seconds between two looks at NCCL
GRACE = 20.0  # seconds that a process whose end is known waits for the one that says why


def launch(command: Sequence[str], processes: int, restarts: int, timeout: float) -> int:
    """Run ``python -m penchant COMMAND`` in several processes of this machine, until all have ended or one has failed.

    Args:
        timeout: seconds that they have, behind a signal, to finish the step and write a checkpoint.

    Returns:
        0, or the exit code of the first one that failed.

    Raises:
        PenchantError: what that one said.
    """
    # a store that every attempt shares hands the addresses of dead processes to the next attempt, which hangs (pytorch#135712)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(math.ceil(timeout))
    )  # older torch has 30 s, and no argument for it
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; train.threads decides
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of every connection that ends with its process
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    talkative = ("torch.distributed.elastic", "torch.distributed.launcher")
    for name in [*talkative, *(n for n in logging.root.manager.loggerDict if n.startswith(talkative))]:
        logging.getLogger(name).setLevel(
            logging.CRITICAL
        )  # it tells in forty lines what is one sentence; some have a level of their own
    with tempfile.TemporaryDirectory(prefix="penchant-launch-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=f"penchant-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=restarts,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "penchant", *command)
        except ChildFailedError as failed:
            _, first = failed.get_first_failure()
            told = _last_words(Path(folder))
            if told is not None:
                raise told from None
            raise _crashed(first.local_rank, first.exitcode, processes) from None
        except SignalException as stopped:
            told = _last_words(Path(folder))
            if told is None:
                name = signal.Signals(stopped.sigval).name
                told = TrainingStopped("launch", f"stopped by {name} before there was anything to save", "")
                told.exit_code = 130
            raise told from None
    return 0


def _last_words(folder: Path) -> PenchantError | None:
    """What the first process of the last attempt that had something to say has said."""
    found = []
    for path in folder.glob("*/attempt_*/*/*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(path.read_text())["penchant"]
            attempt = int(path.parts[-3].removeprefix("attempt_"))
            found.append((told["kind"] is None, -attempt, told["time"], path, told))
    return error_of(min(found, key=lambda f: f[:3])[-1]) if found else None


def _crashed(rank: int, code: int, processes: int) -> PenchantError:
    how = "look at what it printed above"
    if code < 0:
        name = signal.Signals(-code).name
        what = f"was killed by {name}"
        how = "the system may have been short of memory" if name == "SIGKILL" else how
    else:
        what = f"ended with exit code {code}"
    error = PenchantError(
        f"process {rank} of {processes}", what, f"{how}; run the same command again to go on from the last checkpoint"
    )
    error.exit_code = CRASH
    return error


def leave(error: BaseException, world: World, timeout: float) -> NoReturn:
    """End a process of several with its error: the first one that has something to say says it, the others are silent.

    An error that all ranks have agreed on is rank 0's to tell, and the others stay until it has closed its files: whoever leaves first
    is taken for a crash, and all are ended.
    """
    agreed, late = getattr(error, "agreed", False), waited_too_long(error, world, timeout)
    if late is not None:
        error = late
    elif (told := mistake(error)) is not None:
        error = told
    elif lost_another(error):
        time.sleep(GRACE)  # the agent ends this process as soon as it has seen what happened to the other one
        end_now(1)
    if agreed and not world.leads:
        _wait_for_leader()
    else:
        record(error)
        if late is not None:
            end_silent(world, late.silent)
        if isinstance(error, PenchantError) and not os.environ.get(LAUNCHED) and _first_to_tell():
            print(f"penchant: {error}", file=sys.stderr)
        elif not isinstance(error, PenchantError):
            traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    end_now(int(described(error)["exit_code"]))  # no goodbye: a collective that others never enter would hang


@contextmanager
def watched(world: World, timeout: float) -> Iterator[None]:
    """End this process with its sentence where NCCL finds that another does not answer, or is gone.

    A wait for NCCL is a wait for the GPU, in which nothing is raised: its watchdog notes the error, and aborts the process a minute later.
    """
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK):
            if (error := nccl_error()) is not None:
                leave(error, world, timeout)

    if torch.cuda.is_available():
        threading.Thread(target=look, daemon=True, name="watches NCCL").start()
    try:
        yield
    finally:
        ended.set()


def nccl_error() -> RuntimeError | None:
    """What NCCL's watchdog has found in any group."""
    from torch.distributed.distributed_c10d import _world

    for group in list(_world.pg_map):
        with suppress(RuntimeError):  # it has no NCCL
            found = group._get_backend(torch.device("cuda")).get_error().name
            if found != "SUCCESS":
                return RuntimeError("NCCL timed out" if found == "TIMEOUT" else f"NCCL: {found}")
    return None


class Late(TrainingStopped):
    """Ranks that did not answer in time."""

    exit_code = CRASH
    silent: Sequence[int] = ()


def waited_too_long(error: BaseException, world: World, timeout: float) -> Late | None:
    """The sentence about ranks that did not answer in time; None for any other error."""
    if not isinstance(error, RuntimeError) or not re.search("[Tt]imed ?out|[Tt]imeout", str(error)):
        return None
    silent = [0]  # rank 0 holds the store: where that does not answer, it is rank 0 that is silent

    def ask() -> None:
        with suppress(Exception):
            met = store(GRACE)
            met.set(f"penchant/late/{world.rank}", "")
            time.sleep(LATE)
            silent[:] = [r for r in range(world.size) if not met.check([f"penchant/late/{r}"])]

    asking = threading.Thread(target=ask, daemon=True)  # a stopped process is connected to, and never answers
    asking.start()
    asking.join(GRACE / 2)
    found = [*silent]
    names = " and ".join(f"rank {r}" for r in found) or "a rank"
    late = Late(
        "launch.timeout",
        f"{names} of {world.size} did not answer within {timeout:g} s",
        "look at what that process says and does; raise launch.timeout if a step really takes that long",
    )
    late.silent = found
    return late


def end_silent(world: World, silent: Sequence[int]) -> None:
    """Kill those of this machine that do not answer: what is stopped heeds no SIGTERM, and torch's agent would wait 30 s for it."""
    for machine, process in (world.processes[rank] for rank in silent if rank != world.rank):
        if machine is not None and machine == os.environ.get(MACHINE):
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)


def _first_to_tell() -> bool:
    with suppress(Exception):
        told: int = store(GRACE).add(f"penchant/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1)
        return told == 1
    return True


def _wait_for_leader() -> None:
    """Until rank 0 has ended, and its store with it; not for long. torch's C++ part says on stderr that the store is gone."""
    with suppress(Exception):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        store(GRACE).wait(["penchant/never"], timedelta(seconds=GRACE))
