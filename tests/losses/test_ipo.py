"""IPO: the target margin, per token and summed."""

from __future__ import annotations

import pytest
from golden import POINTS, check_golden, pairs

from penchant.losses.ipo import ipo


def test_golden_values_and_gradients_of_sums() -> None:
    beta = 0.2
    gap = lambda p: p.h - 1 / (2 * beta)  # noqa: E731
    check_golden(ipo, lambda p: gap(p) ** 2, lambda p: (2 * gap(p), -2 * gap(p)), beta=beta, average=False)


def test_golden_values_and_gradients_per_token() -> None:
    beta = 0.2
    gap = lambda p: p.dw / p.len_w - p.dl / p.len_l - 1 / (2 * beta)  # noqa: E731
    check_golden(ipo, lambda p: gap(p) ** 2, lambda p: (2 * gap(p) / p.len_w, -2 * gap(p) / p.len_l), beta=beta)


def test_the_target_is_reached_at_zero_loss() -> None:
    logps = pairs(POINTS[:1])
    assert ipo(logps, beta=1 / (2 * POINTS[0].h), average=False).losses.item() == pytest.approx(0.0, abs=1e-24)
