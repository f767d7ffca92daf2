"""Significance tests on simulated data with known truth: false positive rates, coverage, tabulated quantiles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from penchant.metrics.stats import (
    holm,
    interval_from_sources,
    p_value_from_sources,
    seeds_difference,
    sign_flip_test,
    t_quantile,
)


def test_few_prompts_are_enumerated() -> None:
    before, after = np.zeros(5), np.array([1.0, 2.0, 0.5, 3.0, -0.25])
    flips = [abs(np.dot(s, after)) for s in itertools.product((1, -1), repeat=5)]
    assert sign_flip_test(before, after) == pytest.approx(np.mean(np.array(flips) >= after.sum() - 1e-9))
    assert sign_flip_test(before, np.ones(5)) == pytest.approx(2 / 32)  # the smallest value with five prompts
    assert sign_flip_test(after, after) == 1.0


@pytest.mark.parametrize(("prompts", "rows"), [(12, 1), (30, 1), (30, 4)])
def test_the_false_positive_rate_is_right_under_the_null(prompts: int, rows: int) -> None:
    """Symmetric differences with mean 0 and a common part within each prompt: 5% are called significant, not 20%."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(prompts), rows)
    trials, hits = 600, 0
    for seed in range(trials):
        difference = np.repeat(rng.normal(size=prompts), rows) + 0.3 * rng.normal(size=prompts * rows)
        hits += sign_flip_test(np.zeros_like(difference), difference, clusters=clusters, draws=400, seed=seed) <= 0.05
    assert 0.05 - 0.027 <= hits / trials <= 0.05 + 0.027  # three standard errors
    if rows > 1:  # treating rows as independent would be far above
        naive = sum(
            sign_flip_test(np.zeros(prompts * rows), np.repeat(rng.normal(size=prompts), rows), draws=200, seed=s)
            <= 0.05
            for s in range(100)
        )
        assert naive > 15


def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(0, 5, 200)
    assert sign_flip_test(before, before + 0.5 + rng.normal(0, 1, 200)) < 1e-3


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5]) == [0.5] and holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_holm_keeps_the_chance_of_any_false_call() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(size=(4000, 8))
    any_false = np.mean([min(holm(row.tolist())) <= 0.05 for row in p])
    assert 0.035 <= any_false <= 0.065
    assert np.mean(p.min(1) <= 0.05) > 0.3  # without it, a third of all sweeps would be false positives


@pytest.mark.parametrize(
    ("p", "freedom", "expected"),
    [
        (0.975, 1, 12.7062047),
        (0.975, 2, 4.30265273),
        (0.975, 10, 2.22813885),
        (0.95, 5, 2.01504837),
        (0.975, 1e6, 1.95996636),
    ],
)
def test_t_quantiles_are_the_tabulated_ones(p: float, freedom: float, expected: float) -> None:
    assert t_quantile(p, freedom) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("spread_of_seeds", "seeds"), [(0.0, 3), (0.3, 3), (0.3, 5), (1.0, 2)])
def test_intervals_over_seeds_cover(spread_of_seeds: float, seeds: int) -> None:
    """True difference 0.2 with random seeds and prompts: coverage of at least 95%, and not much more if seeds really vary."""
    rng = np.random.default_rng(0)
    n, trials, hits, naive = 60, 300, 0, 0
    for _ in range(trials):
        prompts = rng.normal(size=n)
        effect = rng.normal(0.2, 0.5, size=n)
        before, after = (
            prompts + of_prompt + spread_of_seeds * rng.normal(size=(seeds, 1)) + 0.3 * rng.normal(size=(seeds, n))
            for of_prompt in (0.0, effect)
        )
        ci = seeds_difference(before, after)
        hits += ci.low <= 0.2 <= ci.high
        difference = after[0] - before[0]
        half = 1.96 * difference.std(ddof=1) / n**0.5
        naive += abs(difference.mean() - 0.2) <= half
    assert 0.92 <= hits / trials <= 1.0
    if spread_of_seeds:
        assert naive / trials < 0.65  # the interval over one seed's prompts is too narrow


def test_one_seed_says_nothing_of_another() -> None:
    with pytest.raises(ValueError, match="another would have given"):
        seeds_difference(np.zeros((1, 5)), np.zeros((3, 5)))


def test_several_sources_by_hand() -> None:
    """s^2 / n of {1, 3} is 2 / 2 = 1 with one degree of freedom, of {0, 1, 2} it is 1 / 3 with two."""
    variance, freedom = 4 / 3, (4 / 3) ** 2 / (1 / 1 + (1 / 3) ** 2 / 2)
    found = interval_from_sources(5.0, [[1.0, 3.0], [0.0, 1.0, 2.0]])
    half = t_quantile(0.975, freedom) * variance**0.5
    assert (found.estimate, found.low, found.high) == pytest.approx((5.0, 5.0 - half, 5.0 + half))
    two_seeds = interval_from_sources(0.0, [[1.0, 3.0]])  # the tabulated Student's t with one degree of freedom
    assert two_seeds.high == pytest.approx(12.7062047)
    share = interval_from_sources(0.9, [[0.8, 1.0]], share=True)
    assert share.high == 1.0 and share.low == 0.0 and interval_from_sources(0.9, [[0.8, 1.0]]).high > 1.0
    assert p_value_from_sources(12.7062047, [[1.0, 3.0]]) == pytest.approx(0.05, rel=1e-6)


def test_random_flips_never_promise_more_than_they_can_tell() -> None:
    """If thirty prompts all gain, no flip is as large, and p is 1 / (draws + 1), not zero."""
    assert sign_flip_test(np.zeros(30), np.ones(30), draws=99) == pytest.approx(1 / 100)


def test_both_sides_count() -> None:
    gain = np.random.default_rng(0).normal(0.4, 1.0, 40)
    one, other = sign_flip_test(np.zeros(40), gain), sign_flip_test(gain, np.zeros(40))
    assert one == pytest.approx(other, abs=0.01) and 0.001 < one < 0.2
