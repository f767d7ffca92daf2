"""WPO: closed forms; the weight is held at one and carries no gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from golden import POINTS, Point, check_golden, log_sigmoid, pairs, sigmoid

from penchant.losses.dpo import dpo
from penchant.losses.wpo import wpo


def test_golden_values_and_gradients() -> None:
    beta = 0.3
    weight = lambda p: min(1.0, math.exp(p.align_w + p.align_l))  # noqa: E731
    check_golden(
        wpo,
        lambda p: -weight(p) * log_sigmoid(beta * p.h),
        lambda p: (-weight(p) * beta * sigmoid(-beta * p.h), weight(p) * beta * sigmoid(-beta * p.h)),
        beta=beta,
    )


def test_fully_on_policy_is_dpo() -> None:
    points = [Point(p.w, p.l, p.ref_w, p.ref_l, align_w=0.3, align_l=-0.1) for p in POINTS]
    assert torch.equal(wpo(pairs(points)).losses, dpo(pairs(points)).losses)


def test_the_weight_carries_no_gradient() -> None:
    logps = pairs(POINTS[:1])
    alignment = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
    out = wpo(
        replace(logps, policy_chosen_logps=logps.policy_chosen_logps.requires_grad_(), chosen_alignment=alignment)
    )
    out.losses.sum().backward()
    assert alignment.grad is None
