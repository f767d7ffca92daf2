"""The data of a report, read from the folders of runs, a sweep, a pipeline or comparisons."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from penchant.errors import CheckpointError
from penchant.metrics.names import with_k3
from penchant.runfolder import CHECKPOINTS, COMPARISON, METRICS, PERF
from penchant.runfolder.read import Folder, may_be_running, read_folder
from penchant.runfolder.values import flatten, mapping, mappings, num, text

NOT_A_SETTING, SEED = ("output", "logging"), "train.seed"
MOST_RUNS = 200
HOW = "give the folder of a run, a sweep, a pipeline or a comparison"


class RunData(Folder):
    """A run folder as read; missing files are empty.

    Args:
        name: its name in the report.
    """

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(path)
        self.name = name
        self.alive = may_be_running(path)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Rows of a file; for files that are over steps, only the rows with a step."""
        rows = super().rows(name)
        if name not in (METRICS, PERF):
            return rows
        valid = [row for row in rows if num(row, "step") is not None]
        self.unreadable[name] += len(rows) - len(valid) if name == METRICS else 0
        return valid

    @property
    def bad_lines(self) -> int:
        """Number of lines in its files that could not be read."""
        _ = self.metrics, self.perf, self.samples, self.evaluations
        return sum(self.unreadable.values())

    @cached_property
    def evals(self) -> list[Mapping[str, Any]]:
        """Lines of held-out evaluations, in order."""
        return [with_k3(m) for m in self.metrics if m.get("kind") == "eval"]

    @property
    def last(self) -> Mapping[str, Any]:
        """The last held-out evaluation; empty if there is none."""
        return self.evals[-1] if self.evals else {}

    @property
    def first(self) -> Mapping[str, Any]:
        """The evaluation at step 0; empty if there is none."""
        return self.evals[0] if self.evals and num(self.evals[0], "step") == 0 else {}

    @cached_property
    def trained(self) -> list[Mapping[str, Any]]:
        """Lines of optimizer steps, in order."""
        return [with_k3(m) for m in self.metrics if m.get("kind") == "train"]

    @property
    def status(self) -> str:
        """The manifest's status, or ``killed`` if that is ``running`` but the process is gone."""
        recorded = text(self.manifest.get("status"))
        return "killed" if recorded == "running" and not self.alive else recorded

    @property
    def seed(self) -> str:
        """The seed as text; empty if unknown."""
        return text(self.manifest.get("seed", mapping(self.config.get("train")).get("seed")))

    @property
    def method(self) -> str:
        """The loss or algorithm."""
        return text(self.manifest.get("loss"))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Flat settings without those that do not distinguish settings: output, logging and seed."""
        return {k: v for k, v in flatten(self.config).items() if k.split(".")[0] not in NOT_A_SETTING and k != SEED}


@dataclass(frozen=True, slots=True)
class Setting:
    """Runs that differ only in their seed; they share one color and one letter throughout the report.

    Args:
        key: its letter; place: its index, for color and dashes.
    """

    key: str
    place: int
    name: str
    runs: tuple[RunData, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison's figures and completions side by side."""

    name: str
    figures: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    flags: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class ReportData:
    """All data of the page.

    Args:
        kind: ``run``, ``runs``, ``sweep``, ``pipeline`` or ``comparison``; sweep: its state file, or empty.
        is_running: whether any of it is still running; left_out: number of runs beyond `MOST_RUNS`; now: time of reading, Unix seconds.
    """

    kind: str
    title: str
    paths: tuple[Path, ...]
    runs: tuple[RunData, ...]
    settings: tuple[Setting, ...]
    sweep: Mapping[str, Any]
    comparisons: tuple[Comparison, ...]
    is_running: bool
    left_out: int
    now: float

    def setting_of(self, run: RunData) -> Setting:
        """The setting that a run belongs to."""
        return next(s for s in self.settings if any(r is run for r in s.runs))

    def find_setting(self, name: str) -> Setting | None:
        """The setting with this name, or the one that contains a run with this name; None if neither exists."""
        by_name = {s.name: s for s in self.settings}
        by_run = {r.name: s for s in self.settings for r in s.runs}
        return by_name.get(name) or by_run.get(name)


