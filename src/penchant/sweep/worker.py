"""Train one run of a sweep: in this process, in a worker that reads runs from stdin, or in a cluster job."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from penchant import errors
from penchant.base.files import write_atomically, write_text_atomically
from penchant.errors import PenchantError, TrainingStopped
from penchant.runs.sharing import ObjectCache, Uncached

PARENT_CHECK_SECONDS = 2.0  # seconds between checks that the sweep is still running


def train_one(config: Any, shared: Uncached, console: Any = None, pause_at: int | None = None) -> dict[str, Any]:
    """Train one run until it finishes, pauses or stops itself.

    Args:
        config: a `RunConfig`; shared: objects shared by the runs of this process; console: for progress, None for no output.
        pause_at: a step before the end at which to pause.

    Returns:
        ``state`` (``finished``, ``paused`` or ``stopped``), ``steps`` and ``metrics`` or ``why``.

    Raises:
        Interrupted: a signal arrived; a checkpoint was written. PenchantError: an error that the user can fix.
    """
    from penchant.runs import Run
    from penchant.training.loop import Interrupted, Paused

    run = Run(config, quiet=True, shared=shared, pause_at=pause_at, console=console)
    try:
        result = run.train()
    except Interrupted:
        raise
    except Paused as pause:
        return {"state": "paused", "steps": pause.step, "metrics": pause.metrics}
    except TrainingStopped as error:
        return {"state": "stopped", "why": f"{error.where.rpartition(': ')[2]}: {error.what}"}
    metrics = {k: v for k, v in result.after.items() if k not in ("kind", "epoch")}
    return {"state": "finished", "steps": result.steps, "metrics": metrics}


def train_order(line: str, shared: Uncached) -> dict[str, Any]:
    """Train the run described by a JSON line (its config, and where to pause), and return its outcome or error as JSON values."""
    from penchant.config import config_from_mapping
    from penchant.training.loop import Interrupted

    started = time.monotonic()
    try:
        spec = json.loads(line)
        outcome = train_one(config_from_mapping(spec["config"]), shared, pause_at=spec["pause_at"])
    except Interrupted as error:
        outcome = {"state": "interrupted", "why": error.what}
    except PenchantError as error:
        outcome = {"error": type(error).__name__, "where": error.where, "what": error.what, "how": error.how}
    return {**outcome, "seconds": time.monotonic() - started}


def error_of(outcome: Mapping[str, Any]) -> PenchantError:
    """Rebuild the error that a worker reported."""
    kind = getattr(errors, outcome["error"], PenchantError)
    return kind(outcome["where"], outcome["what"], outcome["how"])


def serve(cores: list[int]) -> None:
    """Train the runs read from stdin until it closes. Only their outcomes go to stdout."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # before torch counts the cores
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # send libraries' prints to stderr
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    shared = ObjectCache()
    for line in sys.stdin:
        output.write(json.dumps(train_order(line, shared)) + "\n")
        output.flush()


def result_path(order: Path) -> Path:
    """Path of the file in which a job leaves its run's outcome."""
    return order.with_suffix(".result")


def order_files(order: Path) -> list[Path]:
    """All files of an order: the order, the id of its job, the order after a job took it, and the result."""
    return [order, *map(order.with_suffix, (".job", ".taken", ".result"))]


def job_of_order(order: Path) -> str | None:
    """Id of the job that has taken an order, or None."""
    _, job_file, taken_file, _ = order_files(order)
    return job_file.read_text() if taken_file.exists() else None


def carry_out(order: str, job: str | None = None) -> None:
    """Train the run described by an order file, as a cluster job does, and write the outcome beside the file.

    A job takes its order by renaming it, and a sweep that knows of no job takes the order back by deleting it. Only one of the two
    succeeds, so no run is trained by two jobs. A job without an order has nothing to do.

    Args:
        job: the job's id (None: the order's name). A requeued job keeps its id.
    """
    path, job_file, taken_file, result = order_files(Path(order))
    with suppress(FileNotFoundError):  # already taken by this job, or taken back
        write_text_atomically(job_file, job or path.stem)
        os.rename(path, taken_file)
    if not taken_file.exists():
        job_file.unlink(missing_ok=True)
        return
    if threading.current_thread() is threading.main_thread():
        # Slurm sends SIGUSR2 shortly before the time limit: checkpoint and end
        signal.signal(signal.SIGUSR2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    write_atomically(result, train_order(taken_file.read_text(encoding="utf-8"), Uncached()))


def _exit_with_parent(parent: int) -> None:
    """Send this process SIGTERM when its parent dies, so that it writes a checkpoint and ends."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    try:
        if sys.argv[1] == "--order":
            threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
            carry_out(sys.argv[2])
        else:
            serve([int(c) for c in sys.argv[1].split(",") if c])
    except KeyboardInterrupt:
        sys.exit(130)
