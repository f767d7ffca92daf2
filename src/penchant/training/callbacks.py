"""What a program is told while a run trains, from Python: `penchant.api.train(..., callbacks=[...])`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penchant.errors import ConfigError

STOP = "stop"
EVENTS = ("on_step", "on_evaluation", "on_checkpoint", "on_end")


class Callback:
    """A base class: define what you need. Each method may return ``"stop"``: the run writes a checkpoint and ends there.

    Called again without the callback, it goes on from that checkpoint. Metrics have the names of ``metrics.jsonl``.
    """

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """After an optimizer step, with its figures."""

    def on_evaluation(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """After an evaluation on held-out rows; names start with ``eval/``."""

    def on_checkpoint(self, step: int, folder: Path) -> str | None:
        """After a checkpoint was written."""

    def on_end(self, result: Any) -> None:
        """After the run, with what `train` returns."""


class Callbacks:
    """Several callbacks as one.

    Args:
        given: objects with some of the methods of `Callback`; a function stands for its `on_step`.

    Raises:
        ConfigError: one of them is neither.
    """

    def __init__(self, given: Sequence[Any] = ()) -> None:
        self.given = list(given)
        for i, one in enumerate(self.given):
            if not callable(one) and not any(callable(getattr(one, name, None)) for name in EVENTS):
                how = f"give a function f(step, metrics), or an object with {', '.join(EVENTS[:-1])} or {EVENTS[-1]}"
                raise ConfigError(f"callbacks[{i}]", f"is of type {type(one).__name__}", how)

    def __call__(self, event: str, *said: Any) -> bool:
        """Tell all of them; whether one of them stops the run.

        Raises:
            ConfigError: one of them returned something else than None or ``"stop"``.
        """
        stop = False
        for one in self.given:
            method = getattr(one, event, None)
            if event == "on_step" and not any(hasattr(one, name) for name in EVENTS):
                method = one
            answer = None if method is None else method(*said)
            if answer is not None and answer != STOP:
                where = f"callback {getattr(one, '__name__', type(one).__name__)}"
                raise ConfigError(where, f"{event} returned {answer!r}", f"return {STOP!r} to end the run, or nothing")
            stop |= answer == STOP
        return stop
