"""Live views of runs and groups of runs, read from their folders."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from penchant.base.text import clean
from penchant.metrics.names import with_k3
from penchant.runfolder import CONFIG, IDENTITY, METRICS, PIPELINE, SWEEP
from penchant.runfolder.read import CachedFile, LockState, follow, json_object, lock_state
from penchant.runfolder.values import algorithm_of, ci_of, is_online, mapping, mappings, number_of, sequence
from penchant.watch.plot import Point

# ---- Numbers that can be drawn ----

LARGEST = 1e100  # differences of larger numbers may overflow


def number(value: Any) -> float | None:
    """Return a number that can be drawn, or None for anything else found in a file."""
    parsed = number_of(value)
    return None if parsed is None or abs(parsed) >= LARGEST else parsed


def step_count(value: Any) -> int | None:
    """Return a step count, an integer of at least 0, or None."""
    count = number(value)
    return int(count) if count is not None and count >= 0 and count == int(count) else None


def interval(row: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """Return (low, high) of a figure in a row, or None."""
    ci = ci_of(row, key)
    return None if ci is None or max(map(abs, ci)) >= LARGEST else ci


# ---- The state of one run, kept up to date from its folder; nothing is ever written there ----

State = Literal["waiting", "preparing", "running", "paused", "finished", "stopped", "interrupted"]
RECENT = 20  # steps over which speed is averaged for the estimate of the time left
EDGE = 10  # the first and last value of a training figure are means over a tenth of its steps, but at most this many

FIGURES = (  # figures shown, in table order; held-out ones have the prefix eval/
    *("reward", "win_rate", "loss", "rewards/accuracies", "rewards/margins", "kl/k3", "perplexity"),
    *("completions/length", "logps/chosen", "logps/rejected", "calibration/ece", "grad_norm", "lr"),
)


@dataclass(frozen=True, slots=True)
class Speed:
    """Means over recent steps: seconds per step, tokens per second, trees per second."""

    seconds: float
    tokens: float
    trees: float


class RunView:
    """A run, followed live.

    Args:
        folder: the run's folder, which may not exist yet; name: its name on the screen.
        brief: read only the ends of the files, for progress and state; no curves and no samples.
    """

    def __init__(self, folder: Path, name: str, brief: bool = False) -> None:
        self.folder, self.name, self._brief = folder, name, brief
        self.state: State = "waiting"
        self.why = ""
        self.memory: float | None = None
        self.config: dict[str, Any] = {}
        self.manifest: dict[str, Any] = {}
        self.flags: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []  # the last samples: before and after training, or only before
        self._files = follow(folder, brief)
        self._figures = [key for key in FIGURES if key in USUAL] if brief else FIGURES
        self._perf: deque[tuple[int, float, float, float]] = deque(maxlen=RECENT)
        self._reset()

    def _reset(self) -> None:
        self.line: dict[str, list[tuple[float, float]]] = {}  # training figures over steps
        self.points: dict[str, list[Point]] = {}  # held-out figures over steps
        self.last: dict[str, Any] = {}  # the last training line
        self.first_eval: dict[str, Any] = {}
        self.last_eval: dict[str, Any] = {}

    def refresh(self) -> None:
        """Read what is new."""
        files = self._files
        rewritten, rows = files.metrics.read()
        if rewritten:
            self._reset()
        for row in rows:
            self._add_row(row)
        rewritten, rows = files.perf.read()
        if rewritten:
            self._perf.clear()
        for row in rows:
            self._add_speed(row)
        self.config, self.manifest, self.flags = files.config.read(), files.manifest.read(), files.flags.read()
        self.samples = [] if self._brief else files.samples.read() or files.samples_before.read()
        self.state, self.why = self._state(lock_state(self.folder))

    def _add_row(self, row: dict[str, Any]) -> None:
        step, kind = step_count(row.get("step")), row.get("kind")
        if step is None or kind not in ("train", "eval"):
            return
        row = dict(with_k3(row))
        if kind == "train":
            self.last = row
        else:
            self.first_eval, self.last_eval = self.first_eval or row, row
        for key in self._figures if kind == "train" else (f"eval/{key}" for key in self._figures):
            value = number(row[key]) if key in row else None
            if value is None:
                continue
            if kind == "train":
                curve = self.line.setdefault(key, [])
                while curve and curve[-1][0] >= step:
                    curve.pop()
                curve.append((step, value))
            else:
                self.points.setdefault(key, []).append(Point(step, value, interval(row, key)))

    def _add_speed(self, row: Mapping[str, Any]) -> None:
        step, seconds = step_count(row.get("step")), number(row.get("seconds"))
        if step is None or seconds is None:
            return
        while self._perf and self._perf[-1][0] >= step:  # a resumed run repeats these steps
            self._perf.pop()
        tokens, trees = number(row.get("tokens_per_second")) or 0.0, number(row.get("trees_per_second")) or 0.0
        self._perf.append((step, seconds, tokens * seconds, trees * seconds))
        self.memory = number(row.get("peak_memory_gb"))

    # ---- derived values -------------------------------------------------------------------------------------------

    @property
    def unreadable(self) -> int:
        return self._files.metrics.unreadable + self._files.perf.unreadable

    @property
    def step(self) -> int:
        """Optimizer steps done, from metrics.jsonl (truncated when a run resumes) or, if that logs every n-th step only, perf.jsonl."""
        logged_step = step_count(self.last.get("step")) or step_count(self.last_eval.get("step")) or 0
        log_interval = step_count(mapping(self.config.get("logging")).get("every")) or 1
        timed_step = self._perf[-1][0] if self._perf else 0
        return timed_step if logged_step <= timed_step < logged_step + log_interval else logged_step

    @property
    def _train(self) -> dict[str, Any]:
        return mapping(self.config.get("train"))

    @property
    def total(self) -> int | None:
        """Optimizer steps of the whole run, from the manifest; for older runs without that entry, derived from epochs."""
        total_steps = step_count(self.manifest.get("total_steps"))
        if total_steps:
            return total_steps
        if self.state == "finished":
            return step_count(self.manifest.get("steps"))
        epochs, max_steps = number(self._train.get("epochs")), step_count(self._train.get("max_steps"))
        step, epoch = step_count(self.last.get("step")), number(self.last.get("epoch"))
        if not epochs or not step or not epoch:
            return max_steps
        steps = max(1, round(epochs * round(step / epoch)))
        return steps if max_steps is None else min(steps, max_steps)

    @property
    def epoch(self) -> tuple[float | None, float | None]:
        """(epochs done, epochs in all)."""
        epochs, total, epoch = number(self._train.get("epochs")), self.total, number(self.last.get("epoch"))
        step = step_count(self.last.get("step"))
        if epochs is not None and total and step and epoch:
            epochs = min(epochs, total * epoch / step)  # train.max_steps may end training sooner
        return epoch, epochs

    @property
    def speed(self) -> Speed | None:
        rows = [r for r in self._perf if r[0] <= self.step]
        seconds = sum(r[1] for r in rows)
        if not rows or seconds <= 0:
            return None
        return Speed(seconds / len(rows), sum(r[2] for r in rows) / seconds, sum(r[3] for r in rows) / seconds)

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end at the recent speed, without evaluations and checkpoints."""
        speed, total = self.speed, self.total
        return None if speed is None or total is None else max(0, total - self.step) * speed.seconds

    @property
    def elapsed(self) -> float | None:
        """Seconds over all sessions; for an active run, seconds of the current session so far."""
        if self.state not in ("running", "preparing"):
            return number(self.manifest.get("seconds"))
        try:
            started = datetime.strptime(str(self.manifest.get("started")), "%Y-%m-%dT%H:%M:%S%z")
        except ValueError:
            return None
        return max(0.0, time.time() - started.timestamp())

    @property
    def method(self) -> str:
        loss = self.config.get("loss")
        name = (
            algorithm_of(self.config)
            or self.manifest.get("loss")
            or (loss.get("name") if isinstance(loss, dict) else loss)
        )
        return clean(name, 40) if isinstance(name, str) else ""

    @property
    def online(self) -> bool:
        return "reward" in self.last or is_online(self.config)

    def edges(self, key: str) -> tuple[float, float] | None:
        """Return a training figure's mean over its first and over its last steps: a tenth of all, at most EDGE."""
        values = [y for _, y in self.line.get(key, ())]
        n = min(EDGE, max(1, len(values) // 10))
        return (sum(values[:n]) / n, sum(values[-n:]) / n) if len(values) > 1 else None

    def _state(self, lock: LockState) -> tuple[State, str]:
        status = self.manifest.get("status")
        if not is_run(self.folder):
            return "waiting", ""
        if status == "finished":
            return "finished", ""
        if lock == "held" or (lock == "elsewhere" and status == "running"):
            where = "" if lock == "held" else "on another machine, as its files say"
            return ("running" if status == "running" and self.step else "preparing"), where
        if status == "paused":
            return "paused", clean(self.manifest.get("why", ""), 300)
        if status == "stopped":  # stopped early by itself or by a signal; older manifests do not say which
            why = self.manifest.get("why")
            if not isinstance(why, str):
                batch = self.folder / f"stopped-batch-step-{self.manifest.get('steps')}.json"
                why = CachedFile[Any](batch, json_object, {}).read().get("what")
            has_reason = isinstance(why, str)
            return ("stopped", clean(why, 300)) if has_reason else ("interrupted", "it ended before its last step")
        if status is None:
            return "interrupted", "it has no manifest.json" if self.step else "before its first step"
        prefix = "its process died without a message; " if status == "running" else ""
        return "interrupted", f"{prefix}run the same command to resume"


# ---- Several runs: those of a sweep, a pipeline or a folder, or a list of runs ----

DEPTH = 3  # levels below the given folder to search for runs
USUAL = ("eval/reward", "eval/rewards/accuracies", "eval/loss", "reward", "rewards/accuracies", "loss")
ENDED = ("finished", "stopped", "cut")
OPEN_STATES = ("running", "preparing")

Status = State | str  # a run's state, or `cut` (by successive halving) or `to come`


@dataclass(frozen=True, slots=True)
class Metric:
    """The metric that runs are compared by: name, value and 95% interval over held-out rows."""

    name: str
    value: float
    interval: tuple[float, float] | None = None


@dataclass(slots=True)
class Member:
    """One of several runs: its view, and its record in the sweep or pipeline."""

    view: RunView
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> Status:
        status = self.record.get("state")
        if status in ENDED:
            return str(status)
        if self.view.state == "finished":  # the record is written only after the run has finished
            return "finished"
        return "to come" if self.view.state == "waiting" else self.view.state

    @property
    def why(self) -> str:
        return clean(self.record.get("why") or self.view.why, 300)

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def elapsed(self) -> float | None:
        """Seconds over all sessions from the record, if it has them, else those of the view."""
        return number(self.record.get("seconds")) or self.view.elapsed

    @property
    def steps(self) -> tuple[int, int | None]:
        """(steps done, steps in all), from the record if the run's files are gone or belong to another session."""
        recorded = step_count(self.record.get("steps"))
        return (self.view.step or recorded or 0), self.view.total or (recorded if self.state == "finished" else None)

    @property
    def _rung_metrics(self) -> dict[str, Any]:
        """The metrics at the last rung of a run that is paused or cut there; they are not in the run's own files."""
        if self.state not in ("paused", "cut"):
            return {}
        rungs = mappings([*mapping(self.record.get("rungs")).values()])
        last = max(rungs, key=lambda r: step_count(r.get("step")) or 0, default={})
        return mapping(last.get("metrics"))

    def metric(self, name: str | None) -> Metric | None:
        """Return the metric's last held-out value (at its rung, if the run waits there), else its mean over the last training steps."""
        last = self._rung_metrics or self.view.last_eval
        for key in (name,) if name else USUAL:
            value = number(last.get(key))
            if value is not None:
                return Metric(key, value, interval(last, key))
            edges = self.view.edges(key)
            if edges is not None:
                return Metric(f"train {key}", edges[1])
        return None


class GroupView:
    """Several runs, their states, and the time left for all of them.

    Args:
        title: heading; kind: ``sweep``, ``pipeline`` or ``runs``; folder: of the sweep or pipeline; run_folders: folders to show.
    """

    def __init__(self, title: str, kind: str, folder: Path | None = None, run_folders: Sequence[Path] = ()) -> None:
        self.title, self.kind, self.folder, self.run_folders = title, kind, folder, run_folders
        self.members: list[Member] = []
        self.record: dict[str, Any] = {}  # contents of sweep.json or pipeline.json
        self._file = (
            None if folder is None or kind == "runs" else CachedFile[Any](folder / f"{kind}.json", json_object, {})
        )
        self._views: dict[Path, RunView] = {}

    @property
    def about(self) -> Mapping[str, Any]:
        """The entry of `sweep.json` or `pipeline.json` on the whole: all names of runs or stages, a sweep's metric and halving."""
        return mapping(self.record.get(self.kind))

    @property
    def metric(self) -> str | None:
        name = self.about.get("metric") or mapping(self.record.get("table")).get("metric")
        return name if isinstance(name, str) else None

    def refresh(self) -> None:
        """Read what is new in every run that has not ended by its record; a stopped run without one may be resumed."""
        if self._file is not None:
            self.record = self._file.read()
        members = []
        for name, folder, record in self._member_folders():
            view = self._views.setdefault(folder, RunView(folder, name))
            member = Member(view, record)
            if not (record.get("state") in ENDED and view.last):  # a run that has ended is read only once
                view.refresh()
            members.append(member)
        self.members = members

    def _member_folders(self) -> Iterator[tuple[str, Path, Mapping[str, Any]]]:
        if self.folder is None:
            yield from ((clean(path, 200), path, {}) for path in self.run_folders)
        elif self._file is None:
            yield from ((clean(path.relative_to(self.folder), 200), path, {}) for path in runs_below(self.folder))
        else:
            key = "runs" if self.kind == "sweep" else "stages"
            records = {k: v for k, v in mapping(self.record.get(key)).items() if isinstance(v, dict)}
            if self.kind == "pipeline":  # an interrupted stage is "stopped" there too; its own folder tells them apart
                records = {k: {**v, "state": None} for k, v in records.items()}
            names = [n for n in sequence(self.about.get(key)) if isinstance(n, str)] or records
            for name in dict.fromkeys(names):
                # no path that leads elsewhere
                if Path(name).name == name and name not in ("", "..") and "\0" not in name:
                    yield clean(name, 200), self.folder / name, records.get(name, {})

    # ---- derived values -------------------------------------------------------------------------------------------

    @property
    def counts(self) -> Mapping[Status, int]:
        return Counter(m.state for m in self.members)

    @property
    def is_active(self) -> bool:
        """True if a run is active, or if none is but the sweep's or pipeline's own process holds its lock."""
        locked = self._file is not None and lock_state(self._file.path.parent) == "held"
        return locked or any(m.state in OPEN_STATES for m in self.members)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until all runs are done: the remaining steps at the measured speeds, divided by the number of active runs.

        With successive halving this is an upper bound, since it assumes that no further run is cut.
        """
        active = max(1, sum(m.state in OPEN_STATES for m in self.members))
        speeds = [s.seconds for m in self.members if (s := m.view.speed) is not None]
        totals = [t for m in self.members if (t := m.view.total) is not None]
        if not self.is_active or not speeds or not totals or self.kind == "pipeline":
            return None
        mean_seconds, steps = sum(speeds) / len(speeds), sum(totals) / len(totals)
        remaining = [(m, max(0.0, (m.view.total or steps) - m.view.step)) for m in self.members if not m.ended]
        return sum(n * (s.seconds if (s := m.view.speed) is not None else mean_seconds) for m, n in remaining) / active


def runs_below(folder: Path) -> list[Path]:
    """Return the run folders below a folder, sorted; the inside of a run is not searched."""
    run_folders: list[Path] = []
    level = [folder]
    for _ in range(DEPTH):
        subfolders = [p for f in level for p in _folders(f)]
        runs = [p for p in subfolders if is_run(p)]
        run_folders += runs
        level = [p for p in subfolders if p not in runs]
    return sorted(run_folders)


def is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (IDENTITY, CONFIG, METRICS))


def _folders(folder: Path) -> list[Path]:
    try:
        return [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.is_symlink() and p.name[0] != "."]
    except OSError:
        return []


def open_view(paths: Sequence[Path]) -> RunView | GroupView:
    """Open what the paths hold: one run (possibly still to come), a sweep, a pipeline, a folder of runs, or several runs."""
    if len(paths) > 1:
        return GroupView(f"{len(paths)} runs", "runs", run_folders=paths)
    folder = paths[0]
    for name in (SWEEP, PIPELINE):
        if (folder / name).exists():
            return GroupView(clean(folder, 200), name.removesuffix(".json"), folder)
    if not is_run(folder) and runs_below(folder):
        return GroupView(clean(folder, 200), "runs", folder)
    return RunView(folder, clean(folder, 200))
