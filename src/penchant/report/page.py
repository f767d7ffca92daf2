"""The report page: its sections in order, with a script for folding, filtering and searching."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from penchant import __version__
from penchant.base.text import counted as count
from penchant.metrics.names import METRICS
from penchant.report.audit import audit
from penchant.report.curves import curves
from penchant.report.data import ReportData
from penchant.report.flags import flags
from penchant.report.frontier import frontier
from penchant.report.html import (
    Element,
    Node,
    asset,
    document,
    el,
    fold,
    join_nodes,
    json_html,
    muted,
    panel,
    user_text,
)
from penchant.report.provenance import cost, evaluations, provenance
from penchant.report.samples import samples
from penchant.report.settings import configs, settings_table, short
from penchant.report.svg import swatch
from penchant.report.verdict import by_length, cards, held_out, verdict
from penchant.report.winrates import compared_figures, win_rates
from penchant.runfolder.values import mapping, num, text

RELOAD_SECONDS = 30
STATE = '<script type="application/json" id="state">'  # followed by what the script is told


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the page.

    Args:
        make: builds it from the data, None if there is nothing to show; missing: text shown in that case, "" to omit the section.
        wanted: whether the section applies to this data at all; short: its name in the table of contents.
    """

    key: str
    short: str
    title: str
    make: Callable[[ReportData], Node]
    missing: str = ""
    wanted: Callable[[ReportData], bool] = lambda _: True


def _has_comparisons(data: ReportData) -> bool:
    return bool(data.comparisons)


def render(data: ReportData, *, strict: bool = False) -> str:
    """Render the whole page as HTML text.

    Args:
        strict: raise if a section fails. By default the page shows the error instead, because a report must never end a run.
    """
    built = [(s, _render_guarded(s.make, data, strict)) for s in SECTIONS if s.wanted(data)]
    sections = [(s, node) for s, node in built if node is not None]
    missing = [el("li", el("b", s.title), ": ", s.missing) for s, node in built if node is None and s.missing]
    heading, footer = "Not in this report", ". This file is complete: it loads nothing, and nothing in it calls home."
    goals = cards(data.runs[0]) if data.kind == "run" and data.runs else None
    body = el(
        "main",
        _header(data),
        el("section", _render_guarded(verdict, data, strict), goals, id="verdict", aria_label="Verdict"),
        el("nav", [el("a", s.short, href=f"#{s.key}") for s, _ in sections], aria_label="contents"),
        [el("section", el("h2", s.title), node, id=s.key, aria_label=s.title) for s, node in sections],
        el("section", el("h2", heading), el("ul", missing, class_="soft small"), id="missing", aria_label=heading)
        if missing
        else None,  # all together at the end, out of the way
        el("footer", f"Written by Penchant {__version__}, ", _time(data.now), footer),
    )
    state = {"running": data.is_running, "written": round(data.now), "every": RELOAD_SECONDS}
    refresh = f'<noscript><meta http-equiv="refresh" content="{2 * RELOAD_SECONDS}"></noscript>'
    script = f"{STATE}{json_html(state)}</script>\n<script>{asset('page.js')}</script>"
    return document(f"{data.title} \u00b7 Penchant report", f"{body}\n{script}\n", refresh if data.is_running else "")


def says_running(page: str) -> bool:
    """Whether a page that `render` made says that its run is still running, and reloads itself."""
    return STATE + json_html({"running": True})[:-1] in page


def _render_guarded(make: Callable[[ReportData], Node], data: ReportData, strict: bool) -> Node:
    try:
        return make(data)
    except Exception as error:
        if strict:
            raise
        message = f"This section could not be built from these files ({type(error).__name__}: "
        return muted(message, user_text(str(error)[:300]), ").")


# ---- small parts assembled here -----------------------------------------------------------------------------------


def _header(data: ReportData) -> Element:
    live = el("span", "still running", class_="live")
    written = _time(data.now, id="written")
    return el(
        "header",
        el("p", f"Penchant report \u00b7 {data.kind}", class_="kicker"),
        el("h1", user_text(data.title)),
        el("p", _facts(data), class_="soft facts-line"),
        el("p", live, " This page reloads itself. It was written ", written, ".", class_="going-on")
        if data.is_running
        else None,
    )


