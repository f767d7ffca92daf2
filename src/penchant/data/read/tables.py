"""Rows of CSV, TSV and Parquet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, BinaryIO

from penchant.base.text import printable, repeated
from penchant.data.read.files import ending
from penchant.data.read.source import (
    HEAD,
    SHOWN,
    SMALL,
    BadRow,
    Bounds,
    Missing,
    Row,
    Rows,
    Shard,
    Source,
    calls_without_nulls,
    not_utf8,
)
from penchant.errors import DataError

# how pandas and databases write a missing value in a text column; in Parquet, which has nulls, "None" is a word
IN_PARQUET = frozenset(["nan", "NaN", "NaT", "<NA>"])
IN_CSV = IN_PARQUET | {"None", "null", "NULL", "#N/A"}
SHORT = 16  # characters: a longer cell is not such a word
BATCH = 32  # Parquet rows held as Python objects at a time


def read_csv(source: Source) -> Rows:
    csv.field_size_limit(source.bounds.bytes)
    lines, first_lines = _table_lines(source), []
    for line in lines:
        first_lines.append(line)
        if len(first_lines) == 100 or sum(map(len, first_lines)) > HEAD:
            break
    name = source.name
    delimiter = _delimiter(first_lines, "\t" if ending(name) == ".tsv" else ",")
    reader = csv.reader(chain(first_lines, lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    lines_done = 0
    while True:
        try:
            fields = next(reader)
            if not fields:
                lines_done = reader.line_num
                continue
        except StopIteration:
            return
        except csv.Error as error:
            where = f"{name}:{lines_done + 1}"
            if "end of data" in str(error):
                what = f"a quote that is opened here is not closed up to the end of the file, line {reader.line_num}"
                raise DataError(where, what, "close it, or double quotes within a field") from error
            if "field limit" in str(error):
                raise source.too_long(where, "a field") from error
            if header is None:
                raise DataError(where, f"is not a readable header ({error})", "export the table again") from error
            span = f"lines {lines_done + 1} to {reader.line_num}: " if reader.line_num > lines_done + 1 else ""
            reason = "a carriage return stands outside quotes" if "new-line" in str(error) else error
            lines_done, what = reader.line_num, f"{span}is not a readable row ({reason})"
            yield BadRow(where, what, "double quotes within a quoted field, or export the table again", None)
            continue
        where, lines_done = f"{name}:{lines_done + 1}", reader.line_num
        if header is None:
            if not (lines_done == 1 and re.fullmatch(r"sep=.?", "".join(fields).strip(), re.IGNORECASE)):
                header = _header(fields, where)
        elif any("\0" in f for f in fields):
            yield BadRow(where, "holds a NUL byte", "the file is damaged or binary; export it again", fields)
        elif len(fields) != len(header):
            what = f"has {len(fields)} fields, the header {len(header)}"
            how = f"quote fields that hold the delimiter ({_NAMES[delimiter]})"
            yield BadRow(where, what, how, [f[:SHOWN] for f in fields[:100]])
        else:
            yield Row(where, _mark_missing(dict(zip(header, fields, strict=True)), IN_CSV))


def _mark_missing(row: dict[str, Any], words: frozenset[str]) -> dict[str, Any]:
    """The row, with cells that stand for a missing value as `Missing`."""
    for name, value in row.items():
        if isinstance(value, str) and len(value) < SHORT and value.strip() in words:
            row[name] = Missing(value)
    return row


def _header(fields: Sequence[str], where: str) -> list[str]:
    """The column names; a column without a name is named by its number."""
    names = [name if name.strip() else f"column {i}" for i, name in enumerate(fields, 1)]
    if duplicates := repeated(names):
        what = f'the first line must name the columns, each once, and it has "{printable(duplicates[0][:100])}" twice'
        raise DataError(where, what, "rename one, or add a header such as prompt,chosen,rejected")
    return names


def _table_lines(source: Source) -> Iterator[str]:
    """The lines of a table as text, each with its line end, which is part of the cell inside quotes."""
    for number, line in source.lines(blank=True):
        try:
            yield line.decode("utf-8") + "\n"
        except UnicodeDecodeError as error:
            raise DataError(f"{source.name}:{number}", *not_utf8(line, error.start, source.name)) from error


_NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}


def _delimiter(lines: Sequence[str], default: str) -> str:
    """The field delimiter, guessed from the header and the rows after it."""
    lines = [line.replace("\r", "") for line in lines]  # a CR outside quotes stops the reader
    declared = re.fullmatch(r'"?sep=(.)"?\s*', lines[0], re.IGNORECASE) if lines else None
    if declared and declared[1] in _NAMES:
        return declared[1]
    scores: dict[str, tuple[float, int]] = {}
    for delimiter in (default, *(d for d in _NAMES if d != default)):
        rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
        header, rest = (rows[0], rows[1:] if len(rows) < 3 else rows[1:-1]) if rows else ([], [])
        if len(header) > 1 and (delimiter == default or all(re.fullmatch(r"[^,;\t|]*", name) for name in header)):
            scores[delimiter] = (sum(len(r) == len(header) for r in rest) / max(1, len(rest)), len(header))
    if scores.get(default, (0.0, 0))[0] >= 0.5 or not scores:
        return default
    return max(scores, key=lambda d: scores[d])


def read_parquet(stream: BinaryIO, name: str, bounds: Bounds, shard: Shard | None = None) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = shard.before if shard else 0
    groups = range(shard.start, shard.end) if shard else None
    try:
        file = pq.ParquetFile(stream, pre_buffer=False, page_checksum_verification=True)
        names, meta = file.schema_arrow.names, file.metadata
        if duplicates := repeated(names):
            what = f'has two columns named "{printable(duplicates[0][:100])}"'
            raise DataError(name, what, "rename one and write the file again")
        stream.seek(0, io.SEEK_END)
        size = stream.tell()
        claimed = max(meta.num_rows, sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)))
        if claimed > max(SMALL, bounds.unpacked * size):
            what = f"unpacks to more than {bounds.unpacked:g} times its size ({size:,} bytes give {claimed:,})"
            raise DataError(name, what, bounds.how("unpacked", "check what it holds"))
        unpacked = 0
        for batch in file.iter_batches(batch_size=BATCH, row_groups=groups, use_threads=False):
            unpacked += batch.nbytes  # a value stored once in a dictionary is repeated for every row that uses it
            if unpacked > max(SMALL, bounds.unpacked * size):
                what = f"unpacks to more than {bounds.unpacked:g} times its size ({size:,} bytes)"
                raise DataError(f"{name}: row {number + 1}", what, bounds.how("unpacked", "check what it holds"))
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
    except Exception as error:  # pyarrow raises errors of its own, and of texts, numbers and dates
        message = str(error).strip() or type(error).__name__
        what = f"is not a readable Parquet file ({printable(message.splitlines()[0][:200])})"
        raise DataError(name, what, "fetch or copy it again, or write it anew with pyarrow") from error


def _batch(batch: Any, name: str, number: int, pyarrow: Any) -> Rows:
    """The rows of a batch, converted cell by cell if a value cannot become a Python object."""
    try:
        rows = batch.to_pylist()
        if "arguments: struct" in str(batch.schema) or "parameters: struct" in str(batch.schema):
            rows = list(map(calls_without_nulls, rows))
    except (ValueError, OverflowError, KeyError, TypeError, pyarrow.ArrowException):
        rows = None
    for i in range(len(batch)):
        if rows is not None:
            yield Row(f"{name}: row {number + i + 1}", _mark_missing(rows[i], IN_PARQUET))
            continue
        where, values = f"{name}: row {number + i + 1}", {}
        for column, cells in zip(batch.schema.names, batch.columns, strict=True):
            try:
                values[column] = _cell(cells[i], pyarrow)
            except Exception as error:
                what = f'"{printable(column[:100])}" cannot be read ({printable(str(error).splitlines()[0][:200])})'
                yield BadRow(where, what, "fix or drop the column", {k: str(v)[:SHOWN] for k, v in values.items()})
                break
        else:
            yield Row(where, _mark_missing(values, IN_PARQUET))


def _cell(cell: Any, pyarrow: Any) -> Any:
    """A cell's value; a time that Python cannot represent (year beyond 9999, nanoseconds, unknown zone) as Arrow writes it."""
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8") from error
    except (ValueError, OverflowError, KeyError, TypeError, pyarrow.ArrowException):
        if not pyarrow.types.is_temporal(cell.type):
            raise
        try:
            return cell.cast(pyarrow.string()).as_py()
        except pyarrow.ArrowException:
            return str(cell.cast(pyarrow.int64()).as_py())
