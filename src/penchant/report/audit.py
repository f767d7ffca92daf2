"""The data audit: what was found in the rows, what was kept aside, and how long they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penchant.report.data import ReportData, RunData
from penchant.report.html import Element, Node, el, note, panel, said
from penchant.report.svg import MISSING, percent
from penchant.runfolder.values import mapping, num, sequence, text


def audit(data: ReportData) -> Element | None:
    """Every audit once: runs on the same rows share one. None where there is none."""
    found: dict[str, tuple[list[RunData], Mapping[str, Any]]] = {}
    for run in data.runs:
        if mapping(run.audit.get("findings")):
            found.setdefault(text(dict(run.audit)), ([], run.audit))[0].append(run)
    parts = []
    for runs, of_one in found.values():
        title = (
            None
            if len(found) == 1
            else el(
                "h3", said(", ".join(r.name for r in runs[:6])), f" and {len(runs) - 6} more" if len(runs) > 6 else None
            )
        )
        parts.append(el("div", title, _one(of_one)))
    return el("div", parts) if parts else None


def _one(of: Mapping[str, Any]) -> Element:
    findings = [mapping(f) for f in mapping(of.get("findings")).values()]
    some = [f for f in findings if num(f, "count")]
    none = [text(f.get("title")) for f in findings if not num(f, "count")]
    rows: list[list[Node]] = [
        [
            said(text(f.get("title"))),
            el("b", f"{num(f, 'count'):,.0f}"),
            "" if (of_ := num(f, "of")) is None else f"of {of_:,.0f}",
            percent(num(f, "share")),
            el("small", _where(f)),
        ]
        for f in some
    ]
    clear: list[Node] = []
    for i, title in enumerate(none):
        clear += ["; " if i else None, said(title)]
    return el(
        "div",
        el("p", said(text(of.get("summary")), tag="span")) if of.get("summary") else None,
        panel(["found", "rows", "", "share", "where"], rows, numeric=(1, 2, 3)) if rows else None,
        note("Looked for and not found: ", clear, ".") if clear else None,
        lengths_table(mapping(of.get("lengths"))),
    )


def _where(finding: Mapping[str, Any]) -> list[Node]:
    places = [text(w) for w in sequence(finding.get("where"))]
    note = text(finding.get("note"))
    more = (num(finding, "count") or 0) - len(places)
    parts: list[Node] = [said(note)] if note else []
    if places:
        parts += [" \u00b7 " if note else None, said(", ".join(places)), ", \u2026" if more > 0 else None]
    return parts


def lengths_table(lengths: Mapping[str, Any], unit: str = "tokens") -> Element | None:
    """Lengths of prompts and answers in this unit; None where there are none."""
    columns = list(dict.fromkeys(k for q in lengths.values() for k in mapping(q)))
    if not columns:
        return None
    rows: list[list[Node]] = []
    for what, q in lengths.items():
        values = [num(q, c) for c in columns]
        rows.append([said(what), *(MISSING if v is None else f"{v:,.0f}" for v in values)])
    return panel(
        ["", *(said(c) for c in columns)],
        rows,
        numeric=range(1, len(columns) + 1),
        caption=f"Lengths in {'tokens' if unit == 'lengths' else unit}",
    )
