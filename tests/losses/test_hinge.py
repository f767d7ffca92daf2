"""RSO's hinge: closed forms on both sides of the corner."""

from __future__ import annotations

from golden import check_golden

from penchant.losses.hinge import hinge


def test_golden_values_and_gradients() -> None:
    beta = 0.25
    active = lambda p: 1 - beta * p.h > 0  # noqa: E731
    check_golden(
        hinge,
        lambda p: max(0.0, 1 - beta * p.h),
        lambda p: (-beta, beta) if active(p) else (0.0, 0.0),
        beta=beta,
    )
