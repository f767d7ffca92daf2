"""Attention over packed trees without a mask in memory: two varlen passes merged by their log-sum-exps, and FlexAttention.

**Varlen.** Pass 1 is causal attention with every prompt and every completion a sequence of its own; pass 2 lets all completion tokens
of a tree see the keys of its prompt. Together they compute exactly the pairs of the tree mask. Where a query has been in both, with
outputs o1, o2 and log-sum-exps l1, l2 of its scores:

    l = log(exp(l1) + exp(l2)),   o = exp(l1 - l) o1 + exp(l2 - l) o2

An attention sink is one more term of the sum, with a value of zero. The backward pass calls the kernel's backward once a pass with the
*merged* output and log-sum-exp, so that it computes ``P = exp(s - l)`` and ``D = rowsum(do * o)`` of the whole softmax. Autograd through
the merge would be wrong: flash kernels have no gradient of their log-sum-exp.

**FlexAttention** evaluates the mask block by block in a compiled kernel, which takes soft caps and windows that restart with each
completion.

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
FLASH_MAX_HEAD = 256  # numbers in a head: what flash kernels take
BLOCK = 128  # FlexAttention's tiles; its backward wants rows of whole ones
COMPILATIONS = (
    64  # variants of FlexAttention in one process; at torch's limit of 8 it would fall back to a whole score matrix
)


def moved_together(parts: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of one type on a device, by a single copy."""
    if device.type == "cpu":
        return [torch.from_numpy(p) for p in parts]
    flat = moved(torch.from_numpy(np.concatenate([p.ravel() for p in parts])), device)
    return [t.view(p.shape) for t, p in zip(flat.split([p.size for p in parts]), parts, strict=True)]


def longest_path(segments: Sequence[Segment]) -> int:
    """Tokens of the longest prompt with one of its completions: a window of so many hides nothing."""
    return max(s.prompt_len + max(s.completion_lens, default=0) for s in segments)


# ---- The plan of both passes: made on the host once a batch, for all layers ----


