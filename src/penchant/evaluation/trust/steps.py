"""What training lines say of the run's mechanics: skipped steps, numbers that are none, a reference that is not the start."""

from __future__ import annotations

from collections import Counter

from penchant.evaluation.flags import Evidence
from penchant.evaluation.trust.figures import Point, RunView, evidence
from penchant.evaluation.trust.rule import Rule, Seen
from penchant.evaluation.trust.words import number, percent

DRIFT = 0.5  # nats per completion: what rounding in bf16 may leave in a mean over rows


def _skipped(run: RunView) -> Seen | None:
    skipped = [m for m in run.train if m.get("skipped")]
    if not run.train or len(skipped) / len(run.train) <= run.trust.skipped:
        return None
    (why, _), *_ = Counter(str(m["skipped"]) for m in skipped).most_common(1)
    share = len(skipped) / len(run.train)
    sentence = f"{len(skipped):,} of {len(run.train):,} optimiser steps ({percent(share)}) were not taken, most of them because: {why}."
    return Seen(sentence, (evidence("steps not taken", [Point(int(m["step"]), 1.0) for m in skipped]),))


SKIPPED = Rule(
    name="skipped_steps",
    title="steps were skipped",
    what="more than `skipped` of the training lines are of steps that were not taken.",
    needs="training lines",
    alarms="none: it is a count",
    advice="An online method learns nothing where all completions of a prompt have one reward: raise algorithm.samples or train.batch_size, choose a finer "
    "reward, or other prompts. Where PPO refuses steps (algorithm.ratio_limit), lower train.lr.",
    thresholds=("skipped",),
    of_run=_skipped,
)


def _not_finite(run: RunView) -> Seen | None:
    places = [(int(m["step"]), name) for m in run.whole for name, value in m.items() if value is None]
    if not places:
        return None
    step, name = places[0]
    names = sorted({n for _, n in places})
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    more = f", and {len(places) - 1:,} more figures after it ({shown})" if len(places) > 1 else ""
    counts = [Point(s, float(n)) for s, n in sorted(Counter(s for s, _ in places).items())]
    sentence = f"{name} was NaN or infinite at step {step:,}{more}."
    return Seen(sentence, (evidence("figures that are no numbers, by step", counts),))


NOT_FINITE = Rule(
    name="not_finite",
    title="a figure is NaN or infinite",
    what="a figure in metrics.jsonl is null, which stands for NaN or infinity.",
    needs="metrics.jsonl",
    alarms="none: it is a count",
    advice="Lower train.lr, set train.max_grad_norm, and look at the rows of that step.",
    of_run=_not_finite,
)


def _drift(run: RunView) -> Seen | None:
    if run.section("reference").get("path") or not run.whole:
        return None
    first = next((m for m in run.whole if m.get("step") in (0, 1)), None)
    if first is None or (first.get("kind") == "train" and first.get("step") != 1):
        return None
    prefix = "eval/" if first.get("kind") == "eval" else ""
    for side in ("chosen", "rejected"):
        value = first.get(f"{prefix}logratios/{side}")
        if isinstance(value, (int, float)) and abs(value) > DRIFT:
            sentence = (
                f"Before the first step {side} answers already differ from the reference by {number(value)} nats per completion, though the reference "
                "should be the model that training starts from."
            )
            return Seen(
                sentence,
                (
                    Evidence(
                        f"log-ratio of {side} answers before the first step, nats",
                        (float(value),),
                        (int(first["step"]),),
                    ),
                ),
            )
    return None


DRIFTED = Rule(
    name="reference_drift",
    title="the reference is not the start",
    what=f"without `reference.path`, the mean log-ratio of held-out (or the first step's) answers before training is further from 0 than {DRIFT:g} nats per "
    "completion.",
    needs="`eval/logratios/*` at step 0, or the first training line",
    alarms="none where reference and policy are one model; rounding in bf16 stays below it",
    advice="Delete the reference cache or set reference.kind=frozen, and check that model.path is what you think it is.",
    of_run=_drift,
)
