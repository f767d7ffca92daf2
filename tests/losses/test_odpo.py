"""ODPO: closed forms of both offsets, no offset is DPO, a gap that is none is refused."""

from __future__ import annotations

import math

import pytest
import torch
from golden import POINTS, Point, check_golden, log_sigmoid, pairs, sigmoid

from penchant.losses.dpo import dpo
from penchant.losses.odpo import odpo


@pytest.mark.parametrize("offset", ["log", "linear"])
def test_golden_values_and_gradients(offset: str) -> None:
    beta, alpha = 0.3, 0.8
    f = math.log if offset == "log" else float
    z = lambda p: beta * p.h - alpha * f(p.score_w - p.score_l)  # noqa: E731
    check_golden(
        odpo,
        lambda p: -log_sigmoid(z(p)),
        lambda p: (-beta * sigmoid(-z(p)), beta * sigmoid(-z(p))),
        beta=beta,
        alpha=alpha,
        offset=offset,
    )


def test_no_offset_is_dpo() -> None:
    assert torch.equal(odpo(pairs(POINTS), alpha=0.0).losses, dpo(pairs(POINTS)).losses)


@pytest.mark.parametrize("rejected", [1.0, 2.0])
def test_a_chosen_answer_that_scores_no_higher_is_refused(rejected: float) -> None:
    with pytest.raises(ValueError, match="above rejected_scores"):
        odpo(pairs([Point(-1.0, -1.0, -1.0, -1.0, score_w=1.0, score_l=rejected)]))
