"""The tracker protocol, the registry of trackers, and the record of what each has been sent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from penchant.base.files import write_atomically
from penchant.runfolder import METRICS, PERF
from penchant.runfolder import read as runfolder
from penchant.runfolder.values import number_of

# ---- The protocol: three calls, made in a separate process so that errors and delays never reach training ----


@dataclass(frozen=True, slots=True)
class Line:
    """A line of `metrics.jsonl` or `perf.jsonl` in the form that trackers get.

    Args:
        kind: train, eval or perf; step: optimizer steps done; values: finite numbers by display name.
    """

    kind: str
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Description of a run for its trackers.

    Args:
        folder: the run's folder; name, project, group, tags: how the run is filed; dir: where a tracker writes on this machine.
        own_dir: whether the user chose `dir`; config: the resolved config; id: the tracker's id of a run to continue, None for a new run.
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
    """A run in a tracker: its id, used to continue it, and where to look at it (a URL or a path)."""

    id: str
    where: str


class Tracker(Protocol):
    """One tracker. It may raise or hang without affecting training."""

    def start(self, info: RunInfo) -> Started:
        """Open a run, or continue ``info.id``."""
        ...

    def log(self, lines: Sequence[Line]) -> None:
        """Send lines in order; once it returns, they count as sent."""
        ...

    def finish(self, status: str, summary: Mapping[str, Any], samples: Sequence[Mapping[str, str]]) -> None:
        """Close the run.

        Args:
            status: finished, interrupted, paused, stopped or killed; summary: last figures by name; samples: rows of `samples.jsonl`.
        """
        ...


# ---- The registry. A new tracker is a class with the three calls of `Tracker` and a line here ----


@dataclass(frozen=True, slots=True)
class TrackerSpec:
    """An entry of the registry.

    Args:
        name: as in `logging.trackers`; label: display name; module: must be importable; extra: the pip extra that installs it.
        factory: ``module:Class``, constructed without arguments in the tracker's own process.
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


# ---- The record in the run folder: the tracker's run, and the last step of each kind that it was sent ----

FOLDER = "trackers"


@dataclass(slots=True)
class Sent:
    """Contents of `RUN/trackers/NAME.json`.

    Args:
        id, where: of the tracker's run, None before it exists; sent: last step sent, by kind; lines: number of lines sent.
        unsent: number of known lines not sent yet; error: of the latest session, without secrets, if it has not recovered.
    """

    id: str | None = None
    where: str | None = None
    sent: dict[str, int] = field(default_factory=dict)
    lines: int = 0
    unsent: int = 0
    error: str | None = None

    def add(self, lines: Sequence[Line]) -> None:
        """Count lines that the tracker accepted."""
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
    """Return the record of a tracker, empty if the file is missing or damaged."""
    try:
        record = json.loads(sent_file(folder, tracker).read_text(encoding="utf-8"))
        return Sent(**{name: record[name] for name in Sent.__dataclass_fields__ if name in record})
    except (OSError, ValueError, TypeError, AttributeError):
        return Sent()


# ---- From log files to tracker lines: complete lines only, each once, under the usual names ----

FILES = {METRICS: None, PERF: "perf"}  # the kind of lines that do not state it
NON_METRICS = ("kind", "step")
STEP = "train/global_step"


def to_line(row: Mapping[str, Any], kind: str | None = None) -> Line:
    """Convert a row to a line with names like ``train/loss``, ``eval/loss`` or ``perf/tokens_per_second``; an interval becomes two values.

    Text and nulls are left out, since trackers plot numbers.
    """
    kind = kind or str(row["kind"])
    values = {
        label: value
        for name, raw_value in row.items()
        if name not in NON_METRICS
        for label, value in _flatten(f"{kind}/{name.removeprefix(f'{kind}/')}", raw_value)
    }
    return Line(kind, int(row["step"]), values)


def _flatten(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, (bool, int, float)):
        number = number_of(value + 0)  # a bool as 0 or 1
        if number is not None:
            yield name, number
    elif isinstance(value, Sequence) and not isinstance(value, str) and name.endswith("/ci") and len(value) == 2:
        for end, bound in zip(("low", "high"), value, strict=True):
            yield from _flatten(f"{name}_{end}", bound)


class Tail:
    """Reads the lines added to a run's logs since the last call; incomplete lines are left for later."""

    def __init__(self, folder: Path) -> None:
        self._logs = [(runfolder.Tail(folder / name), kind) for name, kind in FILES.items()]

    def new(self) -> list[Line]:
        """Return new lines ordered by step; within a step in the order they are written: train, its speed, eval.

        If a log was truncated, all of its lines are returned again, since a resumed run writes the same ones. Lines that no run wrote
        are left out.
        """
        rows = [(row, kind) for log, kind in self._logs for row in log.read()[1]]
        lines = [
            to_line(row, kind)
            for row, kind in rows
            if type(row.get("step")) is int and isinstance(kind or row.get("kind"), str)
        ]
        return sorted(lines, key=lambda line: (line.step, line.kind == "eval"))


def unsent(lines: Sequence[Line], sent: Mapping[str, int]) -> list[Line]:
    """Return the lines whose step is after the last one sent of their kind; steps that a resumed run logs again are left out."""
    last_sent = dict(sent)
    new_lines = []
    for line in lines:
        if line.step > last_sent.get(line.kind, -1):
            last_sent[line.kind] = line.step
            new_lines.append(line)
    return new_lines
