"""Rows of JSONL, JSON, CSV, TSV (all plain or gzip), Parquet and text, each with its place: from disk, an open stream or the hub.

`train` and `data get` read through this one reader, row by row. What a file holds decides how it is read, not its ending alone.
No row is lost: it is read, comes as a bad row, or the file is refused. Memory is bounded by `Bounds`, whatever the file says.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import io
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import Field

from penchant.base.hub import check_hub
from penchant.base.section import Section
from penchant.base.text import closest_file, printable
from penchant.errors import DataError

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
READABLE = f"{', '.join(ENDINGS)}, and all but .parquet also with .gz"
CHUNK = 1 << 20  # bytes of a file at a time
HEAD = 1 << 14  # bytes that say what a file is
SHOWN = 500  # characters of a bad row that are kept
BATCH = 32  # Parquet rows that are Python objects at one time
SMALL = 4 << 20  # bytes that may unpack to from next to nothing
HOPELESS = 200_000  # a value that is nested deeper is not looked at to its end
LISTS = ("data", "rows", "train")  # what a JSON object may call its list of rows


class Bounds(Section):
    """What one row may be, so that no file can fill the memory."""

    row_mb: float = Field(16, gt=0, le=1e6, description="the longest row (or text between blank lines), in MB")
    nesting: int = Field(200, ge=1, le=400, description="how deep lists and objects of a row may be nested")
    unpacked: float = Field(100, ge=1, le=1e9, description="how many times its size a packed file may unpack to")

    @property
    def bytes(self) -> int:
        return int(self.row_mb * 2**20)

    def how(self, name: str, rest: str) -> str:
        """How to fix a row that is over a bound, or to raise it."""
        now = getattr(self, name) * 2
        return f"{rest}, or raise the bound: data.bounds.{name}={now:g} in a config, --bound {name}={now:g} for penchant data"


BOUNDS: ContextVar[Bounds | None] = ContextVar("bounds", default=None)  # where a caller gives none: --bound sets them


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it stands (``train.jsonl:118``)."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read: where, what, how to fix it, and what was found there."""

    where: str
    what: str
    how: str
    raw: Any


Rows = Iterator[Row | BadRow]


# ---- Files ----

# what a file is that cannot be read, by its ending, and how to make one of it that can be
_SHEET = ("is a spreadsheet", "export it as CSV (UTF-8), and name that file")
_PICKLE = ("is a pickle, which is never read: it can run code", "write the rows as JSONL or Parquet")
_ARROW = (
    "is an Arrow file",
    "write it as Parquet, e.g. datasets.Dataset.from_file(NAME).to_parquet(NAME.parquet) in Python",
)
_OTHERS = {
    **dict.fromkeys((".xlsx", ".xlsm", ".xls", ".ods", ".numbers"), _SHEET),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".joblib"), _PICKLE),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), _ARROW),
    ".zip": ("is a zip archive", "unpack it (unzip) and name a file of it"),
    ".zst": ("is packed with zstd", "unpack it: zstd -d NAME"),
    ".bz2": ("is packed with bzip2", "unpack it: bunzip2 -k NAME"),
    ".xz": ("is packed with xz", "unpack it: unxz -k NAME"),
    ".7z": ("is a 7z archive", "unpack it and name a file of it"),
    **dict.fromkeys((".tar", ".tgz"), ("is a tar archive", "unpack it (tar -xf) and name a file of it")),
    ".lfs": ("is a Git LFS pointer and not the data", "fetch the data: git lfs pull"),
    ".html": ("is a web page and not the data", "fetch the file itself, e.g. by its raw or download link"),
    ".db": ("is an SQLite database", "export the table as CSV"),
    ".pq": ("is a Parquet file", "name it .parquet"),
    ".gz": ("is packed twice", "unpack it once: gunzip NAME"),
    ".pdf": ("is a PDF", "write its rows as JSONL or CSV"),
}
_MAGIC = (
    (b"PAR1", ".pq"),
    (b"PARE", ".pq"),
    (b"ARROW1", ".arrow"),
    (b"\xff\xff\xff\xff", ".arrow"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
    (b"\xfd7zXZ\0", ".xz"),
    (b"7z\xbc\xaf\x27\x1c", ".7z"),
    (b"\xd0\xcf\x11\xe0", ".xls"),
    (b"SQLite format 3\0", ".db"),
    (b"version https://git-lfs.github.com", ".lfs"),
    (b"%PDF-", ".pdf"),
    (b"\x1f\x8b", ".gz"),
    (b"\x80\x04\x95", ".pkl"),
)


def _kind_of(head: bytes) -> str:
    """The ending that a file should have by its first bytes, of those that are not read; empty where they are text."""
    if head.startswith(b"PK\x03\x04"):
        return ".xlsx" if b"xl/" in head or b"opendocument.spreadsheet" in head else ".zip"
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return ".bz2"
    if head[257:262] == b"ustar":
        return ".tar"
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return ".html"
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), "")


