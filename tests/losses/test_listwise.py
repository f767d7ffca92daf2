"""Losses on lists: the papers' sums with plain loops and permutations, limits, ties, and padding of short lists."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from penchant.losses.listwise import lipo, plackett_luce
from penchant.losses.pairwise import dpo
from penchant.types import ListLogps, LossOutput, PairLogps

POLICY = [[-10.0, -9.0, -14.0, -8.5], [-3.0, -5.0, -4.0, 0.0], [-700.0, -20.0, -21.0, -19.0]]
REF = [[-12.0, -8.0, -13.4, -9.0], [-4.0, -4.5, -4.0, 0.0], [-20.0, -650.0, -21.5, -18.0]]
SCORES = [[3.0, 2.0, 1.0, 0.5], [0.9, 0.4, 0.1, 0.0], [0.2, 0.3, 1.0, 0.1]]
SIZES = [4, 3, 4]


def lists(policy: torch.Tensor | None = None, scores: list[list[float]] = SCORES) -> ListLogps:
    t = lambda v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    present = torch.arange(4) < torch.tensor(SIZES)[:, None]
    return ListLogps(t(POLICY) if policy is None else policy, present, t(REF), t(scores))


def rewards(row: int, beta: float) -> list[float]:
    return [beta * (p - r) for p, r in zip(POLICY[row], REF[row], strict=True)][: SIZES[row]]


def by_order(row: int, beta: float) -> float:
    """-log of the probability of drawing the answers in order, each from those remaining."""
    r = rewards(row, beta)
    order = sorted(range(len(r)), key=lambda i: -SCORES[row][i])
    total = 0.0
    for at, i in enumerate(order):
        top = max(r[j] for j in order[at:])
        total += top + math.log(sum(math.exp(r[j] - top) for j in order[at:])) - r[i]
    return total


def by_pairs(row: int, beta: float, scores: list[float]) -> float:
    r = rewards(row, beta)
    rank = {i: 1 + sum(r[j] > r[i] for j in range(len(r))) for i in range(len(r))}
    total = 0.0
    for i, j in itertools.permutations(range(len(r)), 2):
        if scores[i] > scores[j]:
            gain = abs((2 ** scores[i] - 1) - (2 ** scores[j] - 1))
            discount = abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
            x = r[i] - r[j]
            total += gain * discount * (math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x)))
    return total


def test_plackett_luce_is_the_likelihood_of_the_order() -> None:
    out = plackett_luce(lists(), beta=0.3)
    assert out.losses.tolist() == pytest.approx([by_order(i, 0.3) for i in range(3)], rel=1e-12)
    # the probabilities of all orders of a list sum to one
    total = 0.0
    for scores in itertools.permutations([4.0, 3.0, 2.0, 1.0]):
        total += math.exp(-plackett_luce(lists(scores=[list(scores)] * 3), beta=0.3).losses[0].item())
    assert total == pytest.approx(1.0, rel=1e-12)


def test_lipo_is_the_papers_sum_over_pairs() -> None:
    out = lipo(lists(), beta=0.3, gains="scores")
    assert out.losses.tolist() == pytest.approx([by_pairs(i, 0.3, SCORES[i]) for i in range(3)], rel=1e-12)
    between = []
    for row, size in zip(SCORES, SIZES, strict=True):
        low, high = min(row[:size]), max(row[:size])
        between.append([(s - low) / (high - low) for s in row[:size]])
    expected = [by_pairs(i, 0.3, between[i]) for i in range(3)]
    assert lipo(lists(), beta=0.3).losses.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", [plackett_luce, lipo])
def test_the_gradient_is_the_closed_forms(loss: Callable[..., LossOutput]) -> None:
    """By central differences of the plain loops above."""
    policy = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)
    more = {"gains": "scores"} if loss is lipo else {}
    loss(lists(policy), beta=0.3, **more).losses.sum().backward()
    assert policy.grad is not None
    plain = (lambda row: by_pairs(row, 0.3, SCORES[row])) if loss is lipo else (lambda row: by_order(row, 0.3))
    for row in (0, 1):  # the third is too extreme for finite differences
        for i in range(4):
            kept, ends = POLICY[row][i], []
            for step in (1e-5, -1e-5):
                POLICY[row][i] = kept + step
                ends.append(plain(row))
            POLICY[row][i] = kept
            assert policy.grad[row, i].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-8)


def test_two_answers_are_dpo() -> None:
    t = lambda *v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    w, l, ref_w, ref_l = t(-10.0, -3.0), t(-9.0, -40.0), t(-12.0, -3.5), t(-8.0, -41.0)  # noqa: E741
    both = lambda a, b: torch.stack([b, a], 1)  # noqa: E731  the better answer stands second: the order says nothing
    given = ListLogps(
        both(w, l), torch.ones(2, 2, dtype=torch.bool), both(ref_w, ref_l), both(t(1.0, 5.0), t(0.0, 3.0))
    )
    expected = dpo(PairLogps(w, l, ref_w, ref_l), beta=0.2)
    of_pl, of_lipo = plackett_luce(given, beta=0.2), lipo(given, beta=0.2)
    assert torch.allclose(of_pl.losses, expected.losses, rtol=1e-13)
    constant = 1 / math.log(2) - 1 / math.log(3)
    assert torch.allclose(of_lipo.losses, constant * expected.losses, rtol=1e-13)
    for name, (values, _) in expected.metrics.items():
        assert torch.allclose(of_pl.metrics[name][0], values, rtol=1e-13), name


def test_answers_of_equal_score_may_stand_in_any_order() -> None:
    scores = [[2.0, 1.0, 1.0, 0.0]] * 3
    one = plackett_luce(lists(scores=scores), beta=0.3).losses[0]
    turned = lists(scores=scores)
    order = torch.tensor([0, 2, 1, 3])
    turned = ListLogps(turned.policy_logps[:, order], turned.present, turned.ref_logps[:, order], turned.scores)  # type: ignore[index]
    assert plackett_luce(turned, beta=0.3).losses[0].item() == pytest.approx(one.item(), rel=1e-14)


@pytest.mark.parametrize("loss", [plackett_luce, lipo])
def test_what_fills_a_list_up_counts_for_nothing(loss: Callable[..., LossOutput]) -> None:
    x = lists()
    absent = ~x.present
    others = ListLogps(
        *(x.policy_logps.masked_fill(absent, -77.0), x.present),
        *(v.masked_fill(absent, 55.0) for v in (x.ref_logps, x.scores) if v is not None),
    )
    a, b = loss(x, beta=0.3), loss(others, beta=0.3)
    assert torch.equal(a.losses, b.losses)
    assert all(torch.equal(v, b.metrics[name][0]) for name, (v, _) in a.metrics.items())


def test_accuracy_is_the_share_of_pairs_in_the_right_order() -> None:
    right = plackett_luce(lists(), beta=1.0).metrics["rewards/accuracies"][0]
    # d of the first list is 2, -1, -0.6, 0.5 where scores fall: 3 of 6 pairs are right; of the second 1, -0.5, 0
    assert right[:2].tolist() == pytest.approx([3 / 6, 2 / 3])
