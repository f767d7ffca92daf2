"""Trust flags about length: completions that become longer, and accuracy or win rates that length alone explains."""

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
    difference,
    finding,
    format_interval,
    format_number,
    format_share,
    make_evidence,
    percent,
)
from penchant.metrics.stats import Interval, bootstrap_ci, length_controlled_win_rate, wilson
from penchant.runfolder.values import ci_of, mapping, num

# ---- Completions that become longer, and data that teach length ----

FEWER_ENDED = 0.2  # how far the share of completions that end with EOS may fall
LONGER_CHOSEN = 0.6  # data teach length if the chosen answer is the longer one more often than this
Z99 = 2.5758293035489004
LENGTH_ADVICE = (
    "Watch eval/completions/length, and compare at equal length. Balance the lengths of the pairs, or use a loss that takes length out "
    "(r_dpo, simpo, ld_dpo)."
)


def _growth_of_run(run: RunView) -> Finding | None:
    bias, growth = _bias_of_data(run.audit), _growth(run)
    if bias is None or growth is None:
        return growth or bias
    return Finding(f"{growth.sentence} {bias.sentence}", (*growth.evidence, *bias.evidence))


def _growth(run: RunView) -> Finding | None:
    lengths, ended = run.first_and_last("completions/length"), run.first_and_last("completions/ended")
    if lengths is None:
        return None
    first, last, series = lengths
    longer = difference(last, first, run.trust.length_ratio).bounds()[0] > 0
    fewer_ended = ended is not None and difference(ended[0], ended[1]).bounds()[0] > FEWER_ENDED
    if not longer and not fewer_ended:
        return None
    sentence = (
        f"Completions went from {format_number(first.value)} tokens at step {first.step:,} to {format_number(last.value)} at step {last.step:,}"
        f"{format_interval(last)}"
    )
    evidence = [make_evidence("tokens of a completion", series)]
    if ended is not None:
        sentence += f", and {percent(ended[1].value)} of them end by themselves, {percent(ended[0].value)} before"
        evidence.append(make_evidence("share of completions that end by themselves", ended[2]))
    return Finding(f"{sentence}.", tuple(evidence))


def _bias_of_data(audit: Mapping[str, Any]) -> Finding | None:
    """A note if the chosen answer of the data is the longer one more often than `LONGER_CHOSEN`."""
    entry = (audit.get("findings") or {}).get("length_bias") or {}
    count, total = entry.get("count"), entry.get("of")
    if not isinstance(count, int) or not isinstance(total, int) or total <= 0:
        return None
    share = wilson(count, total, Z99)
    if share.low <= LONGER_CHOSEN:
        return None
    sentence = f"In the data the chosen answer is the longer one in {percent(share.estimate)} of {counted(total, 'pair')} of unequal length."
    return finding(
        sentence, "share of pairs whose chosen answer is longer", share.estimate, level="note", advice=LENGTH_ADVICE
    )


def _growth_of_comparison(view: ComparisonView) -> Iterator[Finding]:
    base = view.point(view.models.get(view.first, {}), "tokens")
    for name, figures in view.others.items():
        tokens = view.point(figures, "tokens")
        if base is None or tokens is None or difference(tokens, base, view.trust.length_ratio).bounds()[0] <= 0:
            continue
        sentence = f"{name} writes {format_number(tokens.value)} tokens per completion, {view.first} {format_number(base.value)}."
        label, advice = "tokens per completion, first model and this one", "Look at the win rate at equal length."
        yield finding(sentence, label, base.value, tokens.value, about=name, advice=advice)


# ---- Accuracy and win rates explained by length alone ----

APART = 0.05  # smallest reported difference between the win rate and that at equal length


def _explained_in_run(run: RunView) -> Finding | None:
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


def _explained_in_comparison(view: ComparisonView) -> Iterator[Finding]:
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


OF_RUN = {"length_growth": _growth_of_run, "accuracy_by_length": _explained_in_run}
OF_COMPARISON = {"length_growth": _growth_of_comparison, "accuracy_by_length": _explained_in_comparison}
LIMITS = {"FEWER_ENDED": FEWER_ENDED, "LONGER_CHOSEN": LONGER_CHOSEN, "APART": APART}
