"""The data audit, as a section of the report and as a page of its own: findings, bad rows, lengths."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from penchant import __version__
from penchant.report.data import ReportData, RunData
from penchant.report.html import Element, Node, document, el, fold, join_nodes, note, panel, user_text
from penchant.report.svg import MISSING, percent
from penchant.runfolder.values import mapping, num, sequence, text


def audit(data: ReportData) -> Element | None:
    """Every distinct audit once, since runs on the same rows share it; None if there is none."""
    audits: dict[str, tuple[list[RunData], Mapping[str, Any]]] = {}
    for run in data.runs:
        if mapping(run.audit.get("findings")):
            audits.setdefault(text(dict(run.audit)), ([], run.audit))[0].append(run)
    parts = []
    for runs, contents in audits.values():
        more = f" and {len(runs) - 6} more" if len(runs) > 6 else None
        title = el("h3", user_text(", ".join(r.name for r in runs[:6])), more)
        parts.append(el("div", title if len(audits) > 1 else None, _audit_body(contents)))
    return el("div", parts) if parts else None


def _audit_body(of: Mapping[str, Any]) -> Element:
    findings = [mapping(f) for f in mapping(of.get("findings")).values()]
    present = [f for f in findings if num(f, "count")]
    absent = [text(f.get("title")) for f in findings if not num(f, "count")]
    rows: list[list[Node]] = [
        [
            user_text(text(f.get("title"))),
            el("b", f"{num(f, 'count'):,.0f}"),
            "" if (total := num(f, "of")) is None else f"of {total:,.0f}",
            percent(num(f, "share")),
            el("small", _locations(f)),
        ]
        for f in present
    ]
    listing = join_nodes([user_text(title) for title in absent], "; ")
    return el(
        "div",
        el("p", user_text(text(of.get("summary")), tag="span")) if of.get("summary") else None,
        panel(["found", "rows", "", "share", "where"], rows, numeric=(1, 2, 3)) if rows else None,
        note("Looked for and not found: ", listing, ".") if listing else None,
        lengths_table(mapping(of.get("lengths"))),
    )


def _locations(finding: Mapping[str, Any]) -> list[Node]:
    places = [text(w) for w in sequence(finding.get("where"))]
    remark = text(finding.get("note"))
    more = (num(finding, "count") or 0) - len(places)
    parts: list[Node] = [user_text(remark)] if remark else []
    if places:
        parts += [" \u00b7 " if remark else None, user_text(", ".join(places)), ", \u2026" if more > 0 else None]
    return parts


def lengths_table(lengths: Mapping[str, Any], unit: str = "tokens") -> Element | None:
    """Table of the lengths of prompts and answers in the given unit; None if there are none."""
    columns = list(dict.fromkeys(k for q in lengths.values() for k in mapping(q)))
    if not columns:
        return None
    rows: list[list[Node]] = [
        [user_text(name), *(MISSING if (v := num(q, c)) is None else f"{v:,.0f}" for c in columns)]
        for name, q in lengths.items()
    ]
    caption = f"Lengths in {'tokens' if unit == 'lengths' else unit}"
    return panel(["", *map(user_text, columns)], rows, numeric=range(1, len(columns) + 1), caption=caption)


# ---- The page of a single audit: findings first, then lengths ----

GROUPS = (  # groups of findings by prefix of their names, in display order
    ("Rows", ("bad_rows", "left_out", "identical_pairs", "empty_completions", "cut_", "bad_after", "identical_after")),
    ("Copies", ("duplicates", "near_duplicates", "near_identical", "agreed")),
    ("Splits", ("leakage", "near_leakage")),
    ("Label noise", ("contradictions", "near_contradictions", "cycles", "reward_disagreement", "disagreed")),
    ("Bias", ("length_bias", "position_bias", "good_answers", "scores")),
    ("Content", ("languages", "refusals", "check_")),
    ("Personal data and secrets", ("pii_", "secrets_")),
)
OTHER = "Other"


def render_audit(audit: Mapping[str, Any], title: str) -> str:
    """Render the page of an audit as HTML text.

    Args:
        audit: the output of `Audit.to_json`, treated as untrusted.
    """
    findings = mapping(audit.get("findings"))
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for name, finding in findings.items():
        grouped.setdefault(_group(name), []).append(mapping(finding))
    order = [*(g for g, _ in GROUPS), OTHER]
    sections = [_section(name, grouped[name]) for name in order if name in grouped]
    tables = [t for t in (lengths_table(mapping(audit.get(k)), k) for k in ("lengths", "characters")) if t is not None]
    body = el(
        "main",
        el(
            "header",
            el("p", "Penchant \u00b7 data audit", class_="kicker"),
            el("h1", user_text(title)),
            el("p", user_text(text(audit.get("layout"))), class_="soft facts-line"),
            el("p", user_text(text(audit.get("summary"))), class_="soft facts-line"),
        ),
        sections,
        el("section", el("h2", "Lengths"), tables) if tables else None,
        el(
            "footer",
            f"Written by Penchant {__version__}, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}. ",
            "Values that look like personal data or secrets are counted, never shown. This file loads nothing.",
        ),
    )
    return document(f"{title} \u00b7 Penchant data audit", f"{body}\n")


def _group(name: str) -> str:
    return next((title for title, starts in GROUPS if name.startswith(starts)), OTHER)


def _section(title: str, findings: Sequence[Mapping[str, Any]]) -> Element:
    present = [f for f in findings if num(f, "count") or _unknown(f)]
    absent = [text(f.get("title")) for f in findings if not (num(f, "count") or _unknown(f))]
    return el(
        "section",
        el("h2", title),
        panel(["", "rows", "of", "share", "95% interval"], map(_row, present), numeric=(1, 2, 3)) if present else None,
        [_places(f) for f in present if sequence(f.get("where"))],
        note("Looked for and not found: ", "; ".join(absent), ".") if absent else None,
        aria_label=title,
    )


def _unknown(finding: Mapping[str, Any]) -> bool:
    return not num(finding, "of") and bool(finding.get("note"))


def _row(finding: Mapping[str, Any]) -> list[Node]:
    remark = text(finding.get("note"))
    advice = text(finding.get("advice")) if num(finding, "count") else ""
    label: list[Node] = [user_text(text(finding.get("title")))]
    label += [el("br"), el("small", user_text(remark))] if remark else []
    label += [el("br"), el("small", "\u2192 ", user_text(advice))] if advice else []
    if _unknown(finding):
        return [el("span", label), "", "", "", ""]
    ends = [e for e in sequence(finding.get("interval")) if isinstance(e, (int, float))]
    return [
        el("span", label),
        el("b", f"{num(finding, 'count') or 0:,.0f}"),
        f"{num(finding, 'of') or 0:,.0f}",
        percent(num(finding, "share")),
        f"{percent(ends[0])} to {percent(ends[1])}" if len(ends) == 2 else "",
    ]


def _places(finding: Mapping[str, Any]) -> Element:
    places = [text(w) for w in sequence(finding.get("where"))]
    more = int(num(finding, "count") or 0) - len(places)
    title = text(finding.get("title"))
    return fold(
        ["where: ", user_text(title)],
        el("p", user_text(", ".join(places)), f" and {more:,} more" if more > 0 else None, class_="small"),
        key=f"where-{title}",
    )
