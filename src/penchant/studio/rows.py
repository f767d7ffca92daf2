"""A data file opened for browsing: random access to its rows, examples, search, filters, edits and tokens."""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import re
import threading
import time
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from penchant.base.files import append_line, writing
from penchant.base.text import printable
from penchant.data.audit.fix import Edit, content_sum, read_edits
from penchant.data.layouts import LAYOUTS
from penchant.data.layouts.page import NAMES, PAIR_NAMES
from penchant.data.load import FIRST_ROWS, Converted, Stream, convert_rows, detect_layout
from penchant.data.read import BadRow, Bounds, Row, ending, read_rows
from penchant.data.read.json_text import is_lines, json_lines
from penchant.data.read.source import SHOWN, Source
from penchant.errors import DataError, PenchantError
from penchant.runfolder.values import text
from penchant.types import Completion, PromptTree

STEP = 256  # an offset is stored every this many lines
BLOCK = 1 << 20  # bytes read at once while counting lines
PAGE_BYTES = 8 << 20  # limit on one page of rows
SECONDS = 0.4  # time limit of a search within one request; the page says where it stopped
ROWS = 20  # per page
LOOKED_AT = 200  # rows read at once while filtering


# ---- Line offsets ----


class LineIndex:
    """Offsets of a file's lines, found on demand; only one in `STEP` is stored.

    Args:
        path: a file whose lines end with LF.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self._offsets = array("q", [0])  # offset of line 1, 1 + STEP, ...
        self._scanned = self._line_ends = 0  # bytes scanned, and line ends found in them
        self._last = b""
        self._lock = threading.Lock()

    @property
    def total(self) -> int | None:
        """Number of lines, or None if the file has not been read to its end yet."""
        return None if self._scanned < self.size else self._line_ends + (self._last not in (b"", b"\n"))

    @property
    def guess(self) -> int:
        """Estimated number of lines, based on the part read so far."""
        return self.total or round(self._line_ends * self.size / self._scanned) if self._scanned else 0

    def scan(self, line: int | None = None, seconds: float = SECONDS) -> None:
        """Scan further, up to a line (None: to the end), for at most this many seconds."""
        deadline = time.monotonic() + seconds
        with self._lock, self.path.open("rb") as file:
            file.seek(self._scanned)
            while (
                self._scanned < self.size and (line is None or self._line_ends < line) and time.monotonic() < deadline
            ):
                block = file.read(min(BLOCK, self.size - self._scanned))
                if not block:
                    self.size = self._scanned  # the file has been truncated
                    return
                newlines = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == 10)
                first = (STEP - 1 - self._line_ends) % STEP
                self._offsets.extend((newlines[first::STEP] + (self._scanned + 1)).tolist())
                self._line_ends += len(newlines)
                self._scanned += len(block)
                self._last = block[-1:]

    def offset(self, line: int) -> int | None:
        """Return the byte offset of a line, counted from 1, or None if there is no such line."""
        if line > 1:
            self.scan(line, 60.0)
        if line < 1 or line > self._line_ends + 1:
            return None
        index, remainder = divmod(line - 1, STEP)
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            for _ in range(remainder):
                file.readline()
            return file.tell() if file.tell() < self.size else None


# ---- Rows and their examples ----


@dataclass(frozen=True, slots=True)
class Item:
    """A row, or a group of rows that form examples together.

    Args:
        number: its row number, where a page of the file can start; where: its place; values: the row's columns, None if unreadable.
        aside: (what, how) if it is quarantined; left_out: excluded by an option, with nothing wrong with it.
        edited: ``changed`` or ``dropped`` if a person edited it.
    """

    number: int
    where: str
    values: Mapping[str, Any] | None
    raw: Any
    trees: tuple[PromptTree, ...] = ()
    aside: tuple[str, str] | None = None
    left_out: bool = False
    edited: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """Items, the number at which the next page starts (None on the last page), and the number of the last row scanned."""

    items: tuple[Item, ...]
    next: int | None
    upto: int


ItemFilter = Callable[[Item], bool]


class File:
    """A file of rows.

    Args:
        path: path of the file; shape: a layout, or ``auto``.

    Raises:
        DataError: it cannot be read.
    """

    def __init__(self, path: Path, shape: str = "auto") -> None:
        self.path, self.name, self.shape, self.seen = path, path.name, shape, stamp(path)
        self.bounds = Bounds()
        self.lines = LineIndex(path) if self._has_line_offsets() else None
        self._cursor: tuple[Iterator[Any], int] | None = None
        self._lock = threading.Lock()
        first_rows = self._first_rows()
        self.problem = ""  # why its rows cannot be turned into examples
        self.columns: Mapping[str, str] = {}
        self.layout, self.why = "", ""
        try:
            if shape == "auto":
                self.layout, detection, self.columns = detect_layout(first_rows, self.name, {}, {})
                self.why = detection.why
            else:
                self.layout = shape
            self.grouped = LAYOUTS[self.layout].group is not None
            self.kind = LAYOUTS[self.layout].kind_of({})
        except (PenchantError, KeyError) as error:
            self.layout, self.grouped, self.kind = "", False, ""
            self.problem = str(error)

    def _has_line_offsets(self) -> bool:
        if ending(self.name) not in (".jsonl", ".json", ".ndjson") or self.name.lower().endswith(".gz"):
            return False
        with self.path.open("rb") as stream:
            source = Source(stream, self.name, self.bounds)
            return b"\n" in source.head and is_lines(source)

    def _first_rows(self) -> list[Row | BadRow]:
        if self.lines is not None:
            return self._read_chunk(1, FIRST_ROWS)[0]
        rows = read_rows(str(self.path), self.bounds)
        return [row for _, row in zip(range(FIRST_ROWS), rows, strict=False)]

    def page(self, start: int = 1, max_rows: int = ROWS, wanted: ItemFilter | None = None, needle: str = "") -> Page:
        """Return a page of rows, beginning at a row number.

        Args:
            wanted: filter; needle: text that the rows must contain, ignoring case. With either, the search stops after `SECONDS`.
        """
        start = max(1, start)
        matching: list[Item] = []
        deadline = time.monotonic() + SECONDS
        searching = wanted is not None or bool(needle)
        batch_size = max_rows if wanted is None else max(max_rows, LOOKED_AT)
        for items, upto, at_end in self._batches(start, batch_size, needle):
            matching += [item for item in items if wanted is None or wanted(item)]
            if at_end:
                return Page(tuple(matching[:max_rows]), _next_number(matching, max_rows), upto)
            if not searching or len(matching) >= max_rows or time.monotonic() > deadline:
                return Page(tuple(matching[:max_rows]), _next_number(matching, max_rows) or upto + 1, upto)
        return Page(tuple(matching[:max_rows]), None, start)

    def _batches(self, start: int, batch_size: int, needle: str) -> Iterator[tuple[list[Item], int, bool]]:
        """Yield (items, number of the last row scanned, whether it is the last in the file), one batch at a time."""
        needle_bytes = search_bytes(needle)
        if self.lines is not None and not self.grouped:
            while True:
                rows, upto, at_end = self._read_chunk(start, batch_size, needle_bytes)
                rows = [
                    row for row in rows if not needle or isinstance(row, BadRow) or contains_text(row.values, needle)
                ]
                yield self._items(rows), upto, at_end
                start = upto + 1
                if at_end:
                    return
        with self._lock:
            units = self._units(start)
            while True:
                batch = [unit for _, unit in zip(range(batch_size), units, strict=False)]
                self._cursor = (units, start + len(batch))
                converted = [*self._convert_batch(batch, start)]
                matching = [item for item in converted if not needle or contains_text(item.raw, needle)]
                yield matching, start + len(batch) - 1, len(batch) < batch_size
                start += len(batch)
                if len(batch) < batch_size:
                    return

    def _units(self, start: int) -> Iterator[Any]:
        """Iterate over the rows (or converted groups of rows) from a number on, for files without line offsets."""
        if self._cursor is not None and self._cursor[1] == start:
            return self._cursor[0]
        rows = read_rows(str(self.path), self.bounds)
        units: Iterator[Any] = iter(Stream(rows, self.name, shape=self.layout)) if self.grouped else rows
        for _ in zip(range(start - 1), units, strict=False):
            pass
        return units

    def _convert_batch(self, batch: Sequence[Any], start: int) -> Iterator[Item]:
        if not self.grouped:
            yield from self._convert_rows(batch, [*range(start, start + len(batch))])
            return
        for number, converted in enumerate(batch, start):
            yield _make_item(converted, number)

    def _read_chunk(self, start: int, max_lines: int, word: bytes = b"") -> tuple[list[Row | BadRow], int, bool]:
        """Return (rows of the next non-blank lines, number of the last line read, whether it is the last in the file)."""
        assert self.lines is not None
        offset = self.lines.offset(start)
        if offset is None:
            return [], start, True
        kept_lines: list[tuple[int, bytes]] = []
        too_long: set[int] = set()
        byte_count, number, at_end, deadline = 0, start - 1, False, time.monotonic() + SECONDS
        with self.path.open("rb") as file:
            file.seek(offset)
            while len(kept_lines) < max_lines and byte_count < PAGE_BYTES:
                line = file.readline(self.bounds.bytes + 2)
                if not line:
                    at_end = True
                    break
                number += 1
                if len(line) > self.bounds.bytes + 1 and not line.endswith(b"\n"):
                    too_long.add(number)
                    while (tail := file.readline(BLOCK)) and not tail.endswith(b"\n"):
                        pass
                    if not word:
                        kept_lines.append((number, line[:SHOWN]))
                elif line.strip() and (not word or word in line.lower()):
                    kept_lines.append((number, line))
                    byte_count += len(line)
                if number % 1000 == 0 and time.monotonic() > deadline:
                    break
            at_end = at_end or not file.read(1)
        rows: list[Row | BadRow] = []
        for line_number, line in kept_lines:  # parse each line by itself, so that no line affects how another is read
            source = Source(io.BytesIO(line), self.name, self.bounds)
            if line_number in too_long:
                bad_row = source.too_long(f"{self.name}:{line_number}", "the line")
                what = f"{bad_row.what}, and training refuses the file"
                rows.append(BadRow(bad_row.where, what, bad_row.how, line.decode("utf-8", "backslashreplace")))
                continue
            rows += [replace(row, where=f"{self.name}:{line_number}") for row in json_lines(source)]
        return rows, max(number, start), at_end

    def _items(self, rows: Sequence[Row | BadRow]) -> list[Item]:
        return [*self._convert_rows(rows, [int(row.where.rpartition(":")[2]) for row in rows])]

    def _convert_rows(self, rows: Sequence[Row | BadRow], numbers: Sequence[int]) -> Iterator[Item]:
        if not self.layout:
            for row, number in zip(rows, numbers, strict=True):
                yield _quarantined_item(row, number) or _unconverted_item(row, number)
            return
        layout = LAYOUTS[self.layout]
        converted = convert_rows(rows, layout, layout.settings({}), self.columns)
        for row, converted_row, number in zip(rows, converted, numbers, strict=True):
            yield _quarantined_item(row, number) or _make_item(converted_row, number)

    def editable(self, item: Item) -> bool:
        """Return True if the row can be replaced in a copy, that is, if it forms an example by itself."""
        return item.values is not None and not self.grouped and len(item.trees) <= 1

    def convert(self, values: Mapping[str, Any], where: str) -> Item:
        """Convert a row to an item."""
        (item,) = self._convert_rows([Row(where, values)], [0])
        return item


def stamp(path: Path) -> tuple[int, int, int]:
    """Return (inode, size, mtime), which change if a file is replaced or modified."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _next_number(items: Sequence[Item], max_rows: int) -> int | None:
    """Return the number of the first item that did not fit on a page, or None if all fit."""
    return items[max_rows].number if len(items) > max_rows else None


