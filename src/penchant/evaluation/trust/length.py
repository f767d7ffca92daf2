"""Completions that become longer, and data that teach it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penchant.evaluation.flags import Evidence
from penchant.evaluation.stats import wilson
from penchant.evaluation.trust.figures import Point, RunView, change, evidence, standard_error, window
from penchant.evaluation.trust.rule import ComparisonView, Rule, Seen
from penchant.evaluation.trust.words import interval, number, percent

FEWER_ENDED = 0.2  # by so much the share of completions that end by themselves may fall
LONGER_CHOSEN = 0.6  # data in which the chosen answer is longer more often than this teach length
Z99 = 2.5758293035489004


def _of_run(run: RunView) -> Seen | None:
    bias = _bias(run.audit)
    grown = _grown(run)
    if grown is not None:
        sentence, shown = grown
        return Seen(sentence + (f" {bias[0]}" if bias else ""), (*shown, *([bias[1]] if bias else [])))
    if bias is None:
        return None
    return Seen(
        bias[0], (bias[1],), "note", advice="Watch eval/completions/length, and compare at equal length. "
        "Balance the lengths of the pairs, or use a loss that takes length out (r_dpo, simpo, ld_dpo)."
    )  # fmt: skip


def _grown(run: RunView) -> tuple[str, list[Evidence]] | None:
    lengths, ended = _ends(run, "completions/length"), _ends(run, "completions/ended")
    if lengths is None:
        return None
    first, last, series = lengths
    longer = change(last, first, run.trust.length_ratio).bounds()[0] > 0
    cut = ended is not None and change(ended[0], ended[1]).bounds()[0] > FEWER_ENDED
    if not longer and not cut:
        return None
    sentence = (
        f"Completions went from {number(first.value)} tokens at step {first.step:,} to {number(last.value)} at step {last.step:,}"
        f"{interval(last)}"
    )
    shown = [evidence("tokens of a completion", series)]
    if ended is not None:
        sentence += f", and {percent(ended[1].value)} of them end by themselves, {percent(ended[0].value)} before"
        shown.append(evidence("share of completions that end by themselves", ended[2]))
    return sentence + ".", shown


def _ends(run: RunView, name: str) -> tuple[Point, Point, list[Point]] | None:
    """(first, last, all) of a figure of completions: at evaluations, else over training lines."""
    held = run.held_out(name)
    if len(held) > 1:
        return held[0], held[-1], held
    lines = run.training(name)
    first, last = window(lines, last=False), window(lines)
    return None if first is None or last is None else (first, last, lines)


def _bias(audit: Mapping[str, Any]) -> tuple[str, Evidence] | None:
    """Where the chosen answer of the data is the longer one more often than by `LONGER_CHOSEN`."""
    found = (audit.get("findings") or {}).get("length_bias") or {}
    count, of = found.get("count"), found.get("of")
    if not isinstance(count, int) or not isinstance(of, int) or of <= 0:
        return None
    known = wilson(count, of, Z99)
    if known.low <= LONGER_CHOSEN:
        return None
    sentence = f"In the data the chosen answer is the longer one in {percent(known.estimate)} of {of:,} pairs of unequal length."
    return sentence, Evidence("share of pairs whose chosen answer is longer", (known.estimate,))


def _of_comparison(view: ComparisonView) -> Sequence[Seen]:
    base = _tokens(view.models.get(view.first, {}), view.prompts)
    found = []
    for name, figures in view.others.items():
        mine = _tokens(figures, view.prompts)
        if base is None or mine is None or change(mine, base, view.trust.length_ratio).bounds()[0] <= 0:
            continue
        sentence = f"{name} writes {number(mine.value)} tokens per completion, {view.first} {number(base.value)}."
        shown = (Evidence("tokens per completion, first model and this one", (base.value, mine.value)),)
        found.append(Seen(sentence, shown, about=name, advice="Look at the win rate at equal length."))
    return found


def _tokens(figures: Mapping[str, Any], prompts: int) -> Point | None:
    value = figures.get("tokens")
    if not isinstance(value, (int, float)):
        return None
    return Point(0, float(value), standard_error(float(value), figures.get("tokens/ci"), prompts), prompts)


RULE = Rule(
    name="length_growth",
    title="completions become longer",
    what="`tokens_now - length_ratio * tokens_at_first` has a 99% interval above 0, or the share of completions that end by themselves fell by more than "
    f"{percent(FEWER_ENDED)} beyond noise. A note where only the data give reason: the chosen answer is the longer one in more than {percent(LONGER_CHOSEN)} of "
    "pairs (99% Wilson interval).",
    needs="`eval/completions/length` at two evaluations (`evaluation.kl_prompts`), or training lines of an online method; `audit.json`",
    alarms="at most 0.5% for length and 0.5% for ends where neither passed its threshold",
    advice="Read the long completions, and compare with the start at equal length before believing a win rate or a reward. Balance the lengths of the "
    "pairs, use a loss that takes length out (r_dpo, simpo, ld_dpo), or price words in an online reward.",
    thresholds=("length_ratio",),
    of_run=_of_run,
    of_comparison=_of_comparison,
)
