"""Estimators of KL(policy || reference) from tokens that the policy sampled (Schulman, "Approximating KL divergence", 2020)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from penchant.losses.checks import require_vectors

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: Estimator = "k3") -> Tensor:
    """Per-token KL estimate.

    With ``d = log pi(y_t) - log ref(y_t)``: ``k1 = d`` (unbiased, may be negative), ``k2 = d^2 / 2`` (biased, never
    negative, low variance), ``k3 = e^(-d) - 1 + d`` (unbiased, never negative).

    Args:
        logps, ref_logps: (R,) of tokens sampled from pi, nats.

    Returns:
        (R,) in nats; k3's exponent is held at 20, where a token is e^20 times as likely under the reference.

    Raises:
        ValueError: the shapes differ or the estimator is unknown.
    """
    require_vectors(logps, ref_logps)
    d = logps - ref_logps
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        return torch.expm1((-d).clamp(max=20.0)) + d
    raise ValueError(f"{estimator!r} is none of k1, k2, k3")
