"""Decoder layers through `torch.compile`, which fuses what transformers' modules leave apart: norms, rotary embeddings, activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from penchant.distributed.shard import layers_of
from penchant.models.load import backbone_of
from penchant.models.tree_attention import uncompiled_attention

BACKEND = "inductor"
VARIANTS = 64  # of a layer's two halves: by kind of layer, precision, with a gradient and without


def compile_layers(model: nn.Module) -> None:
    """Compile each layer of a transformers (peft) model for passes over packed rows; other passes (sampling) stay as they are.

    Attention runs between two compiled parts, as it is. Parameters keep their names, and lengths are dynamic: no batch is compiled for anew.
    """
    import torch._dynamo

    uncompiled_attention()
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    for layer in layers_of(backbone_of(model)):
        if layer._compiled_call_impl is None:
            layer._compiled_call_impl = _for_packed_rows(layer._call_impl)  # as `nn.Module.compile` does


def _for_packed_rows(plain: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(plain, dynamic=True, backend=BACKEND)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (compiled if "penchant_batch" in kwargs else plain)(*args, **kwargs)

    return call
