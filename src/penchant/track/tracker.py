"""What a tracker is, and what it has been sent."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from penchant.base.files import write_atomically
from penchant.runfolder import METRICS, PERF
from penchant.runfolder import read as runfolder

# ---- What a tracker is: three calls, made in a process of its own, from which no error and no delay reaches training ----


@dataclass(frozen=True, slots=True)
class Line:
    """A line of `metrics.jsonl` or `perf.jsonl` as trackers get it.

    Args:
        kind: train, eval or perf; step: optimizer steps done; values: finite numbers by the name that they are shown under.
    """

    kind: str
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Which run it is.

    Args:
        folder: the run's; name, project, group, tags: as a person finds it among others; dir: where a tracker writes on this machine.
        own_dir: whether a person chose `dir`; config: the resolved config; id: of the tracker's run that is continued, None for a new one.
    """

    folder: str
    name: str
    project: str
    dir: str
    own_dir: bool = False
    group: str | None = None
    tags: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """A tracker's run: its id, by which it is continued, and where a person looks at it (an address or a path)."""

    id: str
    where: str


class Tracker(Protocol):
    """One tracker; it may raise and hang as it likes."""

    def start(self, info: RunInfo) -> Started:
        """Open a run, or continue ``info.id``."""
        ...

    def log(self, lines: Sequence[Line]) -> None:
        """Send lines, in order; when it returns they count as sent."""
        ...

    def finish(self, status: str, summary: Mapping[str, Any], samples: Sequence[Mapping[str, str]]) -> None:
        """Close the run.

        Args:
            status: finished, interrupted, paused, stopped or killed; summary: last figures by name; samples: rows of `samples.jsonl`.
        """
        ...


# ---- The trackers that there are. A new one is a file with the three calls of `protocol.Tracker` and a line here ----


@dataclass(frozen=True, slots=True)
class TrackerSpec:
    """A tracker.

    Args:
        name: what `logging.trackers` says; label: what people call it; module: what must be importable; extra: of pip that installs it.
        factory: ``module:Class``, made without arguments in the tracker's own process.
    """

    name: str
    label: str
    module: str
    extra: str
    factory: str


TRACKERS = {
    spec.name: spec
    for spec in (
        TrackerSpec("wandb", "W&B", "wandb", "wandb", "penchant.track.backends:WeightsAndBiases"),
        TrackerSpec("tensorboard", "TensorBoard", "tensorboard", "tensorboard", "penchant.track.backends:TensorBoard"),
        TrackerSpec("mlflow", "MLflow", "mlflow", "mlflow", "penchant.track.backends:MLflow"),
        TrackerSpec("trackio", "Trackio", "trackio", "trackio", "penchant.track.backends:Trackio"),
    )
}


# ---- What a run folder remembers of a tracker: its run there, and the last step of each kind that it was sent ----

FOLDER = "trackers"


@dataclass(slots=True)
class Sent:
    """`RUN/trackers/NAME.json`.

    Args:
        id, where: of the tracker's run, None before there is one; sent: last step by kind; lines: how many were sent.
        unsent: lines that are known and not sent; error: the first error of the last time, without secrets.
    """

    id: str | None = None
    where: str | None = None
    sent: dict[str, int] = field(default_factory=dict)
    lines: int = 0
    unsent: int = 0
    error: str | None = None

    def add(self, lines: Sequence[Line]) -> None:
        """Count lines that the tracker took."""
        self.lines += len(lines)
        for line in lines:
            self.sent[line.kind] = max(line.step, self.sent.get(line.kind, -1))

    def write(self, folder: Path, tracker: str) -> None:
        path = sent_file(folder, tracker)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, asdict(self))


def sent_file(folder: Path, tracker: str) -> Path:
    return folder / FOLDER / f"{tracker}.json"


def sent_to(folder: Path, tracker: str) -> Sent:
    """What is known of a tracker; nothing where the file is absent or torn."""
    try:
        found = json.loads(sent_file(folder, tracker).read_text(encoding="utf-8"))
        return Sent(**{name: found[name] for name in Sent.__dataclass_fields__ if name in found})
    except (OSError, ValueError, TypeError, AttributeError):
        return Sent()


# ---- From the run's own files to what trackers get: names as the field has them, whole lines only, each once ----

FILES = {METRICS: None, PERF: "perf"}  # the kind of a line that does not say it
NOT_VALUES = ("kind", "step")
STEP = "train/global_step"


def as_line(row: Mapping[str, Any], kind: str | None = None) -> Line:
    """A row as trackers get it: ``train/loss``, ``eval/loss``, ``perf/tokens_per_second``; an interval becomes its two ends.

    Words and nulls are left out: a tracker draws numbers.
    """
    kind = kind or str(row["kind"])
    values = {
        shown: float(value)
        for name, given in row.items()
        if name not in NOT_VALUES
        for shown, value in _numbers(f"{kind}/{name.removeprefix(f'{kind}/')}", given)
    }
    return Line(kind, int(row["step"]), values)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, (bool, int, float)):
        if math.isfinite(value):
            yield name, value
    elif isinstance(value, Sequence) and not isinstance(value, str) and name.endswith("/ci") and len(value) == 2:
        for end, bound in zip(("low", "high"), value, strict=True):
            yield from _numbers(f"{name}_{end}", bound)


class Tail:
    """The lines that were added to a run's logs since it was asked last; half-written ones wait for their end."""

    def __init__(self, folder: Path) -> None:
        self._logs = [(runfolder.Tail(folder / name), kind) for name, kind in FILES.items()]

    def new(self) -> list[Line]:
        """Lines in the order of their steps; of one step as they were written: train, then its speed, then eval.

        Where a log was cut back, all of its lines again: a resumed run writes the same ones.
        """
        rows = [(row, kind) for log, kind in self._logs for row in log.read()[1]]
        found = [as_line(row, kind) for row, kind in rows if isinstance(row.get("step"), int)]
        return sorted(found, key=lambda line: (line.step, line.kind == "eval"))


def unsent(lines: Sequence[Line], sent: Mapping[str, int]) -> list[Line]:
    """Lines whose step is beyond the last one of their kind that was sent; what a resumed run writes again is among the others."""
    high = dict(sent)
    found = []
    for line in lines:
        if line.step > high.get(line.kind, -1):
            high[line.kind] = line.step
            found.append(line)
    return found
