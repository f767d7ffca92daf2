"""AOT: sorted by hand, row by row; one pair is DPO."""

from __future__ import annotations

import pytest
import torch
from golden import POINTS, log_sigmoid, pairs, sigmoid

from penchant.losses.aot import aot, aot_unpaired, by_rank
from penchant.losses.dpo import dpo


def test_paired_golden_values_and_gradients() -> None:
    beta = 0.01
    margins = [p.w - p.l for p in POINTS]
    ref = sorted(p.ref_w - p.ref_l for p in POINTS)
    ranks = [sorted(margins).index(m) for m in margins]
    z = [beta * (m - ref[r]) for m, r in zip(margins, ranks, strict=True)]
    logps = pairs(POINTS, grad=True)
    out = aot(logps, beta=beta)
    out.losses.sum().backward()
    # two margins are equal: which of them gets which neighbour is open, their sum is not
    assert sum(out.losses.tolist()) == pytest.approx(
        sum(-log_sigmoid(x) for x in _ties_in_order(margins, ref, beta)), rel=1e-12
    )
    assert logps.policy_chosen_logps.grad.tolist()[3:] == pytest.approx([-beta * sigmoid(-x) for x in z[3:]], rel=1e-12)


def _ties_in_order(margins: list[float], ref: list[float], beta: float) -> list[float]:
    return [beta * (m - r) for m, r in zip(sorted(margins), ref, strict=True)]


def test_unpaired_golden_values() -> None:
    beta = 0.01
    expected = [
        -log_sigmoid(beta * (w - x))
        for w, x in zip(sorted(p.dw for p in POINTS), sorted(p.dl for p in POINTS), strict=True)
    ]
    assert sorted(aot_unpaired(pairs(POINTS), beta=beta).losses.tolist()) == pytest.approx(sorted(expected), rel=1e-12)


def test_unpaired_gradients_reach_the_partner() -> None:
    logps = pairs(POINTS, grad=True)
    aot_unpaired(logps, beta=0.01).losses.sum().backward()
    assert logps.policy_chosen_logps.grad.sum().item() == pytest.approx(-logps.policy_rejected_logps.grad.sum().item())
    assert (logps.policy_rejected_logps.grad > 0).all()


@pytest.mark.parametrize("fn", [aot, aot_unpaired])
def test_a_batch_of_one_pair_is_dpo(fn) -> None:  # type: ignore[no-untyped-def]
    one = pairs(POINTS[:1])
    assert torch.allclose(fn(one, label_smoothing=0.1).losses, dpo(one, label_smoothing=0.1).losses, rtol=1e-14)


def test_by_rank() -> None:
    values, like = torch.tensor([5.0, 1.0, 3.0]), torch.tensor([0.2, 0.9, 0.1])
    assert by_rank(values, like).tolist() == [3.0, 5.0, 1.0]
