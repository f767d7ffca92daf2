"""Transport for FSDP2 through shared memory, used if all processes run on the CPU of one machine.

gloo sends shards through sockets, which takes three times the CPU time. FSDP2 accepts a custom transport that allocates its vectors:
in memory that the other processes can see, nothing has to be sent. gloo still synchronizes the processes, so one that dies or hangs is
detected as before.
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

# Bytes of the largest vector kept in shared memory, which is never freed: a larger one would raise a run's peak memory.
LIMIT = 32 << 20
SLOT = 2 << 20  # bytes of a larger vector that a process shows the others at a time
_TOKEN = 16


@dataclass(slots=True)
class Piece:
    """A region of every process's file, at the same offset in each.

    Args:
        used: number of the exchange that it was last used for; views: its mapping by rank, as far as it is mapped.
    """

    at: int
    size: int
    used: int = 0
    views: dict[int, Tensor] = field(default_factory=dict)


class Exchange:
    """One memory file per process. All processes map all files and cut them into the same pieces.

    A piece serves at most every other exchange of its kind: a process that has reached the one in between is done with
    it.

    Args:
        files: descriptors of all processes' files by rank, including this one's.
    """

    def __init__(self, files: Sequence[int], rank: int) -> None:
        self.rank, self._files, self._end = rank, files, mmap.PAGESIZE
        self._pieces: dict[tuple[str, int], list[Piece]] = {}
        self._counts: dict[str, int] = {}
        self._barrier = torch.zeros(1)

    @classmethod
    @lru_cache(maxsize=1)
    def of(cls, world: World) -> Exchange | None:
        """Connect all processes; None on all of them if any cannot see another's memory (another machine or container)."""
        token, descriptor = os.urandom(_TOKEN), -1
        with suppress(OSError, AttributeError):  # not every system has memfd
            descriptor = os.memfd_create("penchant")
            os.write(descriptor, token)
        files: list[int] = []
        for pid, remote_fd, remote_token in world.gather((os.getpid(), descriptor, token)):
            with suppress(OSError):
                files.append(os.open(f"/proc/{pid}/fd/{remote_fd}", os.O_RDWR))
                # on another machine, this path may be an unrelated file
                if os.pread(files[-1], _TOKEN, 0) != remote_token:
                    os.close(files.pop())
        if all(world.gather(len(files) == world.size)):
            return cls(files, world.rank)
        for file in files:
            os.close(file)
        return None

    def piece(self, kind: str, size: int) -> Piece:
        """The region of `size` bytes for the next exchange of a kind. All processes must make the same calls in the same order."""
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        pieces = self._pieces.setdefault((kind, size), [])
        piece = next((p for p in pieces if p.used < count - 1), None)
        if piece is None:
            piece = Piece(self._end, size)
            pieces.append(piece)
            self._end += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        piece.used = count
        return piece

    def view_of(self, piece: Piece, rank: int, dtype: torch.dtype) -> Tensor:
        """A piece of a rank's file as a vector."""
        if rank not in piece.views:
            os.posix_fallocate(self._files[rank], piece.at, piece.size)  # the first rank that gets here allocates it
            mapped = mmap.mmap(self._files[rank], piece.size, offset=piece.at)
            piece.views[rank] = torch.frombuffer(mapped, dtype=torch.uint8)
        return piece.views[rank].view(dtype)

    def meet(self, group: Any) -> None:
        """Wait for all ranks of a group."""
        dist.all_reduce(self._barrier, group=group)

    def exchange_rows(self, rows: Sequence[Tensor], group: Any) -> list[Tensor]:
        """Show the other ranks rows of equal length, at most `SLOT` bytes together, and wait for theirs.

        Returns:
            The rows of each rank of the group, including this one's. Read them before the next call.
        """
        dtype, shape = rows[0].dtype, (len(rows), rows[0].numel())
        piece, count = self.piece("slot", SLOT), shape[0] * shape[1]
        for slot, row in zip(self.view_of(piece, self.rank, dtype)[:count].view(shape), rows, strict=True):
            slot.copy_(row)
        self.meet(group)
        return [self.view_of(piece, rank, dtype)[:count].view(shape) for rank in dist.get_process_group_ranks(group)]


@dataclass(slots=True)
class Transport:
    """Base of the two collectives. They do not inherit from FSDP2's `AllGather` and `ReduceScatter`, which older torch lacks.

    Args:
        ranks: those that share a model's shards; piece: where the current vector lies (None: not in shared memory).
    """

    exchange: Exchange
    ranks: Sequence[int]
    piece: Piece | None = None

    def placed(self, rank: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate a vector in a rank's file, or in ordinary memory if it is larger than `LIMIT`."""
        count = torch.Size(size).numel()
        self.piece = None
        if count * dtype.itemsize > LIMIT:
            _make_room(count * dtype.itemsize)
            return torch.empty(size, dtype=dtype)
        self.piece = self.exchange.piece("vector", count * dtype.itemsize)
        return self.exchange.view_of(self.piece, rank, dtype).view(size)


class Gather(Transport):
    """All-gather of a flat vector. Up to `LIMIT` bytes it lies in the first rank's file, where each rank writes its part."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate the vector in which FSDP2 writes this rank's part and then finds the whole."""
        return self.placed(self.ranks[0], size, dtype)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        if self.piece is not None:
            self.exchange.meet(group)
            return
        own_rank = group.rank()
        parts = output_tensor.view(group.size(), -1)
        for piece in parts.split(SLOT // parts.element_size(), dim=1):
            for i, rows in enumerate(self.exchange.exchange_rows([piece[own_rank]], group)):
                if i != own_rank:
                    piece[i].copy_(rows[0])


@dataclass(slots=True)
class ReduceScatter(Transport):
    """Reduce-scatter: this rank's part of the sum of all ranks' vectors, added in rank order.

    Args:
        given: whether the input vector is allocated, so the next allocation is for the sum.
    """

    given: bool = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate the input vector and the sum, in turn."""
        self.given = not self.given
        return self.placed(self.exchange.rank, size, dtype) if self.given else torch.empty(size, dtype=dtype)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        size, own_rank = group.size(), group.rank()
        if op != dist.ReduceOp.SUM:
            raise NotImplementedError(f"{op} of gradients")
        if self.piece is not None:
            self.exchange.meet(group)
            all_vectors = [
                self.exchange.view_of(self.piece, rank, input_tensor.dtype).view(size, -1) for rank in self.ranks
            ]
            _add([vectors[own_rank] for vectors in all_vectors], output_tensor)
            return
        vectors = input_tensor.view(size, -1)
        room = SLOT // (vectors.element_size() * (size - 1))
        for total, piece in zip(output_tensor.split(room), vectors.split(room, dim=1), strict=True):
            rows_by_rank = self.exchange.exchange_rows([row for i, row in enumerate(piece) if i != own_rank], group)
            # a rank shows only the other ranks' parts, not its own
            _add(
                [
                    piece[own_rank] if i == own_rank else rows[own_rank - (own_rank > i)]
                    for i, rows in enumerate(rows_by_rank)
                ],
                total,
            )


def _make_room(size: int) -> None:
    """Return freed memory (mostly activations) from the heap to the system if `size` more bytes would raise the peak memory."""
    if resident() + size > peak_memory():
        trim_heap()


def trim_heap() -> None:
    """Return freed memory from the heap to the system."""
    with suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _add(terms: Sequence[Tensor], total: Tensor) -> None:
    torch.add(terms[0], terms[1], out=total)
    for term in terms[2:]:
        total.add_(term)
