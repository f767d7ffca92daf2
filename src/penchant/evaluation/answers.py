"""Held-out pairs beyond a loss's own metrics: how likely the chosen answers still are, and what their length explains. numpy only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from penchant.evaluation.stats import Interval, share_ci

Z95 = 1.959963984540054
RIDGE = 0.25  # 1 / variance of the penalty on both numbers of the logistic: keeps a fit finite where length decides everything


def mean_ratio(values: ArrayLike, weights: ArrayLike, clusters: ArrayLike) -> Interval:
    """``sum values / sum weights`` with its 95% interval, by the delta method over clusters.

    ``se = sqrt(k / (k - 1) sum_c e_c^2) / sum weights, e_c = sum_{i in c} (v_i - r w_i)``; one cluster gives no width.

    Args:
        values, weights: (n,), weights above 0; clusters: (n,) prompt of each row.
    """
    v, w = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    ratio = float(v.sum() / w.sum())
    e = np.bincount(member, weights=v - ratio * w)
    k = len(e)
    half = Z95 * math.sqrt(k / (k - 1) * float((e**2).sum())) / float(w.sum()) if k > 1 else 0.0
    return Interval(ratio, ratio - half, ratio + half)


def likelihood_figures(
    chosen: ArrayLike, lengths: ArrayLike, clusters: ArrayLike, ref_chosen: ArrayLike | None = None
) -> dict[str, Any]:
    """``perplexity/chosen = exp(-sum log p / sum tokens)``, and its ratio to the reference's, with intervals by prompt.

    Args:
        chosen, ref_chosen: summed log-probs of chosen answers in nats, (rows,); lengths: their tokens; clusters: (rows,) prompts.
    """
    policy = np.asarray(chosen, dtype=np.float64)
    found = _exp("perplexity/chosen", mean_ratio(-policy, lengths, clusters))
    if ref_chosen is not None:
        change = np.asarray(ref_chosen, dtype=np.float64) - policy
        found |= _exp("perplexity_ratio/chosen", mean_ratio(change, lengths, clusters))
    return found


def _exp(name: str, nats: Interval) -> dict[str, Any]:
    value, low, high = (math.exp(min(700.0, x)) for x in (nats.estimate, nats.low, nats.high))
    return {name: value, f"{name}/ci": [low, high]}


def length_figures(right: ArrayLike, gaps: ArrayLike, clusters: ArrayLike) -> dict[str, Any]:
    """What length has to do with preferences, each figure with its interval by prompt.

    - ``length/longer_wins``: accuracy of the rule that the longer answer is the better one; equal lengths count half.
    - ``length/agreement``: share of pairs in which the model prefers the longer answer; equal lengths count half.
    - ``length/controlled_accuracy``: the model's accuracy at equal length, by a logistic in the length gap.

    Args:
        right: (rows,) 1 where the chosen answer is preferred, 0.5 for a tie; gaps: chosen minus rejected tokens; clusters: prompts.
    """
    y, g = np.asarray(right, dtype=np.float64), np.asarray(gaps, dtype=np.float64)
    longer = (g > 0) + 0.5 * (g == 0)
    agrees = np.where(g == 0, 0.5, np.where(g > 0, y, 1.0 - y))
    found: dict[str, Any] = {}
    for name, interval in (
        ("length/longer_wins", share_ci(longer, clusters=clusters, draws=2000)),
        ("length/agreement", share_ci(agrees, clusters=clusters, draws=2000)),
        ("length/controlled_accuracy", accuracy_at_equal_length(y, g, clusters)),
    ):
        found |= {name: interval.estimate, f"{name}/ci": [interval.low, interval.high]}
    return found


def accuracy_at_equal_length(right: ArrayLike, gaps: ArrayLike, clusters: ArrayLike) -> Interval:
    """Accuracy that a logistic in the length gap gives at a gap of zero.

    ``P(right) = sigmoid(theta + phi tanh(gap / s))``, s the standard deviation of the gaps; the figure is ``sigmoid(theta)``, its 95% interval
    from the sandwich variance over prompts on the scale of theta. The form is that of length-controlled win rates (arXiv 2404.04475).

    Args:
        right: (rows,) within 0 and 1; gaps: (rows,) tokens; clusters: (rows,) prompts.
    """
    y, g = np.asarray(right, dtype=np.float64), np.asarray(gaps, dtype=np.float64)
    spread = float(g.std())
    x = np.stack([np.ones_like(g), np.tanh(g / spread) if spread > 0 else np.zeros_like(g)], axis=1)
    beta = np.zeros(2)
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-(x @ beta)))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, x.T @ (y - p) - RIDGE * beta)
        beta = beta + np.clip(step, -2.0, 2.0)
    p = 1.0 / (1.0 + np.exp(-(x @ beta)))
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    k = int(member.max()) + 1
    scores = np.stack([np.bincount(member, weights=x[:, j] * (y - p)) for j in range(2)], axis=1)
    bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(2))
    variance = float((bread @ (scores.T @ scores) @ bread)[0, 0]) * (k / (k - 1) if k > 1 else 1.0)
    half = Z95 * math.sqrt(max(0.0, variance))
    rate, low, high = (1.0 / (1.0 + math.exp(-t)) for t in (beta[0], beta[0] - half, beta[0] + half))
    return Interval(float(rate), float(low), float(high))
