"""DPOP: closed forms with and without a lost chosen answer; no penalty is DPO."""

from __future__ import annotations

import torch
from golden import POINTS, check_golden, log_sigmoid, pairs, sigmoid

from penchant.losses.dpo import dpo
from penchant.losses.dpop import dpop


def test_golden_values_and_gradients() -> None:
    beta, penalty = 0.05, 5.0
    z = lambda p: beta * (p.h - penalty * max(0.0, -p.dw))  # noqa: E731

    def gradient(p):  # type: ignore[no-untyped-def]
        s = beta * sigmoid(-z(p))
        return -s * (1 + (penalty if p.dw < 0 else 0.0)), s

    check_golden(dpop, lambda p: -log_sigmoid(z(p)), gradient, beta=beta, penalty=penalty)


def test_no_penalty_is_dpo() -> None:
    assert torch.equal(dpop(pairs(POINTS), penalty=0.0).losses, dpo(pairs(POINTS)).losses)
