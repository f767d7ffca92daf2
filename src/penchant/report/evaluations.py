"""What `penchant eval` measured of a run later, one fold an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penchant.report.data import ReportData, RunData
from penchant.report.glossary import meaning
from penchant.report.html import Element, Node, el, fold, said, table
from penchant.report.metrics import BY_NAME
from penchant.report.numbers import estimate, interval
from penchant.report.safe import ci_of, flat, mapping, num, sequence, text

MOST = 20


def evaluations(data: ReportData) -> Element | None:
    """The newest first; None where there are none."""
    found = [(run, line) for run in data.runs for line in run.evaluations if mapping(line.get("metrics"))]
    if not found:
        return None
    found.sort(key=lambda f: text(f[1].get("time")), reverse=True)
    several = len(data.runs) > 1
    made = [_one(run if several else None, line, i) for i, (run, line) in enumerate(found[:MOST])]
    more = (
        el("p", f"{len(found) - MOST} older ones are in evaluations.jsonl.", class_="soft")
        if len(found) > MOST
        else None
    )
    return el("div", made, more)


def _one(run: RunData | None, line: Mapping[str, Any], i: int) -> Element:
    metrics = mapping(line.get("metrics"))
    rows: list[list[Node]] = []
    for name in metrics:
        value, ci = num(metrics, name), ci_of(metrics, name)
        if value is None:
            continue
        short = name.removeprefix("eval/")
        share = short in BY_NAME and BY_NAME[short].share
        rows.append(
            [
                said(short),
                el("b", estimate(value, ci, share)),
                interval(*ci, share) if ci else "",
                "" if (n := num(line.get("n"), name)) is None else f"{n:,.0f}",
                el("small", meaning(name)),
            ]
        )
    what = ", ".join(f"{k}={text(v)}" for k, v in flat(mapping(line.get("what"))).items() if v not in (None, ""))
    title: list[Node] = [
        said(run.name) if run else None,
        " " if run else None,
        said(text(line.get("time"))),
        f" \u00b7 step {text(line.get('step'))}",
    ]
    body = el(
        "div", table(["figure", "value", "95% interval", "n", "what it is"], rows, numeric=(1, 2, 3)), class_="panel"
    )
    notes = [el("li", said(text(n))) for n in sequence(line.get("notes")) if text(n)]
    return fold(
        title,
        el("p", said(what), class_="soft small wrap") if what else None,
        body,
        el("ul", notes, class_="soft small") if notes else None,
        key=f"evaluation-{text(line.get('time'))}",
        open_=i == 0,
    )
