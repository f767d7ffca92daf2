"""Attention over packed trees without a mask in memory: two varlen passes merged by their log-sum-exps, and FlexAttention.

**Varlen.** Pass 1 is causal attention with each prompt and each completion as a separate sequence; in pass 2 all completion tokens of
a tree attend to the keys of its prompt. Together they compute exactly the pairs of the tree mask. For a query in both passes, with
outputs o1, o2 and log-sum-exps l1, l2 of its scores:

    l = log(exp(l1) + exp(l2)),   o = exp(l1 - l) o1 + exp(l2 - l) o2

An attention sink is another term of the sum, with a value of zero. The backward pass calls the kernel's backward once per pass with the
*merged* output and log-sum-exp, so it computes ``P = exp(s - l)`` and ``D = rowsum(do * o)`` of the whole softmax. Autograd through the
merge would be wrong: flash kernels have no gradient for their log-sum-exp.

**FlexAttention** evaluates the mask block by block in a compiled kernel, which supports soft caps, and windows by position, where each
completion restarts at the end of its prompt.

Papers: FlashAttention-2 (arXiv 2307.08691), FlexAttention (arXiv 2412.05496).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from penchant.base.machine import moved
from penchant.types import PackedBatch, Segment

HALF = (torch.bfloat16, torch.float16)
FLASH_MAX_HEAD = 256  # largest head dimension that flash kernels take
BLOCK = 128  # FlexAttention's tile size; its backward needs rows of whole tiles
# compiled variants of FlexAttention in one process; beyond torch's limit of 8 it would fall back to a full score matrix
COMPILATIONS = 64


def moved_together(parts: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Move arrays of one dtype to a device in a single copy."""
    if device.type == "cpu":
        return [torch.from_numpy(p) for p in parts]
    flat = moved(torch.from_numpy(np.concatenate([p.ravel() for p in parts])), device)
    return [t.view(p.shape) for t, p in zip(flat.split([p.size for p in parts]), parts, strict=True)]


def longest_path(segments: Sequence[Segment]) -> int:
    """Number of tokens in the longest prompt plus completion: a window of at least this size hides nothing."""
    return max(s.prompt_len + max(s.completion_lens, default=0) for s in segments)


# ---- The plan of both passes: built on the host once per batch, for all layers ----


