"""Train several runs of a sweep at a time, in worker processes that split the cores or in cluster jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import penchant
from penchant.errors import CheckpointError, PenchantError
from penchant.runfolder import make_folder
from penchant.sweep import SweepRun
from penchant.sweep.cluster import ORDERS, Cluster
from penchant.sweep.worker import error_of, order_files, result_path
from penchant.training.checkpoint import latest_checkpoint
from penchant.training.loop import Interrupted

Finished = dict[str, Any]
POLL_SECONDS = 2.0  # seconds between checks for results of jobs
LAG_SECONDS = 15.0  # seconds after a job's end during which its last file may not have reached the shared disk


def split_cores(jobs: int) -> list[list[int]]:
    """Split the available cores among `jobs` workers. With fewer cores than workers, each gets one, and some share one."""
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(jobs)]
    cores = sorted(os.sched_getaffinity(0))
    return [cores[i::jobs] or [cores[i % len(cores)]] for i in range(jobs)]


def order_json(run: SweepRun, pause_at: int | None) -> str:
    """The JSON line that describes a run to a worker."""
    return json.dumps({"config": run.config.model_dump(mode="json"), "pause_at": pause_at})


class Worker:
    """A process that trains one run after another, sharing objects between them."""

    def __init__(self, cores: list[int], quiet: bool) -> None:
        path = os.pathsep.join([str(Path(penchant.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "penchant.sweep.worker", ",".join(map(str, cores))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C reaches only the sweep, which forwards it once
        )

    def train(self, run: SweepRun, pause_at: int | None = None) -> Finished | None:
        """Train a run and return its outcome, or None if the process died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(order_json(run, pause_at) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def interrupt(self, number: int = signal.SIGINT) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def close(self) -> None:
        """End an idle worker."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


class Workers:
    """Context manager that trains runs in `jobs` worker processes.

    Args:
        folder: the sweep's, for messages; quiet: drop the workers' stderr; pause_at: returns the step at which a run pauses, or None.
    """

    def __init__(self, jobs: int, folder: Path, quiet: bool, pause_at: Callable[[SweepRun], int | None]) -> None:
        self.folder = folder
        self.pause_at = pause_at
        self.workers = [Worker(cores, quiet) for cores in split_cores(jobs)]
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.problems: list[BaseException] = []

    def run(
        self, runs: Iterator[SweepRun], begin: Callable[[SweepRun], None], end: Callable[[SweepRun, Finished], None]
    ) -> None:
        """Train each of `runs`. `runs`, `begin`, `end` and `pause_at` are called by one thread at a time.

        Raises:
            Interrupted: SIGINT or SIGTERM arrived; each run left a checkpoint.
            BaseException: the first error raised by a run, `begin` or `end`.
        """
        threads = [threading.Thread(target=self._serve, args=(w, runs, begin, end)) for w in self.workers]
        signal_count = 0
        try:
            with _collect_signals() as signals:
                for t in threads:
                    t.start()
                while any(t.is_alive() for t in threads):
                    for t in threads:
                        t.join(0.1)
                    if len(signals) > signal_count:  # forward a second signal too: it stops a run within a step
                        signal_count = len(signals)
                        self._stop()
        finally:
            for t in threads:
                if t.ident is not None:
                    t.join()
        if signal_count:
            name = signal.Signals(signals[0]).name
            raise Interrupted(
                str(self.folder), f"stopped by {name}; runs left checkpoints", "run the same command to continue"
            )
        if self.problems:
            raise self.problems[0]

    def _serve(self, worker: Worker, runs: Iterator[SweepRun], begin: Any, end: Any) -> None:
        try:
            while True:
                with self.lock:
                    run = None if self.stopping.is_set() else next(runs, None)
                    if run is None:
                        return
                    begin(run)
                    pause_at = self.pause_at(run)
                outcome = worker.train(run, pause_at)
                with self.lock:
                    self._finish_run(worker, run, outcome, end)
        except BaseException as error:
            self.problems.append(error)
            self._stop(worker)

    def _finish_run(self, worker: Worker, run: SweepRun, outcome: Finished | None, end: Any) -> None:
        if outcome is None or "error" in outcome:
            end(run, {"state": "interrupted", "seconds": 0.0 if outcome is None else outcome["seconds"]})
        else:
            end(run, outcome)
        if outcome is not None and "error" in outcome:
            raise run.named(error_of(outcome))
        if outcome is None and not self.stopping.is_set():
            code = worker.process.wait()
            what = f"its process died ({f'signal {-code}' if code < 0 else f'exit code {code}'})"
            raise CheckpointError(f"run {run.name}", what, "the same command continues; fewer --jobs take less memory")

    def _stop(self, exempt: Worker | None = None) -> None:
        """Interrupt every worker except `exempt`, so that its run writes a checkpoint and ends."""
        self.stopping.set()
        for worker in self.workers:
            if worker is not exempt:
                worker.interrupt()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.close()


@dataclass(slots=True)
class _SubmittedJob:
    """A run that was submitted as a cluster job.

    Args:
        job: its entry in `sweep.json`: ``on``, ``id``, ``order`` (the file), ``pause_at``, ``start`` (the checkpoint it began from).
        ended: time at which the job was first seen to have ended before its run.
    """

    run: SweepRun
    job: Mapping[str, Any]
    ended: float | None = None


class Jobs:
    """Trains runs as cluster jobs. The jobs outlive the sweep's process, and the next call finds them again.

    Args:
        at_once: jobs at a time; folder: the sweep's; pause_at: returns the step at which a run pauses, or None.
        find_job: returns the job that already has a run, or None; record_job: records a run's job; note: prints a line.
    """

    def __init__(
        self,
        cluster: Cluster,
        at_once: int,
        folder: Path,
        pause_at: Callable[[SweepRun], int | None],
        find_job: Callable[[SweepRun], Mapping[str, Any] | None],
        record_job: Callable[[SweepRun, Mapping[str, Any]], None],
        note: Callable[[str], None],
    ) -> None:
        self.cluster, self.at_once, self.folder = cluster, at_once, folder
        self.pause_at, self.find_job, self.record_job, self.note = pause_at, find_job, record_job, note

    def run(self, runs: Iterator[SweepRun], begin: Callable[[SweepRun], None], end: Callable[..., None]) -> None:
        """Train each of `runs`. After a failure no further runs are submitted, but those already submitted finish.

        Raises:
            Interrupted: SIGINT or SIGTERM arrived; the jobs keep running.
            PenchantError: the error of the first run that failed, naming the others that failed.
        """
        waiting: dict[str, _SubmittedJob] = {}
        failed: dict[str, PenchantError] = {}
        with _collect_signals() as signals:
            while not signals:
                while not failed and len(waiting) < self.at_once and (run := next(runs, None)) is not None:
                    job = self.find_job(run)
                    if job is not None:
                        self.note(f"{run.name}: waiting for {self.cluster.title} {job['id']}")
                    waiting[run.name] = self._send(run, begin) if job is None else _SubmittedJob(run, job)
                if not waiting:
                    break
                for name, submitted in list(waiting.items()):
                    outcome = self._outcome(submitted)
                    if outcome is None:
                        continue
                    del waiting[name]
                    error = self._failure(submitted, outcome)
                    if error is not None:
                        failed[name] = error
                        self.note(f"{name} failed: {error}")
                        outcome = {"state": "interrupted", "seconds": outcome["seconds"]}
                    end(submitted.run, outcome)
                    for file in order_files(Path(submitted.job["order"])):
                        file.unlink(missing_ok=True)
                    if error is None and outcome["state"] == "interrupted":
                        waiting[name] = self._send(submitted.run, begin)
                if waiting:
                    time.sleep(POLL_SECONDS)
        if signals and (waiting or not failed):
            raise self._interrupted(signal.Signals(signals[0]).name, waiting)
        for first_error in failed.values():
            others = [name for name in failed if failed[name] is not first_error]
            suffix = f" ({', '.join(others)} failed too)" if others else ""
            raise type(first_error)(first_error.where, first_error.what + suffix, first_error.how)

    def _send(self, run: SweepRun, begin: Callable[[SweepRun], None]) -> _SubmittedJob:
        begin(run)
        pause_at = self.pause_at(run)
        order = self.folder / ORDERS / f"{run.name}-{uuid.uuid4().hex[:8]}.json"
        make_folder(order.parent)
        with os.fdopen(os.open(order, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(order_json(run, pause_at))  # mode 0600, because a URL in a config may hold a password
        job: dict[str, Any] = {
            "on": self.cluster.name,
            "order": str(order),
            "pause_at": pause_at,
            "start": _latest_checkpoint_name(run),
        }
        self.record_job(run, job)  # without an id first, in case this process is killed while submitting
        job["id"] = self.cluster.submit(run.name, order)
        self.record_job(run, job)
        self.note(f"{run.name}: {self.cluster.title} {job['id']}")
        return _SubmittedJob(run, job)

    def _outcome(self, submitted: _SubmittedJob) -> Finished | None:
        """Outcome of a job, or None while it is pending or running."""
        outcome: Finished = {"state": "interrupted", "seconds": 0.0}
        with suppress(FileNotFoundError):
            outcome = json.loads(result_path(Path(submitted.job["order"])).read_text(encoding="utf-8"))
            if outcome.get("state") == "paused" and submitted.job["pause_at"] != self.pause_at(submitted.run):
                return {"state": "interrupted", "seconds": outcome["seconds"]}  # the halving rule has changed
            if outcome.get("state") != "interrupted":
                return outcome
        end_state = self.cluster.ended(submitted.job["id"], "why" in outcome)
        if end_state is None:
            submitted.ended = None  # reset it, since the cluster may have requeued the job
            return None
        if submitted.ended is None:
            submitted.ended = time.monotonic()
        return {**outcome, "how": end_state} if time.monotonic() - submitted.ended >= LAG_SECONDS else None

    def _failure(self, submitted: _SubmittedJob, outcome: Finished) -> PenchantError | None:
        """The error that keeps a run from being resubmitted: its own, a canceled job, or a job that made no progress."""
        if "error" in outcome:
            return submitted.run.named(error_of(outcome))
        if outcome["state"] != "interrupted" or "how" not in outcome:
            return None
        end_state = outcome.pop("how")
        if _latest_checkpoint_name(submitted.run) != submitted.job["start"] and not end_state.startswith("CANCELLED"):
            return None  # a time limit, or preemption by another job
        return CheckpointError(
            f"run {submitted.run.name}",
            f"its {self.cluster.title} {submitted.job['id']} ended ({end_state}) before the run did",
            f"its messages are in {self.cluster.log(submitted.job['id'], Path(submitted.job['order']))}; the same command continues",
        )

    def _interrupted(self, name: str, waiting: Mapping[str, _SubmittedJob]) -> Interrupted:
        ids = [str(submitted.job["id"]) for submitted in waiting.values()]
        if not ids:
            return Interrupted(
                str(self.folder), f"stopped by {name}; no job is left", "run the same command to continue"
            )
        jobs = f"{self.cluster.title}{'s' if len(ids) > 1 else ''} {', '.join(ids)}"
        return Interrupted(
            str(self.folder),
            f"stopped by {name}; {len(ids)} of the runs go on by themselves, as {jobs}",
            f"run the same command to wait for them, or end them: {self.cluster.cancel.format(' '.join(ids))}",
        )


def _latest_checkpoint_name(run: SweepRun) -> str | None:
    last, _ = latest_checkpoint(run.folder)
    return None if last is None else last.name


@contextmanager
def _collect_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of handling them."""
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals  # handlers can only be set in the main thread
        return
    previous_handlers = {
        n: signal.signal(n, lambda number, _: signals.append(number)) for n in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield signals
    finally:
        for n, handler in previous_handlers.items():
            signal.signal(n, handler)