def read_report(paths: Sequence[Path], now: float) -> ReportData:
    """Read the folders of a report.

    Raises:
        CheckpointError: a path does not exist, is a file, or holds nothing to report on.
    """
    folders = [_resolve_folder(Path(p)) for p in paths]
    if not folders:
        raise CheckpointError("report", "no path is given", HOW)
    contents = [_scan_folder(folder) for folder in folders]
    run_folders = list(dict.fromkeys(f for c in contents for f in c.runs))
    comparisons = tuple(read_comparison(f) for c in contents for f in c.comparisons)
    sweep = next((c.sweep for c in contents if c.sweep), {})
    names = _names(run_folders, folders)
    runs = tuple(RunData(f, names[f]) for f in run_folders[:MOST_RUNS])
    kind = contents[0].kind if len(contents) == 1 else "runs" if run_folders else "comparison"
    title = folders[0].name if len(folders) == 1 else _join_names([f.name for f in folders])
    states = [text(mapping(r).get("state")) for r in mapping(sweep.get("runs")).values()]
    is_running = any(r.status == "running" for r in runs) or ("running" in states and may_be_running(folders[0]))
    return ReportData(
        kind=kind,
        title=title or str(folders[0]),
        paths=tuple(folders),
        runs=runs,
        settings=group_by_setting(runs, sweep),
        sweep=sweep,
        comparisons=comparisons,
        is_running=is_running,
        left_out=max(0, len(run_folders) - MOST_RUNS),
        now=now,
    )


@dataclass(frozen=True, slots=True)
class _FolderContents:
    kind: str
    runs: tuple[Path, ...]
    comparisons: tuple[Path, ...] = ()
    sweep: Mapping[str, Any] = field(default_factory=dict)


