"""Runs, followed."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from penchant.metrics.names import METRICS
from penchant.watch.plot import Point
from penchant.watch.text import clean, interval, number, whole

# ---- Files that another process writes: read as they grow, each byte once, and only read ----

CHUNK = 1 << 20  # bytes read at once
MARK = 256  # bytes before the place reached, by which a file is known again
LARGEST = 1 << 24  # bytes of a file that is read whole; a longer one is not what it says


class Tail:
    """The rows of a JSONL file that grows.

    A last line without its end is left for the next call. Where the file became shorter, was replaced, or holds other bytes before the
    place reached (a resumed run cuts its log back and writes on), it is read from its start.

    Args:
        path: may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unreadable = 0  # whole lines that are no JSON object
        self._offset = 0
        self._mark = b""
        self._seen: tuple[int, int, int] | None = None

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """(whether what earlier calls gave holds no longer, the new rows)."""
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                if seen == self._seen:
                    return False, []
                anew = self._offset > 0 and not self._is_same(file, stat.st_ino)
                if anew:
                    self._forget()
                self._seen = seen
                return anew, self._rows(file)
        except OSError:  # not there (yet, or any more)
            anew = self._offset > 0
            self._forget()
            return anew, []

    def _forget(self) -> None:
        self._offset, self._mark, self._seen, self.unreadable = 0, b"", None, 0

    def _is_same(self, file: Any, inode: int) -> bool:
        if self._seen is None or inode != self._seen[0]:
            return False
        file.seek(self._offset - len(self._mark))
        return bool(file.read(len(self._mark)) == self._mark)

    def _rows(self, file: Any) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        file.seek(self._offset)
        rest = b""
        while chunk := file.read(CHUNK):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._offset += len(line) + 1
                self._mark = (self._mark + line + b"\n")[-MARK:]
                row = _object(line)
                if row is not None:
                    rows.append(row)
                elif line.strip():
                    self.unreadable += 1
        return rows


class Whole:
    """What a small file says, parsed again only when the file has changed; what it last said where it cannot be read now.

    Args:
        parse: of its text; raises ValueError where the text is not what it should be.
    """

    def __init__(self, path: Path, parse: Callable[[str], Any], empty: Any) -> None:
        self.path = path
        self.value = empty
        self._parse = parse
        self._seen: tuple[int, int, int] | None = None

    def read(self) -> Any:
        try:
            stat = self.path.stat()
            seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if seen != self._seen and stat.st_size <= LARGEST:
                self._seen = seen
                self.value = self._parse(self.path.read_text(encoding="utf-8", errors="replace"))
        except (OSError, ValueError, RecursionError):
            pass
        return self.value


def json_object(text: str) -> dict[str, Any]:
    """A JSON object; anything else is a ValueError."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def json_rows(text: str) -> list[dict[str, Any]]:
    """The objects of a JSONL text, without lines that are none."""
    return [row for line in text.split("\n") if (row := _object(line.encode(errors="replace"))) is not None]


def yaml_object(text: str) -> dict[str, Any]:
    """A YAML mapping; anything else is a ValueError."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if not isinstance(value, dict):
        raise ValueError("no mapping")
    return value


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# ---- Whether a run's process is alive, found without touching its lock: a probe that held it for a moment could turn a run away ----

LOCKS = Path("/proc/locks")
Held = Literal["held", "free", "elsewhere"]

_HOLDER = re.compile(r"PID (\d+) on (\S+)")


def lock_of(folder: Path, locks: Path = LOCKS) -> Held:
    """Who holds a run folder's ``.lock``: a process of this machine, nobody, or (as far as can be told from here) another machine.

    A process that has ended leaves its number in the file, and the system may give that number to another one; so the system's list of
    locks must show the file too, where there is such a list.
    """
    try:
        found = _HOLDER.search((folder / ".lock").read_text(errors="replace")[:200])
        inode = (folder / ".lock").stat().st_ino
    except OSError:
        return "free"
    if found is None:
        return "free"
    if found[2] != socket.gethostname():
        return "elsewhere"
    if not _alive(int(found[1])):
        return "free"
    try:
        listed = [line.split() for line in locks.read_text().splitlines()]
    except OSError:
        return "held"  # no such list on this system: the process is alive, and more is not known
    ours = any(found[1] in words and any(w.endswith(f":{inode}") for w in words) for words in listed)
    return "held" if ours else "free"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 is none: it only asks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


