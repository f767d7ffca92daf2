"""Likelihood of chosen answers, and the effect of length, against closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from penchant.metrics.heldout import accuracy_at_equal_length, length_figures, likelihood_figures, mean_ratio


def test_the_ratio_and_its_width_by_hand() -> None:
    got = mean_ratio([1.0, 2.0, 6.0], [1.0, 1.0, 2.0], [0, 1, 2])
    assert got.estimate == pytest.approx(9 / 4)
    e = np.array([1 - 2.25, 2 - 2.25, 6 - 4.5])
    se = math.sqrt(3 / 2 * float((e**2).sum())) / 4
    assert got.high - got.estimate == pytest.approx(1.959963984540054 * se)


def test_rows_of_one_prompt_count_together() -> None:
    """Repeated rows add no evidence if they share a prompt."""
    v, w, c = [1.0, 2.0, 6.0], [1.0, 1.0, 2.0], [0, 1, 2]
    once, twice = mean_ratio(v, w, c), mean_ratio(v * 2, w * 2, c * 2)
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))


def test_the_ratio_s_interval_covers_what_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        w = rng.integers(5, 60, 60).astype(float)
        v = -1.5 * w + rng.normal(0, 4, 60) * np.sqrt(w)
        got = mean_ratio(v, w, np.arange(60))
        hits += got.low <= -1.5 <= got.high
    assert 0.91 <= hits / 400 <= 0.98


def test_perplexity_is_over_tokens_and_its_ratio_is_one_without_a_change() -> None:
    chosen, lengths = np.array([-10.0, -30.0]), np.array([10.0, 10.0])
    got = likelihood_figures(chosen, lengths, [0, 1], chosen)
    assert got["perplexity/chosen"] == pytest.approx(math.exp(2.0))
    assert got["perplexity_ratio/chosen"] == 1.0 and "perplexity_ratio/chosen/ci" not in got
    fallen = likelihood_figures(chosen - 1.0, lengths, [0, 1], chosen)
    assert fallen["perplexity_ratio/chosen"] == pytest.approx(math.exp(0.1))
    assert "perplexity_ratio/chosen" not in likelihood_figures(chosen, lengths, [0, 1])


def test_agreement_with_length_by_hand() -> None:
    got = length_figures([1.0, 1.0, 1.0, 0.5, 1.0], [3, -2, -1, 4, 0], np.arange(5))
    assert got["length/longer_wins"] == pytest.approx((1 + 0 + 0 + 1 + 0.5) / 5)
    assert got["length/agreement"] == pytest.approx((1 + 0 + 0 + 0.5 + 0.5) / 5)


def test_accuracy_that_length_explains_goes_and_the_rest_stays() -> None:
    rng = np.random.default_rng(1)
    gaps = rng.normal(8.0, 20.0, 400)  # chosen answers are longer in two thirds of the pairs
    by_length = (gaps > 0).astype(float)
    assert by_length.mean() > 0.6
    explained = accuracy_at_equal_length(by_length, gaps, np.arange(400))
    assert explained.low < 0.5 < explained.high
    honest = (rng.random(400) < 0.7).astype(float)
    kept = accuracy_at_equal_length(honest, gaps, np.arange(400))
    assert kept.low > 0.55 and kept.low < 0.7 < kept.high


def test_without_a_length_gap_it_is_the_accuracy() -> None:
    right = np.array([1.0] * 60 + [0.0] * 40)
    got = accuracy_at_equal_length(right, np.full(100, 3.0), np.arange(100))
    assert got.estimate == pytest.approx(0.6, abs=0.005)  # the penalty shrinks it slightly
    assert got.high - got.low == pytest.approx(2 * 1.96 * math.sqrt(0.24 / 100), rel=0.05)


def test_the_interval_at_equal_length_covers_what_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        gaps = rng.normal(5.0, 20.0, 150)
        p = 1 / (1 + np.exp(-(0.3 + 0.8 * np.tanh(gaps / gaps.std()))))
        got = accuracy_at_equal_length((rng.random(150) < p).astype(float), gaps, np.arange(150))
        hits += got.low <= 1 / (1 + math.exp(-0.3)) <= got.high
    assert 0.91 <= hits / 300 <= 0.985
