"""Load preference data: every row becomes a prompt tree or is kept aside with its reason; accepted + quarantined == total."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from penchant.data.converters import KINDS, SHAPES, RowError, detect_shape
from penchant.data.formats import BadRow, Row, read_rows
from penchant.data.order import Columns
from penchant.errors import DataError
from penchant.types import Message, PromptTree

IDENTICAL = '"chosen" equals "rejected"'


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row that was kept aside: where it stands, what is wrong, how to mend it, and the row itself."""

    where: str
    what: str
    how: str
    raw: Any


@dataclass(frozen=True, slots=True)
class Dataset:
    """Prompt trees and what was kept aside.

    Args:
        trees: accepted rows in file order; shape: the layout they came in; kind: ``pairs``, ``unpaired`` (labels), ``scored``,
            ``prompts``, ``sft`` or ``text``.
        total: rows read; quarantined: rows kept aside.
        fingerprint: SHA-256 over the trees' content; columns: what the rows' own columns say, None where they are not known.
    """

    trees: Sequence[PromptTree]
    shape: str
    kind: str
    total: int
    quarantined: tuple[Quarantined, ...]
    fingerprint: str
    columns: Columns | None = None

    def __post_init__(self) -> None:
        if len(self.trees) + len(self.quarantined) != self.total:
            raise AssertionError(
                f"{len(self.trees)} accepted + {len(self.quarantined)} quarantined != {self.total} rows"
            )

    @property
    def accepted(self) -> int:
        return len(self.trees)

    def subset(self, indices: Sequence[int]) -> Dataset:
        """The accepted rows at `indices`, as a data set of its own."""
        trees = tuple(self.trees[i] for i in indices)
        return replace(
            self, trees=trees, total=len(trees), quarantined=(), fingerprint=fingerprint(trees), columns=None
        )


def load_preferences(
    path: str | Sequence[str],
    *,
    shape: str = "auto",
    columns: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
    identical: str = "bad_row",
    limit: int | None = None,
) -> Dataset:
    """Read files or hub ids into prompt trees.

    Args:
        path: one or several of .json, .jsonl(.gz), .csv, .tsv, .parquet, .txt, or a hub id ``owner/name[:split]``.
        shape: ``auto`` looks at the columns; or pairs, hh, alpaca_pairs, unpaired, scored, prompts, sft, messages, text.
        columns: ``{our field: your column}``.
        on_bad_row: ``error`` stops at the first bad row, ``skip`` keeps bad rows aside.
        identical: ``bad_row`` or ``keep``: what a pair with chosen == rejected is.
        limit: read the first n rows only.

    Raises:
        DataError: ``file:line: what; how to mend it``.
    """
    paths = [path] if isinstance(path, str) else [str(p) for p in path]
    rows = itertools.chain.from_iterable(read_rows(p) for p in paths)
    return _collect(rows, ", ".join(paths), shape, columns or {}, on_bad_row, identical, limit)


def from_rows(rows: Iterable[Mapping[str, Any]], *, name: str = "rows", shape: str = "auto", **options: Any) -> Dataset:
    """The same from rows in memory; options as for `load_preferences`."""
    numbered = (Row(f"{name}:{i}", r) for i, r in enumerate(rows, 1))
    return _collect(
        numbered,
        name,
        shape,
        options.get("columns") or {},
        options.get("on_bad_row", "error"),
        options.get("identical", "bad_row"),
        options.get("limit"),
    )


def _collect(
    rows: Iterable[Row | BadRow],
    name: str,
    shape: str,
    columns: Mapping[str, str],
    on_bad_row: str,
    identical: str,
    limit: int | None,
) -> Dataset:
    stream = stream_rows(itertools.islice(rows, limit), name, shape, columns, identical)
    reading = Reading(on_bad_row)
    trees = tuple(reading.trees(stream))
    return reading.result(trees, stream, name)


class Reading:
    """Reading as it goes on: trees come out one by one, what else is to be told is there at the end."""

    def __init__(self, on_bad_row: str) -> None:
        self.on_bad_row = on_bad_row
        self.aside: list[Quarantined] = []
        self.columns = Columns()
        self.digest = hashlib.sha256()

    def trees(self, stream: Stream) -> Iterator[PromptTree]:
        """All accepted rows, in order.

        Raises:
            DataError: a bad row, where those are errors.
        """
        for row, result in stream:
            if isinstance(row, Row):
                self.columns.update(row.values)
            if isinstance(result, PromptTree):
                self.digest.update(_content_of(result))
                yield result
            elif self.on_bad_row == "error":
                raise DataError(
                    result.where, result.what, result.how + " (or set data.on_bad_row=skip to keep such rows aside)"
                )
            else:
                self.aside.append(result)

    def result(self, trees: Sequence[PromptTree], stream: Stream, name: str) -> Dataset:
        """The whole, when all trees have come out.

        Raises:
            DataError: there are none.
        """
        aside = self.aside
        if not trees:
            reasons = "; ".join(f"{n}x {what}" for what, n in Counter(q.what for q in aside).most_common(3))
            raise DataError(
                name, f"none of {len(aside)} rows could be used ({reasons})", "mend the rows or set data.shape"
            )
        content = self.digest.hexdigest()
        total = len(trees) + len(aside)
        return Dataset(trees, stream.shape, stream.kind, total, tuple(aside), content, self.columns)


