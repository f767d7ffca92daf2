"""Intervals on data with known true values."""

from __future__ import annotations

import numpy as np
import pytest

from penchant.metrics.completions import distinct_n
from penchant.metrics.stats import bootstrap_ci, paired_bootstrap, share_ci, wilson, win_rate


def test_bootstrap_is_close_to_the_normal_interval_and_deterministic() -> None:
    x = np.random.default_rng(0).normal(2.0, 1.0, 400)
    got = bootstrap_ci(x)
    half = 1.96 * x.std() / 20
    assert got.estimate == pytest.approx(x.mean())
    assert got.low == pytest.approx(x.mean() - half, abs=0.01)
    assert got.high == pytest.approx(x.mean() + half, abs=0.01)
    assert got == bootstrap_ci(x)


def test_coverage_is_nominal_in_simulation() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(300):
        ci = bootstrap_ci(rng.exponential(1.0, 60), draws=500, seed=seed)
        hits += ci.low <= 1.0 <= ci.high
    assert 0.89 <= hits / 300 <= 0.975  # a skewed distribution and n=60: theory predicts slightly under 95%


def test_copies_of_a_row_bring_no_certainty() -> None:
    x = np.random.default_rng(0).normal(size=50)
    one = bootstrap_ci(x)
    copied = bootstrap_ci(np.repeat(x, 20), clusters=np.repeat(np.arange(50), 20))
    assert copied.high - copied.low == pytest.approx(one.high - one.low, rel=0.1)
    naive = bootstrap_ci(np.repeat(x, 20))
    assert naive.high - naive.low < 0.4 * (one.high - one.low)


def test_a_paired_shift_is_found_under_large_spread() -> None:
    before = np.random.default_rng(0).normal(0, 10, 200)
    ci = paired_bootstrap(before, before + 0.5)
    assert ci.low == pytest.approx(0.5) and ci.high == pytest.approx(0.5)


def test_ties_count_half() -> None:
    assert win_rate([0, 0, 0, 0], [1, 1, 0, -1]).estimate == pytest.approx(2.5 / 4)


def test_wilson_closed_form() -> None:
    ci = wilson(8, 10)
    assert (ci.low, ci.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 5).low == 0.0


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_rows_that_all_agree_are_no_certainty(value: float) -> None:
    found = share_ci([value] * 12)
    expected, of_prompts = wilson(12 * value, 12), wilson(3 * value, 3)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high)) and found.high - found.low > 0.2
    by_prompt = share_ci([value] * 12, clusters=[0, 1, 2] * 4)  # prompts count, not rows
    assert (by_prompt.low, by_prompt.high) == pytest.approx((of_prompts.low, of_prompts.high))
    assert share_ci([value] * 12, level=0.99).high - share_ci([value] * 12, level=0.99).low > found.high - found.low
    assert "a/ci" in found.named("a") and "a/ci" not in bootstrap_ci([value] * 12).named("a")  # no width, no interval
    mixed = [value] * 11 + [0.25]
    assert share_ci(mixed) == bootstrap_ci(mixed)


def test_degenerate_input() -> None:
    assert bootstrap_ci([3.0]).low == 3.0
    for bad in ([], [[1.0]]):
        with pytest.raises(ValueError, match="non-empty"):
            bootstrap_ci(bad)
    with pytest.raises(ValueError, match="labels"):
        bootstrap_ci([1.0, 2.0], clusters=[1])


def test_distinct_n() -> None:
    assert distinct_n([[1, 2, 1, 2], [1, 2]]) == pytest.approx(2 / 4)  # bigrams 12 21 12 and 12: two distinct of four
    assert distinct_n([[1]]) == 0.0


def test_a_prompt_with_many_rows_weighs_as_many_in_every_draw() -> None:
    """Prompt a has one row of 1, b nine rows of 0. A resample is a twice (1), b twice (0), or both (1/10, half of the time)."""
    found = bootstrap_ci([1.0] + [0.0] * 9, clusters=["a"] + ["b"] * 9, level=0.2)
    assert (found.estimate, found.low, found.high) == (pytest.approx(0.1),) * 3
    wide = bootstrap_ci([1.0] + [0.0] * 9, clusters=["a"] + ["b"] * 9)
    assert (wide.low, wide.high) == (0.0, 1.0)
