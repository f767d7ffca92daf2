"""Context parallelism (Ulysses, arXiv 2309.14509): each rank holds part of a packed row's tokens and, in attention, part of the heads.

All ranks of a group run the same passes. Each computes the whole loss from the gathered hidden states and counts the
pass as its own, so sums and counts are both multiplied by the size of the group. Their ratio is that of a single
process, and so are the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from penchant.distributed.world import current
from penchant.errors import ModelError

SPLIT = "context"  # key in a batch's cache: its tokens are split


def splits() -> bool:
    """Whether the tokens of a pass are split over several ranks."""
    return current().context > 1


def check_positions(config: Any) -> None:
    """Refuse a model whose rotary frequencies depend on the last position of a pass, which differs between ranks.

    Raises:
        ModelError: the model's rotary type is dynamic or longrope.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(r.get("rope_type") for r in rope.values() if isinstance(r, Mapping))}
    if kind := next(iter(kinds & {"dynamic", "longrope"}), None):
        what = f"splits rows, and the model's rotary positions ({kind}) depend on how long a row is"
        raise ModelError("launch.context", what, "set it to 1")


def my_tokens(row: Tensor) -> Tensor:
    """This rank's part (T / n,) of a packed row (T,), which is padded with zeros to a multiple of n."""
    world = current()
    share = -(-len(row) // world.context)
    padded = torch.cat([row, row.new_zeros(share * world.context - len(row))])
    return padded.narrow(0, world.rank % world.context * share, share)


def all_tokens(local: Tensor, count: int) -> Tensor:
    """Gather the hidden states (T, d) of a row of `count` tokens from the parts (T / n, d) of all ranks."""
    hidden: Tensor = _Together.apply(local)
    return hidden[:count]


def part_of_heads(x: Tensor, count: int) -> Tensor:
    """Exchange all heads of some tokens (T / n, H, d) for some heads of all `count` tokens (T, H / n, d).

    Raises:
        ModelError: the number of heads is not a multiple of the group's size.
    """
    n = current().context
    if x.shape[1] % n:
        raise ModelError("launch.context", f"is {n}, and the model has {x.shape[1]} heads of a kind", "give a divisor")
    parts = x.view(x.shape[0], n, -1, x.shape[2]).transpose(0, 1)
    exchanged: Tensor = _Exchanged.apply(parts)
    return exchanged.flatten(0, 1)[:count]


def part_of_tokens(x: Tensor) -> Tensor:
    """The inverse of `part_of_heads`."""
    n = current().context
    share = -(-len(x) // n)
    padded = torch.cat([x, x.new_zeros(share * n - len(x), *x.shape[1:])])
    exchanged: Tensor = _Exchanged.apply(padded.unflatten(0, (n, share)))
    return exchanged.transpose(0, 1).flatten(1, 2)


def my_heads(per_head: Tensor | None) -> Tensor | None:
    """This rank's part of a vector with one number per head (H,)."""
    world = current()
    return None if per_head is None else per_head.chunk(world.context)[world.rank % world.context]


class _Exchanged(torch.autograd.Function):
    """All-to-all within the group, of (n, ...): part i goes to rank i and is replaced by the part that rank i holds for this one."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        import torch.distributed as dist

        parts = parts.contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=current().context_group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Exchanged.forward(ctx, grads[0])


class _Together(torch.autograd.Function):
    """Concatenate the parts of all ranks. The gradient of a part is the sum of the gradients from all ranks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        import torch.distributed as dist

        world = current()
        gathered = local.new_empty(world.context * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=world.context_group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        import torch.distributed as dist

        world = current()
        grad = grads[0].contiguous()
        reduced = grad.new_empty(grad.shape[0] // world.context, *grad.shape[1:])
        dist.reduce_scatter_tensor(reduced, grad, group=world.context_group)
        return reduced
