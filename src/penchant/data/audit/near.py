"""Groups of exact and near-duplicate texts in one pass. A text costs 220 bytes; with many texts, all but 8 of them are on disk."""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np

SLOTS = 128  # per MinHash signature
BANDS, WIDTH = 21, 6  # two texts of similarity 0.8 share a band of 6 slots with probability 1 - (1 - 0.8^6)^21 = 0.998
SHINGLE = 5  # characters
BATCH_TEXTS, BATCH_CHARACTERS = 4096, 1 << 20  # shingled at a time
ROUNDS = 32  # leaders tried within one bucket of a band
IN_MEMORY = 64 << 20  # bytes of an index's bands and sketches; beyond that they go to disk
CHECKED = 1 << 16  # candidates compared at a time
GAP = 16  # wanted rows of a file up to this far apart are read at once
NEAR = 0.8  # the similarity from which two texts count as near-duplicates

_ODD = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xFF51AFD7ED558CCD],
    dtype=np.uint64,
)


def normalize(text: str) -> str:
    """The form in which texts are compared: ignores case and white space."""
    return " ".join(text.lower().split())


class NearIndex:
    """Groups texts that are nearly equal, or equal up to case and white space. Call `add` in batches, then `groups`.

    Args:
        threshold: Jaccard similarity of 5-character shingle sets at which two texts belong together, in (0, 1]; it is
            estimated from 128 MinHash slots (standard error 0.035 at 0.8).

    Raises:
        ValueError: the threshold is out of range.
    """

    def __init__(self, *, threshold: float = NEAR) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold {threshold} is not in (0, 1]")
        self.threshold = threshold
        self._exact: list[np.ndarray] = []  # (b,) uint64: hash of the normalized text
        self._bands = [SpillableArray(np.uint32) for _ in range(BANDS)]  # chance collisions are removed by the check
        self._bytes = SpillableArray(np.uint8, SLOTS)  # a byte of each slot, enough to check a candidate
        self._waiting: list[str] = []
        self._characters = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, texts: Iterable[str]) -> None:
        """Add more texts."""
        for text in texts:
            normalized = normalize(text)
            self._waiting.append(normalized)
            self._characters += len(normalized)
            self._count += 1
            if len(self._waiting) >= BATCH_TEXTS or self._characters >= BATCH_CHARACTERS:
                self._flush()

    def exact_ids(self) -> np.ndarray:
        """(n,) int64: the index of the first text that is equal up to case and white space."""
        self._flush()
        return first_occurrence(np.concatenate([np.empty(0, np.uint64), *self._exact]))

    def groups(self) -> np.ndarray:
        """(n,) int64: the index of the first text of each text's group. A chain of near-duplicates is one group."""
        exact = self.exact_ids()
        unique = np.flatnonzero(exact == np.arange(len(exact)))
        if len(unique) < 2:
            return exact
        parent = np.arange(len(unique))
        # expected equal bytes of two sketches at the threshold: different slots agree in a byte with probability 1/256
        needed = SLOTS * (self.threshold + (1 - self.threshold) / 256)
        for band in self._bands:
            for a, b in _candidates(band.all()[unique], self._bytes, unique, needed):
                parent = _union(parent, a, b)
        groups: np.ndarray = unique[parent[np.searchsorted(unique, exact)]]
        return groups

    def merge(self, other: NearIndex) -> None:
        """Append the texts of another index."""
        self._flush()
        other._flush()
        self._exact += other._exact
        for array, other_array in zip(self._parts(), other._parts(), strict=True):
            other_array.move_to(array)
        self._count += other._count
        self._spill()

    def __getstate__(self) -> dict[str, Any]:
        self._flush()  # in the process that has the texts
        return vars(self)

    def _parts(self) -> list[SpillableArray]:
        return [*self._bands, self._bytes]

    def _flush(self) -> None:
        if not self._waiting:
            return
        self._exact.append(np.fromiter(map(text_hash, self._waiting), np.uint64, len(self._waiting)))
        slots = signatures(self._waiting)
        for band, hashes in zip(self._bands, (_band_hashes(slots) >> np.uint64(32)).astype(np.uint32).T, strict=True):
            band.append(hashes.copy())
        self._bytes.append(((slots * np.uint32(0x9E3779B1)) >> np.uint32(24)).astype(np.uint8))
        self._waiting, self._characters = [], 0
        self._spill()

    def _spill(self) -> None:
        if sum(array.held for array in self._parts()) > IN_MEMORY:
            for array in self._parts():
                array.to_disk()


