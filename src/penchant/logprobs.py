"""From a packed batch to completion log-probs: the only place that meets the head.

`[tokens, vocabulary]` is never alive at once: only positions that predict a completion token reach the head, in chunks
that are computed again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from penchant.models.attention import install_tree_attention
from penchant.models.structure import backbone_of, base_model_of, head_scaling
from penchant.types import PackedBatch

Packing = Literal["shared", "separate", "padded"]
_CHUNK_ELEMENTS = 1 << 24  # logits alive at once: 64 MB in fp32


class CompletionLogps(NamedTuple):
    """`sums` (C,) summed log-probs of each completion in nats; `tokens` (R,) per token. fp32, or fp64 for fp64 models."""

    sums: Tensor
    tokens: Tensor


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """fp32 (or fp64) logits of a chunk: ``softcap * tanh(scale * (h W^T + b) / softcap)``."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


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
    ) -> Tensor:
        logps, lses = [], []
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = _logits(h, weight, bias, scale, softcap)
            lse = torch.logsumexp(logits, dim=-1)
            logps.append(logits.gather(1, t[:, None]).squeeze(1) - lse)
            lses.append(lse)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(lses))
        ctx.scale, ctx.softcap, ctx.chunk = scale, softcap, chunk
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # d logp / d logits = onehot(target) - softmax(logits); through the cap: 1 - (logits / softcap)^2
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        (grad,) = grads
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            h, g = hidden[rows], grad[rows, None]
            logits = _logits(h, weight, bias, ctx.scale, ctx.softcap)
            d = torch.exp(logits - lse[rows, None]).mul_(-g)
            d.scatter_add_(1, targets[rows, None], g.to(d.dtype))
            if ctx.softcap is not None:
                d.mul_(1 - (logits / ctx.softcap) ** 2)
            if ctx.scale != 1.0:
                d.mul_(ctx.scale)
            d = d.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(d, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(d.t(), h)
            if grad_bias is not None:
                grad_bias.add_(d.sum(0))
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Log-probs of target tokens under a linear head, without keeping the logits.

    ``logp_r = log softmax(cap(scale * (W h_r + b)))[target_r]``

    Args:
        hidden: (R, d) states that predict the targets.
        weight: (V, d) head; bias: (V,) or None.
        targets: (R,) int64.
        scale, softcap: the model's own changes to its logits.
        chunk: rows at a time; chosen by memory when None.

    Returns:
        (R,) in nats, fp32 (fp64 for fp64 input).
    """
    rows = chunk or max(16, _CHUNK_ELEMENTS // weight.shape[0])
    out: Tensor = _ChunkedTokenLogps.apply(hidden, weight, bias, targets, scale, softcap, rows)  # type: ignore[no-untyped-call]
    return out


def _module_token_logps(
    head: nn.Module, hidden: Tensor, targets: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """The same through a head that is not a plain Linear (an adapter on it): each chunk is a checkpoint of its own."""

    def chunk_logps(h: Tensor, t: Tensor) -> Tensor:
        logits = head(h)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits * scale
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        return torch.log_softmax(logits, -1).gather(1, t[:, None]).squeeze(1)

    parts = [
        checkpoint(chunk_logps, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(256), targets.split(256), strict=True)
    ]
    return torch.cat(parts)


@dataclass(slots=True)
class Scorer:
    """A causal model as the engine sees it: packed batch in, completion log-probs out.

    Args:
        model: a transformers causal model, or a peft model around one.
        packing: ``shared``, ``separate`` or ``padded``; batches must be packed accordingly (`pack(shared=...)`).
        kernels: ``auto`` takes a model-family fast path where the model is exactly recognised; ``off`` never does.
    """

    model: nn.Module
    packing: Packing = "shared"
    kernels: str = "off"
    _fast: Any = None

    def __post_init__(self) -> None:
        install_tree_attention(base_model_of(self.model))
        if self.kernels == "auto" and self.packing != "padded":
            from penchant.models.fast_llama import fast_forward

            self._fast = fast_forward(self.model)

    @property
    def shared(self) -> bool:
        return self.packing == "shared"

    @property
    def fast(self) -> bool:
        """Whether a model-family fast path runs."""
        return self._fast is not None

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Last hidden states (T, d) of a packed row, after the final norm."""
        if self._fast is not None:
            return self._fast.hidden(batch)
        backbone = backbone_of(self.model)
        if self.packing == "padded":
            return self._padded_hidden(backbone, batch)
        # a 4D mask is handed on as it is, so transformers builds none; the tree attention never looks at it
        unused_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
        out = backbone(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            attention_mask=unused_mask,
            use_cache=False,
            penchant_batch=batch,
        )
        return out.last_hidden_state[0]

    def _padded_hidden(self, backbone: nn.Module, batch: PackedBatch) -> Tensor:
        """The plain way, for models whose layers carry state along the row: one padded row a segment."""
        length = max(s.length for s in batch.segments)
        ids = batch.input_ids.new_zeros(len(batch.segments), length)
        mask = torch.zeros_like(ids)
        for i, s in enumerate(batch.segments):
            ids[i, : s.length] = batch.input_ids[s.start : s.start + s.length]
            mask[i, : s.length] = 1
        positions = torch.arange(length, device=ids.device).expand_as(ids)
        out = backbone(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
        return out.last_hidden_state[mask.bool()]

    def logps(self, batch: PackedBatch) -> CompletionLogps:
        """Summed log-probs per completion (C,) and per token (R,), in nats."""
        hidden = self.hidden(batch).index_select(0, batch.predict_index)
        base = base_model_of(self.model)
        head = base.get_output_embeddings()
        scale, softcap = head_scaling(base.config)
        if type(head) is not nn.Linear:
            tokens = _module_token_logps(head, hidden, batch.target_ids, scale, softcap)
        elif self._fast is not None and head.bias is None and scale == 1.0 and softcap is None:
            from penchant.models.fast_head import fast_token_logps

            tokens = fast_token_logps(hidden, head.weight, batch.target_ids)
        else:
            tokens = token_logps(hidden, head.weight, batch.target_ids, head.bias, scale=scale, softcap=softcap)
        sums = torch.zeros(len(batch.lengths), dtype=tokens.dtype, device=tokens.device)
        return CompletionLogps(sums.index_add(0, batch.completion_of, tokens), tokens)
