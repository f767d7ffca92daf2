"""Read rows from JSON, JSONL (plain or gzip), CSV, Parquet, plain text or a hub id, each with the place it stands at."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.errors import DataError

READABLE = ".json, .jsonl, .jsonl.gz, .csv, .tsv, .parquet, .txt"


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it stands (``train.jsonl:118``)."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read: where, what, how to mend it, and what was found there."""

    where: str
    what: str
    how: str
    raw: Any


def read_rows(path: str) -> Iterator[Row | BadRow]:
    """All rows of a file or hub id, in order.

    Raises:
        DataError: the whole file cannot be read: missing, empty, a folder, an unknown ending, not UTF-8 at its start.
    """
    file = Path(path).expanduser()
    if not file.exists():
        if _looks_like_hub_id(path):
            yield from _read_hub(path)
            return
        raise DataError(str(path), "no such file", _sibling(file))
    if file.is_dir():
        raise DataError(str(path), "is a folder", f"give a file ({READABLE})")
    if file.stat().st_size == 0:
        raise DataError(str(path), "the file is empty", "give a file with at least one row")
    name = file.name.lower()
    for endings, reader in _READERS.items():
        if name.endswith(endings):
            seen = False
            for row in reader(file):
                seen = True
                yield row
            if not seen:
                raise DataError(str(path), "the file has no rows", "give a file with at least one row")
            return
    raise DataError(str(path), f'the ending "{file.suffix}" is not known', f"rename it to what it holds: {READABLE}")


def _sibling(file: Path) -> str:
    names = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
    near = difflib.get_close_matches(file.name, names, 1)
    return f"did you mean {file.parent / near[0]}?" if near else "check the path; a hub id is written owner/name"


def _looks_like_hub_id(path: str) -> bool:
    return (
        re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", path) is not None
        and not path.startswith(".")
        and Path(path).suffix
        not in (
            ".json",
            ".jsonl",
            ".gz",
            ".csv",
            ".tsv",
            ".parquet",
            ".txt",
        )
    )


