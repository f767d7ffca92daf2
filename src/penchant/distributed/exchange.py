"""How shards go from one process to another where all are on one machine's CPU: through memory that they share.

gloo sends them through sockets, which takes three times the CPU time. FSDP2 has a place for a transport of one's
own, which says where its vectors lie: in memory that the other processes see, they need no sending. gloo still says when everybody has
written, so whoever dies or does not answer is found out as before.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from penchant.base.machine import peak_memory, resident
from penchant.distributed.world import World

# Bytes of a vector that lies in shared memory, which stays: a larger one would raise a run's highest mark.
LIMIT = 32 << 20
SLOT = 2 << 20  # bytes of a larger one that a process shows the others at a time
_TOKEN = 16


@dataclass(slots=True)
class Piece:
    """A part of every process's file, at the same place in each.

    Args:
        used: the number of the exchange that it is for; seen: what is mapped of it, by rank.
    """

    at: int
    size: int
    used: int = 0
    seen: dict[int, Tensor] = field(default_factory=dict)


class Exchange:
    """A file in the memory of each process, which all of them map and cut into the same pieces.

    Of one kind, a piece is used in every other exchange at most: whoever has come to the one in between is done with it.

    Args:
        files: descriptors of all processes' files by rank, this one's among them.
    """

    def __init__(self, files: Sequence[int], rank: int) -> None:
        self.rank, self._files, self._end = rank, files, mmap.PAGESIZE
        self._pieces: dict[tuple[str, int], list[Piece]] = {}
        self._counts: dict[str, int] = {}
        self._there = torch.zeros(1)

    @classmethod
    @lru_cache(maxsize=1)
    def of(cls, world: World) -> Exchange | None:
        """Between all processes; None on each of them where one cannot see another's memory: another machine, another container."""
        token, descriptor = os.urandom(_TOKEN), -1
        with suppress(OSError, AttributeError):  # not every system has them
            descriptor = os.memfd_create("penchant")
            os.write(descriptor, token)
        files: list[int] = []
        for pid, number, said in world.gather((os.getpid(), descriptor, token)):
            with suppress(OSError):
                files.append(os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR))
                if os.pread(files[-1], _TOKEN, 0) != said:  # the same numbers may be another file on another machine
                    os.close(files.pop())
        if all(world.gather(len(files) == world.size)):
            return cls(files, world.rank)
        for file in files:
            os.close(file)
        return None

    def piece(self, kind: str, size: int) -> Piece:
        """Where the next exchange of a kind puts so many bytes: all processes ask for the same, in the same order."""
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        pieces = self._pieces.setdefault((kind, size), [])
        found = next((p for p in pieces if p.used < count - 1), None)
        if found is None:
            found = Piece(self._end, size)
            pieces.append(found)
            self._end += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        found.used = count
        return found

    def seen(self, piece: Piece, rank: int, dtype: torch.dtype) -> Tensor:
        """A piece in a process's file, as a vector."""
        if rank not in piece.seen:
            os.posix_fallocate(self._files[rank], piece.at, piece.size)  # whoever comes first makes room for it
            mapped = mmap.mmap(self._files[rank], piece.size, offset=piece.at)
            piece.seen[rank] = torch.frombuffer(mapped, dtype=torch.uint8)
        return piece.seen[rank].view(dtype)

    def meet(self, group: Any) -> None:
        """Wait for all of a group."""
        dist.all_reduce(self._there, group=group)

    def shown(self, rows: Sequence[Tensor], group: Any) -> list[Tensor]:
        """Show the others rows of equal length, together at most `SLOT` bytes, and wait for theirs.

        Returns:
            The rows of each rank of the group, this one's among them, to be read before the next call.
        """
        dtype, shape = rows[0].dtype, (len(rows), rows[0].numel())
        piece, count = self.piece("slot", SLOT), shape[0] * shape[1]
        for slot, row in zip(self.seen(piece, self.rank, dtype)[:count].view(shape), rows, strict=True):
            slot.copy_(row)
        self.meet(group)
        return [self.seen(piece, rank, dtype)[:count].view(shape) for rank in dist.get_process_group_ranks(group)]


@dataclass(slots=True)
class Transport:
    """What FSDP2 asks of one: the methods of its `AllGather` and `ReduceScatter`, which older torch does not have.

    Args:
        ranks: of those that share a model's shards; piece: where the vector lies that is next.
    """

    exchange: Exchange
    ranks: Sequence[int]
    piece: Piece | None = None

    def placed(self, rank: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A vector in a process's file, or where it is large, anywhere."""
        count = torch.Size(size).numel()
        self.piece = None
        if count * dtype.itemsize > LIMIT:
            _make_room(count * dtype.itemsize)
            return torch.empty(size, dtype=dtype)
        self.piece = self.exchange.piece("vector", count * dtype.itemsize)
        return self.exchange.seen(self.piece, rank, dtype).view(size)


class Gather(Transport):
    """All ranks' shards of a flat vector, on each of them: what fits lies in the first rank's file, and each writes its part."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Where FSDP2 puts this rank's part of a vector and finds the whole of it."""
        return self.placed(self.ranks[0], size, dtype)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        if self.piece is not None:
            self.exchange.meet(group)
            return
        mine = group.rank()
        parts = output_tensor.view(group.size(), -1)
        for piece in parts.split(SLOT // parts.element_size(), dim=1):
            for i, shown in enumerate(self.exchange.shown([piece[mine]], group)):
                if i != mine:
                    piece[i].copy_(shown[0])


@dataclass(slots=True)
class ReduceScatter(Transport):
    """Of the sum of all ranks' vectors this rank's part, added in their order.

    Args:
        given: whether FSDP2 has its vector, and asks for a place for the sum.
    """

    given: bool = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Where FSDP2 puts a rank's vector, and then where it finds the sum."""
        self.given = not self.given
        return self.placed(self.exchange.rank, size, dtype) if self.given else torch.empty(size, dtype=dtype)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        size, mine = group.size(), group.rank()
        if op != dist.ReduceOp.SUM:
            raise NotImplementedError(f"{op} of gradients")
        if self.piece is not None:
            self.exchange.meet(group)
            whole = [self.exchange.seen(self.piece, rank, input_tensor.dtype).view(size, -1) for rank in self.ranks]
            _add([vectors[mine] for vectors in whole], output_tensor)
            return
        vectors = input_tensor.view(size, -1)
        room = SLOT // (vectors.element_size() * (size - 1))
        for total, piece in zip(output_tensor.split(room), vectors.split(room, dim=1), strict=True):
            shown = self.exchange.shown([row for i, row in enumerate(piece) if i != mine], group)
            # a rank shows what is for the others: without its own part
            _add([piece[mine] if i == mine else rows[mine - (mine > i)] for i, rows in enumerate(shown)], total)


def _make_room(size: int) -> None:
    """Where so many bytes more would raise a run's highest mark, give back what the heap keeps of freed tensors: activations, above all."""
    if resident() + size > peak_memory():
        with suppress(AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)


def _add(terms: Sequence[Tensor], total: Tensor) -> None:
    torch.add(terms[0], terms[1], out=total)
    for term in terms[2:]:
        total.add_(term)
