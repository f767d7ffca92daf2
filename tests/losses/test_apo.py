"""APO: closed forms of both directions."""

from __future__ import annotations

from golden import check_golden, sigmoid

from penchant.losses.apo import apo_down, apo_zero


def _slope(x: float) -> float:
    return sigmoid(x) * sigmoid(-x)


def test_zero_golden_values_and_gradients() -> None:
    b = 0.3
    check_golden(
        apo_zero,
        lambda p: sigmoid(-b * p.dw) + sigmoid(b * p.dl),
        lambda p: (-b * _slope(b * p.dw), b * _slope(b * p.dl)),
        beta=b,
    )


def test_down_golden_values_and_gradients() -> None:
    b = 0.3
    check_golden(
        apo_down,
        lambda p: sigmoid(b * p.dw) + sigmoid(-b * p.h),
        lambda p: (b * _slope(b * p.dw) - b * _slope(b * p.h), b * _slope(b * p.h)),
        beta=b,
    )
