"""Intervals and win rates: percentile bootstrap that draws whole prompts, Wilson's interval. numpy only, deterministic by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its interval."""

    estimate: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


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
        values: (n,) floats; clusters: (n,) labels; rows of one label are drawn together. None: every row by itself.
        level: coverage; draws: bootstrap samples; seed: of the draws.

    Raises:
        ValueError: no values, or lengths that differ.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError("values must be a non-empty list of numbers")
    labels = np.arange(len(x)) if clusters is None else np.asarray(clusters)
    if labels.shape != x.shape:
        raise ValueError(f"clusters has {len(labels)} labels for {len(x)} values")
    _, member = np.unique(labels, return_inverse=True)
    sums, counts = np.bincount(member, weights=x), np.bincount(member).astype(np.float64)
    low, high = _percentiles(np.concatenate([a / b for a, b in _drawn(sums, counts, draws, seed)]), level)
    return Interval(float(x.mean()), low, high)


def share_ci(
    values: ArrayLike,
    *,
    clusters: ArrayLike | Sequence[object] | None = None,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """`bootstrap_ci` of a share (values within [0, 1]); arguments and errors as there.

    Where every value is 0, or every value is 1, each draw gives the same and the bootstrap would claim certainty from any number
    of rows: Wilson's interval of as many trials as there are clusters takes its place.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim == 1 and len(x) and x[0] in (0.0, 1.0) and (x == x[0]).all():
        trials = len(x) if clusters is None else len(np.unique(np.asarray(clusters)))
        return wilson(round(x[0] * trials), trials, NormalDist().inv_cdf((1 + level) / 2))
    return bootstrap_ci(values, clusters=clusters, level=level, draws=draws, seed=seed)


def bootstrap_ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    clusters: ArrayLike | Sequence[object] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a ratio of sums, drawing clusters (prompts, documents) with replacement.

    ``r = sum(a) / sum(b)``, and of each draw ``r* = sum_{c in draw} sum(a_c) / sum_{c in draw} sum(b_c)``: perplexity over tokens, a
    divergence over tokens. Draws without any b are left out.

    Args:
        numerators, denominators: (n,) floats, b >= 0; clusters: (n,) labels as for `bootstrap_ci`.

    Raises:
        ValueError: no values, lengths that differ, or denominators that sum to nothing.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (numerators, denominators))
    if a.ndim != 1 or len(a) == 0 or a.shape != b.shape:
        raise ValueError(f"give two equal, non-empty lists of numbers, not {a.shape} and {b.shape}")
    if b.sum() <= 0:
        raise ValueError("the denominators sum to nothing")
    _, member = np.unique(np.arange(len(a)) if clusters is None else np.asarray(clusters), return_inverse=True)
    above, below = np.bincount(member, weights=a), np.bincount(member, weights=b)
    parts = [(x, y) for x, y in _drawn(above, below, draws, seed)]
    drawn, weight = np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])
    low, high = _percentiles(drawn[weight > 0] / weight[weight > 0], level)
    return Interval(float(a.sum() / b.sum()), low, high)


def bootstrap_sums(
    statistics: ArrayLike,
    value: Callable[[np.ndarray], float],
    *,
    clusters: ArrayLike | Sequence[object] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of any figure of summed statistics (corpus BLEU): it is computed anew from each draw's sums.

    Args:
        statistics: (n, m) of each row; value: (m,) sums to the figure; clusters: (n,) labels as for `bootstrap_ci`.

    Raises:
        ValueError: no rows, or lengths that differ.
    """
    x = np.asarray(statistics, dtype=np.float64)
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"statistics must be (rows, m) with at least one row, not {x.shape}")
    labels = np.arange(len(x)) if clusters is None else np.asarray(clusters)
    if len(labels) != len(x):
        raise ValueError(f"clusters has {len(labels)} labels for {len(x)} rows")
    _, member = np.unique(labels, return_inverse=True)
    sums = np.stack([np.bincount(member, weights=column) for column in x.T], axis=1)
    rng = np.random.default_rng(seed)
    k = len(sums)
    drawn = [value(np.bincount(rng.integers(0, k, k), minlength=k) @ sums) for _ in range(draws)]
    low, high = _percentiles(np.array(drawn), level)
    return Interval(float(value(x.sum(0))), low, high)


def _drawn(sums: np.ndarray, counts: np.ndarray, draws: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sums and counts over clusters drawn with replacement, a block of draws at a time: it bounds the memory of the indices."""
    k = len(sums)
    rng = np.random.default_rng(seed)
    block = max(1, 4_000_000 // k)
    for start in range(0, draws, block):
        picks = rng.integers(0, k, size=(min(block, draws - start), k))
        yield sums[picks].sum(1), counts[picks].sum(1)


def _percentiles(drawn: np.ndarray, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def paired_bootstrap(
    before: ArrayLike,
    after: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of mean(after - before) over pairs."""
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return bootstrap_ci(difference, clusters=clusters, level=level, draws=draws, seed=seed)


def win_rate(
    before: ArrayLike,
    after: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    ties: float = 0.5,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """How often `after` beats `before`; a tie counts `ties`."""
    a, b = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    return share_ci((a > b) + ties * (a == b), clusters=clusters, draws=draws, seed=seed)


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> Interval:
    """Wilson's score interval of a proportion.

    ``(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)``
    """
    if n <= 0:
        raise ValueError("n must be positive")
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))
