"""Load preference data: every row becomes a prompt tree or is kept aside with its reason; accepted + quarantined == total."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

from penchant.base.files import write_text_atomically
from penchant.base.text import closest, counted, printable
from penchant.data.layouts import (
    LAYOUTS,
    Detection,
    Group,
    Layout,
    LeftOut,
    RowError,
    alternative_columns,
    detect,
    layout_named,
    likely_typo_of,
)
from penchant.data.layouts.fields import NOTHING_WRONG, PICTURES, finite, parse_messages
from penchant.data.read import BadRow, Bounds, Row, read_rows
from penchant.data.read.source import Missing
from penchant.errors import ConfigError, DataError, setting
from penchant.types import Completion, Message, Prompt, PromptTree

# ---- Counts of the rows' own columns: whether the answer shown first won, and the language ----


def _arena(row: Mapping[str, Any]) -> bool | None:
    a, b = row.get("winner_model_a"), row.get("winner_model_b")
    if a is not None:
        return None if bool(a) == bool(b) else bool(a)
    return {"model_a": True, "model_b": False}.get(str(row.get("winner")))


# layouts with two answers in the order in which they were shown: their columns, and how to tell whether the first won
SIDE_BY_SIDE: tuple[tuple[str, set[str], Callable[[Mapping[str, Any]], bool | None]], ...] = (
    ("arena", {"winner_model_a", "winner_model_b"}, _arena),
    ("arena", {"winner", "model_a", "model_b"}, _arena),
    ("shp", {"human_ref_A", "human_ref_B", "labels"}, lambda row: {"1": True, "0": False}.get(str(row["labels"]))),
    (
        "pku",
        {"response_0", "response_1", "better_response_id"},
        lambda row: {"0": True, "1": False}.get(str(row["better_response_id"])),
    ),
)


LANGUAGES = 1000  # distinct ones counted
NAMES_ASKED_ABOUT = 1000  # columns checked for typos: a row may have very many keys
COUNTED_COLUMNS = {"language", "lang"}.union(*(needed for _, needed, _ in SIDE_BY_SIDE))


@dataclass(slots=True)
class Columns:
    """Counts of values in the rows' own columns.

    Args:
        first, decided: rows whose first answer won, and rows in which either won; languages: as a column names them.
        unused: non-empty columns of the first rows that neither the layout nor these counts read.
    """

    first: int = 0
    decided: int = 0
    layouts: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    unused: list[str] = field(default_factory=list)

    def update(self, rows: Iterable[Row | BadRow], max_languages: int = LANGUAGES) -> None:
        """Count the rows that can be read; `max_languages`: limit on distinct languages."""
        for row in rows:
            if isinstance(row, Row):
                self._order(row.values)
                self._language(row.values, max_languages)

    def merge(self, other: Columns) -> None:
        """Add the counts of later rows, which must hold all their languages."""
        self.first, self.decided = self.first + other.first, self.decided + other.decided
        self.layouts += other.layouts
        add_capped(self.languages, other.languages, LANGUAGES)

    def _order(self, row: Mapping[str, Any]) -> None:
        match = next(((name, first_won) for name, needed, first_won in SIDE_BY_SIDE if needed <= row.keys()), None)
        if match is not None:
            name, first_won = match
            won = first_won(row)
            self.layouts[name] += 1
            self.decided += won is not None
            self.first += won is True

    def _language(self, row: Mapping[str, Any], max_languages: int) -> None:
        value = next((v for v in (row.get("language"), row.get("lang")) if isinstance(v, str) and v), None)
        if value is not None:
            add_capped(self.languages, {value[:40]: 1}, max_languages)


def add_capped(counts: Counter[str], new_counts: Mapping[str, int], max_names: int) -> None:
    """Add to counts, with at most `max_names` names."""
    for name, count in new_counts.items():
        if name in counts or len(counts) < max_names:
            counts[name] += count


# ---- Rows to prompt trees: each row, or group of rows, gives trees or is kept aside with its reason ----


IDENTICAL = '"chosen" equals "rejected"'


Quarantined = BadRow  # also a readable row that was kept aside: where it is, what is wrong, how to fix it


@dataclass(frozen=True, slots=True)
class Converted:
    """The result of converting a row or a group: its `rows` rows gave `trees`, or all of them are in `aside`.

    `left_out`: the rows are valid, but an option leaves them out. `source`: the rows themselves.
    """

    rows: int
    trees: tuple[PromptTree, ...] = ()
    aside: tuple[Quarantined, ...] = ()
    left_out: bool = False
    source: tuple[Row | BadRow, ...] = ()


def rename_columns(values: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """A row with the user's columns under our names (``{our field: your column}``), and with messages in text cells parsed."""
    if not columns:
        return parse_messages(values)
    mapped = set(columns.values())
    rest = {k: v for k, v in values.items() if k not in mapped and k not in columns}
    return parse_messages(rest | {ours: values[theirs] for ours, theirs in columns.items() if theirs in values})


