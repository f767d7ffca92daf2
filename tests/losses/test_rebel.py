"""REBEL: closed forms, zero where the margin is the score gap."""

from __future__ import annotations

from golden import check_golden

from penchant.losses.rebel import rebel


def test_golden_values_and_gradients() -> None:
    eta = 2.0
    gap = lambda p: p.h / eta - (p.score_w - p.score_l)  # noqa: E731
    check_golden(rebel, lambda p: gap(p) ** 2, lambda p: (2 * gap(p) / eta, -2 * gap(p) / eta), eta=eta)
