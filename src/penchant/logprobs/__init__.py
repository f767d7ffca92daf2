"""From a packed batch to completion log-probs: the only place where a model meets its head."""

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
        sums: (C,) of each completion; tokens: (R,) of each token.
        alignment: (C,) mean over tokens of ``log pi(y_t) - log sum_v pi(v)^2``, without gradient, where asked for.
        ref_tokens, divergence: (R,) the reference's log-probs and the divergence from it, of `Scorer.divergence`.
        entropy: (R,) over the vocabulary, with gradient, where asked for.
    """

    sums: Tensor
    tokens: Tensor
    alignment: Tensor | None = None
    ref_tokens: Tensor | None = None
    divergence: Tensor | None = None
    entropy: Tensor | None = None


def per_completion(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums over each completion's tokens: (R,) to (C,), `lengths` (C,) int64.

    In the order of the tokens: `index_add` on a GPU adds in the order in which its threads arrive, and the reference's sums of equal
    log-probs would differ from the policy's. ``unsafe`` leaves out a check that would wait for the GPU.
    """
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def padded_layout(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """One padded row a segment, made on the CPU once per batch: where each token is in the packed row (B, L), which ones are real (B, L)
    int64, and where the packed row's tokens are among all B L."""
    key = "padded"
    if key not in batch.cache:
        lengths = np.array([s.length for s in batch.segments])
        column = np.arange(lengths.max())
        real = column < lengths[:, None]
        index = np.where(real, np.array([s.start for s in batch.segments])[:, None] + column, 0)
        made = (index, real.astype(np.int64), np.flatnonzero(real))
        batch.cache[key] = tuple(moved(torch.from_numpy(x), batch.input_ids.device) for x in made)
    return cast(tuple[Tensor, Tensor, Tensor], batch.cache[key])


@dataclass(slots=True)
class Scorer:
    """A causal model as the engine sees it: packed batch in, completion log-probs out.

    Args:
        model: a transformers causal model, or a peft model around one.
        packing: ``shared``, ``separate`` or ``padded``; batches must be packed accordingly (`pack(shared=...)`).
        temperature: log-probs are of ``softmax(logits / temperature)``: what an online method samples from, it must train on.
        kernels: ``auto`` takes a model-family fast path where the model is exactly recognized; ``off`` never does; ``compile``: layers go
            through `torch.compile`, where rows are packed.
        attention: how packed rows attend within their trees: ``groups``, ``varlen``, ``flex`` or ``varlen+flex`` (`select_attention`).
        own_attention: padded rows go through the attention that transformers gave the model.
        own_head: logits come from the model's own `forward`, for models that do more than a linear layer, a factor and a cap.
        router: joins the balance loss of a mixture of experts to the hidden states that are trained on.
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
        """Another model of the same architecture, run in the same way."""
        return Scorer(model, self.packing, self.runs, **self.how)

    @property
    def runs(self) -> str:
        """`kernels`, as far as they are taken."""
        return "auto" if self.fast else "compile" if self.compiled else "off"

    @property
    def how(self) -> dict[str, Any]:
        """What another scorer needs, beside packing and kernels, to run in the same way."""
        return {"attention": self.attention, "own_attention": self.own_attention, "own_head": self.own_head}

    @property
    def shared(self) -> bool:
        return self.packing == "shared"

    @property
    def fast(self) -> bool:
        """Whether a model-family fast path runs."""
        return self._fast is not None

    def narrow(self) -> None:
        """Hold a frozen model in less memory, where its fast path can: `FastForward.narrow`."""
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
        """Whether several threads may run passes at once (`base/lanes.py`): the fast path toggles nothing on the model."""
        return self.fast and self.plain_head

    @property
    def plain_head(self) -> bool:
        """Whether the head is a plain Linear, without an adapter."""
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
        # a 4D mask is handed on as it is, so transformers builds none; the tree attention never looks at it
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
        """The plain way, for models whose layers carry state along the row: one padded row a segment."""
        index, mask, back = padded_layout(batch)
        ids = batch.input_ids[index] * mask
        more: dict[str, Any] = without_cache(backbone)
        if not self.own_attention and "position_ids" in signature(backbone.forward).parameters:
            more["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        out = backbone(input_ids=ids, attention_mask=mask, **more, **self._listening())
        hidden = out.last_hidden_state.flatten(0, 1).index_select(0, back)
        return self._with_router(hidden, tuple(layer.index_select(0, back) for layer in routed(out)), batch)

    def predicting(self, batch: PackedBatch) -> Tensor:
        """The hidden states (R, d) that predict the completion tokens."""
        if self._fast is not None:
            found: Tensor = self._fast.predicting(batch)
            return found
        return self.hidden(batch).index_select(0, batch.predict_index)

    def logps(
        self, batch: PackedBatch, *, alignment: bool = False, hidden: Tensor | None = None, entropy: bool = False
    ) -> CompletionLogps:
        """Summed log-probs per completion (C,) and per token (R,), in nats; `alignment` or `entropy` on request.

        `hidden` (R, d) from `predicting`, where the caller needs it too, saves a second forward pass.
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
        """What a head says of the hidden states that predict the completion tokens, (R,)."""
        found: Tensor = head(self.predicting(batch))
        return found

    def valued(self, batch: PackedBatch, head: nn.Module, *, entropy: bool = False) -> tuple[CompletionLogps, Tensor]:
        """Log-probs and `values` of one forward pass."""
        hidden = self.predicting(batch)
        return self.logps(batch, hidden=hidden, entropy=entropy), head(hidden)

    def row_logits(self, batch: PackedBatch) -> RowLogits:
        """The logits of a slice of predicting positions, in fp32 (fp64), without gradient: what a divergence compares with."""
        with torch.no_grad():
            hidden, head, scale, softcap = self._tempered(self.predicting(batch))

        @torch.no_grad()
        def rows(part: slice) -> Tensor:
            if type(head) is nn.Linear:
                return head_logits(hidden[part], head.weight, head.bias, scale, softcap)
            return scaled(head(hidden[part]), scale, softcap)

        return rows

    def divergence(self, batch: PackedBatch, ref_logits: RowLogits, kind: DivergenceKind) -> CompletionLogps:
        """Log-probs as `logps` gives them, with the divergence from a reference at every completion token."""
        return self._divergence(batch, self.predicting(batch), ref_logits, kind)

    def _with_entropy(self, batch: PackedBatch, hidden: Tensor) -> CompletionLogps:
        """``H(p) = log V - KL(p || uniform)``, so it is the divergence from a reference whose logits are all zero."""
        vocabulary = base_model_of(self.model).get_output_embeddings().weight.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)

        def uniform(part: slice) -> Tensor:
            return torch.zeros(len(batch.target_ids[part]), vocabulary, dtype=wide, device=hidden.device)

        found = self._divergence(batch, hidden, uniform, DivergenceKind("kl", "policy_ref"))
        assert found.divergence is not None
        return CompletionLogps(found.sums, found.tokens, entropy=math.log(vocabulary) - found.divergence)

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
        """Hidden states, head, scale and cap that give logits / temperature."""
        head, scale, softcap = self._head()
        if type(head) is nn.Linear:
            hidden = hidden.to(head.weight.dtype)  # a backbone that adds up in fp32 (Mamba) gives fp32 in bf16 too
        if self.temperature == 1.0:
            return hidden, head, scale, softcap
        if softcap is not None:
            raise ValueError("a model that caps its logits has no head for a temperature")
        if type(head) is nn.Linear and head.bias is None:
            return hidden / self.temperature, head, scale, softcap  # the same, and the fast head stays
        return hidden, head, scale / self.temperature, softcap

    def _head(self) -> tuple[Any, float, float | None]:
        base = base_model_of(self.model)
        if self.own_head:
            return OwnHead(base), 1.0, None
        return base.get_output_embeddings(), *head_scaling(base.config.get_text_config())


