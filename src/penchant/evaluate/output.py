"""Output of `penchant eval`: a table, JSON files, and a line in the run's evaluations.jsonl."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penchant.base.files import write_output
from penchant.base.text import printable
from penchant.evaluate.evaluator import EvaluationResult
from penchant.metrics.names import all_tied, metric
from penchant.requests import EvalRequest
from penchant.runfolder import EVALUATIONS, IDENTITY, LINE_SUM, MetricsLog, line_sha256, nan_to_none
from penchant.runfolder.values import FEW_ROWS, ci_of, format_interval, interval_of

NO_FIGURE = ("tables", "notes")
COUNT = "/n"
SUFFIXES = ("/ci", COUNT)


def record(evaluated: EvaluationResult) -> dict[str, Any]:
    """An evaluation as written to files: time, step, settings, figures, the count behind each, notes."""
    figures = evaluated.metrics
    metrics = {k: v for k, v in figures.items() if k not in NO_FIGURE and not k.endswith(COUNT)}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": evaluated.step,
        "what": evaluated.what,
        "metrics": metrics,
        "n": {k.removesuffix(COUNT): v for k, v in figures.items() if k.endswith(COUNT)},
        "notes": evaluated.notes,
    }


def save(evaluated: EvaluationResult, run: Path | None, request: EvalRequest) -> list[str]:
    """Write the requested files and append to the run's log; return a note if the log cannot be written.

    Raises:
        ConfigError: a requested file cannot be written.
    """
    line = record(evaluated)
    if request.output is not None:
        write_output(request.output, json.dumps(nan_to_none(line), indent=1, ensure_ascii=False) + "\n")
    for path, rows in ((request.samples_output, evaluated.rows), (request.rows_output, evaluated.answers)):
        if path is not None:
            write_output(path, "".join(json.dumps(nan_to_none(row), ensure_ascii=False) + "\n" for row in rows))
    if run is None or not (run / IDENTITY).exists():
        return []
    try:
        line = json.loads(json.dumps(nan_to_none(line)))
        MetricsLog(run / EVALUATIONS).write({**line, LINE_SUM: line_sha256(line)})
    except OSError as error:
        return [f"Not kept in {run / EVALUATIONS}: it cannot be written ({error.strerror})."]
    return []


def format_table(metrics: Mapping[str, Any], whole: bool = True) -> str:
    """Format one line per figure: name, value, 95% interval, count; without `whole`, only the main ones with descriptions."""
    names = _figure_names(metrics)
    main = names if whole else [n for n in names if metric(n).main or metric(n).word or n == "checkpoint"]
    hidden, names = len(names) - len(main), main or names
    width = max(28, *map(len, names))
    spans = {n: _interval_text(metrics, n) for n in names}
    span_width = max(map(len, spans.values()), default=0)
    lines = []
    for name in names:
        value = metrics[name]
        text = f"{value:{_digits(value)}}" if isinstance(value, float) else printable(str(value))
        line = f"{printable(name):<{width}} {text:>12}"
        if isinstance(value, float):
            count = _count_text(metrics, name)
            line += f"  {spans[name]:<{span_width}}  {count}"
            entry = metric(name)
            if not whole:
                line += f"{' ' * max(2, 18 - len(count))}{entry.word or entry.label}"
        lines.append(line.rstrip())
    if hidden and not whole:
        lines.append(f"{hidden} more with --all; --explain says what each is")
    return "\n".join(lines)


def explain(metrics: Mapping[str, Any]) -> str:
    """Describe each figure: meaning and formula."""
    lines = []
    for name in _figure_names(metrics):
        entry = metric(name)
        if entry.meaning:
            lines += [printable(name), *(f"    {line}" for line in (entry.meaning, entry.formula) if line)]
    return "\n".join(lines)


def _digits(value: float) -> str:
    """The format of a figure and of its interval: an exponent where four decimals would show nothing."""
    return ".2e" if 0 < abs(value) < 1e-3 else ",.4f"


def _figure_names(metrics: Mapping[str, Any]) -> list[str]:
    return [n for n in metrics if n not in NO_FIGURE and not n.endswith(SUFFIXES)]


def _count_text(metrics: Mapping[str, Any], name: str) -> str:
    """The count behind a figure, ``n=200 pairs``; a run's own metrics are over held-out rows, its KL over completions."""
    if f"{name}/n" in metrics:
        return f"n={metrics[f'{name}/n']:,} {metric(name).over}".rstrip()
    if name.startswith("eval/kl/") and "eval/kl/completions" in metrics:
        return f"n={metrics['eval/kl/completions']:,} completions"
    return f"n={metrics['eval/rows']:,} rows" if "eval/rows" in metrics else ""


def _interval_text(metrics: Mapping[str, Any], name: str) -> str:
    """The interval as text, or why there is none."""
    if all_tied(metrics, name):
        return "all tied"
    if interval := ci_of(metrics, name):
        return format_interval(interval, _digits(metrics[name]))
    return f"fewer than {FEW_ROWS}: no interval" if interval_of(metrics, name) else ""
