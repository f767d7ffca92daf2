"""Fast decoding of Llama-type models on the CPU: prepacked weights, KV caches written in place, shared prompts.

Each prompt's keys and values are stored once for all its samples. Finished rows are replaced between steps, so matrix products
never include them; this moves single rows of the caches and never copies a whole cache. Adapters are merged into the packed weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penchant.models.cpu.layers import is_known_family, is_linear, is_plain_layer
from penchant.models.cpu.ops import rms_norm, rotary
from penchant.models.load import base_model_of
from penchant.models.lora import merged_weight

_ROW_STEP, _COLUMN_STEP = 8, 16  # sizes are rounded up: each new shape costs the matrix library a setup


class PackedLinear:
    """``y = x W^T + b`` with W prepacked for the matrix library, if it supports that."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self._weight: Tensor | None = weight
        self._bias = bias
        self._packed: Tensor | None = None
        if _can_pack(weight.dtype):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            self._weight = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is None:
            assert self._weight is not None
            return F.linear(x, self._weight, self._bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out


@lru_cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch has a packed product for `dtype` that agrees with F.linear."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    generator = torch.Generator().manual_seed(0)
    w, x, b = (torch.randn(*s, generator=generator).to(dtype) for s in ((48, 32), (5, 32), (48,)))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(w, 16)
        out = torch.ops.mkldnn._linear_pointwise(x, packed, b, "none", [], "")
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.allclose(out.float(), F.linear(x, w, b).float(), atol=1e-4 if dtype == torch.float32 else 0.2)


@dataclass(frozen=True, slots=True)
class DecodeLayer:
    """Packed weights of one layer."""

    norm1: Tensor
    qkv: PackedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: PackedLinear
    norm2: Tensor
    gate_up: PackedLinear
    down: PackedLinear
    eps: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What all layers of one step share: shapes, cache positions to write, and the attention mask."""

    rows: int
    groups: int
    per_group: int  # rows of the largest group
    prefix: int  # columns read from the prompt caches
    suffix: int  # columns read from the rows' own caches
    to_padded: Tensor | None  # (groups * per_group,) row in each slot; None if the rows are already in that order
    from_padded: Tensor | None  # (rows,) slot of each row
    write: Tensor  # (rows * kv_heads,) positions in the flattened caches for this step's keys and values
    mask: Tensor  # (rows, 1, prefix + suffix): 0 or -inf
    cos: Tensor
    sin: Tensor


class FastDecoder:
    """Decodes up to `rows` completions of up to `groups` prompts at once with a supported model (see `can_decode_fast`).

    Args:
        model: a causal model, or a peft model around one. Its weights are read now; make a new decoder if they change.
        rows, groups: maximum number of completions and prompts; prompt_tokens, new_tokens: their maximum lengths.
    """

    def __init__(self, model: Any, *, rows: int, groups: int, prompt_tokens: int, new_tokens: int) -> None:
        base = base_model_of(model)
        backbone, config = base.model, base.config
        attention = backbone.layers[0].self_attn
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
        )
        self._scale = float(attention.scaling)
        hint = _up(rows, _ROW_STEP)
        self._layers = [_read_layer(m, hint) for m in backbone.layers]
        self._norm, self._eps = backbone.norm.weight.detach(), backbone.norm.variance_epsilon
        self._embedding = backbone.embed_tokens.weight.detach()
        head = base.get_output_embeddings()
        self._head = PackedLinear(_weight_of(head), _bias_of(head), hint)
        self._rotary = backbone.rotary_emb
        self._make_room(rows, groups, prompt_tokens, new_tokens)

    def with_room(self, *, rows: int, groups: int, prompt_tokens: int, new_tokens: int) -> FastDecoder:
        """Return a decoder with new caches that shares the packed weights, e.g. one per request."""
        decoder = copy.copy(self)
        decoder._make_room(rows, groups, prompt_tokens, new_tokens)
        return decoder

    def _make_room(self, rows: int, groups: int, prompt_tokens: int, new_tokens: int) -> None:
        dtype = self._embedding.dtype
        wide = torch.promote_types(dtype, torch.float32)
        cos, sin = self._rotary(torch.empty(0, dtype=wide), torch.arange(_up(prompt_tokens) + new_tokens)[None])
        half = self.head_dim // 2
        self._cos, self._sin = cos[0, :, None, :half].to(dtype), sin[0, :, None, :half].to(dtype)
        self._room = _up(rows, _ROW_STEP)
        depth, columns = len(self._layers), _up(new_tokens)
        # zeros, not empty: masked columns are multiplied by 0, and 0 times an old NaN would be NaN
        own_shape = (depth, self._room * self.kv_heads, columns, self.head_dim)
        shared_shape = (depth, groups * self.kv_heads, _up(prompt_tokens), self.head_dim)
        self._keys, self._values = torch.zeros(own_shape, dtype=dtype), torch.zeros(own_shape, dtype=dtype)
        self._prompt_keys, self._prompt_values = (
            torch.zeros(shared_shape, dtype=dtype),
            torch.zeros(shared_shape, dtype=dtype),
        )

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def prefill(self, prompts: Sequence[Sequence[int]], first_group: int, tokens_at_once: int = 1024) -> Tensor:
        """Fill the groups from `first_group` on with prompts and return the next-token logits (len(prompts), V)."""
        logits = []
        start = 0
        while start < len(prompts):
            end, longest = start, 0
            while end < len(prompts):
                longest = max(longest, len(prompts[end]))
                if end > start and longest * (end + 1 - start) > tokens_at_once:
                    break
                end += 1
            logits.append(self._prefill(prompts[start:end], first_group + start))
            start = end
        return torch.cat(logits)

    def _prefill(self, prompts: Sequence[Sequence[int]], first: int) -> Tensor:
        count, length = len(prompts), _up(max(map(len, prompts)))
        sizes = torch.tensor(list(map(len, prompts)))
        # only attention runs on right-padded prompts, whose padding the causal mask hides; the other products take real tokens only
        ends, total = sizes.cumsum(0), int(sizes.sum())
        padding = _up(total, 2 * _COLUMN_STEP) - total  # repeats the first token
        age = F.pad(torch.arange(total) - (ends - sizes).repeat_interleave(sizes), (0, padding))
        place = F.pad(torch.arange(count).repeat_interleave(sizes) * length, (0, padding)) + age
        ids = torch.tensor([t for p in prompts for t in p] + [prompts[0][0]] * padding)
        x, cos, sin = F.embedding(ids, self._embedding), self._cos[age], self._sin[age]
        lines = slice(first * self.kv_heads, (first + count) * self.kv_heads)
        for depth, layer in enumerate(self._layers):
            q, k, v = (
                t.new_zeros(count * length, *t.shape[1:])
                .index_copy_(0, place, t)
                .view(count, length, -1, self.head_dim)
                .transpose(1, 2)
                for t in self._qkv(x, layer, cos, sin)
            )
            self._prompt_keys[depth, lines, :length] = k.reshape(-1, length, self.head_dim)
            self._prompt_values[depth, lines, :length] = v.reshape(-1, length, self.head_dim)
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self._scale, enable_gqa=True)
            o = o.transpose(1, 2).reshape(count * length, -1)
            if layer is self._layers[-1]:  # only the last token of each prompt is needed from here on
                x, place = x[ends - 1], place[ends - 1]
            x = self._finish(x, o.index_select(0, place), layer)
        return self._logits(x)

    # ---- one token per row ----------------------------------------------------------------------------------------------

    def step(self, tokens: Tensor, group_of: Tensor, ages: Tensor, prompt_lengths: Tensor) -> Tensor:
        """Feed each row its last token and return the logits (rows, V) of its next one.

        Args:
            tokens, group_of, ages: (rows,) int64: last token, group, and number of completion tokens fed so far.
            prompt_lengths: (groups,) int64.
        """
        count = len(tokens)
        idle = _up(count, _ROW_STEP) - count if count > _ROW_STEP // 2 else 0
        tokens, ages = (F.pad(t, (0, idle)) for t in (tokens, ages))
        plan = self._plan(group_of, ages, prompt_lengths, idle)
        x = F.embedding(tokens, self._embedding)
        for depth, layer in enumerate(self._layers):
            q, k, v = self._qkv(x, layer, plan.cos, plan.sin)
            x = self._finish(x, self._attend(depth, q, k, v, plan), layer)
        return self._logits(x[:count])

    def _plan(self, group_of: Tensor, ages: Tensor, prompt_lengths: Tensor, idle: int) -> Plan:
        real, groups = len(group_of), len(prompt_lengths)
        sizes = torch.bincount(group_of, minlength=groups)
        per_group = int(sizes.max())
        order = torch.argsort(group_of, stable=True)
        in_order = group_of[order]
        place = in_order * per_group + torch.arange(real) - (sizes.cumsum(0) - sizes)[in_order]
        from_padded = F.pad(torch.empty_like(place).scatter_(0, order, place), (0, idle))  # idle rows may read any slot
        to_padded: Tensor | None = torch.zeros(groups * per_group, dtype=torch.int64).scatter_(0, place, order)
        if len(from_padded) == groups * per_group and bool((from_padded == torch.arange(real + idle)).all()):
            to_padded = None
        lengths = F.pad(prompt_lengths[group_of], (0, idle))
        prefix = min(_up(int(lengths.max())), self._prompt_keys.shape[2])
        suffix = min(_up(int(ages.max()) + 1), self._keys.shape[2])
        unseen = torch.cat((torch.arange(prefix) >= lengths[:, None], torch.arange(suffix) > ages[:, None]), 1)
        mask = torch.zeros(unseen.shape, dtype=torch.promote_types(self._embedding.dtype, torch.float32))
        mask.masked_fill_(unseen, float("-inf"))
        lines = torch.arange((real + idle) * self.kv_heads).view(-1, self.kv_heads)
        positions = lengths + ages
        return Plan(
            rows=real + idle,
            groups=groups,
            per_group=per_group,
            prefix=prefix,
            suffix=suffix,
            to_padded=to_padded,
            from_padded=None if to_padded is None else from_padded,
            write=(lines * self._keys.shape[2] + ages[:, None]).view(-1),
            mask=mask[:, None],
            cos=self._cos[positions],
            sin=self._sin[positions],
        )

    def _attend(self, depth: int, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        """Attention of one query per row to its group's prompt and to its own tokens: (rows, heads * head_dim)."""
        rows, kv, d = plan.rows, self.kv_heads, self.head_dim
        rep = self.heads // kv
        self._keys[depth].view(-1, d).index_copy_(0, plan.write, k.reshape(-1, d))
        self._values[depth].view(-1, d).index_copy_(0, plan.write, v.reshape(-1, d))
        keys, values = self._keys[depth, : rows * kv, : plan.suffix], self._values[depth, : rows * kv, : plan.suffix]
        lines = plan.groups * kv
        p_keys, p_values = (
            self._prompt_keys[depth, :lines, : plan.prefix],
            self._prompt_values[depth, :lines, : plan.prefix],
        )
        q = q * self._scale
        own = torch.bmm(q.reshape(rows * kv, rep, d), keys.transpose(1, 2)).view(rows, self.heads, -1)
        shared = self._from_groups(torch.bmm(self._to_groups(q, plan), p_keys.transpose(1, 2)), plan)
        wide = torch.promote_types(q.dtype, torch.float32)
        weights = (torch.cat((shared, own), 2) + plan.mask).softmax(-1, dtype=wide).to(q.dtype)
        from_prompt, from_own = weights.split((plan.prefix, plan.suffix), 2)
        out = torch.bmm(from_own.reshape(rows * kv, rep, -1), values).view(rows, self.heads, d)
        out = out + self._from_groups(torch.bmm(self._to_groups(from_prompt, plan), p_values), plan)
        return out.view(rows, -1)

    def _to_groups(self, x: Tensor, plan: Plan) -> Tensor:
        """(rows, heads, n) to (groups * kv_heads, per_group * rep, n): puts queries that share keys next to each other."""
        if plan.to_padded is not None:
            x = x.index_select(0, plan.to_padded)
        shape = (plan.groups, plan.per_group, self.kv_heads, self.heads // self.kv_heads, x.shape[-1])
        return x.reshape(shape).transpose(1, 2).reshape(plan.groups * self.kv_heads, -1, x.shape[-1])

    def _from_groups(self, x: Tensor, plan: Plan) -> Tensor:
        """The inverse of `_to_groups`."""
        shape = (plan.groups, self.kv_heads, plan.per_group, self.heads // self.kv_heads, x.shape[-1])
        x = x.view(shape).transpose(1, 2).reshape(plan.groups * plan.per_group, self.heads, -1)
        return x if plan.from_padded is None else x.index_select(0, plan.from_padded)

    # ---- the layer -----------------------------------------------------------------------------------------------------

    def _qkv(self, x: Tensor, layer: DecodeLayer, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.heads + self.kv_heads
        qkv = layer.qkv(rms_norm(x, layer.norm1, layer.eps)[0]).view(len(x), heads + self.kv_heads, self.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            qkv[:, : self.heads] = rms_norm(qkv[:, : self.heads], layer.q_norm, layer.eps)[0]
            qkv[:, self.heads : heads] = rms_norm(qkv[:, self.heads : heads], layer.k_norm, layer.eps)[0]
        rotary(qkv[:, :heads], cos, sin)
        return qkv[:, : self.heads], qkv[:, self.heads : heads], qkv[:, heads:]

    def _finish(self, x: Tensor, attended: Tensor, layer: DecodeLayer) -> Tensor:
        x = layer.o(attended).add_(x)
        gate, up = layer.gate_up(rms_norm(x, layer.norm2, layer.eps)[0]).chunk(2, dim=1)
        return layer.down(F.silu(gate).mul_(up)).add_(x)

    def _logits(self, x: Tensor) -> Tensor:
        return self._head(rms_norm(x, self._norm, self._eps)[0])

    # ---- finished rows -------------------------------------------------------------------------------------------------

    def move_rows(self, source: Sequence[int], target: Sequence[int], age: int) -> None:
        """Copy the first `age` columns of the `source` rows' own caches over the (finished) `target` rows."""
        _move((self._keys, self._values), source, target, self.kv_heads, min(_up(age), self._keys.shape[2]))

    def move_groups(self, source: Sequence[int], target: Sequence[int], length: int) -> None:
        """Copy the first `length` columns of the `source` groups' prompt caches over the `target` groups."""
        _move((self._prompt_keys, self._prompt_values), source, target, self.kv_heads, length)


def _move(caches: Sequence[Tensor], source: Sequence[int], target: Sequence[int], lines: int, columns: int) -> None:
    for cache in caches:
        by_row = cache.view(len(cache), -1, lines, *cache.shape[2:])
        for a, b in zip(source, target, strict=True):
            by_row[:, b, :, :columns] = by_row[:, a, :, :columns]


def _up(n: int, step: int = _COLUMN_STEP) -> int:
    return -(-n // step) * step


def cached_tokens(rows: int, groups: int, prompt_tokens: int, new_tokens: int) -> int:
    """Number of tokens whose keys and values the caches of a decoder of this size hold."""
    return _up(rows, _ROW_STEP) * _up(new_tokens) + groups * _up(prompt_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# recognition


def can_decode_fast(model: Any, tokens: int) -> bool:
    """Whether `FastDecoder` supports the model (a known family on the CPU, at most one LoRA or DoRA adapter) up to `tokens` tokens."""
    base = base_model_of(model)
    if not is_known_family(base) or not all(map(is_plain_layer, base.model.layers)):
        return False
    windows = [getattr(m.self_attn, "sliding_window", None) for m in base.model.layers]
    windows.append(getattr(base.config, "sliding_window", None) if base.config.model_type == "mistral" else None)
    return all(w is None or w >= tokens for w in windows) and is_linear(base.get_output_embeddings())


def _weight_of(module: Any) -> Tensor:
    """The effective weight, with an active adapter merged in."""
    weight: Tensor = getattr(module, "base_layer", module).weight.detach()
    if type(module) is nn.Linear or module.disable_adapters:
        return weight
    return merged_weight(module).to(weight.dtype)


def _bias_of(module: Any) -> Tensor | None:
    bias = getattr(module, "base_layer", module).bias
    return None if bias is None else bias.detach()


def _fused(modules: Sequence[Any], rows: int) -> PackedLinear:
    biases = [b for b in map(_bias_of, modules) if b is not None]
    return PackedLinear(torch.cat([_weight_of(m) for m in modules]), torch.cat(biases) if biases else None, rows)


def _read_layer(module: Any, rows: int) -> DecodeLayer:
    attention, mlp = module.self_attn, module.mlp

    def norm(name: str) -> Tensor | None:
        head_norm = getattr(attention, name, None)
        return None if head_norm is None else head_norm.weight.detach()

    return DecodeLayer(
        norm1=module.input_layernorm.weight.detach(),
        qkv=_fused((attention.q_proj, attention.k_proj, attention.v_proj), rows),
        q_norm=norm("q_norm"),
        k_norm=norm("k_norm"),
        o=_fused((attention.o_proj,), rows),
        norm2=module.post_attention_layernorm.weight.detach(),
        gate_up=_fused((mlp.gate_proj, mlp.up_proj), rows),
        down=_fused((mlp.down_proj,), rows),
        eps=module.input_layernorm.variance_epsilon,
    )