class Sequences(NamedTuple):
    """Sequences laid end to end, as flash kernels take them: cumulative lengths of queries and keys (int32), and the longest lengths."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    def bounds(self) -> Iterator[tuple[slice, slice]]:
        """Yield slices of the queries and keys of each sequence; copies from the device."""
        q, k = self.cu_q.tolist(), self.cu_k.tolist()
        for a, b, c, d in zip(q, q[1:], k, k[1:], strict=False):
            yield slice(a, b), slice(c, d)


class VarlenPlan(NamedTuple):
    """Sequences of pass 1 (the whole row) and of pass 2 (queries are the row's tokens `rows`, keys its tokens `keys`, int64).

    `second` is None if no tree has two completions: a single one is part of its prompt's sequence.
    """

    first: Sequences
    second: Sequences | None
    rows: Tensor
    keys: Tensor


def varlen_plan(batch: PackedBatch) -> VarlenPlan:
    """The varlen plan of a batch, built once per batch."""
    if "varlen" not in batch.cache:
        batch.cache["varlen"] = _build_plan(batch.segments, batch.input_ids.device)
    return cast(VarlenPlan, batch.cache["varlen"])


def _build_plan(segments: Sequence[Segment], device: torch.device) -> VarlenPlan:
    sequence_lens: list[int] = []
    query_lens: list[int] = []
    prompt_lens: list[int] = []
    rows: list[np.ndarray] = [np.zeros(0, np.int32)]
    keys: list[np.ndarray] = [np.zeros(0, np.int32)]
    for s in segments:
        lens = [n for n in s.completion_lens if n]
        if len(lens) < 2:
            sequence_lens.append(s.length)
            continue
        sequence_lens += [s.prompt_len, *lens]
        query_lens.append(sum(lens))
        prompt_lens.append(s.prompt_len)
        begin = s.start + s.prompt_len
        keys.append(np.arange(s.start, begin, dtype=np.int32))
        rows.append(np.arange(begin, s.start + s.length, dtype=np.int32))
    starts = [np.cumsum([0, *lengths], dtype=np.int32) for lengths in (sequence_lens, query_lens, prompt_lens)]
    cu, cu_q, cu_k, row_index, key_index = moved_together([*starts, np.concatenate(rows), np.concatenate(keys)], device)
    longest = max(sequence_lens)
    second = Sequences(cu_q, cu_k, max(query_lens), max(prompt_lens)) if query_lens else None
    return VarlenPlan(Sequences(cu, cu, longest, longest), second, row_index.long(), key_index.long())


# ---- Determinism: if torch's deterministic mode only warns, the backward kernels of attention stay nondeterministic ----


def _only_warns() -> bool:
    return torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()


@contextmanager
def strict(wanted: bool) -> Iterator[None]:
    """Deterministic mode without `warn_only`, for kernels that use their deterministic variant only then."""
    if not wanted:
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


# ---- The kernels: forward (q, k, v) -> out (T, H, d_v), log-sum-exp (H, T); backward -> gradients of q, k, v ----


def _flash(query: Tensor) -> bool:
    """Whether flash kernels are used; on the meta device they only give shapes."""
    return query.device.type == "meta" or (query.device.type == "cuda" and query.dtype in HALF)


def _wide(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _width(q: Tensor, v: Tensor) -> int:
    """The common head dimension for flash kernels, a multiple of 8; padding with zeros changes neither scores nor the output kept."""
    return -(-max(q.shape[-1], v.shape[-1]) // 8) * 8


def _forward(q: Tensor, k: Tensor, v: Tensor, s: Sequences, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if not _flash(q):
        return eager_forward(q, k, v, s, causal, scale)
    width = _width(q, v)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(_wide(x, width) for x in (q, k, v)), s.cu_q, s.cu_k, s.max_q, s.max_k, 0.0, causal, False, scale=scale
    )
    return out[..., : v.shape[-1]], lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, s: Sequences, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not _flash(q):
        return eager_backward(grad, q, k, v, out, lse, s, causal, scale)
    width = _width(q, v)
    wide = [_wide(x, width) for x in (grad, q, k, v, out)]
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # random state of the dropout, which is off
    with strict(_only_warns()):
        grads = torch.ops.aten._flash_attention_backward(
            *wide, lse, s.cu_q, s.cu_k, s.max_q, s.max_k, 0.0, causal, state, state.new_empty(0), scale=scale
        )
    dq, dk, dv = (g[..., : x.shape[-1]] for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


def eager_forward(q: Tensor, k: Tensor, v: Tensor, s: Sequences, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The flash kernel's forward in plain torch, sequence by sequence: any dtype, any device."""
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = q.new_zeros(q.shape[1], len(q), dtype=_sums(q))
    for q_rows, k_rows in s.bounds():
        scores = _scores(q[q_rows], k[k_rows], causal, scale)
        lse[:, q_rows] = torch.logsumexp(scores, -1).flatten(0, 1)
        weights = torch.softmax(scores, -1)
        out[q_rows] = torch.einsum("kgqs,skd->qkgd", weights, v[k_rows].to(weights.dtype)).flatten(1, 2).to(out.dtype)
    return out, lse


def eager_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, s: Sequences, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The flash kernel's backward in plain torch, from a given output and log-sum-exp."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    row_sums = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)  # (T, H)
    heads = (k.shape[1], q.shape[1] // k.shape[1])
    for q_rows, k_rows in s.bounds():
        keys, values = k[k_rows].to(lse.dtype), v[k_rows].to(lse.dtype)
        d_out = grad[q_rows].to(lse.dtype).unflatten(1, heads)
        weights = torch.exp(
            _scores(q[q_rows], k[k_rows], causal, scale) - lse[:, q_rows].unflatten(0, heads)[..., None]
        )
        scores = torch.einsum("qkgd,skd->kgqs", d_out, values) - row_sums[q_rows].t().unflatten(0, heads)[..., None]
        scores = weights * scores * scale
        dq[q_rows] = torch.einsum("kgqs,skd->qkgd", scores, keys).flatten(1, 2).to(dq.dtype)
        dk[k_rows] = torch.einsum("kgqs,qkgd->skd", scores, q[q_rows].to(lse.dtype).unflatten(1, heads)).to(dk.dtype)
        dv[k_rows] = torch.einsum("kgqs,qkgd->skd", weights, d_out).to(dv.dtype)
    return dq, dk, dv


def _sums(x: Tensor) -> torch.dtype:
    """The dtype of scores and their sums."""
    return torch.promote_types(x.dtype, torch.float32)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """Scores (H_kv, H / H_kv, queries, keys) of one sequence; a causal one has as many keys as queries."""
    dtype = _sums(q)
    scores = torch.einsum("qkgd,skd->kgqs", q.to(dtype).unflatten(1, (k.shape[1], -1)), k.to(dtype)) * scale
    if causal:
        future = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores


# ---- Both passes, and their gradient ----


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, scaling: float, sinks: Tensor | None = None
) -> Tensor:
    """Attention within each tree of a packed row, by two varlen passes; arguments and result as in `tree_attention`."""
    out: Tensor = _TwoPasses.apply(query, key, value, sinks, plan, scaling)
    return out


class _TwoPasses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: VarlenPlan, scale: float
    ) -> Tensor:
        out, lse = _forward(q, k, v, plan.first, True, scale)
        if plan.second is not None:
            queries, keys, values = (
                q.index_select(0, plan.rows),
                k.index_select(0, plan.keys),
                v.index_select(0, plan.keys),
            )
            prompt_out, prompt_lse = _forward(queries, keys, values, plan.second, False, scale)
            own_lse = lse.index_select(1, plan.rows)
            total = torch.logaddexp(own_lse, prompt_lse)
            merged = out.index_select(0, plan.rows) * _share(own_lse, total) + prompt_out * _share(prompt_lse, total)
            out.index_copy_(0, plan.rows, merged.to(out.dtype))  # rows are unique: the order of threads is irrelevant
            lse.index_copy_(1, plan.rows, total)
        if sinks is not None:
            total = torch.logaddexp(lse, sinks[:, None].to(lse.dtype))
            out, lse = (out * _share(lse, total)).to(out.dtype), total
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        plan, scale = ctx.plan, ctx.scale
        dq, dk, dv = _backward(grad, q, k, v, out, lse, plan.first, True, scale)
        if plan.second is not None:
            rows, keys = plan.rows, plan.keys
            d_out, queries, outs = (x.index_select(0, rows) for x in (grad, q, out))
            prompt_keys, prompt_values = (x.index_select(0, keys) for x in (k, v))
            lse_rows = lse.index_select(1, rows)
            second_grads = _backward(
                d_out, queries, prompt_keys, prompt_values, outs, lse_rows, plan.second, False, scale
            )
            dq, dk, dv = (
                _added(a, index, b) for a, index, b in zip((dq, dk, dv), (rows, keys, keys), second_grads, strict=True)
            )
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            row_sums = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).t()  # (H, T)
            dsinks = -(torch.exp(sinks[:, None].to(lse.dtype) - lse) * row_sums).sum(1).to(sinks.dtype)
        return dq, dk, dv, dsinks, None, None


