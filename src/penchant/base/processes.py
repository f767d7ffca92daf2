"""Map a function over tasks in several processes, with results in the order of the tasks."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import penchant
from penchant.base.machine import cores
from penchant.errors import ConfigError, PenchantError

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 2  # tasks per worker that may be finished ahead of the one being waited for
RAY = "ray"
Workers = int | str | None  # a number; `RAY`: those of a Ray cluster; None: one per core


def number_of(workers: Workers, tasks: int) -> int:
    """Number of worker processes, at most one per task; 1 means this process.

    Raises:
        ConfigError: `workers` is not a positive number.
    """
    if workers == RAY:
        return tasks
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise ConfigError("workers", f"is {workers!r}", f"give 1 or more, or {RAY}")
    return max(1, min(tasks, workers or cores()))


def in_order(function: Callable[[T], R], tasks: Iterable[T], workers: Workers) -> Iterator[R]:
    """Yield ``function(task)`` for each task, in order; function, tasks and results must be picklable.

    Workers are new processes that share no state with this one. Only a few results are held at a time.

    Raises:
        PenchantError: raised by the function, or a process died. RuntimeError: the function raised something else.
    """
    if workers == RAY:
        yield from _on_ray(function, tasks)
        return
    if not isinstance(workers, int) or workers < 2:
        yield from map(function, tasks)
        return
    idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
    processes = [_Process() for _ in range(workers)]
    for process in processes:
        idle.put(process)

    def call_idle(task: T) -> Any:
        process = idle.get()
        try:
            return process.call(function, task)
        finally:
            idle.put(process)

    waiting: deque[Future[Any]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for task in tasks:
            waiting.append(pool.submit(call_idle, task))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        for process in processes:
            process.end()
        pool.shutdown()


class _Process:
    """A worker process, driven over its pipes."""

    def __init__(self) -> None:
        path = [str(Path(penchant.__file__).parents[1]), *filter(None, sys.path)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,  # Ctrl-C only reaches this process, which ends its workers
        )

    def call(self, function: Callable[[Any], Any], task: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            _send(self._process.stdin, (function, task))
            succeeded, result = pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
            code = self._process.wait()
            what = f"a worker process ended with {code}; there may be too little memory for so many"
            raise ConfigError("workers", what, "give fewer, or 1") from error
        return result if succeeded else _raise(result)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


def _send(pipe: IO[bytes], value: Any) -> None:
    pickle.dump(value, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def _picklable_error(error: Exception) -> tuple[Any, ...]:
    """An error in a picklable form."""
    if isinstance(error, PenchantError):
        return type(error), error.where, error.what, error.how
    return (RuntimeError, "".join(traceback.format_exception(error)))


def _raise(error_tuple: tuple[Any, ...]) -> Any:
    raise error_tuple[0](*error_tuple[1:])


def _run_task(function: Callable[[T], R], task: T) -> tuple[bool, Any]:
    try:
        return True, function(task)
    except Exception as error:
        return False, _picklable_error(error)


def _on_ray(function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
    """`in_order` on the cluster of RAY_ADDRESS, or the one this machine belongs to; its machines must see the same files."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("workers", "is ray, which is not installed", "pip install 'penchant[ray]'") from error
    if not ray.is_initialized():
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False)
        except ConnectionError as error:
            raise ConfigError("workers", "no Ray cluster was found", "set RAY_ADDRESS, or start one") from error
    remote_task = ray.remote(_run_task)
    max_waiting = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: deque[Any] = deque()

    def next_result() -> R:
        succeeded, result = ray.get(waiting.popleft())
        value: R = result if succeeded else _raise(result)
        return value

    for task in tasks:
        waiting.append(remote_task.remote(function, task))
        if len(waiting) > max_waiting:
            yield next_result()
    while waiting:
        yield next_result()


def _serve() -> None:
    """The worker's loop: run tasks from stdin until it is closed. Whatever a task prints goes to stderr."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            function, task = pickle.load(requests)
        except EOFError:
            return
        _send(replies, _run_task(function, task))


if __name__ == "__main__":
    _serve()
