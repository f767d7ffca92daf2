"""KTO: closed forms, both signs, the reference point."""

from __future__ import annotations

import pytest
import torch
from golden import labelled, sigmoid

from penchant.losses.kto import kto, kto_z0


def test_golden_values_and_gradients() -> None:
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
