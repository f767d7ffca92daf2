"""Trust flags: what a careful reader would want to know first, each with its evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penchant.report.data import ReportData
from penchant.report.html import Element, Node, el, said
from penchant.report.numbers import number
from penchant.report.plot import sparkline
from penchant.report.safe import mappings, number_of, sequence, text

MOST = 60


def flags(data: ReportData) -> Element | None:
    """Every flag, warnings first; a sentence where there are none; None where nobody looked for any."""
    looked = [(r.name if len(data.runs) > 1 else "", r.flags) for r in data.runs if r.flags is not None]
    looked += [("", c.flags) for c in data.comparisons if c.flags is not None]
    if not looked:
        return None
    found = [(where, flag) for where, of_one in looked for flag in of_one or ()]
    if not found:
        of = "" if len(looked) == 1 else f" in {len(looked)} runs"
        return el("p", f"No flag was raised{of}.", class_="soft")
    found.sort(key=lambda f: text(f[1].get("level")) != "warning")
    more = (
        el("p", f"{len(found) - MOST} more flags are in the runs\u2019 flags.json.", class_="soft")
        if len(found) > MOST
        else None
    )
    return el("div", [_flag(where, flag) for where, flag in found[:MOST]], more, class_="flags")


def _flag(where: str, flag: Mapping[str, Any]) -> Element:
    warning = text(flag.get("level")) == "warning"
    about = text(flag.get("about")) or where
    evidence = [e for e in map(_evidence, mappings(flag.get("evidence"))) if e is not None]
    return el(
        "article",
        el(
            "h3",
            el("span", "\u25b2 " if warning else "\u25cb ", aria_hidden="true"),
            el("span", "warning: " if warning else "note: ", class_="level-word"),
            said(text(flag.get("title")) or text(flag.get("name")) or "flag"),
            el("small", " ", said(about)) if about else None,
        ),
        el("p", said(text(flag.get("sentence")), tag="span")),
        el("div", evidence, class_="evidence") if evidence else None,
        el("p", said(text(flag.get("advice")), tag="span"), class_="soft") if flag.get("advice") else None,
        class_="flag warning" if warning else "flag",
    )


def _evidence(of: Mapping[str, Any]) -> Element | None:
    values = [v for v in map(number_of, sequence(of.get("values"))) if v is not None]
    steps = [v for v in map(number_of, sequence(of.get("steps"))) if v is not None]
    label = text(of.get("label"))
    if not values:
        return None
    line: Node = sparkline(values, label) if len(values) > 3 or steps else None
    ends = f"{number(values[0])} \u2192 {number(values[-1])}" if line is not None else ", ".join(map(number, values))
    when = f"steps {steps[0]:,.0f} to {steps[-1]:,.0f}" if len(steps) > 1 else f"step {steps[0]:,.0f}" if steps else ""
    return el(
        "figure", line, el("figcaption", said(label), el("b", f" {ends}"), el("small", f" {when}") if when else None)
    )
