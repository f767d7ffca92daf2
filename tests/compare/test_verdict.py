"""Verdicts: a winner only if test, seeds, win rate and reward agree, with a test for each way to be misled."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from penchant.compare.verdict import (
    Candidate,
    ComparisonGroup,
    compare_all,
    compare_two,
    comparisons_table,
    verdict,
)
from penchant.metrics.stats import (
    Interval,
    holm,
    interval_from_sources,
    p_value_from_sources,
    seeds_difference,
    t_quantile,
    t_two_sided,
)
from penchant.runfolder.values import FEW_ROWS

N = 60


def candidate(name: str, rewards: Any, lengths: Any = None, fixed: bool = False) -> Candidate:
    """A candidate from rewards of shape (seeds, prompts), one sample each."""
    made = np.asarray(rewards, dtype=np.float64)[..., None]
    size = np.full(made.shape, 5.0) if lengths is None else np.asarray(lengths, dtype=np.float64)[..., None]
    return Candidate(name, made.mean(2), made, size, fixed)


def noise(seed: int, n: int = N, scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).normal(size=n)


def said(*candidates: Candidate) -> str:
    return "\n".join(s.text for s in verdict(candidates, compare_all(candidates), "mean reward"))


def tones(*candidates: Candidate) -> list[str]:
    return [s.tone for s in verdict(candidates, compare_all(candidates), "mean reward")]


def test_win_rate_by_prompt_counts_all_pairs_and_halves_ties() -> None:
    def rate(mine: list[list[float]], theirs: list[list[float]]) -> Interval:
        a, b = (np.array([x]) for x in (mine, theirs))
        found = compare_two(Candidate("a", a.mean(2), a, a * 0 + 1), Candidate("b", b.mean(2), b, b * 0 + 1)).win_rate
        assert found is not None
        return found

    # prompt 1: (1,2) (1,3) lost, (3,2) won, (3,3) tied; prompt 2: (0,0) tied twice, (0,5) lost twice
    assert rate([[1, 3], [0, 0]], [[2, 3], [0, 5]]).estimate == pytest.approx((1.5 / 4 + 1.0 / 4) / 2)
    assert rate([[1], [3], [0], [0]], [[2], [3], [0], [5]]).estimate == pytest.approx((0 + 0.5 + 0.5 + 0) / 4)
    # with two prompts the interval spans both prompts' rates, however many samples there are
    many = rate([[1] * 12, [0] * 12], [[0] * 12, [1] * 12])
    assert (many.estimate, many.low, many.high) == (0.5, 0.0, 1.0)


def test_a_clear_winner_is_named_from_either_side() -> None:
    start = candidate("start", [noise(0)], fixed=True)
    up = candidate("up", [noise(0) + 0.8 + noise(1, scale=0.2)])
    assert "up is better than start: its mean reward is 0.79" in said(start, up)
    swapped = compare_all([up, start])[0]
    assert swapped.name == "start" and swapped.difference.estimate < 0
    text = said(up, start)
    assert "up is better than start: its mean reward is 0.79" in text and "win rate 100%" in text
    assert "its mean reward is 1.000 higher, its win rate" in said(start, candidate("even", [noise(0) + 1.0]))
    small = candidate("small", [noise(0) + 1e-5])
    assert "its mean reward is 1.00e-05 higher" in said(start, small)
    assert "1.00e-05" in comparisons_table(compare_all([start, small]), "mean reward")


def test_models_that_are_equal_have_no_winner() -> None:
    text = said(candidate("a", [noise(0)]), candidate("b", [noise(0)]))
    assert "Between b and a there is no clear winner: tied on 60 of 60 prompts" in text and "better" not in text


def test_a_reward_that_ties_every_completion_cannot_tell() -> None:
    values = np.zeros((1, 30, 1))
    sides = [Candidate(name, values.mean(2), values, np.ones((1, 30, 1))) for name in "ab"]
    pairs = compare_all(sides)
    (sentence, *_) = verdict(sides, pairs, "mean reward")
    assert "tied on 30 of 30 prompts" in sentence.text and sentence.tone == "open"
    assert "all tied" in comparisons_table(pairs, "mean reward") and "[0.000, 0.000]" not in comparisons_table(
        pairs, ""
    )


def test_few_prompts_name_none() -> None:
    few = FEW_ROWS - 1
    text = said(candidate("a", [noise(0, few)]), candidate("b", [noise(0, few) + 5]))
    assert text.startswith("No winner is named: 9 prompts are too few")
    ten = said(candidate("a", [noise(0, 10)]), candidate("b", [noise(0, 10) + 5]))
    assert "b is better than a" in ten


def test_a_p_value_that_is_small_by_itself_is_not_among_many() -> None:
    base = noise(0)
    lucky = base + noise(1) + 0.33
    alone = said(candidate("a", [base]), candidate("lucky", [lucky]))
    assert "lucky is better than a" in alone
    others = [candidate(f"m{i}", [base + noise(10 + i)]) for i in range(4)]
    pairs = compare_all([candidate("a", [base]), candidate("lucky", [lucky]), *others])
    assert len(pairs) == 5 + 10
    assert [p.corrected for p in pairs] == holm([p.p for p in pairs])
    crowd = verdict([candidate("a", [base]), candidate("lucky", [lucky]), *others], pairs, "mean reward")
    first = crowd[0].text
    assert "no clear winner" in first and "by itself is not small enough among so many comparisons" in first
    assert "corrected for 15 comparisons" in first and crowd[0].tone == "open"
    assert "p corrected for 15 comparisons" in comparisons_table(pairs, "mean reward").splitlines()[0]


def test_wins_and_reward_that_contradict_name_none() -> None:
    # one prompt in three is much better, the others slightly worse: the mean rises, but most prompts are lost
    change = np.where(np.arange(90) % 3 == 0, 3.0, -0.2) + noise(2, 90, 0.01)
    text = said(candidate("a", [noise(0, 90)]), candidate("b", [noise(0, 90) + change]))
    assert "no clear winner" in text and "no more wins than losses" in text and "better" not in text.splitlines()[0]


def test_a_win_by_length_alone_is_said() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, size=(1, 200)).astype(float)
    theirs = rng.integers(5, 20, size=(1, 200)).astype(float)
    text = said(candidate("short", theirs / 10, theirs), candidate("long", lengths / 10, lengths))
    assert "long is better than short" in text and "length may be why it wins" in text
    gain = noise(0, 200)
    fair = said(candidate("a", [gain], lengths), candidate("b", [gain + 1 + noise(1, 200, 0.1)], lengths))
    assert "length may be why" not in fair


def test_worse_at_equal_length_is_a_contradiction() -> None:
    rng = np.random.default_rng(1)
    longer = rng.random(400) < 0.7
    gap = np.where(longer, 40.0, 1.0)
    wins = np.where(longer, rng.random(400) < 0.95, rng.random(400) < 0.05)
    reward = np.where(wins, 1.0, -1.0)
    theirs = rng.integers(5, 10, 400).astype(float)
    text = said(candidate("a", [np.zeros(400)], [theirs]), candidate("b", [reward], [theirs + gap]))
    assert "no clear winner" in text and "at equal length its win rate is" in text


@pytest.mark.slow
def test_seeds_that_differ_more_than_the_settings_name_none() -> None:
    base = noise(0, 200)
    a = candidate("a", [base + noise(i, 200, 0.1) + s for i, s in enumerate((0.0, 1.0, -1.0))])
    b = candidate("b", [base + noise(9 + i, 200, 0.1) + s for i, s in enumerate((0.5, 1.4, -0.6))])
    (pair,) = compare_all([a, b])
    assert pair.p_prompts < 0.001 and pair.p_seeds is not None and pair.p_seeds > 0.3
    assert pair.difference == seeds_difference(a.outcome, b.outcome)
    text = said(a, b)
    assert "no clear winner" in text and "seeds differ too much from each other" in text and "one seed" not in text
    close = candidate("b", [base + noise(9 + i, 200, 0.1) + 2 + s for i, s in enumerate((0.02, 0.0, -0.02))])
    near = candidate("a", [base + noise(i, 200, 0.1) + s for i, s in enumerate((0.0, 0.03, -0.02))])
    assert "b is better than a" in said(near, close)


def test_one_seed_is_said_and_the_start_has_none() -> None:
    start = candidate("start", [noise(0)], fixed=True)
    text = said(start, candidate("x", [noise(0) + 1 + noise(1, scale=0.1)])).splitlines()
    assert text[-1].startswith("x has one seed: another seed of the same setting could change this")
    two = said(start, candidate("x", [noise(0) + 1, noise(0) + 1.1 + noise(3, scale=0.1)]))
    assert "one seed" not in two and "x is better than start" in two
    both = said(candidate("a", [noise(0)]), candidate("b", [noise(1)])).splitlines()[-1]
    assert both.startswith("a and b have one seed each")


def test_without_rewards_there_is_no_win_rate() -> None:
    right = (noise(0) > 0).astype(float)[None]
    a, b = (Candidate(n, v, None, np.ones((1, N, 1)), n == "a") for n, v in (("a", right * 0 + 0.5), ("b", right)))
    (pair,) = compare_all([a, b])
    assert pair.win_rate is None and pair.equal_length is None
    assert "win rate" not in comparisons_table([pair], "held-out preference accuracy")
    assert "win rate" not in verdict([a, b], [pair], "held-out preference accuracy")[0].text


def test_the_tone_says_whether_a_winner_is_named_whatever_the_names_are() -> None:
    # a name must not affect a sentence's formatting
    start = candidate("no clear winner", [noise(0)], fixed=True)
    up = [noise(0) + 1 + noise(i, scale=0.1) for i in (1, 2)]
    assert tones(start, candidate("x", up)) == tones(candidate("x", up), start) == ["good"]
    assert tones(candidate("a", [noise(0)]), candidate("b is better than a, or wins", [noise(0)])) == ["open", "plain"]
    assert tones(candidate("a", [noise(0, 9)]), candidate("b", [noise(0, 9) + 5])) == ["open"]


def test_sentences_of_another_reward_say_so_and_have_their_own_tone() -> None:
    start = candidate("start", [noise(0)], fixed=True)
    pairs = compare_all([start, candidate("x", [noise(0)] * 2)])
    better = compare_all([start, candidate("x", [noise(0) + 1 + noise(i, scale=0.1) for i in (1, 2)])])
    families = [
        ComparisonGroup("words", better, "mean reward", 1),
        ComparisonGroup("judge", better, "win rate", 1, doubt="it failed"),
    ]
    found = verdict([start, candidate("x", [noise(0)] * 2)], pairs, "mean reward", families)
    assert [(s.tone, s.by) for s in found] == [("open", ""), ("good", "words"), ("open", "judge")]
    assert all(s.text.startswith(f"By {s.by}: ") for s in found if s.by)


# ---- the arithmetic of seeds ----------------------------------------------------------------------------------------


def test_t_two_sided_is_the_inverse_of_its_quantile() -> None:
    assert t_two_sided(0.0, 3.0) == pytest.approx(1.0)
    assert t_two_sided(1.0, 1.0) == pytest.approx(0.5)  # Cauchy
    assert t_two_sided(2.0, 2.0) == pytest.approx(1 - 2 / np.sqrt(6), abs=1e-10)
    assert t_two_sided(-12.7062047362, 1.0) == pytest.approx(0.05, abs=1e-9)
    for freedom in (1.5, 30.0, 400.0):
        assert t_two_sided(t_quantile(0.975, freedom), freedom) == pytest.approx(0.05, abs=1e-8)


def test_the_p_value_of_seeds_says_what_their_interval_says() -> None:
    sources = [np.array([0.1, 0.5, 0.2]), noise(0, 40, 0.3)]
    for level in (0.5, 0.9, 0.99):
        width = interval_from_sources(0.0, sources, level=level).high
        assert p_value_from_sources(width, sources) == pytest.approx(1 - level, abs=1e-8)
    assert p_value_from_sources(0.0, [np.ones(2)]) == 1.0 and p_value_from_sources(0.3, [np.full(3, 0.1)]) == 0.0


def test_the_win_rate_over_seeds_knows_that_seeds_differ() -> None:
    base = noise(0, 100)
    a = candidate("a", [base - 3, base + 3])  # one seed loses every prompt, the other wins every one
    b = candidate("b", [base, base])
    (pair,) = compare_all([b, a])
    assert pair.win_rate is not None and pair.win_rate.estimate == 0.5
    assert (pair.win_rate.low, pair.win_rate.high) == (0.0, 1.0)


def test_a_loser_is_seen_from_the_winners_side() -> None:
    """Swapping the candidates flips the difference's sign and mirrors the win rate at one half."""
    one, other = (
        candidate("a", [noise(0)], fixed=True),
        candidate("b", [noise(0) + 0.8 + noise(1, scale=0.2)], fixed=True),
    )
    texts = [said(one, other), said(other, one)]
    found = [re.findall(r"([\d.]+)(%?) \[([\d.]+)%?, ([\d.]+)%?\]", text) for text in texts]
    assert found[0] == found[1] and len(found[0]) >= 2
    for estimate, _, low, high in found[0]:
        assert float(low) <= float(estimate) <= float(high)
