"""What a report is of: runs, a sweep, a pipeline, comparisons, as their folders hold them."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from penchant.errors import CheckpointError
from penchant.report.safe import flat, mapping, mappings, num, read_json, read_lines, read_text, read_yaml, text

RUN_FILES = ("metrics.jsonl", "manifest.json", "config.resolved.yaml", "results.json")
NOT_A_SETTING = ("output", "logging", "train.seed")
MOST_RUNS = 200
HOW = "give the folder of a run, a sweep, a pipeline or a comparison"


@dataclass(frozen=True)
class RunData:
    """A run's folder, read; what it lacks is empty.

    Args:
        name: as it is called in the report; config: resolved; metrics: lines of metrics.jsonl with a step; bad_lines: lines of its
            files that could not be read; flags: None where nobody looked for any.
    """

    name: str
    folder: Path
    manifest: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    audit: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    flags: Sequence[Mapping[str, Any]] | None = None
    metrics: Sequence[Mapping[str, Any]] = ()
    perf: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[Mapping[str, Any]] = ()
    bad_lines: int = 0
    alive: bool = True

    @cached_property
    def evals(self) -> list[Mapping[str, Any]]:
        """Lines of held-out evaluations, in order."""
        return [m for m in self.metrics if m.get("kind") == "eval"]

    @cached_property
    def trained(self) -> list[Mapping[str, Any]]:
        """Lines of optimizer steps, in order."""
        return [m for m in self.metrics if m.get("kind") == "train"]

    @property
    def status(self) -> str:
        """As the manifest says; a run that says it runs, and whose process is gone, was killed."""
        said = text(self.manifest.get("status"))
        return "killed" if said == "running" and not self.alive else said

    @property
    def seed(self) -> str:
        """As text; empty where it is not known."""
        found = self.manifest.get("seed", mapping(self.config.get("train")).get("seed"))
        return text(found)

    @property
    def method(self) -> str:
        """The loss or algorithm."""
        return text(self.manifest.get("loss"))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Flat settings, without what tells no two settings apart."""
        return {
            k: v for k, v in flat(self.config).items() if k.split(".")[0] not in NOT_A_SETTING and k != "train.seed"
        }


@dataclass(frozen=True, slots=True)
class Setting:
    """Runs that differ in their seed only; drawn with one color and called by one letter all over the report.

    Args:
        key: its letter; place: its number, for color and dashes; varied: what tells it from the others, where a sweep says so.
    """

    key: str
    place: int
    name: str
    runs: tuple[RunData, ...]
    varied: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison's figures and completions side by side."""

    name: str
    folder: Path
    figures: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    flags: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class ReportData:
    """Everything that the page is made of.

    Args:
        kind: ``run``, ``runs``, ``sweep``, ``pipeline`` or ``comparison``; sweep, pipeline: their state files, or empty.
        going_on: whether something of it still runs; left_out: runs beyond what one page takes; now: when it was read, seconds.
    """

    kind: str
    title: str
    paths: tuple[Path, ...]
    runs: tuple[RunData, ...]
    settings: tuple[Setting, ...]
    sweep: Mapping[str, Any]
    pipeline: Mapping[str, Any]
    comparisons: tuple[Comparison, ...]
    going_on: bool
    left_out: int
    now: float

    def setting_of(self, run: RunData) -> Setting:
        """The setting that a run belongs to."""
        return next(s for s in self.settings if any(r is run for r in s.runs))

    def named(self, name: str) -> Setting | None:
        """The setting of that name, or the one that holds a run of that name."""
        by_name = {s.name: s for s in self.settings}
        by_run = {r.name: s for s in self.settings for r in s.runs}
        return by_name.get(name) or by_run.get(name)


