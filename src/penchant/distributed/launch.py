"""Start the processes of one machine with torch's agent, and end them with one sentence and one exit code."""

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

LAUNCHED = "PENCHANT_LAUNCHED"  # set if the launcher prints the processes' errors
LATE = 3.0  # seconds within which all ranks that wait for the same one give up
LOOK = 1.0  # seconds between two checks of NCCL
GRACE = 20.0  # seconds that a failed process waits for the one that reports the cause


def launch(command: Sequence[str], processes: int, restarts: int, timeout: float) -> int:
    """Run ``python -m penchant COMMAND`` in several processes on this machine until all have ended or one has failed.

    Args:
        timeout: seconds that the processes have after a signal to finish the step and write a checkpoint.

    Returns:
        0.

    Raises:
        PenchantError: the error of the first process that failed, with its exit code.
    """
    # with a store that all attempts share, the next attempt gets the addresses of dead processes and hangs (pytorch#135712)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # older torch waits 30 s and has no argument for it
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(math.ceil(timeout)))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; train.threads decides
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else it warns of each connection that a process closes
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    noisy_loggers = ("torch.distributed.elastic", "torch.distributed.launcher")
    for name in [*noisy_loggers, *(n for n in logging.root.manager.loggerDict if n.startswith(noisy_loggers))]:
        # they print forty lines for one sentence; some have their own level
        logging.getLogger(name).setLevel(logging.CRITICAL)
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
        except ChildFailedError as failure:
            _, first = failure.get_first_failure()
            error = _last_words(Path(folder))
            if error is not None:
                raise error from None
            raise _crashed(first.local_rank, first.exitcode, processes) from None
        except SignalException as interrupt:
            error = _last_words(Path(folder))
            if error is None:
                name = signal.Signals(interrupt.sigval).name
                error = TrainingStopped("launch", f"stopped by {name} before there was anything to save", "")
                error.exit_code = 130
            raise error from None
    return 0


def _last_words(folder: Path) -> PenchantError | None:
    """The recorded error to report, if any: a user's error before a bug, then of the last attempt, then the earliest."""
    entries = []
    for path in folder.glob("*/attempt_*/*/*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            entry = json.loads(path.read_text())["penchant"]
            attempt = int(path.parts[-3].removeprefix("attempt_"))
            entries.append((entry["kind"] is None, -attempt, entry["time"], path, entry))
    return error_of(min(entries, key=lambda f: f[:3])[-1]) if entries else None


def _crashed(rank: int, code: int, processes: int) -> PenchantError:
    how = "see its output above"
    if code < 0:
        name = signal.Signals(-code).name
        what = f"was killed by {name}"
        how = "the system may have been short of memory" if name == "SIGKILL" else how
    else:
        what = f"ended with exit code {code}"
    error = PenchantError(
        f"process {rank} of {processes}",
        what,
        f"{how}; run the same command again to continue from the last checkpoint",
    )
    error.exit_code = CRASH
    return error


def leave(error: BaseException, world: World, timeout: float) -> NoReturn:
    """End one of several processes because of an error. Only the first process with something to report prints it.

    An error that all ranks have agreed on is reported by rank 0. The others wait until it has closed its files, since
    torch's agent takes the first process that exits for a crash and ends all of them.
    """
    agreed, late = getattr(error, "agreed", False), waited_too_long(error, world, timeout)
    if late is not None:
        error = late
    elif (user_error := mistake(error)) is not None:
        error = user_error
    elif lost_another(error):
        time.sleep(GRACE)  # the agent ends this process as soon as it notices that the other one has failed
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
    # without torch's cleanup: a collective that others never enter would hang
    end_now(int(described(error)["exit_code"]))


@contextmanager
def watched(world: World, timeout: float) -> Iterator[None]:
    """End this process with an error if NCCL finds that another one is gone or does not answer.

    Waiting for NCCL means waiting for the GPU, which raises nothing: NCCL's watchdog notes the error and aborts the
    process a minute later.
    """
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(LOOK):
            if (error := nccl_error()) is not None:
                leave(error, world, timeout)

    if torch.cuda.is_available():
        threading.Thread(target=poll, daemon=True, name="watches NCCL").start()
    try:
        yield
    finally:
        ended.set()


def nccl_error() -> RuntimeError | None:
    """The error that NCCL's watchdog has found in any group, or None."""
    from torch.distributed.distributed_c10d import _world

    for group in list(_world.pg_map):
        with suppress(RuntimeError):  # a group without NCCL
            status = group._get_backend(torch.device("cuda")).get_error().name
            if status != "SUCCESS":
                return RuntimeError("NCCL timed out" if status == "TIMEOUT" else f"NCCL: {status}")
    return None


class Late(TrainingStopped):
    """Error that names the ranks that did not answer in time."""

    exit_code = CRASH
    silent: Sequence[int] = ()


def waited_too_long(error: BaseException, world: World, timeout: float) -> Late | None:
    """A `Late` error if ranks did not answer in time; None for any other error."""
    if not isinstance(error, RuntimeError) or not re.search("[Tt]imed ?out|[Tt]imeout", str(error)):
        return None
    silent = [0]  # rank 0 holds the store: if the store does not answer, rank 0 is silent

    def check_in() -> None:
        with suppress(Exception):
            shared_store = store(GRACE)
            shared_store.set(f"penchant/late/{world.rank}", "")
            time.sleep(LATE)
            silent[:] = [r for r in range(world.size) if not shared_store.check([f"penchant/late/{r}"])]

    # a stopped process accepts the connection but never answers
    thread = threading.Thread(target=check_in, daemon=True)
    thread.start()
    thread.join(GRACE / 2)
    silent_ranks = [*silent]
    names = " and ".join(f"rank {r}" for r in silent_ranks) or "a rank"
    late = Late(
        "launch.timeout",
        f"{names} of {world.size} did not answer within {timeout:g} s",
        "see what that process is doing; raise launch.timeout if a step really takes that long",
    )
    late.silent = silent_ranks
    return late


def end_silent(world: World, silent_ranks: Sequence[int]) -> None:
    """Kill the silent ranks on this machine: a stopped process ignores SIGTERM, and torch's agent would wait 30 s for it."""
    for machine, process in (world.processes[rank] for rank in silent_ranks if rank != world.rank):
        if machine is not None and machine == os.environ.get(MACHINE):
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)


def _first_to_tell() -> bool:
    with suppress(Exception):
        count: int = store(GRACE).add(f"penchant/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1)
        return count == 1
    return True


def _wait_for_leader() -> None:
    """Wait up to `GRACE` seconds until rank 0 and its store are gone. stderr is silenced: torch's C++ code reports the lost store there."""
    with suppress(Exception):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        store(GRACE).wait(["penchant/never"], timedelta(seconds=GRACE))
