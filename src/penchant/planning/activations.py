"""Bytes of one forward and backward pass beyond weights: read off the model's own operations on shapes alone, or by a formula.

Where transformers runs the layers, the very code of a training step runs on the meta device (every shape and no numbers), and
`LiveBytes` counts what it would have held. The CPU fast path keeps a fixed set of tensors a layer, so it has a formula, which a
test compares with a real pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penchant.data.packing import pack
from penchant.data.tokenize import pair_format
from penchant.logprobs import Scorer
from penchant.models.attention import tree_layout
from penchant.models.fast_attention import _KEEP_UP_TO, AttentionShape, attention_plan
from penchant.models.fast_head import _KEEP_BYTES, _MATMUL_ROWS, _SOFTMAX_ELEMENTS
from penchant.models.fast_ops import _TILE_ELEMENTS
from penchant.models.structure import base_model_of
from penchant.planning.live_bytes import LiveBytes
from penchant.planning.outline import META, OutlinedRun
from penchant.rewards.scorer import CausalRewards, EncoderRewards
from penchant.types import PackedBatch, TokenTree

INDEX_BYTES = 8  # of a gather's index


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes beyond weights at the worst moment of a pass.

    Args:
        layers: what the layers keep for the backward pass, and the temporaries of that moment.
        head: what the head holds; layouts: attention plans of every micro-batch of a step; forward: of a pass without gradient.
        by: how it was found: ``formula`` or ``shapes``.
    """

    layers: int
    head: int
    layouts: int
    forward: int
    by: str

    @property
    def total(self) -> int:
        return self.layers + self.head + self.layouts


def activations_of(run: OutlinedRun, model: Any, batches: Sequence[Sequence[TokenTree]], fast: bool) -> Activations:
    """Of a training step whose micro-batches are `batches`, the largest first."""
    shared = run.shared_prompts
    packed = [pack(list(b), shared=shared) for b in batches]
    if fast:
        return _by_formula(
            model, packed, run.dtype, bool(run.config.train.gradient_checkpointing), run.reward_parts is None
        )
    return _by_shapes(run, model, packed[0])


def forward_bytes(run: OutlinedRun, model: Any, batch: Sequence[TokenTree], fast: bool) -> int:
    """Of a pass without gradient."""
    packed = pack(list(batch), shared=run.shared_prompts)
    if fast:
        return _by_formula(model, [packed], run.dtype, False, run.reward_parts is None).forward
    return _forward_by_shapes(run, model, packed)


# ---------------------------------------------------------------------------------------------------------------------
# transformers' layers: the operations themselves, on shapes alone


def _by_shapes(run: OutlinedRun, model: Any, packed: PackedBatch) -> Activations:
    batch = packed.to(META)
    hooks = _outlined_precision(model, run.dtype)
    engine = _engine(run, model)
    model.train()
    with _flash_attention(), LiveBytes(_known(model)) as live:
        _of_completions(engine, batch).backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    for hook in hooks:
        hook.remove()
    for p in model.parameters():
        p.grad = None
    # gradients that stay are a part of their own; what is left of the peak is activations and passing gradients
    forward = _forward_by_shapes(run, model, packed)
    return Activations(max(0, live.peak - gradients), 0, 0, forward, "shapes")


def _forward_by_shapes(run: OutlinedRun, model: Any, packed: PackedBatch) -> int:
    for hook in _outlined_precision(model, run.dtype):
        hook.remove()
    engine = _engine(run, model)
    model.eval()
    with _flash_attention(), LiveBytes(_known(model)) as live, torch.no_grad():
        _of_completions(engine, packed.to(META))
    return live.peak