def _other(where: str, kind: str) -> DataError:
    what, how = _OTHERS[kind]
    return DataError(where, what, how.replace("NAME", Path(where).name))


def find_files(path: str) -> list[Path] | None:
    """The files that a path names: itself, those of a folder, or those of a pattern (``shards/*.parquet``), by name; None for a hub id.

    Raises:
        DataError: there is no such file, or it is empty, no file, or of an unknown ending; a folder of different files.
    """
    file = Path(path).expanduser()
    try:
        there = os.stat(file)
        if stat.S_ISDIR(there.st_mode):
            return _in_folder(path, file)
        if not stat.S_ISREG(there.st_mode):
            raise DataError(path, "is a pipe or a device", "write the rows to a file: they are read more than once")
        if not ending(file.name):
            kind = file.suffix.lower()
            if kind in _OTHERS and kind != ".gz":
                raise _other(path, kind)
            what = f'the ending "{file.suffix}" is not known'
            raise DataError(path, what, f"rename it to what it holds: {READABLE}")
        if there.st_size == 0:
            raise DataError(path, "the file is empty", "give a file with at least one row")
        with file.open("rb"):
            return [file]
    except FileNotFoundError:
        return _pattern(path, file)
    except OSError as error:
        how = "check where the links lead" if error.errno == 40 else "check the path and its permissions"
        raise DataError(path, f"cannot be read ({error.strerror})", how) from error
    except ValueError as error:
        raise DataError(path, f"is no path ({error})", "check the path") from error


def _pattern(path: str, file: Path) -> list[Path] | None:
    if glob.has_magic(path):
        names = sorted(n for n in glob.glob(str(file), recursive=True) if not os.path.isdir(n))
        if not names:
            raise DataError(path, "no file has a name like this", "check the pattern, and where you start from")
        return [f for name in names for f in find_files(glob.escape(name) if name == path else name) or ()]
    if _looks_like_hub_id(path):
        return None
    raise DataError(path, "no such file", _sibling(file))


_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "data.json"}
_SPLITS = re.compile(r"(train|test|validation|valid|val|dev|eval|heldout|held_out)(?![a-z])", re.IGNORECASE)


def _in_folder(path: str, folder: Path) -> list[Path]:
    files = sorted(f for f in folder.iterdir() if ending(f.name) and f.name[0] != "." and f.name not in _ABOUT)
    if not files:
        raise DataError(
            path, "is a folder without a file of rows", f"give a file ({READABLE}), or a pattern: {path}/**/*.parquet"
        )
    kinds = {ending(f.name) for f in files}
    splits = {m[0].lower() for f in files if (m := _SPLITS.match(f.name))}
    if len(kinds) > 1 or len(splits) > 1:
        some = ", ".join(printable(f.name) for f in files[:4]) + (", ..." if len(files) > 4 else "")
        what = f"is a folder of different {'kinds' if len(kinds) > 1 else 'splits'} of files ({some})"
        raise DataError(path, what, f'name one, or give a pattern: "{path}/{files[0].name.split("-")[0]}*"')
    return [file for f in files for file in find_files(str(f)) or ()]


def named_files(path: str | Sequence[str]) -> list[tuple[str, Path | None]]:
    """All files that paths name, each with its name in messages: the bare one, with as many folders as tell it from the others.
    A hub id has no file.

    Raises:
        DataError: as `find_files`, or a file is named twice.
    """
    named: list[tuple[str, Path | None]] = []
    for one in [path] if isinstance(path, str) else path:
        found = find_files(str(one))
        named += [(str(one), None)] if found is None else [(os.path.abspath(f), f) for f in found]
    full = [name for name, _ in named]
    twice = (
        next((name for i, name in enumerate(full) if name in full[:i]), None) if len(set(full)) < len(full) else None
    )
    if twice is not None:
        raise DataError(twice, "is named twice", "name each file once; train.epochs says how often rows are seen")
    deep, names = [1] * len(full), full
    while True:
        names = [n if f is None else "/".join(Path(n).parts[-k:]) for (n, f), k in zip(named, deep, strict=True)]
        if len(set(names)) == len(names):
            return [(name, file) for name, (_, file) in zip(names, named, strict=True)]
        counts: dict[str, int] = {}
        for name in names:
            counts[name] = counts.get(name, 0) + 1
        deep = [k + (counts[name] > 1) for name, k in zip(names, deep, strict=True)]


