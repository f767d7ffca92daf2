"""Compile decoder layers with `torch.compile`, which fuses the norms, rotary embeddings and activations of transformers' modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from penchant.distributed.shard import layers_of
from penchant.models.load import backbone_of
from penchant.models.tree_attention import uncompiled_attention

BACKEND = "inductor"
VARIANTS = 64  # compiled versions of a layer's two halves: by kind of layer, precision, with and without gradient


def compile_layers(model: nn.Module) -> None:
    """Compile each layer of a transformers (peft) model for passes over packed rows; other passes (sampling) stay uncompiled.

    Attention runs uncompiled between two compiled parts. Parameters keep their names, and lengths are dynamic, so new batch sizes do
    not recompile.
    """
    import torch._dynamo

    uncompiled_attention()
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    for layer in layers_of(backbone_of(model)):
        if layer._compiled_call_impl is None:
            layer._compiled_call_impl = _for_packed_rows(layer._call_impl)  # like `nn.Module.compile`


def _for_packed_rows(plain: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(plain, dynamic=True, backend=BACKEND)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (compiled if "penchant_batch" in kwargs else plain)(*args, **kwargs)

    return call
