"""Computes completion log-probs of packed batches: `Scorer` runs the model, its head and any fast path."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from penchant.base.machine import moved
from penchant.distributed.context import SPLIT, all_tokens, check_positions, my_tokens, splits
from penchant.distributed.shard import RUNS
from penchant.logprobs.head import (
    RowLogits,
    divergence_logps,
    head_logits,
    module_divergence_logps,
    module_token_logps,
    scaled,
    token_logps,
)
from penchant.losses.divergences import DivergenceKind
from penchant.models.load import backbone_of, base_model_of, head_scaling, without_cache
from penchant.models.router import RouterLoss, routed
from penchant.models.tree_attention import install_tree_attention, restore_attention
from penchant.types import PackedBatch

Packing = Literal["shared", "separate", "padded"]


class CompletionLogps(NamedTuple):
    """Log-probs in nats, fp32, or fp64 for fp64 models.

    Args:
        sums: (C,) per completion; tokens: (R,) per token.
        alignment: (C,) mean over tokens of ``log pi(y_t) - log sum_v pi(v)^2``, without gradient, if requested.
        ref_tokens, divergence: (R,) the reference's log-probs and the divergence from it, from `Scorer.divergence`.
        entropy: (R,) over the vocabulary, with gradient, if requested.
    """

    sums: Tensor
    tokens: Tensor
    alignment: Tensor | None = None
    ref_tokens: Tensor | None = None
    divergence: Tensor | None = None
    entropy: Tensor | None = None


def per_completion(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum values over each completion's tokens: (R,) to (C,), `lengths` (C,) int64.

    Adds in token order: `index_add` on a GPU has no fixed order, so policy and reference sums of equal log-probs would
    differ. ``unsafe`` skips a check that would synchronize with the GPU.
    """
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def padded_layout(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Indices between a packed row and one padded row per segment, built on the CPU once per batch.

    Returns:
        (B, L) position of each token in the packed row; (B, L) int64 mask of real tokens; positions of the packed row's
        tokens in the flattened (B * L).
    """
    key = "padded"
    if key not in batch.cache:
        lengths = np.array([s.length for s in batch.segments])
        column = np.arange(lengths.max())
        real = column < lengths[:, None]
        index = np.where(real, np.array([s.start for s in batch.segments])[:, None] + column, 0)
        arrays = (index, real.astype(np.int64), np.flatnonzero(real))
        batch.cache[key] = tuple(moved(torch.from_numpy(x), batch.input_ids.device) for x in arrays)
    return cast(tuple[Tensor, Tensor, Tensor], batch.cache[key])


@dataclass(slots=True)
class Scorer:
    """Runs a causal model: takes packed batches and returns completion log-probs.

    Args:
        model: a transformers causal model, or a peft model around one.
        packing: ``shared``, ``separate`` or ``padded``; batches must be packed accordingly (`pack(shared=...)`).
        temperature: log-probs are of ``softmax(logits / temperature)``: online methods must train on the distribution they sample.
        kernels: ``auto``: a model-family fast path if the model is supported; ``off``: none; ``compile``: layers go through
            `torch.compile` if rows are packed.
        attention: how packed rows attend within their trees: ``groups``, ``varlen``, ``flex`` or ``varlen+flex`` (`select_attention`).
        own_attention: padded rows use the model's own transformers attention.
        own_head: logits come from the model's own `forward`, for heads that are more than a linear layer, a factor and a cap.
        router: attaches the balance loss of a mixture of experts to the hidden states used in training.
    """

    model: nn.Module
    packing: Packing = "shared"
    kernels: str = "off"
    temperature: float = 1.0
    attention: str = "groups"
    own_attention: bool = False
    own_head: bool = False
    router: RouterLoss | None = None
    _fast: Any = None

    def __post_init__(self) -> None:
        if self.own_attention:
            restore_attention(base_model_of(self.model))
        else:
            install_tree_attention(base_model_of(self.model))
        if self.kernels == "auto" and self.packing != "padded" and self.attention == "groups":
            from penchant.models.cpu.layers import fast_forward

            self._fast = fast_forward(self.model)
        if self.compiled:
            from penchant.models.compiled import compile_layers

            compile_layers(self.model)

    def on(self, model: nn.Module) -> Scorer:
        """Return a scorer with the same settings for another model of the same architecture."""
        return Scorer(model, self.packing, self.runs, **self.how)

    @property
    def runs(self) -> str:
        """The `kernels` setting that is in effect."""
        return "auto" if self.fast else "compile" if self.compiled else "off"

    @property
    def how(self) -> dict[str, Any]:
        """The arguments, besides packing and kernels, for another scorer with the same settings."""
        return {"attention": self.attention, "own_attention": self.own_attention, "own_head": self.own_head}

    @property
    def shared(self) -> bool:
        return self.packing == "shared"

    @property
    def fast(self) -> bool:
        """Whether a model-family fast path is in use."""
        return self._fast is not None

    def narrow(self) -> None:
        """Reduce the memory of a frozen model if its fast path supports it, see `FastForward.narrow`."""
        if self._fast is not None:
            self._fast.narrow()

    @property
    def narrowed(self) -> bool:
        return self._fast is not None and self._fast.narrowed

    @property
    def compiled(self) -> bool:
        """Whether layers go through `torch.compile`."""
        return self.kernels == "compile" and self.packing != "padded"

    @property
    def side_by_side(self) -> bool:
        """Whether several threads may run passes at once (`base/lanes.py`): the fast path changes no state of the model."""
        return self.fast and self.plain_head

    @property
    def plain_head(self) -> bool:
        """Whether the head is a plain Linear without an adapter."""
        return type(self._head()[0]) is nn.Linear

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Last hidden states (T, d) of a packed row, after the final norm."""
        if self._fast is not None:
            return self._fast.hidden(batch)
        backbone = backbone_of(self.model)
        if self.packing == "padded":
            return self._padded_hidden(backbone, batch)
        ids, positions = batch.input_ids, batch.position_ids
        split = splits() and not self.own_attention
        if split:
            check_positions(backbone.config)
            batch.cache[SPLIT] = True
            ids, positions = my_tokens(ids), my_tokens(positions)
        # transformers passes a 4D mask on unchanged instead of building one; the tree attention ignores it
        unused_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
        out = backbone(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=unused_mask,
            use_cache=False,
            penchant_batch=batch,
            penchant_attention=self.attention,
            **self._listening(),
        )
        if split:
            return all_tokens(out.last_hidden_state[0], batch.tokens)
        return self._with_router(out.last_hidden_state[0], routed(out), batch)

    def _listening(self) -> dict[str, Any]:
        return {"output_router_logits": True} if self.router is not None and self.router.listens else {}

    def _with_router(self, hidden: Tensor, logits: tuple[Tensor, ...], batch: PackedBatch) -> Tensor:
        if self.router is None or not self.router.listens:
            return hidden
        return self.router.attached(hidden, logits, batch)

    def _padded_hidden(self, backbone: nn.Module, batch: PackedBatch) -> Tensor:
        """Hidden states from one padded row per segment, e.g. for models whose layers carry state along a row."""
        index, mask, packed_index = padded_layout(batch)
        ids = batch.input_ids[index] * mask
        options: dict[str, Any] = without_cache(backbone)
        if not self.own_attention and "position_ids" in signature(backbone.forward).parameters:
            options["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        out = backbone(input_ids=ids, attention_mask=mask, **options, **self._listening())
        hidden = out.last_hidden_state.flatten(0, 1).index_select(0, packed_index)
        return self._with_router(hidden, tuple(layer.index_select(0, packed_index) for layer in routed(out)), batch)

    def predicting(self, batch: PackedBatch) -> Tensor:
        """The hidden states (R, d) that predict the completion tokens."""
        if self._fast is not None:
            hidden: Tensor = self._fast.predicting(batch)
            return hidden
        return self.hidden(batch).index_select(0, batch.predict_index)

    def logps(
        self, batch: PackedBatch, *, alignment: bool = False, hidden: Tensor | None = None, entropy: bool = False
    ) -> CompletionLogps:
        """Log-probs summed per completion (C,) and per token (R,), in nats, with `alignment` or `entropy` on request.

        Pass `hidden` (R, d) from `predicting` to save a second forward pass.
        """
        hidden = self.predicting(batch) if hidden is None else hidden
        if entropy:
            return self._with_entropy(batch, hidden)
        hidden, head, scale, softcap = self._tempered(hidden)
        if type(head) is not nn.Linear:
            tokens, collision = module_token_logps(head, hidden, batch.target_ids, scale, softcap, alignment)
        elif self._fast is not None and head.bias is None and scale == 1.0 and softcap is None:
            from penchant.models.cpu.head import fast_token_logps

            tokens, collision = fast_token_logps(hidden, head.weight, batch.target_ids, alignment)
        else:
            tokens, collision = token_logps(
                hidden, head.weight, batch.target_ids, head.bias, scale=scale, softcap=softcap, alignment=alignment
            )
        sums = per_completion(tokens, batch.lengths)
        if not alignment:
            return CompletionLogps(sums, tokens)
        mean = per_completion(tokens.detach() - collision, batch.lengths) / batch.lengths
        return CompletionLogps(sums, tokens, alignment=mean)

    def values(self, batch: PackedBatch, head: nn.Module) -> Tensor:
        """Output of `head` on the hidden states that predict the completion tokens, (R,)."""
        values: Tensor = head(self.predicting(batch))
        return values

    def valued(self, batch: PackedBatch, head: nn.Module, *, entropy: bool = False) -> tuple[CompletionLogps, Tensor]:
        """Log-probs and `values` from one forward pass."""
        hidden = self.predicting(batch)
        return self.logps(batch, hidden=hidden, entropy=entropy), head(hidden)

    def row_logits(self, batch: PackedBatch) -> RowLogits:
        """Return a function from a slice of predicting positions to their logits, in fp32 (fp64), without gradient."""
        with torch.no_grad():
            hidden, head, scale, softcap = self._tempered(self.predicting(batch))

        @torch.no_grad()
        def rows(part: slice) -> Tensor:
            if type(head) is nn.Linear:
                return head_logits(hidden[part], head.weight, head.bias, scale, softcap)
            return scaled(head(hidden[part]), scale, softcap)

        return rows

    def divergence(self, batch: PackedBatch, ref_logits: RowLogits, kind: DivergenceKind) -> CompletionLogps:
        """Log-probs as from `logps`, plus the divergence from a reference at every completion token."""
        return self._divergence(batch, self.predicting(batch), ref_logits, kind)

    def _with_entropy(self, batch: PackedBatch, hidden: Tensor) -> CompletionLogps:
        """Entropy ``H(p) = log V - KL(p || uniform)``, from the divergence to a reference whose logits are all zero."""
        vocabulary = base_model_of(self.model).get_output_embeddings().weight.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)

        def uniform(part: slice) -> Tensor:
            return torch.zeros(len(batch.target_ids[part]), vocabulary, dtype=wide, device=hidden.device)

        logps = self._divergence(batch, hidden, uniform, DivergenceKind("kl", "policy_ref"))
        assert logps.divergence is not None
        return CompletionLogps(logps.sums, logps.tokens, entropy=math.log(vocabulary) - logps.divergence)

    def _divergence(
        self, batch: PackedBatch, hidden: Tensor, ref_logits: RowLogits, kind: DivergenceKind
    ) -> CompletionLogps:
        hidden, head, scale, softcap = self._tempered(hidden)
        if type(head) is nn.Linear:
            tokens, ref_tokens, values = divergence_logps(
                hidden, head.weight, batch.target_ids, ref_logits, kind, head.bias, scale=scale, softcap=softcap
            )
        else:
            tokens, ref_tokens, values = module_divergence_logps(
                head, hidden, batch.target_ids, ref_logits, kind, scale, softcap
            )
        return CompletionLogps(per_completion(tokens, batch.lengths), tokens, ref_tokens=ref_tokens, divergence=values)

    def _tempered(self, hidden: Tensor) -> tuple[Tensor, Any, float, float | None]:
        """Hidden states, head, scale and cap that yield logits / temperature."""
        head, scale, softcap = self._head()
        if type(head) is nn.Linear:
            hidden = hidden.to(head.weight.dtype)  # Mamba's fp32 residual gives fp32 for bf16 models too
        if self.temperature == 1.0:
            return hidden, head, scale, softcap
        if softcap is not None:
            raise ValueError("a temperature is not supported for models that cap their logits")
        if type(head) is nn.Linear and head.bias is None:
            return hidden / self.temperature, head, scale, softcap  # equivalent, and the fast head stays usable
        return hidden, head, scale / self.temperature, softcap

    def _head(self) -> tuple[Any, float, float | None]:
        base = base_model_of(self.model)
        if self.own_head:
            return OwnHead(base), 1.0, None
        return base.get_output_embeddings(), *head_scaling(base.config.get_text_config())


@dataclass(frozen=True, slots=True)
class OwnHead:
    """Maps hidden states (n, d) to logits (n, V) by the model's own `forward`, with its backbone stubbed out."""

    model: Any

    def __call__(self, hidden: Tensor) -> Tensor:
        backbone = backbone_of(self.model)
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        backbone.forward = lambda *_, **__: _Given(hidden[None])  # shadows the method on this instance during the call
        try:
            return cast(Tensor, self.model(input_ids=ids).logits[0])
        finally:
            del backbone.forward


class _Given:
    """A backbone output with only the last hidden states; all other fields are None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, item: Any) -> Any:
        return self.last_hidden_state if item == "last_hidden_state" else (self.last_hidden_state,)[item]


class Elsewhere:
    """A scorer whose model is on another device than the batches: moves batches there and results back.

    Args:
        scorer: a `Scorer`; device: the device of its model.
    """

    _scorer: Any
    _device: torch.device

    def __init__(self, scorer: Any, device: torch.device) -> None:
        self.__dict__.update(_scorer=scorer, _device=device)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._scorer, name, value)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._scorer, name)
        return partial(self._run_on_device, attribute) if name in RUNS else attribute

    def _run_on_device(self, run: Any, batch: PackedBatch, *args: Any, **kwargs: Any) -> Any:
        key = f"on {self._device}"
        if key not in batch.cache:
            batch.cache[key] = batch.to(self._device)
        return self._to_device(run(batch.cache[key], *args, **kwargs), batch.input_ids.device)

    def _to_device(self, result: Any, device: torch.device) -> Any:
        if not isinstance(result, (Tensor, tuple)):  # from `row_logits`
            return lambda part: moved(result(part), device)
        if isinstance(result, tuple):
            tuple_class: Any = type(result)
            return tuple_class(*(None if f is None else self._to_device(f, device) for f in result))
        return moved(result, device)