@dataclass(frozen=True, slots=True)
class OwnHead:
    """A causal model's own way from hidden states (n, d) to logits (n, V): its `forward`, given what its backbone says."""

    model: Any

    def __call__(self, hidden: Tensor) -> Tensor:
        backbone = backbone_of(self.model)
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        backbone.forward = lambda *_, **__: _Given(hidden[None])  # the instance's, for this call
        try:
            return cast(Tensor, self.model(input_ids=ids).logits[0])
        finally:
            del backbone.forward


class _Given:
    """A backbone's output of which the hidden states are known and nothing else was asked for."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, at: Any) -> Any:
        return self.last_hidden_state if at == "last_hidden_state" else (self.last_hidden_state,)[at]


class Elsewhere:
    """A scorer whose model is on another device than the batches are: they are moved there, and what it finds is moved back.

    Args:
        scorer: a `Scorer`; device: of its model.
    """

    _scorer: Any
    _device: torch.device

    def __init__(self, scorer: Any, device: torch.device) -> None:
        self.__dict__.update(_scorer=scorer, _device=device)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._scorer, name, value)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._scorer, name)
        return partial(self._through, found) if name in RUNS else found

    def _through(self, run: Any, batch: PackedBatch, *args: Any, **kwargs: Any) -> Any:
        key = f"on {self._device}"
        if key not in batch.cache:
            batch.cache[key] = batch.to(self._device)
        return self._back(run(batch.cache[key], *args, **kwargs), batch.input_ids.device)

    def _back(self, found: Any, device: torch.device) -> Any:
        if not isinstance(found, (Tensor, tuple)):  # what gives the logits of a slice
            return lambda part: moved(found(part), device)
        if isinstance(found, tuple):
            named: Any = type(found)
            return named(*(None if f is None else self._back(f, device) for f in found))
        return moved(found, device)
