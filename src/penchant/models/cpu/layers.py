"""The CPU fast path for Llama-type models: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Each decoder layer is one hand-written autograd function: fused q/k/v projection, attention tree by tree, elementwise work
in row tiles that stay in cache. The transformers module keeps its parameters, which become views of the fused weights'
storage, so `state_dict()` and `save_pretrained` see no change. Gradients are stored by `ops.store_grad`: in
`param.main_grad` or `param.grad` in a training step, otherwise through autograd. LoRA adapters (arXiv 2106.09685) run beside the
fused weights: ``x W^T + scale (x A^T) B^T``. DoRA (2402.09353) scales each output of that sum. Frozen weights get no gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penchant.models.cpu.attention import (
    AttentionPlan,
    AttentionShape,
    attention_backward,
    attention_forward,
    attention_plan,
)
from penchant.models.cpu.ops import (
    addmm,
    addmm_,
    kept_bits,
    masked,
    mm,
    more_rows,
    rms_norm,
    rms_norm_backward,
    rotary,
    rotary_backward,
    store_grad,
    store_product,
    store_rows,
    swiglu,
    swiglu_backward,
    wide,
)
from penchant.models.load import base_model_of
from penchant.models.tree_attention import tree_layout
from penchant.types import PackedBatch

_FAMILIES = tuple(
    f"{n}For{use}" for n in ("Llama", "Mistral", "Qwen2", "Qwen3") for use in ("CausalLM", "SequenceClassification")
)
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # other types depend on the sequence length


_HERE = threading.local()  # state of the current thread's passes
_FUSING = threading.Lock()


@contextmanager
def adapters_as(weights: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Context in which this thread's passes use `weights` for the adapters' parameters, or no adapter if it is empty.

    Unlike peft's own switch or changed parameter values, this does not affect other threads.
    """
    previous = getattr(_HERE, "weights", None)
    _HERE.weights = weights
    try:
        yield
    finally:
        _HERE.weights = previous


