"""Judged win rates: the statistics of rewards if the judge agrees with the reward, and clear notes if it does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from comparing import scorer, setting

from penchant.compare.judged import WIN_RATE
from penchant.compare.models import ComparisonResult, compare_models, table
from penchant.compare.verdict import Candidate, ComparisonGroup, Pair, compare_judged, compare_two, comparisons_table
from penchant.judges import Answers, Question
from penchant.metrics.stats import Interval, bootstrap_ci, holm

NAN = float("nan")


@dataclass
class By:
    """A judge defined by a function of a question."""

    decide: Callable[[Question], float]
    graded: bool = False
    name: str = "oracle"

    def check(self) -> None: ...

    def describe(self) -> dict[str, Any]:
        return {"kind": "test"}

    def ask(self, questions: Sequence[Question], progress: Any = None) -> Answers:
        values = np.array([self.decide(q) for q in questions])
        return Answers(
            values, np.full(len(values), self.graded), len(values), 0, ["hm"] if np.isnan(values).any() else []
        )


def evenness(text: str) -> float:
    return float(np.mean([int(t) % 2 == 0 for t in text.split()] or [0.0]))


def by_reward(q: Question) -> float:
    a, b = evenness(q.first), evenness(q.second)
    return 1.0 if a > b else 0.0 if b > a else 0.5


MADE = {"a": 0, "x1": 1, "x2": 2, "y1": 3}


def compared(pairwise: Any, names: Sequence[str] = ("a", "x1"), **changes: Any) -> ComparisonResult:
    options = {k: changes.pop(k) for k in ("seeds", "fixed") if k in changes}
    values = {"samples": 1, **changes}
    return compare_models(list(names), lambda n: scorer(MADE[n]), setting(pairwise=pairwise, **values), **options)


def test_a_judge_that_decides_as_the_reward_gives_the_rewards_win_rates() -> None:
    seeds = {"x": ["x1", "x2"], "y": ["y1"]}
    got = compared(By(by_reward), list(MADE), seeds=seeds, fixed=True)
    assert got.judgement is not None and len(got.pairs) == 3
    for mine, reward in zip(got.judgement.pairs, got.pairs, strict=True):
        assert (mine.name, mine.other) == (reward.name, reward.other)
        assert mine.win_rate == reward.win_rate and mine.equal_length == reward.equal_length
        assert mine.unjudged == 0.0 and (mine.p_seeds is None) == (reward.p_seeds is None)
        assert mine.difference.estimate == pytest.approx(mine.win_rate.estimate - 0.5)
    assert [p.corrected for p in got.judgement.pairs] == holm([p.p for p in got.judgement.pairs])
    for name in ("x", "y"):
        judged = got.models[name]["judged"]["oracle"]
        assert {k: got.models[name][k] for k in judged} == judged and set(judged) >= {"win_rate/ci"}
    assert got.judgement.first_position is not None and got.judgement.first_position.estimate == 0.5
    assert "win rate against a (ties half), by oracle" in table(got.models)
    said = [s.text for s in got.sentences if s.text.startswith("By oracle: ")]
    assert len(said) == 3 and "y has one seed" in got.sentences[-1].text


def test_the_test_is_of_the_mean_win_by_prompt_against_one_half() -> None:
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(2, 40))
    rewards[1] += 0.6
    a, b = (Candidate(n, r[None], r[None, :, None], np.ones((1, 40, 1))) for n, r in zip("ab", rewards, strict=True))
    wins = (rewards[1] > rewards[0]).astype(float)
    pair = compare_judged(b, a, wins[None, None, :, None])
    # as if each prompt's reward were 1 for the winner
    outcome = [Candidate(n, w[None], None, np.ones((1, 40, 1))) for n, w in (("b", wins), ("a", 1 - wins))]
    assert pair is not None and pair.p == compare_two(*outcome).p < 0.05
    assert pair.difference.estimate == wins.mean() - 0.5


def test_what_is_missing_is_left_out_and_counted() -> None:
    rng = np.random.default_rng(1)
    wins = rng.integers(0, 2, size=(1, 1, 30, 2)).astype(float)
    c = [Candidate(n, None, None, np.full((1, 30, 2), 5.0)) for n in "ab"]
    gaps = wins.copy()
    gaps[0, 0, :5] = NAN  # five prompts
    gaps[0, 0, 5, 0] = NAN  # one sample of another prompt
    pair, rest = compare_judged(c[0], c[1], gaps), wins[0, 0, 5:]
    assert pair is not None and pair.unjudged == pytest.approx(11 / 60) and pair.win_rate is not None
    assert pair.win_rate.estimate == pytest.approx(np.mean([rest[0, 1], *rest[1:].mean(1)]))
    assert compare_judged(c[0], c[1], wins * NAN) is None
    seeds = [Candidate(n, None, None, np.full((2, 30, 1), 5.0)) for n in "ab"]
    cross = rng.integers(0, 2, size=(2, 2, 30, 1)).astype(float)
    whole = compare_judged(*seeds, cross)
    cross[0] = NAN  # the first candidate's first seed is unknown, so nothing is said over seeds
    half = compare_judged(*seeds, cross)
    assert whole is not None and half is not None
    assert whole.p_seeds is not None and half.p_seeds is None and half.unjudged == 0.5
    json.dumps(half.to_json(), allow_nan=False)


def test_a_judge_alone_is_the_outcome() -> None:
    got = compared(By(by_reward), judge=None)
    assert got.outcome == WIN_RATE and got.pairs == [] and got.judgement is not None
    assert "reward" not in got.models["x1"] and "win_rate" in got.models["x1"]["judged"]["oracle"]
    assert [s.text.startswith("By oracle: Between x1 and a") for s in got.sentences] == [True, False]
    assert "mean reward" not in got.sentences[0].text and "win rate is" in got.sentences[0].text
    assert comparisons_table(got.judgement.pairs, WIN_RATE).split("\n")[0].split()[:3] == ["comparison", "win", "rate"]


def test_a_judge_that_sees_positions_only_decides_nothing() -> None:
    got = compared(By(lambda q: 1.0), names=("a", "x1", "y1"))
    judged = got.judgement
    assert judged is not None and judged.first_position is not None
    assert (judged.first_position.estimate, judged.first_position.high) == (1.0, 1.0) and judged.first_position.low < 1
    assert all(p.win_rate is not None and p.win_rate.estimate == 0.5 and p.p == 1.0 for p in judged.pairs)
    assert judged.disagreed == judged.judged > 0
    (said,) = judged.sentences()
    assert (
        "favors the first position: 100% [" in said
        and ", 100%] of its verdicts" in said
        and "those count as ties" in said
    )
    found = judged.to_json()
    assert found["first_position"] == 1.0 and found["first_position/ci"][1] == 1.0 > found["first_position/ci"][0]
    other = compared(By(lambda q: 0.2, graded=True)).judgement
    assert other is not None and "favors the second position: 20%" in other.sentences()[0]
    assert "count as ties" not in other.sentences()[0]
    slight = replace(judged, first_position=Interval(0.52, 0.51, 0.53))  # certain, but too small to matter
    assert "slightly favors the first position: 52%" in slight.sentences()[0]
    fair = compared(By(by_reward)).judgement
    assert fair is not None and "shows no clear preference for a position: 50%" in fair.sentences()[0]


def test_every_verdict_stands_beside_the_completions() -> None:
    got = compared(By(by_reward), samples=2)
    for row in got.rows:
        (verdict,) = row["judged"]
        texts = [row["completions"][n]["text"] for n in ("x1", "a")]
        assert (verdict["a"], verdict["b"]) == ("x1", "a")
        if texts[0] == texts[1]:
            assert verdict["win"] == 0.5 and verdict["first"] == [None, None]
        else:
            ab = by_reward(Question(row["prompt"], *texts))
            assert verdict["win"] == ab and verdict["first"] == [ab, 1 - ab]


def test_the_interval_of_the_position_draws_whole_prompts() -> None:
    judged = compared(By(lambda q: (int(q.prompt.split()[-1]) % 3) / 2, graded=True), samples=4)
    values = [np.mean(r["judged"][0]["first"]) for r in judged.rows if r["judged"][0]["first"][0] is not None]
    prompts = [r["prompt"] for r in judged.rows if r["judged"][0]["first"][0] is not None]
    assert judged.judgement is not None and judged.judgement.first_position is not None
    got, expected = judged.judgement.first_position, bootstrap_ci(values, clusters=prompts)
    assert got.estimate == pytest.approx(expected.estimate)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=0.02)
    alone = bootstrap_ci(values)
    assert got.high - got.low > 1.5 * (alone.high - alone.low)


def test_too_many_failures_name_no_winner() -> None:
    def without(prompts: int) -> By:
        return By(lambda q: NAN if int(q.prompt.split()[-1]) < 7 + prompts else by_reward(q))

    one = compared(without(1), judge=None).judgement  # a single prompt of twelve
    assert one is not None and not one.comparison_group.doubt and (one.both.failures, one.left_out) == (2, 1)
    assert "on 2 questions; for instance 'hm'. 1 of 12 pairs are left out." in one.sentences()[1]
    two = compared(without(2), judge=None)
    assert two.judgement is not None and (two.judgement.both.failures, two.judgement.left_out) == (4, 2)
    assert two.sentences[0].text == "By oracle: no winner is named: 2 of 12 pairs (17%) could not be judged."
    assert two.models["x1"]["judged"]["oracle"]["win_rate"] == pytest.approx(
        np.mean([r["judged"][0]["win"] for r in two.rows[2:]])
    )
    none = compared(By(lambda q: NAN), judge=None)
    assert none.judgement is not None and none.judgement.pairs == [] and none.models["x1"]["judged"] == {"oracle": {}}
    assert "12 of 12 pairs (100%) could not be judged" in none.sentences[0].text
    assert "first_position" not in none.judgement.to_json() and table(none.models)
    json.dumps([none.judgement.to_json(), none.rows], allow_nan=False)


def test_failures_of_one_comparison_leave_that_one_without_a_winner() -> None:
    win, level = Interval(0.8, 0.7, 0.9), Interval(0.75, 0.6, 0.85)
    clear = Pair("b", "a", Interval(0.3, 0.2, 0.4), 0.001, None, win, level, corrected=0.003, unjudged=0.05)
    (said,) = (s.text for s in ComparisonGroup("oracle", [clear], WIN_RATE, 3).sentences(200))
    assert (
        said
        == "By oracle: b is better than a: its win rate is 80% [70%, 90%], p = 0.0030 (corrected for 3 comparisons)."
    )
    (said,) = (s.text for s in ComparisonGroup("oracle", [replace(clear, unjudged=0.2)], WIN_RATE, 3).sentences(200))
    assert "there is no clear winner" in said and said.endswith("20% of their pairs could not be judged.")
    near = replace(clear, difference=Interval(0.1, -0.01, 0.2), corrected=0.2, p_prompts=0.2)
    (said,) = (s.text for s in ComparisonGroup("oracle", [near], WIN_RATE, 3).sentences(200))
    assert said.endswith("the interval of the win rate includes 50%.")
