"""The load-balancing loss of a mixture of experts' router, over the tokens of an optimizer step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penchant.base.machine import moved, place_of
from penchant.distributed.world import current
from penchant.errors import ConfigError
from penchant.models.load import backbone_of, base_model_of, quiet, without_cache
from penchant.types import PackedBatch

KEY = "model.router_aux_loss"


@dataclass(slots=True)
class RouterLoss:
    """``coef E sum_e f_e P_e`` (arXiv 2101.03961, equations 4 to 6), over layers and over all tokens of an optimizer step.

    f_e is the share of tokens that expert e gets, times `top_k`, without gradient; P_e its mean probability. A prompt counts once,
    regardless of its number of completions and of the packing; padding does not count.

    Given f, the loss is a mean over tokens. So f is counted over the whole step before its first micro-batch, and 1x8 equals 4x2.
    The loss joins the graph at the hidden states, independently of what the training method computes from them.

    Args:
        coef: the weight; experts: E; top_k: experts per token.
        run: makes a forward pass over a batch, which calls `attached`.
    """

    coef: float
    experts: int
    top_k: int
    run: Callable[[PackedBatch], Any] = lambda _: None
    _tokens: float = 0.0  # in the step; 0 outside a step
    _shares: Tensor | None = None  # (E,) f over the step
    _counted: list[Tensor] = field(default_factory=list)  # (E,) per pass, while counting
    _losses: list[Tensor] = field(default_factory=list)

    @property
    def listens(self) -> bool:
        """Whether the next pass must return router logits."""
        return self._tokens > 0 and (torch.is_grad_enabled() or self._shares is None)

    def begin_step(self, model: Any, batches: Sequence[PackedBatch]) -> None:
        """Count the step's tokens per expert over all ranks: in the pass itself if there is one batch on one rank, else by extra passes."""
        world = current()
        self._tokens = world.sums({"tokens": sum(float(weights.sum()) for weights in map(_weights, batches))})["tokens"]
        self._shares, self._counted, self._losses = None, [], []
        if len(batches) > 1 or world.many:
            device = place_of(model)
            with quiet(model, training=model.training):
                for batch in batches:
                    self.run(batch.to(device))
            per_rank = world.gather_tensors(torch.stack(self._counted).sum(0), device)
            self._shares = torch.stack(per_rank).sum(0)

    def end_step(self) -> float:
        """End the step and return its loss without the weight: `top_k` if every expert gets the same share."""
        loss = float(torch.stack(self._losses).sum()) if self._losses else 0.0
        self._tokens, self._shares, self._counted, self._losses = 0.0, None, [], []
        return current().sums({"loss": loss})["loss"]

    def attached(self, hidden: Tensor, logits: Sequence[Tensor], batch: PackedBatch) -> Tensor:
        """The hidden states (T, d), with the loss attached to the graph.

        Args:
            logits: (T, E) for each layer with experts.
        """
        probs = _probs(logits)
        weights = _weights(batch).to(probs[0])
        if (shares := self._shares) is None:
            shares = self._mean([self._chosen(p) for p in probs], weights)
            self._counted.append(shares)
        if not torch.is_grad_enabled():
            return hidden
        loss = self.experts * (shares * self._mean(probs, weights)).sum()
        self._losses.append(loss.detach())
        joined: Tensor = _Joined.apply(hidden, self.coef * loss)
        return joined

    def _chosen(self, probs: Tensor) -> Tensor:
        """(T, E), 1 for the experts that a token is routed to."""
        return torch.zeros_like(probs).scatter_(-1, probs.detach().topk(self.top_k, dim=-1).indices, 1.0)

    def _mean(self, layers: Sequence[Tensor], weights: Tensor) -> Tensor:
        """(E,) this pass's contribution to the mean of (T, E) layers over the step's tokens and over layers."""
        return torch.stack([weights @ layer for layer in layers]).sum(0) / (self._tokens * len(layers))

    def of(self, logits: Sequence[Tensor]) -> float:
        """The loss of these tokens alone, without its weight, from each layer's logits (T, E)."""
        self._tokens = float(len(logits[0]))
        probs = _probs(logits)
        ones = probs[0].new_ones(len(probs[0]))
        means = self._mean([self._chosen(p) for p in probs], ones) * self._mean(probs, ones)
        self._tokens = 0.0
        return self.experts * float(means.sum())


def _probs(logits: Sequence[Tensor]) -> list[Tensor]:
    """Each layer's probabilities (T, E), in fp32 (fp64)."""
    return [layer.to(torch.promote_types(layer.dtype, torch.float32)).softmax(-1) for layer in logits]


class _Joined(torch.autograd.Function):
    """Return the hidden states unchanged; in the backward pass the loss gets a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones_like(ctx.like)


def _weights(batch: PackedBatch) -> Tensor:
    """(T,) 1 for each token that counts; 0 for a prompt repeated for another completion of its tree, and in an idle batch."""
    key = "router"
    if key not in batch.cache:
        weights = np.full(batch.tokens, 0.0 if batch.idle else 1.0, dtype=np.float32)
        if len(batch.segments) > batch.trees:  # one segment a completion
            slots = batch.completion_slot.tolist()
            for segment, slot in zip(batch.segments, slots, strict=True):
                if slot > 0:
                    weights[segment.start : segment.start + segment.prompt_len] = 0.0
        batch.cache[key] = moved(torch.from_numpy(weights), batch.input_ids.device)
    cached = batch.cache[key]
    assert isinstance(cached, Tensor)
    return cached


def router_loss(model: Any, wanted: float | str) -> RouterLoss:
    """The balance loss of a model with this weight (``auto``: its config's), checked against transformers' own function.

    Raises:
        ConfigError: the model has no such loss, has no weight for ``auto``, or computes the loss differently.
    """
    base = base_model_of(model)
    config, kind = base.config.get_text_config(), type(base).__name__
    how = f"leave {KEY} out"
    loss_function = getattr(sys.modules[type(base).__module__], "load_balancing_loss_func", None)
    top_k = getattr(config, "num_experts_per_tok", None)
    if loss_function is None or top_k is None:
        raise ConfigError(KEY, f"{kind} has no balance loss of a router in transformers", how)
    coef = getattr(config, "router_aux_loss_coef", None) if wanted == "auto" else float(wanted)
    if not coef:
        what = f"is auto, and the model's own router_aux_loss_coef is {coef}"
        raise ConfigError(KEY, what, "give a number, or " + how)
    ids = torch.arange(1, 13, device=next(base.parameters()).device)[None]
    with quiet(model):
        logits = routed(
            backbone_of(model)(input_ids=ids, output_router_logits=True, **without_cache(backbone_of(model)))
        )
        loss = RouterLoss(float(coef), logits[0].shape[-1] if logits else 0, int(top_k))
        expected = float(loss_function(logits, loss.experts, loss.top_k)) if logits else 0.0
    if not expected or not abs(loss.of(logits) - expected) <= 1e-4 * abs(expected):
        what = f"the router of {kind} is balanced in a way that is not supported here"
        raise ConfigError(KEY, what, how)
    return loss


def routed(output: Any) -> tuple[Tensor, ...]:
    """The router logits in a backbone's output, (tokens, E) for each layer; empty if it has none."""
    logits = getattr(output, "router_logits", None) or ()
    return tuple(layer.reshape(-1, layer.shape[-1]) for layer in logits if layer is not None)
