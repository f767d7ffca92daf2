"""Lists the runs, sweeps, pipelines and comparisons in the studio's folder and follows running ones. Read-only."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penchant.metrics.names import metric
from penchant.report.html import escape_hidden
from penchant.report.svg import duration, with_interval
from penchant.runfolder import CHECKPOINTS, COMPARISON, CONFIG, IDENTITY, LOCK, MANIFEST, METRICS, PERF, PIPELINE, SWEEP
from penchant.runfolder.read import CachedFile, json_object, lock_state
from penchant.runfolder.values import mapping, mappings, sequence, text
from penchant.studio.app import is_linkable
from penchant.watch.views import FIGURES, OPEN_STATES, Member, RunView

DEPTH = 4  # levels below the studio's folder to search for runs
MAX_FOLDERS = 5000  # maximum number of folders searched
IS_RUN = frozenset({IDENTITY, CONFIG, METRICS})
GROUPS = {SWEEP: "sweep", PIPELINE: "pipeline", COMPARISON: "comparison"}
NO_RUNS = frozenset({"node_modules", "__pycache__", "site-packages", CHECKPOINTS, "merged", "export"})


# ---- Finding folders ----


@dataclass(frozen=True, slots=True)
class FoundFolder:
    """A folder that Penchant wrote; `path` is relative to the studio's folder, with slashes."""

    kind: str
    path: str


def find_folders(root: Path) -> tuple[list[FoundFolder], bool]:
    """Return (what was found in a folder, whether the search was cut short); links are not followed."""
    found_folders: list[FoundFolder] = []
    level, folder_count = [(root, "")], 0
    for depth in range(DEPTH + 1):
        next_level: list[tuple[Path, str]] = []
        for folder, path in level:
            folder_count += 1
            if folder_count > MAX_FOLDERS:
                return found_folders, True
            names, folders = _scan_folder(folder)
            is_run = bool(names & IS_RUN)
            kinds = ["run"] if is_run else []
            kinds += [kind for name, kind in GROUPS.items() if name in names]
            found_folders += [FoundFolder(kind, path or ".") for kind in kinds]
            if depth < DEPTH:
                next_level += [(folder / name, f"{path}/{name}".lstrip("/")) for name in folders]
        level = next_level
    return found_folders, False


def _scan_folder(folder: Path) -> tuple[set[str], list[str]]:
    """Return (file names, names of subfolders that may hold runs)."""
    names: set[str] = set()
    folders: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    may_hold_runs = entry.name[0] != "." and entry.name not in NO_RUNS and is_linkable(entry.name)
                    folders += [entry.name] * may_hold_runs
                else:
                    names.add(entry.name)
    except OSError:
        pass
    return names, sorted(folders)


# ---- Lines of the list ----


