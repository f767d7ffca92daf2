"""SLiC: closed forms, the regulariser stays where the margin is reached."""

from __future__ import annotations

import torch
from golden import POINTS, check_golden, pairs

from penchant.losses.slic import slic


def test_golden_values_and_gradients() -> None:
    delta, reg = 2.0, 0.3

    def gradient(p):  # type: ignore[no-untyped-def]
        active = 1.0 if delta - p.w + p.l > 0 else 0.0
        return -active - reg, active

    check_golden(slic, lambda p: max(0.0, delta - p.w + p.l) - reg * p.w, gradient, delta=delta, reg_weight=reg)


def test_the_reference_does_not_matter() -> None:
    logps = pairs(POINTS)
    without = type(logps)(logps.policy_chosen_logps, logps.policy_rejected_logps)
    assert torch.equal(slic(logps).losses, slic(without).losses)
