"""Attention of the CPU fast path: batched matmul, softmax, matmul per group of equally long trees, with its own backward.

Grouped-query heads are folded into the rows of one matmul, (B * kv, g * L, d) x (B * kv, d, L), so K and V are never
repeated. One gather brings the packed row into that layout and one brings the outputs back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penchant.models.attention import TreeLayout

_KEEP_UP_TO = 512  # longest tree whose softmax is kept for the backward pass; above it is computed again, tile by tile
_TILE = 256  # queries per tile above that length


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Query heads, key/value heads, and the size of one head."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def width(self) -> int:
        """Columns of the fused projection: queries, keys, values."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """B trees padded to length L; `mask` (B, 1, 1, L, L) is added to the scores (0 or -inf)."""

    trees: int
    length: int
    mask: Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Indices of head rows, one row = d numbers of one head of one token.

    `to_heads` takes the rows of (T, q | k | v heads) to the groups' blocks ``q (B, kv, g, L), k (B, kv, L), v (B, kv, L)``;
    `from_heads` takes them back (padding is dropped); `out_to_heads`, `out_from_heads` do so for query heads alone.
    """

    shape: AttentionShape
    groups: tuple[GroupPlan, ...]
    to_heads: Tensor
    from_heads: Tensor
    out_to_heads: Tensor
    out_from_heads: Tensor


def attention_plan(layout: TreeLayout, tokens: int, shape: AttentionShape, dtype: torch.dtype) -> AttentionPlan:
    """The gather indices and additive masks of one packed row of `tokens` tokens."""
    groups, all_rows, query_rows, owner = [], [], [], []
    per_token = shape.heads + 2 * shape.kv_heads
    q_heads = torch.arange(shape.heads).view(1, -1, 1)
    k_heads = torch.arange(shape.kv_heads).view(1, -1, 1) + shape.heads
    for group in layout.groups:
        trees, length = group.index.shape
        token = group.index.unsqueeze(1)  # (B, 1, L)
        for heads in (q_heads, k_heads, k_heads + shape.kv_heads):
            all_rows.append((token * per_token + heads).flatten())
            owner.append(_flat_slots(layout, group.index, heads.shape[1]))
        query_rows.append((token * shape.heads + q_heads).flatten())
        mask = torch.zeros(group.mask.shape, dtype=dtype).masked_fill_(~group.mask, float("-inf"))
        groups.append(GroupPlan(trees, length, mask.unsqueeze(1)))
    to_heads, out_to_heads = torch.cat(all_rows), torch.cat(query_rows)
    real = torch.cat(owner)
    real_out = torch.cat(owner[::3])
    return AttentionPlan(
        shape,
        tuple(groups),
        to_heads,
        _inverse(to_heads, real, tokens * per_token),
        out_to_heads,
        _inverse(out_to_heads, real_out, tokens * shape.heads),
    )


def _flat_slots(layout: TreeLayout, index: Tensor, heads: int) -> Tensor:
    """Which entries of a (B, heads, L) block are real: padding repeats position 0 behind a tree's end. Flat bool."""
    length = index.shape[1]
    step = torch.ones_like(index)
    step[:, 1:] = index[:, 1:] - index[:, :-1]
    real = (step == 1).cumprod(1).bool()  # a tree's positions are consecutive; the first zero behind them is not
    assert int(real.sum()) <= layout.inverse.shape[0]
    return real.unsqueeze(1).expand(-1, heads, length).flatten()


def _inverse(rows: Tensor, real: Tensor, size: int) -> Tensor:
    slots = torch.arange(rows.shape[0])
    inverse = torch.empty(size, dtype=torch.int64)
    inverse[rows[real]] = slots[real]
    return inverse