@dataclass(frozen=True, slots=True)
class Line:
    """An entry of the list: a run, a sweep, a pipeline or a comparison.

    Args:
        state: as in `penchant watch`; step, total: optimizer steps; headline: the run's main metric with its interval; label: the metric's
            name; warnings, notes: number of flags of each level; changed: time of its last write, in seconds since the epoch.
        inside: number of runs of a sweep or stages of a pipeline, by state.
    """

    kind: str
    path: str
    state: str = ""
    why: str = ""
    method: str = ""
    step: int = 0
    total: int | None = None
    label: str = ""
    headline: str = ""
    warnings: int = 0
    notes: int = 0
    changed: float = 0.0
    took: float | None = None
    inside: Mapping[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the steps that are done."""
        return min(1.0, self.step / self.total) if self.total else 0.0


class Shelf:
    """The runs of a folder. Each is read once, then only its new lines; thread-safe.

    Args:
        root: the studio's folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._brief_views: dict[str, RunView] = {}
        self._groups: dict[tuple[str, str], CachedFile[dict[str, Any]]] = {}
        self._full_views: dict[str, tuple[RunView, float]] = {}  # followed runs, and when each was last read

    def lines(self) -> tuple[list[Line], bool]:
        """Return (all entries, most recently changed first, whether the search was cut short)."""
        with self._lock:
            folders, cut_short = find_folders(self.root)
            runs = {f.path: self._run(f.path) for f in folders if f.kind == "run"}
            self._brief_views = {path: self._brief_views[path] for path in runs}
            lines = [*runs.values(), *(self._group(f, runs) for f in folders if f.kind != "run")]
        return sorted(lines, key=lambda line: -line.changed), cut_short

    def _run(self, path: str) -> Line:
        view = self._brief_views.setdefault(path, RunView(self.root / path, path, brief=True))
        view.refresh()
        return line_of(view, path)

    def _group(self, group: FoundFolder, runs: Mapping[str, Line]) -> Line:
        name = next(name for name, kind in GROUPS.items() if kind == group.kind)
        file = self.root / group.path / name
        cached = self._groups.setdefault((group.kind, group.path), CachedFile[dict[str, Any]](file, json_object, {}))
        content = cached.read()
        changed = _last_modified(file)
        if group.kind == "comparison":
            return Line("comparison", group.path, headline=_comparison_headline(content), changed=changed)
        key = "runs" if group.kind == "sweep" else "stages"
        records = mapping(content.get(key))
        prefix = "" if group.path == "." else f"{group.path}/"
        counts: dict[str, int] = {}
        for name in map(text, sequence(mapping(content.get(group.kind)).get(key)) or records):
            state = text(mapping(records.get(name)).get("state")) or "to come"
            if group.kind == "pipeline" and state == "stopped" and (line := runs.get(prefix + name)):
                state = line.state  # an interrupted stage is "stopped" there too
            counts[state] = counts.get(state, 0) + 1
        active = [line for path, line in runs.items() if path.startswith(prefix) and line.state in OPEN_STATES]
        state = "interrupted"
        if active or lock_state(file.parent) == "held":
            state = "running"
        elif group.kind == "pipeline" and "stopped" in counts:  # in a sweep a stopped run counts as a result
            state = "stopped"
        elif records and set(counts) <= {"finished", "stopped", "cut"}:
            state = "finished"
        table = mapping(content.get("table"))
        best = ", ".join(text(name) for name in sequence(table.get("best"))[:3])
        headline = f"best by validation: {best}" if best else ""
        return Line(group.kind, group.path, state, headline=headline, changed=changed, inside=counts)

    def follow(self, path: str) -> RunView:
        """Return a run with its curves, up to date; it is read at most twice a second, however many pages show it."""
        with self._lock:
            view, read_at = self._full_views.get(path) or (RunView(self.root / path, path), 0.0)
            now = time.monotonic()
            if now - read_at >= FRESH:
                view.refresh()
                read_at = now
            self._full_views.pop(path, None)
            self._full_views[path] = (view, read_at)  # moved to the end, so the least recently requested come first
            while len(self._full_views) > MAX_FULL_VIEWS:
                self._full_views.pop(next(iter(self._full_views)))
            return view


FRESH = 0.5  # seconds for which a reading of a run counts as up to date
MAX_FULL_VIEWS = 40  # runs whose curves are kept in memory


def _last_modified(*files: Path) -> float:
    times = [0.0]
    for file in files:
        try:
            times.append(file.stat().st_mtime)
        except OSError:
            continue
    return max(times)


def _comparison_headline(comparison: Mapping[str, Any]) -> str:
    sentences = [sentence for sentence in sequence(comparison.get("sentences")) if isinstance(sentence, str)]
    models = mapping(comparison.get("models"))
    return sentences[0] if sentences else f"compares {', '.join(models)}" if models else ""


def line_of(view: RunView, path: str) -> Line:
    """Return the list entry of a run."""
    levels = [flag.get("level") for flag in view.flags]
    label, headline = headline_of(view)
    files = [view.folder / name for name in (METRICS, PERF, MANIFEST, LOCK)]
    return Line(
        kind="run",
        path=path,
        state=view.state,
        why=view.why,
        method=view.method,
        step=view.step,
        total=view.total,
        label=label,
        headline=headline,
        warnings=levels.count("warning"),
        notes=len(levels) - levels.count("warning"),
        changed=_last_modified(*files),
        took=view.elapsed,
    )


def headline_of(view: RunView) -> tuple[str, str]:
    """Return (name of a run's main metric, its last value with its interval); both empty if there is none."""
    figure = Member(view).metric(None)
    if figure is None:
        return "", ""
    description = metric(figure.name.removeprefix("train "))
    title = description.label or description.picture or description.name
    label = f"{title} in training" if figure.name.startswith("train ") else title
    return label, with_interval(figure.value, figure.interval, description.share)


# ---- Live updates of a run ----

MOST_POINTS = 1500  # maximum points of a curve sent at once; longer ones are thinned


class Feed:
    """Collects the updates of several runs that one page has not received yet.

    Args:
        paths: paths of the runs, relative to the shelf's folder.
    """

    def __init__(self, shelf: Shelf, paths: Sequence[str]) -> None:
        self._shelf, self._paths = shelf, paths
        self._sent: dict[tuple[str, str], tuple[int, Any]] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def updates(self) -> dict[str, Any]:
        """Return the updates by run: ``facts`` if changed, new ``line`` and ``points``, and ``anew`` if everything sent so far is invalid.

        ``line`` is ``{metric: [[steps], [values]]}`` in training, ``points`` ``{metric: [[steps], [values], [lows], [highs]]}`` held out.
        """
        updates = {}
        for path in self._paths:
            if update := self._run_update(path, self._shelf.follow(path)):
                updates[path] = update
        return updates

    def _run_update(self, path: str, view: RunView) -> dict[str, Any]:
        curves: dict[str, Sequence[Any]] = {**view.line, **view.points}
        rewritten = any(self._was_rewritten(path, key, curves.get(key, ())) for p, key in self._sent if p == path)
        if rewritten:
            self._sent = {k: v for k, v in self._sent.items() if k[0] != path}
        update: dict[str, Any] = {"anew": True} if rewritten else {}
        lines = {key: [[x for x, _ in new], [y for _, y in new]] for key, new in self._new_points(path, view.line)}
        points = {
            key.removeprefix("eval/"): [
                [p.step for p in new],
                [p.value for p in new],
                *([None if p.interval is None else p.interval[i] for p in new] for i in (0, 1)),
            ]
            for key, new in self._new_points(path, view.points)
        }
        update |= {"line": lines} if lines else {}
        update |= {"points": points} if points else {}
        facts = facts_of(view, path)
        if facts != self._facts.get(path):
            self._facts[path] = update["facts"] = facts
        return update

    def _was_rewritten(self, path: str, key: str, values: Sequence[Any]) -> bool:
        count, last = self._sent[path, key]
        return len(values) < count or values[count - 1] != last

    def _new_points(self, path: str, curves: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, Sequence[Any]]]:
        for key in sorted(curves, key=_curve_order):
            values = curves[key]
            count, _ = self._sent.get((path, key), (0, None))
            if len(values) > count:
                self._sent[path, key] = (len(values), values[-1])
                yield key, thin(values[count:])


