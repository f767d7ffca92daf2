"""Rows and token trees in flat files that are mapped into memory: opened at once whatever their size, made when asked for."""

from __future__ import annotations

import copy
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from penchant.types import Completion, Message, PromptTree, TokenTree

NO_LABEL = -1  # stands for None


class StoredRows(Sequence[PromptTree]):
    """Prompt trees of a folder that `write_rows` made, or some of them; read like a tuple.

    Args:
        key: names the content, for what is derived from it; whole: the same of all rows of the folder.
        which: (n,) int64, ascending: some of the rows; None: all.
    """

    def __init__(self, folder: Path, key: str, which: np.ndarray | None = None, whole: str | None = None) -> None:
        self.folder, self.key, self.whole, self.which = folder, key, whole or key, which
        self._bytes = _mapped(folder / "rows.bin", np.uint8)
        self._ends = np.load(folder / "rows.ends.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._ends) if self.which is None else len(self.which)

    def take(self, which: np.ndarray, key: str) -> StoredRows:
        """Some of the rows, by their place in the whole file."""
        return StoredRows(self.folder, key, which, self.whole)

    def all_rows(self) -> StoredRows:
        """Every row of the folder."""
        return StoredRows(self.folder, self.whole)

    def label_counts(self) -> tuple[int, int]:
        """(good, bad) answers of all rows of the folder."""
        good, bad = np.load(self.folder / "labels.npy").tolist()
        return good, bad

    @overload
    def __getitem__(self, at: int) -> PromptTree: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[PromptTree, ...]: ...
    def __getitem__(self, at: int | slice) -> PromptTree | tuple[PromptTree, ...]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        row = range(len(self))[at] if self.which is None else int(self.which[at])
        start = int(self._ends[row - 1]) if row else 0
        return _tree_of(json.loads(self._bytes[start : int(self._ends[row])].tobytes()))

    def __iter__(self) -> Iterator[PromptTree]:
        return (self[i] for i in range(len(self)))


def label_counts(trees: Sequence[PromptTree]) -> tuple[int, int]:
    """(good, bad) answers."""
    if isinstance(trees, StoredRows) and trees.which is None:
        return trees.label_counts()
    labels = Counter(c.label for t in trees for c in t.completions)
    return labels[True], labels[False]


def _tree_of(stored: Any) -> PromptTree:
    prompt, completions, source = stored
    shown = prompt if isinstance(prompt, str) else tuple(Message(role, content) for role, content in prompt)
    return PromptTree(shown, tuple(Completion(text, label, score) for text, label, score in completions), source)


def write_rows(folder: Path, trees: Iterable[PromptTree]) -> None:
    """Write prompt trees for `StoredRows`."""
    ends, total = array("q"), 0
    labels: Counter[bool | None] = Counter()
    with (folder / "rows.bin").open("wb") as out:
        for t in trees:
            prompt = t.prompt if isinstance(t.prompt, str) else [[m.role, m.content] for m in t.prompt]
            row = [prompt, [[c.text, c.label, c.score] for c in t.completions], t.source]
            line = json.dumps(row, ensure_ascii=True, separators=(",", ":")).encode()
            total += out.write(line)
            ends.append(total)
            labels.update(c.label for c in t.completions)
    np.save(folder / "labels.npy", np.array([labels[True], labels[False]], dtype=np.int64))
    np.save(folder / "rows.ends.npy", np.array(ends, dtype=np.int64))


class StoredTokens(Sequence[TokenTree]):
    """Token trees of a folder that `TokenWriter` made; each is made when it is asked for, its ids are parts of the mapped file.

    `numbered_from`, `take` and `first_completions` give other views of the same files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.first = 0  # number of the first row
        self.which: np.ndarray | None = None  # (n,) int64: some of the trees
        self._few = False  # whether only the first completion of each tree is there
        self._ids = _mapped(folder / "ids.bin", np.int32)
        self._sources = _mapped(folder / "sources.bin", np.uint8)
        names = ("part_lengths", "parts", "truncated", "labels", "scores")
        self._lengths, self._parts, self._truncated, self._labels, self._scores = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in names
        )
        self._source_ends = np.load(folder / "sources.ends.npy", mmap_mode="r")
        self._part_start = np.r_[0, np.cumsum(self._parts, dtype=np.int64)]
        self._id_start = np.r_[0, np.cumsum(self._lengths, dtype=np.int64)]

    def __len__(self) -> int:
        return len(self._parts) if self.which is None else len(self.which)

    @overload
    def __getitem__(self, at: int) -> TokenTree: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[TokenTree, ...]: ...
    def __getitem__(self, at: int | slice) -> TokenTree | tuple[TokenTree, ...]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        number = range(len(self))[at]
        row = number if self.which is None else int(self.which[number])
        start, end = int(self._part_start[row]), int(self._part_start[row + 1])
        one = start - row  # of completions: one part of each tree is its prompt
        if self._few:
            end = min(end, start + 2)
        many = one + end - start - 1
        bounds = self._id_start[start : end + 1].tolist()
        parts = [np.asarray(self._ids[a:b]) for a, b in itertools.pairwise(bounds)]
        from_ = int(self._source_ends[row - 1]) if row else 0
        return TokenTree(
            self.first + number,
            parts[0],
            tuple(parts[1:]),
            tuple(bool(t) for t in self._truncated[one:many].tolist()),
            self._sources[from_ : int(self._source_ends[row])].tobytes().decode("utf-8", "surrogatepass"),
            tuple(None if v == NO_LABEL else bool(v) for v in self._labels[one:many].tolist()),
            tuple(None if v != v else v for v in self._scores[one:many].tolist()),
        )

    def __iter__(self) -> Iterator[TokenTree]:
        return (self[i] for i in range(len(self)))

    def numbered_from(self, first: int) -> StoredTokens:
        """The same trees with other row numbers."""
        other = copy.copy(self)
        other.first = first
        return other

    def take(self, which: np.ndarray) -> StoredTokens:
        """Some of the trees, by their place among these."""
        other = copy.copy(self)
        other.which = which if self.which is None else self.which[which]
        return other

    def first_completions(self) -> StoredTokens:
        """The same trees with the first completion only."""
        other = copy.copy(self)
        other._few = True
        return other

    def part_counts(self, start: int = 0, end: int | None = None) -> np.ndarray:
        """(n,) int64: parts of each tree from `start` to `end`, its prompt and its completions."""
        part = slice(start, end)
        counts = np.asarray(self._parts[part if self.which is None else self.which[part]], dtype=np.int64)
        return np.minimum(counts, 2) if self._few else counts

    def part_lengths(self, start: int = 0, end: int | None = None) -> np.ndarray:
        """(parts,) int64: tokens of each part of the trees from `start` to `end`, tree after tree."""
        at, counts = self._places(start, end)
        return self._lengths[ranges(self._part_start[at], counts)].astype(np.int64)

    def part_ids(self, start: int = 0, end: int | None = None) -> np.ndarray:
        """(tokens,) int32: the ids of all those parts."""
        at, counts = self._places(start, end)
        parts = ranges(self._part_start[at], counts)
        return self._ids[ranges(self._id_start[parts], self._lengths[parts])]

    def _places(self, start: int, end: int | None) -> tuple[np.ndarray, np.ndarray]:
        end = len(self) if end is None else end
        return np.arange(start, end) if self.which is None else self.which[start:end], self.part_counts(start, end)

    @property
    def total(self) -> int:
        """Tokens of all trees, prompts counted once."""
        return int(self._id_start[-1]) if self.which is None and not self._few else int(self.part_lengths().sum())


def first_completions(trees: Sequence[TokenTree]) -> Sequence[TokenTree]:
    """Trees with their first completion only."""
    if isinstance(trees, StoredTokens):
        return trees.first_completions()
    return [
        replace(
            t,
            completion_ids=t.completion_ids[:1],
            truncated=t.truncated[:1],
            labels=t.labels[:1],
            scores=t.scores[:1],
        )
        for t in trees
    ]


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(sum of counts,) int64: ``starts[i], starts[i] + 1, ...``, `counts[i]` numbers each, one after the other."""
    ends = np.cumsum(counts, dtype=np.int64)
    return np.repeat(starts - ends + counts, counts) + np.arange(ends[-1] if len(ends) else 0)


class TokenWriter:
    """Writes token trees one by one for `StoredTokens`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ids: BinaryIO = (folder / "ids.bin").open("wb")
        self._sources: BinaryIO = (folder / "sources.bin").open("wb")
        self._lengths, self._parts, self._truncated = array("i"), array("i"), array("b")
        self._labels, self._scores, self._ends = array("b"), array("d"), array("q")
        self._of_row, self._marks = array("i"), array("B")
        self._at = 0

    def end_row(self, trees: int, mark: int) -> None:
        """A row is done: it gave so many trees; `mark` says what happened to it."""
        self._of_row.append(trees)
        self._marks.append(mark)

    def write(self, tree: TokenTree) -> None:
        """One tree; it has a label and a score, or None, for each completion."""
        parts = (tree.prompt_ids, *tree.completion_ids)
        for ids in parts:
            self._ids.write(np.ascontiguousarray(ids, dtype="<i4").tobytes())
            self._lengths.append(len(ids))
        self._parts.append(len(parts))
        self._truncated.extend(tree.truncated)
        self._labels.extend(NO_LABEL if label is None else int(label) for label in tree.labels)
        self._scores.extend(float("nan") if score is None else score for score in tree.scores)
        self._at += self._sources.write(tree.source.encode("utf-8", "surrogatepass"))
        self._ends.append(self._at)

    def close(self) -> None:
        """Write what is left."""
        self._ids.close()
        self._sources.close()
        for name, values, kind in (
            ("part_lengths", self._lengths, np.int32),
            ("parts", self._parts, np.int32),
            ("truncated", self._truncated, np.int8),
            ("labels", self._labels, np.int8),
            ("scores", self._scores, np.float64),
            ("sources.ends", self._ends, np.int64),
            ("row_trees", self._of_row, np.int32),
            ("row_marks", self._marks, np.uint8),
        ):
            np.save(self.folder / f"{name}.npy", np.array(values, dtype=kind))


def _mapped(path: Path, kind: Any) -> np.ndarray:
    """A file as an array that is read when it is looked at; an empty file cannot be mapped."""
    return np.memmap(path, dtype=kind, mode="r") if path.stat().st_size else np.empty(0, kind)