def read_rows(path: str | Sequence[str], bounds: Bounds | None = None) -> Rows:
    """All rows of files, folders of files, patterns or hub ids, in order.

    Raises:
        DataError: as `named_files`, or a file is damaged or has no rows.
    """
    for name, file in named_files(path):
        if file is None:
            yield from _read_hub(name)
            continue
        seen = False
        try:
            with file.open("rb") as stream:
                for row in read_stream(stream, name, bounds):
                    seen = True
                    yield row
        except OSError as error:
            raise DataError(
                str(file), f"cannot be read ({error.strerror or error})", "check its permissions"
            ) from error
        if not seen:
            raise DataError(str(file), "the file has no rows", "give a file with at least one row")


def read_stream(stream: BinaryIO, name: str, bounds: Bounds | None = None) -> Rows:
    """All rows of an open file, in order; memory is bounded by a few rows, whatever the file's size.

    Args:
        stream: seekable, at its start; name: its ending says what it is, and messages name it.

    Raises:
        DataError: the file is damaged, cut short, over a bound or not what its ending says.
    """
    bounds = bounds or BOUNDS.get() or Bounds()
    if ending(name) == ".parquet":
        yield from _parquet(stream, name, bounds)
        return
    try:
        yield from _READERS[ending(name)](_Bytes(stream, name, bounds))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(name, f"the gzip file is cut short or damaged ({error})", "fetch or copy it again") from error


def ending(name: str) -> str:
    """The ending of a file that can be read, without ``.gz``; empty where it cannot."""
    lower = name.lower()
    found = Path(lower.removesuffix(".gz")).suffix
    return found if found in ENDINGS and not (found == ".parquet" and lower.endswith(".gz")) else ""


def _sibling(file: Path) -> str:
    try:
        near = closest_file(file)
    except OSError:
        near = ""
    return f"did you mean {near}?" if near else "check the path; a hub id is written owner/name"


def _looks_like_hub_id(path: str) -> bool:
    named = re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", path) is not None
    return named and not path.startswith(".") and Path(path).suffix not in (*ENDINGS, *_OTHERS)


# ---- Bytes and lines ----


class _Bytes:
    """What stands in a file, unpacked, block by block.

    Raises:
        DataError: it is no text that is read here, or unpacks to more than the bound.
    """

    def __init__(self, stream: BinaryIO, name: str, bounds: Bounds) -> None:
        self.name, self.bounds, self._stream, self._unpacked = name, bounds, stream, 0
        self._gzip: gzip.GzipFile | None = None
        self.head = stream.read(HEAD)
        if self.head.startswith(b"\x1f\x8b"):
            stream.seek(0)
            self._gzip = gzip.GzipFile(fileobj=stream)
            self.head = self._gzip.read(HEAD)
        self.rewind()
        kind = _kind_of(self.head)
        if kind and not (kind == ".html" and ending(name) == ".txt"):
            raise _other(name, kind)
        encoding = _wide(self.head)
        if encoding:
            raise DataError(f"{name}:1", f"the file is {encoding}", _recode(name, encoding))

    def rewind(self) -> None:
        """Start again."""
        (self._stream if self._gzip is None else self._gzip).seek(0)
        self._unpacked = 0

    def read(self) -> bytes:
        """The next block; empty at the end."""
        if self._gzip is None:
            return self._stream.read(CHUNK)
        block = self._gzip.read(CHUNK)
        self._unpacked += len(block)
        packed = max(1, self._stream.tell())
        if self._unpacked > max(SMALL, self.bounds.unpacked * packed):
            what = f"unpacks to more than {self.bounds.unpacked:g} times its size ({packed:,} bytes give {self._unpacked:,})"
            raise DataError(self.name, what, self.bounds.how("unpacked", "look at what it holds"))
        return block

    def lines(self, blank: bool = False) -> Iterator[tuple[int, bytes]]:
        """(number, line) of every line, after LF or, in a file without LF, CR; `blank`: of those without anything too."""
        number, rest, held, end, limit = 0, [b""], 0, b"", self.bounds.bytes
        while block := self.read():
            end = end or (b"\r" if b"\r" in block and b"\n" not in block else b"\n")
            found = block.split(end)
            rest.append(found[0])
            held += len(found[0])
            if len(found) > 1:
                found[0], last = b"".join(rest), found.pop()
                rest, held = [last], len(last)
                if not number:
                    found[0] = found[0].removeprefix(codecs.BOM_UTF8)
                for line in found:
                    number += 1
                    if blank or (line and line != b"\r"):
                        if len(line) > limit:
                            raise self.too_long(f"{self.name}:{number}", "the line")
                        yield number, line
            if held > limit:
                raise self.too_long(f"{self.name}:{number + 1}", "the line")
        if last := b"".join(rest):
            yield number + 1, last if number else last.removeprefix(codecs.BOM_UTF8)

    def texts(self, blank: bool = False) -> Iterator[tuple[str, str | BadRow]]:
        """(place, text) of every line; a line that is no text comes as a bad row."""
        for number, line in self.lines(blank):
            where = f"{self.name}:{number}"
            yield where, _text(line.rstrip(b"\r"), where, self.name)

    def too_long(self, where: str, what: str) -> DataError:
        """What to say of a row over the bound."""
        how = self.bounds.how("row_mb", "check that the file is not damaged")
        return DataError(where, f"{what} is longer than {self.bounds.row_mb:g} MB", how)