QUARANTINE = {"where", "what", "how", "row"}  # columns of a quarantined row


def _quarantined_item(row: Row | BadRow, number: int) -> Item | None:
    """Return the item for a line of quarantine.NAME.jsonl: the quarantined row with its reason; None for any other row."""
    if not isinstance(row, Row) or set(row.values) != QUARANTINE:
        return None
    where, what, how = (text(row.values[key]) for key in ("where", "what", "how"))
    return Item(number, where, None, row.values["row"], aside=(what, how))


def _unconverted_item(row: Row | BadRow, number: int) -> Item:
    if isinstance(row, BadRow):
        return Item(number, row.where, None, row.raw, aside=(row.what, row.how))
    return Item(number, row.where, row.values, row.values)


def _make_item(converted: Converted, number: int) -> Item:
    first = converted.source[0]
    values = first.values if isinstance(first, Row) else None
    raw = first.raw if isinstance(first, BadRow) else first.values
    if len(converted.source) > 1:
        raw = [row.values if isinstance(row, Row) else row.raw for row in converted.source]
        values = None
    aside = (converted.aside[0].what, converted.aside[0].how) if converted.aside else None
    return Item(number, first.where, values, raw, converted.trees, aside, converted.left_out)


# ---- Search and filters ----


def search_bytes(word: str) -> bytes:
    """Return lower-case bytes that every JSON line containing the text must contain: its longest part that no writer of JSON escapes."""
    return max(re.findall(r"[ 0-9a-z]+", word.lower()), key=len, default="").encode()


