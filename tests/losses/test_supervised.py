"""Cross-entropy over tokens and Bradley-Terry: closed forms, gradients, limits, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from penchant.losses.supervised import bradley_terry, dft, sft
from penchant.types import UnpairedLogps

# ---------------------------------------------------------------------------------------------------------------------
# SFT: a mean over tokens of the global batch, not a mean of means.


def test_tokens_are_the_weights() -> None:
    out = sft(UnpairedLogps(torch.tensor([-6.0, -1.0]), torch.tensor([3.0, 1.0])))
    assert out.losses.tolist() == [6.0, 1.0]
    assert out.weights is not None
    assert (out.losses.sum() / out.weights.sum()).item() == pytest.approx(7 / 4)  # a mean of means would be 1.5


# ---------------------------------------------------------------------------------------------------------------------
# Bradley-Terry: values and gradients from closed forms, limits, stability, refusals.


def t(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_golden_values() -> None:
    out = bradley_terry(t(1.5, -0.25), t(0.5, 0.75))
    assert out.losses.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))], rel=1e-14)
    smoothed = bradley_terry(t(2.0), t(0.0), t(0.5), label_smoothing=0.1, centring=0.01)
    expected = -0.9 * math.log(sigmoid(1.5)) - 0.1 * math.log(sigmoid(-1.5)) + 0.01 * 4.0
    assert smoothed.losses.tolist() == pytest.approx([expected], rel=1e-14)


def test_golden_gradients() -> None:
    """d/dr_w = -(1 - eps) sigmoid(-z) + eps sigmoid(z) + 2 c (r_w + r_l); d/dr_l has the sigmoid terms negated."""
    chosen, rejected = t(1.2, grad=True), t(0.4, grad=True)
    bradley_terry(chosen, rejected, t(0.3), label_smoothing=0.2, centring=0.05).losses.sum().backward()
    z = 1.2 - 0.4 - 0.3
    pull = -0.8 * sigmoid(-z) + 0.2 * sigmoid(z)
    centre = 2 * 0.05 * 1.6
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.tolist() == pytest.approx([pull + centre], rel=1e-13)
    assert rejected.grad.tolist() == pytest.approx([-pull + centre], rel=1e-13)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    chosen, rejected, margin = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    for smoothing in (0.0, 0.1):
        loss = lambda c, r, m: bradley_terry(c, r, m, label_smoothing=smoothing, centring=0.1).losses  # noqa: B023, E731
        assert torch.autograd.gradcheck(loss, (chosen, rejected, margin))


def test_limits() -> None:
    same = t(0.7, -3.0)
    assert bradley_terry(same, same).losses.tolist() == pytest.approx([math.log(2)] * 2)
    chosen, rejected = t(1.0, 2.0), t(0.5, 3.0)
    plain = bradley_terry(chosen, rejected).losses
    assert torch.equal(bradley_terry(chosen, rejected, torch.zeros_like(chosen)).losses, plain)
    # only the difference counts, until rewards are centered
    assert torch.allclose(bradley_terry(chosen + 9, rejected + 9).losses, plain)
    assert (bradley_terry(chosen + 9, rejected + 9, centring=0.1).losses > plain + 1).all()
    assert bradley_terry(t(1.0), t(-1.0), centring=5.0).losses.item() == pytest.approx(
        bradley_terry(t(1.0), t(-1.0)).losses.item()
    )


@pytest.mark.parametrize("z", [1e4, -1e4])
def test_finite_far_out_in_fp32(z: float) -> None:
    chosen = torch.tensor([z], requires_grad=True)
    losses = bradley_terry(chosen, torch.zeros(1), label_smoothing=0.1, centring=1e-3).losses
    losses.sum().backward()
    assert torch.isfinite(losses).all() and chosen.grad is not None and torch.isfinite(chosen.grad).all()
    assert losses.item() == pytest.approx((0.1 if z > 0 else 0.9) * 1e4 + 1e-3 * 1e8, rel=1e-5)


def test_metrics() -> None:
    out = bradley_terry(t(1.0, 2.0, 0.0), t(0.0, 3.0, 0.0), centring=0.5)
    values = {name: v.tolist() for name, (v, weights) in out.metrics.items() if weights is None}
    assert values["rewards/margins"] == [1.0, -1.0, 0.0]
    assert values["rewards/accuracies"] == [1.0, 0.0, 0.5]
    assert values["rewards/centring"] == [0.5, 12.5, 0.0]


@pytest.mark.parametrize(
    "arguments,options",
    [
        ((t(1.0), t(1.0, 2.0)), {}),
        ((t(1.0), t(1.0), t(1.0, 2.0)), {}),
        ((t(1.0), t(1.0)), {"label_smoothing": 0.5}),
        ((t(1.0), t(1.0)), {"centring": -1.0}),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[torch.Tensor, ...], options: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        bradley_terry(*arguments, **options)


# ---------------------------------------------------------------------------------------------------------------------
# DFT: each token's loss times its probability.


def test_dft_is_a_mean_over_tokens_of_p_log_p() -> None:
    logps = UnpairedLogps(t(-3.0, -0.5), t(2.0, 1.0), weighted_logps=t(-0.7, -0.3, grad=True))
    out = dft(logps)
    assert out.losses.tolist() == [0.7, 0.3] and out.weights is not None and out.weights.tolist() == [2.0, 1.0]
    assert out.metrics["nll"][0].tolist() == [3.0, 0.5]
