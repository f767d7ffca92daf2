"""ORPO: closed forms, and log(1 - e^x) where it is hard."""

from __future__ import annotations

import math

import pytest
import torch
from golden import ORDINARY, check_golden, log_sigmoid, sigmoid

from penchant.losses.orpo import log1mexp, orpo


def test_golden_values_and_gradients() -> None:
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