class SpillableArray:
    """A growing array of rows of numbers, in memory or, from `to_disk` on, in a temporary file.

    Args:
        dtype: of the numbers; width: numbers per row; 0: each row is one number.
    """

    def __init__(self, dtype: type[np.generic], width: int = 0) -> None:
        self.dtype, self.width = np.dtype(dtype), width
        self.held = 0  # bytes in memory
        self._parts: list[np.ndarray] = []
        self._file: IO[bytes] | None = None

    def append(self, rows: np.ndarray) -> None:
        """Append rows."""
        if self._file is not None:
            self._file.write(rows.tobytes())
        else:
            self._parts.append(rows)
            self.held += rows.nbytes

    def to_disk(self) -> None:
        """Move the rows in memory to the file."""
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this does
        parts, self._parts, self.held = self._parts, [], 0
        for part in parts:
            self.append(part)

    def move_to(self, other: SpillableArray) -> None:
        """Append all rows to `other`."""
        for part in self._parts if self._file is None else [self.all()]:
            other.append(part)

    def all(self) -> np.ndarray:
        """Every row: (n,) or (n, width)."""
        if self._file is None:
            if len(self._parts) != 1:
                empty = np.empty((0, self.width) if self.width else 0, self.dtype)
                self._parts = [np.concatenate([empty, *self._parts])]
            return self._parts[0]
        self._file.seek(0)
        numbers = np.fromfile(self._file, self.dtype)
        self._file.seek(0, os.SEEK_END)
        return self._shaped(numbers)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_parts": [self.all()], "held": self.all().nbytes, "_file": None}

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """The rows at these indices, in any order; only the parts of a file that hold some are read."""
        if self._file is None:
            return self.all()[indices]
        self._file.flush()
        unique, inverse = np.unique(indices, return_inverse=True)
        rows = self._shaped(np.empty(len(unique) * max(1, self.width), self.dtype))
        size = self.dtype.itemsize * max(1, self.width)
        edges = np.r_[0, np.flatnonzero(np.diff(unique) > GAP) + 1, len(unique)].tolist()
        for start, end in itertools.pairwise(edges):
            first, last = int(unique[start]), int(unique[end - 1])
            block = os.pread(self._file.fileno(), (last - first + 1) * size, first * size)
            rows[start:end] = self._shaped(np.frombuffer(block, self.dtype))[unique[start:end] - first]
        return rows[inverse]

    def _shaped(self, numbers: np.ndarray) -> np.ndarray:
        return numbers.reshape(-1, self.width) if self.width else numbers


def text_hash(text: str) -> int:
    """A 64-bit hash that is the same in every process; two of a million texts share one with probability 3e-8."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def signatures(texts: Sequence[str]) -> np.ndarray:
    """(n, 128) uint32: MinHash signatures of the texts' 5-character shingles."""
    from rensa import RMinHash

    hashes, offsets = shingle_hashes(texts)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, SLOTS, 0)
    flat = np.fromiter(itertools.chain.from_iterable(matrix.to_rows()), np.uint32, len(texts) * SLOTS)
    return flat.reshape(len(texts), SLOTS)


