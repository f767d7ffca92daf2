"""Exact divergences of two distributions over a vocabulary, in log space, with closed-form gradients; estimates of KL from samples.

Notation: p the policy, q the reference, lp and lq their log-probabilities, rows x vocabulary. With ``d = lp - lq``:

    KL(q || p)      = sum q (lq - lp)                          d/dlogits_p = p - q
    KL(p || q)      = sum p (lp - lq)                          d/dlogits_p = p (d - KL)
    JS_b            = (1-b) KL(p || m) + b KL(q || m)          d/dlogits_p = (1-b) p (lp - lm - KL(p || m)),  m = (1-b) p + b q
    Renyi_a(q || p) = log sum q^a p^(1-a) / (a - 1)            d/dlogits_p = p - w
    Renyi_a(p || q) = log sum p^a q^(1-a) / (a - 1)            d/dlogits_p = a (w - p) / (a - 1)

with w the normalized terms of the sum. Sums of powers are computed in log space, since q^a p^(1-a) under- or overflows long
before its logarithm does. Log-probabilities are clamped at -1e5 nats for tokens that a model rules out (-inf): a token ruled
out by both adds nothing, one ruled out by only one adds much, and nothing is NaN.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from penchant.losses.helpers import require_vectors
from penchant.types import Direction, Divergence

Estimator = Literal["k1", "k2", "k3"]

FLOOR = -1e5  # nats


class DivergenceKind(NamedTuple):
    """Which divergence: kind, direction (not for JS), the order of Renyi, and the reference's share in JS's mean (b, in (0, 1))."""

    kind: Divergence = "kl"
    direction: Direction = "ref_policy"
    renyi_alpha: float = 1.5
    js_beta: float = 0.5


def divergence(policy_logits: Tensor, ref_logits: Tensor, kind: DivergenceKind) -> Tensor:
    """The divergence of each row, differentiable with respect to the policy's logits.

    Args:
        policy_logits, ref_logits: (rows, vocabulary), fp32 or fp64, not normalized; kind: which divergence.

    Returns:
        (rows,) in nats, >= 0 (JS <= log 2).

    Raises:
        ValueError: the shapes differ or are not (rows, vocabulary).
    """
    if policy_logits.ndim != 2 or policy_logits.shape != ref_logits.shape:
        raise ValueError(
            f"logits must both be (rows, vocabulary), got {tuple(policy_logits.shape)}, {tuple(ref_logits.shape)}"
        )
    out: Tensor = _DivergenceOfLogits.apply(policy_logits, ref_logits, kind)  # type: ignore[no-untyped-call]
    return out


class _DivergenceOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, policy_logits: Tensor, ref_logits: Tensor, kind: DivergenceKind) -> Tensor:
        lp, lq = log_probs(policy_logits), log_probs(ref_logits)
        value = value_of(lp, lq, kind)
        ctx.save_for_backward(lp, lq, value)
        ctx.kind = kind
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        lp, lq, value = ctx.saved_tensors
        return grad_of(lp, lq, value, ctx.kind) * grads[0][:, None], None, None


def log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities of each row, clamped at `FLOOR`, as `value_of` and `grad_of` take them."""
    return torch.log_softmax(logits, -1).clamp_(min=FLOOR)


def value_of(lp: Tensor, lq: Tensor, kind: DivergenceKind) -> Tensor:
    """The divergence of each row (rows,) from log-probabilities (rows, vocabulary)."""
    a, b = (lq, lp) if kind.direction == "ref_policy" else (lp, lq)
    if kind.kind == "js":
        lm, beta = _log_mean(lp, lq, kind.js_beta), kind.js_beta
        return ((1 - beta) * _kl(lp, lm) + beta * _kl(lq, lm)).clamp(min=0.0, max=math.log(2.0))
    if kind.kind == "kl" or kind.renyi_alpha == 1.0:
        return _kl(a, b).clamp(min=0.0)
    return _renyi(a, b, kind.renyi_alpha).clamp(min=0.0)


