"""What a tracker is: three calls, made in a process of its own, from which no error and no delay reaches training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Line:
    """A line of `metrics.jsonl` or `perf.jsonl` as trackers get it.

    Args:
        kind: train, eval or perf; step: optimiser steps done; values: finite numbers by the name that they are shown under.
    """

    kind: str
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Which run it is.

    Args:
        folder: the run's; name, project, group, tags: as a person finds it among others; dir: where a tracker writes on this machine.
        own_dir: whether a person chose `dir`; config: the resolved config; id: of the tracker's run that is continued, None for a new one.
    """

    folder: str
    name: str
    project: str
    dir: str
    own_dir: bool = False
    group: str | None = None
    tags: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """A tracker's run: its id, by which it is continued, and where a person looks at it (an address or a path)."""

    id: str
    where: str


class Tracker(Protocol):
    """One tracker; it may raise and hang as it likes."""

    def start(self, info: RunInfo) -> Started:
        """Open a run, or continue ``info.id``."""
        ...

    def log(self, lines: Sequence[Line]) -> None:
        """Send lines, in order; when it returns they count as sent."""
        ...

    def finish(self, status: str, summary: Mapping[str, Any], samples: Sequence[Mapping[str, str]]) -> None:
        """Close the run.

        Args:
            status: finished, interrupted, paused, stopped or killed; summary: last figures by name; samples: rows of `samples.jsonl`.
        """
        ...