def convert_rows(
    rows: Iterable[Row | BadRow],
    layout: Layout,
    options: Mapping[str, Any],
    columns: Mapping[str, str] | None = None,
    identical: str = "bad_row",
    keep_columns: bool = False,
    weight: str | None = None,
    pictures: Any = None,
) -> Iterator[Converted]:
    """Convert every row of a stream. A layout with groups first reads the whole stream into a temporary file.

    Args:
        layout, options: see `Layout.settings`; columns: ``{our field: your column}``.
        identical: ``bad_row`` or ``keep``: how to treat a pair with chosen == rejected.
        keep_columns, weight: see `Reading`; a group has the columns of its first row.
        pictures: a `data.pictures.Pictures` to find them; None: rows with pictures are bad rows.
    """
    columns = columns or {}
    for group in map(_as_group, rows) if layout.group is None else _group_rows(rows, layout.group, columns):
        if isinstance(group, Converted):
            yield group
            continue
        converted = _convert(group, layout, options, columns, identical, weight, pictures)
        if keep_columns and converted.trees:
            further = further_columns(group[0].values, columns)
            converted = replace(converted, trees=tuple(replace(t, columns=further) for t in converted.trees))
        yield converted


TREE_COLUMNS = frozenset(["prompt", "completion", "messages", "conversations"])


