"""AlphaPO: closed forms, SimPO as its limit, finite for hopeless answers."""

from __future__ import annotations

import math

import pytest
import torch
from golden import ORDINARY, POINTS, check_golden, log_sigmoid, pairs, sigmoid

from penchant.losses.alpha_po import alpha_po, shaped_reward
from penchant.losses.simpo import simpo


def test_golden_values_and_gradients() -> None:
    beta, gamma, alpha = 2.5, 0.7, 0.25
    reward = lambda a: (1 - math.exp(-alpha * a)) / alpha  # noqa: E731
    z = lambda p: beta * (reward(p.aw) - reward(p.al)) - gamma  # noqa: E731
    check_golden(
        alpha_po,
        lambda p: -log_sigmoid(z(p)),
        lambda p: (
            -sigmoid(-z(p)) * beta * math.exp(-alpha * p.aw) / p.len_w,
            sigmoid(-z(p)) * beta * math.exp(-alpha * p.al) / p.len_l,
        ),
        ORDINARY,
        beta=beta,
        gamma=gamma,
        alpha=alpha,
    )


def test_alpha_towards_zero_is_simpo() -> None:
    expected = simpo(pairs(POINTS)).losses
    assert torch.equal(alpha_po(pairs(POINTS), alpha=0.0).losses, expected)
    assert torch.allclose(alpha_po(pairs(ORDINARY), alpha=1e-7).losses, simpo(pairs(ORDINARY)).losses, rtol=1e-5)


def test_small_alpha_keeps_its_digits_in_fp32() -> None:
    a = torch.tensor([-0.01])
    assert shaped_reward(a, 1e-4).item() == pytest.approx(-0.01, rel=1e-5)


def test_a_hopeless_answer_is_finite_in_fp32() -> None:
    a = torch.tensor([-1e4, -1.0], requires_grad=True)
    shaped_reward(a, 0.25).sum().backward()
    assert torch.isfinite(shaped_reward(a, 0.25)).all() and torch.isfinite(a.grad).all()
