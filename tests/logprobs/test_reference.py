"""The reference: three kinds with equal log-probs, and a cache key of exactly what they depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import some_pairs, tiny_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from penchant.data.mapped import StoredTokens, TokenWriter
from penchant.data.packing import pack
from penchant.logprobs import Scorer, reference
from penchant.logprobs.reference import (
    CachedReference,
    LiveReference,
    RowParts,
    adapter_off,
    cache_key,
    cached_reference,
    joined,
)
from penchant.models.load import weights_sha256
from penchant.models.lora import add_lora
from penchant.models.options import LoraConfig
from penchant.types import TokenTree

KEY = dict(dtype="torch.float32", tokenizer="t", template="auto")


def test_cached_equals_live_and_is_reused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    live = LiveReference(Scorer(model, "shared"))
    pairs = some_pairs(9)
    first, found = cached_reference(live, pairs, "k", tmp_path, tokens_per_step=30)
    assert not found
    with torch.no_grad():
        next(model.parameters()).add_(1.0)  # would change the result if the cache were computed again
    again, found = cached_reference(live, pairs, "k", tmp_path, tokens_per_step=1000)
    assert found
    batch = pack([pairs[4], pairs[0]])
    assert torch.equal(first.logps(batch), again.logps(batch))
    fresh = LiveReference(Scorer(tiny_model("llama"), "shared")).logps(batch)
    assert torch.allclose(first.logps(batch), fresh, rtol=1e-12)


def test_a_torn_cache_is_computed_again(tmp_path: Path) -> None:
    live = LiveReference(Scorer(tiny_model("llama"), "shared"))
    pairs = some_pairs(3)
    cached_reference(live, pairs, "k", tmp_path, tokens_per_step=30)
    path = tmp_path / "k.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    _, found = cached_reference(live, pairs, "k", tmp_path, tokens_per_step=30)
    assert not found
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("at", [0, 8, 20, 60, 100, -1])
def test_a_damaged_bit_in_a_cache_is_noticed_and_mended(tmp_path: Path, at: int) -> None:
    live = LiveReference(Scorer(tiny_model("llama"), "shared"))
    pairs, said = some_pairs(3), list[str]()
    first, _ = cached_reference(live, pairs, "k", tmp_path, tokens_per_step=30)
    path = tmp_path / "k.safetensors"
    written = path.read_bytes()
    content = bytearray(written)
    content[at] ^= 1
    path.write_bytes(content)
    again, found = cached_reference(live, pairs, "k", tmp_path, tokens_per_step=30, say=said.append)
    assert not found and len(said) == 1 and "k.safetensors" in said[0] and "recomputing" in said[0]
    assert torch.equal(first.logps(pack(pairs)), again.logps(pack(pairs)))
    assert path.read_bytes() == written


def test_a_cache_of_an_older_version_has_no_sum_and_is_computed_again(tmp_path: Path) -> None:
    live = LiveReference(Scorer(tiny_model("llama"), "shared"))
    pairs, said = some_pairs(3), list[str]()
    cached_reference(live, pairs, "k", tmp_path, tokens_per_step=30)
    path = tmp_path / "k.safetensors"
    written = path.read_bytes()
    save_file({name: value + 1.0 for name, value in load_file(path).items()}, path)
    assert not cached_reference(live, pairs, "k", tmp_path, tokens_per_step=30, say=said.append)[1]
    assert "no checksum" in said[0] and "recomputing" in said[0]
    assert path.read_bytes() == written


@pytest.mark.parametrize("where", ["a file", "below a file", "full", "full in safetensors"])
def test_where_no_cache_can_be_written_it_goes_on_without(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = LiveReference(Scorer(tiny_model("llama"), "shared"))
    pairs, said = some_pairs(3), list[str]()
    folder = tmp_path / "cache"

    def full(*_: Any, **__: Any) -> None:
        if where == "full":
            raise OSError(28, "No space left on device")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    if where in ("a file", "below a file"):
        folder.write_text("")
        folder = folder / "below" if where == "below a file" else folder
    else:
        monkeypatch.setattr("safetensors.torch.save_file", full)
    found, on_disk = cached_reference(live, pairs, "k", folder, tokens_per_step=30, say=said.append)
    assert not on_disk and len(said) == 1 and str(folder) in said[0]
    assert torch.allclose(found.logps(pack(pairs)), live.logps(pack(pairs)), rtol=1e-12)
    assert not folder.is_dir() or not list(folder.iterdir())


def test_a_cache_of_other_rows_or_without_tokens_is_computed_again(tmp_path: Path) -> None:
    """Whatever its name, a cache must have the right number of completions, and their tokens if needed."""
    live = LiveReference(Scorer(tiny_model("llama"), "shared"))
    pairs = some_pairs(4)
    cached_reference(live, pairs[:3], "k", tmp_path, tokens_per_step=30)
    fresh, found = cached_reference(live, pairs, "k", tmp_path, tokens_per_step=30)
    assert not found and torch.allclose(fresh.logps(pack(pairs)), live.logps(pack(pairs)), rtol=1e-12)
    assert cached_reference(live, pairs, "k", tmp_path, tokens_per_step=30)[1]
    by_token, found = cached_reference(live, pairs, "k", tmp_path, tokens_per_step=30, tokens=True)
    assert not found and torch.allclose(by_token.token_logps(pack(pairs)), live.token_logps(pack(pairs)), rtol=1e-12)


def test_adapter_off_is_the_start_and_on_is_not() -> None:
    start = Scorer(tiny_model("llama", dtype=torch.float32), "shared")
    batch = pack(some_pairs(5))
    expected = start.logps(batch).sums
    model = add_lora(tiny_model("llama", dtype=torch.float32), LoraConfig(r=4), seed=0)
    scorer = Scorer(model, "shared")
    reference = adapter_off(scorer)
    assert torch.equal(scorer.logps(batch).sums, reference.logps(batch))  # B starts at zero
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    assert torch.equal(reference.logps(batch), expected)
    assert not torch.allclose(scorer.logps(batch).sums, expected)


def test_the_key_changes_with_what_matters() -> None:
    pairs = some_pairs(4)
    base = cache_key("weights", pairs, **KEY)
    assert base == cache_key("weights", some_pairs(4), **KEY)
    changed = np.array(pairs[2].completion_ids[1])
    changed[0] += 1
    one_token = [
        *pairs[:2],
        dataclasses.replace(pairs[2], completion_ids=(pairs[2].completion_ids[0], changed)),
        pairs[3],
    ]
    joined = np.concatenate([pairs[0].prompt_ids, pairs[0].completion_ids[0][:1]])
    boundary = [
        dataclasses.replace(
            pairs[0], prompt_ids=joined, completion_ids=(pairs[0].completion_ids[0][1:], pairs[0].completion_ids[1])
        ),
        *pairs[1:],
    ]
    others = [
        cache_key("other weights", pairs, **KEY),
        cache_key("weights", one_token, **KEY),
        cache_key("weights", boundary, **KEY),
        cache_key("weights", pairs[:3], **KEY),
        cache_key("weights", pairs[::-1], **KEY),
        cache_key("weights", pairs, **{**KEY, "template": "plain"}),
        cache_key("weights", pairs, **{**KEY, "tokenizer": "u"}),
        cache_key("weights", pairs, **{**KEY, "dtype": "torch.bfloat16"}),
    ]
    assert len({base, *others}) == len(others) + 1


@pytest.mark.parametrize("with_lora", [False, True])
def test_weights_hash_sees_one_changed_weight_but_no_adapter(with_lora: bool) -> None:
    plain = weights_sha256(tiny_model("llama", dtype=torch.float32))
    model = tiny_model("llama", dtype=torch.float32)
    if with_lora:
        model = add_lora(model, LoraConfig(r=2), seed=1)
    assert weights_sha256(model) == plain
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "down_proj" in n and "lora" not in n)[0, 0] += 1e-3
    assert weights_sha256(model) != plain


def test_weights_hash_sees_a_saved_buffer() -> None:
    """DeepSeek V3's correction of its router is one."""
    model = tiny_model("llama", dtype=torch.float32)
    model.model.register_buffer("computed", torch.zeros(2), persistent=False)
    hashes = {weights_sha256(model), weights_sha256(tiny_model("llama", dtype=torch.float32))}
    for value in (0.0, 1.0):
        model.model.register_buffer("correction", torch.full((2,), value))
        hashes.add(weights_sha256(model))
    assert len(hashes) == 3


