"""The tree mask: a token attends, causally, to its own prompt and its own completion only.

Trees are short and a packed row is long, so attention runs tree by tree: rows are gathered into groups of equal (rounded)
length, one batched attention a group, and scattered back. Rounding each tree's length by itself keeps a tree's numbers
independent of which other trees share the row.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penchant.types import PackedBatch, Segment

IMPLEMENTATION = "penchant_tree"
_EAGER_MAX_LENGTH = 768  # above this, a full score matrix costs more than SDPA's tiles


@dataclass(frozen=True, slots=True)
class Group:
    """Trees of one rounded length: `index` (B, L) positions in the row (padding points at 0), `mask` (B, 1, L, L) bool."""

    index: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class TreeLayout:
    """How a packed row falls apart into groups, and `inverse` (T,), which puts the groups' outputs back in row order."""

    groups: tuple[Group, ...]
    inverse: Tensor


def rounded_length(n: int) -> int:
    """The padded length of a tree of n tokens: the next multiple of 16, 32 above 256, so that few lengths occur."""
    step = 16 if n <= 256 else 32
    return -(-n // step) * step


def tree_mask(segment: Segment, length: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Who attends to whom in one tree: (length, length) bool, True = may attend.

    Token i attends to j when j <= i, j is in the prompt or in i's own completion, and, under a sliding window w,
    ``position(i) - position(j) < w``: positions, not packed indices, for completions restart at the prompt's end.
    Padding attends to itself, so that no row is empty (a softmax over nothing is NaN).
    """
    branch = torch.zeros(length, dtype=torch.int64, device=device)
    position = torch.arange(length, device=device)
    at = segment.prompt_len
    for k, n in enumerate(segment.completion_lens):
        branch[at : at + n] = k + 1
        position[at : at + n] = torch.arange(segment.prompt_len, segment.prompt_len + n, device=device)
        at += n
    branch[at:] = -1
    index = torch.arange(length, device=device)
    allowed = (index[:, None] >= index[None, :]) & ((branch[None, :] == 0) | (branch[:, None] == branch[None, :]))
    if sliding_window is not None:
        allowed &= position[:, None] - position[None, :] < sliding_window
    allowed[at:] = False
    allowed |= torch.eye(length, dtype=torch.bool, device=device)
    return allowed


def tree_layout(batch: PackedBatch, sliding_window: int | None = None) -> TreeLayout:
    """The layout of a batch, built once per batch and window."""
    key = f"layout/{sliding_window}"
    if key not in batch.cache:
        batch.cache[key] = _build_layout(batch.segments, sliding_window, batch.input_ids.device)
    layout = batch.cache[key]
    assert isinstance(layout, TreeLayout)
    return layout


def _build_layout(segments: tuple[Segment, ...], sliding_window: int | None, device: torch.device) -> TreeLayout:
    by_length: dict[int, list[Segment]] = defaultdict(list)
    for segment in segments:
        by_length[rounded_length(segment.length)].append(segment)
    groups = []
    inverse = torch.empty(sum(s.length for s in segments), dtype=torch.int64, device=device)
    done = 0
    for length, members in sorted(by_length.items()):
        index = torch.zeros(len(members), length, dtype=torch.int64, device=device)
        masks = []
        for b, segment in enumerate(members):
            n = segment.length
            index[b, :n] = torch.arange(segment.start, segment.start + n, device=device)
            inverse[segment.start : segment.start + n] = torch.arange(done, done + n, device=device)
            masks.append(tree_mask(segment, length, sliding_window, device))
            done += length
        groups.append(Group(index, torch.stack(masks)[:, None]))
    return TreeLayout(tuple(groups), inverse)


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scaling: float, softcap: float | None = None
) -> Tensor:
    """Attention within each tree of a packed row.

    Args:
        query: (T, H, d); key, value: (T, H_kv, d), H a multiple of H_kv.
        layout: the row's `TreeLayout`.
        scaling: factor of the scores.
        softcap: ``softcap * tanh(scores / softcap)`` when given (Gemma 2).

    Returns:
        (T, H, d_v).
    """
    heads = query.shape[1]
    repeat = heads // key.shape[1]
    outputs = []
    for group in layout.groups:
        q, k, v = (x[group.index].transpose(1, 2) for x in (query, key, value))  # (B, heads, L, d)
        if repeat > 1:
            k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        on_cpu = query.device.type in ("cpu", "meta")  # meta: a plan counts what the CPU would hold
        if softcap is not None or (on_cpu and q.shape[2] <= _EAGER_MAX_LENGTH):
            scores = torch.matmul(q, k.transpose(-1, -2)) * scaling
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            scores = scores.masked_fill(~group.mask, float("-inf"))
            out = torch.matmul(torch.softmax(scores, dim=-1, dtype=_softmax_dtype(scores)).to(v.dtype), v)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (B * L, H, d)
    flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return flat.index_select(0, layout.inverse)


def _softmax_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _attention_interface(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: tree attention where a packed batch is passed along, SDPA otherwise."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch: PackedBatch | None = kwargs.pop("penchant_batch", None)
    if batch is None:
        if kwargs.get("softcap") is not None:  # SDPA has no softcap
            return _softcapped_attention(query, key, value, attention_mask, **kwargs), None
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    layout = tree_layout(batch, kwargs.get("sliding_window"))
    scaling = kwargs.get("scaling")
    scaling = float(query.shape[-1] ** -0.5) if scaling is None else float(scaling)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (1, H, T, d) -> (T, H, d)
    return tree_attention(q, k, v, layout, scaling, kwargs.get("softcap"))[None], None


def _softcapped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, softcap: float, scaling: float, **_: Any
) -> Tensor:
    """Eager attention with capped scores for rows that are not packed: (B, H, L, d) -> (B, L, H, d)."""
    repeat = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    scores = torch.tanh(torch.matmul(query, k.transpose(-1, -2)) * (scaling / softcap)) * softcap
    if mask is None and query.shape[2] > 1:  # transformers leaves a plain causal mask out
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min  # finite: a padding row under a window may see nothing at all
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=_softmax_dtype(scores)).to(v.dtype)
    return torch.matmul(weights, v).transpose(1, 2)


def install_tree_attention(model: nn.Module) -> None:
    """Switch a transformers model to the tree attention (which is plain SDPA wherever no packed batch is passed)."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention_interface)
        ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
