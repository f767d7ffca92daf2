"""Intervals and win rates: percentile bootstrap that draws whole prompts, Wilson's interval. numpy only, deterministic by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

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
    k = len(sums)
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    block = max(1, 4_000_000 // k)  # bounds the memory of the drawn indices
    for start in range(0, draws, block):
        picks = rng.integers(0, k, size=(min(block, draws - start), k))
        means[start : start + len(picks)] = sums[picks].sum(1) / counts[picks].sum(1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(x.mean()), float(low), float(high))


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
    return bootstrap_ci((a > b) + ties * (a == b), clusters=clusters, draws=draws, seed=seed)


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
