"""The basis of all readers: a file's bytes, unpacked and split into lines within bounds, and the rows that readers yield."""

from __future__ import annotations

import codecs
import gzip
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import Field

from penchant.base.section import Section
from penchant.data.read.files import ending, kind_of, unreadable_error
from penchant.errors import DataError

CHUNK = 1 << 18  # bytes of a file read at a time, and of one request to the hub
HEAD = 1 << 14  # bytes by which a file's format is recognized
SHOWN = 500  # characters of a bad row that are kept
SMALL = 4 << 20  # unpacked bytes that are always allowed


class Bounds(Section):
    """Limits on a row, so that no file can fill the memory."""

    row_mb: float = Field(16, gt=0, le=1e6, description="the longest row (or text between blank lines), in MB")
    nesting: int = Field(200, ge=1, le=400, description="how deep lists and objects of a row may be nested")
    unpacked: float = Field(100, ge=1, le=1e9, description="how many times its size a packed file may unpack to")

    @property
    def bytes(self) -> int:
        return int(self.row_mb * 2**20)

    def how(self, name: str, fix: str) -> str:
        """Advice for a row over a bound: fix it, or raise the bound."""
        doubled = getattr(self, name) * 2
        return f"{fix}, or raise the bound: data.bounds.{name}={doubled:g} in a config, --bound {name}={doubled:g} for penchant data"


class Missing(str):
    """A table cell that holds "nan" or the like: a missing value, kept distinct from text that a person wrote."""

    __slots__ = ()


BOUNDS: ContextVar[Bounds | None] = ContextVar("bounds", default=None)  # for callers that pass none; set by --bound


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it is (``train.jsonl:118``)."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read: where it is, what is wrong, how to fix it, and the raw content."""

    where: str
    what: str
    how: str
    raw: Any


Rows = Iterator[Row | BadRow]


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of a file that can be read by itself.

    Args:
        name: of the file, for messages; file: its path.
        start, end: byte range of whole lines of JSONL, or range of Parquet row groups; an end of -1: the whole file.
        before: number of lines or rows before it.
    """

    name: str
    file: str
    start: int = 0
    end: int = -1
    before: int = 0


class Source:
    """The unpacked content of a file, block by block.

    Args:
        shard: read only its lines, without checking the format.

    Raises:
        DataError: it is not text, not in a supported encoding, or unpacks to more than the bound.
    """

    def __init__(self, stream: BinaryIO, name: str, bounds: Bounds, shard: Shard | None = None) -> None:
        self.name, self.bounds, self._stream, self._unpacked = name, bounds, stream, 0
        self._gzip: gzip.GzipFile | None = None
        self._shard, self._bytes_left = shard, 0
        if shard is not None:
            self.rewind()
            return
        self.head = stream.read(HEAD)
        if self.head.startswith(b"\x1f\x8b"):
            stream.seek(0)
            self._gzip = gzip.GzipFile(fileobj=stream)
            self.head = self._gzip.read(HEAD)
        self.rewind()
        kind = kind_of(self.head)
        if kind and not (kind == ".html" and ending(name) == ".txt"):
            raise unreadable_error(name, kind)
        encoding = _wide_encoding(self.head)
        if encoding:
            raise DataError(f"{name}:1", f"the file is {encoding}", _recode_advice(name, encoding))

    def rewind(self) -> None:
        """Go back to the start."""
        (self._stream if self._gzip is None else self._gzip).seek(self._shard.start if self._shard else 0)
        self._bytes_left = self._shard.end - self._shard.start if self._shard else 0
        self._unpacked = 0

    def read(self) -> bytes:
        """The next block; empty at the end."""
        if self._gzip is None:
            limit = min(CHUNK, self._bytes_left) if self._shard else CHUNK
            block: bytes = self._stream.read1(limit)  # type: ignore[attr-defined]  # at most one request for a remote file
            self._bytes_left -= len(block)
            return block
        block = self._gzip.read(CHUNK)
        self._unpacked += len(block)
        packed = max(1, self._stream.tell())
        if self._unpacked > max(SMALL, self.bounds.unpacked * packed):
            what = f"unpacks to more than {self.bounds.unpacked:g} times its size ({packed:,} bytes give {self._unpacked:,})"
            raise DataError(self.name, what, self.bounds.how("unpacked", "check what it holds"))
        return block

    def lines(self, blank: bool = False) -> Iterator[tuple[int, bytes]]:
        """(number, line) of every line, split at LF or, in a file without LF, at CR; `blank`: empty lines too."""
        number, end = (self._shard.before, b"\n") if self._shard else (0, b"")
        rest, rest_bytes, limit = [b""], 0, self.bounds.bytes
        while block := self.read():
            end = end or line_end(block)
            pieces = block.split(end)
            rest.append(pieces[0])
            rest_bytes += len(pieces[0])
            if len(pieces) > 1:
                pieces[0], last = b"".join(rest), pieces.pop()
                rest, rest_bytes = [last], len(last)
                if not number:
                    pieces[0] = pieces[0].removeprefix(codecs.BOM_UTF8)
                for line in pieces:
                    number += 1
                    if blank or (line and line != b"\r"):
                        if len(line) > limit:
                            raise self.too_long(f"{self.name}:{number}", "the line")
                        yield number, line
            if rest_bytes > limit:
                raise self.too_long(f"{self.name}:{number + 1}", "the line")
        if last := b"".join(rest):
            yield number + 1, last if number else last.removeprefix(codecs.BOM_UTF8)

    def texts(self, blank: bool = False) -> Iterator[tuple[str, str | BadRow]]:
        """(place, text) of every line; one that cannot be decoded becomes a bad row."""
        for number, line in self.lines(blank):
            where = f"{self.name}:{number}"
            yield where, _text(line.rstrip(b"\r"), where, self.name)

    def too_long(self, where: str, what: str) -> DataError:
        """The error for a row over the bound."""
        how = self.bounds.how("row_mb", "check that the file is not damaged")
        return DataError(where, f"{what} is longer than {self.bounds.row_mb:g} MB", how)


def without_nulls(value: Any) -> Any:
    """Remove keys that hold null from objects: tables such as Parquet give every row the keys of all rows."""
    if isinstance(value, Mapping):
        return {str(k): without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(v) for v in value]
    return value


ARGUMENTS = ("arguments", "parameters")  # of a tool call


def calls_without_nulls(value: Any) -> Any:
    """A table's cell without the null arguments of its tool calls; everything else stays as it is."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) if k in ARGUMENTS else calls_without_nulls(v) for k, v in value.items()}
    return list(map(calls_without_nulls, value)) if isinstance(value, (list, tuple)) else value


