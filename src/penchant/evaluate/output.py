"""Figures as a table, as JSON files, and as a line in a run's evaluations.jsonl."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penchant.base.files import write_output
from penchant.base.text import printable
from penchant.evaluate.evaluator import Evaluated
from penchant.metrics.names import metric
from penchant.runfolder import EVALUATIONS, IDENTITY, LINE_SUM, MetricsLog, finite, line_sum

NO_FIGURE = ("tables", "notes")
COUNT = "/n"
SUFFIXES = ("/ci", COUNT)


def record(evaluated: Evaluated) -> dict[str, Any]:
    """An evaluation as it stands in files: time, step, what was asked, figures, how many rows each is over, notes."""
    found = evaluated.metrics
    metrics = {k: v for k, v in found.items() if k not in NO_FIGURE and not k.endswith(COUNT)}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": evaluated.step,
        "what": evaluated.what,
        "metrics": metrics,
        "n": {k.removesuffix(COUNT): v for k, v in found.items() if k.endswith(COUNT)},
        "notes": evaluated.notes,
    }


def keep(evaluated: Evaluated, run: Path | None, output: str | None, samples_output: str | None) -> list[str]:
    """Append to the run's log, and write the files that were asked for; sentences about what could not be kept.

    Raises:
        ConfigError: a file that was asked for cannot be written.
    """
    line = record(evaluated)
    if output is not None:
        write_output(output, json.dumps(finite(line), indent=1, ensure_ascii=False) + "\n")
    if samples_output is not None:
        rows = "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in evaluated.rows)
        write_output(samples_output, rows)
    if run is None or not (run / IDENTITY).exists():
        return []
    try:
        line = json.loads(json.dumps(finite(line)))
        MetricsLog(run / EVALUATIONS).write({**line, LINE_SUM: line_sum(line)})
    except OSError as error:
        return [f"Not kept in {run / EVALUATIONS}: it cannot be written ({error.strerror})."]
    return []


def table(metrics: Mapping[str, Any]) -> str:
    """A line a figure: name, value, 95% interval, and over how much it is."""
    names = _shown(metrics)
    width = max(28, *map(len, names))
    spans = {n: _span(metrics.get(f"{n}/ci")) for n in names}
    broad = max(map(len, spans.values()), default=0)
    lines = []
    for name in names:
        value = metrics[name]
        shown = f"{value:,.4f}" if isinstance(value, float) else printable(str(value))
        line = f"{printable(name):<{width}} {shown:>12}"
        if isinstance(value, float):
            line += f"  {spans[name]:<{broad}}  {_over(metrics, name)}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def explained(metrics: Mapping[str, Any]) -> str:
    """What each figure is, and its formula."""
    lines = []
    for name in _shown(metrics):
        known = metric(name)
        if known.meaning:
            lines += [printable(name), *(f"    {line}" for line in (known.meaning, known.formula) if line)]
    return "\n".join(lines)


def _shown(metrics: Mapping[str, Any]) -> list[str]:
    return [n for n in metrics if n not in NO_FIGURE and not n.endswith(SUFFIXES)]


def _over(metrics: Mapping[str, Any], name: str) -> str:
    """``n=200 pairs``; a run's own metrics are over its held-out rows, its KL over completions."""
    if f"{name}/n" in metrics:
        return f"n={metrics[f'{name}/n']:,} {metric(name).over}".rstrip()
    if name.startswith("eval/kl/") and "eval/kl/completions" in metrics:
        return f"n={metrics['eval/kl/completions']:,} completions"
    return f"n={metrics['eval/rows']:,} rows" if "eval/rows" in metrics else ""


def _span(interval: Any) -> str:
    return f"[{interval[0]:,.4f}, {interval[1]:,.4f}]" if interval else ""
