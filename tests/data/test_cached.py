"""The data cache: cached data equals freshly made data, is never stale, and survives damage and full disks."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_rows import pair, planted, write
from rows import in_this_process
from safetensors.torch import load_file
from tiny import polite_rows, tiny_model_folder, tiny_tokenizer, write_jsonl

from penchant import api
from penchant.base.files import cache_folder
from penchant.data import cached as cache_module
from penchant.data import cached as cached_module
from penchant.data import mapped
from penchant.data import read as reader
from penchant.data.audit import _token_lengths, audit
from penchant.data.cached import HASHES, DataCache, Entry, file_sha256, hashes_of
from penchant.data.load import concatenate_datasets, load_preferences
from penchant.data.mapped import RowWriter, StoredRows, StoredTokens, TokenWriter, label_counts
from penchant.data.split import split_by_prompt
from penchant.data.tokenize import tokenize
from penchant.errors import DataError
from penchant.types import Completion, PromptTree, TokenTree

READING = {"shape": "auto", "columns": {}, "on_bad_row": "skip", "identical": "bad_row", "limit": None}
HOW = {
    "template": "auto",
    "max_length": 300,
    "truncation": "prompt_then_completion",
    "on_bad_row": "skip",
    "identical": "bad_row",
    "add_eos": True,
}


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_module, "AUTO_BYTES", 0)


def same_tree(a: TokenTree, b: TokenTree) -> bool:
    ids = [*zip((a.prompt_ids, *a.completion_ids), (b.prompt_ids, *b.completion_ids), strict=True)]
    kinds = all(x.dtype == y.dtype == np.int32 and np.array_equal(x, y) for x, y in ids)
    names = ("row", "truncated", "source", "labels", "scores")
    return kinds and all(getattr(a, n) == getattr(b, n) and type(getattr(a, n)) is type(getattr(b, n)) for n in names)


ROWS: dict[str, list[dict[str, Any]]] = {
    "pairs": planted(),
    "columns": [pair(i) | {"language": "en", "winner_model_a": 1, "winner_model_b": i % 2} for i in range(5)],
    "scored pairs": [pair(i) | {"chosen_score": i + 0.1, "rejected_score": -i / 3} for i in range(5)],
    "messages": [
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": f"\u00e9 {i}"}],
            "chosen": "a",
            "rejected": "b",
        }
        for i in range(4)
    ],
    "labels": [{"prompt": f"p{i}", "completion": "c" * i + "d", "label": i % 2 > 0} for i in range(6)],
    "scores": [{"prompt": f"p{i}", "completion": "cd", "score": i / 7} for i in range(6)],
    "prompts": [{"prompt": f"p{i}"} for i in range(4)],
    "text": [{"text": "word " * 200}, {"text": "short"}],
}


def test_a_mixture_of_files_with_other_names_has_rows_of_these_names(tmp_path: Path) -> None:
    cache = DataCache()
    for names in (("a.jsonl", "b.jsonl"), ("c.jsonl", "d.jsonl")):
        parts = [cache.load(write_jsonl(tmp_path / name, [pair(i)])) for i, name in enumerate(names)]
        assert [t.source for t in cache.concatenate(parts, names).trees] == [f"{name}:1" for name in names]


@pytest.mark.parametrize("name", ROWS)
def test_what_comes_out_equals_what_is_made_anew(tmp_path: Path, name: str) -> None:
    path = str(write(tmp_path / "a.jsonl", ROWS[name]))
    plain, tokenizer = load_preferences(path, **READING), tiny_tokenizer()
    plain_tokens = tokenize(plain, tokenizer, **HOW)
    for turn in ("made", "found"):
        said: list[str] = []
        data = DataCache(note=said.append)
        rows = data.load(path, **READING)
        assert (
            isinstance(rows.trees, StoredRows)
            and tuple(rows.trees) == plain.trees
            and rows.trees[-1] == plain.trees[-1]
        )
        for field in ("shape", "kind", "total", "accepted", "quarantined", "fingerprint", "detection", "columns"):
            assert getattr(rows, field) == getattr(plain, field), field
        tokens = data.tokenize(rows, tokenizer, **HOW)
        assert isinstance(tokens.trees, StoredTokens) and len(tokens.trees) == len(plain_tokens.trees)
        assert all(same_tree(a, b) for a, b in zip(tokens.trees, plain_tokens.trees, strict=True))
        for field in ("total", "quarantined", "cut_prompts", "cut_completions", "split_documents", "template"):
            assert getattr(tokens, field) == getattr(plain_tokens, field), field
        assert tokens.summary() == plain_tokens.summary()
        assert [t.row for t in tokens.trees.numbered_from(7)] == [t.row + 7 for t in plain_tokens.trees]
        made = data.audit(rows, tokens, {}, path, languages=False)
        assert made == audit(plain, plain_tokens, {}, path, languages=False)
        assert len(said) == 3 and all(("kept in" if turn == "made" else "read from") in s for s in said)


@pytest.mark.parametrize("name", ROWS)
def test_several_processes_make_the_same(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tokenizer = str(write(tmp_path / "a.jsonl", [*ROWS[name] * 2, {"odd": 1}, ROWS[name][0]])), tiny_tokenizer()
    other = str(write(tmp_path / "b.jsonl", ROWS[name]))
    monkeypatch.setattr(reader, "SHARD", 60)
    monkeypatch.setattr(reader, "CHUNK", 30)
    for module in ("data.cached", "data.audit"):
        monkeypatch.setattr(f"penchant.{module}.in_order", in_this_process)
    monkeypatch.setattr(mapped, "PART", 3)
    monkeypatch.setattr(cached_module, "PART", 3)
    made = []
    for workers in (1, 4):
        monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / f"{workers}"))
        cache = DataCache(workers=workers)
        assert cache._processes(100) == workers
        rows = cache.load(path, **READING)
        mixed = cache.concatenate([rows, cache.load(other, **READING)], [path, other])
        tokens = cache.tokenize(rows, tokenizer, **HOW | ({"max_length": 40} if name == "text" else {}))
        assert isinstance(tokens.trees, StoredTokens)
        parts = cache.split(rows, validation_rows=2) if name != "text" else ()
        splits = dict(zip(("train", "held out"), parts, strict=False))
        audited = cache.audit(rows, tokens, splits, path, languages=True)
        folders = [d.trees.folder for d in (rows, mixed, tokens) if isinstance(d.trees, (StoredRows, StoredTokens))]
        files = [p.read_bytes() for f in folders for p in sorted(f.iterdir()) if p.name != "meta.json"]
        told = [replace(d, trees=()) for d in (rows, mixed, *parts)]
        made.append((len(folders), files, told, replace(tokens, trees=()), audited))
    assert made[0] == made[1] and len(reader.shards_of(path)) > 1 and made[0][0] == 3
    assert (
        made[0][2][0].quarantined
        and mixed.fingerprint
        == concatenate_datasets([load_preferences(p, **READING) for p in (path, other)], [path, other]).fingerprint
    )


def test_token_files_put_together_have_weights_and_masks(tmp_path: Path) -> None:
    def tree(n: int, **more: Any) -> TokenTree:
        ids = np.arange(n, dtype=np.int32)
        return TokenTree(0, ids, (ids + 1, ids[:1]), (False, True), f"a:{n}", (True, None), (0.5, None), **more)

    masked = tree(3, masks=(np.array([True, False, True]), np.array([True])), weight=2.0)
    for trees in ([tree(2), masked, tree(4)], [masked, tree(2)], [tree(2), tree(1, origin=1)]):
        folders = [tmp_path / f"{len(trees)}-{trees[0].weight}-{n}" for n in "ab"]
        for folder in folders:
            folder.mkdir()
        whole, parts = map(TokenWriter, folders)
        for given in trees:
            part = TokenWriter(None)
            for writer in (whole, part):
                writer.write(given)
                writer.end_row(1, 4)
            parts.merge(part)
        for writer in (whole, parts):
            writer.close()
        one, other = ({p.name: p.read_bytes() for p in sorted(f.iterdir())} for f in folders)
        assert one == other and one


def test_half_of_a_surrogate_pair_is_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}\n' + json.dumps(pair(0)) + "\n")
    plain = load_preferences(str(path), **READING)
    for _ in range(2):
        rows = DataCache().load(str(path), **READING)
        assert rows.quarantined == plain.quarantined and rows.quarantined[0].raw["prompt"] == "\ud800"


def test_a_split_is_the_same(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", planted()))
    plain = load_preferences(path, **READING)
    expected = split_by_prompt(plain, validation_rows=5, seed=3)
    for _ in range(2):
        data = DataCache()
        parts = data.split(data.load(path, **READING), validation_rows=5, seed=3)
        for part, want in zip(parts, expected, strict=True):
            assert isinstance(part.trees, StoredRows) and tuple(part.trees) == want.trees
            assert (part.fingerprint, part.total, part.quarantined) == (want.fingerprint, want.total, ())
        named = dict(zip(("a", "b"), parts, strict=True))
        made = data.audit(data.load(path, **READING), None, named, path, languages=False)
        assert made == audit(plain, None, dict(zip(("a", "b"), expected, strict=True)), path, languages=False)
    other = DataCache().split(DataCache().load(path, **READING), validation_rows=5, seed=4)
    assert other[1].fingerprint != expected[1].fingerprint


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("change", [{}, {"max_length": 40}, {"truncation": "bad_row", "max_length": 200}])
def test_tokens_of_a_split_are_told_from_those_of_the_whole(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    path, how, tokenizer = str(write(tmp_path / "a.jsonl", ROWS[name])), {**HOW, **change}, tiny_tokenizer()
    said: list[str] = []
    data = DataCache(note=said.append)
    rows = data.load(path, **READING)
    n = len(rows.trees)
    for which in ([0], [n - 1], list(range(0, n, 2)), list(range(1, n)), list(range(n))):
        part = rows.with_trees(rows.trees.take(np.array(which), "key"), "content")
        made, want = data.tokenize(part, tokenizer, **how), tokenize(part, tokenizer, **how)
        assert all(same_tree(a, b) for a, b in zip(made.trees, want.trees, strict=True))
        for field in ("total", "quarantined", "cut_prompts", "cut_completions", "split_documents", "template"):
            assert getattr(made, field) == getattr(want, field), field
        assert made.summary() == want.summary()
    assert sum("tokens kept in" in s for s in said) == 1 and not any("tokens read" in s for s in said)


def test_lengths_of_stored_tokens_are_those_of_trees(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"p{i}", "ratings": list(range(k)), "generations": ["ab" * (j + 1) for j in range(k)]}
        for i, k in enumerate([1, 2, 4, 2, 3])
    ]
    for name, of in {**ROWS, "many": rows}.items():
        path = str(write(tmp_path / f"{name}.jsonl", of))
        data = DataCache()
        loaded = data.load(path, **READING)
        stored = data.tokenize(loaded, tiny_tokenizer(), **HOW)
        assert isinstance(stored.trees, StoredTokens)
        assert _token_lengths(stored) == _token_lengths(replace(stored, trees=tuple(stored.trees))), name


def test_labels_are_counted(tmp_path: Path) -> None:
    rows = DataCache().load(str(write(tmp_path / "a.jsonl", ROWS["labels"])), **READING)
    assert label_counts(rows.trees) == label_counts(tuple(rows.trees)) == (3, 3)
    assert isinstance(rows.trees, StoredRows) and label_counts(rows.trees.take(np.array([0, 2, 3]), "")) == (1, 2)


def test_opening_reads_nothing(tmp_path: Path) -> None:
    import pyarrow as pa

    count, ids = 5000, np.arange(40, dtype=np.int32)
    stored = RowWriter(tmp_path)
    stored.write(PromptTree("p" * 100, (Completion("c" * 100, True),), f"a:{i}") for i in range(count))
    stored.close()
    writer = TokenWriter(tmp_path)
    for i in range(count):
        writer.write(TokenTree(i, ids, (ids + i,), (False,), f"a:{i}", (True,), (0.5,)))
        writer.end_row(1, 0)
    writer.close()
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        rows, tokens = StoredRows(tmp_path, "key"), StoredTokens(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * count and pa.total_allocated_bytes() - before < 8 * count  # less than eight bytes per row
    assert len(rows) == len(tokens) == count and rows[4000].source == "a:4000"
    assert np.array_equal(tokens[4000].completion_ids[0], ids + 4000)


def test_an_entry_of_the_old_format_is_made_anew_with_one_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write(tmp_path / "a.jsonl", [pair(i) for i in range(3)]))
    first = DataCache().load(path, **READING)
    assert isinstance(first.trees, StoredRows)
    whole, folder = tuple(first.trees), first.trees.folder
    (folder / "rows.arrow").unlink()
    (folder / "rows.bin").write_bytes(b"old")
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"] = {"rows.bin": [3, cached_module.crc32(folder / "rows.bin")]}
    (folder / "meta.json").write_text(json.dumps(meta))  # valid checksums, but files of an older version
    said: list[str] = []
    again = DataCache(note=said.append).load(path, **READING)
    assert isinstance(again.trees, StoredRows) and tuple(again.trees) == whole
    assert len(said) == 1 and "kept in" in said[0]


# ---- cached file hashes ----------------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the names of files that are read for hashing."""
    names: list[str] = []

    def noted(path: Path) -> str:
        names.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(cache_module, "file_sha256", noted)
    return names


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Pretend that files are hashed this many seconds after they were written."""
    monkeypatch.setattr(cache_module, "time_ns", lambda: time.time_ns() + int(seconds * 1e9))


def test_a_file_is_read_once(tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    later(monkeypatch, 5)
    files = [write(tmp_path / name, [pair(i)]) for i, name in enumerate(("a.jsonl", "b.jsonl"))]
    want = [file_sha256(f) for f in files]
    for _ in range(3):
        assert hashes_of(files) == want
    assert hashes_of([files[1], files[0]]) == want[::-1] and read == ["a.jsonl", "b.jsonl"]
    write(tmp_path / "c.jsonl", [pair(9)])
    os.replace(tmp_path / "c.jsonl", files[0])
    assert hashes_of(files) == [file_sha256(f) for f in files] and read == ["a.jsonl", "b.jsonl", "a.jsonl"]


def test_a_byte_changed_with_the_old_time_put_back_is_seen(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    later(monkeypatch, 5)
    file = write(tmp_path / "a.jsonl", [pair(0)])
    first, before = hashes_of([file]), file.stat()
    time.sleep(0.05)  # the file system's clock ticks every few milliseconds
    content = file.read_bytes()
    with file.open("r+b") as out:
        out.write(bytes([content[0] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert hashes_of([file]) == [file_sha256(file)] != first and len(read) == 2


@pytest.mark.parametrize(("seconds", "times"), [(0.0, 2), (1.9, 2), (-60.0, 2), (2.5, 1)])
def test_a_file_that_was_changed_just_before_is_read_again(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, seconds: float, times: int
) -> None:
    file = write(tmp_path / "a.jsonl", [pair(0)])
    now = file.stat().st_mtime_ns + int(seconds * 1e9)  # independent of the machine's speed
    monkeypatch.setattr(cache_module, "time_ns", lambda: now)
    for _ in range(2):
        hashes_of([file])
    assert len(read) == times


def test_a_change_within_the_same_tick_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.jsonl", [pair(0)])
    told = cache_module._file_stat(file)
    monkeypatch.setattr(cache_module, "_file_stat", lambda _: told)  # a clock too coarse to show the change
    first = hashes_of([file])
    file.write_bytes(file.read_bytes().swapcase())
    assert hashes_of([file]) == [file_sha256(file)] != first


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"x": 1', b"\xff", b"null"])
def test_a_damaged_table_is_no_table(
    tmp_path: Path, content: bytes, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    later(monkeypatch, 5)
    file = write(tmp_path / "a.jsonl", [pair(0)])
    cache_folder("data").mkdir(parents=True)
    (cache_folder("data") / HASHES).write_bytes(content)
    for _ in range(2):
        assert hashes_of([file]) == [file_sha256(file)]
    assert len(read) == 1
    for broken in (None, [], [1, 2, 3], [None, None, None], {"a": 1}):
        (cache_folder("data") / HASHES).write_text(json.dumps({str(file.resolve()): broken}))
        assert hashes_of([file]) == [file_sha256(file)]


def test_the_table_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later(monkeypatch, 5)
    monkeypatch.setattr(cache_module, "FILES_KEPT", 3)
    files = [write(tmp_path / f"{i}.jsonl", [pair(i)]) for i in range(5)]
    for file in files:
        hashes_of([file])
    assert [Path(name).name for name in json.loads((cache_folder("data") / HASHES).read_text())] == [
        "2.jsonl",
        "3.jsonl",
        "4.jsonl",
        "",  # the checksum over the others
    ]
    assert [p.name for p in cache_folder("data").iterdir()] == ["files.json"]


def test_one_byte_makes_it_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair(i) for i in range(4)])
    first = DataCache().load(str(path), **READING)
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(
        content.replace(b'"prompt": "', b'"prompt": "x', 1).replace(b'"}\n', b"}\n", 0)[: len(content) + 1]
    )
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # with the old timestamp
    second = DataCache().load(str(path), **READING)
    assert second.trees[0].prompt == "x" + str(first.trees[0].prompt) and second.fingerprint != first.fingerprint
    path.write_bytes(content)
    assert DataCache().load(str(path), **READING).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "change", [{"max_length": 40}, {"add_eos": False}, {"template": "plain"}, {"truncation": "bad_row"}]
)
def test_every_setting_counts(tmp_path: Path, change: dict[str, Any]) -> None:
    path = str(write(tmp_path / "a.jsonl", [pair(i) for i in range(4)]))
    rows = DataCache().load(path, **READING)
    DataCache().tokenize(rows, tiny_tokenizer(), **HOW)
    said: list[str] = []
    how = {**HOW, **change}
    made = DataCache(note=said.append).tokenize(rows, tiny_tokenizer(), **how)
    want = tokenize(load_preferences(path, **READING), tiny_tokenizer(), **how)
    assert "kept in" in said[0] and len(made.trees) == len(want.trees)
    assert all(same_tree(a, b) for a, b in zip(made.trees, want.trees, strict=True))


@pytest.mark.parametrize("other", [{"bos": False}, {"chat": True}, {"pad": True}])
def test_every_part_of_the_tokenizer_counts(tmp_path: Path, other: dict[str, Any]) -> None:
    rows = DataCache().load(str(write(tmp_path / "a.jsonl", [pair(0)])), **READING)
    said: list[str] = []
    for kind in ({}, other, {}):
        DataCache(note=said.append).tokenize(rows, tiny_tokenizer(**kind), **HOW)
    assert ["kept in" in s for s in said] == [True, True, False]


@pytest.mark.parametrize("file", ["rows.arrow", "meta.json"])
@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: bytes([b[0] ^ 1]) + b[1:], lambda b: b""])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, file: str, damage: Any) -> None:
    path = str(write(tmp_path / "a.jsonl", [pair(i) for i in range(3)]))
    first = DataCache().load(path, **READING)
    assert isinstance(first.trees, StoredRows)
    at = first.trees.folder / file
    content, whole = at.read_bytes(), tuple(first.trees)
    at.unlink()
    at.write_bytes(damage(content))
    said: list[str] = []
    again = DataCache(note=said.append).load(path, **READING)
    assert tuple(again.trees) == whole and "kept in" in said[0]


def test_bad_rows_are_errors_where_they_should_be_and_leave_nothing(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", planted()))
    for load in (DataCache().load, load_preferences):
        with pytest.raises(DataError, match=r"a\.jsonl:19.*on_bad_row=skip"):
            load(path, **{**READING, "on_bad_row": "error"})
    assert not list((cache_folder("data") / "rows").glob("*"))
    rows = DataCache().load(path, **READING)
    how = {**HOW, "truncation": "bad_row", "max_length": 200, "on_bad_row": "error"}
    said = []
    for make in (
        lambda: DataCache().tokenize(rows, tiny_tokenizer(), **how),
        lambda: tokenize(rows, tiny_tokenizer(), **how),
    ):
        with pytest.raises(DataError) as caught:
            make()
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_small_files_and_off_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write(tmp_path / "a.jsonl", [pair(0)]))
    assert isinstance(DataCache(on=False).load(path, **READING).trees, tuple)
    monkeypatch.setattr(cached_module, "AUTO_BYTES", 1 << 20)
    assert isinstance(DataCache().load(path, **READING).trees, tuple) and not cache_folder("data").exists()


def test_a_cache_that_cannot_be_written_is_said_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "file"))
    said: list[str] = []
    path = str(write(tmp_path / "a.jsonl", [pair(0)]))
    assert isinstance(DataCache(note=said.append).load(path, **READING).trees, tuple) and "cannot be written" in said[0]


def test_another_process_that_is_faster_wins(tmp_path: Path) -> None:
    entry = Entry("rows", "k" * 40)

    def slow(folder: Path) -> dict[str, Any]:
        entry.put(lambda f: {"who": "other"})
        return {"who": "me"}

    assert entry.put(slow) and entry.get(lambda f, meta: meta["who"]) == "other"
    assert [p.name for p in (cache_folder("data") / "rows").iterdir()] == ["k" * 40]


def test_rows_that_are_no_json_are_not_kept(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"prompt": ["p", "p"], "chosen": ["a", ""], "rejected": ["b", "c"], "blob": [b"x", b"y"]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = DataCache().load(str(tmp_path / "a.parquet"), **READING)
    assert isinstance(rows.trees, tuple) and len(rows.quarantined) == 1


def test_a_run_with_the_cache_is_the_same_run(tmp_path: Path) -> None:
    base: dict[str, Any] = {
        "model": {"path": tiny_model_folder(tmp_path / "model"), "dtype": "fp32"},
        "data": {"path": write_jsonl(tmp_path / "pairs.jsonl", polite_rows()), "validation_rows": 6, "max_length": 128},
        "loss": {"name": "dpo", "beta": 0.5},
        "train": {"epochs": 1, "batch_size": 6, "tokens_per_step": 600, "lr": 3e-3},
        "evaluation": {"samples": 1, "sample_tokens": 3, "kl_prompts": 2},
    }
    made = {}
    for name, cache in (("off", "off"), ("cold", "auto"), ("warm", "auto")):
        config = {**base, "data": {**base["data"], "cache": cache}, "output": str(tmp_path / name)}
        result = api.train(config, quiet=True)
        (weights,) = result.model.glob("*.safetensors")
        metrics = (result.folder / "metrics.jsonl").read_text()
        steps = [
            {k: v for k, v in json.loads(line).items() if "loss" in k or "reward" in k} for line in metrics.splitlines()
        ]
        made[name] = load_file(weights), steps, json.loads((result.folder / "audit.json").read_text())
    for name in ("cold", "warm"):
        assert all((made[name][0][k] == v).all() for k, v in made["off"][0].items())
        assert made[name][1:] == made["off"][1:]
