"""Cal-DPO: closed forms."""

from __future__ import annotations

from golden import check_golden, log_sigmoid, sigmoid

from penchant.losses.cal_dpo import cal_dpo


def test_golden_values_and_gradients() -> None:
    beta = 0.2
    t = 1 / (2 * beta)
    check_golden(
        cal_dpo,
        lambda p: -log_sigmoid(p.h) + 0.5 * ((p.dw - t) ** 2 + (p.dl + t) ** 2),
        lambda p: (-sigmoid(-p.h) + (p.dw - t), sigmoid(-p.h) + (p.dl + t)),
        beta=beta,
        calibration=0.5,
    )
