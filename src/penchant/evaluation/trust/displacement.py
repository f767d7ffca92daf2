"""Likelihood displacement: the answers that were chosen become less likely too."""

from __future__ import annotations

import math
from dataclasses import dataclass

from penchant.evaluation.trust.figures import Point, RunView, change, evidence, since, smooth, window
from penchant.evaluation.trust.rule import Rule, Seen
from penchant.evaluation.trust.words import interval, number

LARGE = 0.1  # nats per token: each token of a chosen answer about 10% less likely


@dataclass(frozen=True, slots=True)
class _Change:
    """How log-probs changed, nats per completion: now, and over the run; `since` what."""

    chosen: Point
    rejected: Point | None
    series: list[Point]
    since: str


def _against_reference(run: RunView) -> _Change | None:
    held = run.held_out("logratios/chosen")
    if held and held[-1].step > 0:
        others = run.held_out("logratios/rejected")
        return _Change(held[-1], others[-1] if others else None, held, "under the reference")
    lines = run.training("logratios/chosen")
    now = window(lines)
    if now is None:
        return None
    return _Change(now, window(run.training("logratios/rejected")), smooth(lines), "under the reference")


def _against_start(run: RunView) -> _Change | None:
    """For losses without a reference: the same held-out rows before and after, or training rows early and late."""
    held, others = run.held_out("logps/chosen"), run.held_out("logps/rejected")
    if len(held) > 1:
        series = [Point(p.step, p.value - held[0].value) for p in held]
        rejected = Point(others[-1].step, others[-1].value - others[0].value) if len(others) > 1 else None
        return _Change(series[-1], rejected, series, f"at step {held[0].step:,}")
    lines, rest = run.training("logps/chosen"), run.training("logps/rejected")
    first, last = window(lines, last=False), window(lines)
    if first is None or last is None:
        return None
    r_first, r_last = window(rest, last=False), window(rest)
    rejected = None if r_first is None or r_last is None else change(r_last, r_first)
    series = smooth([Point(p.step, p.value - first.value) for p in lines])
    return _Change(change(last, first), rejected, series, "in the first training lines")


def _per_token(run: RunView, chosen: Point) -> float | None:
    ratio = run.held_out("perplexity_ratio/chosen")
    if ratio and ratio[-1].step == chosen.step:
        return -math.log(ratio[-1].value)
    return None if run.chosen_tokens is None else chosen.value / run.chosen_tokens


def _of_run(run: RunView) -> Seen | None:
    found = _against_reference(run) or _against_start(run)
    limit = run.trust.chosen_fall
    if found is None or not found.chosen.bounds()[1] < -limit:
        return None
    chosen, rejected = found.chosen, found.rejected
    per_token = _per_token(run, chosen)
    start = since([Point(p.step, -p.value) for p in found.series], limit)
    sentence = (
        f"From step {start:,} on chosen answers are less likely than {found.since}: by {number(-chosen.value)} nats per completion at step "
        f"{chosen.step:,}{interval(Point(0, -chosen.value, chosen.se, chosen.n))}"
        + (f", {number(-per_token)} per token" if per_token is not None else "")
        + "."
    )
    spared = rejected is not None and rejected.value >= chosen.value
    shown = [evidence("change of the log-prob of chosen answers, nats per completion", found.series)]
    if rejected is not None:
        moved = f"fell by {number(-rejected.value)}" if rejected.value < 0 else f"rose by {number(rejected.value)}"
        ending = (
            ", no more than the chosen ones: what both lose goes to answers that nobody has seen." if spared else "."
        )
        sentence += f" Rejected answers {moved}{ending}"
        shown.append(evidence("the same of rejected answers, last", [rejected]))
    strong = spared or rejected is None or (per_token is not None and per_token < -LARGE)
    return Seen(sentence, tuple(shown), "warning" if strong else "note")


RULE = Rule(
    name="likelihood_displacement",
    title="chosen answers become less likely",
    what="the 99% interval of the change of `log pi(y_w)` against the reference (against the start for a loss without one) lies below minus "
    "`chosen_fall` nats per completion. A warning where the rejected answer does not fall more, or the fall is above "
    f"{LARGE:g} nats per token, else a note. Papers: arXiv 2410.08847, 2402.13228.",
    needs="`eval/logratios/chosen` (else `eval/logps/chosen`, else training lines: at least ten)",
    alarms="at most 0.5% where chosen answers fall by `chosen_fall` or less",
    advice="Read what the policy writes now (samples.jsonl) and look at its win rate: set evaluation.reward. A lower train.lr or fewer steps, a "
    "higher loss.beta, loss.nll_weight, or the losses dpo_shift and dpop keep chosen answers likely; pairs whose answers are nearly alike cause "
    "the most of it.",
    thresholds=("chosen_fall",),
    of_run=_of_run,
)
