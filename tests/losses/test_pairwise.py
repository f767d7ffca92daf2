"""Losses on pairs against a reference: closed forms in float64, gradients, limits."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from golden import ORDINARY, POINTS, Point, check_golden, log_sigmoid, pairs, sigmoid

from penchant.losses import LOSSES
from penchant.losses.pairwise import (
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    cal_dpo,
    chi_po,
    discopop,
    dpo,
    dpo_shift,
    dpop,
    exo,
    f_dpo,
    f_prime,
    hinge,
    ipo,
    ld_dpo,
    match_ranks,
    nca,
    odpo,
    r_dpo,
    rdpo,
    rebel,
    rpo,
    sppo,
    wpo,
)
from penchant.losses.schedules import progress_at
from penchant.types import PairLogps

# ---------------------------------------------------------------------------------------------------------------------
# DPO: closed forms in float64, gradients, limits.


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


# ---------------------------------------------------------------------------------------------------------------------
# DPO-Shift: closed forms, lambda 1 is DPO, schedules reach both ends.


def test_golden_values_and_gradients_of_dpo_shift() -> None:
    beta, lam = 0.3, 0.6
    z = lambda p: beta * (p.dw - lam * p.dl)  # noqa: E731
    check_golden(
        dpo_shift,
        lambda p: -log_sigmoid(z(p)),
        lambda p: (-beta * sigmoid(-z(p)), lam * beta * sigmoid(-z(p))),
        beta=beta,
        lam=lam,
    )


def test_lambda_1_is_dpo() -> None:
    assert torch.equal(dpo_shift(pairs(POINTS), lam=1.0).losses, dpo(pairs(POINTS)).losses)


@pytest.mark.parametrize(
    "name,ends",
    [
        ("increase_linear", (0.5, 1.0)),
        ("linear_increase", (0.5, 1.0)),
        ("decrease_linear", (1.0, 0.5)),
        ("linear_decrease", (1.0, 0.5)),
        ("fixed", (0.75, 0.75)),
    ],
)
def test_schedules_reach_both_ends(name: str, ends: tuple[float, float]) -> None:
    schedule = LOSSES["dpo_shift"].params(schedule=name).schedules()["lam"]
    total = 7
    values = [schedule.at(progress_at(step, total)) for step in range(total)]
    assert (values[0], values[-1]) == ends
    steps = [b - a for a, b in pairwise(values)]
    assert steps == pytest.approx([(ends[1] - ends[0]) / (total - 1)] * (total - 1), abs=1e-15)


def test_only_the_bounds_of_its_own_schedule_matter() -> None:
    assert (
        LOSSES["dpo_shift"]
        .params(schedule="increase_linear", lambda_min=0.2, lambda_max=0.9)
        .schedules()["lam"]
        .at(0.5)
        == 0.55
    )


# ---------------------------------------------------------------------------------------------------------------------
# Robust DPO: closed forms, its limit, and what it is for.


def test_golden_values_and_gradients_of_rdpo() -> None:
    beta, eps = 0.3, 0.2

    def gradient(p):  # type: ignore[no-untyped-def]
        z = beta * p.h
        g = beta * (-(1 - eps) * sigmoid(-z) - eps * sigmoid(z)) / (1 - 2 * eps)
        return g, -g

    def loss(p):  # type: ignore[no-untyped-def]
        z = beta * p.h
        return (-(1 - eps) * log_sigmoid(z) + eps * log_sigmoid(-z)) / (1 - 2 * eps)

    check_golden(rdpo, loss, gradient, beta=beta, label_smoothing=eps)


def test_no_flips_is_dpo() -> None:
    assert torch.equal(rdpo(pairs(POINTS), label_smoothing=0.0).losses, dpo(pairs(POINTS)).losses)


def test_its_expectation_over_flipped_labels_is_dpo_on_clean_ones() -> None:
    eps = 0.2
    logps = pairs(POINTS[:3])
    flipped = type(logps)(
        logps.policy_rejected_logps, logps.policy_chosen_logps, logps.ref_rejected_logps, logps.ref_chosen_logps
    )
    expected = (1 - eps) * rdpo(logps, label_smoothing=eps).losses + eps * rdpo(flipped, label_smoothing=eps).losses
    assert torch.allclose(expected, dpo(logps).losses, rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# IPO: the target margin, per token and summed.


def test_golden_values_and_gradients_of_sums() -> None:
    beta = 0.2
    gap = lambda p: p.h - 1 / (2 * beta)  # noqa: E731
    check_golden(ipo, lambda p: gap(p) ** 2, lambda p: (2 * gap(p), -2 * gap(p)), beta=beta, average=False)


def test_golden_values_and_gradients_per_token() -> None:
    beta = 0.2
    gap = lambda p: p.dw / p.len_w - p.dl / p.len_l - 1 / (2 * beta)  # noqa: E731
    check_golden(ipo, lambda p: gap(p) ** 2, lambda p: (2 * gap(p) / p.len_w, -2 * gap(p) / p.len_l), beta=beta)


def test_the_target_is_reached_at_zero_loss() -> None:
    logps = pairs(POINTS[:1])
    assert ipo(logps, beta=1 / (2 * POINTS[0].h), average=False).losses.item() == pytest.approx(0.0, abs=1e-24)


# ---------------------------------------------------------------------------------------------------------------------
# RSO's hinge: closed forms on both sides of the corner.


def test_golden_values_and_gradients_of_hinge() -> None:
    beta = 0.25
    active = lambda p: 1 - beta * p.h > 0  # noqa: E731
    check_golden(
        hinge,
        lambda p: max(0.0, 1 - beta * p.h),
        lambda p: (-beta, beta) if active(p) else (0.0, 0.0),
        beta=beta,
    )


# ---------------------------------------------------------------------------------------------------------------------
# DPOP: closed forms with and without a drop of the chosen log-prob; DPO without the penalty.


def test_golden_values_and_gradients_of_dpop() -> None:
    beta, penalty = 0.05, 5.0
    z = lambda p: beta * (p.h - penalty * max(0.0, -p.dw))  # noqa: E731

    def gradient(p):  # type: ignore[no-untyped-def]
        s = beta * sigmoid(-z(p))
        return -s * (1 + (penalty if p.dw < 0 else 0.0)), s

    check_golden(dpop, lambda p: -log_sigmoid(z(p)), gradient, beta=beta, penalty=penalty)


def test_no_penalty_is_dpo_of_dpop() -> None:
    assert torch.equal(dpop(pairs(POINTS), penalty=0.0).losses, dpo(pairs(POINTS)).losses)


# ---------------------------------------------------------------------------------------------------------------------
# RPO: closed forms, DPO as its limit.


def test_golden_values_and_gradients_of_rpo() -> None:
    beta, alpha = 0.3, 0.6
    check_golden(
        rpo,
        lambda p: -log_sigmoid(beta * p.h) - alpha * p.aw,
        lambda p: (-beta * sigmoid(-beta * p.h) - alpha / p.len_w, beta * sigmoid(-beta * p.h)),
        beta=beta,
        alpha=alpha,
    )


def test_no_likelihood_term_is_dpo() -> None:
    assert torch.equal(rpo(pairs(POINTS), alpha=0.0).losses, dpo(pairs(POINTS)).losses)


# ---------------------------------------------------------------------------------------------------------------------
# R-DPO: closed forms; a margin due to length alone is explained by the length term.


def test_golden_values_and_gradients_of_r_dpo() -> None:
    beta, alpha = 0.3, 0.05
    z = lambda p: beta * p.h + alpha * (p.len_w - p.len_l)  # noqa: E731
    check_golden(
        r_dpo,
        lambda p: -log_sigmoid(z(p)),
        lambda p: (-beta * sigmoid(-z(p)), beta * sigmoid(-z(p))),
        beta=beta,
        alpha=alpha,
    )


def test_no_penalty_is_dpo_of_r_dpo() -> None:
    assert torch.equal(r_dpo(pairs(POINTS), alpha=0.0).losses, dpo(pairs(POINTS)).losses)


def test_a_longer_chosen_answer_pulls_less() -> None:
    longer = POINTS[0]
    assert longer.len_w > longer.len_l
    with_penalty, without = (r_dpo(pairs([longer]), alpha=a).losses.item() for a in (0.1, 0.0))
    assert with_penalty < without


# ---------------------------------------------------------------------------------------------------------------------
# LD-DPO: closed forms, alpha 1 is DPO, alpha 0 ignores the tail.


def test_golden_values_and_gradients_of_ld_dpo() -> None:
    beta, alpha = 0.3, 0.4

    def z(p):  # type: ignore[no-untyped-def]
        dw = (1 - alpha) * (p.shared_w - p.ref_shared_w) + alpha * p.dw
        dl = (1 - alpha) * (p.shared_l - p.ref_shared_l) + alpha * p.dl
        return beta * (dw - dl)

    check_golden(
        ld_dpo,
        lambda p: -log_sigmoid(z(p)),
        lambda p: (-alpha * beta * sigmoid(-z(p)), alpha * beta * sigmoid(-z(p))),
        beta=beta,
        alpha=alpha,
    )


def test_the_shared_tokens_carry_gradient_too() -> None:
    logps = pairs(POINTS[:1], grad=True)
    ld_dpo(logps, alpha=0.25).losses.sum().backward()
    whole, first = logps.policy_chosen_logps.grad, logps.policy_chosen_shared_logps.grad
    assert first.item() == pytest.approx(3 * whole.item(), rel=1e-12)


def test_alpha_1_is_dpo() -> None:
    assert torch.allclose(ld_dpo(pairs(POINTS), alpha=1.0).losses, dpo(pairs(POINTS)).losses, rtol=1e-14)


# ---------------------------------------------------------------------------------------------------------------------
# WPO: closed forms; the weight is capped at one and carries no gradient.


def test_golden_values_and_gradients_of_wpo() -> None:
    beta = 0.3
    weight = lambda p: min(1.0, math.exp(p.align_w + p.align_l))  # noqa: E731
    check_golden(
        wpo,
        lambda p: -weight(p) * log_sigmoid(beta * p.h),
        lambda p: (-weight(p) * beta * sigmoid(-beta * p.h), weight(p) * beta * sigmoid(-beta * p.h)),
        beta=beta,
    )


def test_fully_on_policy_is_dpo() -> None:
    points = [Point(p.w, p.l, p.ref_w, p.ref_l, align_w=0.3, align_l=-0.1) for p in POINTS]
    assert torch.equal(wpo(pairs(points)).losses, dpo(pairs(points)).losses)


def test_the_weight_carries_no_gradient() -> None:
    logps = pairs(POINTS[:1])
    alignment = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
    out = wpo(
        replace(logps, policy_chosen_logps=logps.policy_chosen_logps.requires_grad_(), chosen_alignment=alignment)
    )
    out.losses.sum().backward()
    assert alignment.grad is None


# ---------------------------------------------------------------------------------------------------------------------
# APO: closed forms of both directions.


def _slope(x: float) -> float:
    return sigmoid(x) * sigmoid(-x)


def test_zero_golden_values_and_gradients() -> None:
    b = 0.3
    check_golden(
        apo_zero,
        lambda p: sigmoid(-b * p.dw) + sigmoid(b * p.dl),
        lambda p: (-b * _slope(b * p.dw), b * _slope(b * p.dl)),
        beta=b,
    )


def test_down_golden_values_and_gradients() -> None:
    b = 0.3
    check_golden(
        apo_down,
        lambda p: sigmoid(b * p.dw) + sigmoid(-b * p.h),
        lambda p: (b * _slope(b * p.dw) - b * _slope(b * p.h), b * _slope(b * p.h)),
        beta=b,
    )


# ---------------------------------------------------------------------------------------------------------------------
# SPPO: closed forms, zero at its targets.


def test_golden_values_and_gradients_of_sppo() -> None:
    beta = 0.2
    t = 1 / (2 * beta)
    check_golden(
        sppo,
        lambda p: (p.dw - t) ** 2 + (p.dl + t) ** 2,
        lambda p: (2 * (p.dw - t), 2 * (p.dl + t)),
        beta=beta,
    )


# ---------------------------------------------------------------------------------------------------------------------
# EXO: closed forms; it is a KL, so never negative and zero at its target.


def test_golden_values_and_gradients_of_exo() -> None:
    beta, eps = 0.3, 0.05

    def loss(p):  # type: ignore[no-untyped-def]
        z = beta * p.h
        return sigmoid(z) * (log_sigmoid(z) - math.log(1 - eps)) + sigmoid(-z) * (log_sigmoid(-z) - math.log(eps))

    def gradient(p):  # type: ignore[no-untyped-def]
        z = beta * p.h  # d/dz = s (1 - s) (z - log((1 - eps) / eps))
        g = beta * sigmoid(z) * sigmoid(-z) * (z - math.log((1 - eps) / eps))
        return g, -g

    check_golden(exo, loss, gradient, ORDINARY, beta=beta, label_smoothing=eps)


def test_it_is_zero_at_its_target_and_positive_elsewhere() -> None:
    eps = 0.1
    beta = math.log((1 - eps) / eps) / POINTS[0].h
    assert exo(pairs(POINTS[:1]), beta=beta, label_smoothing=eps).losses.item() == pytest.approx(0.0, abs=1e-15)
    assert (exo(pairs(POINTS)).losses > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# NCA: closed forms.


def test_golden_values_and_gradients_of_nca() -> None:
    b = 0.3
    check_golden(
        nca,
        lambda p: -log_sigmoid(b * p.dw) - 0.5 * log_sigmoid(-b * p.dw) - 0.5 * log_sigmoid(-b * p.dl),
        lambda p: (b * (-sigmoid(-b * p.dw) + 0.5 * sigmoid(b * p.dw)), 0.5 * b * sigmoid(b * p.dl)),
        beta=b,
    )


# ---------------------------------------------------------------------------------------------------------------------
# AOT: sorted by hand, row by row; DPO for a single pair.


def test_paired_golden_values_and_gradients() -> None:
    beta = 0.01
    margins = [p.w - p.l for p in POINTS]
    ref = sorted(p.ref_w - p.ref_l for p in POINTS)
    ranks = [sorted(margins).index(m) for m in margins]
    z = [beta * (m - ref[r]) for m, r in zip(margins, ranks, strict=True)]
    logps = pairs(POINTS, grad=True)
    out = aot(logps, beta=beta)
    out.losses.sum().backward()
    # two margins are equal: their order is arbitrary, but their sum is not
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
    assert match_ranks(values, like).tolist() == [3.0, 5.0, 1.0]


# ---------------------------------------------------------------------------------------------------------------------
# DiscoPOP: closed forms, its published extrema, no overflow.


def test_golden_values_and_gradients_of_discopop() -> None:
    beta, tau = 0.1, 0.3

    def loss(p):  # type: ignore[no-untyped-def]
        z = beta * p.h
        m = sigmoid(z / tau)
        return -(1 - m) * log_sigmoid(z) + m * math.exp(-z)

    def gradient(p):  # type: ignore[no-untyped-def]
        z = beta * p.h
        m = sigmoid(z / tau)
        slope = m * (1 - m) / tau
        g = beta * (-(1 - m) * sigmoid(-z) + slope * log_sigmoid(z) + slope * math.exp(-z) - m * math.exp(-z))
        return g, -g

    check_golden(discopop, loss, gradient, ORDINARY, beta=beta, tau=tau)


def test_the_papers_local_extrema() -> None:
    """With beta = tau = 0.05 the loss has a local minimum at h = -2.3714 and a local maximum at h = 1.44012 (its section 5)."""
    h = torch.linspace(-4, 3, 70_001, dtype=torch.float64)
    zero = torch.zeros_like(h)
    losses = discopop(PairLogps(h, zero, zero, zero), beta=0.05, tau=0.05).losses
    inner = losses[1:-1]
    lowest = h[1:-1][(inner < losses[:-2]) & (inner < losses[2:])]
    highest = h[1:-1][(inner > losses[:-2]) & (inner > losses[2:])]
    assert lowest.tolist() == pytest.approx([-2.3714], abs=2e-4)
    assert highest.tolist() == pytest.approx([1.44012], abs=2e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Cal-DPO: closed forms.


def test_golden_values_and_gradients_of_cal_dpo() -> None:
    beta = 0.2
    t = 1 / (2 * beta)
    check_golden(
        cal_dpo,
        lambda p: -log_sigmoid(p.h) + 0.5 * ((p.dw - t) ** 2 + (p.dl + t) ** 2),
        lambda p: (-sigmoid(-p.h) + (p.dw - t), sigmoid(-p.h) + (p.dl + t)),
        beta=beta,
        calibration=0.5,
    )


# ---------------------------------------------------------------------------------------------------------------------
# f-DPO: closed forms of each f, reverse KL is DPO, alpha's two limits.


ALPHA = 0.4
F_PRIME = {
    "reverse_kl": (lambda d: d, lambda d: 1.0),
    "forward_kl": (lambda d: -math.exp(-d), lambda d: math.exp(-d)),
    "js": (lambda d: math.log(2 * math.exp(d) / (1 + math.exp(d))), lambda d: 1 / (1 + math.exp(d))),
    "alpha": (lambda d: (1 - math.exp(-ALPHA * d)) / ALPHA, lambda d: math.exp(-ALPHA * d)),
}


@pytest.mark.parametrize("name", sorted(F_PRIME))
def test_golden_values_and_gradients_of_f_dpo(name: str) -> None:
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


# ---------------------------------------------------------------------------------------------------------------------
# chi-PO: closed forms inside the clip, no gradient beyond it.


def test_golden_values_and_gradients_of_chi_po() -> None:
    beta, r_max = 0.2, 3.0
    phi = lambda d: math.exp(d) + d  # noqa: E731
    inside = [Point(-10.0, -9.0, -11.0, -8.0), Point(-10.0, -9.0, -9.0, -10.5), Point(-3.0, -4.0, -3.0, -4.0)]
    z = lambda p: beta * (phi(p.dw) - phi(p.dl))  # noqa: E731
    assert all(abs(z(p)) < 2 * r_max for p in inside)
    check_golden(
        chi_po,
        lambda p: -log_sigmoid(z(p)),
        lambda p: (
            -beta * sigmoid(-z(p)) * (1 + math.exp(p.dw)),
            beta * sigmoid(-z(p)) * (1 + math.exp(p.dl)),
        ),
        inside,
        beta=beta,
        r_max=r_max,
    )


def test_beyond_the_clip() -> None:
    logps = pairs(POINTS[3:], grad=True)
    out = chi_po(logps, r_max=3.0)
    assert out.losses.tolist() == pytest.approx([-log_sigmoid(-6.0), -log_sigmoid(6.0)], rel=1e-12)
    out.losses.sum().backward()
    assert not logps.policy_chosen_logps.grad.any()


# ---------------------------------------------------------------------------------------------------------------------
# REBEL: closed forms, zero where the margin is the score gap.


def test_golden_values_and_gradients_of_rebel() -> None:
    eta = 2.0
    gap = lambda p: p.h / eta - (p.score_w - p.score_l)  # noqa: E731
    check_golden(rebel, lambda p: gap(p) ** 2, lambda p: (2 * gap(p) / eta, -2 * gap(p) / eta), eta=eta)


# ---------------------------------------------------------------------------------------------------------------------
# ODPO: closed forms of both offsets, DPO without an offset, score gaps that are not positive are refused.


@pytest.mark.parametrize("offset", ["log", "linear"])
def test_golden_values_and_gradients_of_odpo(offset: str) -> None:
    beta, alpha = 0.3, 0.8
    f = math.log if offset == "log" else float
    z = lambda p: beta * p.h - alpha * f(p.score_w - p.score_l)  # noqa: E731
    check_golden(
        odpo,
        lambda p: -log_sigmoid(z(p)),
        lambda p: (-beta * sigmoid(-z(p)), beta * sigmoid(-z(p))),
        beta=beta,
        alpha=alpha,
        offset=offset,
    )


def test_no_offset_is_dpo() -> None:
    assert torch.equal(odpo(pairs(POINTS), alpha=0.0).losses, dpo(pairs(POINTS)).losses)


@pytest.mark.parametrize("rejected", [1.0, 2.0])
def test_a_chosen_answer_that_scores_no_higher_is_refused(rejected: float) -> None:
    with pytest.raises(ValueError, match="above rejected_scores"):
        odpo(pairs([Point(-1.0, -1.0, -1.0, -1.0, score_w=1.0, score_l=rejected)]))
