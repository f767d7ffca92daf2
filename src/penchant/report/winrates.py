"""Win rates between models: a matrix with intervals, raw and at equal length, and the figures of every compared model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from penchant.metrics.names import with_k3
from penchant.metrics.stats import Interval
from penchant.report.data import Comparison, ReportData
from penchant.report.html import Element, Node, el, note, panel, user_text
from penchant.report.svg import MISSING, estimate, format_value, interval, interval_plot, percent
from penchant.runfolder.values import ci_of, format_p, mapping, mappings, num, text

SHADES = 5  # of a cell's color on each side of one half
FIGURES = (  # name, label, share
    ("reward", "reward", False),
    ("reward_change", "change of reward against {first}", False),
    ("win_rate", "win rate against {first}, ties half", True),
    ("win_rate_equal_length", "win rate at equal length", True),
    ("kl_k3", "KL from {first}, nats per completion", False),
    ("kl_per_token", "KL from {first}, nats per token", False),
    ("preference_accuracy", "held-out preference accuracy", True),
    ("perplexity", "perplexity of held-out chosen answers", False),
    ("ended", "ended by EOS", True),
    ("tokens", "tokens per completion", False),
    ("distinct_2", "distinct-2", False),
)


def win_rates(data: ReportData) -> Element | None:
    """Both matrices of every comparison, by its reward, by every other one and by its judge; None if there are no pairs."""
    parts: list[Node] = []
    for c in data.comparisons:
        first = next(iter(mapping(c.figures.get("models"))), "")
        judgement = mapping(c.figures.get("judge"))
        main, judged = comparison_pairs(c), mappings(judgement.get("comparisons"))
        groups = [("", text(c.figures.get("outcome")) or "outcome", main)]
        groups += [(k, f"reward by {k}", mappings(v)) for k, v in mapping(c.figures.get("also")).items()]
        if judged != main:  # without a reward they may be the comparison's own
            groups.append((text(judgement.get("name")), f"win rate by {text(judgement.get('name'))}", judged))
        for judge, quantity, pairs in groups:
            kinds = (("win_rate", "Win rate"), ("equal_length", "At equal length"))
            suffix = f", by {judge}" if judge else ""
            drawn = [_matrix(pairs, field, title + suffix, first) for field, title in kinds]
            matrices = [m for m in drawn if m is not None]
            parts += [el("div", matrices, class_="matrices")] if matrices else []
            parts += [_pairs_table(pairs, quantity)] if pairs else []
    if not parts:
        return None
    legend = note(
        "Each cell: how often the row\u2019s completion has the higher reward than the column\u2019s on the same prompt, or is preferred by the judge, a tie counting half, with its 95% interval. ",
        "Cells whose interval includes one half are pale.",
    )
    has_matrix = any(isinstance(p, Element) and ("class", "matrices") in p.attributes for p in parts)
    return el("div", legend if has_matrix else None, parts)


def comparison_pairs(comparison: Comparison) -> list[dict[str, Any]]:
    """A comparison's pairs. Older versions recorded only those with the first model."""
    pairs = mappings(comparison.figures.get("comparisons"))
    if pairs:
        return pairs
    models = mapping(comparison.figures.get("models"))
    first = next(iter(models), "")
    against_first = []
    for name, figures in models.items():
        value, ci = num(figures, "win_rate"), ci_of(figures, "win_rate")
        if name != first and value is not None and ci is not None:
            against_first.append(
                {"name": name, "other": first, "win_rate": {"estimate": value, "low": ci[0], "high": ci[1]}}
            )
    return against_first


def pair_interval(pair: Mapping[str, Any], field: str) -> Interval | None:
    """An interval of a pair by its field; None if missing."""
    fields = mapping(pair.get(field))
    value, low, high = num(fields, "estimate"), num(fields, "low"), num(fields, "high")
    return None if value is None or low is None or high is None else Interval(value, low, high)


def matrix_cells(pairs: Sequence[Mapping[str, Any]], field: str) -> dict[tuple[str, str], Interval]:
    """(row, column) -> win rate, in both directions."""
    cells: dict[tuple[str, str], Interval] = {}
    for pair in pairs:
        rate = pair_interval(pair, field)
        if rate is not None:
            a, b = text(pair.get("name")), text(pair.get("other"))
            cells[a, b], cells[b, a] = rate, rate.mirrored()
    return cells