def _resolve_folder(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(str(path), "no such run folder", HOW)
    if not path.is_dir():
        raise CheckpointError(str(path), "is a file", HOW)
    return path.resolve()


def _scan_folder(folder: Path) -> _FolderContents:
    contents = read_folder(folder)
    comparisons = (folder,) if (folder / COMPARISON).is_file() else ()
    if contents.sweep:
        return _FolderContents(
            "sweep", _runs_inside(folder, mapping(contents.sweep.get("runs"))), comparisons, sweep=contents.sweep
        )
    if contents.pipeline:
        return _FolderContents("pipeline", _runs_inside(folder, mapping(contents.pipeline.get("stages"))), comparisons)
    if contents.is_run:
        return _FolderContents("run", (folder,), comparisons)
    if comparisons:
        return _FolderContents("comparison", _compared_runs(contents), comparisons)
    runs = tuple(sorted((f for p in ("*", "*/*") for f in folder.glob(p) if _is_run(f)), key=_natural_key))
    comparison_folders = tuple(sorted(p.parent for p in folder.glob(f"*/{COMPARISON}")))
    if not runs and not comparison_folders:
        raise CheckpointError(str(folder), "holds no run", HOW)
    return _FolderContents("runs" if runs else "comparison", runs, comparison_folders)


def _is_run(folder: Path) -> bool:
    return folder.is_dir() and read_folder(folder).is_run


def _runs_inside(folder: Path, names: Iterable[str]) -> tuple[Path, ...]:
    """Run folders with these names directly in `folder`; names that lead elsewhere are ignored."""
    return tuple(f for n in names if n and Path(n).name == n and _is_run(f := folder / n))


def _compared_runs(folder: Folder) -> tuple[Path, ...]:
    """The runs whose checkpoints (``RUN/checkpoints/step-N/model``) were compared, if they still exist."""
    runs = []
    for path in mapping(folder.comparison.get("checkpoints")).values():
        parts = Path(path).parts if isinstance(path, str) and os.path.isabs(path) else ()
        if CHECKPOINTS in parts:
            run = Path(*parts[: len(parts) - 1 - parts[::-1].index(CHECKPOINTS)])
            runs += [run] if _is_run(run) else []
    return tuple(dict.fromkeys(runs))


def _natural_key(path: Path) -> list[tuple[int, float, str]]:
    """Sort key for natural order: beta-2 before beta-10, beta-0.1 before beta-0.3."""
    parts = re.split(r"(\d+(?:\.\d+)?)", str(path))
    return [(1, float(p), "") if i % 2 else (0, 0.0, p) for i, p in enumerate(parts)]


def _names(runs: Sequence[Path], roots: Sequence[Path]) -> dict[Path, str]:
    """Short unique names of runs: relative to the given folder, or to their common parent."""
    if len(runs) == 1:
        return {runs[0]: runs[0].name or str(runs[0])}
    if len(roots) == 1 and all(roots[0] in r.parents for r in runs):
        return {r: r.relative_to(roots[0]).as_posix() for r in runs}
    if len({r.name for r in runs}) == len(runs):
        return {r: r.name for r in runs}
    common = Path(os.path.commonpath([str(r) for r in runs])) if runs else Path()
    return {r: r.relative_to(common).as_posix() for r in runs}


def _join_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return ", ".join(names[: 3 if more else 4]) + more


def read_comparison(path: Path) -> Comparison:
    """Read a comparison's folder as far as possible."""
    folder = read_folder(path)
    figures = folder.comparison
    flags = mappings(figures["flags"]) if "flags" in figures else None if folder.is_run else folder.flags
    return Comparison(path.name, figures, folder.comparison_rows, flags)


def group_by_setting(runs: Sequence[RunData], sweep: Mapping[str, Any]) -> tuple[Setting, ...]:
    """Group runs by setting, in their given order."""
    members: dict[str, list[RunData]] = {}
    for run in runs:
        record = mapping(mapping(sweep.get("runs")).get(run.name))
        varied = {k: v for k, v in mapping(record.get("varied")).items() if k != SEED}
        members.setdefault(_setting_identity(run, varied), []).append(run)
    names = _setting_names(list(members.values()), sweep)
    settings = enumerate(zip(names, members.values(), strict=True))
    return tuple(Setting(letter(i), i, name, tuple(group)) for i, (name, group) in settings)


def _setting_identity(run: RunData, varied: Mapping[str, Any]) -> str:
    if varied:
        return json.dumps([without_seed(run.name), varied], sort_keys=True, default=str)
    if not run.config:
        return run.name
    settings = {k: v for k, v in run.settings.items() if k != "data.split_seed"}
    return json.dumps([settings, run.method], sort_keys=True, default=str)


def without_seed(name: str) -> str:
    """A run's name without its seed: ``beta-0.1-seed-0`` belongs to the setting ``beta-0.1``."""
    return re.sub(r"[/_-]?seed[-_=]?\d+$", "", name) or name


def _setting_names(groups: Sequence[Sequence[RunData]], sweep: Mapping[str, Any]) -> list[str]:
    rows = mappings(mapping(sweep.get("table")).get("settings"))
    short_names = {without_seed(text(r.get("setting"))): text(r.get("setting")) for r in rows}
    names = []
    for runs in groups:
        base = without_seed(runs[0].name) if len(runs) > 1 or sweep else runs[0].name
        names.append(short_names.get(base, base))
    repeated = {n for n in names if names.count(n) > 1}
    return [g[0].name if n in repeated else n for n, g in zip(names, groups, strict=True)]


def letter(index: int) -> str:
    """The letter of a setting by its index: A, B, ... Z, AA, AB, ..."""
    first, last = divmod(index, 26)
    return (letter(first - 1) if first else "") + chr(ord("A") + last)
