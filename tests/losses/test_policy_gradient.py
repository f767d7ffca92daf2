"""Clipped surrogates, importance weights and the value loss: by hand, and in edge cases."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch

from penchant.losses.policy_gradient import (
    cispo_surrogate,
    clipped_surrogate,
    clipped_value_loss,
    importance_weights,
    sequence_log_ratio,
)

F64 = torch.float64
LOGPS = torch.tensor([-1.0, -0.5, -2.0, -0.1, -3.0], dtype=torch.float64)
OLD = torch.tensor([-1.2, -0.5, -1.0, -0.4, -2.0], dtype=torch.float64)
LENGTHS = torch.tensor([3, 2])


@pytest.mark.parametrize(
    "ratio,advantage,loss,slope,bound",
    [
        (1.1, 2.0, -2.2, -2.2, 0.0),
        (1.5, 2.0, -2.4, 0.0, 1.0),  # good and already too likely: no gradient
        (1.5, -2.0, 3.0, 3.0, 0.0),  # bad and too likely: full gradient
        (0.5, -2.0, 1.6, 0.0, 1.0),
        (0.5, 2.0, -1.0, -1.0, 0.0),
    ],
)
def test_the_surrogate_by_hand(ratio: float, advantage: float, loss: float, slope: float, bound: float) -> None:
    logps = torch.tensor([math.log(ratio)], dtype=F64, requires_grad=True)
    losses, ratios, clipped = clipped_surrogate(logps, torch.zeros(1, dtype=F64), torch.tensor([advantage], dtype=F64))
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss) and logps.grad.item() == pytest.approx(slope)
    assert ratios.item() == pytest.approx(ratio) and clipped.item() == bound


def test_on_policy_the_surrogates_gradient_is_reinforce() -> None:
    logps = torch.randn(6, dtype=F64, requires_grad=True)
    advantages = torch.randn(6, dtype=F64)
    clipped_surrogate(logps, logps.detach(), advantages)[0].sum().backward()
    assert torch.allclose(logps.grad, -advantages)


def test_an_upper_clip_of_its_own() -> None:
    logps, one = torch.tensor([math.log(1.25)], dtype=F64), torch.ones(1, dtype=F64)
    assert clipped_surrogate(logps, 0 * one, one, clip_high=0.28)[0].item() == pytest.approx(-1.25)
    assert clipped_surrogate(logps, 0 * one, one)[0].item() == pytest.approx(-1.2)


def test_a_log_ratio_far_off_is_finite() -> None:
    for d in (1e4, -1e4):
        logps = torch.tensor([d], requires_grad=True)
        losses, _, _ = clipped_surrogate(logps, torch.zeros(1), torch.tensor([-1.0]))
        losses.sum().backward()
        assert torch.isfinite(losses).all() and torch.isfinite(logps.grad).all()


def test_the_value_loss_by_hand() -> None:
    values = torch.tensor([1.5, 0.9], dtype=F64, requires_grad=True)
    losses, bound = clipped_value_loss(values, torch.ones(2, dtype=F64), torch.tensor([2.0, 0.0], dtype=F64))
    assert losses.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 0.9**2]) and bound.tolist() == [1.0, 0.0]
    losses.sum().backward()
    assert values.grad.tolist() == pytest.approx([0.0, 0.9])
    plain, _ = clipped_value_loss(values.detach(), torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64), clip=None)
    assert plain.tolist() == pytest.approx([0.5 * 1.5**2, 0.5 * 0.81])


def test_gspos_ratio_is_the_geometric_mean_of_the_tokens_ratios() -> None:
    found = sequence_log_ratio(LOGPS, OLD, LENGTHS)
    assert found.tolist() == pytest.approx([(0.2 + 0.0 - 1.0) / 3, (0.3 - 1.0) / 2], rel=1e-14)
    assert torch.autograd.gradcheck(lambda x: sequence_log_ratio(x, OLD, LENGTHS).exp(), LOGPS.clone().requires_grad_())


def test_cispo_by_hand_and_its_gradient() -> None:
    """-sg[min(ratio, 1 + eps)] A grad log pi: a clipped token keeps its gradient, which PPO's does not."""
    logps = LOGPS.clone().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 2.0, 2.0, -0.5], dtype=torch.float64)
    losses, ratios, bound = cispo_surrogate(logps, OLD, advantages, clip_high=0.2)
    weights = [min(math.exp(d), 1.2) for d in (0.2, 0.0, -1.0, 0.3, -1.0)]
    assert losses.tolist() == pytest.approx(
        [-w * a * x for w, a, x in zip(weights, advantages.tolist(), LOGPS.tolist(), strict=True)]
    )
    assert bound.tolist() == [1.0, 0.0, 0.0, 1.0, 0.0] and ratios.tolist() == pytest.approx(
        [math.exp(d) for d in (0.2, 0.0, -1.0, 0.3, -1.0)]
    )
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    assert gradient.tolist() == pytest.approx([-w * a for w, a in zip(weights, advantages.tolist(), strict=True)])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [(5.0, -1.0, 3.0, 0.0), (2.0, -1.0, 2.0, 2.0), (5.0, 1.0, -1.2, 0.0), (0.5, -1.0, 0.8, 0.0)],
)
def test_the_dual_clip_bounds_a_negative_advantage(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logps = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    found, _, bound = clipped_surrogate(logps, torch.zeros_like(logps), torch.tensor([advantage]).double(), dual=3.0)
    (gradient,) = torch.autograd.grad(found.sum(), logps)
    assert (found.item(), gradient.item()) == pytest.approx((loss, slope)) and bool(bound) == (slope == 0.0)


def test_importance_weights_from_closed_form() -> None:
    """Ratios 2, 1/2, 4 of one completion (product 4) and 1/4 of another."""
    ratio = torch.tensor([2.0, 0.5, 4.0, 0.25], dtype=F64)
    logps = torch.tensor([-1.0, -2.0, -0.5, -3.0], dtype=F64, requires_grad=True)
    sampled, lengths = logps.detach() - ratio.log(), torch.tensor([3, 1])

    def weights(**how: Any) -> list[float]:
        made = importance_weights(logps, sampled, lengths, **how)
        assert not made.requires_grad
        return [pytest.approx(v, rel=1e-14) for v in made.tolist()]

    assert weights(kind="tis", high=3.0) == [2.0, 0.5, 3.0, 0.25]
    assert weights(kind="mis", high=3.0) == [2.0, 0.5, 0.0, 0.25]
    assert weights(kind="mis", low=0.4, high=3.0) == [2.0, 0.5, 0.0, 0.0]
    assert weights(kind="tis", level="sequence", high=3.0) == [3.0, 3.0, 3.0, 0.25]
    assert weights(kind="mis", level="sequence", high=3.0) == [0.0, 0.0, 0.0, 0.25]
    assert weights(kind="mis", level="sequence", high=5.0) == [4.0, 4.0, 4.0, 0.25]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_untruncated_weights_give_the_gradient_of_the_policys_own_expectation(
    level: Literal["token", "sequence"],
) -> None:
    """Over all one-token completions, weighted by their probability under mu, the gradient is that of sum_y pi(y) A(y)."""
    torch.manual_seed(0)
    logits, mu = torch.randn(5, dtype=F64, requires_grad=True), torch.randn(5, dtype=F64).log_softmax(0)
    advantages = torch.randn(5, dtype=F64)
    logps = logits.log_softmax(0)
    weights = importance_weights(logps, mu, torch.ones(5, dtype=torch.int64), kind="tis", level=level, high=1e9)
    losses, _, _ = clipped_surrogate(logps, logps.detach(), advantages)
    (got,) = torch.autograd.grad((mu.exp() * weights * losses).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(logps.exp() * advantages).sum(), logits)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-14)
