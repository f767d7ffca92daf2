"""The page: its sections in order, one stylesheet and one script inside it, and a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

from penchant import __version__
from penchant.metrics.names import METRICS
from penchant.report.audit import audit
from penchant.report.curves import curves
from penchant.report.data import ReportData
from penchant.report.flags import flags
from penchant.report.frontier import frontier
from penchant.report.html import Element, Node, el, fold, json_html, panel, said, visible
from penchant.report.provenance import cost, evaluations, provenance
from penchant.report.samples import samples
from penchant.report.settings import configs, settings_table, short
from penchant.report.svg import count, swatch
from penchant.report.verdict import by_length, cards, held_out, verdict
from penchant.report.winrates import compared_figures, win_rates
from penchant.runfolder.values import mapping, num, text

RELOAD_SECONDS = 30
KINDS = {"run": "run", "runs": "runs", "sweep": "sweep", "pipeline": "pipeline", "comparison": "comparison"}


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page.

    Args:
        make: from the data, or None where there is nothing to show; missing: what is said then, "" to leave the section out.
        wanted: whether it belongs on a page of this data at all; short: what the contents call it.
    """

    key: str
    short: str
    title: str
    make: Callable[[ReportData], Node]
    missing: str = ""
    wanted: Callable[[ReportData], bool] = lambda _: True


def _one(data: ReportData) -> bool:
    return data.kind == "run"


def _several(data: ReportData) -> bool:
    return len(data.runs) > 1


def _compares(data: ReportData) -> bool:
    return bool(data.comparisons)


SECTIONS = (
    Section("flags", "Flags", "Trust flags", flags, "there is no flags.json here; nobody has looked for flags."),
    Section(
        "settings",
        "Ranking",
        "Settings side by side",
        settings_table,
        "",
        lambda d: _several(d) and d.kind != "comparison",
    ),
    Section("models", "Models", "Every model", compared_figures, "comparison.json names none.", _compares),
    Section(
        "frontier",
        "Frontier",
        "Frontier",
        frontier,
        "no evaluation has both a gain and a KL, so there is none to draw (evaluation.kl_prompts measures the KL).",
    ),
    Section("win-rates", "Win rates", "Win rates", win_rates, "no pairs were judged.", _compares),
    Section(
        "held-out",
        "Held out",
        "Held-out figures",
        lambda d: _held_out(d),
        "nothing was held out, or it was not evaluated yet.",
        _one,
    ),
    Section("curves", "Curves", "Curves", lambda d: _curves(d), "there are no metrics yet.", lambda d: bool(d.runs)),
    Section(
        "completions",
        "Completions",
        "Completions side by side",
        samples,
        "there are no samples in this folder.",
        lambda d: not _reward_models(d),
    ),
    Section("evaluations", "Evaluations", "Later evaluations", evaluations),
    Section("data", "Data", "Data audit", audit, "there is no audit.json in this folder."),
    Section(
        "configs",
        "Settings",
        "Settings and their differences",
        configs,
        "there is no config.resolved.yaml in this folder.",
    ),
    Section("cost", "Cost", "Time and memory", cost, "there is no perf.jsonl and no manifest.json yet."),
    Section("provenance", "Provenance", "Provenance", provenance, "there is no manifest.json in this folder."),
    Section("words", "Words", "What the figures mean", lambda d: _glossary(d)),
)


def render(data: ReportData, *, strict: bool = False) -> str:
    """The whole page as text.

    Args:
        strict: whether a section that cannot be made raises, rather than saying so; a report must never end a run.
    """
    made = [(s, _guarded(s.make, data, strict)) for s in SECTIONS if s.wanted(data)]
    shown = [(s, node) for s, node in made if node is not None]
    missing = [s for s, node in made if node is None and s.missing]
    body = el(
        "main",
        _header(data),
        el("section", _guarded(verdict, data, strict), _cards(data), id="verdict", aria_label="Verdict"),
        el("nav", [el("a", s.short, href=f"#{s.key}") for s, _ in shown], aria_label="contents"),
        [el("section", el("h2", s.title), node, id=s.key, aria_label=s.title) for s, node in shown],
        _missing(missing),
        _footer(data),
    )
    return _document(data, str(body))


def _missing(sections: Sequence[Section]) -> Element | None:
    """What is not on the page, and why: together at the end, where it is in nobody's way."""
    if not sections:
        return None
    items = [el("li", el("b", s.title), ": ", s.missing) for s in sections]
    return el(
        "section",
        el("h2", "Not in this report"),
        el("ul", items, class_="soft small"),
        id="missing",
        aria_label="Not in this report",
    )


def _guarded(make: Callable[[ReportData], Node], data: ReportData, strict: bool) -> Node:
    try:
        return make(data)
    except Exception as error:
        if strict:
            raise
        return el(
            "p",
            f"This part could not be made of these files ({type(error).__name__}: ",
            said(str(error)[:300]),
            ").",
            class_="soft",
        )


