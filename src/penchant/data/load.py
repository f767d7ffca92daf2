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

from penchant.data.converters import Detection, detect
from penchant.data.converters.fields import plain_name
from penchant.data.converting import IDENTICAL, Quarantined, convert_rows, layout_named, renamed
from penchant.data.formats import BadRow, Row, read_rows
from penchant.errors import DataError
from penchant.types import Message, PromptTree

__all__ = ["IDENTICAL", "Dataset", "Quarantined", "from_rows", "load_preferences"]

FIRST_ROWS = 100  # what detection looks at


@dataclass(frozen=True, slots=True)
class Dataset:
    """Prompt trees and what was kept aside.

    A row gives one tree in most layouts, several in some, and in others many rows together give some (see `Layout`); what is
    counted here are rows, and ``len(trees)`` is the number of examples.

    Args:
        trees: in file order; shape: the layout they came in; kind: ``pairs``, ``unpaired`` (labels), ``scored``, ``prompts``,
            ``sft`` or ``text``.
        total: rows read; quarantined: rows kept aside; accepted: rows that gave trees (default: one for each tree).
        fingerprint: SHA-256 over the trees' content.
        detection: why it is this layout; None where a person named it.
    """

    trees: tuple[PromptTree, ...]
    shape: str
    kind: str
    total: int
    quarantined: tuple[Quarantined, ...]
    fingerprint: str
    accepted: int = -1
    detection: Detection | None = None

    def __post_init__(self) -> None:
        if self.accepted < 0:
            object.__setattr__(self, "accepted", len(self.trees))
        if self.accepted + len(self.quarantined) != self.total:
            raise AssertionError(f"{self.accepted} accepted + {len(self.quarantined)} quarantined != {self.total} rows")

    def subset(self, indices: Sequence[int]) -> Dataset:
        """The trees at `indices`, as a data set of its own that has a row for each."""
        trees = tuple(self.trees[i] for i in indices)
        rows = len(trees)
        return replace(self, trees=trees, total=rows, accepted=rows, quarantined=(), fingerprint=fingerprint(trees))


def load_preferences(
    path: str | Sequence[str],
    *,
    shape: str = "auto",
    columns: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
    identical: str = "bad_row",
    limit: int | None = None,
    layout_options: Mapping[str, Any] | None = None,
) -> Dataset:
    """Read files or hub ids into prompt trees.

    Args:
        path: one or several of .json, .jsonl(.gz), .csv, .tsv, .parquet, .txt, or a hub id ``owner/name[:split]``.
        shape: ``auto`` looks at the columns; or a layout that `penchant data formats` lists.
        columns: ``{our field: your column}``.
        on_bad_row: ``error`` stops at the first bad row, ``skip`` keeps bad rows aside.
        identical: ``bad_row`` or ``keep``: what a pair with chosen == rejected is.
        limit: read the first n rows only.
        layout_options: what can be chosen about the layout, see `penchant data formats NAME`.

    Raises:
        ConfigError: an unknown layout, or an option that it does not have.
        DataError: ``file:line: what; how to mend it``.
    """
    paths = [path] if isinstance(path, str) else [str(p) for p in path]
    rows = itertools.chain.from_iterable(read_rows(p) for p in paths)
    reading = _Reading(shape, columns or {}, on_bad_row, identical, limit, layout_options or {})
    return _collect(rows, ", ".join(paths), reading)


def from_rows(rows: Iterable[Mapping[str, Any]], *, name: str = "rows", shape: str = "auto", **options: Any) -> Dataset:
    """The same from rows in memory; options as for `load_preferences`."""
    numbered = (Row(f"{name}:{i}", r) for i, r in enumerate(rows, 1))
    reading = _Reading(
        shape,
        options.get("columns") or {},
        options.get("on_bad_row", "error"),
        options.get("identical", "bad_row"),
        options.get("limit"),
        options.get("layout_options") or {},
    )
    return _collect(numbered, name, reading)


@dataclass(frozen=True, slots=True)
class _Reading:
    """How rows are read; see `load_preferences`."""

    shape: str
    columns: Mapping[str, str]
    on_bad_row: str
    identical: str
    limit: int | None
    layout_options: Mapping[str, Any]


