"""Rows of JSONL, JSON, CSV, TSV (all plain or gzip), Parquet and text, each with its place: from disk, an open stream or the hub.

`train` and `data get` read through this one reader, row by row; only a JSON object that spans lines is read whole.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from penchant.base.hub import check_hub
from penchant.base.text import closest_file
from penchant.errors import DataError

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
READABLE = f"{', '.join(ENDINGS)}, and all but .parquet also with .gz"
CHUNK = 1 << 20  # characters of a JSON list at a time
SHOWN = 500  # characters of a bad row that are kept
BATCH = 256  # Parquet rows that are Python objects at one time
LISTS = ("data", "rows", "train")  # what a JSON object may call its list of rows


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


def find_file(path: str) -> Path | None:
    """The file that a path names; None for a hub id.

    Raises:
        DataError: the file is missing, empty, a folder or of an unknown ending.
    """
    file = Path(path).expanduser()
    if not file.exists():
        if _looks_like_hub_id(path):
            return None
        raise DataError(path, "no such file", _sibling(file))
    if file.is_dir():
        raise DataError(path, "is a folder", f"give a file ({READABLE})")
    if not ending(file.name):
        raise DataError(path, f'the ending "{file.suffix}" is not known', f"rename it to what it holds: {READABLE}")
    if file.stat().st_size == 0:
        raise DataError(path, "the file is empty", "give a file with at least one row")
    return file


def read_rows(path: str) -> Iterator[Row | BadRow]:
    """All rows of a file or hub id, in order.

    Raises:
        DataError: as `find_file`, or the file is damaged or has no rows.
    """
    file = find_file(path)
    if file is None:
        yield from _read_hub(path)
        return
    seen = False
    try:
        with file.open("rb") as stream:
            for row in read_stream(stream, file.name):
                seen = True
                yield row
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", "check its permissions") from error
    if not seen:
        raise DataError(path, "the file has no rows", "give a file with at least one row")


def read_stream(stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    """All rows of an open file, in order; memory is bounded by a few rows, whatever the file's size.

    Args:
        stream: seekable, at its start; name: its ending says what it is, and messages name it.

    Raises:
        DataError: the file is damaged, cut short or not what its ending says.
    """
    kind = ending(name)
    try:
        yield from _READERS[kind](stream if kind == ".parquet" else _unpacked(stream), name)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(name, f"the gzip file is cut short or damaged ({error})", "fetch or copy it again") from error


def ending(name: str) -> str:
    """The ending of a file that can be read, without ``.gz``; empty where it cannot."""
    lower = name.lower()
    found = Path(lower.removesuffix(".gz")).suffix
    return found if found in ENDINGS and not (found == ".parquet" and lower.endswith(".gz")) else ""


def _sibling(file: Path) -> str:
    near = closest_file(file)
    return f"did you mean {near}?" if near else "check the path; a hub id is written owner/name"


def _looks_like_hub_id(path: str) -> bool:
    named = re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", path) is not None
    return named and not path.startswith(".") and Path(path).suffix not in (*ENDINGS, ".gz")


# ---- Lines ----


def _unpacked(stream: BinaryIO) -> BinaryIO:
    """The stream itself, or what is in it where its first bytes are gzip's."""
    magic = stream.read(2)
    stream.seek(0)
    return gzip.GzipFile(fileobj=stream) if magic == b"\x1f\x8b" else stream  # type: ignore[return-value]


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[str, str | BadRow]]:
    """(place, text without the line end) of every line; a line that is no text comes as a bad row."""
    for number, line in enumerate(stream, 1):
        where = f"{name}:{number}"
        if number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError(where, "the file is UTF-16", _recode(name, "UTF-16"))
            line = line.removeprefix(codecs.BOM_UTF8)
        yield where, _text(line.rstrip(b"\r\n"), where, name)


def _text(line: bytes, where: str, name: str) -> str | BadRow:
    shown = line[:SHOWN].decode("utf-8", "backslashreplace")
    if b"\0" in line:
        what = f"holds a NUL byte (column {line.index(0) + 1})"
        return BadRow(where, what, "the file is damaged or binary; export it again", shown)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}; latin-1?)"
        return BadRow(where, what, _recode(name, "latin1"), shown)