def read_report(paths: Sequence[Path], now: float) -> ReportData:
    """Read what the paths hold.

    Raises:
        CheckpointError: a path does not exist, or holds nothing that a report could be of.
    """
    folders = [_checked(Path(p)) for p in paths]
    if not folders:
        raise CheckpointError("report", "no path is given", HOW)
    found = [_contents(folder) for folder in folders]
    run_folders = list(dict.fromkeys(f for c in found for f in c.runs))
    comparisons = tuple(read_comparison(f) for c in found for f in c.comparisons)
    sweep = next((c.sweep for c in found if c.sweep), {})
    pipeline = next((c.pipeline for c in found if c.pipeline), {})
    names = _names(run_folders, folders)
    runs = tuple(read_run(f, names[f]) for f in run_folders[:MOST_RUNS])
    kind = found[0].kind if len(found) == 1 else "runs" if run_folders else "comparison"
    title = folders[0].name if len(folders) == 1 else _together([f.name for f in folders])
    states = [text(mapping(r).get("state")) for r in mapping(sweep.get("runs")).values()]
    going_on = any(r.status == "running" for r in runs) or ("running" in states and alive(folders[0]))
    return ReportData(
        kind=kind,
        title=title or str(folders[0]),
        paths=tuple(folders),
        runs=runs,
        settings=group(runs, sweep),
        sweep=sweep,
        pipeline=pipeline,
        comparisons=comparisons,
        going_on=going_on,
        left_out=max(0, len(run_folders) - MOST_RUNS),
        now=now,
    )


@dataclass(frozen=True, slots=True)
class _Contents:
    kind: str
    runs: tuple[Path, ...]
    comparisons: tuple[Path, ...] = ()
    sweep: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Mapping[str, Any] = field(default_factory=dict)