def _matrix(pairs: Sequence[Mapping[str, Any]], field: str, title: str, first: str) -> Element | None:
    cells = matrix_cells(pairs, field)
    if not cells:
        return None
    names = list(dict.fromkeys([*([first] if any(first in c for c in cells) else []), *(a for a, _ in cells)]))
    corner = el("th", el("span", "row against column", class_="spoken"), scope="col")
    head = el("tr", corner, [el("th", user_text(n), scope="col") for n in names])
    rows = [
        el("tr", el("th", user_text(a), scope="row"), [_cell(cells.get((a, b)), a == b) for b in names]) for a in names
    ]
    return el(
        "div",
        el("table", el("caption", title), el("thead", head), el("tbody", rows), class_="matrix"),
        class_="scroll panel",
        tabindex="0",
        role="region",
        aria_label=title,
    )


def _cell(rate: Interval | None, is_self: bool) -> Element:
    if rate is None:
        return el("td", "" if is_self else MISSING, class_="same" if is_self else None)
    significant = rate.low > 0.5 or rate.high < 0.5
    shade = min(SHADES, max(1, math.ceil(abs(rate.estimate - 0.5) * 2 * SHADES - 1e-9))) if significant else 0
    direction = "up" if rate.estimate >= 0.5 else "down"
    ends = el("small", f"{100 * rate.low:.0f}\u2013{100 * rate.high:.0f}")
    return el("td", el("b", percent(rate.estimate)), ends, class_=f"{direction}{shade}")


def _pairs_table(pairs: Sequence[Mapping[str, Any]], quantity: str) -> Element | None:
    diffs = [(p, d) for p in pairs if (d := pair_interval(p, "difference")) is not None]
    if not diffs:
        return None
    ends = [v for _, d in diffs for v in (d.low, d.high, 0.0)]
    margin = (max(ends) - min(ends)) * 0.05
    scale = min(ends) - margin, max(ends) + margin
    rows: list[list[Node]] = []
    for pair, d in diffs:
        ci = (d.low, d.high)
        names = el("span", user_text(text(pair.get("name"))), " \u2212 ", user_text(text(pair.get("other"))))
        plot = el("span", interval_plot(d.estimate, ci, 0.0, *scale), class_="marks")
        values = el("b", estimate(d.estimate, ci)), interval(*ci)
        rows.append([names, *values, plot, p_value(num(pair, "p")), p_value(num(pair, "p_corrected"))])
    seeds = ", and by seeds where there are several" if any(num(p, "p_seeds") is not None for p, _ in diffs) else ""
    caption = f"Differences of {quantity}; p by prompt{seeds}, corrected (Holm) for {len(diffs)}"
    head = ["comparison", "difference", "95% interval", "", "p", "p corrected"]
    return panel(head, rows, numeric=(1, 2, 4, 5), caption=caption)


def p_value(p: float | None) -> str:
    """Format a p-value with its significant digits."""
    return MISSING if p is None else format_p(p)


def compared_figures(data: ReportData) -> Element | None:
    """Figures of every compared model, one column per model; None without a comparison."""
    parts = []
    for c in data.comparisons:
        models = {name: with_k3(mapping(figures)) for name, figures in mapping(c.figures.get("models")).items()}
        if not models:
            continue
        first = next(iter(models))
        rows: list[list[Node]] = []
        for judge in dict.fromkeys(["", *(k for m in models.values() for k in mapping(m.get("also")))]):
            columns = [mapping(mapping(m.get("also")).get(judge)) if judge else m for m in models.values()]
            suffix = f", by {judge}" if judge else ""
            for name, label, share in FIGURES:
                if any(num(f, name) is not None for f in columns):
                    rows.append(
                        [user_text(label.format(first=first) + suffix), *(_figure(f, name, share) for f in columns)]
                    )
        caption = "Every figure on the same prompts, with 95% intervals"
        parts.append(panel(["", *map(user_text, models)], rows, numeric=range(1, len(models) + 1), caption=caption))
    return el("div", parts) if parts else None


def _figure(figures: Mapping[str, Any], name: str, share: bool) -> Node:
    value, ci = num(figures, name), ci_of(figures, name)
    if value is None:
        return MISSING
    if ci is None:
        return format_value(value, share)
    return el("span", el("b", estimate(value, ci, share)), " ", el("small", interval(*ci, share), class_="ci"))
