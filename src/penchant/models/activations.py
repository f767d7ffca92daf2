"""Offload activations to host memory between the forward and the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALL = 1 << 16  # bytes: smaller tensors are not worth a copy


class Offloaded(saved_tensors_hooks):
    """Context in which tensors saved by autograd are moved to the host, and back when the backward pass needs them.

    `torch.autograd.graph.save_on_cpu` also copies the weights that matrix products save; here they stay on their device.

    Args:
        module: its parameters and buffers are not moved; pin: use page-locked memory, which asynchronous copies need.
    """

    def __init__(self, module: nn.Module, pin: bool) -> None:
        module_storages = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}

        def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            if tensor.nbytes < SMALL or tensor.untyped_storage().data_ptr() in module_storages:
                return tensor
            host_copy = torch.empty(tensor.size(), dtype=tensor.dtype, layout=tensor.layout, pin_memory=pin)
            return tensor.device, host_copy.copy_(
                tensor, non_blocking=pin
            )  # safe: the copy back runs on the same stream

        def unpack(stored: Tensor | tuple[torch.device, Tensor]) -> Tensor:
            return stored if isinstance(stored, Tensor) else stored[1].to(stored[0], non_blocking=pin)

        super().__init__(pack, unpack)


def offload(backbone: nn.Module, pin: bool = True) -> None:
    """Register hooks that keep the activations of every forward pass with a gradient in host memory."""
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
