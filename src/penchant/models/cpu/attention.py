"""Attention of the CPU fast path: batched matmul, softmax and matmul per group of trees, with its own backward.

Grouped-query heads are folded into the rows of one matmul, (B * kv, g * L, d) x (B * kv, d, L), so K and V are never
repeated. One gather takes the packed row to that layout and another takes the outputs back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from penchant.models.tree_attention import TreeLayout

_TILE = 128  # queries per tile: a tile skips the keys after its last query, which saves a third of a tree's scores


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Number of query heads, number of key/value heads, and head dimension."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def width(self) -> int:
        """Columns of the fused q/k/v projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True)
class Tile:
    """A range of queries of every tree in a group, which attends to the first `keys` keys. `mask` (B, 1, 1, rows, keys): 0 or -inf."""

    rows: int
    keys: int
    mask: Tensor


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """B trees padded to length L, with their queries split into tiles."""

    trees: int
    length: int
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Gather indices over head rows; a head row is the d values of one head of one token.

    `to_heads` gathers the rows of (T, q | k | v heads) into each group's blocks: q (B, kv, g, rows) tile by tile, k (B, kv, L),
    v (B, kv, L). `from_heads` is its inverse and drops the padding. `out_to_heads` and `out_from_heads` do the same for
    query heads only. Rows after the first `tokens` pad the matrix products: they receive arbitrary values and are never gathered.
    """

    shape: AttentionShape
    tokens: int
    groups: tuple[GroupPlan, ...]
    to_heads: Tensor
    from_heads: Tensor
    out_to_heads: Tensor
    out_from_heads: Tensor

    def to(self, device: torch.device) -> AttentionPlan:
        """Move the plan to a device."""
        indices: dict[str, Any] = {n: i.to(device) for n in self.__slots__ if isinstance(i := getattr(self, n), Tensor)}
        groups = [replace(g, tiles=tuple(replace(t, mask=t.mask.to(device)) for t in g.tiles)) for g in self.groups]
        return replace(self, groups=tuple(groups), **indices)


def attention_plan(
    layout: TreeLayout, tokens: int, more: int, shape: AttentionShape, dtype: torch.dtype
) -> AttentionPlan:
    """Build the gather indices and additive masks of one packed row of `tokens` tokens followed by `more` padding rows."""
    sizes = [g.index.numel() for g in layout.groups]
    is_token = torch.zeros(sum(sizes), dtype=torch.bool).index_fill_(0, layout.inverse, True)  # False: padding
    per_token = shape.heads + 2 * shape.kv_heads
    q_heads, k_heads = torch.arange(shape.heads), torch.arange(shape.heads, shape.heads + shape.kv_heads)
    groups, head_rows, query_rows = [], _Rows(), _Rows()
    for group, valid in zip(layout.groups, is_token.split(sizes), strict=True):
        token, valid = group.index, valid.view_as(group.index)
        tiles = []
        for start, stop in _tile_bounds(token.shape[1]):
            part = slice(start, stop)
            head_rows.add(token[:, part], valid[:, part], per_token, q_heads)
            query_rows.add(token[:, part], valid[:, part], shape.heads, q_heads)
            mask = torch.zeros(token.shape[0], 1, stop - start, stop, dtype=dtype)
            mask.masked_fill_(~group.mask[:, :, part, :stop], float("-inf"))
            tiles.append(Tile(stop - start, stop, mask.unsqueeze(1)))
        head_rows.add(token, valid, per_token, k_heads)
        head_rows.add(token, valid, per_token, k_heads + shape.kv_heads)
        groups.append(GroupPlan(token.shape[0], token.shape[1], tuple(tiles)))
    to_heads, from_heads = head_rows.indices((tokens + more) * per_token)
    out_to_heads, out_from_heads = query_rows.indices((tokens + more) * shape.heads)
    return AttentionPlan(shape, tokens, tuple(groups), to_heads, from_heads, out_to_heads, out_from_heads)


def _tile_bounds(length: int) -> list[tuple[int, int]]:
    """Bounds of tiles of nearly equal size: multiples of 16, at most `_TILE` queries."""
    count = -(-length // _TILE)
    step = -(-length // (count * 16)) * 16
    return [(i, min(i + step, length)) for i in range(0, length, step)]


class _Rows:
    """Collects the head rows of a gather and which of them are padding."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._valid: list[Tensor] = []

    def add(self, token: Tensor, valid: Tensor, per_token: int, heads: Tensor) -> None:
        """Add a block (B, heads, L) for tokens (B, L)."""
        self._rows.append((token[:, None] * per_token + heads[:, None]).flatten())
        self._valid.append(valid[:, None].expand(-1, len(heads), -1).flatten())

    def indices(self, size: int) -> tuple[Tensor, Tensor]:
        """Return the gather index and its inverse over `size` rows, which is 0 for rows that are not gathered."""
        rows, valid = torch.cat(self._rows), torch.cat(self._valid)
        inverse = torch.zeros(size, dtype=torch.int64)
        inverse[rows[valid]] = torch.arange(len(rows))[valid]
        return rows, inverse