def shingle_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of 5 characters of each text, concatenated, and the n + 1 offsets of the texts.

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
    for k in range(1, SHINGLE):  # drop runs that start in one text and end in the next
        inside[ends[:-1] - k] = False
    offsets = np.concatenate([[0], ends - (SHINGLE - 1) * np.arange(1, len(padded) + 1)]).astype(np.uint64)
    return hashes[inside], offsets


def _band_hashes(slots: np.ndarray) -> np.ndarray:
    parts = slots[:, : BANDS * WIDTH].reshape(len(slots), BANDS, WIDTH).astype(np.uint64)
    hashes = np.zeros((len(slots), BANDS), np.uint64)
    for k in range(WIDTH):
        hashes = (hashes ^ parts[:, :, k]) * _ODD[0]
        hashes ^= hashes >> np.uint64(31)
    return hashes


def first_occurrence(keys: np.ndarray) -> np.ndarray:
    """(n,) int64: for each key the index of its first occurrence."""
    # np.unique needs 1.5 times the memory, which matters for tens of millions of texts
    order = np.argsort(keys, kind="stable")
    ordered, new = keys[order], np.ones(len(keys), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    del ordered
    member = np.cumsum(new, dtype=np.uint32)
    member -= 1
    first = np.empty(len(keys), np.int64)
    first[order] = order[new][member]
    return first


def first_index(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """For each of `queries` the index of its first occurrence in `keys`, -1 if there is none: int64, shape of `queries`."""
    unique, first = np.unique(keys, return_index=True)
    if not len(unique):
        return np.full(len(queries), -1)
    position = np.minimum(np.searchsorted(unique, queries), len(unique) - 1)
    return np.where(unique[position] == queries, first[position], -1)


def _candidates(
    keys: np.ndarray, sketches: SpillableArray, indices: np.ndarray, threshold: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Verified pairs among texts with the same band hash: each against its bucket's first, then the rest among themselves.

    A bucket of many different texts (boilerplate) is not compared pair by pair: after `ROUNDS` leaders the rest is left to
    the other bands.
    """
    packed = keys.astype(np.uint64)
    packed <<= np.uint64(32)
    packed |= np.arange(len(keys), dtype=np.uint64)
    packed.sort()  # several times as fast as an argsort of the keys
    packed = packed[_repeated(packed >> np.uint64(32))]  # most texts share no bucket
    order, bucket = (packed & np.uint64(0xFFFFFFFF)).astype(np.int64), packed >> np.uint64(32)
    for _ in range(ROUNDS):
        shared = _repeated(bucket)
        order, bucket = order[shared], bucket[shared]
        if not len(order):
            return
        starts = np.r_[True, bucket[1:] != bucket[:-1]]
        leader = order[starts][np.cumsum(starts) - 1]
        near = np.zeros(len(order), bool)
        for i in range(0, len(order), CHECKED):
            part = slice(i, i + CHECKED)
            near[part] = (sketches[indices[order[part]]] == sketches[indices[leader[part]]]).sum(axis=1) >= threshold
        near &= ~starts
        yield leader[near], order[near]
        remaining = ~(near | starts)
        order, bucket = order[remaining], bucket[remaining]


def _repeated(sorted_values: np.ndarray) -> np.ndarray:
    """(n,) bool: which of the sorted numbers occur more than once."""
    repeated = np.zeros(len(sorted_values), bool)
    same = sorted_values[1:] == sorted_values[:-1]
    repeated[1:] |= same
    repeated[:-1] |= same
    return repeated


def _union(parent: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Union of all pairs at once; a group's parent is its smallest index."""
    while True:
        root_a, root_b = parent[a], parent[b]
        different = root_a != root_b
        if not different.any():
            return parent
        root_a, root_b = root_a[different], root_b[different]
        np.minimum.at(parent, np.maximum(root_a, root_b), np.minimum(root_a, root_b))
        while True:  # point every text to its group's first
            grandparent = parent[parent]
            if np.array_equal(grandparent, parent):
                break
            parent = grandparent