@dataclass(frozen=True, slots=True)
class LayerParams:
    """The parameters of one decoder layer, by role. Biases and head norms are None if the family has none."""

    norm1: nn.Parameter
    q: nn.Parameter
    k: nn.Parameter
    v: nn.Parameter
    q_bias: nn.Parameter | None
    k_bias: nn.Parameter | None
    v_bias: nn.Parameter | None
    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None
    o: nn.Parameter
    o_bias: nn.Parameter | None
    norm2: nn.Parameter
    gate: nn.Parameter
    up: nn.Parameter
    down: nn.Parameter

    def all(self) -> tuple[nn.Parameter | None, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter of one projection.

    Args:
        module: peft's layer; a: (r, in); b: (out, r); scale: factor of the update; dropout: probability, on the input of A.
        magnitude: (out,) learned norm of each output's weights, for DoRA.
    """

    module: Any
    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0
    magnitude: Tensor | None = None

    def acting(self, training: bool) -> Adapter | None:
        """The adapter as this thread's passes use it, or None if it is off. `training`: apply dropout, as in a training pass."""
        weights: Mapping[Tensor, Tensor] | None = getattr(_HERE, "weights", None)
        if self.module.disable_adapters or weights == {}:
            return None
        dropout = self.dropout if training and weights is None and self.module.training else 0.0
        overrides = {} if weights is None else {name: weights[p] for name, p in self.parts().items()}
        return replace(self, dropout=dropout, scale=self.scale / (1 - dropout), **overrides)

    def parts(self) -> dict[str, Tensor]:
        """Its parameters, by field name."""
        parameters = {"a": self.a, "b": self.b, "magnitude": self.magnitude}
        return {name: p for name, p in parameters.items() if p is not None}

    def stretch(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """For DoRA, ``m / |W + scale B A|`` of each output, and that norm. The norm gets no gradient, as in peft."""
        if self.magnitude is None:
            return None
        norm = torch.linalg.vector_norm(
            torch.addmm(weight, self.b, self.a, alpha=self.scale), dim=1, dtype=wide(weight.dtype)
        )
        return self.magnitude / norm, norm


@dataclass(slots=True)
class Layer:
    """One decoder layer: parameters, adapters by role, fused weights, and constants."""

    number: int
    params: LayerParams
    adapters: Mapping[str, Adapter]
    qkv: Tensor
    qkv_bias: Tensor | None
    eps: float
    window: int | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """The tokens of a row whose last hidden states are needed.

    Args:
        tokens: (U,) ascending, then zeros as padding for the matrix library; count: number of real ones.
        places: (R,) index of each predicting position in `tokens`; None if `tokens` are the predicting positions.
    """

    tokens: Tensor
    count: int
    places: Tensor | None

    def spread(self, values: Tensor, rows: int) -> Tensor:
        """Scatter values (U, d) of these tokens into zeros (rows, d)."""
        return values.new_zeros(rows, values.shape[1]).index_copy_(0, self.tokens[: self.count], values[: self.count])


@dataclass(frozen=True, slots=True)
class Row:
    """What all layers of one pass share: attention plan, cos and sin (T, H + H_kv, d/2), recomputation, and the dropout seed.

    Args:
        wanted: the tokens to compute after the attention of the last layer, whose other outputs are unused; None: all tokens.
    """

    plan: AttentionPlan
    cos: Tensor
    sin: Tensor
    recompute: bool
    seed: int | None = None
    wanted: Wanted | None = None

    @property
    def out_from_heads(self) -> Tensor:
        """`plan.out_from_heads` for the wanted tokens."""
        if self.wanted is None:
            return self.plan.out_from_heads
        return self.plan.out_from_heads.view(-1, self.plan.shape.heads).index_select(0, self.wanted.tokens).flatten()


class FastForward:
    """Runs the backbone of a supported model on packed rows. Created by `fast_forward`."""

    def __init__(self, model: Any) -> None:
        self._backbone: Any = model.model
        config: Any = model.config
        self._shape = AttentionShape(
            config.num_attention_heads, config.num_key_value_heads, self._backbone.layers[0].self_attn.head_dim
        )
        self._layers = [_read_layer(i, m) for i, m in enumerate(self._backbone.layers)]

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Last hidden states (T, d) after the final norm, differentiable with respect to the model's parameters."""
        return self._normed(self._run(batch, None)[: batch.tokens])

    def predicting(self, batch: PackedBatch) -> Tensor:
        """Hidden states (R, d) that predict the completion tokens. After its attention, the last layer computes only these."""
        wanted = self._wanted(batch)
        out = self._normed(self._run(batch, wanted)[: wanted.count])
        return out if wanted.places is None else out.index_select(0, wanted.places)

    def _normed(self, x: Tensor) -> Tensor:
        norm = self._backbone.norm
        out: Tensor = _Norm.apply(x, norm.weight, norm.variance_epsilon)
        return out

    def _wanted(self, batch: PackedBatch) -> Wanted:
        dtype = self._backbone.embed_tokens.weight.dtype
        key = f"predicting/{dtype}"
        if key not in batch.cache:
            tokens, places = batch.predict_index.unique(return_inverse=True)
            padded = F.pad(tokens, (0, more_rows(len(tokens), dtype)))
            same = torch.equal(tokens, batch.predict_index)
            batch.cache[key] = Wanted(padded, len(tokens), None if same else places)
        cached: Any = batch.cache[key]
        return cached  # type: ignore[no-any-return]

    def _run(self, batch: PackedBatch, wanted: Wanted | None) -> Tensor:
        """Output of the last layer for all tokens or the wanted ones, followed by padding rows for the matrix library."""
        weight = self._backbone.embed_tokens.weight
        lowest = self._lowest_trained()
        key = f"fast/below/{id(self)}"  # shared by the two passes over a batch: policy and reference
        cached: Any = batch.cache.pop(key, None) if lowest else None
        if cached is None:
            ids = F.pad(batch.input_ids, (0, more_rows(batch.tokens, weight.dtype)))
            x = _Embedding.apply(ids, weight, self._backbone.embed_tokens.padding_idx)
        else:
            x = cached[1]
        recompute = bool(getattr(self._backbone, "gradient_checkpointing", False)) and torch.is_grad_enabled()
        rows: dict[int | None, Row] = {}
        with _FUSING:
            for layer in self._layers:
                _keep_fused(layer)
        for i, layer in enumerate(self._layers):
            if i < lowest and cached is not None:
                continue
            if i == lowest and lowest and cached is None:
                batch.cache[key] = self, x
            if layer.window not in rows:
                rows[layer.window] = self._row(batch, layer.window, recompute)
            acting = {role: adapter.acting(batch.seed is not None) for role, adapter in layer.adapters.items()}
            adapters = {role: adapter for role, adapter in acting.items() if adapter is not None}
            updates = [p for adapter in adapters.values() for p in adapter.parts().values()]
            row = rows[layer.window]
            if layer is self._layers[-1]:
                row = replace(row, wanted=wanted)
            if layer.qkv.dtype != x.dtype:
                layer = _widened(layer, x.dtype)
            x = _DecoderLayer.apply(x, row, layer, adapters, *layer.params.all(), *updates)
        return x  # type: ignore[no-any-return]

    def narrow(self) -> None:
        """Store the layers' matrices in bf16 if that is lossless (e.g. for a bf16 file); each layer is widened only for its pass.

        For a frozen model in fp32. Anything else that runs it, such as a decoder, needs `models.load.widened`.
        """
        for layer in self._layers:
            matrices = [p for p in layer.params.all() if p is not None and p.ndim > 1]
            if all(p.dtype == torch.float32 and torch.equal(p.bfloat16().float(), p) for p in matrices):
                for p in matrices:
                    p.data = p.data.bfloat16()
                _keep_fused(layer)

    @property
    def narrowed(self) -> bool:
        return any(layer.params.o.dtype != self._backbone.embed_tokens.weight.dtype for layer in self._layers)

    def _lowest_trained(self) -> int:
        """Number of bottom layers with the same output in every pass: frozen, without adapters. 0 if no layer is trained."""
        if self._backbone.embed_tokens.weight.requires_grad:
            return 0
        trained = (
            bool(layer.adapters) or any(p is not None and p.requires_grad for p in layer.params.all())
            for layer in self._layers
        )
        return next((i for i, is_trained in enumerate(trained) if is_trained), 0)

    def _row(self, batch: PackedBatch, window: int | None, recompute: bool) -> Row:
        key, dtype = self._key(window)
        if key not in batch.cache:
            batch.cache[key] = (self._plan(batch, window, dtype), *self._rotation(batch.position_ids, dtype))
        cached: Any = batch.cache[key]
        plan, cos, sin = cached
        return Row(plan, cos, sin, recompute, batch.seed)

    def _key(self, window: int | None) -> tuple[str, torch.dtype]:
        dtype = self._backbone.embed_tokens.weight.dtype
        return f"fast/{window}/{dtype}/{self._shape}", dtype

    def _plan(self, batch: PackedBatch, window: int | None, dtype: torch.dtype) -> AttentionPlan:
        return attention_plan(
            tree_layout(batch, window), batch.tokens, more_rows(batch.tokens, dtype), self._shape, dtype
        )

    def outlined(self, batch: PackedBatch) -> PackedBatch:
        """Move a batch to the meta device, for a model there. Plans need real indices, so they are built before the move."""
        meta_batch = batch.to(torch.device("meta"))
        for window in {layer.window for layer in self._layers}:
            key, dtype = self._key(window)
            plan = self._plan(batch, window, dtype).to(meta_batch.input_ids.device)
            meta_batch.cache[key] = (plan, *self._rotation(meta_batch.position_ids, dtype))
        wanted = self._wanted(batch)
        places = None if wanted.places is None else wanted.places.to(meta_batch.input_ids.device)
        meta_wanted = replace(wanted, tokens=wanted.tokens.to(meta_batch.input_ids.device), places=places)
        meta_batch.cache |= {key: meta_wanted if value is wanted else value for key, value in batch.cache.items()}
        return meta_batch

    def _rotation(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the model's own rotary module for q and k heads. Those for q include the attention scale."""
        shape = self._shape
        position_ids = F.pad(position_ids, (0, more_rows(len(position_ids), dtype)))
        wide = torch.promote_types(dtype, torch.float32)
        cos, sin = self._backbone.rotary_emb(torch.empty(0, dtype=wide, device=position_ids.device), position_ids[None])
        scale = torch.ones(shape.heads + shape.kv_heads, 1, dtype=wide, device=position_ids.device)
        scale[: shape.heads] = float(self._backbone.layers[0].self_attn.scaling)
        half = shape.head_dim // 2
        return tuple((x[0, :, None, :half] * scale).to(dtype) for x in (cos, sin))  # type: ignore[return-value]


# --------------------------------------------------------------------------------------------------------------------
# recognition


def fast_forward(model: Any) -> FastForward | None:
    """Return the fast path of a model or peft model, or None if it is not a plain model of a known family on the CPU."""
    model = base_model_of(model)
    if not is_known_family(model):
        return None
    plain = all(is_plain_layer(layer) and _trains_alike(layer) for layer in model.model.layers) and not _hooked(model)
    return FastForward(model) if plain else None


def is_known_family(model: Any) -> bool:
    """Whether a model is an unmodified one, on the CPU, of the families that the fast paths support."""
    if type(model).__name__ not in _FAMILIES or not type(model).__module__.startswith("transformers.models."):
        return False
    config: Any = model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return (
        config.hidden_act == "silu"
        and rope in _ROPE_TYPES
        and not getattr(config, "mlp_bias", False)
        and getattr(config, "quantization_config", None) is None
        and not getattr(config, "attention_dropout", 0.0)
        and all(_is_plain(p) for p in model.parameters())
        and len({p.dtype for p in model.parameters()}) == 1
        and type(model.model.embed_tokens) is nn.Embedding
        and type(model.model.norm).__name__.endswith("RMSNorm")
    )


def _is_plain(p: Tensor) -> bool:
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    devices = ("cpu", "meta")  # meta: `penchant plan` estimates a CPU run without running it
    return type(p) is nn.Parameter and p.device.type in devices and p.dtype in dtypes and p.is_contiguous()


def is_linear(module: Any) -> bool:
    """Whether a module is a Linear, plain or with one unmerged LoRA or DoRA adapter."""
    if type(module) is nn.Linear:
        return True
    return (
        hasattr(module, "get_delta_weight")
        and type(getattr(module, "base_layer", None)) is nn.Linear
        and not module.merged_adapters
        and len(module.active_adapters) == 1
        and module.lora_variant.keys() == getattr(module, "lora_magnitude_vector", {}).keys()  # no variant but DoRA
        and not any(getattr(module, "lora_bias", {}).values())
    )


def _trains_alike(layer: Any) -> bool:
    """Whether no projection combines DoRA with dropout, for which peft drops inputs of W too."""
    modules = [m for m in layer.modules() if hasattr(m, "get_delta_weight")]
    return not any(m.lora_variant and any(map(_dropout, m.lora_dropout.values())) for m in modules)


def _dropout(module: Any) -> float:
    return float(getattr(module, "p", 0.0))  # without dropout it is an Identity


def is_plain_layer(layer: Any) -> bool:
    """Whether every projection is a Linear, plain or with one LoRA or DoRA adapter (not quantized or parallel), and norms are RMSNorm."""
    attention, mlp = layer.self_attn, layer.mlp
    linears: tuple[Any, ...] = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    linears += (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [n for n in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)) if n is not None]
    if not all(map(is_linear, linears)):
        return False
    biases = [m.bias is None for m in linears[:3]]
    return (
        all(type(n).__name__.endswith("RMSNorm") for n in norms)
        and len({n.variance_epsilon for n in norms}) == 1
        and all(biases) == any(biases)
        and attention.head_dim % 2 == 0
    )


def _hooked(model: Any) -> bool:
    """Whether inner modules have hooks, which a whole-layer function would never call."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.model.modules())


def _read_layer(number: int, module: Any) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    projections = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj, "o": attention.o_proj}
    projections |= {"gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj}
    linear: dict[str, Any] = {role: getattr(m, "base_layer", m) for role, m in projections.items()}
    norms = {f"{role}_norm": getattr(attention, f"{role}_norm", None) for role in ("q", "k")}
    tensors: dict[str, Any] = {role: m.weight for role, m in linear.items()}
    tensors |= {f"{role}_bias": linear[role].bias for role in ("q", "k", "v", "o")}
    tensors |= {name: None if norm is None else norm.weight for name, norm in norms.items()}
    params = LayerParams(norm1=module.input_layernorm.weight, norm2=module.post_attention_layernorm.weight, **tensors)
    adapters = {role: _read_adapter(m) for role, m in projections.items() if m is not linear[role]}
    bias = None if params.q_bias is None else _fuse(_qkv_biases(params))
    # Qwen sets the window per layer, Mistral once in its config
    model_window = attention.config.sliding_window if attention.config.model_type == "mistral" else None
    window = getattr(attention, "sliding_window", model_window)
    return Layer(
        number,
        params,
        adapters,
        _fuse((params.q, params.k, params.v)),
        bias,
        module.input_layernorm.variance_epsilon,
        window,
    )


def _read_adapter(module: Any) -> Adapter:
    (name,) = module.active_adapters
    a, b, scale = module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name])
    magnitude = module.lora_magnitude_vector[name].weight if name in module.lora_variant else None
    return Adapter(module, a, b, scale, _dropout(module.lora_dropout[name]), magnitude)


def _qkv_biases(params: LayerParams) -> tuple[nn.Parameter, ...]:
    return tuple(b for b in (params.q_bias, params.k_bias, params.v_bias) if b is not None)


def _fuse(parts: Sequence[nn.Parameter]) -> Tensor:
    """Concatenate the parts by rows into one tensor and make each part a view of it."""
    fused = torch.cat([p.detach() for p in parts])
    for p, view in zip(parts, fused.split([p.shape[0] for p in parts]), strict=True):
        p.data = view
    return fused


def _keep_fused(layer: Layer) -> None:
    """Fuse again if a parameter got new storage (`.to()`, an assigned state dict)."""
    p = layer.params
    if not _is_fused(layer.qkv, (p.q, p.k, p.v)):
        layer.qkv = _fuse((p.q, p.k, p.v))
    if layer.qkv_bias is not None and not _is_fused(layer.qkv_bias, _qkv_biases(p)):
        layer.qkv_bias = _fuse(_qkv_biases(p))


def _widened(layer: Layer, dtype: torch.dtype) -> Layer:
    """A copy of a layer with its matrices in `dtype`."""
    p, qkv = layer.params, layer.qkv.to(dtype)
    parts: dict[str, Any] = dict(zip("qkv", qkv.split([len(p.q), len(p.k), len(p.v)]), strict=True))
    parts |= {role: getattr(p, role).to(dtype) for role in ("o", "gate", "up", "down")}
    return replace(layer, qkv=qkv, params=replace(p, **parts))


def _is_fused(fused: Tensor, parts: Sequence[nn.Parameter]) -> bool:
    offset, storage = fused.storage_offset(), fused.untyped_storage()._cdata  # not data_ptr, which is 0 on meta
    for p in parts:
        if p.untyped_storage()._cdata != storage or p.storage_offset() != offset or p.dtype != fused.dtype:
            return False
        offset += p.numel()
    return True


# --------------------------------------------------------------------------------------------------------------------
# autograd functions


class _Embedding(torch.autograd.Function):
    """x_t = E[id_t]; dE[id] = sum of dx_t over all t with that id."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), (grad,) = ctx.saved_tensors, grads
        if ctx.padding_idx is not None:  # nn.Embedding gives its padding row no gradient
            grad = grad.masked_fill((ids == ctx.padding_idx)[:, None], 0.0)
        return None, store_rows(ctx.weight, ids, grad), None


class _Norm(torch.autograd.Function):
    """The final RMSNorm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, rstd = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, rstd)
        ctx.weight = weight
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd = ctx.saved_tensors
        grad_x, grad_weight = rms_norm_backward(grads[0], x, rstd, ctx.weight, None)
        return grad_x, store_grad(ctx.weight, grad_weight) if ctx.needs_input_grad[1] else None, None


class _DecoderLayer(torch.autograd.Function):
    """One decoder layer.

    ``y = x + W_o attention(rope(W_qkv norm1(x)))``, ``z = y + W_d (silu(W_g n) * W_u n)`` with ``n = norm2(y)``; each W with its adapter.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, row: Row, layer: Layer, adapters: Mapping[str, Adapter], *params: Tensor | None
    ) -> Tensor:
        keep = any(ctx.needs_input_grad) and not row.recompute
        z, saved = _layer_forward(x, row, layer, adapters, keep=keep)
        ctx.row, ctx.layer, ctx.adapters, ctx.x = row, layer, adapters, x
        ctx.saved = saved if keep else None
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer: Layer = ctx.layer
        saved: Saved = ctx.saved or _layer_forward(ctx.x, ctx.row, layer, ctx.adapters, keep=True)[1]
        ctx.saved = None  # free this layer's activations as soon as its gradients exist
        names = [*LayerParams.__slots__, *(f"{role}.{name}" for role, a in ctx.adapters.items() for name in a.parts())]
        wanted = {n for n, need in zip(names, ctx.needs_input_grad[4:], strict=True) if need}
        gradients = _Gradients(layer, ctx.adapters, saved, wanted)
        grad_x = _layer_backward(grads[0], ctx.x, ctx.row, gradients, ctx.needs_input_grad[0])
        ctx.x = None
        return grad_x, None, None, None, *(gradients.found.get(n) for n in names)


@dataclass(slots=True)
class Saved:
    """What the backward pass of one layer needs in addition to its input."""

    rstd1: Tensor
    projected: Tensor | None  # W_qkv n1 before the head norms (Qwen 3 only)
    head_rstd: tuple[Tensor, Tensor] | None
    heads: Tensor  # rotated q, k and v as head rows
    o: Tensor  # attention output (T, H d); from here on only the wanted tokens
    y: Tensor
    rstd2: Tensor
    gate: Tensor  # before DoRA's scaling, like `up`
    up: Tensor
    low: dict[str, Tensor]  # scale x A^T (T, r) of each adapter
    kept: dict[str, Tensor]  # (T, in): dropout mask of an input, by the first adapter that reads it
    # for DoRA, by role: output before scaling, and `Adapter.stretch`
    stretched: dict[str, tuple[Tensor, Tensor, Tensor]]


def _layer_forward(
    x: Tensor, row: Row, layer: Layer, adapters: Mapping[str, Adapter], *, keep: bool
) -> tuple[Tensor, Saved]:
    p, shape = layer.params, row.plan.shape
    tokens = x.shape[0]
    low: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    stretched: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    dora = {role for role, adapter in adapters.items() if adapter.magnitude is not None}
    generator = (
        torch.Generator().manual_seed((row.seed + layer.number * 0x9E3779B1) % 2**32) if row.seed is not None else None
    )

    def lower(inputs: Tensor, *roles: str) -> None:
        """Compute ``scale x A^T`` for adapters that share an input."""
        if not (adapted := [role for role in roles if role in adapters]):
            return
        if dropout := adapters[adapted[0]].dropout:
            kept[adapted[0]] = kept_bits(inputs, dropout, generator)
            inputs = masked(inputs, kept[adapted[0]])
        parts = mm(inputs, _joined(adapters, adapted).t()).split([len(adapters[role].a) for role in adapted], dim=1)
        low.update((role, part * adapters[role].scale) for role, part in zip(adapted, parts, strict=True))

    def adapt(role: str, out: Tensor) -> Tensor:
        """``out += scale (x A^T) B^T``, followed by DoRA's scaling."""
        if (adapter := adapters.get(role)) is None:
            return out
        addmm_(out, low[role], adapter.b.t())
        stretch = adapter.stretch(getattr(p, role))
        if stretch is None:
            return out
        stretched[role] = out, *stretch
        return (out * stretch[0]).to(out.dtype)

    def add_projection(residual: Tensor, role: str, inputs: Tensor) -> Tensor:
        """``residual + W inputs``, including W's adapter."""
        weight: Tensor = getattr(p, role)
        lower(inputs, role)
        if role in dora:
            return adapt(role, mm(inputs, weight.t())).add_(residual)
        return adapt(role, addmm(residual, inputs, weight.t()))

    n1, rstd1 = rms_norm(x, p.norm1, layer.eps)
    bias_last = bool(dora.intersection("qkv"))  # DoRA does not scale the bias
    qkv = mm(n1, layer.qkv.t(), None if bias_last else layer.qkv_bias)
    lower(n1, *"qkv")
    parts = [adapt(role, part) for role, part in zip("qkv", _split_qkv(qkv, p), strict=True)]
    if bias_last:
        qkv = torch.cat(parts, dim=1)
        qkv = qkv if layer.qkv_bias is None else qkv.add_(layer.qkv_bias)
    by_head = qkv.view(tokens, -1, shape.head_dim)
    projected, head_rstd = None, None
    if p.q_norm is not None and p.k_norm is not None:
        projected = qkv.clone() if keep else None
        q, k = by_head[:, : shape.heads], by_head[:, shape.heads : shape.heads + shape.kv_heads]
        q_normed, q_rstd = rms_norm(q, p.q_norm, layer.eps)
        k_normed, k_rstd = rms_norm(k, p.k_norm, layer.eps)
        q.copy_(q_normed)
        k.copy_(k_normed)
        head_rstd = (q_rstd, k_rstd)
    rotary(by_head[:, : shape.heads + shape.kv_heads], row.cos, row.sin)
    heads = by_head.reshape(-1, shape.head_dim).index_select(0, row.plan.to_heads)
    del qkv, by_head
    out = attention_forward(heads, row.plan)
    o = out.index_select(0, row.out_from_heads).view(-1, shape.heads * shape.head_dim)
    y = add_projection(x if row.wanted is None else x.index_select(0, row.wanted.tokens), "o", o)
    if p.o_bias is not None:
        y += p.o_bias
    n2, rstd2 = rms_norm(y, p.norm2, layer.eps)
    # two matmuls for gate and up: a fused output would have strided halves, which makes swiglu half as fast
    gate, up = mm(n2, p.gate.t()), mm(n2, p.up.t())
    lower(n2, "gate", "up")
    a = swiglu(adapt("gate", gate), adapt("up", up))
    z = add_projection(y, "down", a)
    return z, Saved(rstd1, projected, head_rstd, heads, o, y, rstd2, gate, up, low, kept, stretched)


def _joined(adapters: Mapping[str, Adapter], roles: Sequence[str]) -> Tensor:
    """The A matrices of `roles`, concatenated by rows."""
    parts = [adapters[role].a for role in roles]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split_qkv(qkv: Tensor, p: LayerParams) -> tuple[Tensor, ...]:
    return qkv.split([p.q.shape[0], p.k.shape[0], p.v.shape[0]], dim=1)


@dataclass(slots=True)
class _Gradients:
    """Collects the gradients of one layer's backward pass, by parameter name (None if `store_grad` has stored them).

    Args:
        low: gradients of ``x A^T`` (T, r), needed later for A's own gradient, by the first of the adapters that share an input.
    """

    layer: Layer
    adapters: Mapping[str, Adapter]
    saved: Saved
    wanted: set[str]
    found: dict[str, Tensor | None] = field(default_factory=dict)
    low: dict[str, Tensor] = field(default_factory=dict)

    def store(self, name: str, grad: Tensor) -> None:
        if name in self.wanted:
            role, _, side = name.partition(".")
            owner: Any = self.adapters[role] if side else self.layer.params
            self.found[name] = store_grad(getattr(owner, side or name), grad)

    def normed(self, roles: tuple[str, ...], x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor | None:
        """Recompute norm(x), which is cheaper than saving it. None if no weight or adapter of `roles` is trained."""
        trained = self.wanted.intersection(roles) or any(role in self.adapters for role in roles)
        if not trained:
            return None
        # bitwise equal to `rms_norm`, except for dtypes that its kernel widens
        return (x * rstd).mul_(weight) if x.dtype == rstd.dtype else rms_norm(x, weight, self.layer.eps)[0]

    def product(self, names: tuple[str, ...], d_out: Tensor, inputs: Tensor | None) -> None:
        """dW = d_out^T inputs, as one matmul for all `names`."""
        if inputs is None or not self.wanted.intersection(names):
            return
        if len(names) == 1:
            self.found[names[0]] = store_product(getattr(self.layer.params, names[0]), d_out, inputs)
        else:
            grad = mm(d_out.t(), inputs)
            sizes = [getattr(self.layer.params, n).shape[0] for n in names]
            for name, part in zip(names, grad.split(sizes), strict=True):
                self.store(name, part)

    def stretched(self, role: str, out: Tensor) -> Tensor:
        """Apply DoRA's scaling to a projection's output, if it has DoRA."""
        stretch = self.saved.stretched.get(role)
        return out if stretch is None else (out * stretch[1]).to(out.dtype)

    def unstretched(self, role: str, d_out: Tensor) -> Tensor:
        """Backward of `stretched`, ``y' = c y`` with ``c = m / norm``: ``dm = sum over rows of d_out y / norm``, ``dy = c d_out``."""
        if (stretch := self.saved.stretched.get(role)) is None:
            return d_out
        out, _, norm = stretch
        self.store(f"{role}.magnitude", (d_out * out).sum(0, dtype=norm.dtype) / norm)
        return self.stretched(role, d_out)

    def through_adapters(self, outs: Mapping[str, Tensor], d_inputs: Tensor | None) -> None:
        """For adapters that share an input: ``dB = d_out^T (scale x A^T)``, and ``dx += scale (d_out B) A`` in place."""
        if not (adapted := [role for role in outs if role in self.adapters]):
            return
        parts = []
        for role in adapted:
            adapter = self.adapters[role]
            self.store(f"{role}.b", mm(outs[role].t(), self.saved.low[role]))
            parts.append(mm(outs[role], adapter.b).mul_(adapter.scale))
        low = self.low[adapted[0]] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if d_inputs is None:
            return
        a = _joined(self.adapters, adapted)
        if adapted[0] in self.saved.kept:
            d_inputs += masked(mm(low, a), self.saved.kept[adapted[0]])
        else:
            addmm_(d_inputs, low, a)

    def into_adapters(self, roles: tuple[str, ...], inputs: Tensor) -> None:
        """For adapters that share an input x: ``dA = (scale d_out B)^T x``."""
        if not (adapted := [role for role in roles if role in self.adapters]):
            return
        if adapted[0] in self.saved.kept:
            inputs = masked(inputs, self.saved.kept[adapted[0]])
        parts = mm(self.low[adapted[0]].t(), inputs).split([len(self.adapters[role].a) for role in adapted])
        for role, part in zip(adapted, parts, strict=True):
            self.store(f"{role}.a", part)


def _layer_backward(dz: Tensor, x: Tensor, row: Row, g: _Gradients, want_x: bool) -> Tensor | None:
    """Store a layer's parameter gradients in `g` and return the gradient of its input, or None if nothing needs it."""
    dy = _mlp_backward(dz, g)
    d_qkv = _attention_backward(dy, row, g)
    # qkv = W_qkv n1 + b
    layer, p = g.layer, g.layer.params
    n1 = g.normed(("q", "k", "v"), x, g.saved.rstd1, p.norm1)
    g.product(("q", "k", "v"), d_qkv, n1)
    if g.wanted.intersection(("q_bias", "k_bias", "v_bias")):
        sizes = [b.shape[0] for b in _qkv_biases(p)]
        for name, part in zip(("q_bias", "k_bias", "v_bias"), d_qkv.sum(0).split(sizes), strict=True):
            g.store(name, part)
    for role, part in zip("qkv", _split_qkv(d_qkv, p), strict=True):
        if role in g.saved.stretched:
            part.copy_(g.unstretched(role, part))
    needs_dx = want_x or "norm1" in g.wanted  # with frozen embeddings, the first layer's input needs no gradient
    dn1 = mm(d_qkv, layer.qkv) if needs_dx else None
    g.through_adapters(dict(zip("qkv", _split_qkv(d_qkv, p), strict=True)), dn1)
    if n1 is not None:
        g.into_adapters(("q", "k", "v"), n1)
    if dn1 is None:
        return None
    bypass = dy if row.wanted is None else row.wanted.spread(dy, len(x))
    dx, d_norm1 = rms_norm_backward(dn1, x, g.saved.rstd1, p.norm1, bypass)
    g.store("norm1", d_norm1)
    return dx


def _mlp_backward(dz: Tensor, g: _Gradients) -> Tensor:
    """From dz to dy: ``z = y + W_d a,  a = silu(g) * u,  g = W_g n2,  u = W_u n2``."""
    p, s = g.layer.params, g.saved
    d_down = g.unstretched("down", dz)
    da = mm(d_down, p.down)
    g.through_adapters({"down": d_down}, da)
    d_gate, d_up, a = swiglu_backward(da, g.stretched("gate", s.gate), g.stretched("up", s.up))
    d_gate, d_up = g.unstretched("gate", d_gate), g.unstretched("up", d_up)
    g.product(("down",), d_down, a)
    g.into_adapters(("down",), a)
    n2 = g.normed(("gate", "up"), s.y, s.rstd2, p.norm2)
    g.product(("gate",), d_gate, n2)
    g.product(("up",), d_up, n2)
    dn2 = addmm_(mm(d_gate, p.gate), d_up, p.up)
    g.through_adapters({"gate": d_gate, "up": d_up}, dn2)
    if n2 is not None:
        g.into_adapters(("gate", "up"), n2)
    del d_gate, d_up, a, da, n2
    dy, d_norm2 = rms_norm_backward(dn2, s.y, s.rstd2, p.norm2, dz)
    g.store("norm2", d_norm2)
    return dy


def _attention_backward(dy: Tensor, row: Row, g: _Gradients) -> Tensor:
    """From dy to the gradient (T, (H + 2 K) d) of the q/k/v projections: ``y = x + W_o attention(rope(norm(q)), rope(norm(k)), v)``."""
    p, s, shape = g.layer.params, g.saved, row.plan.shape
    if p.o_bias is not None:
        g.store("o_bias", dy.sum(0))
    dy = g.unstretched("o", dy)
    g.product(("o",), dy, s.o)
    d_o = mm(dy, p.o)
    g.through_adapters({"o": dy}, d_o)
    g.into_adapters(("o",), s.o)
    rows = len(row.cos)
    d_o = d_o if row.wanted is None else row.wanted.spread(d_o, rows)
    d_out = d_o.view(-1, shape.head_dim).index_select(0, row.plan.out_to_heads)
    del d_o
    d_heads = attention_backward(d_out, s.heads, row.plan)
    d_qkv = d_heads.index_select(0, row.plan.from_heads).view(rows, -1, shape.head_dim)
    del d_out, d_heads
    d_qkv[row.plan.tokens :] = 0
    rotary_backward(d_qkv[:, : shape.heads + shape.kv_heads], row.cos, row.sin)
    if s.head_rstd is not None and s.projected is not None:
        projected = s.projected.view_as(d_qkv)
        for name, heads, rstd in zip(
            ("q_norm", "k_norm"),
            (slice(0, shape.heads), slice(shape.heads, shape.heads + shape.kv_heads)),
            s.head_rstd,
            strict=True,
        ):
            grad, d_weight = rms_norm_backward(d_qkv[:, heads], projected[:, heads], rstd, getattr(p, name), None)
            d_qkv[:, heads] = grad
            g.store(name, d_weight)
    return d_qkv.view(rows, -1)