def _recode(name: str, encoding: str) -> str:
    return f"convert it: iconv -f {encoding} -t UTF-8 {Path(name).name} > utf8-{Path(name).name}"


def _not_text(stream: BinaryIO, name: str) -> DataError:
    """What is wrong with a file that could not be decoded, at its first line that is no text."""
    stream.seek(0)
    bad = next((text for _, text in _lines(stream, name) if isinstance(text, BadRow)), None)
    if bad is None:
        return DataError(name, "is not UTF-8", _recode(name, "latin1"))
    return DataError(bad.where, bad.what, bad.how)


@contextmanager
def _decoded(stream: BinaryIO, name: str) -> Iterator[io.TextIOWrapper]:
    """The stream as text; it is open still when this is done."""
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig")  # type: ignore[type-var]
    try:
        yield reader
    except UnicodeDecodeError as error:
        reader.detach()
        raise _not_text(stream, name) from error
    finally:
        with suppress(ValueError):  # it is detached
            reader.detach()  # a wrapper that is collected would close the stream


def _documents(stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    """Documents are separated by blank lines."""
    parts: list[str] = []
    start = ""
    for where, text in _lines(stream, name):
        if isinstance(text, BadRow):
            yield text
        elif text.strip():
            start = start if parts else where
            parts.append(text)
        elif parts:
            yield Row(start, {"text": "\n".join(parts)})
            parts = []
    if parts:
        yield Row(start, {"text": "\n".join(parts)})


# ---- JSON ----


def _json(stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    """A list of rows, one object that holds such a list, or a row a line: the content decides, since publishers mix up the endings."""
    lines = ending(name) != ".json"
    start = b"".join(stream.read(1 << 16).removeprefix(codecs.BOM_UTF8).split())[:2]
    stream.seek(0)
    if start.startswith(b"[") and (not lines or start in (b"[{", b"[]")):
        yield from _json_list(stream, name)
    elif start.startswith(b"{") and not lines:
        yield from _json_object(stream, name)
    elif lines:
        yield from _json_lines(stream, name)
    elif start:
        next(_lines(stream, name))  # says so where it is UTF-16
        raise DataError(name, "is not a JSON list", "give a list of objects, or name the file .jsonl")


def _json_lines(stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    for where, text in _lines(stream, name):
        if isinstance(text, BadRow):
            yield text
        elif text.strip():
            yield _json_line(where, text)


def _json_line(where: str, text: str) -> Row | BadRow:
    try:
        return _object(where, json.loads(text))
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            cut = error.pos >= len(text.rstrip()) - 1 or "Unterminated" in error.msg
            what = "the line ends in the middle of a JSON value" if cut else f"is not valid JSON (column {error.colno})"
            how = "the file was cut; copy it again or drop the line" if cut else "fix the line or drop it"
            return BadRow(where, what, how, text[:SHOWN])
        return BadRow(where, "is not valid JSON", "fix the line or drop it", text[:SHOWN])


def _json_object(stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    """A .json file that starts with an object: rows line by line, or the list of rows that one object holds."""
    texts = ((where, text) for where, text in _lines(stream, name) if isinstance(text, BadRow) or text.strip())
    first, second = (
        text if isinstance(text, BadRow) else _json_line(where, text)
        for where, text in [*islice(texts, 2), ("", "")][:2]
    )
    stream.seek(0)
    if isinstance(second, Row) or (isinstance(first, Row) and _rows_in(first.values) is None):
        yield from _json_lines(stream, name)
        return
    try:
        whole = json.loads(stream.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_text(stream, name) from error
    except (ValueError, RecursionError) as error:
        raise _invalid(f"{name}:{getattr(error, 'lineno', 1)}", "damaged or too deeply nested") from error
    inner = _rows_in(whole)
    if inner is None:
        what = 'is one JSON object over several lines without a "data" list'
        raise DataError(name, what, "give a list of objects, or JSONL")
    yield from (_object(f"{name}: row {i}", value) for i, value in enumerate(inner, 1))


def _rows_in(whole: Mapping[str, Any]) -> list[Any] | None:
    lists = (whole.get(name) for name in LISTS)
    return next((v for v in lists if isinstance(v, list) and any(isinstance(row, dict) for row in v)), None)


def _json_list(stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    decoder = json.JSONDecoder()
    with _decoded(stream, name) as reader:
        held, at, number, want, ended = reader.read(CHUNK), 0, 0, CHUNK, False
        while "[" not in held:
            held += reader.read(CHUNK)
        at = held.index("[") + 1
        line, counted, before = 1, 0, 0  # the line of `counted`, and that of the last row
        while True:
            here = _skip(held, at)
            if held[here : here + 1] == "," and number:
                here = _skip(held, here + 1)
            elif held[here : here + 1] == "]":
                return
            elif here < len(held) and number:
                raise _invalid(f"{name}:{line + held.count(chr(10), counted, here)}", f"no comma after row {number}")
            try:
                value, end = decoder.raw_decode(held, here)
                if end == len(held) and not ended:
                    raise ValueError  # a number may go on in the next block
            except (ValueError, RecursionError) as error:
                if ended or isinstance(error, RecursionError):
                    where = f"{name}:{line + held.count(chr(10), counted, here)}"
                    short = "the list is not closed" if here >= len(held) else "its value is cut short or damaged"
                    raise _invalid(where, f"row {number + 1}: {short}") from error
                more = reader.read(want)
                line, counted = line + held.count("\n", counted, at), 0
                held, at, want, ended = held[at:] + more, 0, want * 2, not more
                continue
            line, counted = line + held.count("\n", counted, here), here
            number, want, at = number + 1, CHUNK, end
            # rows that share a line are told apart by their number
            yield _object(f"{name}:{line}" if line > before else f"{name}:{line} (row {number})", value)
            before = line
            if at > CHUNK:
                line, counted = line + held.count("\n", counted, at), 0
                held, at = held[at:], 0


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _invalid(where: str, why: str) -> DataError:
    return DataError(where, f"is not valid JSON ({why})", "the file may be cut; fetch or copy it again")


def _object(where: str, value: Any) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(where, value)
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    what = f"is a JSON {names[type(value)]}, not an object"
    return BadRow(where, what, 'write {"prompt": ..., "chosen": ..., "rejected": ...}', value)


# ---- Tables ----


def _csv(stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    csv.field_size_limit(2**31 - 1)
    with _decoded(stream, name) as text:  # line breaks in fields become \n
        reader = csv.reader(text, delimiter="\t" if ending(name) == ".tsv" else ",")
        try:
            header = next(reader, None)
            if header is None or len(set(header)) != len(header):
                how = "add a header such as prompt,chosen,rejected"
                raise DataError(f"{name}:1", "the first line must name the columns, each once", how)
            done = reader.line_num
            for fields in reader:
                where, done = f"{name}:{done + 1}", reader.line_num
                if any("\0" in f for f in fields):
                    yield BadRow(where, "holds a NUL byte", "the file is damaged or binary; export it again", fields)
                elif fields and len(fields) != len(header):
                    what = f"has {len(fields)} fields, the header {len(header)}"
                    yield BadRow(where, what, "quote fields that hold the delimiter", [f[:SHOWN] for f in fields])
                elif fields:
                    yield Row(where, dict(zip(header, fields, strict=True)))
        except csv.Error as error:
            what = f"is not a readable table ({error})"
            raise DataError(f"{name}:{reader.line_num}", what, "export it again") from error


def _parquet(stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        table = pq.ParquetFile(stream, pre_buffer=False)
        for batch in table.iter_batches(batch_size=BATCH, use_threads=False):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{name}: row {number}", values)
    except (pa.ArrowException, OSError) as error:
        what = f"is not a readable Parquet file ({str(error).splitlines()[0]})"
        raise DataError(name, what, "fetch or copy it again") from error


def _read_hub(path: str) -> Iterator[Row | BadRow]:
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


_READERS: dict[str, Callable[[BinaryIO, str], Iterator[Row | BadRow]]] = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), _json),
    **dict.fromkeys((".csv", ".tsv"), _csv),
    ".parquet": _parquet,
    ".txt": _documents,
}