def _wide(head: bytes) -> str:
    """UTF-16 or UTF-32, where the first bytes are that."""
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
        what, shown = f"holds a NUL byte (column {line.index(0) + 1})", line[:SHOWN].decode("utf-8", "backslashreplace")
        return BadRow(where, what, "the file is damaged or binary; export it again", shown)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        what, how = _no_utf8(line, error.start, name)
        return BadRow(where, what, how, line[:SHOWN].decode("utf-8", "backslashreplace"))


def _no_utf8(line: bytes, at: int, name: str) -> tuple[str, str]:
    """What is wrong at a byte of a line, and how to fix it."""
    around = line[max(0, at - SHOWN) : at + SHOWN]
    try:
        around.decode("cp1252")
        encoding = "CP1252"  # what Windows writes; 0x80 is the euro sign there, and a control character in Latin-1
    except UnicodeDecodeError:
        encoding = "GB18030" if _reads(around, "gb18030") else "LATIN1"
    what = f"is not UTF-8 (byte 0x{line[at]:02x} at column {at + 1}; {encoding}?)"
    return what, _recode(name, encoding)


def _reads(line: bytes, encoding: str) -> bool:
    try:
        return bool(line.decode(encoding))
    except UnicodeDecodeError:
        return False


def _recode(name: str, encoding: str) -> str:
    return f"convert it: iconv -f {encoding} -t UTF-8 {Path(name).name} > utf8-{Path(name).name}"


def _documents(source: _Bytes) -> Rows:
    """Documents are separated by blank lines."""
    parts: list[str] = []
    start, held = "", 0
    for where, text in source.texts(blank=True):
        if isinstance(text, BadRow):
            yield text
        elif text.strip():
            start = start if parts else where
            parts.append(text)
            held += len(text) + 1
            if held > source.bounds.bytes:
                raise source.too_long(start, "the text without a blank line")
        elif parts:
            yield Row(start, {"text": "\n".join(parts)})
            parts, held = [], 0
    if parts:
        yield Row(start, {"text": "\n".join(parts)})


# ---- JSON ----


def _json(source: _Bytes) -> Rows:
    """Rows line by line, lists of rows, objects over several lines, or one object that holds a list of rows.

    What the file holds decides, since publishers mix up the endings.
    """
    start = b"".join(source.head.removeprefix(codecs.BOM_UTF8).split())[:2]
    lists = (b"[{", b"[]", b"[") if ending(source.name) != ".json" else start[:1] + start[1:2]
    if (start[:1] == b"[" and start in lists) or (start[:1] == b"{" and _over_lines(source)):
        yield from _Values(source).rows()
    else:
        yield from _json_lines(source)


def _over_lines(source: _Bytes) -> bool:
    """Whether a file that starts with an object is no JSONL: an object over several lines, or the only one, with a list of rows."""
    try:
        texts = list(_few(source))
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


def _few(source: _Bytes) -> Iterator[str | BadRow]:
    """The first two lines that are not blank."""
    found = 0
    for _, text in source.texts():
        if isinstance(text, BadRow) or text.strip():
            yield text
            found += 1
        if found == 2:
            return


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(row, dict) for row in value)


def _json_lines(source: _Bytes) -> Rows:
    decoder = _Decoder()
    for where, text in source.texts():
        if isinstance(text, BadRow):
            yield text
        elif text.strip():
            yield _json_line(where, text, source.bounds, decoder)


