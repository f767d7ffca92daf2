"""Log-probs and full-vocabulary divergences of a head in chunks of rows, without storing `[tokens, vocabulary]` logits.

The backward pass recomputes each chunk's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from penchant.base.lanes import Turns, turn
from penchant.base.machine import kind_of
from penchant.losses.divergences import DivergenceKind, divergence, grad_of, log_probs, value_of
from penchant.models.cpu.head import VOCAB_TILE

_CHUNK_ELEMENTS = 1 << 24  # logits in memory at once: 64 MB in fp32
_DIVERGENCE_ELEMENTS = 1 << 22  # the same if several such matrices are in memory at once
# a GPU needs about a thousand rows for a matmul to be compute-bound: 512 MB of logits in fp32
_GPU_TIMES = 8

RowLogits = Callable[[slice], Tensor]  # rows to their logits (rows, vocabulary), without gradient


class HeadDivergence(NamedTuple):
    """Per completion token (R,), in nats: log-probs of policy (with gradient) and reference, and divergence (with gradient)."""

    logps: Tensor
    ref_logps: Tensor
    divergence: Tensor


def rows_at_once(weight: Tensor, elements: int) -> int:
    """Rows per chunk under a head (V, d) for about `elements` logits on a CPU, or `_GPU_TIMES` as many on a GPU; at least 16."""
    return max(16, elements * (1 if kind_of(weight.device) == "cpu" else _GPU_TIMES) // weight.shape[0])


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """fp32 (or fp64) logits of a chunk: ``softcap * tanh(scale * (h W^T + b) / softcap)``."""
    return scaled(torch.nn.functional.linear(hidden, weight, bias), scale, softcap)


def scaled(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Convert raw logits to fp32 (or fp64) and apply the model's own scale and cap."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _before_scaling(d: Tensor, logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Backward of `scaled`, in place: from d loss / d logits to d loss / d raw logits."""
    if softcap is not None:
        d.mul_(1 - (logits / softcap) ** 2)
    return d.mul_(scale) if scale != 1.0 else d


