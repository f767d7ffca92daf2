"""Win rates at equal length: what is left of a win rate when longer answers are no longer favoured for being longer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from penchant.evaluation.stats import Interval


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
    """The win rate that a logistic model gives for answers of equal length.

    ``P(win) = sigmoid(theta + phi tanh((l - l') / s))``, s the standard deviation of the length differences; the figure is
    ``sigmoid(theta)``. As in length-controlled AlpacaEval, without its instruction-difficulty term. The interval draws whole prompts
    and fits anew.

    Args:
        wins: (n,) 1, 0, or 0.5 for a tie; lengths, other_lengths: (n,) of the judged and the other answer.
        clusters: (n,) prompt of each row, None: every row by itself.

    Raises:
        ValueError: no rows, shapes that differ, or wins beyond [0, 1].

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
    labels = np.arange(len(y)) if clusters is None else np.asarray(clusters)
    _, member = np.unique(labels, return_inverse=True)
    k = int(member.max()) + 1
    rng = np.random.default_rng(seed)
    counts = np.stack([np.bincount(rng.integers(0, k, k), minlength=k) for _ in range(draws)]).astype(np.float64)
    rates = _equal_length_rate(x, y, np.concatenate((np.ones((1, k)), counts))[:, member])
    tail = (1 - level) / 2
    low, high = np.quantile(rates[1:], [tail, 1 - tail])
    return Interval(float(rates[0]), float(low), float(high))


def _equal_length_rate(x: np.ndarray, y: np.ndarray, weights: np.ndarray, steps: int = 30) -> np.ndarray:
    """sigmoid(theta) of one weighted fit a row of `weights` (m, n), by Newton's method.

    A Gaussian penalty (standard deviation 2 on both numbers) keeps fits finite where one side always wins.
    """
    ridge = 0.25
    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(steps):
        p = 1.0 / (1.0 + np.exp(-(theta[:, None] + phi[:, None] * x)))
        error, curve = weights * (y - p), weights * p * (1 - p)
        g0, g1 = error.sum(1) - ridge * theta, error @ x - ridge * phi
        h00, h01, h11 = curve.sum(1) + ridge, curve @ x, curve @ (x * x) + ridge
        det = h00 * h11 - h01 * h01
        move = np.clip(np.stack((h11 * g0 - h01 * g1, h00 * g1 - h01 * g0)) / det, -2.0, 2.0)
        theta, phi = theta + move[0], phi + move[1]
        if np.abs(move).max() < 1e-13:  # nothing moves any more but rounding
            break
    return 1.0 / (1.0 + np.exp(-theta))
