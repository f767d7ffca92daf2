"""Advantages, GAE, whitening and the clipped surrogate: by hand, against plain loops, and in edge cases."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch

from penchant.losses.policy_gradient import (
    at_last_token,
    cispo_surrogate,
    clipped_surrogate,
    clipped_value_loss,
    gae,
    group_normalized,
    importance_weights,
    kl_to_go,
    leave_one_out,
    sequence_log_ratio,
    whiten,
)

F64 = torch.float64


def test_leave_one_out_by_hand() -> None:
    got = leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]], dtype=F64))
    assert got.tolist() == [[pytest.approx(v) for v in (1 - 4, 2 - 3.5, 6 - 1.5)], [0.0, 0.0, 0.0]]


def test_group_normalized_by_hand_and_its_variants() -> None:
    r = torch.tensor([[1.0, 3.0], [0.0, 8.0]], dtype=F64)
    assert group_normalized(r, eps=0.0)[0].tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)])
    assert group_normalized(r, "none").tolist() == [[-1.0, 1.0], [-4.0, 4.0]]
    spread = torch.tensor([1.0, 3.0, 0.0, 8.0], dtype=F64).std()
    assert torch.allclose(group_normalized(r, "batch", eps=0.0), group_normalized(r, "none") / spread)
    # equal rewards give zero advantage, without a division by zero
    assert group_normalized(torch.ones(1, 4)).tolist() == [[0.0] * 4]


@pytest.mark.parametrize("fn", [leave_one_out, group_normalized])
def test_equal_rewards_teach_exactly_nothing(fn: Any) -> None:
    """Their mean may differ from them by rounding, which dividing by eps would amplify."""
    for k in range(2, 9):
        equal = torch.full((1, k), 1e6 + 0.1, dtype=torch.float64)
        assert not fn(equal).any()
        equal[0, 0] = torch.nan
        assert not fn(equal).any()


@pytest.mark.parametrize("fn", [leave_one_out, group_normalized])
def test_a_group_of_one_is_refused(fn) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="k >= 2"):
        fn(torch.ones(3, 1))


def gae_by_loops(r: list[float], v: list[float], gamma: float, lam: float) -> list[float]:
    out = [0.0] * len(r)
    for t in range(len(r)):
        for k in range(t, len(r)):
            after = v[k + 1] if k + 1 < len(r) else 0.0
            out[t] += (gamma * lam) ** (k - t) * (r[k] + gamma * after - v[k])
    return out


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_equals_its_definition_for_unequal_lengths(gamma: float, lam: float) -> None:
    lengths = [3, 1, 5, 2]
    g = torch.Generator().manual_seed(0)
    r, v = (torch.randn(11, generator=g, dtype=F64) for _ in range(2))
    expected = [
        a
        for x, y in zip(r.split(lengths), v.split(lengths), strict=True)
        for a in gae_by_loops(x.tolist(), y.tolist(), gamma, lam)
    ]
    advantages, returns = gae(r, v, torch.tensor(lengths), gamma=gamma, lam=lam)
    assert advantages.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert torch.allclose(returns, advantages + v)


def test_gae_at_lambda_1_is_the_reward_to_go() -> None:
    rewards = at_last_token(torch.tensor([2.0, -1.0], dtype=F64), torch.tensor([3, 2]))
    _, returns = gae(rewards, torch.randn(5, dtype=F64), torch.tensor([3, 2]), lam=1.0)
    assert returns.tolist() == pytest.approx([2.0, 2.0, 2.0, -1.0, -1.0])


def test_gae_refuses_lengths_that_do_not_add_up() -> None:
    for lengths in ([2, 2], [3, 0]):
        with pytest.raises(ValueError, match="add up"):
            gae(torch.zeros(3), torch.zeros(3), torch.tensor([*lengths, 0]))


def test_rewards_land_on_the_last_real_token() -> None:
    assert at_last_token(torch.tensor([5.0, 7.0, 9.0]), torch.tensor([1, 3, 2])).tolist() == [5, 0, 0, 7, 0, 9]


def test_whitening() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=F64)
    y = whiten(x)
    assert y.mean().item() == pytest.approx(0.0, abs=1e-15) and y.var().item() == pytest.approx(1.0, rel=1e-6)
    assert whiten(x, keep_mean=True).mean().item() == pytest.approx(3.0)
    assert whiten(torch.ones(1)).tolist() == [0.0]
    assert torch.isfinite(whiten(torch.ones(5))).all()


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


# ---- unknown rewards, and the surrogates of 2025: numbers by hand from the papers' formulas ----


def test_unknown_rewards_are_in_nobodys_mean() -> None:
    nan = float("nan")
    some = torch.tensor([[1.0, nan, 4.0, 1.0], [2.0, nan, nan, nan]], dtype=torch.float64)
    by_others = leave_one_out(some)
    assert (
        torch.equal(by_others[0], torch.tensor([-1.5, 0.0, 3.0, -1.5], dtype=torch.float64)) and not by_others[1].any()
    )
    std = math.sqrt(3.0)  # of 1, 4, 1
    assert group_normalized(some)[0].tolist() == pytest.approx(
        [-1 / (std + 1e-4), 0.0, 2 / (std + 1e-4), -1 / (std + 1e-4)]
    )
    whole = torch.tensor([1.0, 4.0, 1.0, 2.0], dtype=torch.float64).std()
    assert group_normalized(some, "batch")[0, 2].item() == pytest.approx(2 / (whole.item() + 1e-4))
    known = some[:, [0, 2, 3]][:1]
    assert torch.equal(group_normalized(some, "none")[0, [0, 2, 3]], group_normalized(known, "none")[0])


LOGPS = torch.tensor([-1.0, -0.5, -2.0, -0.1, -3.0], dtype=torch.float64)
OLD = torch.tensor([-1.2, -0.5, -1.0, -0.4, -2.0], dtype=torch.float64)
LENGTHS = torch.tensor([3, 2])


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


def test_kl_to_go_sums_what_is_still_to_come() -> None:
    kl = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0], dtype=torch.float64)
    assert kl_to_go(kl, LENGTHS).tolist() == [6.0, 5.0, 3.0, 30.0, 20.0]


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