def _blocks(flat: Tensor, plan: AttentionPlan) -> list[tuple[tuple[Tensor, ...], Tensor, Tensor]]:
    """Each group's views of the flat buffer of head rows: q tiles (B kv, g rows, d), k and v (B kv, L, d)."""
    shape, blocks, offset = plan.shape, [], 0
    for group in plan.groups:
        batch = group.trees * shape.kv_heads
        lengths = [shape.group * t.rows for t in group.tiles] + [group.length, group.length]
        size = batch * sum(lengths)
        parts = flat.narrow(0, offset, size).split([batch * n for n in lengths])
        *q, k, v = (p.view(batch, n, shape.head_dim) for p, n in zip(parts, lengths, strict=True))
        offset += size
        blocks.append((tuple(q), k, v))
    return blocks


def _out_blocks(flat: Tensor, plan: AttentionPlan) -> list[tuple[Tensor, ...]]:
    """Each group's views of the output buffer: tiles (B kv, g rows, d)."""
    shape, blocks, offset = plan.shape, [], 0
    for group in plan.groups:
        batch, tiles = group.trees * shape.kv_heads, []
        for tile in group.tiles:
            rows = shape.group * tile.rows
            tiles.append(flat.narrow(0, offset, batch * rows).view(batch, rows, shape.head_dim))
            offset += batch * rows
        blocks.append(tuple(tiles))
    return blocks


def _softmax_scores(q: Tensor, k: Tensor, tile: Tile, shape: AttentionShape) -> Tensor:
    """softmax(q k^T + mask) for q that is already scaled: (B kv, g rows, keys), computed in place."""
    scores = torch.bmm(q, k[:, : tile.keys].transpose(1, 2))
    scores.view(-1, shape.kv_heads, shape.group, tile.rows, tile.keys).add_(tile.mask)
    torch._softmax(scores, -1, False, out=scores)
    return scores


def attention_forward(heads: Tensor, plan: AttentionPlan) -> Tensor:
    """Compute attention within every tree.

    ``o = softmax(q k^T + mask) v``, with the scale already in q. The softmax is not saved for the backward pass: it would
    be a fifth of all activations, and recomputing it takes a hundredth of a step.

    Args:
        heads: (N, d) head rows in the plan's order.

    Returns:
        Output rows (N_q, d) in the plan's order.
    """
    out = heads.new_empty(plan.out_to_heads.shape[0], plan.shape.head_dim)
    for (qs, k, v), outs, group in zip(_blocks(heads, plan), _out_blocks(out, plan), plan.groups, strict=True):
        for q, o, tile in zip(qs, outs, group.tiles, strict=True):
            torch.bmm(_softmax_scores(q, k, tile, plan.shape), v[:, : tile.keys], out=o)
    return out


def attention_backward(grad_out: Tensor, heads: Tensor, plan: AttentionPlan) -> Tensor:
    """Gradient of `attention_forward` with respect to `heads`.

    With P the softmax and dO the gradient of the output: ``dV = P^T dO``, ``dP = dO V^T``,
    ``dS = P * (dP - rowsum(P * dP))``, ``dQ = dS K``, ``dK = dS^T Q``.
    """
    grad = torch.empty_like(heads)
    inputs, grads, outputs = _blocks(heads, plan), _blocks(grad, plan), _out_blocks(grad_out, plan)
    for (qs, k, v), (dqs, dk, dv), dos, group in zip(inputs, grads, outputs, plan.groups, strict=True):
        for i in reversed(range(len(group.tiles))):  # last tile has all keys: writes dK, dV; the others add
            tile, q, do = group.tiles[i], qs[i], dos[i]
            p = _softmax_scores(q, k, tile, plan.shape)
            ds = torch.bmm(do, v[:, : tile.keys].transpose(1, 2))
            torch._softmax_backward_data(ds, p, -1, p.dtype, grad_input=ds)
            torch.bmm(ds, k[:, : tile.keys], out=dqs[i])
            if tile.keys == group.length:
                torch.bmm(p.transpose(1, 2), do, out=dv)
                torch.bmm(ds.transpose(1, 2), q, out=dk)
            else:
                dv[:, : tile.keys] += torch.bmm(p.transpose(1, 2), do)
                dk[:, : tile.keys] += torch.bmm(ds.transpose(1, 2), q)
    return grad
