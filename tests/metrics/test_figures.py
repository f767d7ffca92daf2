"""Metrics and their intervals: closed forms, clusters, single prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from penchant.metrics.completions import distinct_n, distinct_n_interval, repetition
from penchant.metrics.figures import Figure, exp, flatten, mean_figure, prompt_clusters, ratio_figure
from penchant.metrics.stats import bootstrap_ci, bootstrap_ratio, bootstrap_sums
from penchant.types import TokenTree


def test_a_ratio_with_equal_weights_is_a_mean() -> None:
    x, clusters = np.random.default_rng(0).normal(size=60), np.arange(60) // 3
    ratio = bootstrap_ratio(x, np.ones(60), clusters=clusters, draws=500)
    mean = bootstrap_ci(x, clusters=clusters, draws=500)
    assert (ratio.low, ratio.high) == (mean.low, mean.high)
    assert ratio.estimate == pytest.approx(mean.estimate)


def test_a_ratio_is_of_sums_not_a_mean_of_ratios() -> None:
    found = bootstrap_ratio([10.0, 1.0], [1.0, 10.0])
    assert found.estimate == pytest.approx(1.0)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(10.0))


def test_a_ratios_interval_covers() -> None:
    """As for perplexity, where long documents count more and the true value is the ratio of means."""
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        size = rng.integers(5, 50, 60)
        nats = size * (3.0 + rng.normal(0, 0.5, 60))
        found = bootstrap_ratio(nats, size, draws=300, seed=seed)
        hits += found.low <= 3.0 <= found.high
    assert 0.89 <= hits / 200 <= 0.985


def test_a_figure_of_sums_is_computed_anew_from_each_draw() -> None:
    rows = np.random.default_rng(2).uniform(1, 2, (30, 2))
    clusters = np.arange(30) // 2
    sums = bootstrap_sums(rows, lambda s: float(s[0] / s[1]), clusters=clusters, draws=4000, seed=1)
    ratio = bootstrap_ratio(rows[:, 0], rows[:, 1], clusters=clusters, draws=4000)
    assert sums.estimate == pytest.approx(ratio.estimate)
    assert (sums.low, sums.high) == (pytest.approx(ratio.low, abs=0.01), pytest.approx(ratio.high, abs=0.01))


@pytest.mark.parametrize("above,below", [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_ratios_of_nothing_are_refused(above: list[float], below: list[float]) -> None:
    with pytest.raises(ValueError, match=r"non-empty|nothing"):
        bootstrap_ratio(above, below)


def test_one_prompt_has_no_interval() -> None:
    assert mean_figure("x", [1.0, 2.0], [0, 0]) == Figure("x", 1.5, None, 2)
    several = mean_figure("x", [1.0, 2.0], [0, 1])
    assert several.interval == (1.0, 2.0)
    metrics = flatten([several, mean_figure("y", [1.0], [0])])
    assert metrics == {"eval/x": 1.5, "eval/x/ci": [1.0, 2.0], "eval/x/n": 2, "eval/y": 1.0, "eval/y/n": 1}


def test_a_perplexity_is_finite_and_its_interval_is_mapped_too() -> None:
    found = ratio_figure("p", [2.0, 4.0], [2.0, 2.0], [0, 1], exp)
    assert found.value == pytest.approx(math.exp(1.5))
    assert found.interval == (pytest.approx(math.e), pytest.approx(math.exp(2)))
    assert math.isfinite(exp(1e9))


def test_rows_of_one_prompt_are_drawn_together_unless_all_are() -> None:
    def tree(prompt: int) -> TokenTree:
        return TokenTree(0, np.array([prompt]), (np.array([1]),), (False,))

    assert prompt_clusters([tree(1), tree(2), tree(1)]).tolist() == [0, 1, 0]
    assert prompt_clusters([tree(1), tree(1)]).tolist() == [0, 1]


def test_repetition_by_hand() -> None:
    assert repetition([1, 2, 1, 2, 1, 2, 1], 2) == pytest.approx(4 / 6)  # 12 21 12 21 12 21
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([1, 2, 3]) is None


def test_the_jackknife_by_hand() -> None:
    """Three prompts of one token each, two of them alike: leaving one out gives 1, 1 and 1/2."""
    found = distinct_n_interval([[7], [7], [8]], [0, 1, 2], 1)
    left = np.array([1.0, 1.0, 0.5])
    s = math.sqrt(2 / 3 * ((left - left.mean()) ** 2).sum())
    assert found is not None and found.estimate == pytest.approx(2 / 3) == distinct_n([[7], [7], [8]], 1)
    assert found.low == pytest.approx(max(0.0, 2 / 3 - 4.302653 * s))
    assert distinct_n_interval([[1, 2], [3]], [0, 0], 1) is None


@pytest.mark.slow
def test_the_jackknife_covers_where_a_bootstrap_does_not() -> None:
    """Texts from a known source, where the true value is the mean of distinct-1 over many samples of that size."""
    rng = np.random.default_rng(3)
    weights = 1 / np.arange(1, 401)
    draw = lambda: [rng.choice(400, 20, p=weights / weights.sum()).tolist() for _ in range(30)]  # noqa: E731
    truth = np.mean([distinct_n(draw(), 1) for _ in range(400)])
    hits, naive = 0, 0
    for seed in range(60):
        texts = draw()
        found = distinct_n_interval(texts, list(range(30)), 1)
        assert found is not None
        hits += found.low <= truth <= found.high
        if seed < 30:
            picks = np.random.default_rng(seed).integers(0, 30, (60, 30))
            drawn = [distinct_n([texts[i] for i in row], 1) for row in picks]
            naive += np.quantile(drawn, 0.025) <= truth <= np.quantile(drawn, 0.975)
    assert 0.9 <= hits / 60 <= 1.0
    assert naive < 10