def _facts(data: ReportData) -> list[Node]:
    runs = data.runs
    parts: list[Node] = []
    if len(runs) != 1:
        parts += [f"{count(len(runs), 'run')} of {count(len(data.settings), 'setting')}"] if runs else []
        parts += [f"{data.left_out} more left out"] if data.left_out else []
        parts += [count(len(data.comparisons), "comparison")] if data.comparisons else []
        return join_nodes(parts)
    m = runs[0].manifest
    model = mapping(m.get("model"))
    size = num(model, "parameters")
    parts += [user_text(runs[0].method)] if runs[0].method else []
    parts += [user_text(short(text(model.get("path"))))] if model.get("path") else []
    parts += [f"{size:,.0f} parameters"] if size is not None else []
    parts += [user_text(f"{text(m.get('steps'))} steps")] if m.get("steps") is not None else []
    parts += [user_text(runs[0].status)] if runs[0].status else ["no manifest.json in this folder"]
    parts += [user_text(text(m.get("started")))] if m.get("started") else []
    return join_nodes(parts)


def _held_out(data: ReportData) -> Node:
    table_ = held_out(data.runs[0])
    return None if table_ is None else el("div", table_, by_length(data.runs[0]))


def _curves(data: ReportData) -> Node:
    plots = curves(data)
    if plots is None or len(data.runs) < 2:
        return plots
    items = [
        el(
            "label",
            el("input", type="checkbox", checked=True, data_show=s.key),
            el("b", s.key, class_="key"),
            swatch(s.place),
            user_text(s.name),
            el("small", f" {count(len(s.runs), 'seed')}") if len(s.runs) > 1 else None,
            data_g=s.key,
        )
        for s in data.settings
    ]
    return el("div", el("div", items, class_="legend", role="group", aria_label="settings"), plots)


def _glossary(data: ReportData) -> Node:
    logged = {k.removeprefix("eval/") for r in data.runs for m in (*r.evals[-1:], *r.trained[-1:]) for k in m}
    rows: list[list[Node]] = [[user_text(n), METRICS[n].meaning] for n in sorted(logged & METRICS.keys())]
    return fold(f"{len(rows)} names", panel([], rows), key="words") if rows else None


def _time(seconds: float, **attributes: str) -> Element:
    label, iso = (time.strftime(f"%Y-%m-%d{form}", time.gmtime(seconds)) for form in (" %H:%M:%S UTC", "T%H:%M:%SZ"))
    return el("time", label, datetime=iso, **attributes)


SECTIONS = (
    Section("flags", "Flags", "Trust flags", flags, "there is no flags.json here, so flags have not been checked."),
    Section(
        "settings",
        "Ranking",
        "Settings side by side",
        settings_table,
        wanted=lambda d: len(d.runs) > 1 and d.kind != "comparison",
    ),
    Section("models", "Models", "Every model", compared_figures, "comparison.json names none.", _has_comparisons),
    Section(
        "frontier",
        "Frontier",
        "Frontier",
        frontier,
        "no evaluation has both a gain and a KL, so there is none to draw (evaluation.kl_prompts measures the KL).",
    ),
    Section("win-rates", "Win rates", "Win rates", win_rates, "no pairs were judged.", _has_comparisons),
    Section(
        "held-out",
        "Held out",
        "Held-out figures",
        _held_out,
        "nothing was held out, or it was not evaluated yet.",
        lambda d: d.kind == "run",
    ),
    Section("curves", "Curves", "Curves", _curves, "there are no metrics yet.", lambda d: bool(d.runs)),
    Section(
        "completions",
        "Completions",
        "Completions side by side",
        samples,
        "there are no samples in this folder.",
        lambda d: not d.runs or any(r.method != "reward_model" for r in d.runs),
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
    Section("words", "Words", "What the figures mean", _glossary),
)
