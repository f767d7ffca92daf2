"""chi-PO: closed forms inside the clip, no gradient beyond it."""

from __future__ import annotations

import math

import pytest
from golden import POINTS, Point, check_golden, log_sigmoid, pairs, sigmoid

from penchant.losses.chi_po import chi_po


def test_golden_values_and_gradients() -> None:
    beta, r_max = 0.2, 3.0
    phi = lambda d: math.exp(d) + d  # noqa: E731
    inside = [Point(-10.0, -9.0, -11.0, -8.0), Point(-10.0, -9.0, -9.0, -10.5), Point(-3.0, -4.0, -3.0, -4.0)]
    z = lambda p: beta * (phi(p.dw) - phi(p.dl))  # noqa: E731
    assert all(abs(z(p)) < 2 * r_max for p in inside)
    check_golden(
        chi_po,
        lambda p: -log_sigmoid(z(p)),
        lambda p: (
            -beta * sigmoid(-z(p)) * (1 + math.exp(p.dw)),
            beta * sigmoid(-z(p)) * (1 + math.exp(p.dl)),
        ),
        inside,
        beta=beta,
        r_max=r_max,
    )


def test_beyond_the_clip() -> None:
    logps = pairs(POINTS[3:], grad=True)
    out = chi_po(logps, r_max=3.0)
    assert out.losses.tolist() == pytest.approx([-log_sigmoid(-6.0), -log_sigmoid(6.0)], rel=1e-12)
    out.losses.sum().backward()
    assert not logps.policy_chosen_logps.grad.any()
