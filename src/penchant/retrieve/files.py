"""Files that are there whole or not at all, and what was counted on the way."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import IO, Any


@dataclass(slots=True)
class Counts:
    """What became of the rows that were read.

    Args:
        rows: read; accepted: that gave at least one example; examples: rows that training reads; quarantined: kept aside;
            filtered: left out, by reason; unlabelled: answers without a label, of rows that have others.
    """

    rows: int = 0
    accepted: int = 0
    examples: int = 0
    quarantined: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    unlabelled: int = 0

    def check(self) -> None:
        """Every row that was read is accounted for."""
        if self.accepted + self.quarantined + sum(self.filtered.values()) != self.rows:
            raise AssertionError(f"rows do not add up: {self}")

    def add(self, other: Counts) -> None:
        """Take another file's counts."""
        self.rows += other.rows
        self.accepted += other.accepted
        self.examples += other.examples
        self.quarantined += other.quarantined
        self.filtered.update(other.filtered)
        self.unlabelled += other.unlabelled

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "filtered": dict(sorted(self.filtered.items()))}

    @staticmethod
    def from_json(held: Mapping[str, Any]) -> Counts:
        return Counts(**{**held, "filtered": Counter(held["filtered"])})


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees all of it or what was there before."""
    with whole(path) as out:
        out.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """A JSON file's content; None where it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its name when all of it is on disk."""
    made = path.with_name(path.name + ".part")
    with made.open("wb") as out:
        yield out
        out.flush()
        os.fsync(out.fileno())
    made.replace(path)


def gigabytes(size: float) -> str:
    """``1.49 GB``, ``12.3 MB``, ``4 kB``."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


class Pace:
    """Says every few seconds how many rows are done and how fast.

    Args:
        say: takes a line; what: is being done; every: seconds.
    """

    def __init__(self, say: Callable[[str], None], what: str, every: float = 5.0) -> None:
        self._say, self._what, self._every = say, what, every
        self._started = self._last = monotonic()
        self.rows = 0

    def step(self, rows: int = 1) -> None:
        self.rows += rows
        if self.rows & 0xFF == 0 and monotonic() - self._last >= self._every:
            self._last = monotonic()
            self._say(self.line())

    def line(self) -> str:
        return f"{self._what}: {self.rows:,} rows, {self.rows / max(monotonic() - self._started, 1e-9):,.0f} rows/s"
