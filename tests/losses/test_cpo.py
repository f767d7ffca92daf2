"""CPO: closed forms, its two parts."""

from __future__ import annotations

from golden import check_golden, log_sigmoid, sigmoid

from penchant.losses.cpo import cpo


def test_golden_values_and_gradients() -> None:
    beta, alpha, eps = 0.2, 0.7, 0.1
    z = lambda p: beta * (p.w - p.l)  # noqa: E731

    def gradient(p):  # type: ignore[no-untyped-def]
        g = beta * (-(1 - eps) * sigmoid(-z(p)) + eps * sigmoid(z(p)))
        return g - alpha / p.len_w, -g

    check_golden(
        cpo,
        lambda p: -(1 - eps) * log_sigmoid(z(p)) - eps * log_sigmoid(-z(p)) - alpha * p.aw,
        gradient,
        beta=beta,
        alpha=alpha,
        label_smoothing=eps,
    )
