"""Losses on single labeled answers: closed forms, both sides, reference points."""

from __future__ import annotations

import math

import pytest
import torch
from golden import labelled, log_sigmoid, sigmoid

from penchant.losses.divergences import DivergenceKind, divergence
from penchant.losses.unpaired import bco, kto, kto_z0, pmpo
from penchant.types import LossOutput, UnpairedLogps

# ---------------------------------------------------------------------------------------------------------------------
# KTO: closed forms, both signs, the reference point.


def test_golden_values_and_gradients_of_kto() -> None:
    beta, up, down, z0 = 0.3, 1.2, 0.7, 0.4
    policy, ref, labels = [-10.0, -9.0, -700.0], [-12.0, -8.5, -20.0], [1.0, 0.0, 1.0]
    logps = labelled(policy, ref, labels, grad=True, z0=z0)
    out = kto(logps, beta=beta, desirable_weight=up, undesirable_weight=down)
    d = [a - b for a, b in zip(policy, ref, strict=True)]
    expected = [
        up * (1 - sigmoid(beta * (d[0] - z0))),
        down * (1 - sigmoid(beta * (z0 - d[1]))),
        up * (1 - sigmoid(beta * (d[2] - z0))),
    ]
    assert out.losses.tolist() == pytest.approx(expected, rel=1e-12)
    out.losses.sum().backward()
    slope = lambda x: sigmoid(x) * sigmoid(-x)  # noqa: E731
    grads = [
        -up * beta * slope(beta * (d[0] - z0)),
        down * beta * slope(beta * (z0 - d[1])),
        -up * beta * slope(beta * (d[2] - z0)),
    ]
    assert logps.policy_logps.grad.tolist() == pytest.approx(grads, rel=1e-11, abs=1e-30)
    assert out.weights is None  # a mean over all answers, as in the paper


def test_one_side_alone_works() -> None:
    for label in (1.0, 0.0):
        out = kto(labelled([-3.0, -4.0], [-3.5, -3.5], [label] * 2, z0=0.0))
        assert torch.isfinite(out.losses).all()


def test_z0_is_the_mean_and_never_negative() -> None:
    policy, ref = torch.tensor([-5.0, -6.0]), torch.tensor([-6.0, -8.0])
    assert kto_z0(policy, ref) == pytest.approx(1.5)
    assert kto_z0(ref, policy) == 0.0


def test_without_its_reference_point_it_refuses() -> None:
    with pytest.raises(ValueError, match="needs z0"):
        kto(labelled([-3.0], [-3.0], [1.0]))


# ---------------------------------------------------------------------------------------------------------------------
# BCO: closed forms, both signs, the shift.


def test_golden_values_and_gradients_of_bco() -> None:
    beta, delta = 0.3, 0.2
    policy, ref, labels = [-10.0, -9.0, -700.0], [-12.0, -8.5, -20.0], [1.0, 0.0, 1.0]
    logps = labelled(policy, ref, labels, grad=True, delta=delta)
    out = bco(logps, beta=beta)
    z = [s * (beta * (a - b) - delta) for s, a, b in zip((1, -1, 1), policy, ref, strict=True)]
    assert out.losses.tolist() == pytest.approx([-log_sigmoid(x) for x in z], rel=1e-12)
    out.losses.sum().backward()
    grads = [-s * beta * sigmoid(-x) for s, x in zip((1, -1, 1), z, strict=True)]
    assert logps.policy_logps.grad.tolist() == pytest.approx(grads, rel=1e-12)


def test_without_its_shift_it_refuses() -> None:
    with pytest.raises(ValueError, match="needs delta"):
        bco(labelled([-3.0], [-3.0], [1.0]))


# ---------------------------------------------------------------------------------------------------------------------
# PMPO: closed forms, each side averaged by its own count, the tabular optimum, and errors of other implementations.


def total(out: LossOutput) -> torch.Tensor:
    parts = [v.sum() / w.sum() for v, w in out.summands().values() if w is not None and w.sum() > 0]
    return torch.stack(parts).sum()


def batch(labels: list[float], grad: bool = False) -> UnpairedLogps:
    n = len(labels)
    policy = torch.linspace(-9.0, -2.0, n, dtype=torch.float64, requires_grad=grad)
    lengths = torch.arange(2, n + 2, dtype=torch.float64)
    d = torch.linspace(0.1, 0.9, n, dtype=torch.float64, requires_grad=grad)
    return UnpairedLogps(policy, lengths, None, torch.tensor(labels, dtype=torch.float64), d)


@pytest.mark.parametrize("weighting,up,down", [("alpha", 0.7, 0.3), ("unit", 1.0, 1.0)])
def test_golden_value_and_gradient_of_token_means(weighting: str, up: float, down: float) -> None:
    x = batch([1.0, 0.0, 1.0], grad=True)
    loss = total(pmpo(x, alpha=0.7, beta=0.5, weighting=weighting))
    w, n, d = x.policy_logps.tolist(), x.lengths.tolist(), x.divergence.tolist()  # type: ignore[union-attr]
    expected = -up * (w[0] + w[2]) / (n[0] + n[2]) + down * w[1] / n[1] + 0.5 * sum(d) / sum(n)
    assert loss.item() == pytest.approx(expected, rel=1e-14)
    loss.backward()
    good = n[0] + n[2]
    assert x.policy_logps.grad.tolist() == pytest.approx([-up / good, down / n[1], -up / good], rel=1e-14)  # type: ignore[union-attr]
    assert x.divergence.grad.tolist() == pytest.approx([0.5 / sum(n)] * 3, rel=1e-14)  # type: ignore[union-attr]


