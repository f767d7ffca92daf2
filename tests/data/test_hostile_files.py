"""Damaged, hostile and odd files: a sentence or counted bad rows, in bounded time and memory; never a traceback, never a row lost."""

from __future__ import annotations

import gzip
import io
import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penchant.data.audit import audit_files
from penchant.data.audit.fix import fix
from penchant.data.layouts.page import preview
from penchant.data.load import load_preferences
from penchant.data.read import BadRow, Row, read_rows
from penchant.errors import PenchantError

Made = tuple[str, bytes]

# ---- a fuzzer of files -----------------------------------------------------------------------------------------------

WORDS = ["Seven.", "é ☃ 😀", 'say "no"', "two\nlines", "a, b; c\td|e", "\r", "x" * 300, "0", "\\", "</s>"]


def rows_of(random_: random.Random, many: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Name {i}. {random_.choice(WORDS)}", "chosen": f"a {random_.choice(WORDS)}", "rejected": f"b {i}"}
        for i in range(many)
    ]


def jsonl(rows: list[dict[str, Any]], random_: random.Random) -> Made:
    return "a.jsonl", b"".join(json.dumps(r, ensure_ascii=random_.random() < 0.5).encode() + b"\n" for r in rows)


def json_list(rows: list[dict[str, Any]], random_: random.Random) -> Made:
    return "a.json", json.dumps(rows, indent=random_.choice([None, 1])).encode()


def json_object(rows: list[dict[str, Any]], random_: random.Random) -> Made:
    return "a.json", json.dumps({"version": 1, random_.choice(["data", "rows"]): rows}, indent=random_.choice([None, 1])).encode()


def table(rows: list[dict[str, Any]], random_: random.Random) -> Made:
    import csv

    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=random_.choice(",;\t|"))
    writer.writeheader()
    writer.writerows(rows)
    return random_.choice(["a.csv", "a.tsv"]), out.getvalue().encode()


def documents(rows: list[dict[str, Any]], random_: random.Random) -> Made:
    return "a.txt", "\n\n".join(r["prompt"] for r in rows).encode()


def parquet(rows: list[dict[str, Any]], random_: random.Random) -> Made:
    out = io.BytesIO()
    how = {"compression": random_.choice(["none", "snappy", "gzip", "zstd"]), "use_dictionary": random_.random() < 0.5}
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=random_.choice([2, 100]), **how)
    return "a.parquet", out.getvalue()


FORMATS: list[Callable[..., Made]] = [jsonl, json_list, json_object, table, documents, parquet]
ODD = [
    b"\0", b"\r", b"\n", b'"', b"'", b"\xef\xbb\xbf", b"\xff\xfe", b"[", b"]", b"{", b"}", b",", b";", b"\x80", b"\xed\xa0\x80",
    b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 1500, b'{"a": 1, "a": 2}', b'"\\ud800"', b"\\u0000",
    b"\x1f\x8b", b"\x1b[31m", b"null", b"\n\n\n", b'[{"prompt": "p", "chosen": "c", "rejected": "r"}]', b'"', b"\\",
]  # fmt: skip


def damaged(content: bytes, random_: random.Random) -> bytes:
    made = bytearray(content)
    for _ in range(random_.choice([0, 1, 1, 2, 5])):
        at, size = random_.randrange(len(made) + 1), random_.choice([1, 2, 8, 64])
        how = random_.randrange(6)
        if how == 0:
            made[at : at + size] = random_.choice(ODD)
        elif how == 1:
            made[at:at] = random_.choice(ODD)
        elif how == 2:
            del made[at : at + size]
        elif how == 3 and at < len(made):
            made[at] ^= 1 << random_.randrange(8)
        elif how == 4:
            made[at:at] = made[at : at + size * 8]
        else:
            del made[at:]
    return bytes(made)


def made_file(random_: random.Random) -> tuple[Made, int | None]:
    """A file, damaged or not, and how many rows it has if it is whole."""
    rows = rows_of(random_, random_.choice([1, 3, 12]))
    name, content = random_.choice(FORMATS)(rows, random_)
    whole = random_.random() < 0.1
    if not whole:
        content = damaged(content, random_)
    if random_.random() < 0.3 and name != "a.parquet":
        packed = gzip.compress(content[: len(content) // 2]) + gzip.compress(content[len(content) // 2 :])
        content = packed if whole else damaged(packed, random_)
        name += random_.choice(["", ".gz"])
    if random_.random() < 0.1 and not whole:
        name = random_.choice(["a.json", "a.jsonl", "a.csv", "a.txt", "a.parquet", "a.ndjson.gz"])
    return (name, content), len(rows) if whole and name != "a.txt" else None


def tried(folder: Path, made: Made, many: int | None) -> str:
    """What became of a file, by every way in which rows are read; only our own errors come out."""
    path = folder / made[0]
    path.write_bytes(made[1])
    try:
        read = list(read_rows(str(path)))
        assert all(isinstance(r, (Row, BadRow)) for r in read)
        assert all(r.what and r.how for r in read if isinstance(r, BadRow))
        assert len({r.where for r in read}) == len(read)
        json.dumps([r.raw for r in read if isinstance(r, BadRow)], default=str)
        lines = made[1].split(b"\n")
        if made[0] in ("a.jsonl", "a.ndjson") and not any(line.lstrip(b" \xef\xbb\xbf\r").startswith(b"[") for line in lines):
            physical = made[1] if b"\n" in made[1] else made[1].replace(b"\r", b"\n")
            assert len(read) >= 1
            assert len(read) == sum(bool(li.strip()) for li in physical.split(b"\n")) or b'\xef\xbb\xbf' in physical, read
    except PenchantError as error:
        assert error.what
        read = []
        said = "refused"
    else:
        said = "bad" if any(isinstance(r, BadRow) for r in read) else "read"
    if many is not None:
        assert len(read) == many
        assert said == "read"
    for how in (
        lambda: load_preferences(str(path), on_bad_row="skip"),
        lambda: audit_files({"train": str(path)}, languages=False),
        lambda: preview(str(path)).to_json() and preview(str(path)).to_text(),
        lambda: fix(str(path), folder / ("b.parquet" if made[0].endswith(".parquet") else "b.jsonl"), overwrite=True, redact=("pii",)),
    ):
        try:
            found = how()
        except PenchantError as error:
            assert str(error)
        else:
            if how.__code__.co_names[0] == "load_preferences":
                assert found.total == len(read)
    return said


def fuzz(folder: Path, seed: int, files: int) -> dict[str, int]:
    """Tries files; counts what became of them."""
    random_ = random.Random(seed)
    counts: dict[str, int] = {}
    for number in range(files):
        made, many = made_file(random_)
        started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            said = tried(folder, made, many)
        except Exception as error:
            kept = folder / f"failed-{seed}-{number}-{made[0]}"
            kept.write_bytes(made[1])
            raise AssertionError(f"{kept}: {type(error).__name__}: {error}") from error
        assert time.process_time() - started < 10
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB
        counts[said] = counts.get(said, 0) + 1
    return counts


def test_fuzzed_files_end_in_rows_bad_rows_or_a_sentence(tmp_path: Path) -> None:
    counts = fuzz(tmp_path, 1, 40)
    assert set(counts) == {"read", "bad", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_more_fuzzed_files(tmp_path: Path, seed: int) -> None:
    print(fuzz(tmp_path, seed, 600))