class _Decoder:
    """Reads JSON as `json` does, and says what `json` passes over: keys that stand twice, and numbers that Python does not make."""

    def __init__(self) -> None:
        self.odd: tuple[str, str] | None = None  # what is wrong with what was read last, and how to fix it
        self._fast = json.JSONDecoder(object_pairs_hook=self._object)
        self._slow = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._integer)

    def read(self, text: str, at: int) -> tuple[Any, int]:
        """A value and where it ends.

        Raises:
            json.JSONDecodeError: it is none. RecursionError: it is nested too deep for Python.
        """
        self.odd = None
        try:
            return self._fast.raw_decode(text, at)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of more digits than Python reads
            return self._slow.raw_decode(text, at)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1) if len(names) < 1000 else "..."
            self.odd = f'the key "{printable(twice[:100])}" stands twice in an object', "keep one of them"
        return made

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            self.odd = f"holds an integer of {len(digits):,} digits", "write it as a string, or drop the row"
            return 0


def _json_line(where: str, text: str, bounds: Bounds, decoder: _Decoder) -> Row | BadRow:
    at = _skip(text, 0)
    try:
        value, end = decoder.read(text, at)
        if _skip(text, end) < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            what = f"goes on behind the JSON value (column {_skip(text, error.pos) + 1})"
            return BadRow(where, what, "write one row a line", text[:SHOWN])
        cut = error.pos >= len(text.rstrip()) - 1 or "Unterminated" in error.msg
        what = "the line ends in the middle of a JSON value" if cut else f"is not valid JSON (column {error.colno})"
        how = "the file was cut; copy it again or drop the line" if cut else "fix the line or drop it"
        return BadRow(where, what, how, text[:SHOWN])
    except RecursionError:
        return _too_deep(where, text, bounds)
    return _row(where, value, decoder, text, at, end, bounds)


def _row(where: str, value: Any, decoder: _Decoder, text: str, at: int, end: int, bounds: Bounds) -> Row | BadRow:
    """What was read from a text as a row."""
    if decoder.odd is not None:
        return BadRow(where, *decoder.odd, text[at : min(end, at + SHOWN)])
    brackets = text.count("[", at, end) + text.count("{", at, end)
    if brackets > bounds.nesting and _end(text[at:end])[1] > bounds.nesting:
        return _too_deep(where, text[at : at + SHOWN], bounds)
    if isinstance(value, dict):
        return Row(where, value)
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    what = f"is a JSON {names[type(value)]}, not an object"
    return BadRow(where, what, 'write {"prompt": ..., "chosen": ..., "rejected": ...}', text[at : min(end, at + SHOWN)])


def _too_deep(where: str, text: str, bounds: Bounds) -> BadRow:
    what = f"is nested more than {bounds.nesting} deep"
    return BadRow(where, what, bounds.how("nesting", "flatten the row"), text[:SHOWN])


_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def _end(text: str, at: int = 0) -> tuple[int, int]:
    """Where a list or object ends (-1: not in this text), and how deep it is nested."""
    depth = deepest = 0
    for token in _TOKENS.finditer(text, at):
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


_SPACE = re.compile(r"[ \t\r\n\ufeff]*")  # files that were put together have marks of byte order within


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing too


