"""Activations between forward and backward pass: kept in the host's memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALL = 1 << 16  # bytes: less than this is not worth a copy


class Offloaded(saved_tensors_hooks):
    """While it is entered, what autograd saves goes to the host, and returns when the backward pass needs it.

    `torch.autograd.graph.save_on_cpu` does so too, but would also copy the weights, which products save and which stay where they are.

    Args:
        module: its parameters and buffers are left alone; pin: take page-locked memory, which copies in the background need.
    """

    def __init__(self, module: nn.Module, pin: bool) -> None:
        own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}

        def pack(saved: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            if saved.nbytes < SMALL or saved.untyped_storage().data_ptr() in own:
                return saved
            kept = torch.empty(saved.size(), dtype=saved.dtype, layout=saved.layout, pin_memory=pin)
            return saved.device, kept.copy_(saved, non_blocking=pin)  # of one stream, as its way back is

        def unpack(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
            return kept if isinstance(kept, Tensor) else kept[1].to(kept[0], non_blocking=pin)

        super().__init__(pack, unpack)


def offload(backbone: nn.Module, pin: bool = True) -> None:
    """Have every forward pass with a gradient keep its activations in the host's memory."""
    entered: list[Offloaded | None] = []

    def before(module: nn.Module, _: Any) -> None:
        hooks = Offloaded(module, pin) if torch.is_grad_enabled() else None
        if hooks is not None:
            hooks.__enter__()
        entered.append(hooks)

    def after(module: nn.Module, *_: Any) -> None:
        hooks = entered.pop() if entered else None
        if hooks is not None:
            hooks.__exit__()

    backbone.register_forward_pre_hook(before)
    backbone.register_forward_hook(after, always_call=True)
