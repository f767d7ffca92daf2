"""Runs of a sweep n at a time: worker processes with their share of the cores, and one thread here that talks to each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import penchant
from penchant.errors import CheckpointError
from penchant.sweep import SweepRun
from penchant.sweep.worker import error_of
from penchant.training.loop import Interrupted

Finished = dict[str, Any]


def shares(jobs: int) -> list[list[int]]:
    """The cores of each of `jobs` workers: all of them dealt out, or one each where there are fewer than workers."""
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(jobs)]
    cores = sorted(os.sched_getaffinity(0))
    return [cores[i::jobs] or [cores[i % len(cores)]] for i in range(jobs)]


def told(run: SweepRun, pause_at: int | None) -> str:
    """The line that tells a worker of a run."""
    return json.dumps({"config": run.config.model_dump(mode="json"), "pause_at": pause_at})


class Worker:
    """A process that trains one run after another; it holds what they share."""

    def __init__(self, cores: list[int], quiet: bool) -> None:
        path = os.pathsep.join([str(Path(penchant.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "penchant.sweep.worker", ",".join(map(str, cores))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which hands it on once
        )

    def train(self, run: SweepRun, pause_at: int | None = None) -> Finished | None:
        """What came of a run; None where the process died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(told(run, pause_at) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def interrupt(self, number: int = signal.SIGINT) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def close(self) -> None:
        """Let an idle worker end."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


class Workers:
    """Trains runs in `jobs` processes, which live as long as this does: ``with Workers(...) as workers``.

    Args:
        folder: the sweep's, for messages; quiet: what workers print to stderr is dropped; pause_at: the step at which a run is to pause.
    """

    def __init__(self, jobs: int, folder: Path, quiet: bool, pause_at: Callable[[SweepRun], int | None]) -> None:
        self.folder = folder
        self.pause_at = pause_at
        self.workers = [Worker(cores, quiet) for cores in shares(jobs)]
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.problems: list[BaseException] = []

    def run(
        self, todo: Iterator[SweepRun], begin: Callable[[SweepRun], None], end: Callable[[SweepRun, Finished], None]
    ) -> None:
        """Train every run of `todo`; it, `begin`, `end` and `pause_at` are called by one thread at a time.

        Raises:
            Interrupted: SIGINT or SIGTERM; each run left a checkpoint. Whatever a run, or `begin` and `end`, raised first.
        """
        threads = [threading.Thread(target=self._serve, args=(w, todo, begin, end)) for w in self.workers]
        caught = 0
        try:
            with _signals() as seen:
                for t in threads:
                    t.start()
                while any(t.is_alive() for t in threads):
                    for t in threads:
                        t.join(0.1)
                    if len(seen) > caught:  # a second signal is handed on too: then a run does not finish its step
                        caught = len(seen)
                        self._stop()
        finally:
            for t in threads:
                if t.ident is not None:
                    t.join()
        if caught:
            name = signal.Signals(seen[0]).name
            raise Interrupted(
                str(self.folder), f"stopped by {name}; runs left checkpoints", "run the same command to continue"
            )
        if self.problems:
            raise self.problems[0]

    def _serve(self, worker: Worker, todo: Iterator[SweepRun], begin: Any, end: Any) -> None:
        try:
            while True:
                with self.lock:
                    run = None if self.stopping.is_set() else next(todo, None)
                    if run is None:
                        return
                    begin(run)
                    pause_at = self.pause_at(run)
                made = worker.train(run, pause_at)
                with self.lock:
                    self._ended(worker, run, made, end)
        except BaseException as error:
            self.problems.append(error)
            self._stop(worker)

    def _ended(self, worker: Worker, run: SweepRun, made: Finished | None, end: Any) -> None:
        if made is None or "error" in made:
            end(run, {"state": "interrupted", "seconds": 0.0 if made is None else made["seconds"]})
        else:
            end(run, made)
        if made is not None and "error" in made:
            raise run.named(error_of(made))
        if made is None and not self.stopping.is_set():
            code = worker.process.wait()
            raise CheckpointError(
                f"run {run.name}",
                f"its process died ({f'signal {-code}' if code < 0 else f'exit code {code}'})",
                "the same command continues; fewer --jobs take less memory",
            )

    def _stop(self, but: Worker | None = None) -> None:
        """Let every run write a checkpoint and end."""
        self.stopping.set()
        for worker in self.workers:
            if worker is not but:
                worker.interrupt()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.close()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in a list while this lasts."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen  # handlers can only be set there
        return
    old = {n: signal.signal(n, lambda number, _: seen.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for n, handler in old.items():
            signal.signal(n, handler)
