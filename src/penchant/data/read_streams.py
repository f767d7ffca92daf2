"""Rows out of an open file, one at a time: JSONL, JSON lists, CSV (all plain or gzip) and Parquet, on disk or read by ranges."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, BinaryIO

from penchant.data.read import BadRow, Row
from penchant.errors import DataError

READABLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
CHUNK = 1 << 20  # characters of a JSON list at a time
SHOWN = 500
BATCH = 256  # Parquet rows that are Python objects at one time


def readable(name: str) -> bool:
    """Whether a file of this name can be read."""
    return _ending(name) in READABLE


def _ending(name: str) -> str:
    lower = name.lower().removesuffix(".gz")
    return next((e for e in READABLE if lower.endswith(e)), "")


def read_stream(stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    """All rows of an open file, in order; memory is bounded by a few rows, whatever the file's size.

    Args:
        stream: seekable, at its start; name: its path in the data set: its ending says what it is, and messages name it.

    Raises:
        DataError: the file is damaged, cut short or not what its ending says.
    """
    try:
        yield from _READERS[_ending(name)](stream, name)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(name, f"the gzip file is cut short or damaged ({error})", "fetch or copy it again") from error
    except UnicodeDecodeError as error:
        raise DataError(name, f"is not UTF-8 (byte {error.start} of a block)", "convert it to UTF-8") from error


def _plain(stream: BinaryIO) -> BinaryIO:
    magic = stream.read(2)
    stream.seek(0)
    return gzip.GzipFile(fileobj=stream) if magic == b"\x1f\x8b" else stream  # type: ignore[return-value]


def _first_character(stream: BinaryIO) -> bytes:
    while block := stream.read(64):
        if text := block.removeprefix(b"\xef\xbb\xbf").strip():
            return text[:1]
    return b""


def _json(stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    """A list is read as one and anything else line by line: publishers put JSONL into .json files, and lists into .jsonl."""
    opened = _plain(stream)
    is_list = _first_character(opened) == b"["
    opened.seek(0)
    yield from (_json_list if is_list else _json_lines)(opened, name)


def _json_lines(stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    for number, line in enumerate(stream, 1):
        text = line.removeprefix(b"\xef\xbb\xbf").strip()
        if not text:
            continue
        where = f"{name}:{number}"
        try:
            yield _object(where, json.loads(text))
        except (ValueError, RecursionError) as error:
            if number == 1 and text.rstrip() in (b"{", b'{"data": [', b'{"rows": ['):
                raise DataError(
                    name, "is one JSON object over several lines", "give a list of objects, or JSONL"
                ) from error
            yield BadRow(where, "is not valid JSON", "mend the line or drop it", _shown(text))


def _json_list(stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig")  # type: ignore[type-var]
    decoder = json.JSONDecoder()
    held, at, number, want, ended = reader.read(CHUNK), 0, 0, CHUNK, False
    at = held.index("[") + 1
    while True:
        at = _skip(held, at, " \t\r\n,")
        if at < len(held) and held[at] == "]":
            reader.detach()
            return
        try:
            if at >= len(held):
                raise ValueError
            value, at = decoder.raw_decode(held, at)
        except (ValueError, RecursionError) as error:
            if ended or isinstance(error, RecursionError):
                what = "the list is not closed" if at >= len(held) else "holds a value that is not valid JSON"
                raise DataError(
                    f"{name}: row {number + 1}", what, "the file may be cut; fetch or copy it again"
                ) from error
            more = reader.read(want)
            held, at, want, ended = held[at:] + more, 0, want * 2, not more
            continue
        number, want = number + 1, CHUNK
        yield _object(f"{name}: row {number}", value)
        if at > CHUNK:
            held, at = held[at:], 0


def _skip(text: str, at: int, what: str) -> int:
    while at < len(text) and text[at] in what:
        at += 1
    return at


def _object(where: str, value: Any) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(where, value)
    return BadRow(
        where, f"is a JSON {type(value).__name__}, not an object", "give one object a row", str(value)[:SHOWN]
    )


def _shown(line: bytes) -> str:
    return line[:SHOWN].decode("utf-8", "backslashreplace")


def _csv(stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(_plain(stream), encoding="utf-8-sig", newline="")  # type: ignore[type-var]
    reader = csv.reader(text, delimiter="\t" if _ending(name) == ".tsv" else ",")
    header = next(reader, None)
    if header is None or len(set(header)) != len(header):
        raise DataError(f"{name}:1", "the first line must name the columns, each once", "add a header")
    done = reader.line_num
    for fields in reader:
        where, done = f"{name}:{done + 1}", reader.line_num
        if not fields:
            continue
        if len(fields) != len(header):
            what = f"has {len(fields)} fields, the header {len(header)}"
            yield BadRow(where, what, "quote fields that hold the delimiter", [f[:SHOWN] for f in fields])
        else:
            yield Row(where, dict(zip(header, fields, strict=True)))
    text.detach()


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


_READERS: dict[str, Callable[[BinaryIO, str], Iterator[Row | BadRow]]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _json),
    **dict.fromkeys((".csv", ".tsv"), _csv),
    ".parquet": _parquet,
}


def first_rows(rows: Iterator[Row | BadRow], count: int | None) -> Iterator[Row | BadRow]:
    """The first rows of a stream; all of them where `count` is None."""
    return islice(rows, count)
