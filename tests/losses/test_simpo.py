"""SimPO: closed forms per token, the margin."""

from __future__ import annotations

from golden import check_golden, log_sigmoid, sigmoid

from penchant.losses.simpo import simpo


def test_golden_values_and_gradients() -> None:
    beta, gamma = 2.5, 1.4
    z = lambda p: beta * (p.aw - p.al) - gamma  # noqa: E731
    check_golden(
        simpo,
        lambda p: -log_sigmoid(z(p)),
        lambda p: (-sigmoid(-z(p)) * beta / p.len_w, sigmoid(-z(p)) * beta / p.len_l),
        beta=beta,
        gamma=gamma,
    )
