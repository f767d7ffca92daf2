"""Length-controlled win rates: a planted length effect is removed, a real difference stays, intervals cover."""

from __future__ import annotations

import numpy as np
import pytest

from penchant.metrics.stats import length_controlled_win_rate


def _games(rng: np.random.Generator, n: int, skill: float, per_word: float, longer: float) -> tuple[np.ndarray, ...]:
    """Wins by skill (in log-odds) and length. The judged answers are `longer` words longer on average."""
    other = rng.normal(100, 20, n)
    own = other + rng.normal(longer, 25, n)
    scale = (own - other).std()
    odds = skill + per_word * np.tanh((own - other) / scale)
    return (rng.uniform(size=n) < 1 / (1 + np.exp(-odds))).astype(float), own, other


def test_a_planted_effect_of_length_is_removed() -> None:
    wins, own, other = _games(np.random.default_rng(0), 4000, skill=0.0, per_word=2.0, longer=30.0)
    assert wins.mean() > 0.7
    got = length_controlled_win_rate(wins, own, other, draws=200)
    assert got.estimate == pytest.approx(0.5, abs=0.04) and got.low < 0.5 < got.high


def test_a_real_effect_stays() -> None:
    wins, own, other = _games(np.random.default_rng(1), 4000, skill=1.0, per_word=0.0, longer=30.0)
    got = length_controlled_win_rate(wins, own, other, draws=200)
    assert got.estimate == pytest.approx(1 / (1 + np.exp(-1.0)), abs=0.04)
    assert got.estimate == pytest.approx(wins.mean(), abs=0.03)


def test_equal_lengths_leave_the_raw_rate() -> None:
    wins = np.array([1.0, 1.0, 1.0, 0.0, 0.5] * 40)
    got = length_controlled_win_rate(wins, np.full(200, 9.0), np.full(200, 9.0), draws=200)
    assert got.estimate == pytest.approx(0.7, abs=0.002)


def test_intervals_cover_at_their_rate() -> None:
    rng = np.random.default_rng(2)
    truth, hits = 1 / (1 + np.exp(-0.4)), 0
    for seed in range(100):
        games = _games(rng, 150, skill=0.4, per_word=1.0, longer=15.0)
        ci = length_controlled_win_rate(*games, draws=150, seed=seed)
        hits += ci.low <= truth <= ci.high
    assert 0.88 <= hits / 100 <= 0.99


def test_copies_of_a_prompt_bring_no_certainty() -> None:
    games = _games(np.random.default_rng(3), 80, skill=0.4, per_word=1.0, longer=15.0)
    one = length_controlled_win_rate(*games, draws=400)
    copied = length_controlled_win_rate(
        *(np.repeat(g, 5) for g in games), clusters=np.repeat(np.arange(80), 5), draws=400
    )
    assert copied.high - copied.low == pytest.approx(one.high - one.low, rel=0.2)


def test_a_side_that_always_wins_is_finite() -> None:
    got = length_controlled_win_rate(np.ones(30), np.arange(30.0), np.zeros(30), draws=100)
    assert 0.8 < got.low <= got.estimate < 1.0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="within 0 and 1"):
        length_controlled_win_rate([2.0], [1.0], [1.0])
    with pytest.raises(ValueError, match="non-empty"):
        length_controlled_win_rate([], [], [])


def test_the_interval_has_the_level_that_was_asked_for() -> None:
    """With equal lengths the result is the raw rate, so the interval has a proportion's width: 2 z sqrt(p (1 - p) / n)."""
    wins = np.array([1.0] * 300 + [0.0] * 100)
    for level, z in ((0.95, 1.96), (0.5, 0.6745)):
        ci = length_controlled_win_rate(wins, np.ones(400), np.ones(400), level=level, draws=1500)
        assert ci.high - ci.low == pytest.approx(2 * z * (0.75 * 0.25 / 400) ** 0.5, rel=0.1)
