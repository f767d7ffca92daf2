"""Divergences: closed forms in exact arithmetic, gradients, bounds, limits, and precision under underflow."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.losses.divergences import DivergenceKind, divergence, grad_of, kl_estimate, log_probs, value_of

KINDS = [
    DivergenceKind("kl", "ref_policy"),
    DivergenceKind("kl", "policy_ref"),
    DivergenceKind("js"),
    DivergenceKind("js", js_beta=0.1),
    *(
        DivergenceKind("renyi", direction, order)
        for direction in ("ref_policy", "policy_ref")
        for order in (0.3, 0.999, 1.0001, 1.5, 2.0, 7.0)
    ),
]
IDS = [f"{k.kind}-{k.direction}-{k.js_beta if k.kind == 'js' else k.renyi_alpha}" for k in KINDS]


def exact(p_logits: list[float], q_logits: list[float], kind: DivergenceKind) -> float:
    """The definition with 400 digits, so that no logarithm is taken of a value rounded to zero."""
    getcontext().prec = 400

    def softmax(logits: list[float]) -> list[Decimal]:
        e = [Decimal(x).exp() for x in logits]
        return [x / sum(e) for x in e]

    p, q = softmax(p_logits), softmax(q_logits)
    kl = lambda a, b: sum(x * (x / y).ln() for x, y in zip(a, b, strict=True))  # noqa: E731
    a, b = (q, p) if kind.direction == "ref_policy" else (p, q)
    if kind.kind == "js":
        share = Decimal(kind.js_beta)
        m = [(1 - share) * x + share * y for x, y in zip(p, q, strict=True)]
        return float((1 - share) * kl(p, m) + share * kl(q, m))
    if kind.kind == "kl" or kind.renyi_alpha == 1.0:
        return float(kl(a, b))
    order = Decimal(kind.renyi_alpha)
    power = sum((order * x.ln() + (1 - order) * y.ln()).exp() for x, y in zip(a, b, strict=True))
    return float(power.ln() / (order - 1))


ROWS = [
    ([0.3, -1.0, 2.0], [1.0, 0.5, -0.25]),
    ([0.0, 0.0, 0.0], [1e-4, 0.0, -1e-4]),  # almost equal
    ([0.0, -240.0, 1.0], [-240.0, 0.0, 1.0]),  # one side underflows in fp32
    ([0.0, -700.0, -3.0], [-700.0, 0.0, -3.0]),
]


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_golden_values_in_float64(kind: DivergenceKind) -> None:
    p, q = (torch.tensor([r[i] for r in ROWS], dtype=torch.float64) for i in (0, 1))
    expected = [exact(*r, kind) for r in ROWS]
    got = divergence(p, q, kind).tolist()
    assert [got[i] for i in (0, 2, 3)] == pytest.approx([expected[i] for i in (0, 2, 3)], rel=1e-12)
    assert got[1] == pytest.approx(expected[1], rel=1e-10)  # distributions 1e-4 apart: a value of 1e-9 keeps its digits


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_in_fp32_nothing_is_lost_on_underflow(kind: DivergenceKind) -> None:
    p, q = (torch.tensor([r[i] for r in ROWS], dtype=torch.float32, requires_grad=i == 0) for i in (0, 1))
    values = divergence(p, q, kind)
    expected = [exact(*r, kind) for r in ROWS]
    assert values.tolist() == pytest.approx(expected, rel=5e-3)  # the second one from log-probs rounded to 1e-7
    values.sum().backward()
    assert torch.isfinite(p.grad).all()


def test_renyi_is_120_and_not_20_7() -> None:
    """Another library's sum of powers gives 20.7 (-log 1e-9, its floor for probabilities); in log space it is 120."""
    p, q = torch.tensor([[0.0, -120.0]]), torch.tensor([[-120.0, 0.0]])
    for direction in ("ref_policy", "policy_ref"):
        assert divergence(p, q, DivergenceKind("renyi", direction)).item() == pytest.approx(120.0, rel=1e-6)
    assert exact([0.0, -120.0], [-120.0, 0.0], DivergenceKind("renyi")) == pytest.approx(120.0, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_gradcheck(kind: DivergenceKind) -> None:
    torch.manual_seed(0)
    p = (torch.randn(5, 7, dtype=torch.float64) * 3).requires_grad_()
    q = torch.randn(5, 7, dtype=torch.float64) * 3
    assert torch.autograd.gradcheck(lambda x: divergence(x, q, kind), p)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_golden_gradient_of_two_tokens(kind: DivergenceKind) -> None:
    """By finite differences of the exact value, independent of autograd through our own forward pass."""
    p, q, eps = [0.4, -0.9], [-0.3, 0.7], 1e-6
    up, down = exact([p[0] + eps, p[1]], q, kind), exact([p[0] - eps, p[1]], q, kind)
    x = torch.tensor([p], dtype=torch.float64, requires_grad=True)
    divergence(x, torch.tensor([q], dtype=torch.float64), kind).backward()
    assert x.grad[0, 0].item() == pytest.approx((up - down) / (2 * eps), rel=1e-7)
    assert x.grad.sum().item() == pytest.approx(0.0, abs=1e-15)  # a constant added to all logits changes nothing


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_equal_distributions_are_zero_apart_with_zero_gradient(kind: DivergenceKind) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(3, 11) * 8).requires_grad_()
    values = divergence(logits, logits.detach(), kind)
    values.sum().backward()
    assert values.tolist() == pytest.approx([0.0] * 3, abs=1e-13)
    assert logits.grad.abs().max() < 1e-7


