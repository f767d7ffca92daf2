"""Trust rules over a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from penchant.metrics.flags.rule import (
    ComparisonView,
    Evidence,
    Point,
    Rule,
    RunView,
    Seen,
    number,
    percent,
    seen,
    share_interval,
    standard_error,
)
from penchant.metrics.stats import Interval, bootstrap_ci, length_controlled_win_rate

# ---- Accuracy and wins that length alone explains ----

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
        label = "win rate, raw and at equal length"
        found.append(seen(sentence, label, raw.estimate, equal.estimate, about=name))
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


BY_LENGTH = Rule(
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


# ---- Judges that cannot be relied on: by position, by failures, by each other ----


def _judge(view: ComparisonView) -> Mapping[str, Any]:
    found = view.figures.get("judge")
    return found if isinstance(found, Mapping) else {}


def _position(view: ComparisonView) -> Sequence[Seen]:
    judge = _judge(view)
    share, asked = judge.get("first_position"), int(judge.get("asked") or 0)
    if not isinstance(share, (int, float)):
        return []
    n = view.prompts or asked
    se = standard_error(float(share), judge.get("first_position/ci"), n)
    point = Point(0, float(share), se, n)
    low, high = point.bounds()
    limit = view.trust.first_position
    if se is None or (low <= 0.5 + limit and high >= 0.5 - limit):
        return []
    which = "first" if share > 0.5 else "second"
    sentence = f"The judge names the {which} answer more often, whatever it is: the first one in {share_interval(point)} of {asked:,} replies."
    return [seen(sentence, "share of replies for the first answer", share, low, high)]


POSITION = Rule(
    name="judge_first_position",
    title="the judge prefers a position",
    what="the 99% interval of the share of replies for the first answer lies outside of 50% plus or minus `first_position`.",
    needs="`judge.first_position` with its interval in comparison.json (a judge that was asked both ways round)",
    alarms="at most 1% where the judge's share is within the band",
    advice="Each pair is asked both ways round, so it favors nobody, but every contradicted reply is a tie that hides a difference. Use another judge or "
    "another instruction.",
    thresholds=("first_position",),
    of_comparison=_position,
)


def _failures(view: ComparisonView) -> Sequence[Seen]:
    judge = _judge(view)
    failed, asked = int(judge.get("failures") or 0), int(judge.get("asked") or 0)
    if not asked or failed / asked <= view.trust.judge_failures:
        return []
    sentence = f"{failed:,} of {asked:,} replies of the judge ({percent(failed / asked)}) could not be read; they are left out."
    return [seen(sentence, "share of replies that could not be read", failed / asked)]


FAILURES = Rule(
    name="judge_failures",
    title="the judge often fails",
    what="more than `judge_failures` of the replies could not be read.",
    needs="`judge.failures` and `judge.asked` in comparison.json",
    alarms="none: it is a count",
    advice="Read some of those replies: a judge that fails on one model's answers more than on the other's turns the win rate.",
    thresholds=("judge_failures",),
    of_comparison=_failures,
)


def _disagree(view: ComparisonView) -> Sequence[Seen]:
    found = []
    for name, figures in view.others.items():
        low, high = figures.get("reward_change/ci") or (0.0, 0.0)
        for other, by_it in (figures.get("also") or {}).items():
            their_low, their_high = by_it.get("reward_change/ci") or (0.0, 0.0)
            if not (low > 0 > their_high or high < 0 < their_low):
                continue
            change, theirs = float(figures["reward_change"]), float(by_it["reward_change"])
            sentence = f"By the reward {name} gained {number(change)} over {view.first}, by {other} {number(theirs)}: they say the opposite of each other."
            found.append(seen(sentence, "change of reward, by both", change, theirs, about=name))
    return found


DISAGREE = Rule(
    name="judges_disagree",
    title="two rewards say the opposite",
    what="the 95% intervals of the change of reward, by the reward and by another one, lie on different sides of 0.",
    needs="`also` in a comparison",
    alarms="at most 0.2% where both changes are 0 and rewards are independent",
    advice="If the first one was trained on, it is being exploited: believe the other one, and read completions.",
    of_comparison=_disagree,
)


# ---- Too few prompts or seeds to say much ----


def _prompts_of_run(run: RunView) -> Seen | None:
    if not run.evals:
        return None
    last = run.evals[-1]
    rows = int(last.get("eval/rows") or 0)
    wins = run.held_out("win_rate")
    few = []
    if 0 < rows < run.trust.prompts:
        few.append(("held-out rows", rows, "hold more rows out (data.validation_rows)"))
    elif wins and 0 < wins[-1].n < run.trust.prompts:
        few.append(("prompts whose completions are judged", wins[-1].n, "raise evaluation.kl_prompts"))
    if not few:
        return None
    what, count, how = few[0]
    sentence = (
        f"Held-out figures rest on {count:,} {what}: their intervals are wide, and only large effects can be seen."
    )
    return seen(sentence, what, count, level="note", advice=f"To see more, {how}.")


def _prompts_of_comparison(view: ComparisonView) -> Sequence[Seen]:
    if not 0 < view.prompts < view.trust.prompts:
        return []
    sentence = f"The comparison rests on {view.prompts:,} prompts: only large differences can be seen."
    return [seen(sentence, "prompts", view.prompts, level="note", advice="Compare on more prompts.")]


FEW_PROMPTS = Rule(
    name="few_prompts",
    title="few prompts",
    what="fewer than `prompts` held-out rows, judged prompts or prompts of a comparison. A note.",
    needs="an evaluation, or a comparison",
    alarms="none: it is a count",
    advice="Hold more rows out, or compare on more prompts.",
    thresholds=("prompts",),
    of_run=_prompts_of_run,
    of_comparison=_prompts_of_comparison,
)


def _one_seed(view: ComparisonView) -> Sequence[Seen]:
    if not view.models:
        return []
    seeds = view.figures.get("seeds")
    given: Mapping[str, object] = seeds if isinstance(seeds, Mapping) else {}
    counts = {name: len(runs) if isinstance(runs := given.get(name), (Mapping, list)) else 1 for name in view.others}
    one = [name for name, n in counts.items() if n < 2]
    if not one:
        return []
    sentence = f"{', '.join(one)}: trained with one seed, so nothing says what another seed would have given."
    return [seen(sentence, "seeds of each setting", *counts.values(), level="note")]


ONE_SEED = Rule(
    name="one_seed",
    title="one seed",
    what="a compared setting has one seed. A note.",
    needs="a comparison",
    alarms="none: it is a count",
    advice="Train again with train.seed=1 and 2, and compare all of them.",
    of_comparison=_one_seed,
)
