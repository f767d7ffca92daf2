"""Rows and token trees in flat files that are mapped into memory: opened at once whatever their size, made when asked for."""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from penchant.types import Completion, Message, PromptTree, TokenTree

NO_LABEL = -1  # stands for None


class StoredRows(Sequence[PromptTree]):
    """Prompt trees of a folder that `write_rows` made, or some of them; read like a tuple.

    Args:
        key: names the content, for what is derived from it.
    """

    def __init__(self, folder: Path, key: str, which: np.ndarray | None = None) -> None:
        self.folder, self.key = folder, key
        self._bytes = _mapped(folder / "rows.bin", np.uint8)
        self._ends = np.load(folder / "rows.ends.npy", mmap_mode="r")
        self._which = which

    def __len__(self) -> int:
        return len(self._ends) if self._which is None else len(self._which)

    def take(self, which: np.ndarray, key: str) -> StoredRows:
        """Some of the rows, by their place in the whole file."""
        return StoredRows(self.folder, key, which)

    @overload
    def __getitem__(self, at: int) -> PromptTree: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[PromptTree, ...]: ...
    def __getitem__(self, at: int | slice) -> PromptTree | tuple[PromptTree, ...]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        row = range(len(self))[at] if self._which is None else int(self._which[at])
        start = int(self._ends[row - 1]) if row else 0
        return _tree_of(json.loads(self._bytes[start : int(self._ends[row])].tobytes()))

    def __iter__(self) -> Iterator[PromptTree]:
        return (self[i] for i in range(len(self)))


def _tree_of(stored: Any) -> PromptTree:
    prompt, completions, source = stored
    shown = prompt if isinstance(prompt, str) else tuple(Message(role, content) for role, content in prompt)
    return PromptTree(shown, tuple(Completion(text, label, score) for text, label, score in completions), source)


def write_rows(folder: Path, trees: Iterable[PromptTree]) -> None:
    """Write prompt trees for `StoredRows`."""
    ends, total = array("q"), 0
    with (folder / "rows.bin").open("wb") as out:
        for t in trees:
            prompt = t.prompt if isinstance(t.prompt, str) else [[m.role, m.content] for m in t.prompt]
            row = [prompt, [[c.text, c.label, c.score] for c in t.completions], t.source]
            line = json.dumps(row, ensure_ascii=True, separators=(",", ":")).encode()
            total += out.write(line)
            ends.append(total)
    np.save(folder / "rows.ends.npy", np.array(ends, dtype=np.int64))


class StoredTokens(Sequence[TokenTree]):
    """Token trees of a folder that `TokenWriter` made; each is made when it is asked for, its ids are parts of the mapped file.

    Args:
        first: number of the first row.
    """

    def __init__(self, folder: Path, first: int = 0) -> None:
        self.folder, self.first = folder, first
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
        return len(self._parts)

    @overload
    def __getitem__(self, at: int) -> TokenTree: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[TokenTree, ...]: ...
    def __getitem__(self, at: int | slice) -> TokenTree | tuple[TokenTree, ...]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        row = range(len(self))[at]
        start, end = int(self._part_start[row]), int(self._part_start[row + 1])
        bounds = self._id_start[start : end + 1].tolist()
        parts = [np.asarray(self._ids[a:b]) for a, b in itertools.pairwise(bounds)]
        one, many = start - row, end - row - 1  # of completions: one part of each tree is its prompt
        from_ = int(self._source_ends[row - 1]) if row else 0
        return TokenTree(
            self.first + row,
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
        return StoredTokens(self.folder, first)

    @property
    def total(self) -> int:
        """Tokens of all trees, prompts counted once."""
        return int(self._id_start[-1])


class TokenWriter:
    """Writes token trees one by one for `StoredTokens`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ids: BinaryIO = (folder / "ids.bin").open("wb")
        self._sources: BinaryIO = (folder / "sources.bin").open("wb")
        self._lengths, self._parts, self._truncated = array("i"), array("i"), array("b")
        self._labels, self._scores, self._ends = array("b"), array("d"), array("q")
        self._at = 0

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
        ):
            np.save(self.folder / f"{name}.npy", np.array(values, dtype=kind))


def _mapped(path: Path, kind: Any) -> np.ndarray:
    """A file as an array that is read when it is looked at; an empty file cannot be mapped."""
    return np.memmap(path, dtype=kind, mode="r") if path.stat().st_size else np.empty(0, kind)
