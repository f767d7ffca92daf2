"""The section of trust flags, each with its evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penchant.report.data import ReportData
from penchant.report.html import Element, Node, el, fold, muted, note, user_text
from penchant.report.svg import number, sparkline
from penchant.runfolder.values import mappings, number_of, sequence, text

MAX_KINDS = 40  # maximum kinds of flags shown
Found = tuple[str, Mapping[str, Any]]  # the run, "" for the only one, and its flag


def flags(data: ReportData) -> Element | None:
    """Each kind of flag once, warnings first; a sentence if no flag was raised; None if no flags file exists."""
    checked = [(r.name if len(data.runs) > 1 else "", r.flags) for r in data.runs if r.flags is not None]
    compared = [("", c.flags) for c in data.comparisons if c.flags is not None]
    checked += compared
    if not checked:
        return None
    kinds = "runs and comparisons" if compared else "runs"
    sources = f"{len(checked)} {kinds}" if len(checked) > 1 else ""
    findings: list[Found] = [(run_name, flag) for run_name, run_flags in checked for flag in run_flags or ()]
    if not findings:
        return muted(f"No flag was raised{f' in {sources}' if sources else ''}.")
    findings.sort(key=lambda f: text(f[1].get("level")) != "warning")
    groups: dict[tuple[str, str], list[Found]] = {}
    for entry in findings:
        name = text(entry[1].get("name")) or text(entry[1].get("title"))
        groups.setdefault((text(entry[1].get("level")), name), []).append(entry)
    shown = list(groups.values())[:MAX_KINDS]
    remaining = len(groups) - len(shown)
    more = muted(f"{remaining} more kinds of flags are in the runs\u2019 flags.json.") if remaining else None
    return el("div", [_card(g, sources) for g in shown], more, class_="flags")


def _card(findings: Sequence[Found], sources: str) -> Element:
    """One kind of flag: its first finding, those of other sources folded, and the advice once."""
    (run_name, first), *rest = findings
    warning, title = (
        text(first.get("level")) == "warning",
        text(first.get("title")) or text(first.get("name")) or "flag",
    )
    subject = _subject(run_name, first)
    about = el("small", " ", user_text(subject)) if subject else None
    if rest:
        about = el("small", f" in {len(findings)} of {sources}" if sources else f" {len(findings)} times")
    mark = el("span", "\u25b2 " if warning else "\u25cb ", aria_hidden="true")
    others = fold(
        f"the {len(rest)} others" if len(rest) > 1 else "the other one",
        [_finding(w, f, True) for w, f in rest],
        key=f"flag-{text(first.get('level'))}-{text(first.get('name'))}",
    )
    return el(
        "article",
        el("h3", mark, "warning: " if warning else "note: ", user_text(title), about),
        _finding(run_name, first, bool(rest)),
        others if rest else None,
        note(user_text(text(first.get("advice")), tag="span")) if first.get("advice") else None,
        class_="flag warning" if warning else "flag",
    )


def _subject(where: str, flag: Mapping[str, Any]) -> str:
    return text(flag.get("about")) or where


def _finding(where: str, flag: Mapping[str, Any], named: bool) -> Element:
    evidence = [e for e in map(_evidence, mappings(flag.get("evidence"))) if e is not None]
    subject = _subject(where, flag)
    return el(
        "div",
        el(
            "p",
            [el("b", user_text(subject)), ": "] if named and subject else None,
            user_text(text(flag.get("sentence")), tag="span"),
        ),
        el("div", evidence, class_="evidence") if evidence else None,
    )


def _evidence(of: Mapping[str, Any]) -> Element | None:
    values = [v for v in map(number_of, sequence(of.get("values"))) if v is not None]
    steps = [v for v in map(number_of, sequence(of.get("steps"))) if v is not None]
    label = text(of.get("label"))
    if not values:
        return None
    line: Node = sparkline(values, label) if len(values) > 3 or steps else None
    ends = f"{_plain(values[0])} \u2192 {_plain(values[-1])}" if line is not None else ", ".join(map(_plain, values))
    when = f"steps {steps[0]:,.0f} to {steps[-1]:,.0f}" if len(steps) > 1 else f"step {steps[0]:,.0f}" if steps else ""
    caption = el("figcaption", user_text(label), el("b", f" {ends}"), el("small", f" {when}") if when else None)
    return el("figure", line, caption)


def _plain(value: float) -> str:
    """Format a value; whole numbers are counts and get no decimals."""
    return f"{value:,.0f}".replace("-", "\u2212") if value == int(value) and abs(value) < 1e6 else number(value)
