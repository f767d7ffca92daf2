"""From the run's own files to what trackers get: names as the field has them, whole lines only, each once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from penchant.tracking.protocol import Line

FILES = {"metrics.jsonl": None, "perf.jsonl": "perf"}  # the kind of a line that does not say it
NOT_VALUES = ("kind", "step")
STEP = "train/global_step"


def as_line(row: Mapping[str, Any], kind: str | None = None) -> Line:
    """A row as trackers get it: ``train/loss``, ``eval/loss``, ``perf/tokens_per_second``; an interval becomes its two ends.

    Words and nulls are left out: a tracker draws numbers.
    """
    kind = kind or str(row["kind"])
    values = {
        shown: float(value)
        for name, given in row.items()
        if name not in NOT_VALUES
        for shown, value in _numbers(name_of(name, kind), given)
    }
    return Line(kind, int(row["step"]), values)


def name_of(name: str, kind: str) -> str:
    """What a logged figure is called in a tracker."""
    return name if name.startswith(f"{kind}/") else f"{kind}/{name}"


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, (bool, int, float)):
        if math.isfinite(value):
            yield name, value
    elif isinstance(value, Sequence) and not isinstance(value, str) and name.endswith("/ci") and len(value) == 2:
        for end, bound in zip(("low", "high"), value, strict=True):
            yield from _numbers(f"{name}_{end}", bound)


class Tail:
    """The lines that were added to a run's logs since it was asked last; half-written ones wait for their end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._at = dict.fromkeys(FILES, 0)

    def new(self) -> list[Line]:
        """Lines in the order of their steps; of one step as they were written: train, then its speed, then eval."""
        found = [line for name, kind in FILES.items() for line in self._of(name, kind)]
        return sorted(found, key=lambda line: (line.step, line.kind == "eval"))

    def _of(self, name: str, kind: str | None) -> Iterator[Line]:
        path = self.folder / name
        try:
            with path.open("rb") as file:
                if file.seek(0, 2) < self._at[name]:  # cut back: a resumed run writes the same lines again
                    self._at[name] = 0
                file.seek(self._at[name])
                data = file.read()
        except FileNotFoundError:
            return
        whole = data.rfind(b"\n") + 1
        self._at[name] += whole
        for text in data[:whole].split(b"\n"):
            row = _row(text)
            if row is not None:
                yield as_line(row, kind)


def _row(text: bytes) -> dict[str, Any] | None:
    """A row of a log; None for a line that is none (an older crash may have left half of one)."""
    try:
        row = json.loads(text)
    except ValueError:
        return None
    whole = isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if whole else None


def unsent(lines: Sequence[Line], sent: Mapping[str, int]) -> list[Line]:
    """Lines whose step is beyond the last one of their kind that was sent; what a resumed run writes again is among the others."""
    high = dict(sent)
    found = []
    for line in lines:
        if line.step > high.get(line.kind, -1):
            high[line.kind] = line.step
            found.append(line)
    return found