class _ChunkedTokenLogps(torch.autograd.Function):
    """log softmax(h W^T)[target], row chunk by row chunk; the backward pass recomputes each chunk's logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        chunk: int,
        alignment: bool,
    ) -> tuple[Tensor, Tensor]:
        logps, lses, squares = [], [], []
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = head_logits(h, weight, bias, scale, softcap)
            lse = torch.logsumexp(logits, dim=-1)
            logps.append(logits.gather(1, t[:, None]).squeeze(1) - lse)
            lses.append(lse)
            if alignment:
                squares.append(torch.logsumexp(2 * logits, dim=-1) - 2 * lse)
            del logits  # free them before the next chunk
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(lses))
        ctx.scale, ctx.softcap, ctx.chunk = scale, softcap, chunk
        logps_of_rows = torch.cat(logps)
        collision = torch.cat(squares) if alignment else logps_of_rows.new_empty(0)
        ctx.mark_non_differentiable(collision)
        return logps_of_rows, collision

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # d logp / d logits = onehot(target) - softmax(logits); through the cap: 1 - (logits / softcap)^2
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        grad = grads[0]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        total = _WeightGrad(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            h, g = hidden[rows], grad[rows, None]
            logits = head_logits(h, weight, bias, ctx.scale, ctx.softcap)
            d = torch.sub(logits, lse[rows, None], out=None if ctx.softcap else logits).exp_().mul_(-g)
            d.scatter_add_(1, targets[rows, None], g.to(d.dtype))
            d = _before_scaling(d, logits, ctx.scale, ctx.softcap).to(hidden.dtype)
            del logits
            if grad_hidden is not None:
                torch.mm(d, weight, out=grad_hidden[rows])
            if total is not None:
                total.add(d, h)
            if grad_bias is not None:
                grad_bias.add_(d.sum(0))
            del d
        return grad_hidden, None if total is None else total.grad(), grad_bias, None, None, None, None, None


class _WeightGrad:
    """Accumulates ``sum over chunks of D^T h`` for a head (V, d), in fp32 for a bf16 head to avoid rounding at every chunk.

    Adds to `main_grad` if the head has that fp32 buffer. Otherwise, in a training pass on the CPU, adds to the gradient of
    an fp32 (fp64) head directly, in the order of the passes.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._main_grad = weight, getattr(weight, "main_grad", None)
        self._dtype = torch.promote_types(weight.dtype, torch.float32)
        self._accumulated: Tensor | None = None  # for autograd
        self._key = (id(weight), "chunks")

    def _total(self, turns: Turns | None) -> Tensor:
        if self._main_grad is not None:
            return self._main_grad
        weight = self._weight
        if turns is not None and weight.dtype == self._dtype:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            return weight.grad
        if self._accumulated is None:
            self._accumulated = torch.zeros_like(weight, dtype=self._dtype)
        return self._accumulated

    def add(self, d: Tensor, hidden: Tensor) -> None:
        """Add one chunk: d (rows, V), hidden (rows, d)."""
        on_gpu = d.device.type == "cuda"
        step = d.shape[1] if on_gpu else VOCAB_TILE
        with turn(self._key, last=False) as turns:
            total = self._total(turns)
            for i in range(0, d.shape[1], step):
                tile, of_tile = total[i : i + step], d[:, i : i + step].t()
                if tile.dtype == d.dtype:
                    tile.addmm_(of_tile, hidden)
                elif on_gpu:
                    tile.add_(torch.mm(of_tile, hidden, out_dtype=tile.dtype))
                else:  # no such product on the CPU: each chunk is rounded once, the sum is not
                    tile.add_(torch.mm(of_tile, hidden))

    def grad(self) -> Tensor | None:
        """Return the gradient for autograd, or None if it is already stored."""
        with turn(self._key):
            return None if self._accumulated is None else self._accumulated.to(self._weight.dtype)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    alignment: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs of target tokens under a linear head, without keeping the logits.

    ``logp_r = log softmax(cap(scale * (W h_r + b)))[target_r]``

    Args:
        hidden: (R, d) states that predict the targets.
        weight: (V, d) head; bias: (V,) or None.
        targets: (R,) int64.
        scale, softcap: the model's own scale and cap of its logits.
        chunk: rows at a time; chosen by memory if None.
        alignment: also compute ``log sum_v pi(v)^2``, without gradient.

    Returns:
        Log-probs (R,) in nats, and the log of the probability that two samples agree, (R,) or empty; fp32 (fp64 for
        fp64 input).
    """
    rows = chunk or rows_at_once(weight, _CHUNK_ELEMENTS)
    logps, collision = _ChunkedTokenLogps.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, scale, softcap, rows, alignment
    )
    return logps, collision


def module_token_logps(
    head: nn.Module, hidden: Tensor, targets: Tensor, scale: float, softcap: float | None, alignment: bool = False
) -> tuple[Tensor, Tensor]:
    """`token_logps` for a head that is not a plain Linear (e.g. has an adapter), with one checkpoint per chunk."""

    def chunk_logps(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logps = torch.log_softmax(scaled(head(h), scale, softcap), -1)
        collision = torch.logsumexp(2 * logps.detach(), -1) if alignment else logps.new_empty(0)
        return logps.gather(1, t[:, None]).squeeze(1), collision

    parts = [
        checkpoint(chunk_logps, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(256), targets.split(256), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


# ---- the whole vocabulary ----


class _ChunkedDivergence(torch.autograd.Function):
    """Log-probs of the targets and divergence from the reference; the backward pass recomputes both models' logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ref_logits: RowLogits,
        kind: DivergenceKind,
        scale: float,
        softcap: float | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logps, ref_logps, values = [], [], []
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            t = targets[rows, None]
            lp = log_probs(head_logits(hidden[rows], weight, bias, scale, softcap))
            lq = log_probs(ref_logits(rows))
            logps.append(lp.gather(1, t).squeeze(1))
            ref_logps.append(lq.gather(1, t).squeeze(1))
            values.append(value_of(lp, lq, kind))
        value = torch.cat(values)
        ref = torch.cat(ref_logps)
        ctx.save_for_backward(hidden, weight, bias, targets, value)
        ctx.ref_logits, ctx.kind = ref_logits, kind
        ctx.scale, ctx.softcap, ctx.chunk = scale, softcap, chunk
        ctx.mark_non_differentiable(ref)
        return torch.cat(logps), ref, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, value = ctx.saved_tensors
        grad_logps, _, grad_divergence = grads
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        total = _WeightGrad(weight) if need_weight else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            g = grad_logps[rows, None]
            logits = head_logits(hidden[rows], weight, bias, ctx.scale, ctx.softcap)
            lp = log_probs(logits)
            d = grad_of(lp, log_probs(ctx.ref_logits(rows)), value[rows], ctx.kind)
            d = d.mul_(grad_divergence[rows, None]).sub_(lp.exp_().mul_(g))
            d.scatter_add_(1, targets[rows, None], g.to(d.dtype))
            d = _before_scaling(d, logits, ctx.scale, ctx.softcap).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(d, weight, out=grad_hidden[rows])
            if total is not None:
                total.add(d, hidden[rows])
            if grad_bias is not None:
                grad_bias.add_(d.sum(0))
        ctx.ref_logits = None
        return grad_hidden, None if total is None else total.grad(), grad_bias, None, None, None, None, None, None


def divergence_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logits: RowLogits,
    kind: DivergenceKind,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> HeadDivergence:
    """Log-probs of target tokens and the exact divergence from a reference at each of them, without storing logits.

    Args:
        hidden, weight, targets, bias, scale, softcap: as for `token_logps`; ref_logits: the reference's logits of a slice
            of rows, without gradient; kind: which divergence; chunk: rows at a time, chosen by memory if None.
    """
    rows = chunk or rows_at_once(weight, _DIVERGENCE_ELEMENTS)
    out = _ChunkedDivergence.apply(hidden, weight, bias, targets, ref_logits, kind, scale, softcap, rows)  # type: ignore[no-untyped-call]
    return HeadDivergence(*out)


def module_divergence_logps(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    ref_logits: RowLogits,
    kind: DivergenceKind,
    scale: float,
    softcap: float | None,
    chunk: int = 64,
) -> HeadDivergence:
    """`divergence_logps` for a head that is not a plain Linear, with one checkpoint per chunk."""

    def chunk_divergence(h: Tensor, t: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        logits, ref = scaled(head(h), scale, softcap), ref_logits(rows)
        logps = [torch.log_softmax(x, -1).gather(1, t[:, None]).squeeze(1) for x in (logits, ref)]
        return logps[0], logps[1], divergence(logits, ref, kind)

    parts = [
        checkpoint(
            chunk_divergence, hidden[i : i + chunk], targets[i : i + chunk], slice(i, i + chunk), use_reentrant=False
        )
        for i in range(0, hidden.shape[0], chunk)
    ]
    return HeadDivergence(*(torch.cat([p[i] for p in parts]) for i in range(3)))
