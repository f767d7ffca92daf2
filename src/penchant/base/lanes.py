"""Parallel passes on a CPU: one thread per pass, single-threaded operations, and sums in the order of the passes.

Two threads in one operation wait for each other thousands of times per step; two independent passes do not. As every operation
runs on one thread, and passes add to sums in order, the bits are the same on one core as on eight.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, TypeVar

from penchant.base.lazy import torch

T = TypeVar("T")
R = TypeVar("R")

_HERE = threading.local()  # `.at`: (turns, strand, number) of the pass that this thread is in


class _Abandoned(Exception):
    """A pass waited for one that failed."""


class Turns:
    """Orders additions to a shared sum: pass i adds after pass i - 1 has added, or has ended without adding.

    Args:
        strands: of each pass; different strands have no sum in common and do not wait for each other. Empty: a single strand.
        collected: what passes defer until `close`, by key.
    """

    def __init__(self, strands: Sequence[Hashable] = ()) -> None:
        self.collected: dict[Hashable, Any] = {}
        counts: Counter[Hashable] = Counter()
        self._places = []  # of each pass: its strand, and its number within it
        for strand in strands:
            self._places.append((strand, counts[strand]))
            counts[strand] += 1
        self._condition = threading.Condition()
        self._next: dict[Hashable, int] = {}
        self._ended: set[tuple[Hashable, int]] = set()
        self._all_ended: Counter[Hashable] = Counter()  # per strand: all passes below this number have ended
        self._failed = False

    @contextmanager
    def of(self, number: int) -> Iterator[None]:
        """Act as pass `number` (from 0, in any order) in this thread."""
        strand, number = self._places[number] if self._places else ("", number)
        _HERE.at = self, strand, number
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        finally:
            _HERE.at = None
        with self._condition:
            self._ended.add((strand, number))
            while (first := (strand, self._all_ended[strand])) in self._ended:
                self._ended.remove(first)
                self._all_ended[strand] += 1
            self._condition.notify_all()

    def wait(self, key: Hashable, strand: Hashable, number: int) -> None:
        with self._condition:
            while max(self._next.get(key, 0), self._all_ended[strand]) < number:
                if self._failed:
                    raise _Abandoned
                self._condition.wait()

    def pass_on(self, key: Hashable, number: int) -> None:
        with self._condition:
            self._next[key] = max(self._next.get(key, 0), number + 1)
            self._condition.notify_all()

    def abandon(self) -> None:
        """Stop all waiting passes."""
        with self._condition:
            self._failed = True
            self._condition.notify_all()

    def close(self) -> None:
        """Write what was deferred, after all passes."""
        for deferred in self.collected.values():
            deferred.write()
        self.collected.clear()


@contextmanager
def turn(key: Hashable, *, last: bool = True) -> Iterator[Turns | None]:
    """Wait until earlier passes have added to `key`; outside of passes, yield None without waiting.

    Args:
        last: whether this is the pass's last addition to `key`.
    """
    place: tuple[Turns, Hashable, int] | None = getattr(_HERE, "at", None)
    if place is None:
        yield None
        return
    turns, strand, number = place
    turns.wait(key, strand, number)
    yield turns
    if last:
        turns.pass_on(key, number)


def in_order(parameter: Any) -> None:
    """Make autograd add to `parameter.grad` in the order of passes; call it after registering other hooks."""
    key = (id(parameter), "autograd")

    def wait_turn(_: Any, last: bool = False) -> None:
        with turn(key, last=last):
            pass

    parameter.register_hook(wait_turn)
    parameter.register_post_accumulate_grad_hook(partial(wait_turn, last=True))  # and lets the next pass continue


@lru_cache(maxsize=4)
def _pool(lanes: int, threads_per_lane: int, _process: int) -> ThreadPoolExecutor:
    """Threads whose operations use `threads_per_lane` threads; a forked process creates its own."""
    threads = torch.get_num_threads()

    def start() -> None:
        torch.get_num_threads()  # the first query initializes this thread's number, so it must come first
        torch.set_num_threads(threads_per_lane)

    pool = ThreadPoolExecutor(lanes, "lane", initializer=start)
    all_started = threading.Barrier(lanes + 1)
    for _ in range(lanes):
        pool.submit(all_started.wait)
    all_started.wait()
    torch.set_num_threads(threads)  # the last setting is also what new threads start with
    return pool


def side_by_side(
    call: Callable[[T], R],
    items: Sequence[T],
    *,
    most: int,
    turns: Turns | None = None,
) -> Iterator[R]:
    """Map `call` over items in parallel, one item per torch thread, and yield the results in order.

    The caller's gradient mode applies. The bits of the results do not depend on the number of threads up to `most`.

    Args:
        most: items at once; if torch has more threads than that, each operation uses several.
        turns: for calls that add to shared sums.
    """
    threads = torch.get_num_threads()
    lanes = max(1, min(threads, most))
    grad = torch.is_grad_enabled()

    def run_item(i: int) -> R:
        with torch.set_grad_enabled(grad):
            if turns is None:
                return call(items[i])
            with turns.of(i):
                return call(items[i])

    if lanes == 1:
        yield from map(run_item, range(len(items)))
        return
    condition = threading.Condition()
    results: dict[int, R] = {}
    errors: dict[int, BaseException] = {}
    started = running = 0
    stop = False

    def work() -> None:
        nonlocal started, running
        while True:
            with condition:
                if stop or started == len(items):
                    return
                i, started = started, started + 1
                running += 1
            try:
                result = run_item(i)
            except BaseException as error:
                with condition:
                    errors[i] = error
                    condition.notify_all()
                return
            with condition:
                results[i] = result
                running -= 1
                condition.notify_all()

    pool = _pool(lanes, threads // lanes, os.getpid())
    workers = [pool.submit(work) for _ in range(min(lanes, len(items)))]
    try:
        for i in range(len(items)):
            with condition:
                while i not in results and not errors:
                    condition.wait()
                if errors:
                    break
                result = results.pop(i)
            yield result
    finally:
        with condition:
            stop = True
            condition.notify_all()
        if turns is not None and running:  # this thread was interrupted, or a pass failed
            turns.abandon()
        wait(workers)
    if errors:
        raise next(e for _, e in sorted(errors.items()) if not isinstance(e, _Abandoned))