@dataclass(frozen=True, slots=True)
class Stream:
    """Rows as they are read, each with what became of it; nothing is kept."""

    shape: str
    kind: str
    rows: Iterable[tuple[Row | BadRow, PromptTree | Quarantined]]

    def __iter__(self) -> Iterator[tuple[Row | BadRow, PromptTree | Quarantined]]:
        return iter(self.rows)


def stream_rows(
    rows: Iterable[Row | BadRow], name: str, shape: str, columns: Mapping[str, str], identical: str = "bad_row"
) -> Stream:
    """Convert rows one by one; ``auto`` looks at the first hundred.

    Raises:
        DataError: the columns are of no known shape.
    """
    stream: Iterator[Row | BadRow] = iter(rows)
    if shape == "auto":
        first = list(itertools.islice(stream, 100))
        found = detect_shape(_renamed(r.values, columns) for r in first if isinstance(r, Row))
        if found is None:
            _raise_first_bad(first)
            raise DataError(
                name,
                _no_shape(first),
                "map your columns, e.g. data.columns={prompt: question, chosen: good, rejected: bad}",
            )
        shape, stream = found, itertools.chain(first, stream)
    return Stream(shape, KINDS[shape], ((row, _convert(row, shape, columns, identical)) for row in stream))


def stream_preferences(
    path: str | Sequence[str],
    *,
    shape: str = "auto",
    columns: Mapping[str, str] | None = None,
    identical: str = "bad_row",
    limit: int | None = None,
) -> Stream:
    """`load_preferences` without keeping anything: arguments as there, bad rows come as `Quarantined`."""
    paths = [path] if isinstance(path, str) else [str(p) for p in path]
    rows = itertools.chain.from_iterable(read_rows(p) for p in paths)
    return stream_rows(itertools.islice(rows, limit), ", ".join(paths), shape, columns or {}, identical)


def _raise_first_bad(rows: Sequence[Row | BadRow]) -> None:
    for row in rows:
        if isinstance(row, BadRow):
            raise DataError(row.where, row.what, row.how)


def _no_shape(rows: Sequence[Row | BadRow]) -> str:
    columns = sorted({str(c) for r in rows if isinstance(r, Row) for c in r.values})
    return f"the columns ({', '.join(columns) or 'none'}) are of no known shape"


def _renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    if not columns:
        return values
    taken = set(columns.values())
    kept = {k: v for k, v in values.items() if k not in taken and k not in columns}
    return kept | {ours: values[theirs] for ours, theirs in columns.items() if theirs in values}


def _convert(row: Row | BadRow, shape: str, columns: Mapping[str, str], identical: str) -> PromptTree | Quarantined:
    if isinstance(row, BadRow):
        return Quarantined(row.where, row.what, row.how, row.raw)
    try:
        tree = SHAPES[shape](_renamed(row.values, columns))
    except RowError as error:
        return Quarantined(row.where, error.what, error.how, dict(row.values))
    if (
        identical != "keep"
        and len(tree.completions) == 2
        and tree.completions[0].text.strip() == tree.completions[1].text.strip()
    ):
        return Quarantined(row.where, IDENTICAL, "drop it or set data.identical=keep", dict(row.values))
    return replace(tree, source=row.where)


def fingerprint(trees: Iterable[PromptTree]) -> str:
    """SHA-256 over prompts and completions, in order."""
    digest = hashlib.sha256()
    for tree in trees:
        digest.update(_content_of(tree))
    return digest.hexdigest()


def _content_of(tree: PromptTree) -> bytes:
    prompt = tree.prompt if isinstance(tree.prompt, str) else [[m.role, m.content] for m in tree.prompt]
    content = [prompt, [[c.text, c.label, c.score] for c in tree.completions]]
    return json.dumps(content, ensure_ascii=True).encode()


def prompt_text(prompt: str | tuple[Message, ...]) -> str:
    """A prompt as one string, for comparing and showing."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m.role}: {m.content}" for m in prompt)


def summary(dataset: Dataset) -> str:
    """``1,700 rows = 1,698 accepted + 2 quarantined (2 x ...)``."""
    reasons = Counter(q.what for q in dataset.quarantined)
    return summary_of(dataset.shape, dataset.accepted, reasons, len(dataset.quarantined))


def summary_of(shape: str, accepted: int, reasons: Counter[str], aside: int) -> str:
    """The same from counts."""
    shown = f" ({'; '.join(f'{n} x {what}' for what, n in reasons.most_common(4))})" if reasons else ""
    return f"{accepted + aside:,} rows ({shape}) = {accepted:,} accepted + {aside:,} quarantined{shown}"


def write_quarantine(quarantined: Sequence[Quarantined], folder: Path, name: str) -> Path | None:
    """Write rows kept aside to ``quarantine.NAME.jsonl``; None where there are none."""
    path = folder / f"quarantine.{name}.jsonl"
    if not quarantined:
        path.unlink(missing_ok=True)
        return None
    with path.open("w", encoding="utf-8") as out:
        for q in quarantined:
            row = {"where": q.where, "what": q.what, "how": q.how, "row": q.raw}
            out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    return path
