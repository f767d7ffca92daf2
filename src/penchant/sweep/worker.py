"""One run of a sweep: in this process, in a worker that is told runs line by line, or in a job of a cluster."""

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
from penchant.runs.sharing import Alone, Shared

PARENT_LOOKED_AT = 2.0  # seconds between two looks whether the sweep is still there


def train_one(config: Any, shared: Alone, console: Any = None, pause_at: int | None = None) -> dict[str, Any]:
    """Train one run to its end, or to where it stops itself, which is a result too.

    Args:
        config: a `RunConfig`; shared: what runs of this process have in common; console: where its progress goes; None: nowhere.
        pause_at: a step before its end at which it pauses.

    Returns:
        ``state`` (``finished``, ``paused`` or ``stopped``), ``steps`` and ``metrics`` or ``why``.

    Raises:
        Interrupted: a signal; a checkpoint was written. PenchantError: the user can fix it.
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


def answer(line: str, shared: Alone) -> dict[str, Any]:
    """Train the run that a line tells of (its config, and where to pause); whatever comes of it as JSON."""
    from penchant.config import config_from_mapping
    from penchant.training.loop import Interrupted

    started = time.monotonic()
    try:
        told = json.loads(line)
        made = train_one(config_from_mapping(told["config"]), shared, pause_at=told["pause_at"])
    except Interrupted as error:
        made = {"state": "interrupted", "why": error.what}
    except PenchantError as error:
        made = {"error": type(error).__name__, "where": error.where, "what": error.what, "how": error.how}
    return {**made, "seconds": time.monotonic() - started}


def error_of(made: Mapping[str, Any]) -> PenchantError:
    """The error that a worker met, as it met it."""
    kind = getattr(errors, made["error"], PenchantError)
    return kind(made["where"], made["what"], made["how"])


def serve(cores: list[int]) -> None:
    """Answer runs from standard input until it ends; nothing but answers goes to standard output."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # before torch counts them
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is not an answer
    threading.Thread(target=_follow_parent, args=(os.getppid(),), daemon=True).start()
    shared = Shared()
    for line in sys.stdin:
        answers.write(json.dumps(answer(line, shared)) + "\n")
        answers.flush()


def result_of(order: Path) -> Path:
    """Where a job leaves what came of the run that it was told to train."""
    return order.with_suffix(".result")


def files_of(order: Path) -> list[Path]:
    """What an order may be by now: itself, its job's id, the order once that job has taken it, and what came of it."""
    return [order, *map(order.with_suffix, (".job", ".taken", ".result"))]


def taker_of(order: Path) -> str | None:
    """The job that has taken an order; None where none has."""
    _, job, taken, _ = files_of(order)
    return job.read_text() if taken.exists() else None


def carry_out(order: str, job: str | None = None) -> None:
    """Train the run that a file tells of, as a job of a cluster does, and leave what came of it beside the file.

    A job takes its order by renaming it, and a sweep that does not know of any such job takes it back by deleting it: one of the two
    succeeds, so no run is trained by two jobs. A job without an order has nothing to do.

    Args:
        job: its id (None: the order's name); the cluster starts one again under the same id.
    """
    path, said, taken, result = files_of(Path(order))
    with suppress(FileNotFoundError):  # taken already, by this job, or taken back
        write_text_atomically(said, job or path.stem)
        os.rename(path, taken)
    if not taken.exists():
        said.unlink(missing_ok=True)
        return
    if threading.current_thread() is threading.main_thread():
        # Slurm sends it some time before the limit: the run writes a checkpoint and ends
        signal.signal(signal.SIGUSR2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    write_atomically(result, answer(taken.read_text(encoding="utf-8"), Alone()))


def _follow_parent(parent: int) -> None:
    """A sweep that was killed leaves no run behind: its checkpoint is written, then the worker ends."""
    while os.getppid() == parent:
        time.sleep(PARENT_LOOKED_AT)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    try:
        if sys.argv[1] == "--order":
            threading.Thread(target=_follow_parent, args=(os.getppid(),), daemon=True).start()
            carry_out(sys.argv[2])
        else:
            serve([int(c) for c in sys.argv[1].split(",") if c])
    except KeyboardInterrupt:
        sys.exit(130)
