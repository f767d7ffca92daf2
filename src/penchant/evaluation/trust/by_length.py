"""Accuracy and wins that length alone explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from penchant.evaluation.flags import Evidence
from penchant.evaluation.length_control import length_controlled_win_rate
from penchant.evaluation.stats import Interval, bootstrap_ci
from penchant.evaluation.trust.figures import Point, RunView
from penchant.evaluation.trust.rule import ComparisonView, Rule, Seen
from penchant.evaluation.trust.words import percent, share_interval

APART = 0.05  # raw and at equal length: a smaller difference is no news


def _of_run(run: RunView) -> Seen | None:
    names = ("rewards/accuracies", "length/controlled_accuracy", "length/agreement", "length/longer_wins")
    series = [run.held_out(name) for name in names]
    if not all(series) or len({s[-1].step for s in series}) > 1:
        return None
    right, controlled, agreement, longer = (s[-1] for s in series)
    if right.bounds()[0] <= 0.5:
        return None  # nothing was learned that could be explained
    shown = (
        Evidence(
            "accuracy, at equal length, agreement with length, of the rule alone", tuple(s[-1].value for s in series)
        ),
    )
    sides = agreement.bounds()
    said = f"At step {right.step:,} the accuracy on held-out pairs is {share_interval(right)}"
    if controlled.bounds()[0] <= 0.5 and not sides[0] <= 0.5 <= sides[1]:
        prefers = "longer" if agreement.value > 0.5 else "shorter"
        return Seen(
            f"{said}, but {share_interval(controlled)} at equal length: the {prefers} answer is preferred in "
            f"{percent(max(agreement.value, 1 - agreement.value))} of pairs.",
            shown,
        )
    alone = max(longer.value, 1 - longer.value)
    biased = Point(longer.step, alone, longer.se, longer.n).bounds()[0] > 0.5
    if biased and right.value <= alone:
        which = "longer" if longer.value > 0.5 else "shorter"
        return Seen(
            f"{said}; preferring the {which} answer gets {percent(alone)} right without reading it.", shown, "note"
        )
    return None


def _of_comparison(view: ComparisonView) -> Sequence[Seen]:
    found = []
    for name, figures in view.others.items():
        pair = _from_figures(figures) or _from_rows(view, name)
        if pair is None:
            continue
        raw, equal = pair
        wins, loses = raw.low > 0.5, raw.high < 0.5
        kept = equal.low > 0.5 if wins else equal.high < 0.5
        if not (wins or loses) or kept or abs(raw.estimate - equal.estimate) < APART:
            continue
        sentence = (
            f"The win rate of {name} against {view.first} is {_shown(raw)}, but {_shown(equal)} at equal length: length may be why it "
            f"{'wins' if wins else 'loses'}."
        )
        shown = (Evidence("win rate, raw and at equal length", (raw.estimate, equal.estimate)),)
        found.append(Seen(sentence, shown, about=name))
    return found


def _shown(i: Interval) -> str:
    return f"{percent(i.estimate)} (95% interval {percent(i.low)} to {percent(i.high)})"


def _from_figures(figures: Mapping[str, Any]) -> tuple[Interval, Interval] | None:
    found = []
    for name in ("win_rate", "win_rate_equal_length"):
        value, ci = figures.get(name), figures.get(f"{name}/ci")
        if not isinstance(value, (int, float)) or not isinstance(ci, Sequence) or len(ci) != 2:
            return None
        found.append(Interval(float(value), float(ci[0]), float(ci[1])))
    return found[0], found[1]


def _from_rows(view: ComparisonView, name: str) -> tuple[Interval, Interval] | None:
    """Each completion against the first model's of the same row, by the reward that stands in the rows."""
    wins, mine, theirs, prompts = [], [], [], []
    for row in view.rows:
        completions = row.get("completions") or {}
        a, b = completions.get(name), completions.get(view.first)
        if not a or not b or "reward" not in a or "reward" not in b:
            continue
        wins.append(float(a["reward"] > b["reward"]) + 0.5 * float(a["reward"] == b["reward"]))
        mine.append(float(a["tokens"]))
        theirs.append(float(b["tokens"]))
        prompts.append(str(row.get("prompt")))
    if len(set(prompts)) < 2:
        return None
    _, clusters = np.unique(np.array(prompts), return_inverse=True)
    return bootstrap_ci(wins, clusters=clusters, draws=2000), length_controlled_win_rate(
        wins, mine, theirs, clusters=clusters, draws=500
    )


RULE = Rule(
    name="accuracy_by_length",
    title="length explains it",
    what="of a run: accuracy on held-out pairs is above 50% (99% interval), at equal length it is not (the logistic `P(right) = sigmoid(theta + phi "
    "tanh(gap / s))` at a gap of zero), and the longer (or the shorter) answer is preferred more often than by chance. A note where the accuracy is not "
    "above that of preferring by length alone. Of a comparison: a 95% interval of the win rate that excludes 50% raw and does not at equal length "
    f"(arXiv 2404.04475), and both differ by {APART:g} or more.",
    needs="`eval/rewards/accuracies` and `eval/length/*` (pairs held out); in a comparison a reward",
    alarms="at most 0.5% where nothing is learned; in a comparison at most 5% where nobody is better",
    advice="Hold out pairs of equal length, balance the lengths in training, or take length out by the loss (r_dpo, simpo, ld_dpo); report win rates at "
    "equal length.",
    of_run=_of_run,
    of_comparison=_of_comparison,
)
