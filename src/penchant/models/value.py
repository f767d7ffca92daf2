"""A value for every token: a linear head on the policy's own hidden states, or on those of a model of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """``V = w h + b``, from zero: before training every state is worth nothing, so the first advantages are the rewards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        """(R, d) to (R,), in fp32 (fp64)."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return torch.nn.functional.linear(hidden.to(wide), self.weight.to(wide), self.bias.to(wide)).squeeze(1)


class ValueModel(nn.Module):
    """The head, and the backbone that it reads: the policy's own (None here) or a causal model of its own."""

    def __init__(self, width: int, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.head = ValueHead(width)
        self.backbone = backbone
        if backbone is not None:  # its own output layer is never asked
            backbone.get_output_embeddings().requires_grad_(False)  # type: ignore[operator]