# ---------------------------------------------------------------------------------------------------------------------
# text files


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(1-based number, bytes without the line end) of every line; gzip is told by its first bytes, a BOM is dropped."""
    with file.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(file, "rb") if packed else file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise DataError(f"{file.name}:1", "the file is UTF-16", _recode(file, "UTF-16"))
                yield number, line.rstrip(b"\r\n")
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(
            str(file), f"the gzip file is cut short or damaged ({error})", "copy or download it again"
        ) from error
    except OSError as error:
        raise DataError(str(file), f"cannot be read ({error.strerror})", "check its permissions") from error


def _recode(file: Path, encoding: str) -> str:
    return f"convert it: iconv -f {encoding} -t UTF-8 {file.name} > utf8-{file.name}"


def _decode(file: Path, number: int, line: bytes) -> str | BadRow:
    where = f"{file.name}:{number}"
    if b"\0" in line:
        at = line.index(b"\0")
        return BadRow(
            where, f"holds a NUL byte (column {at + 1})", "the file is damaged or binary; export it again", _shown(line)
        )
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}; latin-1?)"
        return BadRow(where, what, _recode(file, "latin1"), _shown(line))


def _shown(line: bytes) -> str:
    return line[:500].decode("utf-8", "backslashreplace")


def _read_jsonl(file: Path) -> Iterator[Row | BadRow]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        text = _decode(file, number, line)
        if isinstance(text, BadRow):
            yield text
            continue
        where = f"{file.name}:{number}"
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            column = getattr(error, "colno", 1)
            cut = (
                isinstance(error, json.JSONDecodeError) and error.pos >= len(text.rstrip()) - 1
            ) or "Unterminated" in str(error)
            what = "the line ends in the middle of a JSON value" if cut else f"is not valid JSON (column {column})"
            how = "the file was cut; copy it again or drop the line" if cut else "mend the line or drop it"
            yield BadRow(where, what, how, text[:500])
            continue
        yield _object(where, value)


def _object(where: str, value: Any) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(where, value)
    return BadRow(
        where,
        f"is a JSON {_kind(value)}, not an object",
        'write {"prompt": ..., "chosen": ..., "rejected": ...}',
        value,
    )


def _kind(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _read_json(file: Path) -> Iterator[Row | BadRow]:
    parts = []
    for number, line in _lines(file):
        text = _decode(file, number, line)
        if isinstance(text, BadRow):
            raise DataError(text.where, text.what, text.how)
        parts.append(text)
    text = "\n".join(parts)
    decoder = json.JSONDecoder()
    try:
        at = _skip(text, 0)
        if at < len(text) and text[at] == "{":
            whole = json.loads(text)
            inner = next((v for k in ("data", "rows", "train") if isinstance(v := whole.get(k), list)), None)
            if inner is None:
                raise DataError(
                    file.name, 'is one JSON object without a "data" list', "give a list of objects, or JSONL"
                )
            yield from (_object(f"{file.name}: row {i}", v) for i, v in enumerate(inner, 1))
            return
        if at >= len(text) or text[at] != "[":
            raise DataError(file.name, "is not a JSON list", "give a list of objects, or name the file .jsonl")
        at = _skip(text, at + 1)
        at_line, counted, before, number = 1, 0, 0, 0
        while at < len(text) and text[at] != "]":
            at_line += text.count("\n", counted, at)
            counted = at
            value, at = decoder.raw_decode(text, at)
            number += 1
            # a file without line breaks has all its rows on one line
            place = f"{file.name}:{at_line}" if at_line > before else f"{file.name}:{at_line} (row {number})"
            before = at_line
            yield _object(place, value)
            at = _skip(text, at)
            if at < len(text) and text[at] == ",":
                at = _skip(text, at + 1)
            elif at >= len(text) or text[at] != "]":
                raise json.JSONDecodeError("expected , or ]", text, at)
        if at >= len(text):
            raise json.JSONDecodeError("the list is not closed", text, at)
    except (json.JSONDecodeError, RecursionError) as error:
        place = f"{file.name}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else file.name
        raise DataError(
            place,
            f"is not valid JSON ({getattr(error, 'msg', 'too deeply nested')})",
            "the file may be cut; JSONL survives that better",
        ) from error


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _read_csv(file: Path) -> Iterator[Row | BadRow]:
    csv.field_size_limit(2**31 - 1)
    decoded: list[str] = []
    for number, line in _lines(file):
        text = _decode(file, number, line)
        if isinstance(text, BadRow):
            raise DataError(text.where, text.what, text.how)
        decoded.append(text)
    delimiter = "\t" if ".tsv" in file.name.lower() else ","
    reader = csv.reader(io.StringIO("\n".join(decoded), newline=""), delimiter=delimiter)
    header = next(reader, None)
    if header is None or len(set(header)) != len(header):
        raise DataError(
            f"{file.name}:1",
            "the first line must name the columns, each once",
            "add a header such as prompt,chosen,rejected",
        )
    done = reader.line_num
    for fields in reader:
        where, done = f"{file.name}:{done + 1}", reader.line_num
        if not fields:
            continue
        if len(fields) != len(header):
            what = f"has {len(fields)} fields, the header {len(header)}"
            yield BadRow(where, what, "quote fields that hold the delimiter", fields)
        else:
            yield Row(where, dict(zip(header, fields, strict=True)))


def _read_text(file: Path) -> Iterator[Row | BadRow]:
    """Documents are separated by blank lines."""
    parts: list[str] = []
    start = 1
    for number, line in [*_lines(file), (-1, b"")]:
        text = _decode(file, number, line)
        if isinstance(text, BadRow):
            yield text
            continue
        if text.strip():
            start = number if not parts else start
            parts.append(text)
        elif parts:
            yield Row(f"{file.name}:{start}", {"text": "\n".join(parts)})
            parts = []


def _read_parquet(file: Path) -> Iterator[Row | BadRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{file.name}: row {number}", values)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            str(file), f"is not a readable Parquet file ({str(error).splitlines()[0]})", "export it again"
        ) from error


def _read_hub(path: str) -> Iterator[Row | BadRow]:
    name, _, split = path.partition(":")
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


_READERS: dict[tuple[str, ...], Any] = {
    (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"): _read_jsonl,
    (".json", ".json.gz"): _read_json,
    (".csv", ".csv.gz", ".tsv", ".tsv.gz"): _read_csv,
    (".parquet",): _read_parquet,
    (".txt", ".txt.gz"): _read_text,
}
