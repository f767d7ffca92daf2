"""Trust rules about comparisons: length, judges, number of prompts and seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from penchant.base.text import counted
from penchant.flags.rule import (
    ComparisonView,
    Finding,
    RunView,
    finding,
    format_number,
    format_share,
    percent,
)
from penchant.metrics.stats import Interval, bootstrap_ci, length_controlled_win_rate
from penchant.runfolder.values import ci_of, mapping, num

# ---- Accuracy and win rates explained by length alone ----

APART = 0.05  # smallest reported difference between the win rate and that at equal length


def _length_of_run(run: RunView) -> Finding | None:
    names = ("rewards/accuracies", "length/controlled_accuracy", "length/agreement", "length/longer_wins")
    series = [run.held_out_points(name) for name in names]
    if not all(series) or len({s[-1].step for s in series}) > 1:
        return None
    accuracy, controlled, agreement, longer = (s[-1] for s in series)
    if accuracy.bounds()[0] <= 0.5:
        return None  # nothing was learned that length could explain
    label = "accuracy, at equal length, agreement with length, of the rule alone"
    values = [s[-1].value for s in series]
    bounds = agreement.bounds()
    start = f"At step {accuracy.step:,} the accuracy on held-out pairs is {format_share(accuracy)}"
    if controlled.bounds()[0] <= 0.5 and not bounds[0] <= 0.5 <= bounds[1]:
        side = "longer" if agreement.value > 0.5 else "shorter"
        share = percent(max(agreement.value, 1 - agreement.value))
        detail = f"{format_share(controlled)} at equal length: the {side} answer is preferred in {share} of pairs."
        return finding(f"{start}, but {detail}", label, *values)
    by_rule = max(longer.value, 1 - longer.value)
    if accuracy.value <= by_rule and replace(longer, value=by_rule).bounds()[0] > 0.5:
        side = "longer" if longer.value > 0.5 else "shorter"
        sentence = f"{start}; preferring the {side} answer gets {percent(by_rule)} right without reading it."
        return finding(sentence, label, *values, level="note")
    return None


def _length_of_comparison(view: ComparisonView) -> Iterator[Finding]:
    for name, figures in view.others.items():
        pair = _win_rates_from_figures(figures) or _win_rates_from_rows(view, name)
        if pair is None:
            continue
        raw, equal = pair
        wins, loses = raw.low > 0.5, raw.high < 0.5
        remains = equal.low > 0.5 if wins else equal.high < 0.5
        if not (wins or loses) or remains or abs(raw.estimate - equal.estimate) < APART:
            continue
        sentence = (
            f"The win rate of {name} against {view.first} is {_format_share(raw)}, but {_format_share(equal)} at equal length: length may be why it "
            f"{'wins' if wins else 'loses'}."
        )
        yield finding(sentence, "win rate, raw and at equal length", raw.estimate, equal.estimate, about=name)


def _format_share(i: Interval) -> str:
    return f"{percent(i.estimate)} (95% interval {percent(i.low)} to {percent(i.high)})"


def _win_rates_from_figures(figures: Mapping[str, Any]) -> tuple[Interval, Interval] | None:
    intervals = [
        Interval(value, *ci)
        for name in ("win_rate", "win_rate_equal_length")
        if (value := num(figures, name)) is not None and (ci := ci_of(figures, name)) is not None
    ]
    return (intervals[0], intervals[1]) if len(intervals) == 2 else None


def _win_rates_from_rows(view: ComparisonView, name: str) -> tuple[Interval, Interval] | None:
    """Win rate, raw and at equal length, of a model's completions over the first model's, by the rewards in the rows."""
    wins, lengths, other_lengths, prompts = [], [], [], []
    for row in view.rows:
        both = [mapping(row.get("completions")).get(model) for model in (name, view.first)]
        (reward, other), (length, other_length) = ([num(m, key) for m in both] for key in ("reward", "tokens"))
        if reward is None or other is None or length is None or other_length is None:
            continue
        wins.append(float(reward > other) + 0.5 * float(reward == other))
        lengths.append(length)
        other_lengths.append(other_length)
        prompts.append(str(row.get("prompt")))
    if len(set(prompts)) < 2:
        return None
    _, clusters = np.unique(np.array(prompts), return_inverse=True)
    return bootstrap_ci(wins, clusters=clusters, draws=2000), length_controlled_win_rate(
        wins, lengths, other_lengths, clusters=clusters, draws=500
    )


# ---- Unreliable judges: position preference, failures, disagreement with the reward ----


def _position_bias(view: ComparisonView) -> Iterator[Finding]:
    point, limit = view.point(view.judge, "first_position"), view.trust.first_position
    if point is None or point.se is None:
        return
    low, high = point.bounds()
    if low > 0.5 + limit or high < 0.5 - limit:
        preferred, replies = "first" if point.value > 0.5 else "second", int(view.judge.get("asked") or 0)
        sentence = f"The judge names the {preferred} answer more often, whatever it is: the first one in {format_share(point)} of {replies:,} replies."
        yield finding(sentence, "share of replies for the first answer", point.value, low, high)


def _judge_failures(view: ComparisonView) -> Iterator[Finding]:
    failed, replies = (int(view.judge.get(key) or 0) for key in ("failures", "asked"))
    if replies and failed / replies > view.trust.judge_failures:
        sentence = f"{failed:,} of {replies:,} replies of the judge ({percent(failed / replies)}) could not be read; they are left out."
        yield finding(sentence, "share of replies that could not be read", failed / replies)


def _judges_disagree(view: ComparisonView) -> Iterator[Finding]:
    for name, figures in view.others.items():
        low, high = figures.get("reward_change/ci") or (0.0, 0.0)
        for other, other_figures in (figures.get("also") or {}).items():
            other_low, other_high = other_figures.get("reward_change/ci") or (0.0, 0.0)
            if not (low > 0 > other_high or high < 0 < other_low):
                continue
            change, other_change = float(figures["reward_change"]), float(other_figures["reward_change"])
            sentence = f"By the reward {name} gained {format_number(change)} over {view.first}, by {other} {format_number(other_change)}: they contradict each other."
            yield finding(sentence, "change of reward, by both", change, other_change, about=name)


# ---- Too few prompts or seeds to say much ----


def _prompts_of_run(run: RunView) -> Finding | None:
    rows = int(run.evals[-1].get("eval/rows") or 0) if run.evals else 0
    wins = run.held_out_points("win_rate")
    if 0 < rows < run.trust.prompts:
        label, count, advice = "held-out rows", rows, "hold more rows out (data.validation_rows)"
    elif wins and 0 < wins[-1].n < run.trust.prompts:
        label, count, advice = "prompts whose completions are judged", wins[-1].n, "raise evaluation.kl_prompts"
    else:
        return None
    sentence = (
        f"Held-out figures rest on {count:,} {label}: their intervals are wide, and only large effects can be seen."
    )
    return finding(sentence, label, count, level="note", advice=f"To see more, {advice}.")


def _prompts_of_comparison(view: ComparisonView) -> Iterator[Finding]:
    if 0 < view.prompts < view.trust.prompts:
        sentence = f"The comparison rests on {counted(view.prompts, 'prompt')}: only large differences can be seen."
        yield finding(sentence, "prompts", view.prompts, level="note", advice="Compare on more prompts.")


def _tied(view: ComparisonView) -> Iterator[Finding]:
    for name, figures in view.others.items():
        ties = num(figures, "win_rate/ties")
        if ties is not None and ties >= view.trust.ties:
            sentence = f"{percent(ties)} of the pairs of completions of {name} and {view.first} have the same reward: it cannot tell them apart."
            yield finding(sentence, "share of ties", ties, about=name)


def _one_seed(view: ComparisonView) -> Iterator[Finding]:
    seeds = mapping(view.figures.get("seeds"))
    counts = {name: len(runs) if isinstance(runs := seeds.get(name), (dict, list)) else 1 for name in view.others}
    single = [name for name, n in counts.items() if n < 2]
    if single:
        sentence = f"{', '.join(single)}: trained with one seed, so it is unknown what another seed would give."
        yield finding(sentence, "seeds of each setting", *counts.values(), level="note")


OF_RUN = {"accuracy_by_length": _length_of_run, "few_prompts": _prompts_of_run}
OF_COMPARISON = {
    "accuracy_by_length": _length_of_comparison,
    "judge_first_position": _position_bias,
    "judge_failures": _judge_failures,
    "judges_disagree": _judges_disagree,
    "tied": _tied,
    "few_prompts": _prompts_of_comparison,
    "one_seed": _one_seed,
}
LIMITS = {"APART": APART}