def line_end(block: bytes) -> bytes:
    """The line end of a file, from its first block."""
    return b"\r" if b"\r" in block and b"\n" not in block else b"\n"


def _wide_encoding(head: bytes) -> str:
    """The UTF-16 or UTF-32 encoding that the first bytes are in; empty if they are in neither."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    even, odd = head[0:200:2], head[1:200:2]
    for encoding, zeros, letters in (("UTF-16LE", odd, even), ("UTF-16BE", even, odd)):
        if len(odd) > 3 and zeros.count(0) > 0.9 * len(zeros) and not letters.count(0):
            return encoding
    return ""


def _text(line: bytes, where: str, name: str) -> str | BadRow:
    if b"\0" in line:
        what, head = f"holds a NUL byte (column {line.index(0) + 1})", line[:SHOWN].decode("utf-8", "backslashreplace")
        return BadRow(where, what, "the file is damaged or binary; export it again", head)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        what, how = not_utf8(line, error.start, name)
        return BadRow(where, what, how, line[:SHOWN].decode("utf-8", "backslashreplace"))


def not_utf8(line: bytes, offset: int, name: str) -> tuple[str, str]:
    """What is wrong at a byte of a line, and how to fix it."""
    around = line[max(0, offset - SHOWN) : offset + SHOWN]
    try:
        around.decode("cp1252")
        encoding = "CP1252"  # what Windows writes; 0x80 is the euro sign there, and a control character in Latin-1
    except UnicodeDecodeError:
        encoding = "GB18030" if _decodes(around, "gb18030") else "LATIN1"
    what = f"is not UTF-8 (byte 0x{line[offset]:02x} at column {offset + 1}; {encoding}?)"
    return what, _recode_advice(name, encoding)


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        return bool(line.decode(encoding))
    except UnicodeDecodeError:
        return False


def _recode_advice(name: str, encoding: str) -> str:
    return f"convert it: iconv -f {encoding} -t UTF-8 {Path(name).name} > utf8-{Path(name).name}"


def documents(source: Source) -> Rows:
    """One row per document; documents are separated by blank lines."""
    parts: list[str] = []
    start, size = "", 0
    for where, text in source.texts(blank=True):
        if isinstance(text, BadRow):
            yield text
        elif text.strip():
            start = start if parts else where
            parts.append(text)
            size += len(text) + 1
            if size > source.bounds.bytes:
                raise source.too_long(start, "the text without a blank line")
        elif parts:
            yield Row(start, {"text": "\n".join(parts)})
            parts, size = [], 0
    if parts:
        yield Row(start, {"text": "\n".join(parts)})