def _blocks(flat: Tensor, plan: AttentionPlan) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Views q (B kv, g L, d), k and v (B kv, L, d) of each group in the flat buffer of head rows."""
    shape, blocks, at = plan.shape, [], 0
    for group in plan.groups:
        batch, length = group.trees * shape.kv_heads, group.length
        sizes = [batch * shape.group * length, batch * length, batch * length]
        q, k, v = flat.narrow(0, at, sum(sizes)).split(sizes)
        at += sum(sizes)
        blocks.append((q.view(batch, -1, shape.head_dim), k.view(batch, length, -1), v.view(batch, length, -1)))
    return blocks


def _out_blocks(flat: Tensor, plan: AttentionPlan) -> list[Tensor]:
    shape = plan.shape
    sizes = [g.trees * shape.heads * g.length for g in plan.groups]
    parts = flat.split(sizes)
    return [
        p.view(g.trees * shape.kv_heads, shape.group * g.length, shape.head_dim)
        for p, g in zip(parts, plan.groups, strict=True)
    ]


def _softmax_scores(q: Tensor, k: Tensor, mask: Tensor, shape: AttentionShape) -> Tensor:
    """softmax(q k^T + mask), with q scaled already; (B kv, g rows, keys), computed in place."""
    scores = torch.bmm(q, k.transpose(1, 2))
    trees, rows, keys = mask.shape[0], mask.shape[-2], mask.shape[-1]
    scores.view(trees, shape.kv_heads, shape.group, rows, keys).add_(mask)
    torch._softmax(scores, -1, False, out=scores)
    return scores


def _tiles(group: GroupPlan) -> list[slice]:
    return [slice(i, min(i + _TILE, group.length)) for i in range(0, group.length, _TILE)]


def _rows(x: Tensor, rows: slice, group: int) -> Tensor:
    """Some queries of every head of a group: (B kv, g L, d) -> (B kv, g rows, d)."""
    batch, _, dim = x.shape
    return x.view(batch, group, -1, dim)[:, :, rows].reshape(batch, -1, dim)


def attention_forward(heads: Tensor, plan: AttentionPlan, *, keep: bool) -> tuple[Tensor, list[Tensor | None]]:
    """Attention within every tree.

    ``o = softmax(q k^T + mask) v``; the scale is in q already.

    Args:
        heads: (N, d) head rows in the plan's order.
        keep: whether the backward pass will want the softmax.

    Returns:
        Output rows (N_q, d) in the plan's order, and the softmax of each group (None: to be computed again).
    """
    shape = plan.shape
    out = heads.new_empty(plan.out_to_heads.shape[0], shape.head_dim)
    kept: list[Tensor | None] = []
    for (q, k, v), o, group in zip(_blocks(heads, plan), _out_blocks(out, plan), plan.groups, strict=True):
        if group.length <= _KEEP_UP_TO:
            p = _softmax_scores(q, k, group.mask, shape)
            torch.bmm(p, v, out=o)
            kept.append(p if keep else None)
            continue
        kept.append(None)
        o4 = o.view(o.shape[0], shape.group, group.length, shape.head_dim)
        for rows in _tiles(group):
            seen = slice(0, rows.stop)
            p = _softmax_scores(_rows(q, rows, shape.group), k[:, seen], group.mask[..., rows, seen], shape)
            o4[:, :, rows] = torch.bmm(p, v[:, seen]).view(o.shape[0], shape.group, -1, shape.head_dim)
    return out, kept


def attention_backward(grad_out: Tensor, heads: Tensor, kept: list[Tensor | None], plan: AttentionPlan) -> Tensor:
    """Gradient of `attention_forward` with respect to `heads`.

    With P the softmax and dO the gradient of the output: ``dV = P^T dO``, ``dP = dO V^T``,
    ``dS = P * (dP - rowsum(P * dP))``, ``dQ = dS K``, ``dK = dS^T Q``.
    """
    shape = plan.shape
    grad = torch.empty_like(heads)
    blocks = zip(
        _blocks(heads, plan), _blocks(grad, plan), _out_blocks(grad_out, plan), plan.groups, kept, strict=True
    )
    for (q, k, v), (dq, dk, dv), do, group, p in blocks:
        if group.length <= _KEEP_UP_TO:
            if p is None:
                p = _softmax_scores(q, k, group.mask, shape)
            torch.bmm(p.transpose(1, 2), do, out=dv)
            ds = torch.bmm(do, v.transpose(1, 2))
            torch._softmax_backward_data(ds, p, -1, p.dtype, grad_input=ds)
            torch.bmm(ds, k, out=dq)
            torch.bmm(ds.transpose(1, 2), q, out=dk)
            continue
        dk.zero_()
        dv.zero_()
        dq4 = dq.view(dq.shape[0], shape.group, group.length, shape.head_dim)
        for rows in _tiles(group):
            seen = slice(0, rows.stop)
            q_t, do_t = _rows(q, rows, shape.group), _rows(do, rows, shape.group)
            p = _softmax_scores(q_t, k[:, seen], group.mask[..., rows, seen], shape)
            dv[:, seen] += torch.bmm(p.transpose(1, 2), do_t)
            ds = torch.bmm(do_t, v[:, seen].transpose(1, 2))
            torch._softmax_backward_data(ds, p, -1, p.dtype, grad_input=ds)
            dq4[:, :, rows] = torch.bmm(ds, k[:, seen]).view(dq.shape[0], shape.group, -1, shape.head_dim)
            dk[:, seen] += torch.bmm(ds.transpose(1, 2), q_t)
    return grad
