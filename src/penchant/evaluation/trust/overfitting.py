"""Training goes on getting better, held-out rows get worse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penchant.evaluation.trust.figures import SMALLEST_WINDOW, Point, RunView, change, evidence, since, window
from penchant.evaluation.trust.rule import Rule, Seen
from penchant.evaluation.trust.words import number, percent, share_interval

DIVERGES = (
    "Training itself gets worse: lower train.lr, lengthen the warm-up, or look at the rows of the steps where it turns."
)


@dataclass(frozen=True, slots=True)
class _Watched:
    """A figure that stands in training and evaluation lines; `sign` makes lower better."""

    name: str
    label: str
    sign: float


LOSS = _Watched("loss", "loss", 1.0)
ACCURACY = _Watched("rewards/accuracies", "accuracy", -1.0)
REWARD = _Watched("reward", "reward of fresh completions", -1.0)


def _watched(run: RunView) -> list[_Watched]:
    algorithm = run.config.get("algorithm")
    if isinstance(algorithm, Mapping) and algorithm.get("name") != "reward_model":
        return [REWARD]
    # a loss whose settings follow the steps is another loss at every evaluation
    return [ACCURACY] if _scheduled(run.section("loss")) else [LOSS, ACCURACY]


def _scheduled(loss: Any) -> bool:
    if isinstance(loss, Mapping):
        return (
            loss.get("schedule", "fixed") != "fixed"
            or any(map(_scheduled, loss.values()))
            or {"start", "end"} <= set(loss)
        )
    return isinstance(loss, list) and any(map(_scheduled, loss))


def _of_run(run: RunView) -> Seen | None:
    return next((seen for w in _watched(run) if (seen := _turned(run, w)) is not None), None) or _gap(run)


def _gap(run: RunView) -> Seen | None:
    """Rows that were trained on are got right, held-out ones are not."""
    held, lines = run.held_out(ACCURACY.name), run.training(ACCURACY.name)
    train = window(lines)
    if not held or train is None or held[-1].se is None or held[-1].step < train.step:
        return None
    limit = run.trust.accuracy_gap
    if change(train, held[-1]).bounds()[0] <= limit:
        return None
    gaps = [Point(p.step, near - p.value) for p in held if (near := _near(lines, p.step)) is not None]
    sentence = (
        f"At step {train.step:,} {percent(train.value)} of training's pairs are got right, of held-out ones {share_interval(held[-1])}; the gap is above "
        f"{percent(limit)} since step {since(gaps, limit):,}."
    )
    return Seen(sentence, (evidence("training minus held-out accuracy", gaps), evidence("held-out accuracy", held)))


def _turned(run: RunView, watched: _Watched) -> Seen | None:
    held = [Point(p.step, watched.sign * p.value, p.se, p.n) for p in run.held_out(watched.name)]
    if len(held) < 3 or held[-1].se is None:
        return None
    best = min(held, key=lambda p: p.value)
    last = held[-1]
    if best.step == last.step or change(last, best).bounds(tests=len(held) - 1)[0] <= 0:
        return None
    train = run.training(watched.name)
    early, late = _near(train, best.step), _near(train, last.step)
    shown = (
        evidence(f"held-out {watched.label}", [Point(p.step, watched.sign * p.value) for p in held]),
        evidence(f"training {watched.label}", train),
    )
    values = f"from {number(watched.sign * best.value)} at step {best.step:,} to {number(watched.sign * last.value)} at step {last.step:,}"
    if early is None or late is None or watched.sign * (late - early) < 0:
        trained = (
            f", while training's went on from {number(early)} to {number(late)}"
            if early is not None and late is not None
            else ""
        )
        return Seen(
            f"Overfitting starts at step {best.step:,}: held-out {watched.label} got worse {values}{trained}.", shown
        )
    return Seen(
        f"Held-out {watched.label} got worse {values}, and so did training's, from {number(early)} to {number(late)}: training diverges.",
        shown,
        advice=DIVERGES,
    )


def _near(train: list[Point], step: int) -> float | None:
    """Mean of the five training lines up to a step, or of the first five."""
    upto = [p.value for p in train if p.step <= step][-SMALLEST_WINDOW:]
    values = upto if len(upto) == SMALLEST_WINDOW else [p.value for p in train[:SMALLEST_WINDOW]]
    return sum(values) / len(values) if values else None


RULE = Rule(
    name="overfitting",
    title="overfitting",
    what="n = the step of the best held-out loss; `loss_last - loss_n` is above 0 with its whole 99% interval, Bonferroni over all evaluations (since n was "
    "searched for). Both intervals are treated as independent, which on the same rows is too wide. Overfitting where training's loss went on falling, else "
    "divergence. Accuracy is watched likewise; alone where the loss has a schedule; an online method's held-out reward. Also where accuracy over the last quarter "
    "of training lines is above held-out accuracy by more than `accuracy_gap` with the whole 99% interval.",
    needs="three evaluations with `eval/loss/ci` (or `eval/rewards/accuracies/ci`, `eval/reward/ci`); for the gap one evaluation, after training",
    alarms="at most 0.5% where held-out loss does not rise; 1% with accuracy; 0.5% where the gap is `accuracy_gap`",
    advice="Take the best checkpoint (checkpoint.keep_best), train for fewer epochs, lower train.lr, or get more data.",
    thresholds=("accuracy_gap",),
    of_run=_of_run,
)