_CURVE_ORDER = {name: i for i, name in enumerate(FIGURES)}


def _curve_order(key: str) -> tuple[int, str]:
    return _CURVE_ORDER.get(key.removeprefix("eval/"), len(_CURVE_ORDER)), key


def thin(values: Sequence[Any]) -> Sequence[Any]:
    """Thin the values evenly to at most `MOST_POINTS` + 1; the last one is always kept."""
    stride = -(-len(values) // MOST_POINTS)
    thinned = values[::stride]
    return thinned if stride == 1 or (len(values) - 1) % stride == 0 else [*thinned, values[-1]]


def facts_of(view: RunView, path: str) -> dict[str, Any]:
    """Return what a run's page shows beside its curves, made safe for HTML."""
    line = line_of(view, path)
    speed, seconds_left = view.speed, view.seconds_left if view.state in OPEN_STATES else None
    return {
        "state": line.state,
        "why": escape_hidden(line.why),
        "step": f"{line.step:,} of {line.total:,}" if line.total else f"{line.step:,}",
        "share": line.share,
        "label": line.label,
        "headline": line.headline,
        "left": duration(seconds_left) if seconds_left is not None else "",
        "speed": "" if speed is None else f"{speed.tokens:,.0f} tokens/s",
        "memory": "" if view.memory is None else f"{view.memory:.1f} GB",
        "flags": [
            {key: escape_hidden(text(flag.get(key))) for key in ("title", "level", "sentence", "advice")}
            for flag in mappings(view.flags)
        ],
        "samples": len(view.samples),
        "lock": lock_state(view.folder),
    }


def titles() -> dict[str, str]:
    """Return the display names of the curves, in order."""
    return {key: metric(key).picture or metric(key).row or metric(key).label or key for key in FIGURES}
