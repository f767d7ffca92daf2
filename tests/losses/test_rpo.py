"""RPO: closed forms, DPO as its limit."""

from __future__ import annotations

import torch
from golden import POINTS, check_golden, log_sigmoid, pairs, sigmoid

from penchant.losses.dpo import dpo
from penchant.losses.rpo import rpo


def test_golden_values_and_gradients() -> None:
    beta, alpha = 0.3, 0.6
    check_golden(
        rpo,
        lambda p: -log_sigmoid(beta * p.h) - alpha * p.aw,
        lambda p: (-beta * sigmoid(-beta * p.h) - alpha / p.len_w, beta * sigmoid(-beta * p.h)),
        beta=beta,
        alpha=alpha,
    )


def test_no_likelihood_term_is_dpo() -> None:
    assert torch.equal(rpo(pairs(POINTS), alpha=0.0).losses, dpo(pairs(POINTS)).losses)
