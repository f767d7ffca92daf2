"""Reading rows from streams: any JSON, block boundaries, damage, and bounded memory."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.data.read import BadRow, Row, json_text, read_stream, source
from penchant.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda v: st.lists(v, max_size=3),
)
OBJECTS = st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=6)


def read(content: bytes, name: str) -> list[Any]:
    return [r.values if isinstance(r, Row) else r for r in read_stream(io.BytesIO(content), name)]


@given(objects=OBJECTS, block=st.integers(1, 40), indent=st.sampled_from([None, 1]), packed=st.booleans())
def test_lists_and_lines_are_read_as_they_are(
    objects: list[dict], block: int, indent: int | None, packed: bool
) -> None:
    pack = gzip.compress if packed else bytes
    text = json.dumps(
        objects, indent=indent, ensure_ascii=not all(map(_plain, [json.dumps(objects, ensure_ascii=False)]))
    )
    lines = "".join(json.dumps(o) + "\n" for o in objects)
    before = source.CHUNK
    source.CHUNK = json_text.CHUNK = block
    try:
        for name in ("a.json", "a.jsonl"):  # its content decides, not its extension
            assert read(pack(text.encode()), name) == objects
            assert read(pack(lines.encode()), name) == objects
    finally:
        source.CHUNK = json_text.CHUNK = before


def _plain(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@given(
    content=st.binary(max_size=200),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz"]),
)
def test_damaged_files_are_a_sentence(content: bytes, name: str) -> None:
    try:
        for row in read_stream(io.BytesIO(content), name):
            assert isinstance(row, (Row, BadRow)) and row.where.startswith(name)
    except DataError as error:
        assert name in error.where and error.how


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-20], "gzip file is cut short"),
        ("a.json", b'[{"a": 1}, {"a"', "row 2 is cut short"),
        ("a.json", b'[{"a": 1},', "row 2 is not closed"),
        ("a.json", b'{\n"a": 1}', "one JSON object over several lines"),
        ("a.csv", b"a,a\n1,2\n", "name the columns, each once"),
        ("a.parquet", b"PAR1", "not a readable Parquet file"),
        ("a.csv", b"a,b\n\xff,2\n", "not UTF-8"),
    ],
)
def test_what_is_wrong_is_said(name: str, content: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(content, name)


def test_bad_lines_are_kept_aside_with_their_places() -> None:
    found = read(b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n[3]\n\xff\n{"a": 2}\n', "x/a.jsonl")
    assert [f if isinstance(f, dict) else f.where for f in found] == [
        {"a": 1},
        "x/a.jsonl:3",
        "x/a.jsonl:4",
        "x/a.jsonl:5",
        {"a": 2},
    ]
    found = read(b'a,b\n1,"2\n3"\n4\n5,6\n', "a.csv")
    assert [f if isinstance(f, dict) else f.where for f in found] == [
        {"a": "1", "b": "2\n3"},
        "a.csv:4",
        {"a": "5", "b": "6"},
    ]


def test_damage_inside_a_parquet_file_is_a_sentence() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    held = io.BytesIO()
    pq.write_table(pa.table({"text": [f"row {i} " * 20 for i in range(1000)]}), held, compression="snappy")
    content = bytearray(held.getvalue())
    content[500:900] = bytes(400)
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read(bytes(content), "a.parquet")


def test_memory_is_bounded_for_a_long_list() -> None:
    content = json.dumps([{"text": "x" * 1000, "n": n} for n in range(12_000)]).encode()
    stream = io.BytesIO(content)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_stream(stream, "a.json")) == 12_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(content) / 2
