"""f-DPO: closed forms of each f, reverse KL is DPO, alpha's two limits."""

from __future__ import annotations

import math

import pytest
import torch
from golden import ORDINARY, POINTS, check_golden, log_sigmoid, pairs, sigmoid

from penchant.losses.dpo import dpo
from penchant.losses.f_dpo import f_dpo, f_prime

ALPHA = 0.4
F_PRIME = {
    "reverse_kl": (lambda d: d, lambda d: 1.0),
    "forward_kl": (lambda d: -math.exp(-d), lambda d: math.exp(-d)),
    "js": (lambda d: math.log(2 * math.exp(d) / (1 + math.exp(d))), lambda d: 1 / (1 + math.exp(d))),
    "alpha": (lambda d: (1 - math.exp(-ALPHA * d)) / ALPHA, lambda d: math.exp(-ALPHA * d)),
}


@pytest.mark.parametrize("name", sorted(F_PRIME))
def test_golden_values_and_gradients(name: str) -> None:
    beta = 0.3
    f, slope = F_PRIME[name]
    z = lambda p: beta * (f(p.dw) - f(p.dl))  # noqa: E731
    check_golden(
        f_dpo,
        lambda p: -log_sigmoid(z(p)),
        lambda p: (-beta * sigmoid(-z(p)) * slope(p.dw), beta * sigmoid(-z(p)) * slope(p.dl)),
        ORDINARY,
        beta=beta,
        divergence=name,
        alpha=ALPHA,
    )


def test_reverse_kl_is_dpo() -> None:
    assert torch.equal(f_dpo(pairs(POINTS), divergence="reverse_kl").losses, dpo(pairs(POINTS)).losses)


def test_alpha_lies_between_reverse_and_forward_kl() -> None:
    d = torch.tensor([-1.3, 0.4], dtype=torch.float64)
    assert torch.allclose(f_prime(d, "alpha", 1e-8), d, atol=1e-7)
    assert torch.allclose(f_prime(d, "alpha", 1.0), 1 + f_prime(d, "forward_kl", 0.5), rtol=1e-12)


def test_small_alpha_keeps_its_digits_in_fp32() -> None:
    assert f_prime(torch.tensor([0.01]), "alpha", 1e-6).item() == pytest.approx(0.01, rel=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "alpha"])
def test_a_hopeless_chosen_answer_still_learns_and_its_gradient_can_be_squared(name: str) -> None:
    d = torch.tensor([-300.0], requires_grad=True)
    f_prime(d, name, 0.5).sum().backward()
    assert 0 < d.grad.item() < 1e18


def test_an_unknown_divergence_is_refused() -> None:
    with pytest.raises(ValueError, match="none of reverse_kl"):
        f_dpo(pairs(POINTS), divergence="hellinger")
