"""Near-duplicates: error rates at known similarities, exact groups, bounded memory."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import penchant
from penchant.data.audit import near
from penchant.data.audit.near import NearIndex, normalize, shingle_hashes


def group_ids(texts: Iterable[str], threshold: float = near.NEAR) -> np.ndarray:
    index = NearIndex(threshold=threshold)
    index.add(texts)
    return index.groups()


def jaccard(a: str, b: str) -> float:
    """The exact Jaccard similarity that the signatures estimate, over sets of normalized 5-character shingles."""
    one, other = (set(shingle_hashes([normalize(t)])[0].tolist()) for t in (a, b))
    return len(one & other) / len(one | other)


def _words(rng: random.Random) -> list[str]:
    return ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 9))) for _ in range(3000)]


def _edited(rng: random.Random, words: list[str], length: int, edits: int) -> tuple[str, str]:
    text = [rng.choice(words) for _ in range(length)]
    other = list(text)
    for at in rng.sample(range(length), edits):
        other[at] = rng.choice(words)
    return " ".join(text), " ".join(other)


@pytest.mark.parametrize("length", [12, 60, 200])
def test_error_rates_at_known_similarity(length: int) -> None:
    rng = random.Random(length)
    words = _words(rng)
    pairs = [_edited(rng, words, length, rng.randint(0, length // 4)) for _ in range(500)]
    similarity = np.array([jaccard(a, b) for a, b in pairs])
    found = group_ids([a for a, _ in pairs] + [b for _, b in pairs])[500:] == np.arange(500)
    sure, unlike = similarity >= 0.9, similarity < 0.7
    assert sure.sum() > 30 and unlike.sum() > 30
    assert found[sure].mean() >= 0.99  # recall
    assert found[unlike].mean() <= 0.01
    assert found[similarity >= 0.8].mean() > 0.8  # the estimate's error of 0.035 matters between 0.75 and 0.85
    assert (similarity[found] >= 0.7).mean() >= 0.99  # precision


@pytest.mark.parametrize("threshold", [0.6, 0.7, 0.9])
def test_the_threshold_is_where_it_says(threshold: float) -> None:
    rng = random.Random(1)
    words = _words(rng)
    pairs = [_edited(rng, words, 60, rng.randint(0, 18)) for _ in range(400)]
    similarity = np.array([jaccard(a, b) for a, b in pairs])
    found = group_ids([a for a, _ in pairs] + [b for _, b in pairs], threshold=threshold)[400:] == np.arange(400)
    assert found[similarity >= min(threshold + 0.1, 0.98)].mean() >= (0.9 if threshold < 0.7 else 0.98)
    assert found[similarity < threshold - 0.1].mean() <= 0.02


def test_case_and_white_space_do_not_matter() -> None:
    texts = ["What is it?", "other", "what  IS\nit? ", "", "  ", "other!", "x", "X"]
    assert group_ids(texts, threshold=1.0).tolist() == [0, 1, 0, 3, 3, 5, 6, 6]


def test_a_chain_is_one_group() -> None:
    rng = random.Random(3)
    words = _words(rng)
    chain = [rng.choice(words) for _ in range(100)]
    texts = []
    for at in range(0, 30):
        chain[at] = rng.choice(words)
        texts.append(" ".join(chain))
    assert jaccard(texts[0], texts[-1]) < 0.7
    assert set(group_ids(texts).tolist()) == {0}
    # the group is the same for any order, and named by its first text
    order = rng.sample(range(30), 30)
    assert set(group_ids([texts[i] for i in order]).tolist()) == {0}


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(4)
    words = _words(rng)
    texts = [t for _ in range(100) for t in _edited(rng, words, 30, 1)]
    whole = group_ids(texts)
    assert (whole != np.arange(200)).sum() > 90
    monkeypatch.setattr(near, "BATCH_TEXTS", 7)
    assert (group_ids(texts) == whole).all()
    monkeypatch.setattr(near, "BATCH_CHARACTERS", 300)
    index = NearIndex()
    for text in texts:
        index.add([text])
    assert (index.groups() == whole).all() and len(index) == 200


def test_a_bucket_of_many_is_not_compared_pair_by_pair() -> None:
    keys = np.zeros(20_000, np.uint64)  # all in one bucket, all different
    sketch = np.random.default_rng(0).integers(0, 256, (20_000, near.SLOTS), dtype=np.uint8)
    rounds = list(near._candidates(keys, sketch, np.arange(20_000), 0.8 * near.SLOTS))
    assert len(rounds) == near.ROUNDS and sum(len(a) for a, _ in rounds) == 0


def test_two_groups_in_one_bucket_are_both_found() -> None:
    sketch = np.zeros((6, near.SLOTS), np.uint8)
    sketch[[1, 3, 5]] = 1
    parent = np.arange(6)
    for a, b in near._candidates(np.zeros(6, np.uint64), sketch, np.arange(6), 0.8 * near.SLOTS):
        parent = near._union(parent, a, b)
    assert parent.tolist() == [0, 1, 0, 1, 0, 1]


@given(st.lists(st.text(max_size=30), max_size=20))
def test_any_texts(texts: list[str]) -> None:
    ids = group_ids([*texts, *texts])
    assert ids.dtype == np.int64 and (ids[len(texts) :] == ids[: len(texts)]).all()
    assert (ids <= np.arange(len(ids))).all() and (ids[ids] == ids).all()


def test_lone_surrogates_and_nothing() -> None:
    assert group_ids(["\ud800", "\ud800"]).tolist() == [0, 0]
    assert group_ids([]).tolist() == [] and group_ids(["one"]).tolist() == [0]


def test_shingles_do_not_cross_texts() -> None:
    texts = ["abcdefg", "ab", "hijklmn"]
    hashes, offsets = shingle_hashes(texts)
    assert offsets.tolist() == [0, 3, 4, 7] and len(hashes) == 7
    for i, text in enumerate(texts):
        alone, _ = shingle_hashes([text])
        assert (hashes[int(offsets[i]) : int(offsets[i + 1])] == alone).all()


def test_the_same_in_every_process() -> None:
    rng = random.Random(5)
    words = _words(rng)
    texts = [t for _ in range(20) for t in _edited(rng, words, 20, 1)]
    code = (
        f"from penchant.data.audit.near import *; texts = {texts!r}; index = NearIndex(); index.add(texts); "
        "print(signatures(texts).sum(), index.groups().tolist())"
    )
    said = []
    for hash_seed, threads in (("1", "1"), ("2", "4")):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "RAYON_NUM_THREADS": threads}
        environment["PYTHONPATH"] = str(Path(penchant.__file__).parent.parent)
        said.append(
            subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
        )
    assert said[0] == said[1]


def test_memory_is_counted_in_bytes_a_text() -> None:
    index = NearIndex()
    index.add(f"{i} " * 50 for i in range(5000))
    index.exact_ids()
    kept = sum(part.nbytes for part in index._exact) + sum(part.held for part in index._parts())
    assert kept == 5000 * (8 + 4 * near.BANDS + near.SLOTS) == 5000 * 220 and not index._waiting


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1])
def test_a_threshold_must_be_a_similarity(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        group_ids(["a"], threshold=threshold)
