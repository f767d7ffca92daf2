"""EXO: closed forms; it is a KL, so never negative and zero at its target."""

from __future__ import annotations

import math

import pytest
from golden import ORDINARY, POINTS, check_golden, log_sigmoid, pairs, sigmoid

from penchant.losses.exo import exo


def test_golden_values_and_gradients() -> None:
    beta, eps = 0.3, 0.05

    def loss(p):  # type: ignore[no-untyped-def]
        z = beta * p.h
        return sigmoid(z) * (log_sigmoid(z) - math.log(1 - eps)) + sigmoid(-z) * (log_sigmoid(-z) - math.log(eps))

    def gradient(p):  # type: ignore[no-untyped-def]
        z = beta * p.h  # d/dz = s (1 - s) (z - log((1 - eps) / eps))
        g = beta * sigmoid(z) * sigmoid(-z) * (z - math.log((1 - eps) / eps))
        return g, -g

    check_golden(exo, loss, gradient, ORDINARY, beta=beta, label_smoothing=eps)


def test_it_is_zero_at_its_target_and_positive_elsewhere() -> None:
    eps = 0.1
    beta = math.log((1 - eps) / eps) / POINTS[0].h
    assert exo(pairs(POINTS[:1]), beta=beta, label_smoothing=eps).losses.item() == pytest.approx(0.0, abs=1e-15)
    assert (exo(pairs(POINTS)).losses > 0).all()