def further_columns(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row's columns under the user's names and, if mapped, under ours, without its prompt and its completion."""
    prompt_column = columns.get("prompt")
    all_columns = {**values, **{ours: values[theirs] for ours, theirs in columns.items() if theirs in values}}
    return {str(n): v for n, v in all_columns.items() if n not in TREE_COLUMNS and n != prompt_column}


def _as_group(row: Row | BadRow) -> list[Row] | Converted:
    """A row as a group of its own, or kept aside if it cannot be read."""
    return [row] if isinstance(row, Row) else Converted(1, aside=(row,), source=(row,))


def _convert(
    rows: list[Row],
    layout: Layout,
    options: Mapping[str, Any],
    columns: Mapping[str, str],
    identical: str,
    weight: str | None = None,
    pictures: Any = None,
) -> Converted:
    """Convert the rows of one group (one row, if the layout has no groups)."""
    source = tuple(rows)
    try:
        values = [rename_columns(r.values, columns) for r in rows]
        extracted = None
        if pictures is not None and layout.group is None:
            values[0], extracted = pictures.extract(values[0])
        trees = layout.convert(values[0] if layout.group is None else layout.group.fold(values), options)
        if extracted is not None:
            trees = extracted.place_in(trees)
        for tree in trees:
            _check_text(tree)
        if identical != "keep" and any(map(is_identical, trees)):
            raise RowError(IDENTICAL, "drop it or set data.identical=keep")
        if weight:
            row_weight = weight_of(rows[0].values, weight)
            trees = tuple(replace(t, weight=row_weight) for t in trees)
    except RowError as error:
        return Converted(len(rows), (), _quarantine(rows, error), isinstance(error, LeftOut), source)
    several = len(trees) > 1
    with_source = (replace(t, source=rows[0].where + f"#{i}" * several) for i, t in enumerate(trees, 1))
    return Converted(len(rows), tuple(with_source), source=source)


def weight_of(row: Mapping[str, Any], column: str) -> float:
    """The weight of a row in a loss.

    Raises:
        LeftOut: it is 0. RowError: it is missing, negative or not a number.
    """
    if row.get(column) is None:
        what = f'"{column}", the weight that data.weight names, is missing'
        raise RowError(what, "give a number, 1 for a row like others")
    weight = finite(row[column])
    if weight is None or weight < 0:
        raise RowError(f'the weight "{column}" is {str(row[column])[:40]!r}', "make it a number, 0 or above")
    if weight == 0:
        raise LeftOut(f'"{column}" is 0: the row counts for nothing', NOTHING_WRONG)
    return weight


def _check_text(tree: PromptTree) -> None:
    """Check that every text can be encoded as UTF-8, which tokenizers require.

    Raises:
        RowError: a text holds half of a surrogate pair, which JSON allows and programs that cut texts produce.
    """
    prompt = (
        [tree.prompt]
        if isinstance(tree.prompt, str)
        else [m.reasoning + m.said + m.name + m.tool_call_id for m in tree.prompt]
    )
    for text in (*prompt, *(c.whole for c in tree.completions), tree.tools, tree.template_options):
        if text.isascii():  # a flag of the string, no scan of its characters
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            what = f"holds half of a surrogate pair ({half}, character {error.start + 1} of a text), which is not text"
            raise RowError(what, "the text was cut within an emoji or the like: fix it, or drop the row") from error


def _quarantine(rows: Iterable[Row], error: RowError) -> tuple[Quarantined, ...]:
    return tuple(Quarantined(r.where, error.what, error.how, dict(r.values)) for r in rows)


def is_identical(tree: PromptTree) -> bool:
    """Whether a tree is a pair whose answers are the same, up to white space around them."""
    if [c.label for c in tree.completions] != [True, False]:
        return False
    chosen, rejected = (c.whole.strip() for c in tree.completions)
    return chosen == rejected


def _group_rows(
    rows: Iterable[Row | BadRow], group: Group, columns: Mapping[str, str]
) -> Iterator[list[Row] | Converted]:
    """Yield the groups of a stream in the order of their first rows, and rows without a group immediately.

    No published file guarantees that the rows of a group are adjacent, so all are written to a temporary file first. Only the
    offsets of each group's rows are held in memory, eight bytes a row.
    """
    offsets: dict[str, array[int]] = {}
    with tempfile.TemporaryFile() as spill:
        for row in rows:
            if isinstance(row, BadRow):
                yield _as_group(row)
                continue
            try:
                key = group.key(rename_columns(row.values, columns))
            except RowError as error:
                yield Converted(1, aside=_quarantine([row], error), source=(row,))
                continue
            offsets.setdefault(key, array("q")).append(spill.tell())
            missing = [name for name, value in row.values.items() if isinstance(value, Missing)]
            spill.write(json.dumps([row.where, row.values, missing], default=str).encode() + b"\n")
        for group_offsets in offsets.values():
            group_rows = []
            for offset in group_offsets:
                spill.seek(offset)
                where, values, missing = json.loads(spill.readline())
                group_rows.append(Row(where, values | {name: Missing(values[name]) for name in missing}))
            yield group_rows


# ---- Data sets ----


FIRST_ROWS = 100  # rows that detection looks at
MAX_NAMED = 12  # unused columns named in a message


@dataclass(frozen=True, slots=True)
class Dataset:
    """Prompt trees and the rows kept aside.

    A row gives one tree in most layouts and several in some; in others a group of rows gives one or more (see `Layout`). The
    counts here are of rows; ``len(trees)`` is the number of examples.

    Args:
        trees: in file order; shape: the layout they came in; kind: ``pairs``, ``unpaired`` (labels), ``scored``, ``prompts``,
            ``sft`` or ``text``.
        total: rows read; quarantined: rows kept aside; accepted: rows that gave trees (default: one for each tree).
        fingerprint: SHA-256 over the trees' content; columns: counts of the rows' own columns, None if unknown.
        detection: why it is this layout; None if the user named it.
    """

    trees: Sequence[PromptTree]
    shape: str
    kind: str
    total: int
    quarantined: tuple[Quarantined, ...]
    fingerprint: str
    accepted: int = -1
    detection: Detection | None = None
    columns: Columns | None = None

    def __post_init__(self) -> None:
        if self.accepted < 0:
            object.__setattr__(self, "accepted", len(self.trees))
        if self.accepted + len(self.quarantined) != self.total:
            raise AssertionError(f"{self.accepted} accepted + {len(self.quarantined)} quarantined != {self.total} rows")

    def subset(self, indices: Sequence[int]) -> Dataset:
        """The trees at `indices` as a data set that counts each as a row."""
        trees = tuple(self.trees[i] for i in indices)
        return self.with_trees(trees, fingerprint(trees))

    def with_trees(self, trees: Sequence[PromptTree], content: str) -> Dataset:
        """A data set of these trees that counts each as a row; `content` is their fingerprint."""
        rows = len(trees)
        return replace(self, trees=trees, total=rows, accepted=rows, quarantined=(), fingerprint=content, columns=None)


def concatenate_datasets(
    parts: Sequence[Dataset],
    names: Sequence[str],
    store: Callable[[Iterable[PromptTree]], tuple[Sequence[PromptTree], str] | None] = lambda trees: None,
) -> Dataset:
    """Several data sets as one; each tree's `origin` is the index of its own.

    Args:
        store: stores all trees outside memory and returns them and their fingerprint; by default, and if it returns None, they are
            kept in memory.

    Raises:
        DataError: they are of different kinds.
    """
    kinds = [d.kind for d in parts]
    if len(set(kinds)) > 1:
        listing = ", ".join(f"{name}: {kind}" for name, kind in zip(names, kinds, strict=True))
        how = "give rows of one kind (see `penchant data show FILE`), or train on them one after the other"
        raise DataError("data", f"rows of different kinds cannot be mixed ({listing})", how)

    def all_trees() -> Iterator[PromptTree]:
        return (replace(t, origin=i) for i, d in enumerate(parts) for t in d.trees)

    stored = store(all_trees())
    if stored is None:
        in_memory = tuple(all_trees())
        stored = in_memory, fingerprint(in_memory)
    trees, content = stored
    aside = tuple(q for d in parts for q in d.quarantined)
    shape = ", ".join(dict.fromkeys(d.shape for d in parts))
    counts = sum(d.total for d in parts), aside, content, sum(d.accepted for d in parts)
    return Dataset(trees, shape, kinds[0], *counts, parts[0].detection if len({d.shape for d in parts}) == 1 else None)


class Reading(TypedDict, total=False):
    """How rows are read.

    Args:
        shape: ``auto`` to detect it from the columns, a layout that `penchant data formats` lists, or a user's own.
        columns: ``{our field: your column}``.
        identical: ``bad_row`` or ``keep``: how to treat a pair with chosen == rejected.
        limit: read the first n rows only.
        layout_options: options of the layout, see `penchant data formats NAME`.
        bounds: limits on the size of a row, see `penchant.data.read.Bounds`.
        keep_columns: trees hold the further columns of their rows, for rewards that read them.
        weight: the column with a row's weight in a loss; None: all weigh 1.
        rollouts: completions will be sampled: rows with a prompt and no known layout are prompts (their answer is a column).
        image_dir: the folder of the prompts' pictures ("": that of the files); None: rows with pictures are bad rows.
    """

    shape: str
    columns: Mapping[str, str] | None
    identical: str
    limit: int | None
    layout_options: Mapping[str, Any] | None
    bounds: Mapping[str, Any]
    keep_columns: bool
    rollouts: bool
    weight: str | None
    image_dir: str | Path | None


def load_preferences(
    path: str | Path | Sequence[str | Path], *, on_bad_row: str = "error", **how: Unpack[Reading]
) -> Dataset:
    """Read files or hub ids into prompt trees.

    Args:
        path: one or several of .json, .jsonl, .ndjson, .csv, .tsv, .txt (also with .gz), .parquet, a folder or pattern of such files,
            or a hub id ``owner/name[:split]``.
        on_bad_row: ``error`` stops at the first bad row, ``skip`` keeps bad rows aside.
        how: see `Reading`.

    Raises:
        ConfigError: an unknown layout, an option that it does not have, or a value that an argument does not take.
        DataError: ``file:line: what; how to fix it``.
    """
    if on_bad_row not in ("error", "skip"):
        raise ConfigError("on_bad_row", f"is {on_bad_row!r}", "give error or skip")
    if how.get("identical", "bad_row") not in ("bad_row", "keep"):
        raise ConfigError("identical", f"is {how['identical']!r}", "give bad_row or keep")
    return stream_preferences(path, **how).load(on_bad_row)


def stream_preferences(path: str | Path | Sequence[str | Path], **how: Unpack[Reading]) -> Stream:
    """Like `load_preferences`, as a stream that keeps nothing in memory; bad rows come as `Quarantined`."""
    paths = [str(path)] if isinstance(path, (str, Path)) else [str(p) for p in path]
    bounds = how.pop("bounds", None)
    rows = read_rows(paths, None if bounds is None else Bounds(**bounds))
    if how.get("image_dir") == "":
        how["image_dir"] = _folder_of(paths)
    return Stream(rows, ", ".join(paths), **how)  # type: ignore[misc]  # without `bounds`


def _folder_of(paths: Sequence[str]) -> str:
    """The folder that holds the files; for a pattern, the folder above its first wildcard.

    Raises:
        ConfigError: they are in several folders.
    """
    folders = set()
    for path in paths:
        expanded = Path(path).expanduser()
        fixed_parts = itertools.takewhile(lambda part: not re.search(r"[*?\[]", part), expanded.parts)
        folder = Path(*fixed_parts)
        folders.add((folder if folder.is_dir() else folder.parent).absolute())
    if len(folders) > 1:
        what = "the data files stand in several folders"
        raise ConfigError("data.image_dir", what, "name the one that holds the pictures")
    return str(folders.pop())


@dataclass(frozen=True, slots=True)
class ConversionSettings:
    """How rows become prompt trees: the layout and options found, and the other arguments of `convert_rows`."""

    shape: str
    options: Mapping[str, Any]
    columns: Mapping[str, str]
    identical: str = "bad_row"
    keep_columns: bool = False
    weight: str | None = None
    pictures: Any = None

    def convert(self, rows: Iterable[Row | BadRow]) -> Iterator[Converted]:
        """Convert every row."""
        settings = self.options, self.columns, self.identical, self.keep_columns, self.weight, self.pictures
        return convert_rows(rows, layout_named(self.shape), *settings)


class Conversion:
    """Converts rows (or groups of rows) as they are read, and collects counts and the rows kept aside.

    Args:
        content: called with each tree's content, in order; max_languages: limit on distinct languages.
    """

    def __init__(
        self,
        settings: ConversionSettings,
        rows: Iterable[Row | BadRow],
        content: Callable[[bytes], object],
        max_languages: int = LANGUAGES,
    ) -> None:
        self.how = settings
        self.columns = Columns()
        self.accepted = 0
        self.aside: list[Quarantined] = []
        self._converted, self._content, self._max_languages = settings.convert(rows), content, max_languages

    def __iter__(self) -> Iterator[Converted]:
        return self._converted

    def trees(self, on_bad_row: str) -> Iterator[PromptTree]:
        """Yield all trees in order.

        Raises:
            DataError: a bad row, if `on_bad_row` is ``error``.
        """
        for converted in self:
            self.columns.update(converted.source, self._max_languages)
            if converted.aside and on_bad_row == "error" and not converted.left_out:
                bad = converted.aside[0]
                raise DataError(bad.where, bad.what, bad.how + " (or set data.on_bad_row=skip to keep such rows aside)")
            self.accepted += converted.rows if converted.trees else 0
            self.aside += converted.aside
            for tree in converted.trees:
                self._content(content_of(tree))
                yield tree

    def merge(self, columns: Columns, accepted: int, quarantined: Sequence[Quarantined], content: bytes) -> None:
        """Add the counts and rows kept aside of another conversion, of the rows after these."""
        self.columns.merge(columns)
        self.accepted += accepted
        self.aside += quarantined
        self._content(content)


class Stream(Conversion):
    """The rows of files, converted by the layout detected in them.

    `shape` and `kind` are those of the rows, and `detection` is why it is this layout (None if the user named it). `grouped`:
    several rows make an example together. `splittable`: parts of a file can be converted independently, with `how`.

    Args:
        rows: of one or several files; name: of the files, for messages; the others: see `Reading`.

    Raises:
        ConfigError: an unknown layout, an option that it does not have, or a limit below 1.
        DataError: the columns fit no known layout.
    """

    def __init__(
        self,
        rows: Iterable[Row | BadRow],
        name: str,
        shape: str = "auto",
        columns: Mapping[str, str] | None = None,
        identical: str = "bad_row",
        limit: int | None = None,
        layout_options: Mapping[str, Any] | None = None,
        keep_columns: bool = False,
        rollouts: bool = False,
        weight: str | None = None,
        image_dir: str | Path | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise ConfigError("limit", f"is {limit}", "give 1 or more")
        pictures: Any = None
        if image_dir is not None:
            from penchant.data.pictures import Pictures

            pictures = Pictures(Path(image_dir).expanduser())
        stream: Iterator[Row | BadRow] = itertools.islice(rows, limit)
        self.name = name
        self.detection: Detection | None = None
        explicit = shape != "auto"
        if explicit:
            layout_named(shape)  # raise for an unknown name before a file is read
        first_rows = list(itertools.islice(stream, FIRST_ROWS))
        self._absent = _check_columns(first_rows, name, columns or {}, limit is None)
        if not explicit:
            shape, self.detection, columns = detect_layout(
                first_rows, name, columns or {}, layout_options or {}, rollouts
            )
        if self._absent and limit is None:
            stream = self._check_absent_columns(stream)
        stream = itertools.chain(first_rows, stream)
        layout = layout_named(shape)
        options = layout.settings(layout_options or {})
        values = [rename_columns(r.values, columns or {}) for r in first_rows if isinstance(r, Row)]
        values = values if pictures is None else list(map(pictures.text, values))
        unused = (
            []
            if keep_columns
            else [c for c in layout.unused(values, options) if c not in COUNTED_COLUMNS and c != weight]
        )
        self.shape, self.kind, self.grouped = shape, layout.kind_of(options), layout.group is not None
        if not explicit:
            self._reject_typos(values, unused)
        self._digest = hashlib.sha256()
        settings = ConversionSettings(shape, options, columns or {}, identical, keep_columns, weight, pictures)
        super().__init__(settings, stream, self._digest.update)
        self.columns.unused = unused
        self.splittable = limit is None and not self.grouped and not self._absent  # whether rows are independent

    def _check_absent_columns(self, rows: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
        """Pass the rows through; raise at the end if data.columns names a column that none of them has."""
        present: set[str] = set()
        for row in rows:
            if self._absent and isinstance(row, Row):
                present.update(map(str, row.values))
                self._absent = {ours: theirs for ours, theirs in self._absent.items() if theirs not in present}
            yield row
        for ours, theirs in self._absent.items():
            raise _missing_column_error(self.name, ours, theirs, present)

    def _reject_typos(self, rows: Sequence[Mapping[str, Any]], unused: Sequence[str]) -> None:
        """Raise DataError if an unused column is a typo away from the name of one that would be read."""
        for column in unused[:NAMES_ASKED_ABOUT]:
            ours = likely_typo_of(column)
            if not ours or any(ours in row for row in rows):
                continue
            if ours == "system" or detect(rename_columns(r, {ours: column}) for r in rows).layout not in (
                None,
                self.shape,
            ):
                what = f'the column "{printable(column)}" would not be used (layout {self.shape}); is it "{ours}"?'
                raise DataError(
                    self.name,
                    what,
                    f"{_mapping_advice(ours, printable(column))}, or set {setting('data.shape', self.shape)}",
                )

    def load(self, on_bad_row: str) -> Dataset:
        """Load all trees into memory."""
        return self.dataset(tuple(self.trees(on_bad_row)))

    def dataset(self, trees: Sequence[PromptTree]) -> Dataset:
        """The data set, once all trees have been read.

        Raises:
            DataError: there are no trees.
        """
        aside = tuple(self.aside)
        if not trees:
            reasons = "; ".join(f"{n}x {what}" for what, n in Counter(q.what for q in aside).most_common(3))
            what = f"none of {counted(len(aside), 'row')} could be used ({reasons})"
            pictures = aside and all(q.how == PICTURES for q in aside)
            raise DataError(self.name, what, PICTURES if pictures else f"fix the rows or set {setting('data.shape')}")
        total, content = self.accepted + len(aside), self._digest.hexdigest()
        more = self.accepted, self.detection, self.columns
        return Dataset(trees, self.shape, self.kind, total, aside, content, *more)


def _check_columns(first: Sequence[Row | BadRow], name: str, columns: Mapping[str, str], eof: bool) -> dict[str, str]:
    """The mapped columns that none of the first rows has; later rows may have them.

    Args:
        eof: whether the file is read to its end.

    Raises:
        DataError: either side of the mapping has a typo, or there are no later rows.
    """
    present = {str(c) for r in first if isinstance(r, Row) for c in r.values}
    for ours, theirs in columns.items():
        if suggestion := likely_typo_of(ours):
            what = (
                f'{setting("data.columns")} maps "{printable(ours)}" to {printable(theirs)}, and there is no such field'
            )
            raise DataError(name, what, f'did you mean "{suggestion}"?')
    absent = {ours: theirs for ours, theirs in columns.items() if present and theirs not in present}
    for ours, theirs in absent.items():
        if (eof and len(first) < FIRST_ROWS) or closest(theirs, present, 0.8):
            raise _missing_column_error(name, ours, theirs, present)
    return absent


def _missing_column_error(name: str, field_name: str, column: str, available: Iterable[str]) -> DataError:
    what = (
        f'{setting("data.columns")} maps {printable(field_name)} to "{printable(column)}", and there is no such column'
    )
    suggestion = closest(column, available)
    how = f'did you mean "{printable(suggestion)}"? ' if suggestion else ""
    return DataError(name, what, f"{how}there are {', '.join(map(printable, sorted(available)))}")


def _mapping_advice(field_name: str, column: str) -> str:
    return f"map it with {setting('data.columns', {field_name: column})}"


def detect_layout(
    first: Sequence[Row | BadRow],
    name: str,
    columns: Mapping[str, str],
    options: Mapping[str, Any],
    rollouts: bool = False,
) -> tuple[str, Detection, Mapping[str, str]]:
    """Detect the layout of the first rows, and the columns to read under our names: those given, or other known ones.

    Args:
        rollouts: rows with a prompt and no known layout are prompts.

    Raises:
        DataError: they have no known layout.
    """
    rows = [rename_columns(r.values, columns) for r in first if isinstance(r, Row)]
    detection = detect(rows)
    if rollouts and detection.layout is None and rows:
        mapping = {ours: theirs for ours, theirs in alternative_columns(rows).items() if ours == "prompt"}
        if all("prompt" in rename_columns(row, mapping) for row in rows):
            prompt_note = f'"{mapping["prompt"]}" is read as prompt' if mapping else "column prompt"
            return "prompts", Detection("prompts", f"{prompt_note}; the others are for rewards"), {**columns, **mapping}
    mapping = (
        alternative_columns(rows)
        if not detection.how and (not detection.layout or LAYOUTS[detection.layout].kind == "sft")
        else {}
    )
    if detection.layout:  # only a label makes it another layout
        mapping = {ours: theirs for ours, theirs in mapping.items() if ours == "label" and not options}
    remapped = detect(rename_columns(row, mapping) for row in rows) if mapping else detection
    if mapping and remapped.layout and LAYOUTS[remapped.layout].kind in ("sft", "unpaired", "scored"):
        mapping_note = ", ".join(f'"{theirs}" is read as {ours}' for ours, theirs in mapping.items())
        return remapped.layout, replace(remapped, why=f"{remapped.why}; {mapping_note}"), {**columns, **mapping}
    if detection.layout is not None:
        return detection.layout, detection, columns
    bad = next((row for row in first if isinstance(row, BadRow)), None)
    if bad is not None:
        raise DataError(bad.where, bad.what, bad.how)
    if detection.how:
        raise DataError(name, detection.why, detection.how)
    column_names = sorted({printable(str(c)) for r in first if isinstance(r, Row) for c in r.values})
    typos = [(theirs, ours) for theirs in column_names if (ours := likely_typo_of(theirs)) and ours not in column_names]
    if typos:
        theirs, ours = typos[0]
        what = f'the columns ({", ".join(column_names)}) fit no known layout; is "{theirs}" your "{ours}"?'
        raise DataError(name, what, f"{_mapping_advice(ours, theirs)}, or name the layout with {setting('data.shape')}")
    if _looks_like_a_row(name, [r for r in first if isinstance(r, Row)]):
        raise DataError(
            name,
            f"its first line is read as the names of its columns ({', '.join(column_names)}), and they look like a row",
            "put a line with names in front, such as prompt,chosen,rejected or prompt,completion with this file's delimiter",
        )
    how = f"{_example_of(rows)}, or name the layout with {setting('data.shape')} (`penchant data formats` lists them)"
    raise DataError(name, f"the columns ({', '.join(column_names) or 'none'}) fit no known layout", how)


def _text_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that hold texts in every row, in the file's order."""
    nonempty = [row for row in rows if row]
    return [
        c
        for c in (nonempty[0] if nonempty else {})
        if all(isinstance(r.get(c), str) and r[c].strip() for r in nonempty)
    ]


def _example_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """An example of mapping columns, with this file's names if it has enough text columns; they may mean something else."""
    names = [printable(c)[:60] for c in _text_columns(rows)]
    ours = ("prompt", "chosen", "rejected") if len(names) > 2 else ("prompt", "completion")
    theirs = names if len(names) > 1 else ["question", "good", "bad"]
    ours = ours if len(names) > 1 else ("prompt", "chosen", "rejected")
    return f"map your columns, e.g. {setting('data.columns', dict(zip(ours, theirs, strict=False)))}"


LONG_NAME = 30  # characters: a column's name is a word or a few


def _looks_like_a_row(name: str, rows: Sequence[Row]) -> bool:
    """Whether the header of a table looks like a row of data: sentences or numbers."""
    if not re.search(r"\.(csv|tsv)\b", name) or not rows:
        return False
    columns = [str(c) for c in rows[0].values]
    return any(len(c) > LONG_NAME or re.search(r"[.!?]$", c.strip()) or finite(c) is not None for c in columns)


def fingerprint(trees: Iterable[PromptTree]) -> str:
    """SHA-256 over prompts, completions and further columns, in order."""
    digest = hashlib.sha256()
    for tree in trees:
        digest.update(content_of(tree))
    return digest.hexdigest()


def content_of(tree: PromptTree) -> bytes:
    """The bytes of a tree that go into a fingerprint."""
    further = json.dumps(tree.columns, sort_keys=True, default=str) if tree.columns else ""
    further += tree.tools + tree.template_options + ("" if tree.weight == 1.0 else repr(tree.weight))
    return (json.dumps(plain_content(tree)) + further + (str(tree.origin) if tree.origin else "")).encode()


def plain_content(tree: PromptTree) -> list[Any]:
    """A tree's prompt and completions as lists, for JSON."""

    def turn(m: Message, min_fields: int = 3) -> list[Any]:
        return _without_trailing_empty(
            [m.role, m.content, m.trained, m.reasoning, m.tool_calls, m.tool_call_id, m.name], min_fields
        )

    raw_prompt = tree.prompt
    prompt = raw_prompt if isinstance(raw_prompt, str) else [turn(m, 2) for m in raw_prompt]
    answers = [
        _without_trailing_empty([c.text, c.label, c.score, list(map(turn, c.more)), c.reasoning, c.tool_calls], 3)
        for c in tree.completions
    ]
    return [prompt, answers]


def _without_trailing_empty(values: list[Any], min_length: int) -> list[Any]:
    """The values without trailing empty ones, but at least the first `min_length`."""
    end = next((i for i in range(len(values), min_length, -1) if values[i - 1]), min_length)
    return values[
        : end + (end == min_length + 1 == 4)
    ]  # fingerprints: a fourth value has always been written with a fifth


def prompt_json(prompt: Prompt) -> str | list[dict[str, Any]]:
    """A prompt as text, or as role/content messages."""
    return prompt if isinstance(prompt, str) else list(map(message_json, prompt))


def message_json(message: Message) -> dict[str, Any]:
    """A turn in the format of chat APIs and chat templates."""
    extra: dict[str, Any] = {"reasoning_content": message.reasoning} if message.reasoning else {}
    if message.tool_calls:
        extra["tool_calls"] = json.loads(message.tool_calls)
    extra |= {n: v for n in ("tool_call_id", "name") if (v := getattr(message, n))}
    return {"role": message.role, "content": message.content, **extra}


def template_variables(tree: PromptTree) -> dict[str, Any]:
    """The variables that a tree's row passes to the chat template besides its turns."""
    options: dict[str, Any] = json.loads(tree.template_options) if tree.template_options else {}
    return {**options, **({"tools": json.loads(tree.tools)} if tree.tools else {})}


def answer_turn(completion: Completion) -> Message:
    """A completion's text as an assistant turn."""
    return Message("assistant", completion.text, reasoning=completion.reasoning, tool_calls=completion.tool_calls)


def turns_of(prompt: Prompt | None) -> dict[str, Any]:
    """``{"messages": ...}`` of a conversation, as files store it next to the prompt's text; empty for a text."""
    return {} if prompt is None or isinstance(prompt, str) else {"messages": prompt_json(prompt)}


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one string, for comparing and showing."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m.role}: {m.said}" for m in prompt)


