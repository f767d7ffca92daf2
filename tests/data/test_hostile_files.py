"""Damaged, hostile and odd files give an error message or counted bad rows, in bounded time and memory, without losing rows."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penchant.cli import main
from penchant.data.audit import audit_files
from penchant.data.audit.fix import fix
from penchant.data.layouts.page import preview
from penchant.data.load import load_preferences
from penchant.data.options import DataConfig
from penchant.data.read import BadRow, Bounds, Row, read_rows
from penchant.errors import DataError, PenchantError

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
    return "a.json", json.dumps(
        {"version": 1, random_.choice(["data", "rows"]): rows}, indent=random_.choice([None, 1])
    ).encode()


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
    """A file, damaged or not, and its number of rows if it is intact."""
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
    """Outcome of reading a file in every way that rows are read. Only our own errors may be raised."""
    path = folder / made[0]
    path.write_bytes(made[1])
    try:
        read = list(read_rows(str(path)))
        assert all(isinstance(r, (Row, BadRow)) for r in read)
        assert all(r.what and r.how for r in read if isinstance(r, BadRow))
        assert len({r.where for r in read}) == len(read)
        json.dumps([r.raw for r in read if isinstance(r, BadRow)], default=str)
        lines = made[1].split(b"\n")
        if (
            made[0] == "a.jsonl"
            and made[1][:2] != b"\x1f\x8b"
            and not any(line.lstrip(b" \xef\xbb\xbf\r").startswith(b"[") for line in lines)
            and not any(line.strip(b" \xef\xbb\xbf\r") == b"{" for line in lines)  # an object that spans several lines
        ):
            physical = made[1] if b"\n" in made[1] else made[1].replace(b"\r", b"\n")
            assert len(read) >= 1
            assert len(read) == sum(bool(li.strip()) for li in physical.split(b"\n")) or b"\xef\xbb\xbf" in physical, (
                read
            )
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
        lambda: fix(
            str(path),
            folder / ("b.parquet" if made[0].endswith(".parquet") else "b.jsonl"),
            overwrite=True,
            redact=("pii",),
        ),
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
    """Tries random files and counts the outcomes."""
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


# ---- bounds ----------------------------------------------------------------------------------------------------------


def bad_rows(path: Path, **bounds: Any) -> list[str]:
    return [r.what for r in read_rows(str(path), Bounds(**bounds)) if isinstance(r, BadRow)]


def bomb(head: bytes, middle: bytes, megabytes: int) -> bytes:
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as packed:
        packed.write(head)
        for _ in range(megabytes):
            packed.write(middle * ((1 << 20) // len(middle)))
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "head", "middle"),
    [
        ("a.jsonl.gz", b'{"text": "', b"x"),
        ("a.jsonl.gz", b"", b"\n"),
        ("a.json.gz", b"", b" "),
        ("a.json.gz", b"[", b"["),
        ("a.csv.gz", b"text\n", b"x"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("a.jsonl.gz", b"", b"\0"),
                ("a.jsonl.gz", b"", b'{"text": "x"}\n'),
                ("a.json.gz", b"[", b'{"text": "x"},\n'),
                ("a.csv.gz", b'text\n"', b"x\n"),
                ("a.csv.gz", b"text\n", b","),
                ("a.txt.gz", b"", b"x\n"),
                ("a.csv", b"text\n", b"\n"),
            )
        ),
    ],
)
def test_a_packed_bomb_is_refused_and_the_bound_is_named(tmp_path: Path, name: str, head: bytes, middle: bytes) -> None:
    (tmp_path / name).write_bytes(bomb(head, middle, 20))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(DataError, match=r"data\.bounds\.(unpacked|row_mb|nesting)="):
        for _ in read_rows(str(tmp_path / name)):
            pass
    assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_long_row_is_refused_and_read_with_a_raised_bound(tmp_path: Path) -> None:
    text = "x" * 300_000
    for name, content in (
        ("a.jsonl", json.dumps({"text": text}) + "\n"),
        ("a.json", json.dumps([{"text": text}])),
        ("b.json", json.dumps([{"text": text}], indent=1)),
        ("c.json", json.dumps({"data": [{"text": text}]}, indent=1)),
        ("a.csv", f"text,more\n{text},1\n"),
        ("b.csv", f'text,more\n"{text}\n{text}",1\n'),
        ("a.txt", (text[:1000] + "\n") * 400),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=r"longer than 0.25 MB.*data\.bounds\.row_mb=0.5"):
            list(read_rows(str(tmp_path / name), Bounds(row_mb=0.25)))
        assert len(list(read_rows(str(tmp_path / name), Bounds(row_mb=1)))) == 1
    pq.write_table(pa.table({"text": [text]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 1: is longer than 0.25 MB.*data\.bounds\.row_mb=0.5"):
        list(read_rows(str(tmp_path / "a.parquet"), Bounds(row_mb=0.25)))
    assert len(list(read_rows(str(tmp_path / "a.parquet")))) == 1


def test_a_long_list_on_one_line_is_no_long_row(tmp_path: Path) -> None:
    rows = [{"text": "x" * 100, "n": i} for i in range(5000)]
    for name, content in (("a.json", rows), ("a.jsonl", rows), ("b.json", {"data": rows}), ("b.jsonl", {"rows": rows})):
        (tmp_path / name).write_text(json.dumps(content))
        assert [r.values for r in read_rows(str(tmp_path / name), Bounds(row_mb=0.1)) if isinstance(r, Row)] == rows


def test_deep_nesting_is_a_bad_row_that_names_the_bound(tmp_path: Path) -> None:
    deep = {n: '{"a": ' * n + "1" + "}" * n for n in (150, 210, 5000, 100_000)}
    good = '{"text": "x"}'
    for name, joined in (("a.jsonl", "\n".join), ("a.json", lambda rows: "[" + ",\n".join(rows) + "]")):
        (tmp_path / name).write_text(joined([good, *deep.values(), good]))
        found = list(read_rows(str(tmp_path / name)))
        assert [isinstance(r, Row) for r in found] == [True, True, False, False, False, True]
        assert all("data.bounds.nesting=400" in r.how for r in found if isinstance(r, BadRow))
        assert [isinstance(r, Row) for r in read_rows(str(tmp_path / name), Bounds(nesting=400))].count(True) == 4


def test_bounds_are_keys_of_a_config_and_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 300_000, "chosen": "a", "rejected": "b"}) + "\n")
    assert DataConfig.model_validate({"path": "a", "bounds": {"row_mb": 64}}).bounds.row_mb == 64
    with pytest.raises(DataError, match="row_mb"):
        load_preferences(str(path), bounds={"row_mb": 0.1})
    for verb in (["show"], ["audit"], ["fix"]):
        command = ["data", *verb, str(path)] + ([str(tmp_path / "b.jsonl")] if verb == ["fix"] else [])
        assert main([*command, "--bound", "row_mb=0.1"]) == 2
        assert "--bound row_mb=0.2" in capsys.readouterr().err
        assert main([*command, "--bound", "row_mb=1"]) == 0
    assert main(["data", "show", str(path), "--bound", "rows=1"]) == 2
    assert "row_mb, nesting, unpacked" in capsys.readouterr().err


# ---- what JSON parsers accept ----------------------------------------------------------------------------------------

ODD_JSON = {
    '{"text": "x", "text": "y"}': 'key "text" twice',
    '{"text": "x", "more": {"a": [{"b": 1, "b": 2}]}}': 'key "b" twice',
    '{"text": "x", "n": ' + "9" * 5000 + "}": "an integer of 5,000 digits",
    '{"text": "x", "n": [-' + "9" * 5000 + "]}": "an integer of 5,001 digits",
    "3": "is a JSON number",
    "NaN": "is a JSON number",
    '"text"': "is a JSON string",
    "[3]": "is a JSON list",
}


@pytest.mark.parametrize("odd", ODD_JSON)
def test_odd_json_is_a_bad_row_in_its_place(tmp_path: Path, odd: str) -> None:
    good = '{"text": "x"}'
    (tmp_path / "a.jsonl").write_text("\n".join([good, odd, good]))
    (tmp_path / "a.json").write_text(",\n".join([f"[{good}", odd, f"{good}]"]))
    (tmp_path / "b.json").write_text(",\n".join([f'{{"rows": [{good}', odd, f"{good}]}}"]))
    for name in ("a.jsonl", "a.json", "b.json"):
        first, bad, last = read_rows(str(tmp_path / name))
        assert isinstance(first, Row)
        assert isinstance(last, Row)
        assert isinstance(bad, BadRow)
        assert bad.where.startswith(f"{name}:2")
        assert ODD_JSON[odd] in bad.what


LOST = {
    "two lists": ('[{"text": "a"}]\n[{"text": "b"}]', 2),
    "two lists on a line": ('[{"text": "a"}][{"text": "b"}]', 2),
    "rows behind a list": ('[{"text": "a"}]\n{"text": "b"}\n{"text": "c"}', 3),
    "a list behind rows": ('{"text": "a"}\n[{"text": "b"}]\n', "is a JSON list"),
    "rows over several lines": ('{\n"text": "a"\n}\n{\n"text": "b"\n}\n', 2),
    "text behind a list": ('[{"text": "a"}] and more', "not JSON, after a JSON list"),
    "a comma behind a list": ('[{"text": "a"}],\n', "not JSON, after a JSON list"),
    "a list that is not closed": ('[{"text": "a"},\n{"text": "b"}', "is not valid JSON"),
    "a comma too many": ('[{"text": "a"},]', "is not valid JSON"),
    "data and rows": ('{"data": [{"text": "a"}],\n"rows": [{"text": "b"}]}', 'two lists of rows, "data" and "rows"'),
    "data and rows on a line": ('{"data": [{"text": "a"}], "rows": [{"text": "b"}]}', "two lists of rows"),
    "rows before metadata": ('{"data": [{"text": "a"}], "features": [{"name": "text"}]}', 1),
    "data twice": ('{"data": [{"text": "a"}], "data": [{"text": "b"}]}', 'the key "data" twice'),
    "train and test": ('{"train": [{"text": "a"}], "test": [{"text": "b"}]}', 'two lists of rows, "train" and "test"'),
    "text behind an object": ('{"data": [{"text": "a"}]} more', "has more text after the JSON value"),
    "text behind an object of several lines": (
        '{"data": [\n{"text": "a"}\n]\n} more',
        "not JSON, after a JSON object",
    ),
    "two rows on a line": ('{"text": "a"} {"text": "b"}', "has more text after the JSON value"),
    "old line ends": ('{"text": "a"}\r{"text": "b"}\r', 2),
    "marks of byte order": ('\ufeff{"text": "a"}\n', 1),
    "marks of byte order within": ('\ufeff[{"text": "a"}]\n\ufeff[{"text": "b"}]', 2),
    "marks of byte order at lines": ('\ufeff{"text": "a"}\n\ufeff{"text": "b"}', 2),
}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("case", LOST)
def test_every_row_is_read_or_the_file_is_refused(tmp_path: Path, case: str, name: str) -> None:
    content, expected = LOST[case]
    (tmp_path / name).write_bytes(content.encode())
    try:
        found = list(read_rows(str(tmp_path / name)))
        said = "; ".join(r.what for r in found if isinstance(r, BadRow))
    except DataError as error:
        said, found = str(error), []
    if isinstance(expected, int):
        assert not said
        assert [r.values["text"] for r in found if isinstance(r, Row)] == list("abc")[:expected]
    else:
        assert expected in said


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_the_delimiter_is_seen(tmp_path: Path, name: str, mark: str) -> None:
    import csv

    rows = [["prompt", "chosen", "rejected"], ['a, b; c\t"d"|e', "x\ny", "z"], ["1,5; 2,5", "ja, gut", "nein|"]]
    out = io.StringIO()
    csv.writer(out, delimiter=mark).writerows(rows)
    (tmp_path / name).write_text(out.getvalue(), newline="")
    assert [list(r.values.values()) for r in read_rows(str(tmp_path / name)) if isinstance(r, Row)] == rows[1:]
    (tmp_path / name).write_text(f"sep={mark}\r\n" + out.getvalue(), newline="")
    assert [list(r.values.values()) for r in read_rows(str(tmp_path / name)) if isinstance(r, Row)] == rows[1:]


def test_a_table_of_one_column_keeps_its_commas(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\none; two\nthree; four\n")
    assert [r.values for r in read_rows(str(tmp_path / "a.csv")) if isinstance(r, Row)] == [
        {"text": "one; two"},
        {"text": "three; four"},
    ]


def test_rows_that_do_not_fit_the_header_are_bad_and_no_line_is_swallowed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,2\n3\n4,5,6\n"x" y,7\n8,9\n')
    assert [(r.where, isinstance(r, Row)) for r in read_rows(str(path))] == [
        ("a.csv:2", True),
        ("a.csv:3", False),
        ("a.csv:4", False),
        ("a.csv:5", False),
        ("a.csv:6", True),
    ]
    path.write_text('a,b\n1,2\n3,"4\n5,6\n7,8\n')
    with pytest.raises(DataError, match="csv:3: a quote that is opened here is not closed"):
        list(read_rows(str(path)))
    path.write_text("a,b,a\n1,2,3\n")
    with pytest.raises(DataError, match=r"csv:1: .*it has \"a\" twice"):
        list(read_rows(str(path)))


def test_columns_without_a_name_are_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",text,,\n0,x,,\n")
    assert [r.values for r in read_rows(str(tmp_path / "a.csv")) if isinstance(r, Row)] == [
        {"column 1": "0", "text": "x", "column 3": "", "column 4": ""}
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_the_euro_sign_of_windows_is_named_as_cp1252(tmp_path: Path, name: str) -> None:
    text = {"a.csv": "text\n5 €\n", "a.jsonl": '{"text": "5 €"}\n', "a.json": '[{"text": "5 €"}]'}[name]
    (tmp_path / name).write_bytes(text.encode("cp1252"))
    with pytest.raises(DataError, match=r"0x80 at column \d+; CP1252\?.*iconv -f CP1252"):
        load_preferences(str(tmp_path / name))


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def test_values_of_parquet_that_python_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    text = pa.array(["a", "b"])
    for kind, values in (
        (pa.timestamp("us"), [2**62, 0]),
        (pa.timestamp("ns"), [1_500_000_000_123_456_789, 0]),
        (pa.timestamp("us", tz="Mars/Olympus"), [1, 2]),
        (pa.date32(), [2**30, 0]),
        (pa.duration("s"), [2**50, 0]),
    ):
        odd = pa.array(values, pa.int32() if kind == pa.date32() else pa.int64()).cast(kind)
        pq.write_table(pa.table({"text": text, "when": odd}), path)
        assert [r.values["text"] for r in read_rows(str(path)) if isinstance(r, Row)] == ["a", "b"], kind
        nested = pa.StructArray.from_arrays([odd], ["when"])
        pq.write_table(pa.table({"text": text, "more": nested}), path)
        assert len(list(read_rows(str(path)))) == 2
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"\xffx")]
    )
    pq.write_table(pa.table({"text": bad}), path)
    first, second = read_rows(str(path))
    assert isinstance(first, BadRow)
    assert first.what == '"text" cannot be read (is not UTF-8)'
    assert isinstance(second, Row)


def test_a_flipped_bit_in_a_parquet_page_with_a_checksum_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["the quick brown fox", "jumps over"]})
    pq.write_table(
        table, path, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )
    content = path.read_bytes()
    assert [r.values["text"] for r in read_rows(str(path))] == table["text"].to_pylist()
    path.write_bytes(content.replace(b"quick", b"quack", 1))
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(read_rows(str(path)))


def test_a_line_end_in_a_name_is_no_second_message(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        list(read_rows(str(tmp_path / "a\npenchant: all is well.jsonl")))
    assert "\n" not in str(caught.value)


def test_parquet_that_is_encrypted_or_repeats_a_column_or_is_a_bomb(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PARE" + b"\0" * 40 + b"PARE")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(read_rows(str(path)))
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(DataError, match='two columns named "text"'):
        list(read_rows(str(path)))
    pq.write_table(pa.table({"n": pa.array([0] * 20_000_000, pa.int8())}), path, compression="zstd")
    with pytest.raises(DataError, match=r"data\.bounds\.unpacked="):
        list(read_rows(str(path)))


# ---- files without rows ----------------------------------------------------------------------------------------------

MAGIC = {
    "spreadsheet": b"PK\x03\x04" + b"\0" * 26 + b"xl/workbook.xml",
    "zip archive": b"PK\x03\x04" + b"\0" * 26 + b"train.jsonl",
    "zstd": b"\x28\xb5\x2f\xfd\0",
    "bzip2": b"BZh91AY&SY\0",
    r"with xz": b"\xfd7zXZ\0\0",
    "Parquet file": b"PAR1\0",
    "Arrow": b"ARROW1\0\0",
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "web page": b"\n<!DOCTYPE html><html>",
    "packed twice": gzip.compress(gzip.compress(b"x")),
    "tar archive": gzip.compress(b"a" + b"\0" * 256 + b"ustar\x0000" + b"\0" * 300),
    "UTF-16": '{"text": "x"}'.encode("utf-16"),
    "UTF-16LE": '{"text": "x"}'.encode("utf-16-le"),
    "UTF-32": '{"text": "x"}'.encode("utf-32"),
}


@pytest.mark.parametrize("kind", MAGIC)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_what_a_file_really_is_is_named(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(MAGIC[kind])
    with pytest.raises(DataError, match=kind) as found:
        list(read_rows(str(tmp_path / name)))
    assert found.value.how


@pytest.mark.parametrize(
    "ending_and_how",
    [
        "xlsx CSV",
        "ods CSV",
        "zip unzip",
        "zst zstd -d",
        "bz2 bunzip2",
        "xz unxz",
        "arrow Parquet",
        "feather Parquet",
        "pkl never read",
    ],
)
def test_endings_that_are_not_read_are_named_with_a_way(tmp_path: Path, ending_and_how: str) -> None:
    ending, how = ending_and_how.split(" ", 1)
    (tmp_path / f"rows.{ending}").write_bytes(b"x")
    with pytest.raises(DataError, match=how):
        list(read_rows(str(tmp_path / f"rows.{ending}")))


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "nothing.jsonl")
    (tmp_path / "null.jsonl").symlink_to("/dev/zero")
    (tmp_path / "file.txt").write_text("x")
    for name, what in (
        ("pipe.jsonl", "pipe or a device"),
        ("null.jsonl", "pipe or a device"),
        ("loop.jsonl", "symbolic links"),
        ("dangling.jsonl", "no such file"),
        ("file.txt/a.jsonl", "Not a directory"),
        ("x" * 300 + ".jsonl", "name too long"),
        ("a\0b.jsonl", "is not a path"),
    ):
        with pytest.raises(DataError, match=what):
            list(read_rows(str(tmp_path / name)))


# ---- folders and patterns --------------------------------------------------------------------------------------------


def shard(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


def test_folders_and_patterns_are_read_in_order_with_rows_told_apart(tmp_path: Path) -> None:
    for part in ("b", "a"):
        for n in (2, 1):
            shard(tmp_path / part / f"train-{n}.jsonl", f"{part}{n}")
    (tmp_path / "a" / "README.md").write_text("x")
    (tmp_path / "a" / "dataset_info.json").write_text("{}")

    def read(path: str | list[str]) -> list[tuple[str, str]]:
        return [(r.where, r.values["text"]) for r in read_rows(path) if isinstance(r, Row)]

    assert read(str(tmp_path / "a")) == [("train-1.jsonl:1", "a1"), ("train-2.jsonl:1", "a2")]
    both = [
        ("a/train-1.jsonl:1", "a1"),
        ("a/train-2.jsonl:1", "a2"),
        ("b/train-1.jsonl:1", "b1"),
        ("b/train-2.jsonl:1", "b2"),
    ]
    assert read(str(tmp_path / "*" / "*.jsonl")) == both
    assert read([str(tmp_path / "a"), str(tmp_path / "b")]) == both
    assert read(str(tmp_path / "**" / "train-1.jsonl")) == both[::2]
    assert load_preferences(str(tmp_path / "a")).total == 2
    with pytest.raises(DataError, match="is named twice"):
        read([str(tmp_path / "a"), str(tmp_path / "a" / "train-1.jsonl")])
    with pytest.raises(DataError, match="no file matches the pattern"):
        read(str(tmp_path / "*.csv"))


def test_a_folder_of_splits_or_kinds_is_not_one_data_set(tmp_path: Path) -> None:
    shard(tmp_path / "got" / "train.jsonl", "a")
    shard(tmp_path / "got" / "validation.jsonl", "b")
    with pytest.raises(DataError, match="different splits"):
        list(read_rows(str(tmp_path / "got")))
    shard(tmp_path / "mixed" / "a.jsonl", "a")
    (tmp_path / "mixed" / "b.csv").write_text("text\nb\n")
    with pytest.raises(DataError, match="different kinds"):
        list(read_rows(str(tmp_path / "mixed")))


def test_a_name_with_a_bracket_is_a_file_first(tmp_path: Path) -> None:
    shard(tmp_path / "rows[1].jsonl", "a")
    assert len(list(read_rows(str(tmp_path / "rows[1].jsonl")))) == 1
    assert len(list(read_rows(str(tmp_path / "rows*.jsonl")))) == 1


def test_parquet_whose_dictionary_unpacks_without_end_is_bounded(tmp_path: Path) -> None:
    """One long text that every row refers to, whose size the page headers do not show."""
    path = tmp_path / "a.parquet"
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array(["x" * 100_000]))
    pq.write_table(pa.table({"text": column}), path, compression="zstd")
    assert path.stat().st_size < 100_000
    read: list[int] = []
    with pytest.raises(DataError, match=r"row \d+: unpacks to more than 100 times its size.*data\.bounds\.unpacked="):
        read.extend(1 for _ in read_rows(str(path)))
    assert len(read) < 3000
    assert sum(1 for _ in read_rows(str(path), Bounds(unpacked=1e6))) == 3000
