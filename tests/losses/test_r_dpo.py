"""R-DPO: closed forms; what is only longer is explained by its length."""

from __future__ import annotations

import torch
from golden import POINTS, check_golden, log_sigmoid, pairs, sigmoid

from penchant.losses.dpo import dpo
from penchant.losses.r_dpo import r_dpo


def test_golden_values_and_gradients() -> None:
    beta, alpha = 0.3, 0.05
    z = lambda p: beta * p.h + alpha * (p.len_w - p.len_l)  # noqa: E731
    check_golden(
        r_dpo,
        lambda p: -log_sigmoid(z(p)),
        lambda p: (-beta * sigmoid(-z(p)), beta * sigmoid(-z(p))),
        beta=beta,
        alpha=alpha,
    )


def test_no_penalty_is_dpo() -> None:
    assert torch.equal(r_dpo(pairs(POINTS), alpha=0.0).losses, dpo(pairs(POINTS)).losses)


def test_a_longer_chosen_answer_pulls_less() -> None:
    longer = POINTS[0]
    assert longer.len_w > longer.len_l
    with_penalty, without = (r_dpo(pairs([longer]), alpha=a).losses.item() for a in (0.1, 0.0))
    assert with_penalty < without
