"""LD-DPO: closed forms, alpha 1 is DPO, alpha 0 forgets the tail."""

from __future__ import annotations

import pytest
import torch
from golden import POINTS, check_golden, log_sigmoid, pairs, sigmoid

from penchant.losses.dpo import dpo
from penchant.losses.ld_dpo import ld_dpo


def test_golden_values_and_gradients() -> None:
    beta, alpha = 0.3, 0.4

    def z(p):  # type: ignore[no-untyped-def]
        dw = (1 - alpha) * (p.shared_w - p.ref_shared_w) + alpha * p.dw
        dl = (1 - alpha) * (p.shared_l - p.ref_shared_l) + alpha * p.dl
        return beta * (dw - dl)

    check_golden(
        ld_dpo,
        lambda p: -log_sigmoid(z(p)),
        lambda p: (-alpha * beta * sigmoid(-z(p)), alpha * beta * sigmoid(-z(p))),
        beta=beta,
        alpha=alpha,
    )


def test_the_shared_tokens_carry_gradient_too() -> None:
    logps = pairs(POINTS[:1], grad=True)
    ld_dpo(logps, alpha=0.25).losses.sum().backward()
    whole, first = logps.policy_chosen_logps.grad, logps.policy_chosen_shared_logps.grad
    assert first.item() == pytest.approx(3 * whole.item(), rel=1e-12)


def test_alpha_1_is_dpo() -> None:
    assert torch.allclose(ld_dpo(pairs(POINTS), alpha=1.0).losses, dpo(pairs(POINTS)).losses, rtol=1e-14)