def _share(part: Tensor, total: Tensor) -> Tensor:
    """The share of one pass in the whole softmax: (H, T) log-sum-exps to (T, H, 1)."""
    return torch.exp(part - total).t()[..., None]


def _added(to: Tensor, index: Tensor, more: Tensor) -> Tensor:
    """`to` with `more` added in unique rows; `index_add` would be no faster on a GPU, and its order is undefined."""
    return to.index_copy(0, index, to.index_select(0, index) + more)


# ---- FlexAttention ----


class FlexPlan(NamedTuple):
    """The row's length in tokens, rounded up to whole blocks, and FlexAttention's mask."""

    length: int
    mask: Any


def tokens_of(segments: Sequence[Segment], length: int, window: int | None) -> list[np.ndarray]:
    """For each token, (length,) int32: its sequence (prompt or completion), its prompt's sequence, its position, and the first visible one.

    Padding is a separate sequence, -1.
    """
    own, root, position = (np.full(length, -1, dtype=np.int32) for _ in range(3))
    sequence = 0
    for s in segments:
        prompt, start = sequence, s.start
        for n in (s.prompt_len, *s.completion_lens):
            begin = 0 if sequence == prompt else s.prompt_len
            own[start : start + n], root[start : start + n] = sequence, prompt
            position[start : start + n] = np.arange(begin, begin + n)
            start, sequence = start + n, sequence + 1
    return [own, root, position, np.full_like(position, -1) if window is None else position - (window - 1)]


