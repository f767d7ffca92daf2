"""DPO: closed forms in float64, gradients, limits."""

from __future__ import annotations

import math

import pytest
import torch

from penchant.losses.dpo import dpo
from penchant.types import PairLogps


def _logps(pc, pr, rc, rr, dtype=torch.float64, grad=False):  # type: ignore[no-untyped-def]
    make = lambda v: torch.tensor(v, dtype=dtype, requires_grad=grad)  # noqa: E731
    return PairLogps(make(pc), make(pr), torch.tensor(rc, dtype=dtype), torch.tensor(rr, dtype=dtype))


def test_golden_values() -> None:
    # z = 0.1 * ((-10 + 12) - (-9 + 8)) = 0.3;  -log sigmoid(0.3) = log(1 + e^-0.3)
    out = dpo(_logps([-10.0], [-9.0], [-12.0], [-8.0]), beta=0.1)
    assert out.losses.item() == pytest.approx(math.log1p(math.exp(-0.3)), rel=1e-15)
    assert out.metrics["rewards/chosen"][0].item() == pytest.approx(0.2, rel=1e-12)
    assert out.metrics["rewards/rejected"][0].item() == pytest.approx(-0.1, rel=1e-12)
    assert out.metrics["rewards/margins"][0].item() == pytest.approx(0.3, rel=1e-12)


def test_label_smoothing_is_a_mixture_of_both_labels() -> None:
    out = dpo(_logps([-10.0], [-9.0], [-12.0], [-8.0]), beta=0.1, label_smoothing=0.2)
    expected = 0.8 * math.log1p(math.exp(-0.3)) + 0.2 * math.log1p(math.exp(0.3))
    assert out.losses.item() == pytest.approx(expected, rel=1e-15)


def test_golden_gradient() -> None:
    # d loss / d chosen = -beta * (sigmoid(-z) - eps), and the negative of it for rejected
    logps = _logps([-10.0], [-9.0], [-12.0], [-8.0], grad=True)
    dpo(logps, beta=0.1, label_smoothing=0.2).losses.sum().backward()
    expected = -0.1 * (1 / (1 + math.exp(0.3)) - 0.2)
    assert logps.policy_chosen_logps.grad.item() == pytest.approx(expected, rel=1e-12)  # type: ignore[union-attr]
    assert logps.policy_rejected_logps.grad.item() == pytest.approx(-expected, rel=1e-12)  # type: ignore[union-attr]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.49])
def test_equal_policy_and_reference_give_log_2(label_smoothing: float) -> None:
    out = dpo(_logps([-3.0, -400.0], [-7.0, -1.0], [-3.0, -400.0], [-7.0, -1.0]), label_smoothing=label_smoothing)
    assert out.losses.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-15)
    assert out.metrics["rewards/accuracies"][0].tolist() == [0.5, 0.5]  # a tie is half right


@pytest.mark.parametrize("z", [1e4, -1e4])
def test_finite_at_extremes_in_fp32(z: float) -> None:
    logps = _logps([z], [0.0], [0.0], [0.0], dtype=torch.float32, grad=True)
    out = dpo(logps, beta=1.0, label_smoothing=0.1)
    out.losses.sum().backward()
    assert out.losses.item() == pytest.approx((0.1 if z > 0 else 0.9) * 1e4, rel=1e-5)
    assert math.isfinite(logps.policy_chosen_logps.grad.item())  # type: ignore[union-attr]


def test_gradcheck() -> None:
    torch.manual_seed(0)
    pc, pr, rc, rr = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4))
    assert torch.autograd.gradcheck(lambda a, b: dpo(PairLogps(a, b, rc, rr), label_smoothing=0.1).losses, (pc, pr))


def test_missing_reference_and_wrong_shapes_are_refused() -> None:
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match="ref_chosen_logps"):
        dpo(PairLogps(one, one))
    with pytest.raises(ValueError, match="same shape"):
        dpo(PairLogps(one, two, two, two))
