"""Advantages, GAE and whitening: by hand, against plain loops, and in edge cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from penchant.algorithms.advantages import at_last_token, gae, group_normalized, kl_to_go, leave_one_out, whiten

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


def test_kl_to_go_sums_what_is_still_to_come() -> None:
    kl = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0], dtype=torch.float64)
    assert kl_to_go(kl, torch.tensor([3, 2])).tolist() == [6.0, 5.0, 3.0, 30.0, 20.0]
