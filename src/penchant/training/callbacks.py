"""Callbacks for a training run started from Python: `penchant.api.train(..., callbacks=[...])`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from penchant.errors import ConfigError

STOP = "stop"
EVENTS = ("on_step", "on_evaluation", "on_checkpoint", "on_end")


class Callback:
    """Base class for callbacks; override the methods you need. Return ``"stop"`` from one to save a checkpoint and end the run.

    Calling train again without it continues from that checkpoint. Metric names are those of ``metrics.jsonl``.
    """

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """After an optimizer step, with its metrics."""

    def on_evaluation(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """After an evaluation on the held-out set; metric names start with ``eval/``."""

    def on_checkpoint(self, step: int, folder: Path) -> str | None:
        """After a checkpoint was written."""

    def on_end(self, result: Any) -> None:
        """After the run, with the result that `train` returns."""


class Callbacks:
    """Several callbacks as one.

    Args:
        callbacks: objects with some of the methods of `Callback`; a plain function is used as `on_step`.

    Raises:
        ConfigError: an item is neither, or there is no list.
    """

    def __init__(self, callbacks: Sequence[Any] = ()) -> None:
        how = f"give a function f(step, metrics), or an object with {', '.join(EVENTS[:-1])} or {EVENTS[-1]}"
        if not isinstance(callbacks, Iterable):
            raise ConfigError("callbacks", f"is of type {type(callbacks).__name__}, not a list", f"write [...]: {how}")
        self.callbacks = list(callbacks)
        for i, callback in enumerate(self.callbacks):
            if isinstance(callback, type):
                raise ConfigError(f"callbacks[{i}]", "is a class", f"give an object of it: {callback.__name__}(...)")
            if not callable(callback) and not any(callable(getattr(callback, name, None)) for name in EVENTS):
                raise ConfigError(f"callbacks[{i}]", f"is of type {type(callback).__name__}", how)

    def __call__(self, event: str, *args: Any) -> bool:
        """Notify every callback of an event; return whether any of them asked to stop the run.

        Raises:
            ConfigError: a callback returned something other than None or ``"stop"``.
        """
        stop = False
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if event == "on_step" and not any(hasattr(callback, name) for name in EVENTS):
                method = callback
            answer = None if method is None else method(*args)
            if answer is not None and answer != STOP:
                where = f"callback {getattr(callback, '__name__', type(callback).__name__)}"
                raise ConfigError(where, f"{event} returned {answer!r}", f"return {STOP!r} to end the run, or nothing")
            stop |= answer == STOP
        return stop
