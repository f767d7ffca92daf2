"""Trust flags about training: margins that rise without wins, overfitting, skipped steps, figures that are not finite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penchant.flags.rule import (
    SMALLEST_WINDOW,
    Finding,
    Point,
    RunView,
    difference,
    first_step_above,
    format_number,
    format_share,
    make_evidence,
    percent,
    window,
)
from penchant.runfolder.values import is_online

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


# ---- Skipped steps, and figures that are not finite ----


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


OF_RUN = {
    "margin_without_wins": _margin_without_wins,
    "overfitting": _overfitting,
    "not_finite": _not_finite,
    "skipped_steps": _skipped,
}
