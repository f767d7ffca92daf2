"""Rows of JSON text: one per line, in lists, or as objects over several lines."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from penchant.base.text import printable, repeated
from penchant.data.read.files import ending
from penchant.data.read.source import CHUNK, SHOWN, BadRow, Bounds, Row, Rows, Source, not_utf8
from penchant.errors import DataError

HOPELESS = 200_000  # a value that is nested deeper is not scanned to its end
LISTS = ("data", "rows", "train")  # keys under which a JSON object may hold its list of rows


def read_json(source: Source) -> Rows:
    """Rows line by line, lists of rows, objects over several lines, or one object that holds a list of rows.

    The content decides, not the ending, since publishers mix up the endings.
    """
    yield from json_lines(source) if is_lines(source) else _Values(source).rows()


def is_lines(source: Source) -> bool:
    """Whether a JSON file has one row per line."""
    start = b"".join(source.head.removeprefix(codecs.BOM_UTF8).split())[:2]
    lists = (b"[{", b"[]", b"[") if ending(source.name) != ".json" else start[:1] + start[1:2]
    return not ((start[:1] == b"[" and start in lists) or (start[:1] == b"{" and _spans_lines(source)))


def _spans_lines(source: Source) -> bool:
    """Whether a file that starts with an object is not JSONL: the object spans lines, or is the only one and holds a list of rows."""
    try:
        texts = list(_first_lines(source))
    except DataError:  # a line over the bound, which may be a list of many rows
        return _HAS_LIST.search(source.head.decode("utf-8", "replace")) is not None
    finally:
        source.rewind()
    if any(isinstance(text, BadRow) for text in texts):
        return False
    first, second = [*map(str, texts), ""][:2]
    decoder = _Decoder()
    row = _json_line("", first, source.bounds, decoder)
    if isinstance(row, Row):
        return not second and any(_holds_rows(row.values.get(name)) for name in LISTS)
    if not second or (isinstance(_json_line("", second, source.bounds, decoder), Row) and not _HAS_LIST.search(first)):
        return False
    return not second.lstrip().startswith("{") or _HAS_LIST.search(first) is not None


_HAS_LIST = re.compile(rf'"({"|".join(LISTS)})"\s*:\s*\[\s*(\{{|$)')


def _first_lines(source: Source) -> Iterator[str | BadRow]:
    """The first two lines that are not blank."""
    count = 0
    for _, text in source.texts():
        if isinstance(text, BadRow) or text.strip():
            yield text
            count += 1
        if count == 2:
            return


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(row, dict) for row in value)


def json_lines(source: Source) -> Rows:
    """One row per non-blank line."""
    decoder = _Decoder()
    for where, text in source.texts():
        if isinstance(text, BadRow):
            yield text
        elif text.strip():
            yield _json_line(where, text, source.bounds, decoder)


class _Decoder:
    """Reads JSON like `json`, and notes what `json` accepts or cannot make: repeated keys, and integers of too many digits."""

    def __init__(self) -> None:
        self.odd: tuple[str, str] | None = None  # what is wrong with the last value read, and how to fix it
        self._fast = json.JSONDecoder(object_pairs_hook=self._object)
        self._slow = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._integer)

    def read(self, text: str, start: int) -> tuple[Any, int]:
        """The value at a position, and where it ends.

        Raises:
            json.JSONDecodeError: it is not JSON. RecursionError: it is nested too deep for Python.
        """
        self.odd = None
        try:
            return self._fast.raw_decode(text, start)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer with more digits than Python reads
            return self._slow.raw_decode(text, start)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            self.odd = _duplicate_keys_message(repeated(name for name, _ in pairs)[0])
        return members

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            self.odd = f"holds an integer of {len(digits):,} digits", "write it as a string, or drop the row"
            return 0


def _duplicate_keys_message(key: str) -> tuple[str, str]:
    return f'an object has the key "{printable(key[:100])}" twice', "keep one of them"


def _json_line(where: str, text: str, bounds: Bounds, decoder: _Decoder) -> Row | BadRow:
    at = _skip(text, 0)
    try:
        value, end = decoder.read(text, at)
        if _skip(text, end) < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            what = f"has more text after the JSON value (column {_skip(text, error.pos) + 1})"
            return BadRow(where, what, "write one row a line", text[:SHOWN])
        cut = error.pos >= len(text.rstrip()) - 1 or "Unterminated" in error.msg
        what = "the line ends in the middle of a JSON value" if cut else f"is not valid JSON (column {error.colno})"
        how = "the file was cut; copy it again or drop the line" if cut else "fix the line or drop it"
        return BadRow(where, what, how, text[:SHOWN])
    except RecursionError:
        return _too_deep(where, text, bounds)
    return _row(where, value, decoder, text, at, end, bounds)


def _row(where: str, value: Any, decoder: _Decoder, text: str, start: int, end: int, bounds: Bounds) -> Row | BadRow:
    """A value that was read from a text, as a row."""
    if decoder.odd is not None:
        return BadRow(where, *decoder.odd, text[start : min(end, start + SHOWN)])
    brackets = text.count("[", start, end) + text.count("{", start, end)
    if brackets > bounds.nesting and _end(text[start:end])[1] > bounds.nesting:
        return _too_deep(where, text[start : start + SHOWN], bounds)
    if isinstance(value, dict):
        return Row(where, value)
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    what = f"is a JSON {names[type(value)]}, not an object"
    return BadRow(
        where, what, 'write {"prompt": ..., "chosen": ..., "rejected": ...}', text[start : min(end, start + SHOWN)]
    )


def _too_deep(where: str, text: str, bounds: Bounds) -> BadRow:
    what = f"is nested more than {bounds.nesting} deep"
    return BadRow(where, what, bounds.how("nesting", "flatten the row"), text[:SHOWN])


_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def _end(text: str, start: int = 0) -> tuple[int, int]:
    """Where a list or object ends (-1: not in this text), and how deep it is nested."""
    depth = deepest = 0
    for token in _TOKENS.finditer(text, start):
        if token[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
            if depth > HOPELESS:
                break
        elif token[0] in "]}":
            depth -= 1
            if depth <= 0:
                return token.end(), deepest
    return -1, deepest


_SPACE = re.compile(r"[ \t\r\n\ufeff]*")  # concatenated files have byte order marks inside


def _skip(text: str, start: int) -> int:
    return _SPACE.match(text, start).end()  # type: ignore[union-attr]  # it matches nothing too


class _Values:
    """The JSON values of a file, one after the other, read in blocks."""

    def __init__(self, source: Source) -> None:
        self.source, self.name, self.bounds = source, source.name, source.bounds
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._text, self._position, self._ended = "", 0, False
        self._line, self._counted_to, self._lines = 1, 0, 0  # the line number at `_counted_to`; line ends read so far
        self._dropped_chars = 0  # characters before the held text
        self._number, self._last_line = 0, 0  # number of rows, and the line of the last one
        self._decoder = _Decoder()

    def rows(self) -> Rows:
        """The rows of all lists, and all objects."""
        kind, count = "", 0
        while start := self._peek():
            count += 1
            if start == "[":
                kind = "list"
                yield from self._list()
            elif start == "{":
                row, names = yield from self._object()
                kind = "object"
                if row is not None and count == 1 and not self._peek():
                    listing = ", ".join(printable(n) for n in names[:6]) or "nothing"
                    what = f'is one JSON object over several lines without a "data" list (it holds {listing})'
                    raise DataError(self.name, what, "give a list of objects, or JSONL")
                if row is not None:
                    yield row
            else:
                what = f"is not JSON, after a JSON {kind}" if kind else "is not JSON"
                raise DataError(self._place(), what, "give a list of objects, or JSONL")

    def _list(self) -> Rows:
        self._position += 1
        number = 0
        while (following := self._peek()) != "]":
            if number and following == ",":
                self._position += 1
                self._peek()
            elif number and following:
                raise self._invalid(f"no comma after row {self._number}")
            yield self._value(f"row {self._number + 1}", row=True)
            number += 1
        self._position += 1

    def _object(self) -> Any:
        """Read an object: yield the rows of its list; return the object as a row if it has none, and its keys."""
        line, list_key = self._line_number(), ""
        members: dict[str, Any] = {}
        columns: set[str] = set()
        size, problem, separator = 0, None, ""
        self._position += 1
        while self._peek() != "}":
            if separator:
                self._expect(",")
            separator = ","
            key, _ = self._value("a key")
            if not isinstance(key, str):
                raise self._invalid("a key is not a string")
            self._expect(":")
            if key in LISTS and self._peek() == "[" and self._starts_rows():
                if list_key:
                    raise self._two_lists_error(list_key, key)
                list_key = key
                for row in self._list():
                    columns = columns or set(row.values if isinstance(row, Row) else ())
                    yield row
                continue
            start = self._dropped_chars + self._position
            value, value_problem = self._value(f'the value of "{printable(key[:100])}"')
            size += self._dropped_chars + self._position - start
            if size > self.bounds.bytes:
                raise self.source.too_long(f"{self.name}:{line}", "the object")
            if key in members:
                problem = _duplicate_keys_message(key)
            problem = problem or value_problem
            members[key] = value
        self._position += 1
        for key, value in members.items() if list_key else ():
            if _holds_rows(value) and (key in LISTS or columns & {k for r in value if isinstance(r, dict) for k in r}):
                raise self._two_lists_error(list_key, key)
        if list_key:
            return None, []
        where = self._row_place(line)
        return (BadRow(where, *problem, str(members)[:SHOWN]) if problem else Row(where, members)), list(members)

    def _two_lists_error(self, first_key: str, second_key: str) -> DataError:
        what = f'holds two lists of rows, "{printable(first_key)}" and "{printable(second_key[:100])}"'
        return DataError(self.name, what, "write each to a file of its own, and name those that you mean")

    def _starts_rows(self) -> bool:
        """Whether the list here starts with an object."""
        at = self._position
        while (position := _skip(self._text, at + 1)) >= len(self._text) and not self._ended:
            self._read_more(CHUNK)
            at = self._position
        return self._text[position : position + 1] == "{"

    def _expect(self, mark: str) -> None:
        if self._peek() != mark:
            raise self._invalid(f"no {mark!r} there")
        self._position += 1
        self._peek()

    def _value(self, what: str, row: bool = False) -> Any:
        """The value at this position, as a row or with what is wrong with it."""
        size = CHUNK
        where = self._row_place(self._line_number()) if row else ""
        while True:
            try:
                value, end = self._decoder.read(self._text, self._position)
                too_deep = False
            except RecursionError:
                (end, depth), value, too_deep = _end(self._text, self._position), None, True
                if depth > HOPELESS:
                    bad = _too_deep(self._place(), "", self.bounds)
                    raise DataError(bad.where, bad.what, bad.how) from None
            except json.JSONDecodeError as error:
                cut = error.pos > len(self._text) - 16 or error.msg.startswith("Unterminated")
                if self._ended or not cut:
                    fault = (
                        "is not closed: the file ends"
                        if self._position >= len(self._text)
                        else "is cut short or damaged"
                    )
                    raise self._invalid(f"{what} {fault}") from error
                end, too_deep = -1, False
            if end - self._position > self.bounds.bytes:
                raise self.source.too_long(self._place(), what)
            if end >= 0 and (end < len(self._text) or self._ended):  # else a number may continue in the next block
                break
            if len(self._text) - self._position > self.bounds.bytes:
                raise self.source.too_long(self._place(), what)
            if self._ended:
                raise self._invalid(f"{what} is cut short or damaged")
            self._read_more(size)
            size *= 2
        start, self._position = self._position, end
        if too_deep:
            bad = _too_deep(where, self._text[start : start + SHOWN], self.bounds)
            return bad if row else (None, (bad.what, bad.how))
        if not row:
            return value, self._decoder.odd
        return _row(where, value, self._decoder, self._text, start, end, self.bounds)

    def _row_place(self, line: int) -> str:
        """The place of the next row, on this line; rows on the same line also get a number."""
        self._number += 1
        same_line, self._last_line = line <= self._last_line, line
        return f"{self.name}:{line} (row {self._number})" if same_line else f"{self.name}:{line}"

    def _place(self) -> str:
        return f"{self.name}:{self._line_number()}"

    def _line_number(self) -> int:
        self._line += self._text.count("\n", self._counted_to, self._position)
        self._counted_to = self._position
        return self._line

    def _peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while (position := _skip(self._text, self._position)) >= len(self._text) and not self._ended:
            self._position = len(self._text)
            self._read_more(CHUNK)
        self._position = position
        return self._text[position : position + 1]

    def _read_more(self, min_characters: int) -> None:
        """Read on, and drop the text that is done with."""
        self._line_number()
        parts, count = [self._text[self._position :]], 0
        self._dropped_chars += self._position
        self._position = self._counted_to = 0
        while count < min_characters:
            block = self.source.read()
            try:
                text = self._decode.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = f"{self.name}:{self._lines + error.object.count(10, 0, error.start) + 1}"
                start = error.object.rfind(b"\n", 0, error.start) + 1
                raise DataError(place, *not_utf8(error.object[start:], error.start - start, self.name)) from error
            self._lines += block.count(b"\n")
            parts.append(text)
            count += len(text)
            if not block:
                self._ended = True
                break
        self._text = "".join(parts)

    def _invalid(self, reason: str) -> DataError:
        return DataError(self._place(), f"is not valid JSON ({reason})", "the file may be cut; fetch or copy it again")
