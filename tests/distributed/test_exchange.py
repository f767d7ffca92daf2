"""Shared-memory collectives equal torch's, for any size and any slow rank."""

from __future__ import annotations

import mmap
import os
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from worlds import in_world

from penchant.distributed import exchange
from penchant.distributed.exchange import Exchange, Gather, ReduceScatter
from penchant.distributed.world import World

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd")


def vector(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(10 * count + rank)).to(dtype)


def sent(world: World) -> dict[str, Any]:
    """Whether each gather and sum is right, for vectors in shared memory and larger ones below and above a slot's size."""
    exchange.SLOT, exchange.LIMIT = 96, 200
    made = Exchange.of(world)
    assert made is not None
    group, found, cpu = dist.group.WORLD, {}, torch.device("cpu")
    gather, reduce = Gather(made, range(3)), ReduceScatter(made, range(3))
    draw, shared = random.Random(world.rank), set()
    for round_ in range(12):
        sizes = [(1, torch.float32), (7, torch.float64), (9, torch.bfloat16), (50, torch.float32), (50, torch.bfloat16)]
        random.Random(round_).shuffle(sizes)
        for count, dtype in sizes:
            whole = gather.allocate((world.size * count,), dtype=dtype, device=cpu)
            mine = whole[world.rank * count :][:count].copy_(vector(world.rank, count + round_, dtype)[:count])
            time.sleep(0.01 * (draw.random() < 0.2))
            gather(whole, mine, group)
            time.sleep(0.01 * (draw.random() < 0.2))  # while the others continue
            right = torch.cat([vector(r, count + round_, dtype)[:count] for r in range(world.size)])
            equal = torch.equal(whole, right)
            of_all = [vector(r, world.size * count + round_, dtype)[: world.size * count] for r in range(world.size)]
            given = reduce.allocate((world.size * count,), dtype=dtype, device=cpu).copy_(of_all[world.rank])
            out = reduce.allocate((count,), dtype=dtype, device=cpu)
            time.sleep(0.01 * (draw.random() < 0.2))
            reduce(out, given, group, dist.ReduceOp.SUM)
            total = of_all[0] + of_all[1] + of_all[2]
            found[f"{round_} {count} {dtype}"] = equal, torch.equal(out, total[world.rank * count :][:count])
            shared |= {whole.data_ptr(), given.data_ptr()} if gather.piece and reduce.piece else set()
    found["pieces are used again"] = (0 < len(shared) <= 2 * 2 * 3, True)
    # a page for the token, two for each of three sizes, whether gathered or summed, and two slots
    found["of both kinds"] = (os.fstat(made._files[world.rank]).st_size <= (1 + 2 * 3 + 2) * mmap.PAGESIZE, True)
    with pytest.raises(NotImplementedError):
        reduce(out, out, group, dist.ReduceOp.MAX)
    found["once"] = (Exchange.of(world) is made, True)

    Exchange.of.cache_clear()
    real = os.memfd_create
    if world.rank == 1:  # a system without shared memory
        os.memfd_create = lambda _: (_ for _ in ()).throw(OSError)  # type: ignore[assignment]
    found["one that cannot"] = (Exchange.of(world) is None, True)
    os.memfd_create = real
    Exchange.of.cache_clear()
    real_open = os.open
    if world.rank == 2:  # the same pid and descriptor on another machine are another file
        os.open = lambda path, flags: real("other")  # type: ignore[assignment]
    found["one that is elsewhere"] = (Exchange.of(world) is None, True)
    os.open = real_open
    # if two share a model's shards, either's file will do
    Exchange.of.cache_clear()
    pair, made = dist.new_group([1, 2]), Exchange.of(world)
    assert made is not None
    if world.rank:
        gather = Gather(made, [1, 2])
        whole = gather.allocate((2,), dtype=torch.float64, device=cpu)
        gather(whole, whole[world.rank - 1 :][:1].fill_(world.rank), pair)
        found["of a pair"] = (whole.tolist() == [1, 2], True)
    return found


def test_vectors_go_through_shared_memory_whole(tmp_path: Path) -> None:
    for found in in_world(sent, tmp_path, size=3):
        assert {name: equal for name, equal in found.items() if equal != (True, True)} == {}


@pytest.mark.parametrize("highest", [0, 1 << 50])
def test_freed_memory_is_returned_before_a_large_vector_would_raise_the_highest_mark(
    monkeypatch: Any, highest: int
) -> None:
    """Whether glibc is asked to, not what it returns: that depends on what earlier tests left in the heap."""
    trims: list[int] = []
    monkeypatch.setattr(exchange.ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=trims.append))
    monkeypatch.setattr(exchange, "peak_memory", lambda: highest)
    Gather(None, [0]).allocate((exchange.LIMIT,), dtype=torch.float32, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert trims == ([0] if highest == 0 else [])
