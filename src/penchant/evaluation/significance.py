"""Whether one model is better than another: paired tests on the same prompts, many comparisons at once, seeds as a source of chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import ArrayLike

from penchant.evaluation.stats import Interval

EXACT_UP_TO = 14  # prompts: 2^14 sign patterns are all looked at


def sign_flip_test(
    before: ArrayLike, after: ArrayLike, *, clusters: ArrayLike | None = None, draws: int = 20_000, seed: int = 0
) -> float:
    """Two-sided p-value of mean(after - before) = 0 on the same prompts, by flipping the sign of whole prompts' differences.

    ``p = P(|mean of flipped differences| >= |mean of the differences|)``; exact over all sign patterns up to 14 prompts, else over
    `draws` random ones, with the observed one among them: ``(1 + hits) / (1 + draws)``.

    Args:
        before, after: (n,) of the same rows; clusters: (n,) prompt of each row, None: every row by itself.

    Raises:
        ValueError: no rows, or shapes that differ.
    """
    a, b = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"before and after must be two equal, non-empty lists of numbers, not {b.shape} and {a.shape}")
    labels = np.arange(len(a)) if clusters is None else np.asarray(clusters)
    _, member = np.unique(labels, return_inverse=True)
    sums = np.bincount(member, weights=a - b)
    k = len(sums)
    # rounding must not tell a flipped sum from its equal
    observed = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()
    if k <= EXACT_UP_TO:
        signs = 1.0 - 2.0 * ((np.arange(2**k)[:, None] >> np.arange(k)) & 1)
        return float((np.abs(signs @ sums) >= observed).mean())
    rng = np.random.default_rng(seed)
    hits = 0
    block = max(1, 4_000_000 // k)
    for start in range(0, draws, block):
        signs = rng.integers(0, 2, size=(min(block, draws - start), k), dtype=np.int8) * 2.0 - 1.0
        hits += int((np.abs(signs @ sums) >= observed).sum())
    return (1 + hits) / (1 + draws)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: below alpha, they are significant with the chance of any false one at most alpha.

    ``p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))`` over the sorted p-values.

    Paper: Holm (1979).
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    highest = 0.0
    for place, i in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = highest
    return [float(p) for p in adjusted]


def seeds_difference(before: ArrayLike, after: ArrayLike, *, level: float = 0.95) -> Interval:
    """Mean difference of two methods over prompts and seeds, both drawn by chance, and its interval.

    ``D +- t sqrt(s_a^2 / S_a + s_b^2 / S_b + s_p^2 / n)``: s_a, s_b are the standard deviations of the seeds' means (what another seed
    would have given), s_p that of the prompts' mean differences (what other prompts would have given); t by Welch-Satterthwaite.

    Args:
        before, after: (S, n): a row of each seed's figures on the same n prompts; S may differ and must be at least 2.

    Raises:
        ValueError: fewer than two seeds or prompts, or other prompts.
    """
    b, a = (np.asarray(x, dtype=np.float64) for x in (before, after))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(*a.shape, *b.shape) < 2:
        raise ValueError(
            f"give (seeds, prompts) of the same prompts, at least 2 of each, not {b.shape} and {a.shape}; with one seed "
            "nothing says what another would have given"
        )
    # what is left of the prompts' noise in a seed's mean counts twice: the interval is a little too wide, never too narrow
    return several_sources(a.mean() - b.mean(), [a.mean(1), b.mean(1), a.mean(0) - b.mean(0)], level=level)


def several_sources(estimate: float, sources: Sequence[ArrayLike], *, level: float = 0.95) -> Interval:
    """An estimate whose errors come from several independent sources of chance, and its interval.

    ``E +- t sqrt(sum_k s_k^2 / n_k)``, s_k the standard deviation of source k's n_k draws; t by Welch-Satterthwaite.

    Args:
        sources: for each one what its draws gave, (n_k,) with n_k >= 2: means of seeds, means of prompts.
    """
    variance, freedom = _variance(sources)
    half = t_quantile((1 + level) / 2, freedom) * math.sqrt(variance) if variance > 0.0 else 0.0
    return Interval(float(estimate), float(estimate - half), float(estimate + half))


def several_sources_p(estimate: float, sources: Sequence[ArrayLike]) -> float:
    """Two-sided p-value of an estimate of zero, of which `several_sources` gives the interval."""
    variance, freedom = _variance(sources)
    if variance == 0.0:
        return 1.0 if estimate == 0.0 else 0.0
    return t_two_sided(estimate / math.sqrt(variance), freedom)


def _variance(sources: Sequence[ArrayLike]) -> tuple[float, float]:
    """``sum_k s_k^2 / n_k`` and its degrees of freedom."""
    draws = [np.asarray(x, dtype=np.float64) for x in sources]
    parts = [(float(x.var(ddof=1)) / len(x), len(x) - 1) for x in draws]
    variance = sum(v for v, _ in parts)
    scale = max(float(np.abs(x).max()) for x in draws)
    if variance <= (1e-15 * scale) ** 2:  # equal numbers, up to the rounding of their mean
        return 0.0, 1.0
    return variance, variance**2 / sum(v**2 / f for v, f in parts)


@cache
def _gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(200)


def t_quantile(p: float, freedom: float) -> float:
    """The p-quantile (p > 1/2) of Student's t with `freedom` > 0 degrees of freedom, to about 1e-8.

    With ``t = sqrt(f) tan(theta)`` the density becomes ``c cos(theta)^(f - 1)``, which is integrated by Gauss-Legendre.
    """
    if not 0.5 < p < 1.0 or freedom <= 0:
        raise ValueError(f"p is {p:g} and freedom {freedom:g}; give p in (0.5, 1) and freedom above 0")
    log_c = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)
    nodes, weights = _gauss_legendre()

    def above_half(theta: float) -> float:
        x = 0.5 * theta * (nodes + 1.0)
        return float(0.5 * theta * (weights * np.exp(log_c + (freedom - 1) * np.log(np.cos(x)))).sum())

    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if above_half(middle) < p - 0.5 else (low, middle)
    return math.sqrt(freedom) * math.tan(0.5 * (low + high))


def t_two_sided(t: float, freedom: float) -> float:
    """``P(|T| >= |t|)`` of Student's t with `freedom` > 0 degrees of freedom, to about 1e-8."""
    log_c = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)
    nodes, weights = _gauss_legendre()
    low = math.atan(abs(t) / math.sqrt(freedom))
    half = 0.5 * (math.pi / 2 - low)
    tail = half * (weights * np.exp(log_c + (freedom - 1) * np.log(np.cos(low + half * (nodes + 1.0))))).sum()
    return min(1.0, 2.0 * float(tail))
