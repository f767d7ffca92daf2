"""NCA: closed forms."""

from __future__ import annotations

from golden import check_golden, log_sigmoid, sigmoid

from penchant.losses.nca import nca


def test_golden_values_and_gradients() -> None:
    b = 0.3
    check_golden(
        nca,
        lambda p: -log_sigmoid(b * p.dw) - 0.5 * log_sigmoid(-b * p.dw) - 0.5 * log_sigmoid(-b * p.dl),
        lambda p: (b * (-sigmoid(-b * p.dw) + 0.5 * sigmoid(b * p.dw)), 0.5 * b * sigmoid(b * p.dl)),
        beta=b,
    )
