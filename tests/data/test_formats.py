"""Readers: every format gives the same rows, and bad input gives an error with its location."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.data.read import BadRow, Row, read_rows, read_stream
from penchant.errors import DataError

ROWS = [{"prompt": 'a, "b"\nc', "chosen": "é ☃", "rejected": "x"}, {"prompt": "p", "chosen": "q", "rejected": "r"}]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    name = path.name
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    if name.endswith(".jsonl"):
        path.write_text(lines)
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1))
    elif name.endswith((".csv", ".tsv")):
        with path.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]), delimiter="\t" if name.endswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = list(read_rows(str(_write(tmp_path / name, ROWS))))
    assert [dict(r.values) for r in rows if isinstance(r, Row)] == ROWS


@pytest.mark.parametrize(
    "name,places",
    [
        ("a.jsonl", ["a.jsonl:1", "a.jsonl:2"]),
        ("a.csv", ["a.csv:2", "a.csv:4"]),  # the first row's prompt contains a line break
        ("a.json", ["a.json:2", "a.json:7"]),
        ("a.parquet", ["a.parquet: row 1", "a.parquet: row 2"]),
    ],
)
def test_places_are_real_lines(tmp_path: Path, name: str, places: list[str]) -> None:
    assert [r.where for r in read_rows(str(_write(tmp_path / name, ROWS)))] == places


def test_plain_text_documents_are_separated_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\nmore\n\n\ntwo\n")
    rows = [r for r in read_rows(str(path)) if isinstance(r, Row)]
    assert [(r.where, r.values["text"]) for r in rows] == [("a.txt:1", "one\nmore"), ("a.txt:5", "two")]


@pytest.mark.parametrize(
    "content,where,what",
    [
        (b'{"a": 1}\n{"a": "b', "a.jsonl:2", "ends in the middle"),
        (b'{"a": "x\x00y"}\n', "a.jsonl:1", "NUL byte"),
        (b'{"a": "caf\xe9"}\n', "a.jsonl:1", "not UTF-8.*0xe9"),
        (b"[1, 2]\n", "a.jsonl:1", "is a JSON list, not an object"),
        (b'{"a": 1,, }\n', "a.jsonl:1", "not valid JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, where: str, what: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    bad = [r for r in read_rows(str(path)) if isinstance(r, BadRow)]
    assert len(bad) == 1
    assert bad[0].where == where
    import re

    assert re.search(what, bad[0].what), bad[0].what
    assert bad[0].how


def test_a_bom_is_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert [r.values for r in read_rows(str(path)) if isinstance(r, Row)] == [{"text": "x"}]


def test_whole_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "x.docx").write_text("x")
    (tmp_path / "bad.parquet").write_text("x")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:40])
    (tmp_path / "utf16.jsonl").write_text('{"text": "x"}\n', encoding="utf-16")
    (tmp_path / "cut.json").write_text('[{"text": "x"},\n {"text"')
    cases = {
        "trian.jsonl": "no such file; did you mean .*train.jsonl",
        "empty.jsonl": "is empty",
        "blank.jsonl": "no rows",
        "x.docx": 'ending ".docx" is not known',
        "bad.parquet": "not a readable Parquet file",
        "cut.jsonl.gz": "cut short",
        "utf16.jsonl": "UTF-16",
        "cut.json": "cut.json:2: is not valid JSON",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            list(read_rows(str(tmp_path / name)))
    with pytest.raises(DataError, match="is a folder"):
        list(read_rows(str(tmp_path)))


@given(st.binary(max_size=300))
def test_no_bytes_end_in_a_traceback(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt"):
        (folder / name).write_bytes(content)
        try:
            rows = list(read_rows(str(folder / name)))
        except DataError as error:
            assert error.what
        else:
            assert all(isinstance(r, (Row, BadRow)) for r in rows)


@given(st.lists(st.dictionaries(st.text(min_size=1), st.text() | st.none() | st.integers()), min_size=1, max_size=5))
def test_jsonl_and_json_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("trip")
    for name in ("a.jsonl", "a.json"):
        path = folder / name
        text = "\n".join(json.dumps(r) for r in rows) if name == "a.jsonl" else json.dumps(rows)
        path.write_text(text)
        assert [r.values for r in read_rows(str(path)) if isinstance(r, Row)] == rows


def test_line_ends_within_a_cell_stay_and_one_outside_quotes_splits_no_row(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'text,n\r\n"a\r\nb\rc",1\r\nd\re,2\r\nf,3\r\r\n')
    good, bad, last = read_rows(str(file))
    assert isinstance(good, Row) and good.values == {"text": "a\r\nb\rc", "n": "1"}
    assert isinstance(bad, BadRow) and "carriage return" in bad.what and bad.where == "a.csv:4"
    assert isinstance(last, Row) and last.values == {"text": "f", "n": "3"}


def test_rows_of_a_list_on_one_line_have_places_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[{"text": "a"}, {"text": "b"}, 3,\n {"text": "d"}]')
    assert [r.where for r in read_rows(str(file))] == ["a.json:1", "a.json:1 (row 2)", "a.json:1 (row 3)", "a.json:2"]


# ---- one reader for `train` and `data get` ---------------------------------------------------------------------------

MIXED_UP = {
    "lines in .json": ("a.json", b'{"text": "a"}\n{"text": "b"}\n'),
    "lines in .json, the first one bad": ("a.json", b'{"text": "a"\n{"text": "a"}\n{"text": "b"}\n'),
    "a list in .jsonl": ("a.jsonl", b'[{"text": "a"},\n{"text": "b"}]'),
    "an object with a list, on one line": ("a.json", b'{"data": [{"text": "a"}, {"text": "b"}]}'),
    "an object with a list, on several": ("a.json", b'{\n"version": 1,\n"rows": [{"text": "a"},\n{"text": "b"}]}'),
    "packed without .gz": ("a.csv", gzip.compress(b"text\na\nb\n")),
    "old line ends": ("a.csv", b"text\r\na\r\nb\r\n"),
    "a NUL in one row of a table": ("a.csv", b"text\na\n\0\nb\n"),
}


@pytest.mark.parametrize("name", MIXED_UP)
def test_files_are_read_by_what_they_hold_on_disk_and_in_a_stream(tmp_path: Path, name: str) -> None:
    file, content = MIXED_UP[name]
    (tmp_path / file).write_bytes(content)
    found = list(read_rows(str(tmp_path / file)))
    assert found == list(read_stream(io.BytesIO(content), file))
    assert [r.values for r in found if isinstance(r, Row)] == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', "a.json:2: .*no comma after row 1"),
        ("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', "a.json:2: is not UTF-8"),
        ("a.csv", b"text\na\n\xff\n", "a.csv:3: is not UTF-8"),
        ("a.json", b'{\n"text": "a"}', 'without a "data" list'),
        ("a.json", '[{"text": "a"}]'.encode("utf-16"), "UTF-16"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, file: str, content: bytes, words: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(read_rows(str(tmp_path / file)))


@pytest.mark.parametrize("block", [1, 2, 7, 1000])
def test_places_in_a_list_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    content = b'[\n{"a": "x\\n"},\n\n{"a": 2}, 345,\n {"a": [\n3]}\n,{"a": 4}]'
    monkeypatch.setattr("penchant.data.read.source.CHUNK", block)
    monkeypatch.setattr("penchant.data.read.json_text.CHUNK", block)
    places = [r.where for r in read_stream(io.BytesIO(content), "a.json")]
    assert places == ["a.json:2", "a.json:4", "a.json:4 (row 3)", "a.json:5", "a.json:7"]
