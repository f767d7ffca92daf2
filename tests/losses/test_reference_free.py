"""Losses on pairs without a reference: closed forms in float64, gradients, limits."""

from __future__ import annotations

import math

import pytest
import torch
from golden import ORDINARY, POINTS, check_golden, log_sigmoid, pairs, sigmoid

from penchant.losses.helpers import log1mexp
from penchant.losses.reference_free import alpha_po, cpo, orpo, shaped_reward, simpo, slic

# ---------------------------------------------------------------------------------------------------------------------
# SimPO: closed forms per token, the margin.


def test_golden_values_and_gradients_of_simpo() -> None:
    beta, gamma = 2.5, 1.4
    z = lambda p: beta * (p.aw - p.al) - gamma  # noqa: E731
    check_golden(
        simpo,
        lambda p: -log_sigmoid(z(p)),
        lambda p: (-sigmoid(-z(p)) * beta / p.len_w, sigmoid(-z(p)) * beta / p.len_l),
        beta=beta,
        gamma=gamma,
    )


# ---------------------------------------------------------------------------------------------------------------------
# AlphaPO: closed forms, SimPO as its limit, finite for extremely unlikely answers.


def test_golden_values_and_gradients_of_alpha_po() -> None:
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


# ---------------------------------------------------------------------------------------------------------------------
# ORPO: closed forms, and log(1 - e^x) where it is ill-conditioned.


def test_golden_values_and_gradients_of_orpo() -> None:
    beta = 0.4
    log_odds = lambda a: a - math.log1p(-math.exp(a))  # noqa: E731
    z = lambda p: log_odds(p.aw) - log_odds(p.al)  # noqa: E731
    slope = lambda a: 1 / (1 - math.exp(a))  # noqa: E731
    check_golden(
        orpo,
        lambda p: -p.aw - beta * log_sigmoid(z(p)),
        lambda p: (
            (-1 - beta * sigmoid(-z(p)) * slope(p.aw)) / p.len_w,
            beta * sigmoid(-z(p)) * slope(p.al) / p.len_l,
        ),
        ORDINARY,
        beta=beta,
    )


@pytest.mark.parametrize("x", [-1e-12, -1e-3, -0.6, -0.7, -5.0, -40.0, -800.0])
def test_log1mexp_has_no_cancellation(x: float) -> None:
    from decimal import Decimal, getcontext

    getcontext().prec = 400
    value = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    out = log1mexp(value)
    out.backward()
    exact = 1 - Decimal(x).exp()
    assert out.item() == pytest.approx(float(exact.ln()), rel=1e-13)
    assert value.grad.item() == pytest.approx(float(-Decimal(x).exp() / exact), rel=1e-12)


def test_a_certain_answer_is_finite() -> None:
    x = torch.zeros(1, requires_grad=True)
    log1mexp(x).sum().backward()
    assert math.isfinite(log1mexp(x).item()) and math.isfinite(x.grad.item())


# ---------------------------------------------------------------------------------------------------------------------
# CPO: closed forms, its two parts.


def test_golden_values_and_gradients_of_cpo() -> None:
    beta, alpha, eps = 0.2, 0.7, 0.1
    z = lambda p: beta * (p.w - p.l)  # noqa: E731

    def gradient(p):  # type: ignore[no-untyped-def]
        g = beta * (-(1 - eps) * sigmoid(-z(p)) + eps * sigmoid(z(p)))
        return g - alpha / p.len_w, -g

    check_golden(
        cpo,
        lambda p: -(1 - eps) * log_sigmoid(z(p)) - eps * log_sigmoid(-z(p)) - alpha * p.aw,
        gradient,
        beta=beta,
        alpha=alpha,
        label_smoothing=eps,
    )


# ---------------------------------------------------------------------------------------------------------------------
# SLiC: closed forms, the regularizer remains once the margin is reached.


def test_golden_values_and_gradients_of_slic() -> None:
    delta, reg = 2.0, 0.3

    def gradient(p):  # type: ignore[no-untyped-def]
        active = 1.0 if delta - p.w + p.l > 0 else 0.0
        return -active - reg, active

    check_golden(slic, lambda p: max(0.0, delta - p.w + p.l) - reg * p.w, gradient, delta=delta, reg_weight=reg)


def test_the_reference_does_not_matter() -> None:
    logps = pairs(POINTS)
    without = type(logps)(logps.policy_chosen_logps, logps.policy_rejected_logps)
    assert torch.equal(slic(logps).losses, slic(without).losses)
