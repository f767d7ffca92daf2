"""The processes that train together, over torch.distributed: a gloo group for numbers on the CPU, and nccl for a GPU's tensors.

A single process is a world of size 1 without a group: every call here returns what it was given, at no cost.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from penchant import errors
from penchant.base.lazy import torch
from penchant.errors import PenchantError

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

end_now = os._exit  # the real one, which `base.functions.no_exit` replaces while a command runs
CRASH = 1  # exit code that is restarted: a bug, or a process that is gone or does not answer
PATIENCE = timedelta(days=7)  # timeout for what rank 0 does first: reading and tokenizing may take hours
MASTER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # environment variables that torchrun sets
MACHINE = "GROUP_RANK"  # environment variable, the same for all processes that one torchrun started


def store(seconds: float) -> Any:
    """Connect to the store that the processes of this attempt share."""
    import torch.distributed as dist

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds))


class First:
    """Make the other ranks wait for rank 0, as long as it takes, while it reads the data or queries the rewards.

    The collectives that follow keep their usual timeout, so a rank that hangs is still detected.
    """

    def __init__(self, name: str, seconds: float) -> None:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store, self._name, self._count = store(seconds), f"penchant/{attempt}/{name}", 0

    def __call__(self, leads: bool) -> None:
        self._count += 1
        key = f"{self._name}/{self._count}"
        if leads:
            self._store.set(key, "")
        else:
            self._store.wait([key], PATIENCE)


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among those that train together.

    Args:
        rank: from 0; size: number of processes; local_rank, local_size: the same on this machine.
        group: gloo group for objects and numbers on the CPU; first: makes the other ranks wait for rank 0.
        context: number of neighboring ranks that share each pass (`distributed.context`); context_group: their group.
        processes: (machine, process id) of each rank; the machine is None if unknown.
        timeout: how long processes wait for each other.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: Any = None
    first: First | None = None
    context: int = 1
    context_group: Any = None
    processes: tuple[tuple[str | None, int], ...] = ()
    timeout: timedelta | None = None

    @property
    def dealers(self) -> int:
        """How many passes run at a time."""
        return self.size // self.context

    @property
    def dealer(self) -> int:
        """Index of the pass, among these, that this process takes part in."""
        return self.rank // self.context

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which locks, logs, writes and reports."""
        return self.rank == 0

    @property
    def many(self) -> bool:
        return self.size > 1

    def beside(self) -> World:
        """The same processes with a group of their own, for threads that run beside training. Every rank must call this."""
        import torch.distributed as dist

        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        return replace(self, group=group, first=First("beside", PATIENCE.total_seconds()))

    # ---- numbers and objects, always in the order of the ranks ----------------------------------------------------------

    def gather(self, value: T, *, patient: bool = False) -> list[T]:
        """Gather the values of all ranks, in rank order; tensors must be on the CPU.

        Args:
            patient: wait for rank 0 as long as it takes.
        """
        if not self.many:
            return [value]
        import torch.distributed as dist

        if patient and self.first is not None:
            self.first(self.leads)
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def share(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        return self.gather(value if self.leads else None, patient=True)[0]  # type: ignore[return-value]

    def dealt(self, local_items: Sequence[T], count: int) -> list[T]:
        """Gather `count` items in their order; rank r made items r, r + size, r + 2 size, ..."""
        per_rank = self.gather(local_items)
        return [per_rank[i % self.size][i // self.size] for i in range(count)]

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums by name over all ranks, added in rank order, so every rank gets the same bits."""
        if not self.many:
            return dict(values)
        total: dict[str, float] = {}
        for part in self.gather(dict(values)):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def gather_tensors(self, value: T, device: torch.device) -> list[T]:
        """`gather` for tensors, and for tuples, mappings and dataclasses of tensors, which are returned on `device`."""
        cpu = torch.device("cpu")
        return [_moved(v, device) for v in self.gather(_moved(value, cpu))]

    # ---- errors ---------------------------------------------------------------------------------------------------------

    def agree(self, error: BaseException | None = None, *, patient: bool = False) -> None:
        """Wait for every rank; if one of them has failed, all of them raise its error.

        Raises:
            PenchantError: this rank's own error, or that of the first rank that has one.
        """
        if not self.many:
            if error is not None:
                raise error
            return
        reports = self.gather(None if error is None else described(error), patient=patient)
        for report in reports:
            if report is not None:
                raise agreed(error_of(report) if error is None else error)

    @contextmanager
    def together(self, *, patient: bool = False) -> Iterator[None]:
        """Run the block on each rank independently (no collectives inside); if it fails on one rank, it fails on all."""
        error: BaseException | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.agree(error, patient=patient)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Run the block on rank 0 first, then on the others, which find what it has cached. If it fails on rank 0, it fails on all."""
        if not self.many:
            yield
            return
        if not self.leads:
            self.agree(patient=True)
            yield
            return
        with self.together(patient=True):
            yield


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if isinstance(value, Mapping):
        return {k: _moved(v, device) for k, v in value.items()}
    if isinstance(value, tuple):
        parts = [_moved(v, device) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value


# ---- which world this process is in ------------------------------------------------------------------------------------

_NOW: list[World] = [World()]


def current() -> World:
    """The world of this process: a single process until `join` is called."""
    return _NOW[0]


def started_by_torchrun() -> bool:
    """Whether this process is one of several, judged by its environment, without importing torch."""
    return all(name in os.environ for name in MASTER) and os.environ["WORLD_SIZE"] not in ("", "1")


@contextmanager
def join(timeout: float, context: int = 1) -> Iterator[World]:
    """Join the processes that torchrun (or `penchant train --processes`) started; a single process joins nothing.

    Args:
        timeout: seconds after which a process that waits for another gives up; context: processes that share each pass.
    """
    if not started_by_torchrun():
        yield current()
        return
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    use_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= local_size
    if use_gpu:
        torch.cuda.set_device(local_rank)
    limit = timedelta(seconds=timeout)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout=limit)
    except dist.DistError as error:
        what = f"process {rank} of {size} did not find the others within {timeout:g} s ({type(error).__name__})"
        raise errors.TrainingStopped("launch.timeout", what, "raise it, or look at why they did not start") from error
    group = dist.new_group(backend="gloo", timeout=limit)
    processes: list[Any] = [None] * size
    dist.all_gather_object(processes, (os.environ.get(MACHINE), os.getpid()), group=group)
    first = First("rank 0", timeout)
    world = World(rank, size, local_rank, local_size, group, first, processes=tuple(processes), timeout=limit)
    if context > 1 and size % context == 0:  # any other number is refused with the config
        neighbors = [
            dist.new_group(list(range(start, start + context)), timeout=limit) for start in range(0, size, context)
        ]
        world = replace(world, context=context, context_group=neighbors[rank // context])
    _NOW[0] = world
    ended_well = False
    try:
        yield _NOW[0]
        ended_well = True
    finally:
        _NOW[0] = World()
        if ended_well:  # after an error, the others may be gone already
            dist.destroy_process_group()


def agreed(error: E) -> E:
    """Mark an error as one that every rank raises; see `launch.leave`."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


# ---- how an error gets from one process to the others, and to the user ---------------------------------------------------


def described(error: BaseException) -> dict[str, Any]:
    """An error as JSON-compatible values; see `error_of`."""
    from penchant.base.mistakes import mistake  # it needs yaml, and `penchant --help` imports this module

    if (user_error := mistake(error)) is not None:
        kind = next(k.__name__ for k in type(user_error).__mro__ if getattr(errors, k.__name__, None) is k)
        return {
            "kind": kind,
            "where": user_error.where,
            "what": user_error.what,
            "how": user_error.how,
            "exit_code": user_error.exit_code,
            "time": time.time(),
        }
    what = f"{type(error).__name__}: {error}"
    return {
        "kind": None,
        "where": "a bug in penchant",
        "what": what,
        "how": "",
        "exit_code": CRASH,
        "time": time.time(),
    }


def error_of(record: Mapping[str, Any]) -> PenchantError:
    """The error from `described`; a bug becomes a `PenchantError` that names its type."""
    kind = getattr(errors, record["kind"] or "", PenchantError)
    error: PenchantError = kind(record["where"], record["what"], record["how"])
    error.exit_code = record["exit_code"]
    return error


ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torch's agent expects a process to write its error


def record(error: BaseException) -> None:
    """Write an error where torch's agent looks for it, so that the launcher can print it once."""
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    description = described(error)
    extra = {"py_callstack": description["what"], "timestamp": str(int(description["time"]))}
    with suppress(OSError):
        Path(path).write_text(
            json.dumps({"message": {"message": str(error), "extraInfo": extra}, "penchant": description})
        )


def ended_on_purpose() -> int | None:
    """The exit code of an earlier attempt that ended without a crash, and so is not restarted; None if there is none."""
    path = Path(os.environ.get(ERROR_FILE, ""))
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or len(path.parents) < 3:
        return None
    for file in sorted(path.parents[2].glob("attempt_*/*/*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            description = json.loads(file.read_text())["penchant"]
            if description["exit_code"] != CRASH:
                return int(description["exit_code"])
    return None


def lost_another(error: BaseException) -> bool:
    """Whether an error only says that another process is gone, whose own error is the one to report."""
    text = f"{type(error).__name__}: {error}"
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "DistBackendError")
    return not isinstance(error, PenchantError) and any(sign in text for sign in signs)


def dealt_passes(
    plan: Sequence[list[int]], call: Callable[[list[int]], T], device: torch.device, sizes: Sequence[int]
) -> list[tuple[list[int], T]]:
    """Divide passes among all ranks; return the result of `call` for each on every rank, in the order of the plan.

    Every rank runs the same number of passes, as a collective inside one needs all ranks. A rank that has none left
    runs one over the smallest tree and discards it.

    Args:
        plan: tree indices of each pass, the same on every rank; sizes: of all trees.
    """
    world = current()
    smallest = min(range(len(sizes)), key=lambda i: sizes[i], default=0)
    own_passes = [*plan, *([[]] * (-len(plan) % world.dealers))][world.dealer :: world.dealers]
    results = [(members, call(members or [smallest])) for members in own_passes]
    per_rank = world.gather_tensors(tuple(value for members, value in results if members), device)
    iterators = [iter(part) for part in per_rank[:: world.context]]
    return [(members, next(iterators[i % world.dealers])) for i, members in enumerate(plan)]
