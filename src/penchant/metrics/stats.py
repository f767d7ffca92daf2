"""Bootstrap and Wilson intervals, sign-flip tests, Holm, seeds, win rates at equal length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from penchant.base.stats import Z95, wilson_interval

# ---- Intervals and win rates: percentile bootstrap over whole prompts, Wilson's interval. numpy only, deterministic given a seed ----


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its interval."""

    estimate: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def mirrored(self, about: float = 0.5) -> Interval:
        """The interval from the other side's view: mirrored about one half for a share, about zero for a difference."""
        return Interval(2 * about - self.estimate, 2 * about - self.high, 2 * about - self.low)

    def named(self, name: str) -> dict[str, Any]:
        """``{NAME: estimate, NAME/ci: [low, high]}``, as in files; an interval of zero width is left out."""
        return {name: self.estimate, **({f"{name}/ci": [self.low, self.high]} if self.low < self.high else {})}


def bootstrap_ci(
    values: ArrayLike,
    *,
    clusters: ArrayLike | Sequence[object] | None = None,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a mean, drawing clusters (prompts) with replacement.

    ``mean* = sum_{c in draw} sum(values_c) / sum_{c in draw} n_c``

    Args:
        values: (n,) floats; clusters: (n,) labels; rows with the same label are drawn together. None: every row is its own cluster.
        level: coverage; draws: bootstrap samples; seed: of the draws.

    Raises:
        ValueError: no values, or lengths that differ.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError("values must be a non-empty list of numbers")
    member = _cluster_indices(len(x), clusters)
    sums, counts = np.bincount(member, weights=x), np.bincount(member).astype(np.float64)
    low, high = _percentiles(np.concatenate([a / b for a, b in _resample(sums, counts, draws, seed)]), level)
    return Interval(float(x.mean()), low, high)


def share_ci(
    values: ArrayLike,
    *,
    clusters: ArrayLike | Sequence[object] | None = None,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """`bootstrap_ci` of a share (values within [0, 1]); same arguments and errors.

    If all values are equal (all 0, all 1, all tied at one half), every draw is the same and the bootstrap would claim certainty from
    any number of rows. Wilson's interval with one trial per cluster is used instead.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim == 1 and len(x) and (x == x[0]).all():
        trials = len(np.unique(_cluster_indices(len(x), clusters)))
        return wilson(float(x[0]) * trials, trials, NormalDist().inv_cdf((1 + level) / 2))
    return bootstrap_ci(x, clusters=clusters, level=level, draws=draws, seed=seed)


def bootstrap_ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    clusters: ArrayLike | Sequence[object] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a ratio of sums, drawing clusters (prompts, documents) with replacement.

    ``r = sum(a) / sum(b)``, and for each draw ``r* = sum_{c in draw} sum(a_c) / sum_{c in draw} sum(b_c)``: for example, a perplexity
    or a divergence over tokens. Draws whose denominators sum to zero are left out.

    Args:
        numerators, denominators: (n,) floats, b >= 0; clusters: (n,) labels as for `bootstrap_ci`.

    Raises:
        ValueError: no values, lengths that differ, or denominators that sum to zero.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (numerators, denominators))
    if a.ndim != 1 or len(a) == 0 or a.shape != b.shape:
        raise ValueError(f"give two equal, non-empty lists of numbers, not {a.shape} and {b.shape}")
    if b.sum() <= 0:
        raise ValueError("the denominators sum to nothing")
    member = _cluster_indices(len(a), clusters)
    numerator_sums, denominator_sums = np.bincount(member, weights=a), np.bincount(member, weights=b)
    blocks = [(x, y) for x, y in _resample(numerator_sums, denominator_sums, draws, seed)]
    drawn, weight = np.concatenate([x for x, _ in blocks]), np.concatenate([y for _, y in blocks])
    low, high = _percentiles(drawn[weight > 0] / weight[weight > 0])
    return Interval(float(a.sum() / b.sum()), low, high)


def bootstrap_sums(
    statistics: ArrayLike,
    value: Callable[[np.ndarray], float],
    *,
    clusters: ArrayLike | Sequence[object] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of any function of summed statistics (corpus BLEU), recomputed from each draw's sums.

    Args:
        statistics: (n, m), one row each; value: maps (m,) sums to the figure; clusters: (n,) labels as for `bootstrap_ci`.

    Raises:
        ValueError: no rows, or lengths that differ.
    """
    x = np.asarray(statistics, dtype=np.float64)
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"statistics must be (rows, m) with at least one row, not {x.shape}")
    member = _cluster_indices(len(x), clusters)
    sums = np.stack([np.bincount(member, weights=column) for column in x.T], axis=1)
    rng = np.random.default_rng(seed)
    k = len(sums)
    drawn = [value(np.bincount(rng.integers(0, k, k), minlength=k) @ sums) for _ in range(draws)]
    low, high = _percentiles(np.array(drawn))
    return Interval(float(value(x.sum(0))), low, high)


def _cluster_indices(n: int, clusters: ArrayLike | Sequence[object] | None) -> np.ndarray:
    """The index of each row's cluster, (n,); every row is its own cluster if `clusters` is None."""
    labels = np.arange(n) if clusters is None else np.asarray(clusters)
    if labels.shape != (n,):
        raise ValueError(f"clusters has {len(labels)} labels for {n} rows")
    return np.unique(labels, return_inverse=True)[1]


def _resample(sums: np.ndarray, counts: np.ndarray, draws: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield sums and counts over clusters drawn with replacement, in blocks of draws that bound the memory of the indices."""
    k = len(sums)
    rng = np.random.default_rng(seed)
    block = max(1, 4_000_000 // k)
    for start in range(0, draws, block):
        picks = rng.integers(0, k, size=(min(block, draws - start), k))
        yield sums[picks].sum(1), counts[picks].sum(1)


def _percentiles(drawn: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def paired_bootstrap(before: ArrayLike, after: ArrayLike, *, clusters: ArrayLike | None = None) -> Interval:
    """Bootstrap interval of mean(after - before) over pairs."""
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return bootstrap_ci(difference, clusters=clusters)


def win_rate(before: ArrayLike, after: ArrayLike, *, clusters: ArrayLike | None = None) -> Interval:
    """How often `after` beats `before`; a tie counts one half."""
    a, b = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    return share_ci((a > b) + 0.5 * (a == b), clusters=clusters)


def wilson(successes: float, n: int, z: float = Z95) -> Interval:
    """Wilson's score interval of a proportion.

    ``(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)``
    """
    if n <= 0:
        raise ValueError("n must be positive")
    return Interval(successes / n, *wilson_interval(successes, n, z))


def rows_to_detect(rate: float = 0.7) -> int:
    """How many held-out pairs it takes to tell an accuracy of `rate` from chance: from here on, Wilson's 95% interval is above 0.5."""
    return 1 + max(n for n in range(1, 1000) if wilson(int(rate * n), n).low <= 0.5)


# ---- Comparing models: paired tests on the same prompts, multiple comparisons, seeds as a source of variance ----

EXACT_UP_TO = 14  # prompts: all 2^14 sign patterns are enumerated


def sign_flip_test(
    before: ArrayLike, after: ArrayLike, *, clusters: ArrayLike | None = None, draws: int = 20_000, seed: int = 0
) -> float:
    """Two-sided p-value of mean(after - before) = 0 on the same prompts, by flipping the sign of whole prompts' differences.

    ``p = P(|mean of flipped differences| >= |mean of the differences|)``: exact over all sign patterns up to 14 prompts, else over
    `draws` random patterns plus the observed one: ``(1 + hits) / (1 + draws)``.

    Args:
        before, after: (n,) of the same rows; clusters: (n,) prompt of each row, None: every row is its own cluster.

    Raises:
        ValueError: no rows, or shapes that differ.
    """
    a, b = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"before and after must be two equal, non-empty lists of numbers, not {b.shape} and {a.shape}")
    member = _cluster_indices(len(a), clusters)
    sums = np.bincount(member, weights=a - b)
    k = len(sums)
    # tolerance: rounding must not make a flipped sum differ from an equal one
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
    """Holm's adjusted p-values: rejecting those below alpha keeps the family-wise error rate at most alpha.

    ``p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))`` over the sorted p-values.

    Paper: Holm (1979).
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    highest = 0.0
    for rank, i in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return [float(p) for p in adjusted]


def seeds_difference(before: ArrayLike, after: ArrayLike) -> Interval:
    """Mean difference of two methods with its interval, treating both prompts and seeds as random.

    ``D +- t sqrt(s_a^2 / S_a + s_b^2 / S_b + s_p^2 / n)``: s_a, s_b are the standard deviations of the seeds' means (variation between
    seeds), s_p that of the prompts' mean differences (variation between prompts); t by Welch-Satterthwaite.

    Args:
        before, after: (S, n): one row per seed, on the same n prompts; S may differ and must be at least 2.

    Raises:
        ValueError: fewer than two seeds or prompts, or different numbers of prompts.
    """
    b, a = (np.asarray(x, dtype=np.float64) for x in (before, after))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(*a.shape, *b.shape) < 2:
        raise ValueError(
            f"give (seeds, prompts) of the same prompts, at least 2 of each, not {b.shape} and {a.shape}; with one seed "
            "nothing says what another would have given"
        )
    # the prompts' noise within a seed's mean is counted twice: the interval is a little too wide, never too narrow
    return interval_from_sources(a.mean() - b.mean(), [a.mean(1), b.mean(1), a.mean(0) - b.mean(0)])


def interval_from_sources(
    estimate: float, sources: Sequence[ArrayLike], *, share: bool = False, level: float = 0.95
) -> Interval:
    """An estimate with its interval, given several independent sources of variance.

    ``E +- t sqrt(sum_k s_k^2 / n_k)``, s_k the standard deviation of source k's n_k draws; t by Welch-Satterthwaite.

    Args:
        sources: the draws of each source, (n_k,) with n_k >= 2: means of seeds, means of prompts.
        share: the estimate is a share, and so the interval ends at 0 and 1.
    """
    variance, freedom = _total_variance(sources)
    half = t_quantile((1 + level) / 2, freedom) * math.sqrt(variance) if variance > 0.0 else 0.0
    low, high = float(estimate - half), float(estimate + half)
    return Interval(float(estimate), max(0.0, low), min(1.0, high)) if share else Interval(float(estimate), low, high)


def p_value_from_sources(estimate: float, sources: Sequence[ArrayLike]) -> float:
    """Two-sided p-value against zero, for the estimate and sources of `interval_from_sources`."""
    variance, freedom = _total_variance(sources)
    if variance == 0.0:
        return 1.0 if estimate == 0.0 else 0.0
    return t_two_sided(estimate / math.sqrt(variance), freedom)


def _total_variance(sources: Sequence[ArrayLike]) -> tuple[float, float]:
    """``sum_k s_k^2 / n_k`` and its degrees of freedom (Welch-Satterthwaite)."""
    draws = [np.asarray(x, dtype=np.float64) for x in sources]
    parts = [(float(x.var(ddof=1)) / len(x), len(x) - 1) for x in draws]
    variance = sum(v for v, _ in parts)
    scale = max(float(np.abs(x).max()) for x in draws)
    if variance <= (1e-15 * scale) ** 2:  # all draws equal, up to the rounding of their mean
        return 0.0, 1.0
    return variance, variance**2 / sum(v**2 / f for v, f in parts)


@cache
def _gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(200)


def _t_mass(low: float, high: float, freedom: float) -> float:
    """Probability mass of Student's t between two angles: with ``t = sqrt(f) tan(theta)`` its density is ``c cos(theta)^(f - 1)``."""
    log_c = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)
    nodes, weights = _gauss_legendre()
    half = 0.5 * (high - low)
    return float(half * (weights * np.exp(log_c + (freedom - 1) * np.log(np.cos(low + half * (nodes + 1.0))))).sum())


