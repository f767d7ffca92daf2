"""Near-duplicate texts in one pass: exact and near copies get one group, in memory that grows by about 220 bytes a text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np

SLOTS = 128  # of a MinHash signature
BANDS, WIDTH = 21, 6  # two texts of similarity 0.8 share a band of 6 slots with probability 1 - (1 - 0.8^6)^21 = 0.998
SHINGLE = 5  # characters
BATCH_TEXTS, BATCH_CHARACTERS = 4096, 1 << 20  # what is shingled at a time
ROUNDS = 32  # leaders tried within one bucket of a band
NEAR = 0.8  # the similarity from which two texts count as near-duplicates

_ODD = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xFF51AFD7ED558CCD],
    dtype=np.uint64,
)


def normalize(text: str) -> str:
    """What counts as the same text: case and white space do not matter."""
    return " ".join(text.lower().split())


class NearIndex:
    """Groups of texts that come bit by bit: equal but for case and white space, or nearly equal. `add` batches, then `groups`.

    Args:
        threshold: Jaccard similarity of the sets of 5-character shingles from which two texts belong together, in (0, 1]; it is
            estimated from 128 MinHash slots (standard error 0.035 at 0.8).

    Raises:
        ValueError: another threshold.
    """

    def __init__(self, *, threshold: float = NEAR) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold {threshold} is not in (0, 1]")
        self.threshold = threshold
        self._exact: list[np.ndarray] = []  # (b,) uint64: hash of the normalized text
        self._bands: list[np.ndarray] = []  # (b, BANDS) uint32: chance meetings are sorted out by the check
        self._bytes: list[np.ndarray] = []  # (b, SLOTS) uint8: enough of each slot to check a candidate by
        self._waiting: list[str] = []
        self._characters = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, texts: Iterable[str]) -> None:
        """Take more texts."""
        for text in texts:
            plain = normalize(text)
            self._waiting.append(plain)
            self._characters += len(plain)
            self._count += 1
            if len(self._waiting) >= BATCH_TEXTS or self._characters >= BATCH_CHARACTERS:
                self._flush()

    def exact_ids(self) -> np.ndarray:
        """(n,) int64: the index of the first text that is equal but for case and white space."""
        self._flush()
        return first_of_equal(np.concatenate([np.empty(0, np.uint64), *self._exact]))

    def groups(self) -> np.ndarray:
        """(n,) int64: the index of the first text of each text's group. A chain of near-duplicates is one group."""
        exact = self.exact_ids()
        once = np.flatnonzero(exact == np.arange(len(exact)))
        if len(once) < 2:
            return exact
        sketch = _rows(self._bytes, once)
        parent = np.arange(len(once))
        needed = _slots_needed(self.threshold)
        for band in range(BANDS):
            keys = np.concatenate([part[:, band] for part in self._bands])[once]
            for a, b in _candidates(keys, sketch, needed):
                parent = _unite(parent, a, b)
        found: np.ndarray = once[parent[np.searchsorted(once, exact)]]
        return found

    def _flush(self) -> None:
        if not self._waiting:
            return
        self._exact.append(np.fromiter(map(text_hash, self._waiting), np.uint64, len(self._waiting)))
        slots = signatures(self._waiting)
        self._bands.append((_band_hashes(slots) >> np.uint64(32)).astype(np.uint32))
        self._bytes.append(((slots * np.uint32(0x9E3779B1)) >> np.uint32(24)).astype(np.uint8))
        self._waiting, self._characters = [], 0


def text_hash(text: str) -> int:
    """A 64-bit hash that is the same in every process; two of a million texts share one with probability 3e-8."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def signatures(texts: Sequence[str]) -> np.ndarray:
    """(n, 128) uint32: MinHash signatures of the texts' 5-character shingles."""
    from rensa import RMinHash

    hashes, offsets = shingle_hashes(texts)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, SLOTS, 0)
    flat = np.fromiter(chain.from_iterable(matrix.to_rows()), np.uint32, len(texts) * SLOTS)
    return flat.reshape(len(texts), SLOTS)