class _Values:
    """The JSON values of a file, one behind the other, in blocks."""

    def __init__(self, source: _Bytes) -> None:
        self.source, self.name, self.bounds = source, source.name, source.bounds
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._held, self._at, self._ended = "", 0, False
        self._line, self._counted, self._lines = 1, 0, 0  # the line of `_counted`; line ends that were read
        self._forgotten = 0  # characters in front of what is held
        self._number, self._before = 0, 0  # of rows, and the line of the last one
        self._decoder = _Decoder()

    def rows(self) -> Rows:
        """The rows of all lists, and all objects."""
        kind, found = "", 0
        while start := self._peek():
            found += 1
            if start == "[":
                kind = "list"
                yield from self._list()
            elif start == "{":
                row, names = yield from self._object()
                kind = "object"
                if row is not None and found == 1 and not self._peek():
                    raise self._no_list(names)
                if row is not None:
                    yield row
            else:
                what = f"is not JSON, behind a JSON {kind}" if kind else "is not JSON"
                raise DataError(self._place(), what, "give a list of objects, or JSONL")

    def _no_list(self, names: Sequence[str]) -> DataError:
        some = ", ".join(printable(n) for n in names[:6]) or "nothing"
        what = f'is one JSON object over several lines without a "data" list (it holds {some})'
        return DataError(self.name, what, "give a list of objects, or JSONL")

    def _list(self) -> Rows:
        self._at += 1
        number = 0
        while (following := self._peek()) != "]":
            if number and following == ",":
                self._at += 1
                self._peek()
            elif number and following:
                raise self._invalid(f"no comma after row {self._number}")
            yield self._value(f"row {self._number + 1}", row=True)
            number += 1
        self._at += 1

    def _object(self) -> Any:
        """An object: yields the rows of its list; returns itself as a row where it has none, and its keys."""
        line, listed = self._here(), ""
        found: dict[str, Any] = {}
        columns: set[str] = set()
        held, odd, mark = 0, None, ""
        self._at += 1
        while self._peek() != "}":
            if mark:
                self._expect(",")
            mark = ","
            key, _ = self._value("a key")
            if not isinstance(key, str):
                raise self._invalid("a key is no string")
            self._expect(":")
            if key in LISTS and self._peek() == "[" and self._starts_rows():
                if listed:
                    raise self._two(listed, key)
                listed = key
                for row in self._list():
                    columns = columns or set(row.values if isinstance(row, Row) else ())
                    yield row
                continue
            start = self._forgotten + self._at
            value, wrong = self._value(f'the value of "{printable(key[:100])}"')
            held += self._forgotten + self._at - start
            if held > self.bounds.bytes:
                raise self.source.too_long(f"{self.name}:{line}", "the object")
            if key in found:
                odd = f'the key "{printable(key[:100])}" stands twice in an object', "keep one of them"
            odd = odd or wrong
            found[key] = value
        self._at += 1
        for key, value in found.items() if listed else ():
            if _holds_rows(value) and (key in LISTS or columns & {k for r in value if isinstance(r, dict) for k in r}):
                raise self._two(listed, key)
        if listed:
            return None, []
        where = self._row_place(line)
        return (BadRow(where, *odd, str(found)[:SHOWN]) if odd else Row(where, found)), list(found)

    def _two(self, first: str, second: str) -> DataError:
        what = f'holds two lists of rows, "{printable(first)}" and "{printable(second[:100])}"'
        return DataError(self.name, what, "write each to a file of its own, and name those that you mean")

    def _starts_rows(self) -> bool:
        """Whether the list here starts with an object."""
        at = self._at
        while (here := _skip(self._held, at + 1)) >= len(self._held) and not self._ended:
            self._more(CHUNK)
            at = self._at
        return self._held[here : here + 1] == "{"

    def _expect(self, mark: str) -> None:
        if self._peek() != mark:
            raise self._invalid(f"no {mark!r} there")
        self._at += 1
        self._peek()

    def _value(self, what: str, row: bool = False) -> Any:
        """The value here: as a row, or with what is odd about it."""
        want = CHUNK
        where = self._row_place(self._here()) if row else ""
        while True:
            try:
                value, end = self._decoder.read(self._held, self._at)
                deep = False
            except RecursionError:
                (end, depth), value, deep = _end(self._held, self._at), None, True
                if depth > HOPELESS:
                    made = _too_deep(self._place(), "", self.bounds)
                    raise DataError(made.where, made.what, made.how) from None
            except json.JSONDecodeError as error:
                cut = error.pos > len(self._held) - 16 or error.msg.startswith("Unterminated")
                if self._ended or not cut:
                    short = "is not closed: the file ends" if self._at >= len(self._held) else "is cut short or damaged"
                    raise self._invalid(f"{what} {short}") from error
                end, deep = -1, False
            if end - self._at > self.bounds.bytes:
                raise self.source.too_long(self._place(), what)
            if end >= 0 and (end < len(self._held) or self._ended):  # else a number may go on in the next block
                break
            if len(self._held) - self._at > self.bounds.bytes:
                raise self.source.too_long(self._place(), what)
            if self._ended:
                raise self._invalid(f"{what} is cut short or damaged")
            self._more(want)
            want *= 2
        at, self._at = self._at, end
        if deep:
            made = _too_deep(where, self._held[at : at + SHOWN], self.bounds)
            return made if row else (None, (made.what, made.how))
        if not row:
            return value, self._decoder.odd
        return _row(where, value, self._decoder, self._held, at, end, self.bounds)

    def _row_place(self, line: int) -> str:
        """The place of the next row, on this line; rows that share one are told apart by their number."""
        self._number += 1
        same, self._before = line <= self._before, line
        return f"{self.name}:{line} (row {self._number})" if same else f"{self.name}:{line}"

    def _place(self) -> str:
        return f"{self.name}:{self._here()}"

    def _here(self) -> int:
        self._line += self._held.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def _peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while (here := _skip(self._held, self._at)) >= len(self._held) and not self._ended:
            self._at = len(self._held)
            self._more(CHUNK)
        self._at = here
        return self._held[here : here + 1]

    def _more(self, want: int) -> None:
        """Read on, and forget what is done with."""
        self._here()
        parts, got = [self._held[self._at :]], 0
        self._forgotten += self._at
        self._at = self._counted = 0
        while got < want:
            block = self.source.read()
            try:
                text = self._decode.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = f"{self.name}:{self._lines + error.object.count(10, 0, error.start) + 1}"
                start = error.object.rfind(b"\n", 0, error.start) + 1
                raise DataError(place, *_no_utf8(error.object[start:], error.start - start, self.name)) from error
            self._lines += block.count(b"\n")
            parts.append(text)
            got += len(text)
            if not block:
                self._ended = True
                break
        self._held = "".join(parts)

    def _invalid(self, why: str) -> DataError:
        return DataError(self._place(), f"is not valid JSON ({why})", "the file may be cut; fetch or copy it again")