def test_two_runs_at_once_compute_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run waits for the first, and reads its file."""
    real, calls = reference.compute_logps, []

    def slow(*args: Any, **kw: Any) -> Any:
        calls.append(1)
        time.sleep(0.3)
        return real(*args, **kw)

    monkeypatch.setattr(reference, "compute_logps", slow)
    live, pairs = LiveReference(Scorer(tiny_model("llama"), "shared")), some_pairs(3)
    found: list[bool] = []

    def ask() -> None:
        found.append(cached_reference(live, pairs, "k", tmp_path, tokens_per_step=30)[1])

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(calls) == 1 and sorted(found) == [False, True]
    assert [p.name for p in tmp_path.iterdir()] == ["k.safetensors"]


def stored(folder: Path, trees: list[TokenTree]) -> StoredTokens:
    folder.mkdir(exist_ok=True)
    writer = TokenWriter(folder)
    for tree in trees:
        writer.write(dataclasses.replace(tree, labels=(True, False), scores=(None, None)))
        writer.end_row(1, 0)
    writer.close()
    return StoredTokens(folder)


def key_by_its_definition(trees: Any) -> str:
    digest = hashlib.sha256()
    for part in (reference.ENGINE_VERSION, "weights", KEY["dtype"], KEY["tokenizer"], KEY["template"]):
        digest.update(part.encode() + b"\0")
    for tree in trees:
        for ids in (tree.prompt_ids, *tree.completion_ids):
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(ids.astype("<i4").tobytes())
        digest.update(b"|")
    return digest.hexdigest()


@pytest.mark.parametrize("block", [1, 3, 10_000])
def test_the_key_of_arrays_is_the_key_of_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(reference, "BLOCK", block)
    pairs = some_pairs(10)
    arrays = stored(tmp_path / "a", pairs)
    few, some = arrays.first_completions(), arrays.take(np.array([1, 4, 5, 9]))
    for trees in (pairs, [], arrays, few, some, some.first_completions(), some.take(np.array([0, 3]))):
        assert cache_key("weights", trees, **KEY) == key_by_its_definition(trees)
    assert [t.source for t in some] == [pairs[i].source for i in (1, 4, 5, 9)] and [t.row for t in some] == [0, 1, 2, 3]
    assert some.total == sum(t.shared_tokens for t in some) and few.total == sum(t.shared_tokens for t in few)
    assert all(len(t.completion_ids) == len(t.labels) == len(t.scores) == len(t.truncated) == 1 for t in few)


def test_a_cached_reference_of_stored_tokens_is_that_of_trees(tmp_path: Path) -> None:
    live = LiveReference(Scorer(tiny_model("llama"), "shared"))
    pairs = some_pairs(9)
    arrays = stored(tmp_path / "a", pairs)
    both = [
        cached_reference(live, trees, name, tmp_path, tokens_per_step=60, tokens=True)[0]
        for name, trees in (("list", pairs), ("arrays", arrays))
    ]
    odd = [dataclasses.replace(t, row=t.row * 7) for t in pairs]
    other, _ = cached_reference(live, odd, "list", tmp_path, tokens_per_step=60, tokens=True)
    assert isinstance(both[1].by_row, RowParts) and isinstance(other.by_row, dict)
    assert dict(both[1].by_row).keys() == {t.row for t in pairs} and len(both[1].by_row) == 9
    for t in pairs:
        for name in ("by_row", "tokens_by_row"):
            one, two, three = (getattr(r, name) for r in (*both, other))
            assert torch.equal(one[t.row], two[t.row]) and torch.equal(one[t.row], three[7 * t.row])
    with pytest.raises(KeyError):
        both[1].by_row[9]


def test_joined_references_hold_the_rows_of_each() -> None:
    def part(first: int, *values: float) -> RowParts:
        return RowParts([(first, np.arange(1, len(values) + 1), torch.tensor(values))])

    lists = CachedReference({9: torch.tensor([9.0])})
    whole = joined([CachedReference(part(0, 0.0, 1.0)), CachedReference(part(2, 2.0))])
    assert {row: v.item() for row, v in whole.by_row.items()} == {0: 0.0, 1: 1.0, 2: 2.0}
    assert isinstance(whole.by_row, RowParts) and dict(whole.tokens_by_row) == {}
    mixed = joined([CachedReference(part(0, 0.0)), lists])
    assert {row: v.item() for row, v in mixed.by_row.items()} == {0: 0.0, 9: 9.0}