def _checked(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(str(path), "no such run folder", HOW)
    if not path.is_dir():
        raise CheckpointError(str(path), "is a file", HOW)
    return path.resolve()


def is_run(folder: Path) -> bool:
    """Whether a folder holds anything of a run."""
    return any((folder / name).is_file() for name in RUN_FILES)


def _contents(folder: Path) -> _Contents:
    comparisons = (folder,) if (folder / "comparison.json").is_file() else ()
    sweep, pipeline = mapping(read_json(folder / "sweep.json")), mapping(read_json(folder / "pipeline.json"))
    if sweep:
        return _Contents("sweep", _inside(folder, mapping(sweep.get("runs"))), comparisons, sweep=sweep)
    if pipeline:
        return _Contents("pipeline", _inside(folder, mapping(pipeline.get("stages"))), comparisons, pipeline=pipeline)
    if is_run(folder):
        return _Contents("run", (folder,), comparisons)
    if comparisons:
        return _Contents("comparison", _compared_runs(folder), comparisons)
    runs = tuple(sorted((f for p in ("*", "*/*") for f in folder.glob(p) if f.is_dir() and is_run(f)), key=_natural))
    inside = tuple(sorted(p.parent for p in folder.glob("*/comparison.json")))
    if not runs and not inside:
        raise CheckpointError(str(folder), "holds no run", HOW)
    return _Contents("runs" if runs else "comparison", runs, inside)


def _inside(folder: Path, names: Iterable[str]) -> tuple[Path, ...]:
    """Folders of that name directly in `folder`; a name that leads elsewhere is none."""
    return tuple(f for n in names if n and Path(n).name == n and (f := folder / n).is_dir() and is_run(f))


def _compared_runs(folder: Path) -> tuple[Path, ...]:
    """The runs whose checkpoints were compared, where they still are: ``RUN/checkpoints/step-N/model``."""
    figures = mapping(read_json(folder / "comparison.json"))
    found = []
    for path in mapping(figures.get("checkpoints")).values():
        parts = Path(path).parts if isinstance(path, str) and os.path.isabs(path) else ()
        if "checkpoints" in parts:
            run = Path(*parts[: len(parts) - 1 - parts[::-1].index("checkpoints")])
            found += [run] if run.is_dir() and is_run(run) else []
    return tuple(dict.fromkeys(found))


def _natural(path: Path) -> list[tuple[int, float, str]]:
    """beta-2 before beta-10, beta-0.1 before beta-0.3."""
    parts = re.split(r"(\d+(?:\.\d+)?)", str(path))
    return [(1, float(p), "") if i % 2 else (0, 0.0, p) for i, p in enumerate(parts)]


def _names(runs: Sequence[Path], roots: Sequence[Path]) -> dict[Path, str]:
    """Short names that tell the runs apart: relative to what was asked for, or to what they have in common."""
    if len(runs) == 1:
        return {runs[0]: runs[0].name or str(runs[0])}
    if len(roots) == 1 and all(roots[0] in r.parents for r in runs):
        return {r: r.relative_to(roots[0]).as_posix() for r in runs}
    if len({r.name for r in runs}) == len(runs):
        return {r: r.name for r in runs}
    common = Path(os.path.commonpath([str(r) for r in runs])) if runs else Path()
    return {r: r.relative_to(common).as_posix() for r in runs}


def _together(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return ", ".join(names[: 3 if more else 4]) + more


def read_run(folder: Path, name: str) -> RunData:
    """A run's folder as far as it can be read."""
    lines = {n: read_lines(folder / f"{n}.jsonl") for n in ("metrics", "perf", "samples", "evaluations")}
    metrics = [m for m in lines["metrics"][0] if num(m, "step") is not None]
    return RunData(
        name=name,
        folder=folder,
        manifest=mapping(read_json(folder / "manifest.json")),
        config=read_yaml(folder / "config.resolved.yaml"),
        config_text=read_text(folder / "config.resolved.yaml"),
        audit=mapping(read_json(folder / "audit.json")),
        results=mapping(read_json(folder / "results.json")),
        calibration=mapping(read_json(folder / "calibration.json")),
        flags=read_flags(folder),
        metrics=metrics,
        perf=[p for p in lines["perf"][0] if num(p, "step") is not None],
        samples=lines["samples"][0],
        evaluations=lines["evaluations"][0],
        bad_lines=sum(bad for _, bad in lines.values()) + len(lines["metrics"][0]) - len(metrics),
        alive=alive(folder),
    )


def alive(folder: Path) -> bool:
    """Whether the process that last held a folder may still be there: False only where it is known to be gone."""
    found = re.match(r"PID (\d+) on (.*)", read_text(folder / ".lock"))
    if found is None or found[2].strip() != socket.gethostname():
        return True
    try:
        os.kill(int(found[1]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def read_comparison(folder: Path) -> Comparison:
    """A comparison's folder as far as it can be read."""
    rows, _ = read_lines(folder / "comparison.jsonl")
    figures = mapping(read_json(folder / "comparison.json"))
    flags = mappings(figures["flags"]) if "flags" in figures else None if is_run(folder) else read_flags(folder)
    return Comparison(folder.name, folder, figures, rows, flags)


def read_flags(folder: Path) -> list[dict[str, Any]] | None:
    """What ``flags.json`` holds; None where there is no such file."""
    found = read_json(folder / "flags.json")
    if found is None:
        return None
    return mappings(found.get("flags") if isinstance(found, dict) else found)


def group(runs: Sequence[RunData], sweep: Mapping[str, Any]) -> tuple[Setting, ...]:
    """Runs by their setting, in written order."""
    records = mapping(sweep.get("runs"))
    members: dict[str, list[RunData]] = {}
    for run in runs:
        record = mapping(records.get(run.name))
        varied = {k: v for k, v in mapping(record.get("varied")).items() if k != "train.seed"}
        members.setdefault(_identity(run, varied), []).append(run)
    names = _setting_names(list(members.values()), sweep)
    found = []
    for i, (name, of_one) in enumerate(zip(names, members.values(), strict=True)):
        varied = {
            k: v for k, v in mapping(mapping(records.get(of_one[0].name)).get("varied")).items() if k != "train.seed"
        }
        found.append(Setting(letter(i), i, name, tuple(of_one), varied))
    return tuple(found)


def _identity(run: RunData, varied: Mapping[str, Any]) -> str:
    if varied:
        return json.dumps([without_seed(run.name), varied], sort_keys=True, default=str)
    if not run.config:
        return run.name
    settings = {k: v for k, v in run.settings.items() if k != "data.split_seed"}
    return json.dumps([settings, run.method], sort_keys=True, default=str)


def without_seed(name: str) -> str:
    """A run's name without its seed: ``beta-0.1-seed-0`` is of the setting ``beta-0.1``."""
    return re.sub(r"[/_-]?seed[-_=]?\d+$", "", name) or name


def _setting_names(groups: Sequence[Sequence[RunData]], sweep: Mapping[str, Any]) -> list[str]:
    rows = mappings(mapping(sweep.get("table")).get("settings"))
    short = {without_seed(text(r.get("setting"))): text(r.get("setting")) for r in rows}
    names = []
    for runs in groups:
        base = without_seed(runs[0].name) if len(runs) > 1 or sweep else runs[0].name
        names.append(short.get(base, base))
    taken = {n for n in names if names.count(n) > 1}
    return [g[0].name if n in taken else n for n, g in zip(names, groups, strict=True)]


def letter(place: int) -> str:
    """A, B, ... Z, AA, AB, ..."""
    first, last = divmod(place, 26)
    return (letter(first - 1) if first else "") + chr(ord("A") + last)