def shingle_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of 5 characters of each text, one text after the other, and the n + 1 places where each begins.

    A shorter text is one shingle.
    """
    padded = [t if len(t) >= SHINGLE else t.ljust(SHINGLE, "\0") for t in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    ends = np.cumsum([len(t) for t in padded])
    count = max(len(codes) - SHINGLE + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for k in range(SHINGLE):
        hashes += codes[k : k + count] * _ODD[k]
    hashes ^= hashes >> np.uint64(32)
    hashes *= _ODD[0]
    hashes ^= hashes >> np.uint64(29)
    inside = np.ones(count, bool)
    for k in range(1, SHINGLE):  # those that would begin in one text and end in the next
        inside[ends[:-1] - k] = False
    offsets = np.concatenate([[0], ends - (SHINGLE - 1) * np.arange(1, len(padded) + 1)]).astype(np.uint64)
    return hashes[inside], offsets


def _band_hashes(slots: np.ndarray) -> np.ndarray:
    parts = slots[:, : BANDS * WIDTH].reshape(len(slots), BANDS, WIDTH).astype(np.uint64)
    out = np.zeros((len(slots), BANDS), np.uint64)
    for k in range(WIDTH):
        out = (out ^ parts[:, :, k]) * _ODD[0]
        out ^= out >> np.uint64(31)
    return out


def _rows(parts: list[np.ndarray], wanted: np.ndarray) -> np.ndarray:
    """Rows of arrays that stand one after the other, without joining them all first."""
    out = np.empty((len(wanted), parts[0].shape[1]), parts[0].dtype)
    start = at = 0
    for part in parts:
        end = int(np.searchsorted(wanted, start + len(part)))
        out[at:end] = part[wanted[at:end] - start]
        start, at = start + len(part), end
    return out


def first_of_equal(keys: np.ndarray) -> np.ndarray:
    """(n,) int64: for each key the first index at which it stands."""
    _, first, member = np.unique(keys, return_index=True, return_inverse=True)
    found: np.ndarray = first[member]
    return found


def first_with(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each wanted key the first index at which it stands in `keys`, -1 where it does not: int64, shape of `wanted`."""
    known, first = np.unique(keys, return_index=True)
    if not len(known):
        return np.full(len(wanted), -1)
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[at] == wanted, first[at], -1)


def _slots_needed(threshold: float) -> float:
    """Equal bytes of two sketches at this similarity: different slots have equal bytes once in 256 times."""
    return SLOTS * (threshold + (1 - threshold) / 256)


def _candidates(keys: np.ndarray, sketch: np.ndarray, needed: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Checked pairs among texts with the same band hash: each against its bucket's first, then the rest among themselves.

    A bucket of many different texts (boilerplate) is not compared pair by pair: after `ROUNDS` leaders the rest is left to
    the other bands.
    """
    order = np.argsort(keys, kind="stable")
    bucket = np.cumsum(np.r_[False, keys[order][1:] != keys[order][:-1]])
    for _ in range(ROUNDS):
        shared = np.bincount(bucket)[bucket] > 1
        order, bucket = order[shared], bucket[shared]
        if not len(order):
            return
        starts = np.r_[True, bucket[1:] != bucket[:-1]]
        bucket = np.cumsum(starts) - 1
        leader = order[starts][bucket]
        near = np.zeros(len(order), bool)
        for i in range(0, len(order), 1 << 16):
            part = slice(i, i + (1 << 16))
            near[part] = (sketch[order[part]] == sketch[leader[part]]).sum(axis=1) >= needed
        near &= ~starts
        yield leader[near], order[near]
        left = ~(near | starts)
        order, bucket = order[left], bucket[left]


def _unite(parent: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Union of all pairs at once; a group's parent is its smallest index."""
    while True:
        one, other = parent[a], parent[b]
        apart = one != other
        if not apart.any():
            return parent
        one, other = one[apart], other[apart]
        np.minimum.at(parent, np.maximum(one, other), np.minimum(one, other))
        while True:  # point every text at its group's first
            nearer = parent[parent]
            if np.array_equal(nearer, parent):
                break
            parent = nearer
