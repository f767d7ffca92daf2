"""Splits by prompt: rows with the same or nearly the same prompt go to one side, regardless of the file's order."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from penchant.base.text import counted
from penchant.data.audit.near import NearIndex, normalize, text_hash
from penchant.data.load import Dataset, first_text, prompt_text
from penchant.errors import DataError
from penchant.types import PromptTree

SPLITS = ("train", "validation", "test")


def prompt_key(prompt: object, text: str = "") -> str:
    """The key by which prompts count as the same: ignores case and white space; plain texts are keyed by themselves."""
    content = prompt_text(prompt) or text  # type: ignore[arg-type]
    return normalize(content)


def split_by_prompt(dataset: Dataset, **how: Any) -> tuple[Dataset, Dataset]:
    """(train, validation) without a prompt in both; arguments and errors as for `held_out_rows`."""
    held_out = held_out_rows(dataset, **how)
    train = np.setdiff1d(np.arange(len(dataset.trees)), held_out)
    return dataset.subset(train.tolist()), dataset.subset(held_out.tolist())


DIGEST = 16  # bytes


def prompt_digests(trees: Iterable[PromptTree], seed: int) -> bytes:
    """`DIGEST` bytes per row, equal for rows of one prompt; prompts are drawn in the order of their digests."""
    keys = (prompt_key(t.prompt, first_text(t)) for t in trees)
    return b"".join(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=DIGEST).digest() for key in keys)


def held_out_rows(
    dataset: Dataset,
    *,
    validation_rows: int | None = None,
    validation_fraction: float | None = None,
    seed: int = 0,
    digests: Callable[[Sequence[PromptTree], int], bytes] = prompt_digests,
) -> np.ndarray:
    """Draw the rows to hold out, (n,) int64, ascending: all rows of a prompt or none.

    Args:
        validation_rows: rows to hold out (fewer if the prompts drawn do not fill it exactly);
            validation_fraction: the same as a share.
        seed: of the order in which prompts are drawn. digests: computes the rows' digests, which are all that is held in memory.

    Raises:
        DataError: too few rows or prompts to leave something on both sides.
    """
    rows = len(dataset.trees)
    wanted = validation_rows if validation_rows is not None else round((validation_fraction or 0.0) * rows)
    if not 0 < wanted < rows:
        key = "validation_rows" if validation_rows is not None else "validation_fraction"
        setting = validation_rows if validation_rows is not None else f"{validation_fraction:g}"
        raise DataError(
            f"data.{key}",
            f"{setting} of {counted(rows, 'row')} would hold out {wanted}",
            f"leave at least one row on both sides (data.{key}={'N' if key.endswith('rows') else '0.1'}), or set data.{key}=null",
        )
    row_digests = np.frombuffer(digests(dataset.trees, seed), ">u8").reshape(rows, DIGEST // 8)
    order = np.lexsort(row_digests.T[::-1])  # by digest; rows of one prompt stay in the order of the file
    row_digests = row_digests[order]
    starts = np.flatnonzero(np.r_[True, (row_digests[1:] != row_digests[:-1]).any(axis=1)])
    sizes = np.diff(np.r_[starts, rows])
    held_out, room = [np.empty(0, np.int64)], wanted
    for start, size in zip(starts, sizes, strict=True):
        if size <= room:
            held_out.append(order[start : start + size])
            room -= size
            if not room:
                break
    if room == wanted:
        raise DataError(
            f"data.{'validation_rows' if validation_rows is not None else 'validation_fraction'}",
            f"the {len(starts)} prompt(s) have more rows each than the {wanted} that are to be held out, and prompts stay whole",
            "hold out more rows, give data.eval_path, or leave both out (data.validation_fraction=null)",
        )
    return np.sort(np.concatenate(held_out))


# ---- Groups of nearly equal prompts ----


_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True, slots=True)
class Assignment:
    """The split that each row goes to.

    Args:
        split: (n,) uint8, an index into SPLITS.
        groups: number of groups of nearly equal prompts; prompts: number of prompts that differ in more than case and white space.
        straddling: (groups, rows) of groups in several splits.
    """

    split: np.ndarray
    groups: int
    prompts: int
    straddling: tuple[int, int]


class Splitter:
    """Collects the prompts of all rows in one pass, then assigns splits; about 110 bytes a row in memory, twice that on disk."""

    def __init__(self) -> None:
        self._near = NearIndex()
        self._hashes = array("Q")
        self._published = array("B")

    def add(self, rows: Iterable[tuple[str, str]]) -> None:
        """Add (prompt text, published split) of more rows."""
        for text, published in rows:
            self._near.add([text])
            self._hashes.append(text_hash(prompt_key(text)))
            self._published.append(SPLITS.index(published))

    def __len__(self) -> int:
        return len(self._hashes)

    def merge(self, other: Splitter) -> None:
        """Append the rows of another splitter."""
        self._near.merge(other._near)
        self._hashes.extend(other._hashes)
        self._published.extend(other._published)

    def assign(self, shares: Sequence[float], seed: int, *, keep_published: bool = False) -> Assignment:
        """Assign a split to each row.

        Args:
            shares: of train, validation and test; keep_published: rows stay in their published split, and only a split that was not
                published is drawn, from train.
        """
        published, hashes = np.array(self._published), np.array(self._hashes)
        groups = self._near.groups()
        if not len(groups):
            return Assignment(published, 0, 0, (0, 0))
        leaders, group_of_row = np.unique(groups, return_inverse=True)
        # a group is drawn by its smallest hash, so that its split depends neither on the order nor on the number of rows
        smallest = np.full(len(leaders), np.iinfo(np.uint64).max, dtype=np.uint64)
        np.minimum.at(smallest, group_of_row, hashes)
        existing = published if keep_published else ()  # a split that was published takes nothing from train
        validation, test = (0.0 if i in existing else shares[i] for i in (1, 2))
        drawn = draw(smallest, (1.0 - validation - test, validation, test), seed)[group_of_row]
        split = np.where(published == 0, drawn, published).astype(np.uint8) if keep_published else drawn
        pairs = np.unique(np.stack([group_of_row, split.astype(np.int64)]), axis=1)
        in_several = np.flatnonzero(np.bincount(pairs[0]) > 1)
        straddling = len(in_several), int(np.isin(group_of_row, in_several).sum())
        return Assignment(split, len(leaders), len(np.unique(hashes)), straddling)


def draw(keys: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """A split for each key, (n,) uint8: always the same for the same key, shares and seed."""
    salt = np.uint64(int.from_bytes(hashlib.blake2b(f"split {seed}".encode(), digest_size=8).digest(), "little"))
    x = keys ^ salt
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    uniform = (x ^ (x >> np.uint64(31))).astype(np.float64) / 2.0**64
    return np.searchsorted(np.cumsum(shares)[:2], uniform, side="right").astype(np.uint8)