@pytest.mark.parametrize("direction", ["ref_policy", "policy_ref"])
def test_renyi_towards_order_1_is_kl(direction: str) -> None:
    torch.manual_seed(1)
    p, q = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    kl = divergence(p, q, DivergenceKind("kl", direction))
    assert torch.equal(divergence(p, q, DivergenceKind("renyi", direction, 1.0)), kl)
    for order in (1 - 1e-6, 1 + 1e-6):
        assert torch.allclose(divergence(p, q, DivergenceKind("renyi", direction, order)), kl, rtol=1e-5)
    near = divergence(p.float(), q.float(), DivergenceKind("renyi", direction, 1 + 1e-6))
    assert torch.allclose(near.double(), kl, rtol=1e-4)  # in fp32 too, where a log-sum-exp would keep one digit


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from([0.1, 1.0, 10.0, 300.0, 1e4]), st.sampled_from(KINDS))
def test_bounds_hold_everywhere_in_fp32(seed: int, scale: float, kind: DivergenceKind) -> None:
    g = torch.Generator().manual_seed(seed)
    p = (torch.randn(4, 33, generator=g) * scale).requires_grad_()
    q = torch.randn(4, 33, generator=g) * scale
    values = divergence(p, q, kind)
    values.sum().backward()
    assert torch.isfinite(values).all() and (values >= 0).all()
    assert torch.isfinite(p.grad).all()
    if kind.kind == "js":
        assert (values <= math.log(2.0) + 1e-7).all()


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_tokens_that_a_model_rules_out_add_nothing(kind: DivergenceKind) -> None:
    """Padded vocabularies have -inf logits in both models."""
    torch.manual_seed(0)
    p, q = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    wide = [torch.cat([x, torch.full((3, 2), -torch.inf, dtype=x.dtype)], 1) for x in (p, q)]
    wide[0].requires_grad_()
    values = divergence(*wide, kind)
    assert torch.allclose(values, divergence(p, q, kind), rtol=1e-13)
    values.sum().backward()
    assert torch.isfinite(wide[0].grad).all() and not wide[0].grad[:, 6:].any()


@pytest.mark.parametrize("ruled_out_by", [0, 1])
@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_token_that_one_model_rules_out_is_never_nan(kind: DivergenceKind, ruled_out_by: int) -> None:
    torch.manual_seed(0)
    logits = [torch.randn(3, 6), torch.randn(3, 6)]
    logits[ruled_out_by][:, 2] = -torch.inf
    logits[0].requires_grad_()
    values = divergence(*logits, kind)
    values.sum().backward()
    assert torch.isfinite(values).all() and torch.isfinite(logits[0].grad).all()


def test_value_and_gradient_are_what_divergence_uses() -> None:
    p = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    q = torch.randn(2, 5, dtype=torch.float64)
    kind = DivergenceKind("js")
    divergence(p, q, kind).sum().backward()
    lp, lq = log_probs(p.detach()), log_probs(q)
    assert torch.equal(grad_of(lp, lq, value_of(lp, lq, kind), kind), p.grad)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="rows, vocabulary"):
        divergence(torch.zeros(3), torch.zeros(3), KINDS[0])
    with pytest.raises(ValueError, match="rows, vocabulary"):
        divergence(torch.zeros(3, 2), torch.zeros(1, 2), KINDS[0])


def test_kl_estimators() -> None:
    """By hand. k1 and k3 are unbiased: their mean over the distribution is the KL."""
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    lp, lq = p.log(), q.log()
    kl = float((p * (lp - lq)).sum())
    for name in ("k1", "k3"):
        assert float((p * kl_estimate(lp, lq, name)).sum()) == pytest.approx(kl, rel=1e-12)  # type: ignore[arg-type]
    d = lp - lq
    assert torch.allclose(kl_estimate(lp, lq, "k2"), d**2 / 2)
    assert (kl_estimate(lp, lq, "k3") >= 0).all() and torch.allclose(kl_estimate(lp, lq), (-d).exp() - 1 + d)
    assert torch.isfinite(kl_estimate(torch.tensor([-1e4]), torch.zeros(1))).all()
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(lp, lq, "k4")  # type: ignore[arg-type]