class Sequences(NamedTuple):
    """Sequences laid end to end, as flash kernels take them: where each begins and the last one ends, int32, and the longest lengths."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    def bounds(self) -> Iterator[tuple[slice, slice]]:
        """Queries and keys of each sequence; reads the device."""
        q, k = self.cu_q.tolist(), self.cu_k.tolist()
        for a, b, c, d in zip(q, q[1:], k, k[1:], strict=False):
            yield slice(a, b), slice(c, d)


class VarlenPlan(NamedTuple):
    """Sequences of pass 1, over the whole row; of pass 2, whose queries are `rows` and whose keys are `keys` (int64) of the row.

    `second` is None where no tree has two completions: a lone one goes on in its prompt's sequence.
    """

    first: Sequences
    second: Sequences | None
    rows: Tensor
    keys: Tensor


def varlen_plan(batch: PackedBatch) -> VarlenPlan:
    """The plan of a batch, built once."""
    if "varlen" not in batch.cache:
        batch.cache["varlen"] = _build_plan(batch.segments, batch.input_ids.device)
    return cast(VarlenPlan, batch.cache["varlen"])


def _build_plan(segments: Sequence[Segment], device: torch.device) -> VarlenPlan:
    own: list[int] = []  # lengths
    queries: list[int] = []
    prompts: list[int] = []
    rows: list[np.ndarray] = [np.zeros(0, np.int32)]
    keys: list[np.ndarray] = [np.zeros(0, np.int32)]
    for s in segments:
        written = [n for n in s.completion_lens if n]
        if len(written) < 2:
            own.append(s.length)
            continue
        own += [s.prompt_len, *written]
        queries.append(sum(written))
        prompts.append(s.prompt_len)
        begin = s.start + s.prompt_len
        keys.append(np.arange(s.start, begin, dtype=np.int32))
        rows.append(np.arange(begin, s.start + s.length, dtype=np.int32))
    starts = [np.cumsum([0, *lengths], dtype=np.int32) for lengths in (own, queries, prompts)]
    cu, cu_q, cu_k, at, of = moved_together([*starts, np.concatenate(rows), np.concatenate(keys)], device)
    longest = max(own)
    second = Sequences(cu_q, cu_k, max(queries), max(prompts)) if queries else None
    return VarlenPlan(Sequences(cu, cu, longest, longest), second, at.long(), of.long())


# ---- Determinism: where torch's deterministic mode only warns, backward kernels of attention keep their unordered way ----


def _only_warns() -> bool:
    return torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()


@contextmanager
def strict(wanted: bool) -> Iterator[None]:
    """Deterministic mode without its `warn_only`, for kernels that have a deterministic way and take it only then."""
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
    """Whether flash kernels run; the meta device has their shapes."""
    return query.device.type == "meta" or (query.device.type == "cuda" and query.dtype in HALF)


def _wide(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _width(q: Tensor, v: Tensor) -> int:
    """Flash kernels want one size of head, a multiple of 8: zeros behind change neither scores nor what is kept of the output."""
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
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the dropout that there is none of
    with strict(_only_warns()):
        found = torch.ops.aten._flash_attention_backward(
            *wide, lse, s.cu_q, s.cu_k, s.max_q, s.max_k, 0.0, causal, state, state.new_empty(0), scale=scale
        )
    dq, dk, dv = (g[..., : x.shape[-1]] for g, x in zip(found, (q, k, v), strict=True))
    return dq, dk, dv


def eager_forward(q: Tensor, k: Tensor, v: Tensor, s: Sequences, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """What the flash kernel computes, sequence by sequence: any dtype, any device."""
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = q.new_zeros(q.shape[1], len(q), dtype=_sums(q))
    for at, of in s.bounds():
        scores = _scores(q[at], k[of], causal, scale)
        lse[:, at] = torch.logsumexp(scores, -1).flatten(0, 1)
        weights = torch.softmax(scores, -1)
        out[at] = torch.einsum("kgqs,skd->qkgd", weights, v[of].to(weights.dtype)).flatten(1, 2).to(out.dtype)
    return out, lse


def eager_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, s: Sequences, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the flash kernel's backward computes of an output and log-sum-exp that it is given."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    rest = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)  # (T, H)
    heads = (k.shape[1], q.shape[1] // k.shape[1])
    for at, of in s.bounds():
        keys, values = k[of].to(lse.dtype), v[of].to(lse.dtype)
        into = grad[at].to(lse.dtype).unflatten(1, heads)
        weights = torch.exp(_scores(q[at], k[of], causal, scale) - lse[:, at].unflatten(0, heads)[..., None])
        scores = torch.einsum("qkgd,skd->kgqs", into, values) - rest[at].t().unflatten(0, heads)[..., None]
        scores = weights * scores * scale
        dq[at] = torch.einsum("kgqs,skd->qkgd", scores, keys).flatten(1, 2).to(dq.dtype)
        dk[of] = torch.einsum("kgqs,qkgd->skd", scores, q[at].to(lse.dtype).unflatten(1, heads)).to(dk.dtype)
        dv[of] = torch.einsum("kgqs,qkgd->skd", weights, into).to(dv.dtype)
    return dq, dk, dv


def _sums(x: Tensor) -> torch.dtype:
    """In what scores and their sums are held."""
    return torch.promote_types(x.dtype, torch.float32)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """(H_kv, H / H_kv, queries, keys) of one sequence; a causal one has as many keys as queries."""
    kind = _sums(q)
    scores = torch.einsum("qkgd,skd->kgqs", q.to(kind).unflatten(1, (k.shape[1], -1)), k.to(kind)) * scale
    if causal:
        hidden = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


# ---- Both passes, and their gradient ----


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, scaling: float, sinks: Tensor | None = None
) -> Tensor:
    """Attention within each tree of a packed row, by two varlen passes; arguments and result as of `tree_attention`."""
    found: Tensor = _TwoPasses.apply(query, key, value, sinks, plan, scaling)
    return found


class _TwoPasses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: VarlenPlan, scale: float
    ) -> Tensor:
        out, lse = _forward(q, k, v, plan.first, True, scale)
        if plan.second is not None:
            ours, keys, values = (
                q.index_select(0, plan.rows),
                k.index_select(0, plan.keys),
                v.index_select(0, plan.keys),
            )
            other, seen = _forward(ours, keys, values, plan.second, False, scale)
            own = lse.index_select(1, plan.rows)
            total = torch.logaddexp(own, seen)
            merged = out.index_select(0, plan.rows) * _share(own, total) + other * _share(seen, total)
            out.index_copy_(0, plan.rows, merged.to(out.dtype))  # the rows are unique: one order, whatever threads do
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
            into, ours, found = (x.index_select(0, rows) for x in (grad, q, out))
            theirs, values = (x.index_select(0, keys) for x in (k, v))
            sums = lse.index_select(1, rows)
            more = _backward(into, ours, theirs, values, found, sums, plan.second, False, scale)
            dq, dk, dv = (_added(a, at, b) for a, at, b in zip((dq, dk, dv), (rows, keys, keys), more, strict=True))
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            rest = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).t()  # (H, T)
            dsinks = -(torch.exp(sinks[:, None].to(lse.dtype) - lse) * rest).sum(1).to(sinks.dtype)
        return dq, dk, dv, dsinks, None, None


def _share(part: Tensor, total: Tensor) -> Tensor:
    """What one pass has of the whole softmax: (H, T) log-sum-exps to (T, H, 1)."""
    return torch.exp(part - total).t()[..., None]


def _added(to: Tensor, at: Tensor, more: Tensor) -> Tensor:
    """`to` with `more` added in unique rows: `index_add` on a GPU would be no faster and has no order."""
    return to.index_copy(0, at, to.index_select(0, at) + more)


# ---- FlexAttention ----


class FlexPlan(NamedTuple):
    """The row's length, in whole blocks, and FlexAttention's mask."""

    length: int
    mask: Any


def tokens_of(segments: Sequence[Segment], length: int, window: int | None) -> list[np.ndarray]:
    """For each token, (length,) int32: its sequence (a prompt or a completion), its prompt's, its position, the first one that it sees.

    Padding is one more sequence.
    """
    own, root, position = (np.full(length, -1, dtype=np.int32) for _ in range(3))
    sequence = 0
    for s in segments:
        prompt, at = sequence, s.start
        for n in (s.prompt_len, *s.completion_lens):
            begin = 0 if sequence == prompt else s.prompt_len
            own[at : at + n], root[at : at + n] = sequence, prompt
            position[at : at + n] = np.arange(begin, begin + n)
            at, sequence = at + n, sequence + 1
    return [own, root, position, np.full_like(position, -1) if window is None else position - (window - 1)]


def mask_mod(own: Tensor, root: Tensor, position: Tensor, first: Tensor) -> Callable[..., Tensor]:
    """The tree mask as FlexAttention asks for it, of vectors as `tokens_of` gives them.

    It holds no number: with dynamic shapes a number would be a symbol in the kernel, and each window a compilation.
    """

    def allowed(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & ((own[q] == own[k]) | (root[q] == own[k])) & (position[k] >= first[q])

    return allowed


def visible_blocks(segments: Sequence[Segment], length: int, window: int | None) -> np.ndarray:
    """(L / 128, L / 128) bool: blocks of queries and keys that hold a pair of the mask; found without a matrix of all pairs."""
    found = np.zeros((length // BLOCK, length // BLOCK), dtype=np.bool_)
    tokens = sum(s.length for s in segments)
    found[np.arange(tokens // BLOCK, len(found)), np.arange(tokens // BLOCK, len(found))] = True  # padding
    for s in segments:
        begin = s.start
        for n in (s.prompt_len, *s.completion_lens):
            for block in range(begin // BLOCK, -(-(begin + n) // BLOCK) if n else 0):
                first, last = max(begin, block * BLOCK), min(begin + n, (block + 1) * BLOCK) - 1
                low = begin if window is None else max(begin, first - window + 1)
                found[block, low // BLOCK : last // BLOCK + 1] = True
                if begin > s.start:
                    back = 0 if window is None else max(0, s.prompt_len + first - begin - window + 1)
                    if back < s.prompt_len:
                        found[block, (s.start + back) // BLOCK : (s.start + s.prompt_len - 1) // BLOCK + 1] = True
            begin += n
    return found


def flex_plan(batch: PackedBatch, window: int | None) -> FlexPlan:
    """The plan of a batch and a window, built once."""
    key = f"flex/{window}"
    if key not in batch.cache:
        batch.cache[key] = _build_flex(batch.segments, batch.tokens, window, batch.input_ids.device)
    return cast(FlexPlan, batch.cache[key])


def _build_flex(segments: Sequence[Segment], tokens: int, window: int | None, device: torch.device) -> FlexPlan:
    from torch.nn.attention.flex_attention import BlockMask

    length = -(-tokens // BLOCK) * BLOCK
    blocks = visible_blocks(segments, length, window)
    first = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)  # the visible ones first
    counts, order, own, root, position, low = moved_together(
        [blocks.sum(1, dtype=np.int32), first, *tokens_of(segments, length, window)], device
    )
    mask = BlockMask.from_kv_blocks(
        counts[None, None], order[None, None], BLOCK_SIZE=BLOCK, mask_mod=mask_mod(own, root, position, low)
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
    return torch.compile(flex_attention, dynamic=True)  # else each length would be compiled by itself


def flex_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: FlexPlan,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention within each tree of a packed row, by FlexAttention; arguments and result as of `tree_attention`.

    Compiled on a GPU; elsewhere torch computes all scores, and has no gradient.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    run = flex_attention if query.device.type == "cpu" else _compiled()
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, plan.length - len(x))).transpose(0, 1)[None] for x in (query, key, value))
    how: dict[str, Any] = {"block_mask": plan.mask, "scale": scaling, "enable_gqa": q.shape[1] != k.shape[1]}
    if softcap is not None:
        how["score_mod"] = _cap(softcap, q.device)
    if sinks is None:
        out = run(q, k, v, **how)
    else:
        out, more = run(q, k, v, **how, return_aux=AuxRequest(lse=True))
        # exp(l) of exp(l) + exp(sink)
        out = (out * torch.sigmoid(more.lse - sinks[:, None].to(more.lse.dtype))[..., None]).to(out.dtype)
    return cast(Tensor, out[0].transpose(0, 1)[: len(query)])
