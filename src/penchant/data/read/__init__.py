"""Rows of JSONL, JSON, CSV, TSV (all plain or gzip), Parquet and text, each with its place: from disk, an open stream or the hub.

`train` and `data get` read through this one reader, row by row. What a file holds decides how it is read, not its ending alone.
No row is lost: it is read, comes as a bad row, or the file is refused. Memory is bounded by `Bounds`, whatever the file says.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Sequence
from typing import BinaryIO

from penchant.base.hub import check_hub
from penchant.data.read.files import ENDINGS, ending, find_files, named_files
from penchant.data.read.json_text import read_json
from penchant.data.read.source import BOUNDS, BadRow, Bounds, Row, Rows, Source, documents
from penchant.data.read.tables import read_csv, read_parquet
from penchant.errors import DataError

__all__ = [
    "BOUNDS", "ENDINGS", "BadRow", "Bounds", "Row", "Rows", "ending", "find_files", "named_files", "read_rows", "read_stream",
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
        yield from read_parquet(stream, name, bounds)
        return
    try:
        yield from _READERS[ending(name)](Source(stream, name, bounds))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(name, f"the gzip file is cut short or damaged ({error})", "fetch or copy it again") from error


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


_READERS: dict[str, Callable[[Source], Rows]] = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), read_json),
    **dict.fromkeys((".csv", ".tsv"), read_csv),
    ".txt": documents,
}
