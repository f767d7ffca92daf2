"""Log-probs of target tokens under a linear head on the CPU: three matmuls, one softmax pass, no elementwise work in backward.

With ``P = softmax(h W^T)``, ``D = P - onehot(target)`` and row gradients g (a vector, known only after the whole
sequence): ``dh = -g * (D W)`` and ``dW = -D^T (g * h)``. D is therefore saved in the forward pass and g is applied to the
small side. If D would be too large, it is recomputed a block of rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penchant.base.lanes import turn
from penchant.models.cpu.ops import addmm_, mm, mm_into, more_rows

KEEP_BYTES = 512 << 20  # largest D that is saved
_MATMUL_ROWS = 512  # rows per head matmul if D is not saved
_SOFTMAX_ELEMENTS = 1 << 19  # fp32 values per softmax pass, so that they stay in cache
VOCAB_TILE = 4096  # vocabulary rows per weight-gradient matmul, so that its output stays in cache until it is added


def fast_token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, alignment: bool = False) -> tuple[Tensor, Tensor]:
    """``logp_r = log softmax(W h_r)[target_r]``.

    Args:
        hidden: (R, d); weight: (V, d), same dtype, on the CPU; targets: (R,) int64.
        alignment: also compute ``log sum_v pi(v)^2``, without gradient.

    Returns:
        Log-probs (R,) in nats and the `alignment` term, (R,) or empty; fp32, or fp64 for fp64 input. In bf16, logits are
        rounded to bf16 as in the plain model; the softmax, its sum and the logarithm are fp32.
    """
    logps, collision = _TokenLogps.apply(hidden, weight, targets, alignment)  # type: ignore[no-untyped-call]
    return logps, collision


def _softmax_rows(
    logits: Tensor, targets: Tensor, minus_onehot: Tensor | None, collision: Tensor | None = None
) -> Tensor:
    """Log-probs of the targets in fp32 or fp64. Writes D to `minus_onehot`, if given (it may be `logits` itself).

    Writes ``log sum_v pi(v)^2`` to `collision`, if given.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logps = torch.empty(logits.shape[0], dtype=wide, device=logits.device)
    step = max(1, _SOFTMAX_ELEMENTS // logits.shape[1])
    for i in range(0, logits.shape[0], step):
        rows = slice(i, i + step)
        x, t = logits[rows], targets[rows, None]
        p = torch.softmax(x, dim=-1, dtype=wide)
        pt = p.gather(1, t)
        out = pt.log()
        rare = (pt < torch.finfo(wide).tiny * 1e4).squeeze(1)  # log of zero or a denormal: compute it from the logits
        if bool(rare.any()):
            r = x[rare].to(wide)
            out[rare] = r.gather(1, t[rare]) - torch.logsumexp(r, dim=1, keepdim=True)
        logps[rows] = out.squeeze(1)
        if collision is not None:
            collision[rows] = torch.linalg.vecdot(p, p).log()
        if minus_onehot is not None:
            p.scatter_(1, t, pt - 1)
            minus_onehot[rows] = p
    return logps


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, alignment: bool) -> tuple[Tensor, Tensor]:
        ctx.rows, more = hidden.shape[0], more_rows(hidden.shape[0], hidden.dtype)
        if more:
            hidden, targets = F.pad(hidden, (0, 0, 0, more)), F.pad(targets, (0, more))
        rows, vocab = hidden.shape[0], weight.shape[0]
        wants_grad = any(ctx.needs_input_grad)
        keep = wants_grad and rows * vocab * hidden.element_size() <= KEEP_BYTES
        minus_onehot: Tensor | None = None
        logps = []
        wide = torch.promote_types(hidden.dtype, torch.float32)
        collision = torch.empty(rows if alignment else 0, dtype=wide, device=hidden.device)
        step = rows if keep else _MATMUL_ROWS
        for i in range(0, rows, step):
            part = slice(i, i + step)
            d = mm(hidden[part], weight.t())
            logps.append(_softmax_rows(d, targets[part], d if keep else None, collision[part] if alignment else None))
            minus_onehot = d if keep else None
            del d  # free it before the next block is allocated
        if wants_grad:
            ctx.save_for_backward(hidden, targets)
            ctx.weight, ctx.kept = weight, minus_onehot
        collision = collision[: ctx.rows]
        ctx.mark_non_differentiable(collision)
        return torch.cat(logps)[: ctx.rows], collision

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets = ctx.saved_tensors
        weight, g = ctx.weight, F.pad(grads[0].neg(), (0, len(hidden) - ctx.rows)).unsqueeze(1)
        scaled = (hidden * g).to(hidden.dtype)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        step = hidden.shape[0] if ctx.kept is not None else _rows_at_once(weight)
        grad_weight: Tensor | None = None
        for i in range(0, hidden.shape[0], step):
            part = slice(i, i + step)
            d = ctx.kept if ctx.kept is not None else _recomputed(hidden[part], weight, targets[part])
            if grad_hidden is not None:
                torch.mul(mm(d, weight), g[part], out=grad_hidden[part])
            if want_weight:
                last = i + step >= hidden.shape[0]
                grad_weight = _add_weight_grad(weight, d, scaled[part], grad_weight, last)
            del d
        ctx.kept = None
        return None if grad_hidden is None else grad_hidden[: ctx.rows], grad_weight, None, None


def _rows_at_once(weight: Tensor) -> int:
    return max(_MATMUL_ROWS, KEEP_BYTES // (weight.shape[0] * weight.element_size()))


def _recomputed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    d = mm(hidden, weight.t())
    _softmax_rows(d, targets, d)
    return d


def _add_weight_grad(weight: Tensor, d: Tensor, scaled: Tensor, total: Tensor | None, last: bool) -> Tensor | None:
    """Add D^T (g h), one vocabulary tile at a time, to the buffer `store_grad` would use, or to `total`, returned for autograd."""
    main: Any = getattr(weight, "main_grad", None)
    fresh = False  # the tiles are uninitialized: write them instead of adding
    for i in range(0, weight.shape[0], VOCAB_TILE):
        tile = slice(i, i + VOCAB_TILE)
        of_tile = d[:, tile].t()
        rounded = mm(of_tile, scaled) if main is not None and main.dtype != d.dtype else None
        with turn((id(weight), i), last=last) as turns:
            if rounded is not None:
                main[tile].add_(rounded)
                continue
            if main is not None:
                target = main
            elif turns is not None:
                if weight.grad is None:
                    weight.grad, fresh = torch.empty_like(weight), True
                target = weight.grad
            else:
                fresh = fresh or total is None
                target = total = torch.empty_like(weight) if total is None else total
            if fresh:
                mm_into(target[tile], of_tile, scaled)
            else:
                addmm_(target[tile], of_tile, scaled)
    return total
