"""Trust rules about training: KL, perplexity, likelihood displacement, length, overfitting, skipped steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from penchant.base.text import counted
from penchant.flags.rule import (
    SMALLEST_WINDOW,
    ComparisonView,
    Finding,
    Point,
    RunView,
    difference,
    finding,
    first_step_above,
    format_interval,
    format_number,
    format_share,
    make_evidence,
    percent,
    smooth,
    standard_error,
    window,
)
from penchant.metrics.stats import wilson
from penchant.runfolder.values import is_online, num

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


# ---- Completions that become longer, and data that teach length ----

FEWER_ENDED = 0.2  # how far the share of completions that end with EOS may fall
LONGER_CHOSEN = 0.6  # data teach length if the chosen answer is the longer one more often than this
Z99 = 2.5758293035489004
LENGTH_ADVICE = (
    "Watch eval/completions/length, and compare at equal length. Balance the lengths of the pairs, or use a loss that takes length out "
    "(r_dpo, simpo, ld_dpo)."
)


def _length_of_run(run: RunView) -> Finding | None:
    bias, growth = _length_bias(run.audit), _length_growth(run)
    if bias is None or growth is None:
        return growth or bias
    return Finding(f"{growth.sentence} {bias.sentence}", (*growth.evidence, *bias.evidence))


def _length_growth(run: RunView) -> Finding | None:
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


def _length_bias(audit: Mapping[str, Any]) -> Finding | None:
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


def _length_of_comparison(view: ComparisonView) -> Iterator[Finding]:
    base = view.point(view.models.get(view.first, {}), "tokens")
    for name, figures in view.others.items():
        tokens = view.point(figures, "tokens")
        if base is None or tokens is None or difference(tokens, base, view.trust.length_ratio).bounds()[0] <= 0:
            continue
        sentence = f"{name} writes {format_number(tokens.value)} tokens per completion, {view.first} {format_number(base.value)}."
        label, advice = "tokens per completion, first model and this one", "Look at the win rate at equal length."
        yield finding(sentence, label, base.value, tokens.value, about=name, advice=advice)


# ---- Reward margin that rises without a gain in win rate ----

WIN_RATE_ADVICE = (
    "Raise evaluation.kl_prompts: a win rate over n prompts is known to about 1.3 / sqrt(n) on either side, so 16 prompts "
    "tell little and 400 tell 60% from 50%."
)


def _margin_without_wins(run: RunView) -> Finding | None:
    margins, wins = run.held_out_points("rewards/margins"), run.held_out_points("win_rate")
    if len(margins) < 2 or margins[-1].se is None or not wins or wins[-1].step == 0:
        return None
    if difference(margins[-1], margins[0]).bounds()[0] <= 0:
        return None
    last = wins[-1]
    low, high = last.bounds()
    evidence = (make_evidence("held-out reward margin", margins), make_evidence("win rate against the start", wins))
    rise = (
        f"Between steps {margins[0].step:,} and {margins[-1].step:,} the held-out reward margin rose from {format_number(margins[0].value)} to "
        f"{format_number(margins[-1].value)}"
    )
    if low <= 0.5 and high < run.trust.win_rate:
        return Finding(f"{rise}, but completions win against the start's in {format_share(last)} of prompts.", evidence)
    best = _best_before_fall(margins, wins)
    if best is not None:
        fall = f"from {percent(best.value)} at step {best.step:,} to {percent(last.value)} at step {last.step:,}"
        return Finding(f"{rise}, but the win rate against the start fell {fall}.", evidence)
    if low <= 0.5:
        sentence = f"{rise}. Whether completions win by it cannot be told: {format_share(last)} of {last.n} prompts."
        return Finding(sentence, evidence, "note", advice=WIN_RATE_ADVICE)
    return None


def _best_before_fall(margins: list[Point], wins: list[Point]) -> Point | None:
    """The best win rate, if the last one is significantly below it and the margin has risen since; else None."""
    best = max(wins, key=lambda p: p.value)
    margins_before = [m for m in margins if m.step <= best.step]
    if best.step == wins[-1].step or not margins_before or margins[-1].value <= margins_before[-1].value:
        return None
    return best if difference(best, wins[-1]).bounds(tests=len(wins) - 1)[0] > 0 else None


# ---- Overfitting: training keeps improving while held-out rows get worse ----

DIVERGENCE_ADVICE = (
    "Training itself gets worse: lower train.lr, lengthen the warm-up, or look at the rows of the steps where it turns."
)


@dataclass(frozen=True, slots=True)
class _WatchedMetric:
    """A figure in both training and evaluation lines; multiplied by `sign`, lower is better."""

    name: str
    label: str
    sign: float


LOSS = _WatchedMetric("loss", "loss", 1.0)
ACCURACY = _WatchedMetric("rewards/accuracies", "accuracy", -1.0)
REWARD = _WatchedMetric("reward", "reward of fresh completions", -1.0)


def _watched_metrics(run: RunView) -> list[_WatchedMetric]:
    if is_online(run.config):
        return [REWARD]
    # with scheduled hyperparameters, losses of different evaluations are not comparable
    return [ACCURACY] if _scheduled(run.section("loss")) else [LOSS, ACCURACY]


def _scheduled(loss: Any) -> bool:
    if isinstance(loss, Mapping):
        return (
            loss.get("schedule", "fixed") != "fixed"
            or any(map(_scheduled, loss.values()))
            or {"start", "end"} <= set(loss)
        )
    return isinstance(loss, list) and any(map(_scheduled, loss))


def _overfitting(run: RunView) -> Finding | None:
    return next(
        (turn for w in _watched_metrics(run) if (turn := _turning_point(run, w)) is not None), None
    ) or _accuracy_gap(run)


def _accuracy_gap(run: RunView) -> Finding | None:
    """A finding if accuracy on training rows is far above that on held-out rows."""
    held_out, lines = run.held_out_points(ACCURACY.name), run.training_points(ACCURACY.name)
    train = window(lines)
    if not held_out or train is None or held_out[-1].se is None or held_out[-1].step < train.step:
        return None
    limit = run.trust.accuracy_gap
    if difference(train, held_out[-1]).bounds()[0] <= limit:
        return None
    gaps = [Point(p.step, mean - p.value) for p in held_out if (mean := _training_mean(lines, p.step)) is not None]
    sentence = (
        f"At step {train.step:,} {percent(train.value)} of training pairs are ranked correctly, against {format_share(held_out[-1])} of held-out pairs; the gap is above "
        f"{percent(limit)} since step {first_step_above(gaps, limit):,}."
    )
    return Finding(
        sentence,
        (make_evidence("training minus held-out accuracy", gaps), make_evidence("held-out accuracy", held_out)),
    )


def _turning_point(run: RunView, watched: _WatchedMetric) -> Finding | None:
    held_out = [Point(p.step, watched.sign * p.value, p.se, p.n) for p in run.held_out_points(watched.name)]
    if len(held_out) < 3 or held_out[-1].se is None:
        return None
    best = min(held_out, key=lambda p: p.value)
    last = held_out[-1]
    if best.step == last.step or difference(last, best).bounds(tests=len(held_out) - 1)[0] <= 0:
        return None
    train = run.training_points(watched.name)
    early, late = _training_mean(train, best.step), _training_mean(train, last.step)
    evidence = (
        make_evidence(f"held-out {watched.label}", [Point(p.step, watched.sign * p.value) for p in held_out]),
        make_evidence(f"training {watched.label}", train),
    )
    change = f"from {format_number(watched.sign * best.value)} at step {best.step:,} to {format_number(watched.sign * last.value)} at step {last.step:,}"
    if early is None or late is None:
        training_clause = ""
    elif watched.sign * (late - early) >= 0:
        sentence = f"Held-out {watched.label} got worse {change}, and so did training's, from {format_number(early)} to {format_number(late)}"
        return Finding(f"{sentence}: training diverges.", evidence, advice=DIVERGENCE_ADVICE)
    else:
        training_clause = f", while training's went on from {format_number(early)} to {format_number(late)}"
    return Finding(
        f"Overfitting starts at step {best.step:,}: held-out {watched.label} got worse {change}{training_clause}.",
        evidence,
    )


def _training_mean(train: list[Point], step: int) -> float | None:
    """Mean of the five training lines up to a step, or of the first five."""
    recent = [p.value for p in train if p.step <= step][-SMALLEST_WINDOW:]
    values = recent if len(recent) == SMALLEST_WINDOW else [p.value for p in train[:SMALLEST_WINDOW]]
    return sum(values) / len(values) if values else None


# ---- Mechanics of the run: skipped steps, figures that are not finite, a reference that differs from the initial model ----

DRIFT = 0.5  # nats per completion: difference that bf16 rounding may cause in a mean over rows


def _skipped(run: RunView) -> Finding | None:
    skipped = [m for m in run.train if m.get("skipped")]
    if not run.train or len(skipped) / len(run.train) <= run.trust.skipped:
        return None
    (reason, _), *_ = Counter(str(m["skipped"]) for m in skipped).most_common(1)
    share = len(skipped) / len(run.train)
    sentence = f"{len(skipped):,} of {len(run.train):,} optimizer steps ({percent(share)}) were not taken, most of them because: {reason}."
    return Finding(sentence, (make_evidence("steps not taken", [Point(int(m["step"]), 1.0) for m in skipped]),))


def _not_finite(run: RunView) -> Finding | None:
    places = [(int(m["step"]), name) for m in run.step_lines for name, value in m.items() if value is None]
    if not places:
        return None
    step, name = places[0]
    names = sorted({n for _, n in places})
    listing = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    more = f", and {len(places) - 1:,} more figures after it ({listing})" if len(places) > 1 else ""
    counts = [Point(s, float(n)) for s, n in sorted(Counter(s for s, _ in places).items())]
    sentence = f"{name} was NaN or infinite at step {step:,}{more}."
    return Finding(sentence, (make_evidence("figures that are not finite, by step", counts),))


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
    "margin_without_wins": _margin_without_wins,
    "likelihood_displacement": _displacement,
    "overfitting": _overfitting,
    "length_growth": _length_of_run,
    "kl_band": _kl_of_run,
    "perplexity_band": _perplexity_of_run,
    "not_finite": _not_finite,
    "skipped_steps": _skipped,
    "reference_drift": _reference_drift,
}
OF_COMPARISON = {
    "length_growth": _length_of_comparison,
    "kl_band": _kl_of_comparison,
    "perplexity_band": _perplexity_of_comparison,
}
LIMITS = {"LARGE": LARGE, "FEWER_ENDED": FEWER_ENDED, "LONGER_CHOSEN": LONGER_CHOSEN, "DRIFT": DRIFT}