# ---- Tables ----


def _csv(source: _Bytes) -> Rows:
    csv.field_size_limit(source.bounds.bytes)
    lines, first = _table_lines(source), []
    for line in lines:
        first.append(line)
        if len(first) == 100 or sum(map(len, first)) > HEAD:
            break
    name = source.name
    delimiter = _delimiter(first, "\t" if ending(name) == ".tsv" else ",")
    reader = csv.reader(chain(first, lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    done = 0
    while True:
        try:
            fields = next(reader)
            if not fields:
                done = reader.line_num
                continue
        except StopIteration:
            return
        except csv.Error as error:
            where = f"{name}:{done + 1}"
            if "end of data" in str(error):
                what = f"a quote that is opened here is not closed up to the end of the file, line {reader.line_num}"
                raise DataError(where, what, "close it, or double quotes within a field") from error
            if "field limit" in str(error):
                raise source.too_long(where, "a field") from error
            if header is None:
                raise DataError(where, f"is not a readable header ({error})", "export the table again") from error
            several = f"lines {done + 1} to {reader.line_num}: " if reader.line_num > done + 1 else ""
            done, what = reader.line_num, f"{several}is not a readable row ({error})"
            yield BadRow(where, what, "double quotes within a quoted field, or export the table again", None)
            continue
        where, done = f"{name}:{done + 1}", reader.line_num
        if header is None:
            if not (done == 1 and re.fullmatch(r"sep=.?", "".join(fields).strip(), re.IGNORECASE)):
                header = _header(fields, where)
        elif any("\0" in f for f in fields):
            yield BadRow(where, "holds a NUL byte", "the file is damaged or binary; export it again", fields)
        elif len(fields) != len(header):
            what = f"has {len(fields)} fields, the header {len(header)}"
            how = f"quote fields that hold the delimiter ({_NAMES[delimiter]})"
            yield BadRow(where, what, how, [f[:SHOWN] for f in fields[:100]])
        else:
            yield Row(where, dict(zip(header, fields, strict=True)))


def _header(fields: Sequence[str], where: str) -> list[str]:
    """The columns' names; one without a name is called by its number."""
    names = [name if name.strip() else f"column {i}" for i, name in enumerate(fields, 1)]
    twice = (
        next((name for i, name in enumerate(names) if name in names[:i]), None)
        if len(set(names)) < len(names)
        else None
    )
    if twice is not None:
        what = f'the first line must name the columns, each once, and "{printable(twice[:100])}" stands there twice'
        raise DataError(where, what, "rename one, or add a header such as prompt,chosen,rejected")
    return names


def _table_lines(source: _Bytes) -> Iterator[str]:
    """The lines of a table as text; a CR alone ends one too."""
    for number, line in source.lines(blank=True):
        for part in line.removesuffix(b"\r").split(b"\r"):
            try:
                yield part.decode("utf-8") + "\n"
            except UnicodeDecodeError as error:
                raise DataError(f"{source.name}:{number}", *_no_utf8(part, error.start, source.name)) from error


_NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}


def _delimiter(lines: Sequence[str], usual: str) -> str:
    """What separates the fields, by the header and the rows behind it."""
    given = re.fullmatch(r'"?sep=(.)"?\s*', lines[0], re.IGNORECASE) if lines else None
    if given and given[1] in _NAMES:
        return given[1]
    found: dict[str, tuple[float, int]] = {}
    for delimiter in (usual, *(d for d in _NAMES if d != usual)):
        rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
        header, rest = (rows[0], rows[1:] if len(rows) < 3 else rows[1:-1]) if rows else ([], [])
        if len(header) > 1 and (delimiter == usual or all(re.fullmatch(r"[^,;\t|]*", name) for name in header)):
            found[delimiter] = (sum(len(r) == len(header) for r in rest) / max(1, len(rest)), len(header))
    if found.get(usual, (0.0, 0))[0] >= 0.5 or not found:
        return usual
    return max(found, key=lambda d: found[d])


def _parquet(stream: BinaryIO, name: str, bounds: Bounds) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(stream, pre_buffer=False)
        names, meta = file.schema_arrow.names, file.metadata
        twice = next((n for i, n in enumerate(names) if n in names[:i]), None) if len(set(names)) < len(names) else None
        if twice is not None:
            what = f'the column "{printable(twice[:100])}" stands there twice'
            raise DataError(name, what, "rename one and write the file again")
        stream.seek(0, io.SEEK_END)
        size = stream.tell()
        claims = max(meta.num_rows, sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)))
        if claims > max(SMALL, bounds.unpacked * size):
            what = f"unpacks to more than {bounds.unpacked:g} times its size ({size:,} bytes give {claims:,})"
            raise DataError(name, what, bounds.how("unpacked", "look at what it holds"))
        for batch in file.iter_batches(batch_size=BATCH, use_threads=False):
            if batch.nbytes > bounds.bytes:
                for i in range(len(batch)):
                    if batch.slice(i, 1).nbytes > bounds.bytes:
                        what = f"is longer than {bounds.row_mb:g} MB"
                        raise DataError(f"{name}: row {number + i + 1}", what, bounds.how("row_mb", "shorten it"))
            for row in _batch(batch, name, number, pa):
                number += 1
                yield row
    except DataError:
        raise
    except Exception as error:  # the library raises what it finds: its own kinds, and those of texts, numbers and dates
        said = str(error).strip() or type(error).__name__
        what = f"is not a readable Parquet file ({printable(said.splitlines()[0][:200])})"
        raise DataError(name, what, "fetch or copy it again, or write it anew with pyarrow") from error


