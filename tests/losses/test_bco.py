"""BCO: closed forms, both signs, the shift."""

from __future__ import annotations

import pytest
from golden import labelled, log_sigmoid, sigmoid

from penchant.losses.bco import bco


def test_golden_values_and_gradients() -> None:
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
