"""Robust DPO: closed forms, its limit, and what it is for."""

from __future__ import annotations

import torch
from golden import POINTS, check_golden, log_sigmoid, pairs, sigmoid

from penchant.losses.dpo import dpo
from penchant.losses.rdpo import rdpo


def test_golden_values_and_gradients() -> None:
    beta, eps = 0.3, 0.2

    def gradient(p):  # type: ignore[no-untyped-def]
        z = beta * p.h
        g = beta * (-(1 - eps) * sigmoid(-z) - eps * sigmoid(z)) / (1 - 2 * eps)
        return g, -g

    def loss(p):  # type: ignore[no-untyped-def]
        z = beta * p.h
        return (-(1 - eps) * log_sigmoid(z) + eps * log_sigmoid(-z)) / (1 - 2 * eps)

    check_golden(rdpo, loss, gradient, beta=beta, label_smoothing=eps)


def test_no_flips_is_dpo() -> None:
    assert torch.equal(rdpo(pairs(POINTS), label_smoothing=0.0).losses, dpo(pairs(POINTS)).losses)


def test_its_expectation_over_flipped_labels_is_dpo_on_clean_ones() -> None:
    eps = 0.2
    logps = pairs(POINTS[:3])
    flipped = type(logps)(
        logps.policy_rejected_logps, logps.policy_chosen_logps, logps.ref_rejected_logps, logps.ref_chosen_logps
    )
    expected = (1 - eps) * rdpo(logps, label_smoothing=eps).losses + eps * rdpo(flipped, label_smoothing=eps).losses
    assert torch.allclose(expected, dpo(logps).losses, rtol=1e-12)