def _batch(batch: Any, name: str, number: int, pa: Any) -> Rows:
    """The rows of a batch; where a value cannot be a Python object, cell by cell."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError, KeyError, TypeError, pa.ArrowException):
        rows = None
    for i in range(len(batch)):
        if rows is not None:
            yield Row(f"{name}: row {number + i + 1}", rows[i])
            continue
        where, values = f"{name}: row {number + i + 1}", {}
        for column, cells in zip(batch.schema.names, batch.columns, strict=True):
            try:
                values[column] = _cell(cells[i], pa)
            except Exception as error:
                what = f'"{printable(column[:100])}" cannot be read ({printable(str(error).splitlines()[0][:200])})'
                yield BadRow(where, what, "fix or drop the column", {k: str(v)[:SHOWN] for k, v in values.items()})
                break
        else:
            yield Row(where, values)


def _cell(cell: Any, pa: Any) -> Any:
    """A value; a time that Python has no object for (a year beyond 9999, nanoseconds, an unknown zone) as Arrow writes it."""
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8") from error
    except (ValueError, OverflowError, KeyError, TypeError, pa.ArrowException):
        if not pa.types.is_temporal(cell.type):
            raise
        try:
            return cell.cast(pa.string()).as_py()
        except pa.ArrowException:
            return str(cell.cast(pa.int64()).as_py())


def _read_hub(path: str) -> Rows:
    name, _, split = path.partition(":")
    check_hub(name, "dataset")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(path, "no such file, and hub data sets need an extra", "pip install 'penchant[hub]'") from error
    try:
        dataset = load_dataset(name, split=split or "train", streaming=True)
        for number, values in enumerate(dataset, 1):
            yield Row(f"{path}: row {number}", values)
    except Exception as error:  # the library raises a dozen kinds: network, access, format
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        how = "check the name and the network; for gated data accept its terms on its page and set HF_TOKEN"
        raise DataError(path, f"could not be read from the hub ({first})", how) from error


_READERS: dict[str, Callable[[_Bytes], Rows]] = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), _json),
    **dict.fromkeys((".csv", ".tsv"), _csv),
    ".txt": _documents,
}