def test_golden_value_of_sequence_sums() -> None:
    x = batch([1.0, 0.0, 1.0])
    w, d = x.policy_logps.tolist(), x.divergence.tolist()  # type: ignore[union-attr]
    loss = total(pmpo(x, alpha=0.7, beta=0.5, reduction="sequence_sum"))
    assert loss.item() == pytest.approx(-0.7 * (w[0] + w[2]) / 2 + 0.3 * w[1] + 0.5 * sum(d) / 3, rel=1e-14)


def test_at_alpha_one_half_the_gradient_is_not_zero() -> None:
    """Guards against a single batch-mean cross-entropy times the labels, which cancels at alpha 0.5."""
    x = batch([1.0, 0.0, 1.0, 0.0], grad=True)
    total(pmpo(x, alpha=0.5, beta=0.0)).backward()
    grad = x.policy_logps.grad
    assert grad is not None and (grad[[0, 2]] < 0).all() and (grad[[1, 3]] > 0).all()


def test_the_divergence_carries_gradient() -> None:
    """Guards against a detached divergence, which does not regularize."""
    x = batch([1.0, 1.0], grad=True)
    total(pmpo(x, beta=2.0)).backward()
    assert x.divergence is not None and x.divergence.grad is not None and (x.divergence.grad > 0).all()


@pytest.mark.parametrize("labels", [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
def test_a_data_set_of_one_side_only(labels: list[float]) -> None:
    x = batch(labels, grad=True)
    out = pmpo(x, alpha=0.5, beta=1.0)
    sides = {"main": labels[0] == 1.0, "negative": labels[0] == 0.0}
    for name, present in sides.items():
        values, weights = out.summands()[name]
        assert bool(weights.any()) == present and bool(values.any()) == present  # type: ignore[union-attr]
    assert math.isfinite(total(out).item())


def test_alpha_switches_a_side_off() -> None:
    for alpha, off in ((1.0, 1), (0.0, 0)):
        x = batch([1.0, 0.0], grad=True)
        total(pmpo(x, alpha=alpha, beta=0.0)).backward()
        assert x.policy_logps.grad is not None
        assert x.policy_logps.grad[off].item() == 0.0 and x.policy_logps.grad[1 - off].item() != 0.0


@pytest.mark.parametrize("alpha,beta", [(0.5, 1.0), (1.0, 0.5), (0.7, 2.0), (0.0, 3.0)])
def test_the_tabular_optimum_is_reached(alpha: float, beta: float) -> None:
    """p* = (alpha A - (1 - alpha) R + beta q) / (2 alpha - 1 + beta), with KL(ref || policy) and one token."""
    vocab = 6
    q = torch.softmax(torch.tensor([0.3, -0.2, 0.9, 0.0, -0.7, 0.4], dtype=torch.float64), 0)
    accepted = torch.tensor([0, 0, 1, 2, 5, 5, 5])
    rejected = torch.tensor([3, 2])
    counts = lambda t: torch.bincount(t, minlength=vocab).double() / len(t)  # noqa: E731
    a, r = counts(accepted), counts(rejected)
    # scale the rejected side's mass down until p* is a distribution
    expected = (alpha * a - (1 - alpha) * r + beta * q) / (2 * alpha - 1 + beta)
    if (expected <= 0).any():
        r = 0.1 * counts(torch.tensor([2])) + 0.9 * q
        expected = (alpha * a - (1 - alpha) * r + beta * q) / (2 * alpha - 1 + beta)
    assert (expected > 0).all() and expected.sum().item() == pytest.approx(1.0)
    logits = torch.zeros(vocab, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], lr=1.0, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)
    tokens = torch.arange(vocab)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logps = torch.log_softmax(logits, 0)
        d = divergence(logits[None], q.log()[None], DivergenceKind("kl", "ref_policy"))
        # each token once per side, weighted by its share: the same sums as sampling tokens
        x = UnpairedLogps(
            torch.cat([logps[tokens] * a * vocab, logps[tokens] * r * vocab]),
            torch.ones(2 * vocab, dtype=torch.float64),
            None,
            torch.cat([torch.ones(vocab), torch.zeros(vocab)]).double(),
            d.expand(2 * vocab),
        )
        loss = total(pmpo(x, alpha=alpha, beta=beta))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(torch.softmax(logits.detach(), 0), expected, atol=1e-7)


def test_where_negatives_outweigh_the_divergence_there_is_no_bound() -> None:
    q = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    losses = []
    for depth in (1.0, 10.0, 100.0):
        logits = torch.tensor([0.0, 0.0, -depth], dtype=torch.float64)
        logps = torch.log_softmax(logits, 0)
        d = divergence(logits[None], q[None], DivergenceKind())
        x = UnpairedLogps(logps[2:], torch.ones(1).double(), None, torch.zeros(1).double(), d)
        losses.append(total(pmpo(x, alpha=0.0, beta=0.5)).item())
    assert losses[0] > losses[1] > losses[2] and losses[2] < -50


def test_rewards_are_log_ratios_where_the_reference_is_known() -> None:
    x = labelled([-3.0, -4.0], [-3.5, -3.0], [1.0, 0.0], divergence=torch.zeros(2, dtype=torch.float64))
    metrics = pmpo(x).metrics
    assert metrics["rewards/chosen"][0].tolist() == [0.5, 0.0]
    assert metrics["rewards/rejected"][0].tolist() == [0.0, -1.0]
