"""Trust flags about judges: position preference, failures, disagreement with the reward."""

from __future__ import annotations

from collections.abc import Iterator

from penchant.flags.rule import (
    ComparisonView,
    Finding,
    finding,
    format_number,
    format_share,
    percent,
)


def _position_bias(view: ComparisonView) -> Iterator[Finding]:
    point, limit = view.point(view.judge, "first_position"), view.trust.first_position
    if point is None or point.se is None:
        return
    low, high = point.bounds()
    if low > 0.5 + limit or high < 0.5 - limit:
        preferred, replies = "first" if point.value > 0.5 else "second", int(view.judge.get("asked") or 0)
        sentence = f"The judge names the {preferred} answer more often, whatever it is: the first one in {format_share(point)} of {replies:,} replies."
        yield finding(sentence, "share of replies for the first answer", point.value, low, high)


def _judge_failures(view: ComparisonView) -> Iterator[Finding]:
    failed, replies = (int(view.judge.get(key) or 0) for key in ("failures", "asked"))
    if replies and failed / replies > view.trust.judge_failures:
        sentence = f"{failed:,} of {replies:,} replies of the judge ({percent(failed / replies)}) could not be read; they are left out."
        yield finding(sentence, "share of replies that could not be read", failed / replies)


def _judges_disagree(view: ComparisonView) -> Iterator[Finding]:
    for name, figures in view.others.items():
        low, high = figures.get("reward_change/ci") or (0.0, 0.0)
        for other, other_figures in (figures.get("also") or {}).items():
            other_low, other_high = other_figures.get("reward_change/ci") or (0.0, 0.0)
            if not (low > 0 > other_high or high < 0 < other_low):
                continue
            change, other_change = float(figures["reward_change"]), float(other_figures["reward_change"])
            sentence = f"By the reward {name} gained {format_number(change)} over {view.first}, by {other} {format_number(other_change)}: they contradict each other."
            yield finding(sentence, "change of reward, by both", change, other_change, about=name)


OF_COMPARISON = {
    "judge_first_position": _position_bias,
    "judge_failures": _judge_failures,
    "judges_disagree": _judges_disagree,
}
