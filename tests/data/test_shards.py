"""Counting by shards, of any size and in any number of processes, equals counting in one pass."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_rows import Row, pair, planted, text, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rows import from_rows, in_this_process

from penchant.base.processes import in_order, number_of
from penchant.data import read
from penchant.data.audit import Auditor, Leakage, audit_files, near
from penchant.data.audit.near import NearIndex
from penchant.data.load import load_preferences
from penchant.data.read import Bounds, named_files, read_rows, read_shard, shards_of
from penchant.errors import ConfigError, DataError
from penchant.requests import workers_in


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "SHARD", 900)
    monkeypatch.setattr(read, "CHUNK", 300)


def of_kind(kind: str) -> list[Row]:
    rows: list[Row] = planted() if kind == "pairs" else []
    for i in range(40):
        base = {"prompt": text(i % 17), "language": ("de", "en", "fr")[i % 3]}
        more: dict[str, Row] = {
            "unpaired": {"completion": text(50 + i % 11), "label": i % 4 > 0},
            "scored": {"completion": text(50 + i), "score": i / 7},
            "sft": {"completion": text(50 + i % 5)},
            "prompts": {},
            "pairs": {"chosen": text(50 + i % 9), "rejected": text(50 + i % 7)},
        }
        rows.append(base | more[kind])
    return [*rows, {"prompt": "", "completion": "b", "chosen": "a", "rejected": "b"} | rows[-1] | {"prompt": ""}]


def by_shards(paths: dict[str, str], **how: Any) -> Any:
    return audit_files(paths, **how).to_json(places=1000)


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "scored", "sft", "prompts"])
def test_an_audit_by_shards_is_that_of_one_pass(
    tmp_path: Path, small: None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {n: str(write(tmp_path / f"{n}.jsonl", of_kind(kind)[i:])) for i, n in enumerate(("train", "test"))}
    monkeypatch.setattr("penchant.data.audit.in_order", in_this_process)
    assert len(shards_of(list(paths.values()))) > 5
    alone = by_shards(paths, workers=1)
    assert alone["findings"]["duplicates"]["count"] and alone["findings"]["leakage_train_test"]["count"]
    assert by_shards(paths, workers=2) == alone
    monkeypatch.setattr(read, "SHARD", 400)
    assert by_shards(paths, workers=2) == alone


def test_in_processes_of_their_own(tmp_path: Path) -> None:
    paths = {f"{i}": str(write(tmp_path / f"{i}.jsonl", of_kind("pairs")[i:])) for i in range(3)}
    alone = by_shards(paths, workers=1)
    assert by_shards(paths, workers=2) == by_shards(paths, workers=3) == alone  # one shard per file


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.sampled_from([r for r in of_kind("pairs") if r["prompt"] and r["rejected"]]), min_size=1, max_size=40
    ).filter(lambda rows: any(r["chosen"] for r in rows)),
    cuts=st.data(),
)
def test_counters_merge_to_what_one_pass_gives(rows: list[Row], cuts: st.DataObject) -> None:
    trees = from_rows(rows, on_bad_row="skip", identical="keep").trees
    at = sorted(cuts.draw(st.lists(st.integers(0, len(trees)), max_size=4)))
    whole, parts = Auditor("pairs", "pairs"), Auditor("pairs", "pairs")
    leaks, leaking = Leakage(["a", "b"]), Leakage(["a", "b"])
    for i, tree in enumerate(trees):
        whole.update(tree)
        leaks.update(i % 2, tree)
    for start, end in zip([0, *at], [*at, len(trees)], strict=True):
        part, leak = Auditor("pairs", "pairs", most=10**9), Leakage(["a", "b"])
        for i, tree in enumerate(trees[start:end], start):
            part.update(tree)
            leak.update(i % 2, tree)
        parts.merge(part)
        leaking.merge(leak)
    assert parts.result(dict(leaking.findings()), {}, "") == whole.result(dict(leaks.findings()), {}, "")


def test_reasons_and_languages_beyond_what_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("penchant.data.audit.REASONS", 3)
    monkeypatch.setattr("penchant.data.audit.LANGUAGES", 3)
    monkeypatch.setattr("penchant.data.load.LANGUAGES", 3)
    monkeypatch.setattr("penchant.data.audit.in_order", in_this_process)
    rows = [pair(i) | {"language": f"l{i % 5}", "chosen_score": "x" * (i % 6) or 1} for i in range(12)]
    paths = {n: str(write(tmp_path / n, rows[i:])) for i, n in enumerate(("a.jsonl", "b.jsonl"))}
    assert by_shards(paths, workers=2, shape="pairs") == by_shards(paths, workers=1, shape="pairs")


LINES = st.lists(
    st.one_of(
        st.builds(lambda n: json.dumps({"prompt": "p" * n, "completion": "c"}), st.integers(0, 300)),
        st.sampled_from(["", "   ", "{broken", "[1]", '{"prompt": "\u00e9\u2028x", "completion": "y\\r"}', "\r"]),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, end=st.sampled_from(["\n", "\r\n"]), last=st.booleans(), size=st.integers(1, 400))
def test_shards_of_lines_give_the_rows_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], end: str, last: bool, size: int
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (end.join(['{"prompt": "a", "completion": "b"}', *lines]) + end * last).encode())
    monkeypatch.setattr(read, "SHARD", size)
    monkeypatch.setattr(read, "CHUNK", 64)
    shards = shards_of(str(path))
    assert len(shards) >= 1 and [r for s in shards for r in read_shard(s)] == list(read_rows(str(path)))


def test_shards_of_other_files(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [pair(i) for i in range(30)]
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as out:
        out.write("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"prompt": "p", "completion": f"{i}"}) + "\r" for i in range(99))
    )
    many = {"a.parquet": 5, "b.jsonl.gz": 1, "c.json": 1, "d.jsonl": 1}
    for name, count in many.items():
        path = str(tmp_path / name)
        shards = shards_of(path)
        assert len(shards) == count
        assert [r for s in shards for r in read_shard(s)] == list(read_rows(path))
    monkeypatch.setattr(read, "UNCUT", 100)
    assert shards_of([str(tmp_path / n) for n in many]) == []


def test_a_damaged_line_is_told_as_in_one_pass(tmp_path: Path, small: None) -> None:
    path = write(tmp_path / "a.jsonl", [pair(i) for i in range(20)])
    with path.open("ab") as out:
        out.write(b'{"prompt": "' + b"x" * 5000 + b'"}\n')
    said = []
    for workers in (1, 2):
        with pytest.raises(DataError) as told:
            audit_files({"a": str(path)}, workers=workers, bounds={"row_mb": 0.002})
        said.append(str(told.value))
    assert said[0] == said[1] and "a.jsonl:21" in said[0]


def test_what_waits_on_disk_groups_as_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text(i % 13) + " " + "word " * (i % 3) for i in range(60)]
    index = NearIndex()
    index.add(texts)
    expected = index.groups().tolist()
    monkeypatch.setattr(near, "IN_MEMORY", 0)
    monkeypatch.setattr(near, "BATCH_TEXTS", 8)
    monkeypatch.setattr(near, "GAP", 1)
    monkeypatch.setattr(near, "CHECKED", 5)
    on_disk = NearIndex()
    on_disk.add(texts[:31])
    on_disk.groups()  # reading does not move the write position
    on_disk.add(texts[31:])
    assert on_disk.groups().tolist() == expected and len(set(expected)) < 60
    assert on_disk._bytes.held == 0 and on_disk._bytes._file is not None
    order = np.array([50, 3, 3, 59, 0, 20])
    assert (on_disk._bytes[order] == index._bytes[order]).all()


# ---- processes ----


def test_results_come_in_order_and_errors_too() -> None:
    assert list(in_order(abs, range(-9, 0), 2)) == list(in_order(abs, range(-9, 0), 1)) == list(range(9, 0, -1))
    assert list(in_order(print, ["is no answer"], 2)) == [None]
    found: Iterator[object] = in_order(named_files, ["/dev/null/no.jsonl"], 2)
    with pytest.raises(DataError, match=r"no\.jsonl: .*check"):
        next(found)
    with pytest.raises(RuntimeError, match="ValueError"):
        list(in_order(int, ["x"], 2))
    with pytest.raises(ConfigError, match="ended with 3"):
        list(in_order(os._exit, [3], 2))


def test_how_many_work() -> None:
    assert number_of(None, 1) == number_of(5, 0) == 1 and number_of(5, 3) == 3
    for wrong in (0, -1, "two"):
        with pytest.raises(ConfigError, match="workers"):
            number_of(wrong, 3)
    assert workers_in("ray") == "ray" and workers_in("4") == 4
    for said in ("0", "-1", "two", "9999"):
        with pytest.raises(ConfigError, match="--workers"):
            workers_in(said)


def test_ray_counts_the_same(tmp_path: Path, small: None) -> None:
    ray = pytest.importorskip("ray")
    path = str(write(tmp_path / "a.jsonl", of_kind("pairs")))
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        assert by_shards({"a": path}, workers="ray") == by_shards({"a": path}, workers=1)
    finally:
        ray.shutdown()


def test_bounds_travel(tmp_path: Path, small: None) -> None:
    path = write(tmp_path / "a.jsonl", [pair(i) for i in range(9)])
    nested = "[" * 12 + "]" * 12
    with path.open("a") as out:
        out.write(json.dumps(pair(20))[:-1] + f', "x": {nested}}}\n')
    shards = shards_of(str(path))
    assert len(list(load_preferences(str(path)).trees)) == 10
    rows = [r for s in shards for r in read_shard(s, Bounds(nesting=5))]
    assert rows == list(read_rows(str(path), Bounds(nesting=5))) and type(rows[-1]).__name__ == "BadRow"
