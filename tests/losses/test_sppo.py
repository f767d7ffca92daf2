"""SPPO: closed forms, zero at its targets."""

from __future__ import annotations

from golden import check_golden

from penchant.losses.sppo import sppo


def test_golden_values_and_gradients() -> None:
    beta = 0.2
    t = 1 / (2 * beta)
    check_golden(
        sppo,
        lambda p: (p.dw - t) ** 2 + (p.dl + t) ** 2,
        lambda p: (2 * (p.dw - t), 2 * (p.dl + t)),
        beta=beta,
    )
