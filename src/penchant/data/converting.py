"""Rows to prompt trees, one after another: each row, or group of rows, gives trees or is kept aside with its reason."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from penchant.data.converters import LAYOUTS, Group, Layout, LeftOut, RowError
from penchant.data.formats import BadRow, Row
from penchant.errors import ConfigError
from penchant.types import PromptTree

IDENTICAL = '"chosen" equals "rejected"'


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row that was kept aside: where it stands, what is wrong, how to mend it, and the row itself."""

    where: str
    what: str
    how: str
    raw: Any


@dataclass(frozen=True, slots=True)
class Converted:
    """What became of a row, or of the rows of a group: `rows` of them gave `trees`, or all of them are in `aside`.

    `left_out` says that nothing is wrong with them: an option of the layout leaves them out. `source` are the rows themselves.
    """

    rows: int
    trees: tuple[PromptTree, ...] = ()
    aside: tuple[Quarantined, ...] = ()
    left_out: bool = False
    source: tuple[Row | BadRow, ...] = ()


def layout_named(name: str) -> Layout:
    """A layout of the registry.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in LAYOUTS:
        raise ConfigError("data.shape", f"{name!r} is no layout", f"choose auto or one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """A row with a person's columns under our names (``{our field: your column}``)."""
    if not columns:
        return values
    taken = set(columns.values())
    kept = {k: v for k, v in values.items() if k not in taken and k not in columns}
    return kept | {ours: values[theirs] for ours, theirs in columns.items() if theirs in values}


def convert_rows(
    rows: Iterable[Row | BadRow],
    layout: Layout,
    options: Mapping[str, Any],
    columns: Mapping[str, str] | None = None,
    identical: str = "bad_row",
) -> Iterator[Converted]:
    """Every row of a stream, converted. A layout of groups reads the whole stream first, by way of a temporary file.

    Args:
        layout, options: see `Layout.settings`; columns: ``{our field: your column}``.
        identical: ``bad_row`` or ``keep``: what a pair with chosen == rejected is.
    """
    columns = columns or {}
    if layout.group is not None:
        for group in _grouped(rows, layout.group, columns):
            yield group if isinstance(group, Converted) else _convert(group, layout, options, columns, identical)
        return
    for row in rows:
        if isinstance(row, BadRow):
            yield _bad(row)
        else:
            yield _convert([row], layout, options, columns, identical)


def _bad(row: BadRow) -> Converted:
    return Converted(1, aside=(Quarantined(row.where, row.what, row.how, row.raw),), source=(row,))


def _convert(
    rows: list[Row], layout: Layout, options: Mapping[str, Any], columns: Mapping[str, str], identical: str
) -> Converted:
    """The rows of one group (one row, where the layout has no groups)."""
    source = tuple(rows)
    try:
        values = [renamed(r.values, columns) for r in rows]
        trees = layout.convert(values[0] if layout.group is None else layout.group.fold(values), options)
        for tree in trees:
            _check_text(tree)
        if identical != "keep" and any(map(is_identical, trees)):
            raise RowError(IDENTICAL, "drop it or set data.identical=keep")
    except RowError as error:
        return Converted(len(rows), (), _aside(rows, error), isinstance(error, LeftOut), source)
    where = rows[0].where
    if len(trees) == 1:
        return Converted(len(rows), (replace(trees[0], source=where),), source=source)
    numbered = tuple(replace(t, source=f"{where}#{i}") for i, t in enumerate(trees, 1))
    return Converted(len(rows), numbered, source=source)


def _check_text(tree: PromptTree) -> None:
    """Whether every text can be written as UTF-8, which is what a tokenizer reads.

    Raises:
        RowError: one holds half of a surrogate pair; JSON can say that, and programs that cut texts in the middle do.
    """
    prompt = [tree.prompt] if isinstance(tree.prompt, str) else [m.content for m in tree.prompt]
    for text in (*prompt, *(c.text for c in tree.completions)):
        if text.isascii():  # a flag of the string: no look at its characters
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            what = f"holds half of a surrogate pair ({half}, character {error.start + 1} of a text), which is no text"
            raise RowError(what, "the text was cut within an emoji or the like: mend it, or drop the row") from error


def _aside(rows: Iterable[Row], error: RowError) -> tuple[Quarantined, ...]:
    return tuple(Quarantined(r.where, error.what, error.how, dict(r.values)) for r in rows)


def is_identical(tree: PromptTree) -> bool:
    """Whether a tree is a pair whose answers are the same."""
    pair = [c.text.strip() for c in tree.completions]
    return [c.label for c in tree.completions] == [True, False] and pair[0] == pair[1]


def _grouped(rows: Iterable[Row | BadRow], group: Group, columns: Mapping[str, str]) -> Iterator[list[Row] | Converted]:
    """The groups of a stream in the order of their first rows; rows without a group at once.

    No published file promises that the rows of a group stand together, so all are written to a temporary file first; in memory
    is where each group's rows stand in it, eight bytes a row.
    """
    places: dict[str, array[int]] = {}
    with tempfile.TemporaryFile() as spill:
        for row in rows:
            if isinstance(row, BadRow):
                yield _bad(row)
                continue
            try:
                key = group.key(renamed(row.values, columns))
            except RowError as error:
                yield Converted(1, aside=_aside([row], error), source=(row,))
                continue
            places.setdefault(key, array("q")).append(spill.tell())
            spill.write(json.dumps([row.where, row.values], default=str).encode() + b"\n")
        for at in places.values():
            group_rows = []
            for place in at:
                spill.seek(place)
                where, values = json.loads(spill.readline())
                group_rows.append(Row(where, values))
            yield group_rows