def _collect(rows: Iterable[Row | BadRow], name: str, reading: _Reading) -> Dataset:
    stream: Iterator[Row | BadRow] = iter(itertools.islice(rows, reading.limit))
    shape, detection = reading.shape, None
    if shape == "auto":
        first = list(itertools.islice(stream, FIRST_ROWS))
        shape, detection = detected(first, name, reading.columns)
        stream = itertools.chain(first, stream)
    layout = layout_named(shape)
    options = layout.settings(reading.layout_options)
    trees: list[PromptTree] = []
    aside: list[Quarantined] = []
    accepted = 0
    for made in convert_rows(stream, layout, options, reading.columns, reading.identical):
        if made.aside and reading.on_bad_row == "error" and not made.left_out:
            bad = made.aside[0]
            raise DataError(bad.where, bad.what, bad.how + " (or set data.on_bad_row=skip to keep such rows aside)")
        accepted += made.rows if made.trees else 0
        trees += made.trees
        aside += made.aside
    if not trees:
        reasons = "; ".join(f"{n}x {what}" for what, n in Counter(q.what for q in aside).most_common(3))
        raise DataError(name, f"none of {len(aside)} rows could be used ({reasons})", "mend the rows or set data.shape")
    kind, total = layout.kind_of(options), accepted + len(aside)
    return Dataset(tuple(trees), shape, kind, total, tuple(aside), fingerprint(trees), accepted, detection)


def detected(first: Sequence[Row | BadRow], name: str, columns: Mapping[str, str]) -> tuple[str, Detection]:
    """The layout of the first rows.

    Raises:
        DataError: they are of none.
    """
    found = detect(renamed(r.values, columns) for r in first if isinstance(r, Row))
    if found.layout is not None:
        return found.layout, found
    _raise_first_bad(first)
    if found.how:
        raise DataError(name, found.why, found.how)
    raise DataError(
        name,
        _no_shape(first),
        "map your columns, e.g. data.columns={prompt: question, chosen: good, rejected: bad}, or name the layout with "
        "data.shape (`penchant data formats` lists them)",
    )


def _raise_first_bad(rows: Sequence[Row | BadRow]) -> None:
    for row in rows:
        if isinstance(row, BadRow):
            raise DataError(row.where, row.what, row.how)


def _no_shape(rows: Sequence[Row | BadRow]) -> str:
    columns = sorted({plain_name(str(c)) for r in rows if isinstance(r, Row) for c in r.values})
    return f"the columns ({', '.join(columns) or 'none'}) are of no known shape"


def fingerprint(trees: Iterable[PromptTree]) -> str:
    """SHA-256 over prompts and completions, in order."""
    digest = hashlib.sha256()
    for tree in trees:
        prompt = tree.prompt if isinstance(tree.prompt, str) else [[m.role, m.content] for m in tree.prompt]
        content = [prompt, [[c.text, c.label, c.score] for c in tree.completions]]
        digest.update(json.dumps(content, ensure_ascii=True).encode())
    return digest.hexdigest()


def prompt_text(prompt: str | tuple[Message, ...]) -> str:
    """A prompt as one string, for comparing and showing."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m.role}: {m.content}" for m in prompt)


def summary(dataset: Dataset) -> str:
    """``1,700 rows = 1,698 accepted + 2 quarantined (2 x ...)``."""
    reasons = Counter(q.what for q in dataset.quarantined).most_common(4)
    shown = f" ({'; '.join(f'{n} x {what}' for what, n in reasons)})" if reasons else ""
    total, kept, aside = dataset.total, dataset.accepted, len(dataset.quarantined)
    examples = f", {len(dataset.trees):,} examples" if len(dataset.trees) != kept else ""
    return f"{total:,} rows ({dataset.shape}) = {kept:,} accepted + {aside:,} quarantined{shown}{examples}"


def layout_line(dataset: Dataset, path: str | Sequence[str]) -> str:
    """``train.jsonl: layout hh (columns chosen, rejected hold ...); other fits: pairs; override with data.shape=NAME``."""
    paths = [path] if isinstance(path, str) else path
    name = ", ".join(Path(p).name if Path(p).exists() else p for p in paths)
    if dataset.detection is None:
        return f"{name}: layout {dataset.shape}, as data.shape says"
    return dataset.detection.sentence(name)


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
