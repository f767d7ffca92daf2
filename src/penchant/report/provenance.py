"""Sections on cost, provenance (versions, hashes, commands) and later evaluations."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from penchant.base.text import counted as count
from penchant.metrics.names import metric, with_current_names
from penchant.report.data import Comparison, ReportData, RunData
from penchant.report.html import Element, Node, el, fold, labeled, muted, note, panel, user_text
from penchant.report.settings import short
from penchant.report.svg import MISSING, duration, estimate, interval, number
from penchant.runfolder import damaged_files
from penchant.runfolder.values import ci_of, flatten, mapping, num, sequence, text

# ---- Provenance of the figures: time and memory, versions, hashes, data, seeds, machine, and commands to reproduce them ----

PER_RUN_KEYS = ("status", "started", "seconds", "steps", "seed", "loss")  # manifest keys shown run by run
MAX_VALUES = 4  # maximum values listed for one key


def cost(data: ReportData) -> Element | None:
    """Time and memory of every run; None if nothing is recorded."""
    rows: list[list[Node]] = []
    walls: list[float] = []
    peaks: list[float] = []
    for run in data.runs:
        wall = num(run.manifest, "seconds")
        if wall is None and not run.perf:
            continue
        seconds, tokens, trees, memory = (
            [v for line in run.perf if (v := num(line, key)) is not None]
            for key in ("seconds", "tokens_per_second", "trees_per_second", "peak_memory_gb")
        )
        walls += [wall] if wall is not None else []
        peaks += memory
        speeds = [number(median(values) if values else None) for values in (tokens, trees)]
        gb = f"{max(memory):.2f} GB" if memory else MISSING
        rows.append([_run_label(run, data), duration(wall), duration(sum(seconds) if seconds else None), *speeds, gb])
    if not rows:
        return None
    total = f"{count(len(rows), 'run')}: {duration(sum(walls))} in all" if len(rows) > 1 and walls else None
    if total and peaks:
        total += f", at most {max(peaks):.2f} GB"
    head: list[Node] = ["run", "wall time", "in steps", "tokens/s", "rows/s", "peak memory"]
    caption = "Wall time is over all starts of the run; speeds are medians over steps; memory is the process\u2019s"
    table = panel(head, rows, numeric=range(1, 6), caption=caption)
    return el("div", el("p", total) if total else None, table)


def _run_label(run: RunData, data: ReportData) -> Element:
    return el("span", labeled(data.setting_of(run).key, run.name)) if len(data.runs) > 1 else user_text(run.name)


def provenance(data: ReportData) -> Element | None:
    """Commands to reproduce the runs, their manifests in one table, a table of what differs, and damaged files."""
    parts: list[Node] = [_commands(data)]
    manifests = [(r, _flatten(r.manifest)) for r in data.runs if r.manifest]
    if manifests:
        parts.append(_manifest_table(manifests))
        parts += [_runs_table([r for r, _ in manifests], data)] if len(manifests) > 1 else []
    parts += map(_comparison_settings, data.comparisons)
    bad = sum(r.bad_lines for r in data.runs)
    if bad:
        verb = "is" if bad == 1 else "are"
        parts.append(muted(f"{count(bad, 'line')} of these folders\u2019 files could not be read and {verb} left out."))
    folders = dict.fromkeys([*(r.path for r in data.runs), *data.paths])
    changed = [str(folder / name) for folder in folders for name in damaged_files(folder)]
    if changed:
        parts.append(
            muted(f"Changed after the run wrote {'it' if len(changed) == 1 else 'them'}: {', '.join(changed)}.")
        )
    present = [p for p in parts if p is not None]
    return el("div", present) if present else None


def _flatten(value: Any) -> dict[str, Any]:
    return {k: v for k, v in flatten(value).items() if v not in (None, "")}


def _manifest_table(manifests: Sequence[tuple[RunData, Mapping[str, Any]]]) -> Element:
    single = len(manifests) == 1
    rows: list[list[Node]] = []
    for key in dict.fromkeys(k for _, m in manifests for k in m):
        if key in PER_RUN_KEYS and not single:
            continue
        values = list(dict.fromkeys(_value(key, m.get(key)) for _, m in manifests))
        more = f", \u2026 ({len(values)} different)" if len(values) > MAX_VALUES else ""
        rows.append([user_text(key), user_text(", ".join(values[:MAX_VALUES]) + more)])
    name = "versions, hashes, data, machine" + ("" if single else f", of all {len(manifests)} runs")
    return fold(name, panel([], rows, class_="facts"), key="versions")


def _value(key: str, value: Any) -> str:
    if key.endswith("path"):
        return short(value)
    if isinstance(value, int) and not isinstance(value, bool) and key != "seed":
        return f"{value:,}"
    return MISSING if value is None else text(value)


def _runs_table(runs: Sequence[RunData], data: ReportData) -> Element:
    rows: list[list[Node]] = [
        [
            _run_label(r, data),
            *map(
                user_text, (r.method, r.seed, text(r.manifest.get("steps")), r.status, text(r.manifest.get("started")))
            ),
        ]
        for r in runs
    ]
    return fold(
        "every run: method, seed, steps, state, start",
        panel(["run", "method", "seed", "steps", "state", "started"], rows, numeric=(2, 3)),
        key="every-run",
    )


def _commands(data: ReportData) -> Element | None:
    comment = "# every run of the sweep by itself: bit for bit what it was inside it, on the same machine and versions"
    lines = [comment] if data.sweep else []
    for run in data.runs[:1] if data.sweep or len(data.runs) > 8 else data.runs:
        if run.config_text:
            config, target = f"{run.name}/config.resolved.yaml", f"{run.path.name}-again"
            lines.append(f"penchant train {shlex.quote(config)} output={shlex.quote(target)}")
    lines += filter(None, map(command, data.comparisons))
    if not lines:
        return None
    return el("div", note("To reproduce it:"), el("pre", user_text("\n".join(lines), tag="code")))


def command(comparison: Comparison) -> str:
    """The command that repeats a comparison; empty if the file does not record enough."""
    figures = comparison.figures
    settings = mapping(figures.get("settings"))
    runs = list(mapping(figures.get("checkpoints")))
    if not runs or "prompts_asked" not in settings:
        return ""
    words = ["penchant", "compare", *runs]
    reward = settings.get("reward")
    if isinstance(reward, str):
        words += ["--reward", reward]
    words += [w for name in sequence(settings.get("also")) if isinstance(name, str) for w in ("--also", name)]
    for option, key in (
        ("--prompts", "prompts_asked"),
        ("--samples", "samples"),
        ("--max-new-tokens", "max_new_tokens"),
        ("--seed", "seed"),
        ("--step", "step"),
        ("--data", "data"),
    ):
        value = settings.get(key)
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            words += [option, str(value)]
    return shlex.join(words)


def _comparison_settings(comparison: Comparison) -> Element | None:
    keys = ("settings", "checkpoints", "prompts", "answers", "left_out", "test_readings_before", "budget")
    values = _flatten({k: comparison.figures.get(k) for k in keys})
    if not values:
        return None
    rows: list[list[Node]] = [
        [user_text(k), user_text(short(v) if isinstance(v, str) else text(v))] for k, v in values.items()
    ]
    return fold(
        ["the comparison ", user_text(comparison.name), ": settings, checkpoints, budgets"],
        panel([], rows, class_="facts"),
        key=f"comparison-{comparison.name}",
    )


# ---- Later evaluations by `penchant eval`, one fold each ----

MOST = 20


def evaluations(data: ReportData) -> Element | None:
    """Later evaluations, newest first; None if there are none."""
    entries = [(r, with_current_names(e)) for r in data.runs for e in r.evaluations if mapping(e.get("metrics"))]
    if not entries:
        return None
    entries.sort(key=lambda f: text(f[1].get("time")), reverse=True)
    several = len(data.runs) > 1
    folds = [_evaluation(run if several else None, line, i) for i, (run, line) in enumerate(entries[:MOST])]
    more = muted(f"{len(entries) - MOST} older ones are in evaluations.jsonl.") if len(entries) > MOST else None
    return el("div", folds, more)


def _evaluation(run: RunData | None, line: Mapping[str, Any], i: int) -> Element:
    metrics = mapping(line.get("metrics"))
    rows: list[list[Node]] = []
    for name in metrics:
        entry, n = metric(name), num(line.get("n"), name)
        value, ci = num(metrics, name), ci_of({**metrics, f"{name}/n": n}, name)
        if value is None:
            continue
        rows.append(
            [
                user_text(name.removeprefix("eval/")),
                el("b", estimate(value, ci, entry.share)),
                interval(*ci, entry.share) if ci else "",
                "" if n is None else f"{n:,.0f}",
                el("small", entry.meaning),
            ]
        )
    settings = ", ".join(f"{k}={text(v)}" for k, v in _flatten(mapping(line.get("what"))).items())
    title: list[Node] = [user_text(run.name), " "] if run else []
    title += [user_text(text(line.get("time"))), f" \u00b7 step {text(line.get('step'))}"]
    body = panel(["figure", "value", "95% interval", "n", "what it is"], rows, numeric=(1, 2, 3))
    notes = [el("li", user_text(text(n))) for n in sequence(line.get("notes")) if text(n)]
    return fold(
        title,
        el("p", user_text(settings), class_="soft small wrap") if settings else None,
        body,
        el("ul", notes, class_="soft small") if notes else None,
        key=f"evaluation-{text(line.get('time'))}",
        open_=i == 0,
    )
