"""Several runs, followed: those of a sweep, of a pipeline, of a folder, or as they are named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penchant.watch.follow import Whole, json_object
from penchant.watch.lock import lock_of
from penchant.watch.run_view import RunView, State
from penchant.watch.text import clean, interval, number, whole

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
