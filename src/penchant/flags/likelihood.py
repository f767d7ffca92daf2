"""Trust flags about likelihood: KL, perplexity, chosen answers that become less likely, a reference that is not the start."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from penchant.flags.rule import (
    ComparisonView,
    Finding,
    Point,
    RunView,
    difference,
    finding,
    first_step_above,
    format_interval,
    format_number,
    make_evidence,
    smooth,
    standard_error,
    window,
)
from penchant.runfolder.values import num

# ---- KL and perplexity outside their accepted ranges ----

HARDLY_MOVED_ADVICE = "The policy hardly moved: raise train.lr, train longer, or lower the pull towards the reference."


def _kl_of_run(run: RunView) -> Finding | None:
    latest = run.latest("kl/policy_ref")
    if latest is None:
        return None
    now, series = latest
    low, high = run.trust.kl
    evidence = (make_evidence("KL to the start, nats per completion", series),)
    text = f"The KL to the start is {format_number(now.value)} nats per completion at step {now.step:,}{format_interval(now)}"
    if now.bounds()[0] > high:
        return Finding(
            f"{text}, above trust.kl's {format_number(high)} since step {first_step_above(series, high):,}.",
            evidence,
        )
    if low > 0 and now.bounds()[1] < low:
        return Finding(f"{text}, below trust.kl's {format_number(low)}.", evidence, "note", advice=HARDLY_MOVED_ADVICE)
    return None


def _kl_of_comparison(view: ComparisonView) -> Iterator[Finding]:
    high = view.trust.kl[1]
    for name, figures in view.others.items():
        now = view.point(figures, "kl")
        if now is not None and now.bounds()[0] > high:
            sentence = f"{name} is {format_number(now.value)} nats per completion away from {view.first}{format_interval(now)}, above trust.kl's {format_number(high)}."
            yield finding(sentence, "KL to the first model, nats per completion", now.value, about=name)


REFERENCE = "the reference's"


def _log_points(points: Sequence[Point], run: RunView, name: str) -> list[Point]:
    """The logarithm of a ratio at every evaluation, with its standard error."""
    intervals = {int(m["step"]): m.get(f"eval/{name}/ci") for m in run.evals}
    log_points = []
    for p in points:
        if p.value > 0:
            ci, log = intervals.get(p.step), math.log(p.value)
            logs = [math.log(x) for x in ci] if ci and min(ci) > 0 else None
            log_points.append(Point(p.step, log, standard_error(log, logs, p.n), p.n))
    return log_points


def _perplexity_series(run: RunView) -> tuple[Point, list[Point], str] | None:
    """(last, all, baseline) of the log perplexity ratio."""
    ratios = run.held_out_points("perplexity_ratio/chosen")
    if ratios and ratios[-1].step > 0 and ratios[-1].value > 0:
        series = _log_points(ratios, run, "perplexity_ratio/chosen")
        return series[-1], series, REFERENCE
    for name in ("perplexity/chosen", "perplexity"):
        held_out = [p for p in run.held_out_points(name) if p.value > 0]
        if len(held_out) > 1:
            # no standard error: on the same rows, an unchanged model gives exactly the same value
            series = [Point(p.step, math.log(p.value / held_out[0].value)) for p in held_out]
            return series[-1], series, f"that of step {held_out[0].step:,}"
    training, tokens = run.training_points("logratios/chosen"), run.chosen_tokens
    now = window(training)
    if now is None or tokens is None or now.se is None:
        return None
    series = smooth([Point(p.step, -p.value / tokens) for p in training])
    return Point(now.step, -now.value / tokens, now.se / tokens, now.n), series, REFERENCE


def _perplexity_of_run(run: RunView) -> Finding | None:
    latest = _perplexity_series(run)
    if latest is None:
        return None
    now, series, baseline = latest
    limit = math.log(run.trust.perplexity_ratio)
    if now.bounds()[0] <= limit:
        return None
    ratio, threshold = math.exp(min(700.0, now.value)), run.trust.perplexity_ratio
    answers = "chosen answers" if baseline == REFERENCE else "held-out answers"
    sentence = (
        f"At step {now.step:,} the perplexity of {answers} is {format_number(ratio)} times {baseline}, above trust.perplexity_ratio's {format_number(threshold)} "
        f"since step {first_step_above(series, limit):,}."
    )
    return Finding(sentence, (make_evidence("logarithm of the perplexity ratio, nats per token", series),))


def _perplexity_of_comparison(view: ComparisonView) -> Iterator[Finding]:
    base = num(view.models.get(view.first), "perplexity")
    for name, figures in view.others.items():
        perplexity = num(figures, "perplexity")
        if base is not None and perplexity is not None and 0 < base * view.trust.perplexity_ratio < perplexity:
            sentence = f"Held-out chosen answers have a perplexity of {format_number(perplexity)} under {name}, {format_number(base)} under {view.first}: {format_number(perplexity / base)} times."
            yield finding(sentence, "perplexity, first model and this one", base, perplexity, about=name)


# ---- Likelihood displacement: chosen answers become less likely too ----

LARGE = 0.1  # nats per token: each token of a chosen answer about 10% less likely


@dataclass(frozen=True, slots=True)
class _LogpChange:
    """Change of log-probs in nats per completion: now, and over the run (`series`); `since`: the baseline in words."""

    chosen: Point
    rejected: Point | None
    series: list[Point]
    since: str


def _against_reference(run: RunView) -> _LogpChange | None:
    chosen, rejected = run.latest("logratios/chosen"), run.latest("logratios/rejected")
    if chosen is None:
        return None
    return _LogpChange(chosen[0], None if rejected is None else rejected[0], chosen[1], "under the reference")


def _against_start(run: RunView) -> _LogpChange | None:
    """For losses without a reference: held-out rows at the first and the last evaluation, or early and late training lines."""
    chosen_logps, rejected_logps = run.first_and_last("logps/chosen"), run.first_and_last("logps/rejected")
    if chosen_logps is None:
        return None
    first, last, points = chosen_logps
    rejected = None if rejected_logps is None else difference(rejected_logps[1], rejected_logps[0])
    series = [Point(p.step, p.value - first.value) for p in points]
    if len(run.held_out_points("logps/chosen")) > 1:  # on the same rows, so without noise
        return _LogpChange(series[-1], rejected, series, f"at step {first.step:,}")
    return _LogpChange(difference(last, first), rejected, smooth(series), "in the first training lines")


def _per_token(run: RunView, chosen: Point) -> float | None:
    ratio = run.held_out_points("perplexity_ratio/chosen")
    if ratio and ratio[-1].step == chosen.step:
        return -math.log(ratio[-1].value)
    return None if run.chosen_tokens is None else chosen.value / run.chosen_tokens


def _displacement(run: RunView) -> Finding | None:
    change = _against_reference(run) or _against_start(run)
    limit = run.trust.chosen_fall
    if change is None or not change.chosen.bounds()[1] < -limit:
        return None
    chosen, rejected = change.chosen, change.rejected
    per_token = _per_token(run, chosen)
    start = first_step_above([Point(p.step, -p.value) for p in change.series], limit)
    token_clause = "" if per_token is None else f", {format_number(-per_token)} per token"
    sentence = (
        f"From step {start:,} on chosen answers are less likely than {change.since}: by {format_number(-chosen.value)} nats per completion at step "
        f"{chosen.step:,}{format_interval(replace(chosen, value=-chosen.value))}{token_clause}."
    )
    rejected_fell_less = rejected is not None and rejected.value >= chosen.value
    evidence = [make_evidence("change of the log-prob of chosen answers, nats per completion", change.series)]
    if rejected is not None:
        movement = (
            f"fell by {format_number(-rejected.value)}"
            if rejected.value < 0
            else f"rose by {format_number(rejected.value)}"
        )
        ending = (
            ", no more than the chosen ones: the probability that both lose goes to answers outside the data."
            if rejected_fell_less
            else "."
        )
        sentence += f" Rejected answers {movement}{ending}"
        evidence.append(make_evidence("the same for rejected answers, last", [rejected]))
    strong = rejected_fell_less or rejected is None or (per_token is not None and per_token < -LARGE)
    return Finding(sentence, tuple(evidence), "warning" if strong else "note")


# ---- A reference that differs from the initial model ----

DRIFT = 0.5  # nats per completion: difference that bf16 rounding may cause in a mean over rows


def _reference_drift(run: RunView) -> Finding | None:
    if run.section("reference").get("path") or not run.step_lines:
        return None
    first = next((m for m in run.step_lines if m.get("step") in (0, 1)), None)
    if first is None or (first.get("kind") == "train" and first.get("step") != 1):
        return None
    prefix = "eval/" if first.get("kind") == "eval" else ""
    for side in ("chosen", "rejected"):
        value = num(first, f"{prefix}logratios/{side}")
        if value is not None and abs(value) > DRIFT:
            sentence = (
                f"Before the first step {side} answers already differ from the reference by {format_number(value)} nats per completion, though the reference "
                "should be the model that training starts from."
            )
            label = f"log-ratio of {side} answers before the first step, nats"
            return Finding(sentence, (make_evidence(label, [Point(int(first["step"]), value)]),))
    return None


OF_RUN = {
    "likelihood_displacement": _displacement,
    "kl_band": _kl_of_run,
    "perplexity_band": _perplexity_of_run,
    "reference_drift": _reference_drift,
}
OF_COMPARISON = {"kl_band": _kl_of_comparison, "perplexity_band": _perplexity_of_comparison}
LIMITS = {"LARGE": LARGE, "DRIFT": DRIFT}