# ---- What a run's folder says of it, kept up to date as the run goes on. Nothing is ever written there ----

State = Literal["waiting", "preparing", "running", "paused", "finished", "stopped", "interrupted"]
RECENT = 20  # steps whose mean speed the time left follows from
EDGE = 10  # a training figure's first and last value are means over a tenth of its steps, at most so many

FOLLOWED = (*(m.name for m in METRICS.values() if m.label), "grad_norm", "lr")


@dataclass(frozen=True, slots=True)
class Speed:
    """The mean over recent steps."""

    seconds: float
    tokens: float
    trees: float


@dataclass(slots=True)
class RunView:
    """One run, followed.

    Args:
        folder: the run's, which may not exist yet; name: what it is called on the screen.
    """

    folder: Path
    name: str
    line: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # training figures over steps
    points: dict[str, list[Point]] = field(default_factory=dict)  # held-out figures over steps
    last: dict[str, Any] = field(default_factory=dict)  # the last training line
    first_eval: dict[str, Any] = field(default_factory=dict)
    last_eval: dict[str, Any] = field(default_factory=dict)
    memory: float | None = None
    state: State = "waiting"
    why: str = ""
    _perf: deque[tuple[int, float, float, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    _files: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at = self.folder
        self._files = {
            "metrics": Tail(at / "metrics.jsonl"),
            "perf": Tail(at / "perf.jsonl"),
            "manifest": Whole(at / "manifest.json", json_object, {}),
            "config": Whole(at / "config.resolved.yaml", yaml_object, {}),
            "samples": Whole(at / "samples.jsonl", json_rows, []),
            "before": Whole(at / "samples.before.jsonl", json_rows, []),
            "flags": Whole(at / "flags.json", _flags, []),
        }

    # ---- reading --------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read what is new."""
        anew, rows = self._files["metrics"].read()
        if anew:
            self.line, self.points = {}, {}
            self.last, self.first_eval, self.last_eval = {}, {}, {}
        for row in rows:
            self._take(row)
        anew, rows = self._files["perf"].read()
        if anew:
            self._perf.clear()
        for row in rows:
            self._take_speed(row)
        for name in ("manifest", "config", "samples", "before", "flags"):
            self._files[name].read()
        self.state, self.why = self._state(lock_of(self.folder))

    def _take(self, row: Mapping[str, Any]) -> None:
        step = whole(row.get("step"))
        if step is None:
            return
        if row.get("kind") == "train":
            self.last = dict(row)
            for key in FOLLOWED:
                value = number(row.get(key))
                if value is not None:
                    known = self.line.setdefault(key, [])
                    while known and known[-1][0] >= step:
                        known.pop()
                    known.append((step, value))
        elif row.get("kind") == "eval":
            self.first_eval = self.first_eval or dict(row)
            self.last_eval = dict(row)
            for key in (f"eval/{name}" for name in FOLLOWED):
                value = number(row.get(key))
                if value is not None:
                    self.points.setdefault(key, []).append(Point(step, value, interval(row.get(f"{key}/ci"))))

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
    def config(self) -> dict[str, Any]:
        return self._files["config"].value

    @property
    def manifest(self) -> dict[str, Any]:
        return self._files["manifest"].value

    @property
    def unreadable(self) -> int:
        return int(self._files["metrics"].unreadable + self._files["perf"].unreadable)

    @property
    def exists(self) -> bool:
        return any((self.folder / n).exists() for n in ("identity.json", "config.resolved.yaml", "metrics.jsonl"))

    @property
    def step(self) -> int:
        """Optimizer steps done: of metrics.jsonl, which a resumed run cuts back; of perf.jsonl where that logs only every n-th."""
        logged = whole(self.last.get("step")) or whole(self.last_eval.get("step")) or 0
        every = whole(_section(self.config, "logging").get("every")) or 1
        timed = self._perf[-1][0] if self._perf else 0
        return timed if logged <= timed < logged + every else logged

    @property
    def total(self) -> int | None:
        """Optimizer steps of the whole run: as the manifest says, or from epochs where an older run's does not."""
        said = whole(self.manifest.get("total_steps"))
        if said:
            return said
        if self.state == "finished":
            return whole(self.manifest.get("steps"))
        train = _section(self.config, "train")
        epochs, most = number(train.get("epochs")), whole(train.get("max_steps"))
        step, epoch = whole(self.last.get("step")), number(self.last.get("epoch"))
        if not epochs or not step or not epoch:
            return most
        steps = max(1, round(epochs * round(step / epoch)))
        return steps if most is None else min(steps, most)

    @property
    def epoch(self) -> tuple[float | None, float | None]:
        """(done, of)."""
        train = _section(self.config, "train")
        epochs, total, epoch = number(train.get("epochs")), self.total, number(self.last.get("epoch"))
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
        """Seconds of the last session: so far, where it goes on."""
        if self.state not in ("running", "preparing"):
            return number(self.manifest.get("seconds"))
        try:
            started = datetime.strptime(str(self.manifest.get("started")), "%Y-%m-%dT%H:%M:%S%z")
        except ValueError:
            return None
        return max(0.0, time.time() - started.timestamp())

    @property
    def algorithm(self) -> str | None:
        """An algorithm's name; None for the losses on given answers."""
        found = self.config.get("algorithm")
        name = found.get("name") if isinstance(found, dict) else found
        return name if isinstance(name, str) else None

    @property
    def method(self) -> str:
        loss = self.config.get("loss")
        name = self.algorithm or self.manifest.get("loss") or (loss.get("name") if isinstance(loss, dict) else loss)
        return clean(name, 40) if isinstance(name, str) else ""

    @property
    def online(self) -> bool:
        return "reward" in self.last or self.algorithm not in (None, "reward_model")

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The last answers: before and after training, or only those before where it goes on."""
        return self._files["samples"].value or self._files["before"].value

    @property
    def flags(self) -> list[dict[str, Any]]:
        return self._files["flags"].value

    def edges(self, key: str) -> tuple[float, float] | None:
        """A training figure's mean over its first and over its last steps: a tenth of all, at most EDGE."""
        values = [y for _, y in self.line.get(key, ())]
        n = min(EDGE, max(1, len(values) // 10))
        return (sum(values[:n]) / n, sum(values[-n:]) / n) if len(values) > 1 else None

    def _state(self, lock: Held) -> tuple[State, str]:
        said = self.manifest.get("status")
        if not self.exists:
            return "waiting", ""
        if said == "finished":
            return "finished", ""
        if lock == "held" or (lock == "elsewhere" and said == "running"):
            where = "" if lock == "held" else "on another machine, as its files say"
            return ("running" if said == "running" and self.step else "preparing"), where
        if said == "paused":
            return "paused", clean(self.manifest.get("why", ""), 300)
        if said == "stopped":
            return self._stopped()
        if said == "running":
            return "interrupted", "its process ended without a word; the same command continues"
        if said is None:
            return "interrupted", "it has no manifest.json" if self.step else "before its first step"
        return "interrupted", "the same command continues"

    def _stopped(self) -> tuple[State, str]:
        """A run that ended before its end: by itself, or by a signal (older ones do not say which)."""
        why = self.manifest.get("why")
        if isinstance(why, str):
            return "stopped", clean(why, 300)
        batch = self.folder / f"stopped-batch-step-{self.manifest.get('steps')}.json"
        found = Whole(batch, json_object, {}).read().get("what")
        return (
            ("stopped", clean(found, 300))
            if isinstance(found, str)
            else ("interrupted", "it ended before its last step")
        )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _flags(text: str) -> list[dict[str, Any]]:
    """The flags of flags.json: a list, or a list under `flags`."""
    import json

    value = json.loads(text)
    listed = value.get("flags") if isinstance(value, dict) else value
    return [f for f in listed if isinstance(f, dict)] if isinstance(listed, list) else []


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
        if said in ("finished", "stopped", "cut"):
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
    def _at_rung(self) -> dict[str, Any]:
        """Its figures at the last rung that it has reached, if it stands there; they are in none of its own files."""
        rungs = self.record.get("rungs")
        if self.state not in ("paused", "cut") or not isinstance(rungs, dict):
            return {}
        steps = [(whole(r.get("step")) or 0, r.get("metrics")) for r in rungs.values() if isinstance(r, dict)]
        found = max(steps, key=lambda s: s[0], default=(0, None))[1]
        return found if isinstance(found, dict) else {}

    def metric(self, name: str | None) -> Metric | None:
        """The metric's last value: held out where there is one (of a run at a rung: there), else the mean of the last training steps."""
        last = self._at_rung or self.view.last_eval
        for key in (name,) if name else USUAL:
            value = number(last.get(key))
            if value is not None:
                return Metric(key, value, interval(last.get(f"{key}/ci")))
            edges = self.view.edges(key)
            if edges is not None:
                return Metric(f"train {key}", edges[1])
        return None


@dataclass(slots=True)
class GroupView:
    """Runs, their states, and what is left of all of them.

    Args:
        title: shown above them; kind: ``sweep``, ``pipeline`` or ``runs``; folder: of the sweep or pipeline; named: runs by their folders.
    """

    title: str
    kind: str
    folder: Path | None = None
    named: Sequence[Path] = ()
    members: list[Member] = field(default_factory=list)
    _file: Whole | None = None
    _known: dict[Path, RunView] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder is not None and self.kind != "runs":
            self._file = Whole(self.folder / f"{self.kind}.json", json_object, {})

    @property
    def record(self) -> dict[str, Any]:
        return self._file.value if self._file is not None else {}

    @property
    def about(self) -> Mapping[str, Any]:
        """What `sweep.json` says of the sweep: its runs, metric and halving."""
        found = self.record.get("sweep")
        return found if isinstance(found, dict) else {}

    @property
    def metric(self) -> str | None:
        table = self.record.get("table")
        found = self.about.get("metric") or (table.get("metric") if isinstance(table, dict) else None)
        return found if isinstance(found, str) else None

    def refresh(self) -> None:
        """Read what is new in every run that has not ended."""
        if self._file is not None:
            self._file.read()
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
            for path in self.named:
                yield clean(path, 200), path, {}
            return
        if self.kind == "runs":
            for path in runs_below(self.folder):
                yield clean(path.relative_to(self.folder), 200), path, {}
            return
        records = self.record.get("runs" if self.kind == "sweep" else "stages")
        records = {k: v for k, v in records.items() if isinstance(v, dict)} if isinstance(records, dict) else {}
        listed = self.about.get("runs")
        names = listed if isinstance(listed, list) else []
        for name in dict.fromkeys([*(n for n in names if isinstance(n, str)), *(() if names else records)]):
            if Path(name).name == name and name not in ("", "..") and "\0" not in name:  # no path that leads elsewhere
                yield clean(name, 200), self.folder / name, records.get(name, {})

    # ---- what follows ---------------------------------------------------------------------------------------------

    @property
    def counts(self) -> dict[Status, int]:
        found: dict[Status, int] = {}
        for member in self.members:
            found[member.state] = found.get(member.state, 0) + 1
        return found

    @property
    def going(self) -> bool:
        """Whether any of it goes on; between two of its runs none does, but the sweep's or pipeline's own process is there."""
        if self.folder is not None and self.kind != "runs" and lock_of(self.folder) == "held":
            return True
        return any(m.state in OPEN_STATES for m in self.members)

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
        seconds = 0.0
        for m in self.members:
            if not m.ended:
                own = m.view.speed
                todo = max(0.0, (m.view.total or steps) - m.view.step)
                seconds += todo * (own.seconds if own is not None else usual)
        return seconds / at_once


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
    return any((folder / name).exists() for name in ("identity.json", "metrics.jsonl"))


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
    for kind in ("sweep", "pipeline"):
        if (folder / f"{kind}.json").exists():
            return GroupView(clean(folder, 200), kind, folder)
    if not is_run(folder) and runs_below(folder):
        return GroupView(clean(folder, 200), "runs", folder)
    return RunView(folder, clean(folder, 200))


def steps_of(member: Member) -> tuple[int, int | None]:
    """(done, of): where the run's files are gone or of another session, as its record says."""
    said = whole(member.record.get("steps"))
    return (member.view.step or said or 0), member.view.total or (said if member.state == "finished" else None)