def contains_text(raw: Any, word: str) -> bool:
    """Return True if a row contains a text, ignoring case."""
    needle = json.dumps(word.lower(), ensure_ascii=False)[1:-1]
    return needle in json.dumps(raw, ensure_ascii=False, default=str).lower()


def is_quarantined(item: Item) -> bool:
    """Return True if a row is quarantined rather than left out by an option."""
    return item.aside is not None and not item.left_out


PLACE = re.compile(r"^(.*?:(?: row )?\d+)(?:#\d+)?(?: \(.*\))?$", re.DOTALL)


def rows_of_places(where: Collection[str]) -> list[str]:
    """Return the rows that an audit's places refer to: ``train.jsonl:12 (as train.jsonl:3)`` is line 12."""
    return [place_match[1] for place in where if (place_match := PLACE.match(place))]


def line_numbers(where: Sequence[str]) -> list[int]:
    """Return the line numbers of places."""
    return [int(re.sub(r".*\D", "", place)) for place in where]


# ---- Display of a tree ----

Words = list[tuple[str, str]]  # ("", text) if both answers contain it, ("in", text) if only this one does


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion for display; `words` marks its differences from the other answer of a pair."""

    name: str
    kind: str
    said: str
    reasoning: str
    more: tuple[tuple[str, str, bool], ...]
    words: Words


def answers_of(tree: PromptTree, diff: bool = False) -> list[Answer]:
    """Return the completions of a tree for display."""
    is_pair = [c.label for c in tree.completions] == [True, False]
    words: tuple[Words, Words] = ([], [])
    if is_pair and diff:
        words = diff_words(*(c.whole for c in tree.completions))
    return [_answer(c, is_pair, words[i] if is_pair and diff else []) for i, c in enumerate(tree.completions)]


def _answer(c: Completion, is_pair: bool, words: Words) -> Answer:
    kind = {True: "chosen", False: "rejected", None: "assistant"}[c.label]
    score = "" if c.score is None else f", score {c.score:g}"
    more = tuple((m.role, m.content, m.trained and m.role == "assistant") for m in c.more)
    return Answer((PAIR_NAMES if is_pair else NAMES)[c.label] + score, kind, c.text, c.reasoning, more, words)


def turns_of(tree: PromptTree) -> list[tuple[str, str, str]]:
    """Return (role, text, reasoning) for each turn of a prompt."""
    if isinstance(tree.prompt, str):
        return [("prompt", tree.prompt, "")] if tree.prompt else []
    return [(m.role, m.content, m.reasoning) for m in tree.prompt]


MAX_WORD_PRODUCT = 1_000_000  # product of the word counts; comparing longer texts takes seconds


def diff_words(a: str, b: str) -> tuple[Words, Words]:
    """Compare two texts word by word and mark what only one contains; texts too long to compare are returned unmarked."""
    words_a, words_b = (re.findall(r"\s+|\w+|[^\w\s]", answer) for answer in (a, b))
    if len(words_a) * len(words_b) > MAX_WORD_PRODUCT:
        return [("", a)], [("", b)]
    left: Words = []
    right: Words = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, words_a, words_b, autojunk=False).get_opcodes():
        mark = "" if kind == "equal" else "in"
        left += [(mark, "".join(words_a[i:j]))] * (j > i)
        right += [(mark, "".join(words_b[k:m]))] * (m > k)
    return left, right


def as_json(raw: Any) -> str:
    """Format a row as JSON for reading and editing, with unprintable characters escaped."""
    return printable(json.dumps(raw, ensure_ascii=False, indent=1, default=str), keep="\n")


# ---- Edits ----


class Edits:
    """A person's edits of a data file, appended to a file under ``.studio/`` as they are made.

    Args:
        root: the studio's folder; path: path of the data file, relative to `root`.
    """

    def __init__(self, root: Path, path: str) -> None:
        self.root, self.path = root, path
        name = quote(path, safe="")
        if len(name) > 200:
            name = f"{hashlib.sha256(path.encode()).hexdigest()[:16]}-{name[-180:]}"
        self.file = root / ".studio" / "edits" / f"{name}.jsonl"
        if not self.file.resolve().is_relative_to(root):
            raise DataError(".studio", "is a link that leads out of the studio's folder", "remove the link")
        self._lock = threading.Lock()

    def latest(self) -> dict[str, Edit]:
        """Return the last edit of each row, by the row's place."""
        return read_edits(self.file) if self.file.is_file() else {}

    def add(self, where: str, action: str, was: str = "", row: Mapping[str, Any] | None = None) -> None:
        """Append an edit: ``changed``, ``dropped`` or ``undone``."""
        record = {
            "where": where,
            "action": action,
            "was": was,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        with self._lock, writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            append_line(self.file, record | ({"row": dict(row)} if row is not None else {}))


def parse_edited_row(json_text: str) -> dict[str, Any]:
    """Parse a row that a person typed as JSON.

    Raises:
        DataError: it is not a row.
    """
    rows = [*json_lines(Source(io.BytesIO(to_json_line(json_text)), "the row", Bounds()))]
    if len(rows) != 1 or isinstance(rows[0], BadRow):
        what = rows[0].what if rows and isinstance(rows[0], BadRow) else "is empty"
        raise DataError("the row", what, "write one JSON object")
    return dict(rows[0].values)


def to_json_line(json_text: str) -> bytes:
    """Join JSON into one line; its line breaks can only be white space, unless it is invalid anyway."""
    return json_text.replace("\r", " ").replace("\n", " ").encode("utf-8", "surrogatepass")


def content_hash(item: Item) -> str:
    """Return the content hash by which an edit recognizes its row; empty if the row has no values."""
    return "" if item.values is None else content_sum(item.values)


# ---- Tokens ----


@dataclass(frozen=True, slots=True)
class Token:
    """A token for display; `kind` is ``prompt``, ``trained``, ``masked`` (in a turn that is not trained on) or ``cut``."""

    text: str
    id: int
    kind: str


def tokens_of(tree: PromptTree, kind: str, tokenizer: Any, options: Mapping[str, Any]) -> list[tuple[str, list[Token]]]:
    """Return (name, tokens) for a tree's prompt and each completion as in training, including the tokens lost to truncation.

    Args:
        kind: kind of the data; options: options of `CausalTokenization`.

    Raises:
        DataError: the row would be quarantined; gives the reason.
    """
    from penchant.data.tokenize import CausalTokenization

    def tokenize(**more: Any) -> list[Any]:
        tokenized = CausalTokenization(tokenizer, kind, **{**options, **more, "on_bad_row": "error"}).all([tree])
        return list(tokenized.trees)

    sections: list[tuple[str, list[Token]]] = []
    cut_trees, full_trees = tokenize(), tokenize(max_length=1 << 24, identical="keep")
    names = [a.name for a in answers_of(tree)]
    for number, cut in enumerate(cut_trees):
        full = full_trees[number] if len(full_trees) == len(cut_trees) else cut
        truncated = len(full.prompt_ids) - len(cut.prompt_ids)
        bos = (
            1
            if truncated and len(cut.prompt_ids) and full.prompt_ids[0] == cut.prompt_ids[0] == tokenizer.bos_token_id
            else 0
        )
        kinds = ["prompt"] * bos + ["cut"] * truncated + ["prompt"] * len(full.prompt_ids)
        prompt = _display_tokens(tokenizer, full.prompt_ids, kinds)
        sections.append(("prompt" if len(cut_trees) == 1 else f"part {number + 1}", prompt))
        for i, ids in enumerate(cut.completion_ids):
            masks = cut.masks[i] if cut.masks else [True] * len(ids)
            full_ids = [*ids, *full.completion_ids[i][len(ids) :]]
            kinds = ["trained" if m else "masked" for m in masks] + ["cut"] * (len(full_ids) - len(masks))
            tokens = _display_tokens(tokenizer, full_ids, kinds, cut.prompt_ids[-1:])
            sections.append((names[i] if len(names) == len(cut.completion_ids) else "answer", tokens))
    return sections


def _display_tokens(
    tokenizer: Any, ids: Sequence[int], kinds: Sequence[str], before: Sequence[int] = ()
) -> list[Token]:
    """Return the tokens, each with the text it adds to the one before: decoded alone, many would lose their leading space."""

    def decode(*token_ids: int) -> str:
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    tokens: list[Token] = []
    previous = [int(i) for i in before]
    for token_id, kind in zip(map(int, ids), kinds, strict=False):
        # a partial character adds no text, so it is shown as it decodes alone
        tokens.append(Token(decode(*previous, token_id)[len(decode(*previous)) :] or decode(token_id), token_id, kind))
        previous = [token_id]
    return tokens