def first_text(tree: PromptTree) -> str:
    """The first completion's text; empty if there is none."""
    return tree.completions[0].text if tree.completions else ""


def summary(dataset: Dataset) -> str:
    """``1,700 rows (pairs) = 1,698 accepted + 2 kept aside (2 x ...)``."""
    reasons = Counter(q.what for q in dataset.quarantined)
    return summary_of(dataset.shape, dataset.accepted, reasons, len(dataset.quarantined), len(dataset.trees))


def summary_of(shape: str, accepted: int, reasons: Counter[str], quarantined: int, examples: int) -> str:
    """`summary` from counts."""
    reason_note = f" ({_reason_counts(reasons)})" if reasons else ""
    example_note = f", {counted(examples, 'example')}" if examples != accepted else ""
    return f"{counted(accepted + quarantined, 'row')} ({shape}) = {accepted:,} accepted + {quarantined:,} kept aside{reason_note}{example_note}"


def _reason_counts(reasons: Counter[str]) -> str:
    return "; ".join(f"{n} x {what}" for what, n in reasons.most_common(4))


def reasons_of(dataset: Dataset) -> str:
    """``3 x "chosen" is empty; ...``: why rows are kept aside, the most frequent reasons first."""
    return printable(_reason_counts(Counter(q.what for q in dataset.quarantined)))