def grad_of(lp: Tensor, lq: Tensor, value: Tensor, kind: DivergenceKind) -> Tensor:
    """d divergence / d policy logits, (rows, vocabulary); `value` is the result of `value_of`."""
    to_policy = kind.direction == "ref_policy"
    p = lp.exp()
    if kind.kind == "js":
        log_ratio = lp - _log_mean(lp, lq, kind.js_beta)
        return (1 - kind.js_beta) * p * (log_ratio - (p * log_ratio).sum(-1, keepdim=True))
    if kind.kind == "kl" or kind.renyi_alpha == 1.0:
        if to_policy:
            return p - lq.exp()
        return p * (lp - lq - value[:, None])
    order = kind.renyi_alpha
    if to_policy:  # w = q exp((a - 1)(lq - lp - D)), a softmax
        return p - torch.softmax(lq + (order - 1) * (lq - lp), -1)
    # w - p = p expm1((a - 1)(lp - lq - D)): no cancellation near a = 1; for a large exponent the difference itself is exact
    exponent = (order - 1) * (lp - lq - value[:, None])
    small = exponent.abs() < 1
    w = torch.softmax(lp + (order - 1) * (lp - lq), -1)
    difference = torch.where(small, p * torch.expm1(torch.where(small, exponent, 0.0)), w - p)
    return order / (order - 1) * difference


def _log_mean(lp: Tensor, lq: Tensor, b: float) -> Tensor:
    """``log((1 - b) p + b q)``."""
    return torch.logaddexp(lp, lq + math.log(b / (1 - b))) + math.log(1 - b)


def _kl_terms(a: Tensor, b: Tensor) -> Tensor:
    """``e^a (d + e^-d - 1)`` with d = a - b: KL's terms made non-negative one by one (they add e^b - e^a, which sums to zero).

    This keeps the digits of close distributions, for which a plain sum of ``e^a d`` is a small difference of large terms.
    """
    d = a - b
    p = a.exp()
    near = d.abs() < 1
    return torch.where(near, p * (torch.expm1(-torch.where(near, d, 0.0)) + d), p * d - p + b.exp())


def _kl(a: Tensor, b: Tensor) -> Tensor:
    """sum e^a (a - b) over the vocabulary."""
    return _kl_terms(a, b).sum(-1)


def _renyi(a: Tensor, b: Tensor, order: float) -> Tensor:
    """log sum e^(order a + (1 - order) b) / (order - 1).

    If the sum S is near 1 (order near 1, or close distributions), ``log1p(S - 1)`` with ``S - 1 = sum e^a (e^x - 1 - x) +
    (order - 1) KL``, ``x = (order - 1)(a - b)``, keeps digits that a log-sum-exp would round away.
    """
    x = (order - 1) * (a - b)
    log_sum = torch.logsumexp(a + x, -1)
    near = (x.amax(-1) < 1) & (log_sum.abs() < 0.5)
    # skipped on the CPU if no row needs it; on a GPU the check would force a synchronization
    if log_sum.device.type != "cpu" or bool(near.any()):
        x = x.clamp(max=1.0)
        excess = (a.exp() * (torch.expm1(x) - x)).sum(-1) + (order - 1) * _kl(a, b)
        log_sum = torch.where(near, torch.log1p(excess), log_sum)
    return log_sum / (order - 1)


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: Estimator = "k3") -> Tensor:
    """KL(policy || reference) per token, estimated from tokens that the policy sampled.

    With ``d = log pi(y_t) - log ref(y_t)``: ``k1 = d`` (unbiased, may be negative), ``k2 = d^2 / 2`` (biased, never
    negative, low variance), ``k3 = e^(-d) - 1 + d`` (unbiased, never negative).

    Args:
        logps, ref_logps: (R,) of tokens sampled from pi, nats.

    Returns:
        (R,) in nats; k3's exponent is clamped at 20, which is a token e^20 times as likely under the reference.

    Raises:
        ValueError: the shapes differ or the estimator is unknown.

    Reference: Schulman, "Approximating KL divergence" (2020).
    """
    require_vectors(logps, ref_logps)
    d = logps - ref_logps
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        return torch.expm1((-d).clamp(max=20.0)) + d
    raise ValueError(f"{estimator!r} is none of k1, k2, k3")
