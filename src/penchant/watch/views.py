"""Runs, followed."""

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
from penchant.runfolder.read import Held, Whole, follow, json_object, lock_of
from penchant.runfolder.values import algorithm_of, ci_of, is_online, mapping, mappings, number_of, sequence
from penchant.watch.plot import Point

# ---- Numbers that a terminal can draw ----

LARGEST = 1e100  # differences of larger numbers may not be finite


def number(value: Any) -> float | None:
    """A number that can be drawn, or None for anything else that a file may hold in its place."""
    made = number_of(value)
    return None if made is None or abs(made) >= LARGEST else made


def whole(value: Any) -> int | None:
    """A number of steps: whole and not below 0."""
    made = number(value)
    return int(made) if made is not None and made >= 0 and made == int(made) else None


def interval(row: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """(low, high) of a line's figure, or None."""
    found = ci_of(row, key)
    return None if found is None or max(map(abs, found)) >= LARGEST else found


# ---- What a run's folder says of it, kept up to date as the run goes on. Nothing is ever written there ----

State = Literal["waiting", "preparing", "running", "paused", "finished", "stopped", "interrupted"]
RECENT = 20  # steps whose mean speed the time left follows from
EDGE = 10  # a training figure's first and last value are means over a tenth of its steps, at most so many

FIGURES = (  # what is shown of training and, with eval/ before it, of held-out rows, in the order of the table
    *("reward", "win_rate", "loss", "rewards/accuracies", "rewards/margins", "kl/k3", "perplexity"),
    *("completions/length", "logps/chosen", "logps/rejected", "calibration/ece", "grad_norm", "lr"),
)


@dataclass(frozen=True, slots=True)
class Speed:
    """The mean over recent steps."""

    seconds: float
    tokens: float
    trees: float


class RunView:
    """One run, followed.

    Args:
        folder: the run's, which may not exist yet; name: what it is called on the screen.
        brief: where it is and how it stands, from the end of its files: no curves and no samples.
    """

    def __init__(self, folder: Path, name: str, brief: bool = False) -> None:
        self.folder, self.name, self._brief = folder, name, brief
        self.state: State = "waiting"
        self.why = ""
        self.memory: float | None = None
        self.config: dict[str, Any] = {}
        self.manifest: dict[str, Any] = {}
        self.flags: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []  # the last answers: before and after training, or only those before
        self._files = follow(folder, brief)
        self._figures = [key for key in FIGURES if key in USUAL] if brief else FIGURES
        self._perf: deque[tuple[int, float, float, float]] = deque(maxlen=RECENT)
        self._forget()

    def _forget(self) -> None:
        self.line: dict[str, list[tuple[float, float]]] = {}  # training figures over steps
        self.points: dict[str, list[Point]] = {}  # held-out figures over steps
        self.last: dict[str, Any] = {}  # the last training line
        self.first_eval: dict[str, Any] = {}
        self.last_eval: dict[str, Any] = {}

    def refresh(self) -> None:
        """Read what is new."""
        files = self._files
        anew, rows = files.metrics.read()
        if anew:
            self._forget()
        for row in rows:
            self._take(row)
        anew, rows = files.perf.read()
        if anew:
            self._perf.clear()
        for row in rows:
            self._take_speed(row)
        self.config, self.manifest, self.flags = files.config.read(), files.manifest.read(), files.flags.read()
        self.samples = [] if self._brief else files.samples.read() or files.samples_before.read()
        self.state, self.why = self._state(lock_of(self.folder))

    def _take(self, row: dict[str, Any]) -> None:
        step, kind = whole(row.get("step")), row.get("kind")
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
                known = self.line.setdefault(key, [])
                while known and known[-1][0] >= step:
                    known.pop()
                known.append((step, value))
            else:
                self.points.setdefault(key, []).append(Point(step, value, interval(row, key)))

    def _take_speed(self, row: Mapping[str, Any]) -> None:
        step, seconds = whole(row.get("step")), number(row.get("seconds"))
        if step is None or seconds is None:
            return
        while self._perf and self._perf[-1][0] >= step:  # a resumed run does these steps again
            self._perf.pop()
        tokens, trees = number(row.get("tokens_per_second")) or 0.0, number(row.get("trees_per_second")) or 0.0
        self._perf.append((step, seconds, tokens * seconds, trees * seconds))
        self.memory = number(row.get("peak_memory_gb"))

    # ---- what follows ---------------------------------------------------------------------------------------------

    @property
    def unreadable(self) -> int:
        return self._files.metrics.unreadable + self._files.perf.unreadable

    @property
    def step(self) -> int:
        """Optimizer steps done: of metrics.jsonl, which a resumed run cuts back; of perf.jsonl where that logs only every n-th."""
        logged = whole(self.last.get("step")) or whole(self.last_eval.get("step")) or 0
        every = whole(mapping(self.config.get("logging")).get("every")) or 1
        timed = self._perf[-1][0] if self._perf else 0
        return timed if logged <= timed < logged + every else logged

    @property
    def _train(self) -> dict[str, Any]:
        return mapping(self.config.get("train"))

    @property
    def total(self) -> int | None:
        """Optimizer steps of the whole run: as the manifest says, or from epochs where an older run's does not."""
        said = whole(self.manifest.get("total_steps"))
        if said:
            return said
        if self.state == "finished":
            return whole(self.manifest.get("steps"))
        epochs, most = number(self._train.get("epochs")), whole(self._train.get("max_steps"))
        step, epoch = whole(self.last.get("step")), number(self.last.get("epoch"))
        if not epochs or not step or not epoch:
            return most
        steps = max(1, round(epochs * round(step / epoch)))
        return steps if most is None else min(steps, most)

    @property
    def epoch(self) -> tuple[float | None, float | None]:
        """(done, of)."""
        epochs, total, epoch = number(self._train.get("epochs")), self.total, number(self.last.get("epoch"))
        step = whole(self.last.get("step"))
        if epochs is not None and total and step and epoch:
            epochs = min(epochs, total * epoch / step)  # train.max_steps may end it sooner
        return epoch, epochs

    @property
    def speed(self) -> Speed | None:
        rows = [r for r in self._perf if r[0] <= self.step]
        seconds = sum(r[1] for r in rows)
        if not rows or seconds <= 0:
            return None
        return Speed(seconds / len(rows), sum(r[2] for r in rows) / seconds, sum(r[3] for r in rows) / seconds)

    @property
    def left(self) -> float | None:
        """Seconds to the end at the speed of the last steps, without evaluations and checkpoints."""
        speed, total = self.speed, self.total
        return None if speed is None or total is None else max(0, total - self.step) * speed.seconds

    @property
    def took(self) -> float | None:
        """Seconds of all sessions; of the present one so far, where it goes on."""
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
        """A training figure's mean over its first and over its last steps: a tenth of all, at most EDGE."""
        values = [y for _, y in self.line.get(key, ())]
        n = min(EDGE, max(1, len(values) // 10))
        return (sum(values[:n]) / n, sum(values[-n:]) / n) if len(values) > 1 else None

    def _state(self, lock: Held) -> tuple[State, str]:
        said = self.manifest.get("status")
        if not is_run(self.folder):
            return "waiting", ""
        if said == "finished":
            return "finished", ""
        if lock == "held" or (lock == "elsewhere" and said == "running"):
            where = "" if lock == "held" else "on another machine, as its files say"
            return ("running" if said == "running" and self.step else "preparing"), where
        if said == "paused":
            return "paused", clean(self.manifest.get("why", ""), 300)
        if said == "stopped":  # it ended before its end: by itself, or by a signal (older ones do not say which)
            why = self.manifest.get("why")
            if not isinstance(why, str):
                batch = self.folder / f"stopped-batch-step-{self.manifest.get('steps')}.json"
                why = Whole[Any](batch, json_object, {}).read().get("what")
            known = isinstance(why, str)
            return ("stopped", clean(why, 300)) if known else ("interrupted", "it ended before its last step")
        if said is None:
            return "interrupted", "it has no manifest.json" if self.step else "before its first step"
        ended = "its process ended without a word; " if said == "running" else ""
        return "interrupted", f"{ended}the same command continues"


# ---- Several runs, followed: those of a sweep, of a pipeline, of a folder, or as they are named ----

DEPTH = 3  # folders below the one that is named in which runs are looked for
USUAL = ("eval/reward", "eval/rewards/accuracies", "eval/loss", "reward", "rewards/accuracies", "loss")
ENDED = ("finished", "stopped", "cut")
OPEN_STATES = ("running", "preparing")

Status = State | str  # a run's, or `cut` (by successive halving) and `to come`


@dataclass(frozen=True, slots=True)
class Metric:
    """What runs are compared by: its name, value and 95% interval over held-out rows."""

    name: str
    value: float
    interval: tuple[float, float] | None = None


@dataclass(slots=True)
class Member:
    """One run of several: what its folder says, and what the sweep or pipeline says of it."""

    view: RunView
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> Status:
        said = self.record.get("state")
        if said in ENDED:
            return str(said)
        if self.view.state == "finished":  # its record is written after the run's own end
            return "finished"
        return "to come" if self.view.state == "waiting" else self.view.state

    @property
    def why(self) -> str:
        return clean(self.record.get("why") or self.view.why, 300)

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def took(self) -> float | None:
        """Seconds: of all its sessions where its record says them."""
        return number(self.record.get("seconds")) or self.view.took

    @property
    def steps(self) -> tuple[int, int | None]:
        """(done, of): where the run's files are gone or of another session, as its record says."""
        said = whole(self.record.get("steps"))
        return (self.view.step or said or 0), self.view.total or (said if self.state == "finished" else None)

    @property
    def _at_rung(self) -> dict[str, Any]:
        """Its figures at the last rung that it has reached, if it stands there; they are in none of its own files."""
        if self.state not in ("paused", "cut"):
            return {}
        rungs = mappings([*mapping(self.record.get("rungs")).values()])
        last = max(rungs, key=lambda r: whole(r.get("step")) or 0, default={})
        return mapping(last.get("metrics"))

    def metric(self, name: str | None) -> Metric | None:
        """The metric's last value: held out where there is one (of a run at a rung: there), else the mean of the last training steps."""
        last = self._at_rung or self.view.last_eval
        for key in (name,) if name else USUAL:
            value = number(last.get(key))
            if value is not None:
                return Metric(key, value, interval(last, key))
            edges = self.view.edges(key)
            if edges is not None:
                return Metric(f"train {key}", edges[1])
        return None


class GroupView:
    """Runs, their states, and what is left of all of them.

    Args:
        title: shown above them; kind: ``sweep``, ``pipeline`` or ``runs``; folder: of the sweep or pipeline; named: runs by their folders.
    """

    def __init__(self, title: str, kind: str, folder: Path | None = None, named: Sequence[Path] = ()) -> None:
        self.title, self.kind, self.folder, self.named = title, kind, folder, named
        self.members: list[Member] = []
        self.record: dict[str, Any] = {}  # what sweep.json or pipeline.json says
        self._file = None if folder is None or kind == "runs" else Whole[Any](folder / f"{kind}.json", json_object, {})
        self._known: dict[Path, RunView] = {}

    @property
    def about(self) -> Mapping[str, Any]:
        """What `sweep.json` says of the sweep: its runs, metric and halving."""
        return mapping(self.record.get("sweep"))

    @property
    def metric(self) -> str | None:
        found = self.about.get("metric") or mapping(self.record.get("table")).get("metric")
        return found if isinstance(found, str) else None

    def refresh(self) -> None:
        """Read what is new in every run that has not ended."""
        if self._file is not None:
            self.record = self._file.read()
        made = []
        for name, folder, record in self._listed():
            view = self._known.setdefault(folder, RunView(folder, name))
            member = Member(view, record)
            if not (member.ended and view.last):  # a run that has ended is read once
                view.refresh()
            made.append(member)
        self.members = made

    def _listed(self) -> Iterator[tuple[str, Path, Mapping[str, Any]]]:
        if self.folder is None:
            yield from ((clean(path, 200), path, {}) for path in self.named)
        elif self._file is None:
            yield from ((clean(path.relative_to(self.folder), 200), path, {}) for path in runs_below(self.folder))
        else:
            records = mapping(self.record.get("runs" if self.kind == "sweep" else "stages"))
            records = {k: v for k, v in records.items() if isinstance(v, dict)}
            names = [n for n in sequence(self.about.get("runs")) if isinstance(n, str)] or records
            for name in dict.fromkeys(names):
                if (
                    Path(name).name == name and name not in ("", "..") and "\0" not in name
                ):  # no path that leads elsewhere
                    yield clean(name, 200), self.folder / name, records.get(name, {})

    # ---- what follows ---------------------------------------------------------------------------------------------

    @property
    def counts(self) -> Mapping[Status, int]:
        return Counter(m.state for m in self.members)

    @property
    def going(self) -> bool:
        """Whether any of it goes on; between two of its runs none does, but the sweep's or pipeline's own process is there."""
        held = self._file is not None and lock_of(self._file.path.parent) == "held"
        return held or any(m.state in OPEN_STATES for m in self.members)

    @property
    def left(self) -> float | None:
        """Seconds until all are done: steps that are still to be done at the speed of those that were, over the runs that go on now.

        With successive halving an upper bound: it counts every run that is still in as one that stays.
        """
        at_once = max(1, sum(m.state in OPEN_STATES for m in self.members))
        speeds = [s.seconds for m in self.members if (s := m.view.speed) is not None]
        totals = [t for m in self.members if (t := m.view.total) is not None]
        if not self.going or not speeds or not totals or self.kind == "pipeline":
            return None
        usual, steps = sum(speeds) / len(speeds), sum(totals) / len(totals)
        todo = [(m, max(0.0, (m.view.total or steps) - m.view.step)) for m in self.members if not m.ended]
        return sum(n * (s.seconds if (s := m.view.speed) is not None else usual) for m, n in todo) / at_once


def runs_below(folder: Path) -> list[Path]:
    """Run folders below a folder, by name; not those within a run."""
    found: list[Path] = []
    level = [folder]
    for _ in range(DEPTH):
        below = [p for f in level for p in _folders(f)]
        runs = [p for p in below if is_run(p)]
        found += runs
        level = [p for p in below if p not in runs]
    return sorted(found)


def is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (IDENTITY, CONFIG, METRICS))


def _folders(folder: Path) -> list[Path]:
    try:
        return [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.is_symlink() and p.name[0] != "."]
    except OSError:
        return []


def open_view(paths: Sequence[Path]) -> RunView | GroupView:
    """What the paths hold: one run (that may be still to come), a sweep, a pipeline, a folder of runs, or several runs."""
    if len(paths) > 1:
        return GroupView(f"{len(paths)} runs", "runs", named=paths)
    folder = paths[0]
    for name in (SWEEP, PIPELINE):
        if (folder / name).exists():
            return GroupView(clean(folder, 200), name.removesuffix(".json"), folder)
    if not is_run(folder) and runs_below(folder):
        return GroupView(clean(folder, 200), "runs", folder)
    return RunView(folder, clean(folder, 200))