def _known(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@contextmanager
def _flash_attention() -> Iterator[None]:
    """SDPA as it is on the CPU, which keeps no scores: on the meta device torch would take the plain one, which does."""
    plain = F.scaled_dot_product_attention

    def flash(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        mask = None if attn_mask is None else torch.zeros_like(attn_mask, dtype=q.dtype)
        found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale
        )[0]
        return found

    F.scaled_dot_product_attention = flash  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _of_completions(engine: Any, batch: PackedBatch) -> Tensor:
    found: Tensor = engine.logps(batch).sums if isinstance(engine, Scorer) else engine.rewards(batch)
    return found.sum()


def _engine(run: OutlinedRun, model: Any) -> Any:
    packing = run.layout[0]
    if run.reward_parts is not None and run.reward_parts.encoder:
        return EncoderRewards(model, pair_format(run.tokenizer))
    scorer = Scorer(model, packing, "off")  # type: ignore[arg-type]
    return scorer if run.reward_parts is None else CausalRewards(scorer)


def _outlined_precision(model: Any, dtype: torch.dtype) -> list[Any]:
    """The model in its training dtype, whose gradients go where they go in a run: into an fp32 buffer as soon as they exist."""
    hooks = []
    for p in model.parameters():
        if p.is_floating_point() and p.dtype != dtype:
            p.data = p.data.to(dtype)
        if p.requires_grad and dtype == torch.bfloat16:
            hooks.append(p.register_post_accumulate_grad_hook(_forget))
    base_model_of(model).config.dtype = dtype
    return hooks


def _forget(p: Tensor) -> None:
    p.grad = None


# ---------------------------------------------------------------------------------------------------------------------
# the CPU fast path: what `models/fast_llama.py` keeps, tensor by tensor


def _by_formula(
    model: Any, packed: Sequence[PackedBatch], dtype: torch.dtype, recompute: bool, has_head: bool
) -> Activations:
    config = base_model_of(model).config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = AttentionShape(config.num_attention_heads, config.num_key_value_heads, head_dim)
    size = torch.empty(0, dtype=dtype).element_size()
    plans = [attention_plan(tree_layout(b, None), b.tokens, shape, dtype) for b in packed]
    of_each = [_plan_bytes(p) + _rotation_bytes(b.tokens, shape, size) for p, b in zip(plans, packed, strict=True)]
    layouts = sum(of_each)
    batch, plan = packed[0], plans[0]
    t, d, m = batch.tokens, config.hidden_size, config.intermediate_size
    softmax = sum(
        g.trees * shape.heads * tile.rows * tile.keys
        for g in plan.groups
        if g.length <= _KEEP_UP_TO
        for tile in g.tiles
    )
    heads = len(plan.to_heads) * head_dim
    normed_heads = t * shape.width if "qwen3" in str(config.model_type) else 0
    # n1, y, n2 and the layer's input (d each), attention output, rotated heads, gate and up, softmax; two fp32 numbers a token
    kept = size * (4 * t * d + t * shape.heads * head_dim + heads + 2 * t * m + softmax + normed_heads) + 8 * t
    # while a layer runs backward: gate's and up's gradients, swiglu once more, the weight gradient of one projection
    passing = size * (3 * t * m + 2 * t * d + d * m) + 5 * 4 * min(_TILE_ELEMENTS, t * max(d, m))
    # while it runs forward and is not kept: the projection, heads, gate, up and their product
    running = size * (t * shape.width + heads + 3 * t * m + 5 * t * d) + size * max(
        (g.trees * shape.heads * tile.rows * tile.keys for g in plan.groups for tile in g.tiles), default=0
    )
    layers = config.num_hidden_layers
    saved = layers * size * t * d if recompute else layers * kept
    head = _head_bytes(len(batch.target_ids), config.vocab_size, d, size) if has_head else 0
    states = size * (
        2 * t * d + 2 * len(batch.target_ids) * d
    )  # of the final norm, before and after; what the head reads
    chunk = size * min(len(batch.target_ids), _MATMUL_ROWS) * config.vocab_size + _softmax_bytes(
        len(batch.target_ids), config.vocab_size
    )
    forward = of_each[0] + states + max(running, chunk * has_head)
    # the head is done before the layers run backward: the larger of the two moments counts
    worst = max(head, passing + kept * recompute)
    return Activations(saved + states, worst, layouts, forward, "formula")


def _head_bytes(rows: int, vocabulary: int, d: int, size: int) -> int:
    whole = rows * vocabulary * size
    passing = max(rows * d * size * 2, _softmax_bytes(rows, vocabulary))  # of the backward pass, of the forward pass
    kept = whole if whole <= _KEEP_BYTES else max(_MATMUL_ROWS * vocabulary * size, _KEEP_BYTES)
    return min(whole, kept) + passing


def _softmax_bytes(rows: int, vocabulary: int) -> int:
    """Probabilities of some rows in fp32, and what makes them."""
    return 3 * 4 * min(max(_SOFTMAX_ELEMENTS, vocabulary), rows * vocabulary)


def _plan_bytes(plan: Any) -> int:
    indices = (plan.to_heads, plan.from_heads, plan.out_to_heads, plan.out_from_heads)
    return sum(i.nbytes for i in indices) + sum(t.mask.nbytes for g in plan.groups for t in g.tiles)


def _rotation_bytes(tokens: int, shape: AttentionShape, size: int) -> int:
    return 2 * tokens * (shape.heads + shape.kv_heads) * (shape.head_dim // 2) * size
