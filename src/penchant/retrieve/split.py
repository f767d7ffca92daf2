"""Train, validation and test by groups of prompts: rows whose prompts are equal or nearly so stay together, whatever their order."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from penchant.data.near import NearIndex, text_hash
from penchant.data.split import prompt_key
from penchant.retrieve.request import SPLITS

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where each row goes.

    Args:
        split: (n,) uint8, an index into SPLITS.
        groups: how many groups of nearly equal prompts there are; prompts: how many prompts that differ in more than case and white space.
        straddling: (groups, rows) of groups in several splits.
    """

    split: np.ndarray
    groups: int
    prompts: int
    straddling: tuple[int, int]


class Splitter:
    """Takes the prompts of all rows in one pass, then assigns; about 320 bytes a row."""

    def __init__(self) -> None:
        self._near = NearIndex()
        self._hashes = array("Q")
        self._published = array("B")

    def add(self, rows: Iterable[tuple[str, str]]) -> None:
        """Take (prompt text, published split) of more rows."""
        for text, published in rows:
            self._near.add([text])
            self._hashes.append(text_hash(prompt_key(text)))
            self._published.append(SPLITS.index(published))

    def assign(self, shares: Sequence[float], seed: int, *, keep_published: bool = False) -> Assignment:
        """The split of each row.

        Args:
            shares: of train, validation and test; keep_published: rows stay in their published split, and only a split that was not
                published is drawn, from train.
        """
        published = np.array(self._published, dtype=np.uint8)
        groups = self._near.groups()
        hashes = np.array(self._hashes, dtype=np.uint64)
        if not len(groups):
            return Assignment(published, 0, 0, (0, 0))
        leaders, member = np.unique(groups, return_inverse=True)
        # a group is drawn by its smallest hash, so that neither the order of the rows nor their number moves it
        smallest = np.full(len(leaders), np.iinfo(np.uint64).max, dtype=np.uint64)
        np.minimum.at(smallest, member, hashes)
        there = set(published.tolist()) if keep_published else set()
        drawn = draw(smallest, _shares_left(shares, there), seed)[member]
        split = np.where(published == 0, drawn, published).astype(np.uint8) if keep_published else drawn
        return Assignment(split, len(leaders), len(np.unique(hashes)), _straddling(member, split))


def _shares_left(shares: Sequence[float], there: set[int]) -> tuple[float, float, float]:
    """The shares of what is drawn: a split that was published takes nothing from train."""
    validation, test = (0.0 if i in there else shares[i] for i in (1, 2))
    return 1.0 - validation - test, validation, test


def draw(keys: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """A split for each key, (n,) uint8: always the same for the same key, shares and seed."""
    salt = np.uint64(int.from_bytes(hashlib.blake2b(f"split {seed}".encode(), digest_size=8).digest(), "little"))
    x = keys ^ salt
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    uniform = (x ^ (x >> np.uint64(31))).astype(np.float64) / 2.0**64
    return np.searchsorted(np.cumsum(shares)[:2], uniform, side="right").astype(np.uint8)


def _straddling(member: np.ndarray, split: np.ndarray) -> tuple[int, int]:
    pairs = np.unique(np.stack([member, split.astype(np.int64)]), axis=1)
    several = np.flatnonzero(np.bincount(pairs[0]) > 1)
    return len(several), int(np.isin(member, several).sum())
