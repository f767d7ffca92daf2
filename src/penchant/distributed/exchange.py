"""How shards go from one process to another where all are on one machine's CPU: through memory that they share.

gloo sends them through sockets, which takes three times the CPU time. FSDP2 has a place for a transport of one's
own; gloo still says when everybody has written, so whoever dies or does not answer is found out as before.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from penchant.distributed.world import World

SLOT = 8 << 20  # bytes that a process shows the others at a time
_TOKEN = 16


class Exchange:
    """Memory of each process that the others read. What is sent lies in one of two slots, in turn.

    Whoever writes into a slot again has been told, in between, that everybody has read it: each must be done with one piece to say that
    the next is there.

    Args:
        pages: of all processes by rank, this one's among them: two slots each.
    """

    def __init__(self, pages: Sequence[Tensor], rank: int) -> None:
        self._pages, self._rank, self._turn = [p.view(2, SLOT) for p in pages], rank, 0
        self._there = torch.zeros(1)

    @classmethod
    @lru_cache(maxsize=1)
    def of(cls, world: World) -> Exchange | None:
        """Between all processes; None on each of them where one cannot see another's memory: another machine, another container."""
        token, pages, descriptor = os.urandom(_TOKEN), None, -1
        with suppress(OSError, AttributeError):  # not every system has them
            descriptor = os.memfd_create("penchant")
            os.ftruncate(descriptor, 2 * SLOT)
            pages = _mapped(descriptor)
            pages[:_TOKEN] = torch.frombuffer(bytearray(token), dtype=torch.uint8)
        found: list[Tensor] = []
        for pid, number, said in world.gather((os.getpid(), descriptor, token)):
            with suppress(OSError, ValueError):
                other = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
                seen = _mapped(other)
                os.close(other)
                if bytes(seen[:_TOKEN].tolist()) == said:  # the same numbers may be another file on another machine
                    found.append(seen)
        everybody = world.gather(len(found) == world.size)
        if pages is not None:
            os.close(descriptor)
        return cls(found, world.rank) if all(everybody) else None

    def shown(self, rows: Sequence[Tensor], group: Any) -> list[Tensor]:
        """Show the others rows of equal length, together at most `SLOT` bytes, and wait for theirs.

        Returns:
            The rows of each rank of the group, this one's among them, to be read before the next call.
        """
        at, self._turn = self._turn, 1 - self._turn
        shape = len(rows), rows[0].numel()
        size = shape[0] * shape[1] * rows[0].element_size()
        slots = [page[at, :size].view(rows[0].dtype).view(shape) for page in self._pages]
        for slot, row in zip(slots[self._rank], rows, strict=True):
            slot.copy_(row)
        dist.all_reduce(self._there, group=group)
        return [slots[rank] for rank in dist.get_process_group_ranks(group)]


def _mapped(descriptor: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, 2 * SLOT), dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Transport:
    """What FSDP2 asks of one: the methods of its `AllGather` and `ReduceScatter`, which older torch does not have."""

    exchange: Exchange

    @staticmethod
    def allocate(size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Where FSDP2 puts a vector before it is sent, and what comes."""
        return torch.empty(*size, dtype=dtype, device=device)


class Gather(Transport):
    """All ranks' shards of a flat vector, on each of them."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        size, mine = group.size(), group.rank()
        parts = output_tensor.view(size, -1)
        for piece in parts.split(SLOT // parts.element_size(), dim=1):
            for i, shown in enumerate(self.exchange.shown([piece[mine]], group)):
                if i != mine:
                    piece[i].copy_(shown[0])


class ReduceScatter(Transport):
    """Of the sum of all ranks' vectors this rank's part, added in their order."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        size, mine = group.size(), group.rank()
        if op != dist.ReduceOp.SUM:
            raise NotImplementedError(f"{op} of gradients")
        vectors = input_tensor.view(size, -1)
        room = SLOT // (vectors.element_size() * (size - 1))
        for total, piece in zip(output_tensor.split(room), vectors.split(room, dim=1), strict=True):
            shown = self.exchange.shown([row for i, row in enumerate(piece) if i != mine], group)
            # a rank shows what is for the others: without its own part
            terms = [piece[mine] if i == mine else rows[mine - (mine > i)] for i, rows in enumerate(shown)]
            torch.add(terms[0], terms[1], out=total)
            for term in terms[2:]:
                total.add_(term)
