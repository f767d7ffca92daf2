"""Held-out figures of a run: at the start and at the end, with intervals, drawn beside what chance would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from penchant.report.data import RunData
from penchant.report.glossary import meaning
from penchant.report.html import Element, Node, el, table
from penchant.report.metrics import HELD_OUT, Figure
from penchant.report.numbers import MISSING, estimate, interval, shown
from penchant.report.plot import strip
from penchant.report.safe import ci_of, num

Pair = tuple[float, float] | None
Reading = Literal["better", "worse", "moved", "unclear", "plain"]


@dataclass(frozen=True, slots=True)
class Change:
    """A figure at the start and at the end of a run.

    Args:
        before: None where it was not evaluated at the start, or means nothing there; reading: what may be said of it.
    """

    figure: Figure
    before: float | None
    before_ci: Pair
    after: float
    after_ci: Pair

    @property
    def reading(self) -> Reading:
        """``better`` or ``worse`` where an interval says so, ``moved`` where only that it moved, ``unclear`` where none says so.

        Against a value of no effect (one half, zero) the interval has to lie to one side of it; against a start that was measured on
        the same rows both intervals have to lie apart, which asks for more than a paired test would.
        """
        if self.after_ci is None:
            return "plain"
        against: Pair = (self.figure.null, self.figure.null) if self.figure.null is not None else self.before_ci
        if against is None and self.before is not None:
            against = (self.before, self.before)
        if against is None:
            return "plain"
        if self.after_ci[0] <= against[1] and self.after_ci[1] >= against[0]:
            return "unclear"
        if self.figure.up is None:
            return "moved"
        return "better" if (self.after_ci[0] > against[1]) == self.figure.up else "worse"


def changes(run: RunData) -> list[Change]:
    """Every known figure of the last evaluation, with that of the start."""
    if not run.evals:
        return []
    last = run.evals[-1]
    first: Mapping[str, Any] = run.evals[0] if num(run.evals[0], "step") == 0 and len(run.evals) > 1 else {}
    found = []
    for figure in HELD_OUT:
        name = f"eval/{figure.name}"
        after = num(last, name)
        if after is not None:
            found.append(Change(figure, num(first, name), ci_of(first, name), after, ci_of(last, name)))
    return found


def held_out(run: RunData) -> Element | None:
    """The table; None where nothing was evaluated."""
    found = changes(run)
    if not found:
        return None
    started = any(c.before is not None for c in found)
    rows = [_row(c, started) for c in found]
    head: list[Node] = ["figure", *(["start"] if started else []), "end", "95% interval, by prompt", ""]
    count = num(run.evals[-1], "eval/rows")
    step = num(run.evals[-1], "step") or 0
    caption = f"At step {step:,.0f}" + (f", over {count:,.0f} held-out rows" if count is not None else "")
    right = (1, 2, 3) if started else (1, 2)
    return el("div", table(head, rows, numeric=right, caption=caption, class_="held"), class_="panel")


def _row(c: Change, started: bool) -> list[Node]:
    share = c.figure.share
    unit = el("small", f" {c.figure.unit}") if c.figure.unit else None
    what = el("small", meaning(c.figure.name), class_="what")
    name = el("span", c.figure.label, unit, what)
    shown_ci = interval(*c.after_ci, share) if c.after_ci and c.after_ci[0] < c.after_ci[1] else ""
    after = estimate(c.after, c.after_ci, share)
    return [
        name,
        *([MISSING if c.before is None else shown(c.before, share)] if started else []),
        el("b", after),
        shown_ci,
        el("span", _strip(c), class_="marks"),
    ]


def _strip(c: Change) -> Node:
    null = c.figure.null if c.figure.null is not None else c.before
    if c.after_ci is None or null is None or c.after_ci[0] >= c.after_ci[1]:
        return None
    values = [null, *c.after_ci, c.after]
    room = (max(values) - min(values)) * 0.08
    return strip(c.after, c.after_ci, null, min(values) - room, max(values) + room)


def by_length(run: RunData) -> Element | None:
    """A reward model's accuracy in quartiles of the length gap; None where it has none."""
    length = run.calibration.get("length")
    quartiles = length.get("quartiles") if isinstance(length, Mapping) else None
    rows: list[Sequence[Node]] = []
    for q in quartiles if isinstance(quartiles, list) else []:
        low, high, size, right = (num(q, k) for k in ("from", "to", "rows", "accuracy"))
        rows.append([f"{shown(low)} to {shown(high)}", shown(size), shown(right, True)])
    if not rows:
        return None
    rule = num(length, "longer_wins")
    return el(
        "div",
        table(
            ["chosen \u2212 rejected, tokens", "pairs", "accuracy"],
            rows,
            numeric=(1, 2),
            caption="Accuracy by length: held-out pairs in quartiles",
        ),
        el("p", f"The rule that the longer answer wins is right for {shown(rule, True)} of them.", class_="soft small"),
        class_="panel",
    )
