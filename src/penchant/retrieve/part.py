"""One published file to one file of converted rows, which a resumed `get` finds whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from penchant.data.converters import RowError
from penchant.data.formats import BadRow, Row
from penchant.retrieve.convert import Unit, Way, prompts_of_transcript, rows_of, units
from penchant.retrieve.files import Counts, Pace, read_json, whole, write_json
from penchant.retrieve.filters import Filters
from penchant.retrieve.labels import BATCH, Labeller
from penchant.types import PromptTree


@dataclass(frozen=True, slots=True)
class Converter:
    """What happens to the rows of a file.

    Args:
        way: layout and kind; columns: our names to a person's; filters: what is left out; labeller: what labels answers.
        transcripts: rows are red-team transcripts, of which the first prompt is taken.
    """

    way: Way
    columns: dict[str, str]
    filters: Filters
    labeller: Labeller | None
    transcripts: bool = False

    def convert(self, rows: Iterable[Row | BadRow], part: Part, pace: Pace) -> Counts:
        """Write a part: all of it, or nothing.

        Raises:
            DataError: the file is damaged, or has not the column that a filter reads. RewardError: a function went wrong.
        """
        counts = Counts()
        with whole(part.rows) as out, whole(part.aside) as aside:
            writer = _Writer(out, aside, counts, self)
            for unit in units(rows, self.way.layout, self.columns):
                pace.step(1 if isinstance(unit, BadRow) else unit.rows)
                writer.take(unit)
            writer.flush()
        counts.check()
        write_json(part.done, counts.to_json())
        return counts


@dataclass(frozen=True, slots=True)
class Part:
    """Where the converted rows of file `number` are kept: one line for each published row (or group), a list of rows to write."""

    folder: Path
    number: int

    @property
    def rows(self) -> Path:
        return self.folder / f"part-{self.number:05d}.jsonl"

    @property
    def aside(self) -> Path:
        return self.folder / f"part-{self.number:05d}.quarantine.jsonl"

    @property
    def done(self) -> Path:
        return self.folder / f"part-{self.number:05d}.json"

    def counts(self) -> Counts | None:
        """What was counted; None where the part is not done."""
        held = read_json(self.done)
        return None if held is None else Counts.from_json(held)

    def lines(self) -> Iterator[list[dict[str, Any]]]:
        """The rows to write, of one published row at a time."""
        with self.rows.open("rb") as stream:
            for line in stream:
                yield json.loads(line)


@dataclass(slots=True)
class _Writer:
    """Converts units in their order; answers are labelled many at a time."""

    out: IO[bytes]
    aside: IO[bytes]
    counts: Counts
    how: Converter
    waiting: list[tuple[Unit, tuple[PromptTree, ...]]] = None  # type: ignore[assignment]
    answers: int = 0

    def __post_init__(self) -> None:
        self.waiting = []

    def take(self, unit: Unit | BadRow) -> None:
        if isinstance(unit, BadRow):
            self.counts.rows += 1
            self._quarantine(unit.where, 1, unit.what, unit.how, unit.raw)
            return
        self.counts.rows += unit.rows
        reason = self.how.filters.reason(unit.values, unit.where)
        if reason is not None:
            self.counts.filtered[reason] += unit.rows
            return
        try:
            values = prompts_of_transcript(unit.values) if self.how.transcripts else unit.values
            trees = self.how.way.trees(values)
        except RowError as error:
            self._quarantine(unit.where, unit.rows, error.what, error.how, dict(unit.values))
            return
        if self.how.labeller is None:
            self._write(unit, trees)
            return
        self.waiting.append((unit, trees))
        self.answers += len(trees)
        if self.answers >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Label what waits, and write it."""
        if not self.waiting or self.how.labeller is None:
            return
        labelled = iter(self.how.labeller.label([t for _, trees in self.waiting for t in trees]))
        for unit, trees in self.waiting:
            found = [next(labelled) for _ in trees]
            kept = tuple(t for t in found if t is not None)
            if kept:
                self.counts.unlabelled += len(trees) - len(kept)
                self._write(unit, kept)
            else:
                self.counts.filtered["no label"] += unit.rows
        self.waiting, self.answers = [], 0

    def _write(self, unit: Unit, trees: tuple[PromptTree, ...]) -> None:
        rows = [row for tree in trees for row in rows_of(tree, self.how.way.kind)]
        try:
            line = json.dumps(rows, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            how = "drop the row, or mend its text"
            self._quarantine(
                unit.where, unit.rows, "holds half a surrogate pair, which is no text", how, dict(unit.values)
            )
            return
        self.out.write(line + b"\n")
        self.counts.accepted += unit.rows
        self.counts.examples += len(rows)

    def _quarantine(self, where: str, rows: int, what: str, how: str, raw: Any) -> None:
        self.counts.quarantined += rows
        held = {"where": where, "what": what, "how": how} | ({"rows": rows} if rows > 1 else {}) | {"row": raw}
        self.aside.write(json.dumps(held, default=str).encode() + b"\n")
