"""One published file to one file of converted rows, which a resumed `get` finds whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from penchant.data.converters import LeftOut
from penchant.data.converting import Converted, Quarantined, convert_rows
from penchant.data.formats import BadRow, Row
from penchant.retrieve.convert import Way, prompts_of_transcript, rows_of
from penchant.retrieve.files import Counts, Pace, read_json, whole, write_json
from penchant.retrieve.filters import Filters
from penchant.retrieve.labels import BATCH, Labeller


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

    def convert(self, rows: Iterable[Row | BadRow], name: str, part: Part, pace: Pace) -> Counts:
        """Write a part: all of it, or nothing.

        Args:
            name: of the file, for messages.

        Raises:
            DataError: the file is damaged, or has not the column that a filter reads. RewardError: a function went wrong.
        """
        counts = Counts()
        layout = self.way.turning(lambda values: self._before(values, name))
        with whole(part.rows) as out, whole(part.aside) as aside:
            writer = _Writer(out, aside, counts, self)
            for made in convert_rows(rows, layout, self.way.options, self.columns, identical="keep"):
                pace.step(made.rows)
                writer.take(made)
            writer.flush()
        counts.check()
        write_json(part.done, counts.to_json())
        return counts

    def _before(self, values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        reason = self.filters.reason(values, name)
        if reason is not None:
            raise LeftOut(reason, "")
        return prompts_of_transcript(values) if self.transcripts else values


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
    """Writes what was converted, in its order; answers are labelled many at a time."""

    out: IO[bytes]
    aside: IO[bytes]
    counts: Counts
    how: Converter
    waiting: list[Converted] = field(default_factory=list)
    answers: int = 0

    def take(self, made: Converted) -> None:
        self.counts.rows += made.rows
        if made.left_out:
            self.counts.filtered[made.aside[0].what] += made.rows
        elif made.aside:
            self.counts.quarantined += made.rows
            for q in made.aside:
                self._quarantine(q)
        elif self.how.labeller is None:
            self._write(made)
        else:
            self.waiting.append(made)
            self.answers += len(made.trees)
            if self.answers >= BATCH:
                self.flush()

    def flush(self) -> None:
        """Label what waits, and write it."""
        if not self.waiting or self.how.labeller is None:
            return
        labelled = iter(self.how.labeller.label([t for made in self.waiting for t in made.trees]))
        for made in self.waiting:
            found = [next(labelled) for _ in made.trees]
            kept = tuple(t for t in found if t is not None)
            if kept:
                self.counts.unlabelled += len(found) - len(kept)
                self._write(replace(made, trees=kept))
            else:
                self.counts.filtered["no label"] += made.rows
        self.waiting, self.answers = [], 0

    def _write(self, made: Converted) -> None:
        rows = [row for tree in made.trees for row in rows_of(tree, self.how.way.kind)]
        try:
            line = json.dumps(rows, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            self.counts.quarantined += made.rows
            what = "holds half a surrogate pair, which is no text"
            self._quarantine(Quarantined(made.trees[0].source, what, "mend its text or drop it", rows))
            return
        self.out.write(line + b"\n")
        self.counts.accepted += made.rows
        self.counts.examples += len(rows)

    def _quarantine(self, q: Quarantined) -> None:
        held = {"where": q.where, "what": q.what, "how": q.how, "row": q.raw}
        self.aside.write(json.dumps(held, default=str).encode() + b"\n")