def unused_of(rows: Dataset | Stream) -> str:
    """The unused columns, for a sentence; empty if there are none or they are unknown."""
    names = [printable(str(c)) for c in rows.columns.unused] if rows.columns else []
    rest = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + rest


def layout_line(rows: Dataset | Stream, path: str | Sequence[str]) -> str:
    """``train.jsonl: layout hh (columns chosen, rejected hold ...); other fits: pairs; override with data.shape=NAME``."""
    name = ", ".join(map(shown_path, [path] if isinstance(path, str) else path))
    unused = unused_of(rows)
    suffix = f"; not used: {unused}" if unused else ""
    if rows.detection is None:
        return f"{name}: layout {rows.shape}, as {setting('data.shape')} says{suffix}"
    return rows.detection.sentence(name, setting("data.shape", "NAME")) + suffix


def shown_path(path: str) -> str:
    """A file's name without its folder; a hub id as it is."""
    return Path(path).name if Path(path).exists() else path


def write_quarantine(quarantined: Sequence[Quarantined], folder: Path, name: str) -> Path | None:
    """Write rows kept aside to ``quarantine.NAME.jsonl``; if there are none, remove that file and return None."""
    path = folder / f"quarantine.{name}.jsonl"
    if not quarantined:
        path.unlink(missing_ok=True)
        return None
    lines = [json_line({"where": q.where, "what": q.what, "how": q.how, "row": q.raw}) for q in quarantined]
    write_text_atomically(path, b"".join(lines))
    return path


def json_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of a JSONL file."""
    try:
        line = json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:  # half of a surrogate pair can only be written as an escape
        line = json.dumps(row, default=str).encode()
    return line + b"\n"
