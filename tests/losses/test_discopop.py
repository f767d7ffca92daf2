"""DiscoPOP: closed forms, its published extrema, no overflow."""

from __future__ import annotations

import math

import pytest
import torch
from golden import ORDINARY, check_golden, log_sigmoid, sigmoid

from penchant.losses.discopop import discopop
from penchant.types import PairLogps


def test_golden_values_and_gradients() -> None:
    beta, tau = 0.1, 0.3

    def loss(p):  # type: ignore[no-untyped-def]
        z = beta * p.h
        m = sigmoid(z / tau)
        return -(1 - m) * log_sigmoid(z) + m * math.exp(-z)

    def gradient(p):  # type: ignore[no-untyped-def]
        z = beta * p.h
        m = sigmoid(z / tau)
        slope = m * (1 - m) / tau
        g = beta * (-(1 - m) * sigmoid(-z) + slope * log_sigmoid(z) + slope * math.exp(-z) - m * math.exp(-z))
        return g, -g

    check_golden(discopop, loss, gradient, ORDINARY, beta=beta, tau=tau)


def test_the_papers_local_extrema() -> None:
    """With beta = tau = 0.05 the loss has a local minimum at h = -2.3714 and a local maximum at h = 1.44012 (its section 5)."""
    h = torch.linspace(-4, 3, 70_001, dtype=torch.float64)
    zero = torch.zeros_like(h)
    losses = discopop(PairLogps(h, zero, zero, zero), beta=0.05, tau=0.05).losses
    inner = losses[1:-1]
    lowest = h[1:-1][(inner < losses[:-2]) & (inner < losses[2:])]
    highest = h[1:-1][(inner > losses[:-2]) & (inner > losses[2:])]
    assert lowest.tolist() == pytest.approx([-2.3714], abs=2e-4)
    assert highest.tolist() == pytest.approx([1.44012], abs=2e-4)