def t_quantile(p: float, freedom: float) -> float:
    """The p-quantile (p > 1/2) of Student's t with `freedom` > 0 degrees of freedom, to about 1e-8."""
    if not 0.5 < p < 1.0 or freedom <= 0:
        raise ValueError(f"p is {p:g} and freedom {freedom:g}; give p in (0.5, 1) and freedom above 0")
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _t_mass(0.0, middle, freedom) < p - 0.5 else (low, middle)
    return math.sqrt(freedom) * math.tan(0.5 * (low + high))


def t_two_sided(t: float, freedom: float) -> float:
    """``P(|T| >= |t|)`` of Student's t with `freedom` > 0 degrees of freedom, to about 1e-8."""
    return min(1.0, 2.0 * _t_mass(math.atan(abs(t) / math.sqrt(freedom)), math.pi / 2, freedom))


# ---- Win rates at equal length: the win rate without the advantage of longer answers ----


def length_controlled_win_rate(
    wins: ArrayLike,
    lengths: ArrayLike,
    other_lengths: ArrayLike,
    *,
    clusters: ArrayLike | Sequence[object] | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Win rate for answers of equal length, from a logistic model.

    ``P(win) = sigmoid(theta + phi tanh((l - l') / s))``, s the standard deviation of the length differences; the figure is
    ``sigmoid(theta)``. As in length-controlled AlpacaEval, without its instruction-difficulty term. The interval resamples whole
    prompts and refits.

    Args:
        wins: (n,) 1, 0, or 0.5 for a tie; lengths, other_lengths: (n,) of the judged and the other answer.
        clusters: (n,) prompt of each row, None: every row is its own cluster.

    Raises:
        ValueError: no rows, shapes that differ, or wins outside [0, 1].

    Paper: arXiv 2404.04475.
    """
    y = np.asarray(wins, dtype=np.float64)
    gap = np.asarray(lengths, dtype=np.float64) - np.asarray(other_lengths, dtype=np.float64)
    if y.ndim != 1 or len(y) == 0 or gap.shape != y.shape:
        raise ValueError(f"wins and lengths must be equal, non-empty lists, not {y.shape} and {gap.shape}")
    if y.min() < 0 or y.max() > 1:
        raise ValueError("wins must be within 0 and 1, 0.5 for a tie")
    spread = gap.std()
    x = np.tanh(gap / spread) if spread > 0 else np.zeros_like(gap)
    member = _cluster_indices(len(y), clusters)
    k = int(member.max()) + 1
    rng = np.random.default_rng(seed)
    counts = np.stack([np.bincount(rng.integers(0, k, k), minlength=k) for _ in range(draws)]).astype(np.float64)
    rates = _equal_length_rate(x, y, np.concatenate((np.ones((1, k)), counts))[:, member])
    tail = (1 - level) / 2
    low, high = np.quantile(rates[1:], [tail, 1 - tail])
    return Interval(float(rates[0]), float(low), float(high))


def _equal_length_rate(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sigmoid(theta) of one weighted fit per row of `weights` (m, n), by Newton's method.

    A Gaussian penalty (standard deviation 2 on both parameters) keeps fits finite if one side always wins.
    """
    ridge = 0.25
    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(30):
        p = 1.0 / (1.0 + np.exp(-(theta[:, None] + phi[:, None] * x)))
        error, curve = weights * (y - p), weights * p * (1 - p)
        g0, g1 = error.sum(1) - ridge * theta, error @ x - ridge * phi
        h00, h01, h11 = curve.sum(1) + ridge, curve @ x, curve @ (x * x) + ridge
        det = h00 * h11 - h01 * h01
        step = np.clip(np.stack((h11 * g0 - h01 * g1, h00 * g1 - h01 * g0)) / det, -2.0, 2.0)
        theta, phi = theta + step[0], phi + step[1]
        if np.abs(step).max() < 1e-13:  # converged up to rounding
            break
    return 1.0 / (1.0 + np.exp(-theta))