# ---- parts that are only put together here ------------------------------------------------------------------------


def _header(data: ReportData) -> Element:
    return el(
        "header",
        el("p", f"Penchant report \u00b7 {KINDS[data.kind]}", class_="kicker"),
        el("h1", said(data.title)),
        el("p", _facts(data), class_="soft facts-line"),
        el(
            "p",
            el("span", "still going on", class_="live"),
            " This page loads itself anew. It was written ",
            el("time", _clock(data.now), datetime=_iso(data.now), id="written"),
            ".",
            class_="going-on",
        )
        if data.going_on
        else None,
    )


def _facts(data: ReportData) -> list[Node]:
    if len(data.runs) != 1:
        parts: list[Node] = (
            [f"{count(len(data.runs), 'run')} of {count(len(data.settings), 'setting')}"] if data.runs else []
        )
        if data.left_out:
            parts.append(f"{data.left_out} more left out")
        parts += [count(len(data.comparisons), "comparison")] if data.comparisons else []
    else:
        m = data.runs[0].manifest
        model = mapping(m.get("model"))
        size = num(model, "parameters")
        parts = [said(data.runs[0].method)] if data.runs[0].method else []
        parts += [said(short(text(model.get("path"))))] if model.get("path") else []
        parts += [f"{size:,.0f} parameters"] if size is not None else []
        parts += [said(f"{text(m.get('steps'))} steps")] if m.get("steps") is not None else []
        parts += [said(data.runs[0].status)] if data.runs[0].status else ["no manifest.json in this folder"]
        parts += [said(text(m.get("started")))] if m.get("started") else []
    joined: list[Node] = []
    for p in parts:
        joined += [" \u00b7 " if joined else None, p]
    return joined


def _cards(data: ReportData) -> Node:
    return cards(data.runs[0]) if _one(data) and data.runs else None


def _held_out(data: ReportData) -> Node:
    table_ = held_out(data.runs[0])
    return None if table_ is None else el("div", table_, by_length(data.runs[0]))


def _curves(data: ReportData) -> Node:
    drawn = curves(data)
    if drawn is None or not _several(data):
        return drawn
    items = [
        el(
            "label",
            el("input", type="checkbox", checked=True, data_show=s.key),
            el("b", s.key, class_="key"),
            swatch(s.place),
            said(s.name),
            el("small", f" {count(len(s.runs), 'seed')}") if len(s.runs) > 1 else None,
            data_g=s.key,
        )
        for s in data.settings
    ]
    return el("div", el("div", items, class_="legend", role="group", aria_label="settings"), drawn)


def _reward_models(data: ReportData) -> bool:
    return bool(data.runs) and all(r.method == "reward_model" for r in data.runs)


def _glossary(data: ReportData) -> Node:
    logged = {k.removeprefix("eval/") for r in data.runs for m in (*r.evals[-1:], *r.trained[-1:]) for k in m}
    rows: list[list[Node]] = [[said(n), METRICS[n].meaning] for n in sorted(logged & METRICS.keys())]
    return fold(f"{len(rows)} names", panel([], rows), key="words") if rows else None


def _footer(data: ReportData) -> Element:
    when = el("time", _clock(data.now), datetime=_iso(data.now))
    return el(
        "footer",
        f"Written by Penchant {__version__}, ",
        when,
        ". This file is complete: it loads nothing, and nothing in it calls home.",
    )


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# ---- the document -------------------------------------------------------------------------------------------------


@cache
def asset(name: str) -> str:
    """The stylesheet or the script."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def digest(content: str) -> str:
    """A source of a content security policy that lets in this text and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def policy() -> str:
    """The page's content security policy."""
    return (
        f"default-src 'none'; style-src {digest(asset('page.css'))}; script-src {digest(asset('page.js'))}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _document(data: ReportData, body: str) -> str:
    state = {"running": data.going_on, "written": round(data.now), "every": RELOAD_SECONDS}
    refresh = (
        f'<noscript><meta http-equiv="refresh" content="{2 * RELOAD_SECONDS}"></noscript>' if data.going_on else ""
    )
    script = (
        f'<script type="application/json" id="state">{json_html(state)}</script>\n<script>{asset("page.js")}</script>\n'
    )
    return document(f"{data.title} \u00b7 Penchant report", f"{body}\n{script}", refresh)


def document(title: str, body: str, head: str = "") -> str:
    """A page by itself: the stylesheet and the policy in it.

    Args:
        title: escaped here; body, head: HTML.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy(), quote=False)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<meta name="generator" content="penchant">\n'
        f"{head}<title>{escape(visible(title))}</title>\n<style>{asset('page.css')}</style>\n</head>\n<body>\n{body}"
        "</body>\n</html>\n"
    )
