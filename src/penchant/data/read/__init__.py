"""Read rows of JSONL, JSON, CSV, TSV and text (plain or gzip) and Parquet, each with its place, from disk, a stream or the hub.

`train` and `data get` share this reader, which works row by row. A file's content decides how it is read, not its ending alone.
No row is lost: it is read, comes as a bad row, or the whole file is rejected. Memory is bounded by `Bounds` for any file.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from penchant.base.hub import check_hub
from penchant.data.read.files import ENDINGS, ending, find_files, named_files
from penchant.data.read.json_text import is_lines, json_lines, read_json
from penchant.data.read.source import (
    BOUNDS,
    CHUNK,
    BadRow,
    Bounds,
    Row,
    Rows,
    Shard,
    Source,
    calls_without_nulls,
    documents,
    line_end,
)  # fmt: skip
from penchant.data.read.tables import read_csv, read_parquet
from penchant.errors import DataError

__all__ = [
    "BOUNDS", "ENDINGS", "SHARD", "BadRow", "Bounds", "Row", "Rows", "Shard", "calls_without_nulls", "ending", "find_files",
    "named_files", "read_rows", "read_shard", "read_stream", "shards_of",
]  # fmt: skip


def read_rows(path: str | Sequence[str], bounds: Bounds | None = None) -> Rows:
    """All rows of files, folders of files, patterns or hub ids, in order.

    Raises:
        DataError: as `named_files`, or a file is damaged or has no rows.
    """
    for name, file in named_files(path):
        if file is None:
            yield from _read_hub(name)
            continue
        yield from _read_file(name, file, bounds)


def _read_file(name: str, file: Path, bounds: Bounds | None) -> Rows:
    seen = False
    try:
        with file.open("rb") as stream:
            for row in read_stream(stream, name, bounds):
                seen = True
                yield row
    except OSError as error:
        raise DataError(str(file), f"cannot be read ({error.strerror or error})", "check its permissions") from error
    if not seen:
        raise DataError(str(file), "the file has no rows", "give a file with at least one row")


def read_stream(stream: BinaryIO, name: str, bounds: Bounds | None = None) -> Rows:
    """All rows of an open file, in order; memory is bounded by a few rows for files of any size.

    Args:
        stream: seekable, at its start; name: its ending gives the format, and messages use it.

    Raises:
        DataError: the file is damaged, cut short, over a bound or not of the format of its ending.
    """
    bounds = bounds or BOUNDS.get() or Bounds()
    if ending(name) == ".parquet":
        yield from read_parquet(stream, name, bounds)
        return
    try:
        yield from _READERS[ending(name)](Source(stream, name, bounds))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(name, f"the gzip file is cut short or damaged ({error})", "fetch or copy it again") from error


SHARD = 16 << 20  # bytes of a part of a file
UNCUT = 16 * SHARD  # larger files that cannot be split are read in this process: sending the results back costs more


def shards_of(path: str | Sequence[str], bounds: Bounds | None = None) -> list[Shard]:
    """Split files into parts whose rows, in order, are those of `read_rows`: lines of JSONL, row groups of Parquet, other files whole.
    The list is empty if that is impossible: a hub id, or a large file that cannot be split.

    Raises:
        DataError: as `named_files`.
    """
    shards: list[Shard] = []
    for name, file in named_files(path):
        parts = [] if file is None else _parts(name, file, bounds or BOUNDS.get() or Bounds())
        if not parts:
            return []
        shards += parts
    return shards


def _parts(name: str, file: Path, bounds: Bounds) -> list[Shard]:
    size = file.stat().st_size
    if size > SHARD and ending(name) == ".parquet":
        return _row_groups(name, file)
    if size > SHARD and _READERS.get(ending(name)) is read_json:
        with file.open("rb") as stream:
            head = stream.read(CHUNK)
            stream.seek(0)
            if not head.startswith(b"\x1f\x8b") and line_end(head) == b"\n" and is_lines(Source(stream, name, bounds)):
                stream.seek(0)
                return _lines(name, file, stream)
    return [Shard(name, str(file))] if size <= UNCUT else []


def _lines(name: str, file: Path, stream: BinaryIO) -> list[Shard]:
    shards: list[Shard] = []
    start = offset = before = lines = 0
    while block := stream.read(CHUNK):
        if offset + len(block) - start >= SHARD and (last := block.rfind(b"\n")) >= 0:
            lines_read = lines + block.count(b"\n")
            shards.append(Shard(name, str(file), start, offset + last + 1, before))
            start, before = offset + last + 1, lines_read
        lines += block.count(b"\n")
        offset += len(block)
    return [*shards, Shard(name, str(file), start, offset, before)] if offset > start else shards


def _row_groups(name: str, file: Path) -> list[Shard]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        meta = pq.read_metadata(file)
    except (pa.ArrowException, OSError):
        return []  # the reader will report what is wrong
    shards: list[Shard] = []
    start = before = rows = size = 0
    for i in range(meta.num_row_groups):
        group = meta.row_group(i)
        rows, size = rows + group.num_rows, size + group.total_byte_size
        if size >= SHARD or i + 1 == meta.num_row_groups:
            shards.append(Shard(name, str(file), start, i + 1, before))
            start, before, size = i + 1, rows, 0
    return shards


def read_shard(shard: Shard, bounds: Bounds | None = None) -> Rows:
    """The rows of a part of a file, in order.

    Raises:
        DataError: as `read_rows`.
    """
    if shard.end < 0:
        yield from _read_file(shard.name, Path(shard.file), bounds)
        return
    bounds = bounds or BOUNDS.get() or Bounds()
    with Path(shard.file).open("rb") as stream:
        if ending(shard.name) == ".parquet":
            yield from read_parquet(stream, shard.name, bounds, shard)
        else:
            yield from json_lines(Source(stream, shard.name, bounds, shard))


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
    except Exception as error:  # the library raises many kinds of errors: network, access, format
        message = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        how = "check the name and the network; for gated data accept its terms on its page and set HF_TOKEN"
        raise DataError(path, f"could not be read from the hub ({message})", how) from error


_READERS: dict[str, Callable[[Source], Rows]] = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), read_json),
    **dict.fromkeys((".csv", ".tsv"), read_csv),
    ".txt": documents,
}
