"""Judges that cannot be relied on: by position, by failures, by each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penchant.evaluation.flags import Evidence
from penchant.evaluation.trust.figures import Point, standard_error
from penchant.evaluation.trust.rule import ComparisonView, Rule, Seen
from penchant.evaluation.trust.words import number, percent, share_interval


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
    return [Seen(sentence, (Evidence("share of replies for the first answer", (float(share), low, high)),))]


POSITION = Rule(
    name="judge_first_position",
    title="the judge prefers a position",
    what="the 99% interval of the share of replies for the first answer lies outside of 50% plus or minus `first_position`.",
    needs="`judge.first_position` with its interval in comparison.json (a judge that was asked both ways round)",
    alarms="at most 1% where the judge's share is within the band",
    advice="Each pair is asked both ways round, so it favours nobody, but every contradicted reply is a tie that hides a difference. Use another judge or "
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
    return [Seen(sentence, (Evidence("share of replies that could not be read", (failed / asked,)),))]


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
            found.append(Seen(sentence, (Evidence("change of reward, by both", (change, theirs)),), about=name))
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