def mask_mod(own: Tensor, root: Tensor, position: Tensor, first: Tensor) -> Callable[..., Tensor]:
    """The tree mask as a FlexAttention `mask_mod`, from the vectors of `tokens_of`.

    It captures no Python number: with dynamic shapes a number would be a symbol in the kernel, and each window would recompile it.
    """

    def allowed(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & ((own[q] == own[k]) | (root[q] == own[k])) & (position[k] >= first[q])

    return allowed


def visible_blocks(segments: Sequence[Segment], length: int, window: int | None) -> np.ndarray:
    """(L / 128, L / 128) bool: blocks of queries and keys with a visible pair, found without a matrix of all pairs."""
    visible = np.zeros((length // BLOCK, length // BLOCK), dtype=np.bool_)
    tokens = sum(s.length for s in segments)
    visible[np.arange(tokens // BLOCK, len(visible)), np.arange(tokens // BLOCK, len(visible))] = True  # padding
    for s in segments:
        begin = s.start
        for n in (s.prompt_len, *s.completion_lens):
            for block in range(begin // BLOCK, -(-(begin + n) // BLOCK) if n else 0):
                first, last = max(begin, block * BLOCK), min(begin + n, (block + 1) * BLOCK) - 1
                first_key = begin if window is None else max(begin, first - window + 1)
                visible[block, first_key // BLOCK : last // BLOCK + 1] = True
                if begin > s.start:
                    first_visible = 0 if window is None else max(0, s.prompt_len + first - begin - window + 1)
                    if first_visible < s.prompt_len:
                        visible[
                            block, (s.start + first_visible) // BLOCK : (s.start + s.prompt_len - 1) // BLOCK + 1
                        ] = True
            begin += n
    return visible


def flex_plan(batch: PackedBatch, window: int | None) -> FlexPlan:
    """The FlexAttention plan of a batch and a window, built once."""
    key = f"flex/{window}"
    if key not in batch.cache:
        batch.cache[key] = _build_flex(batch.segments, batch.tokens, window, batch.input_ids.device)
    return cast(FlexPlan, batch.cache[key])


def _build_flex(segments: Sequence[Segment], tokens: int, window: int | None, device: torch.device) -> FlexPlan:
    from torch.nn.attention.flex_attention import BlockMask

    length = -(-tokens // BLOCK) * BLOCK
    blocks = visible_blocks(segments, length, window)
    block_order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)  # visible blocks first
    counts, order, own, root, position, first_visible = moved_together(
        [blocks.sum(1, dtype=np.int32), block_order, *tokens_of(segments, length, window)], device
    )
    mask = BlockMask.from_kv_blocks(
        counts[None, None], order[None, None], BLOCK_SIZE=BLOCK, mask_mod=mask_mod(own, root, position, first_visible)
    )
    return FlexPlan(length, mask)


@cache
def _cap(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    cap = torch.tensor(softcap, device=device)  # a tensor, as in `mask_mod`

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@cache
def _compiled() -> Any:
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, COMPILATIONS)
    return torch.compile(flex_attention, dynamic=True)  # else each length would be compiled separately


def flex_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: FlexPlan,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention within each tree of a packed row, by FlexAttention; arguments and result as in `tree_attention`.

    Not compiled on a CPU, where torch computes all scores and has no gradient.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    attend = flex_attention if query.device.type == "cpu" else _compiled()
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, plan.length - len(x))).transpose(0, 1)[None] for x in (query, key, value))
    options: dict[str, Any] = {"block_mask": plan.mask, "scale": scaling, "enable_gqa": q.shape[1] != k.shape[1]}
    if softcap is not None:
        options["score_mod"] = _cap(softcap, q.device)
    if sinks is None:
        out = attend(q, k, v, **options)
    else:
        out, aux = attend(q, k, v, **options, return_aux=AuxRequest(lse=True))
        # the share exp(l) / (exp(l) + exp(sink))
        out = (out * torch.sigmoid(aux.lse - sinks[:, None].to(aux.lse.dtype))[..., None]).to(out.dtype)
    return cast(Tensor, out[0].transpose(0, 1)[: len(query)])
