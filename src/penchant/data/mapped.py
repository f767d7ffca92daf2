"""Rows and token trees in memory-mapped Arrow IPC files, which open instantly at any size and build items on access.

Each file holds one record batch, so that every column is one contiguous array that numpy reads in place.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from penchant.data.load import plain_content
from penchant.types import Completion, Message, PromptTree, TokenTree

NO_LABEL = -1  # stands for None
EXTRAS = {"weight": 1.0, "origin": 0.0}  # defaults per tree; written to a file if any tree differs
# defaults of a row's values after its source: columns, tools, options, weight, origin
FURTHER: tuple[Any, ...] = ({}, "", "", 1.0, 0)
MASKS = "masks.npy"  # exists if some completion tokens are not trained on


class StoredRows(Sequence[PromptTree]):
    """Prompt trees of a folder that `RowWriter` wrote, or some of them, as a sequence.

    Args:
        key: identifies the content, for entries derived from it; whole: the same for all rows of the folder.
        which: (n,) int64, ascending: indices of the rows; None: all.
    """

    def __init__(self, folder: Path, key: str, which: np.ndarray | None = None, whole: str | None = None) -> None:
        self.folder, self.key, self.whole, self.which = folder, key, whole or key, which
        batch = read_batch(folder / "rows.arrow")
        self._good, self._bad = (batch.column(name).to_numpy() for name in ("good", "bad"))
        self._trees = batch.column("tree")

    def __len__(self) -> int:
        return len(self._good) if self.which is None else len(self.which)

    def take(self, indices: np.ndarray, key: str) -> StoredRows:
        """Some of the rows, by index in the whole file."""
        return StoredRows(self.folder, key, indices, self.whole)

    def all_rows(self) -> StoredRows:
        """Every row of the folder."""
        return StoredRows(self.folder, self.whole)

    @overload
    def __getitem__(self, index: int) -> PromptTree: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[PromptTree, ...]: ...
    def __getitem__(self, index: int | slice) -> PromptTree | tuple[PromptTree, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        row = range(len(self))[index] if self.which is None else int(self.which[index])
        values: list[Any] = json.loads(self._trees[row].as_py())
        prompt, completions, source, *further = values
        parsed_prompt = prompt if isinstance(prompt, str) else tuple(Message(*m) for m in prompt)
        parsed_completions = tuple(
            Completion(text, label, score, tuple(Message(*m) for turns in more[:1] for m in turns), *more[1:])
            for text, label, score, *more in completions
        )
        columns, tools, options, weight, origin = (*further, *FURTHER[len(further) :])
        return PromptTree(parsed_prompt, parsed_completions, source, columns, origin, tools, options, weight)

    def __iter__(self) -> Iterator[PromptTree]:
        return (self[i] for i in range(len(self)))


PART = 16_384  # rows per task of a worker process


@dataclass(frozen=True, slots=True)
class RowsPart:
    """Some rows of a folder, for another process to open."""

    folder: Path
    start: int
    end: int
    which: np.ndarray | None

    def open(self) -> StoredRows:
        """The rows themselves."""
        indices = np.arange(self.start, self.end) if self.which is None else self.which
        return StoredRows(self.folder, "", indices)


def parts_of(rows: StoredRows) -> Iterator[RowsPart]:
    """Rows in order, `PART` at a time."""
    for start in range(0, len(rows), PART):
        end = min(start + PART, len(rows))
        yield RowsPart(rows.folder, start, end, None if rows.which is None else rows.which[start:end])


def label_counts(trees: Sequence[PromptTree]) -> tuple[int, int]:
    """Number of (good, bad) answers."""
    if isinstance(trees, StoredRows) and trees.which is None:
        return int(trees._good.sum()), int(trees._bad.sum())
    labels = Counter(c.label for t in trees for c in t.completions)
    return labels[True], labels[False]


class RowWriter:
    """Writes prompt trees for `StoredRows`; until `close` they are buffered on disk, or in memory if there is no folder."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self._spill = folder, _spill(folder)
        self._ends, self._good, self._bad = array("q", [0]), array("i"), array("i")

    def write(self, trees: Iterable[PromptTree]) -> None:
        """Add trees.

        Raises:
            TypeError: a column holds something that is not JSON.
        """
        for tree in trees:
            further = [tree.columns, tree.tools, tree.template_options, tree.weight, tree.origin]
            needed = next((i for i in range(5, 0, -1) if further[i - 1] != FURTHER[i - 1]), 0)
            row = [*plain_content(tree), tree.source, *further[:needed]]
            self._ends.append(self._ends[-1] + self._spill.write(json.dumps(row, separators=(",", ":")).encode()))
            self._good.append(sum(c.label is True for c in tree.completions))
            self._bad.append(sum(c.label is False for c in tree.completions))

    def merge(self, other: RowWriter) -> None:
        """Append the rows of another writer, which must be in memory."""
        _append_spill(self._spill, other._spill)
        _append_ends(self._ends, other._ends)
        self._good.extend(other._good)
        self._bad.extend(other._bad)

    def close(self) -> None:
        """Write the file."""
        assert self.folder is not None
        columns = {"good": np.array(self._good), "bad": np.array(self._bad)}
        write_batch(self.folder / "rows.arrow", tree=_binary_array(self._ends, self._spill), **columns)
        self._spill.close()


class StoredTokens(Sequence[TokenTree]):
    """Token trees of a folder that `TokenWriter` wrote, each built on access with ids that are slices of the mapped file.

    `numbered_from`, `take` and `first_completions` give other views of the same files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.first = 0  # number of the first row
        self.which: np.ndarray | None = None  # (n,) int64: indices of the trees; None: all
        self._first_only = False  # whether each tree has only its first completion
        batch = read_batch(folder / "tokens.arrow")
        self._per_completion = {
            name: batch.column(name).values.to_numpy() for name in ("truncated", "labels", "scores")
        }
        self._sources = batch.column("source")
        parts = batch.column("parts")  # of each tree: the ids of its prompt and of its completions
        self._part_start, self._id_start = parts.offsets.to_numpy(), parts.values.offsets.to_numpy()
        self._ids = parts.values.values.to_numpy()
        self._masks = np.load(folder / MASKS, mmap_mode="r") if (folder / MASKS).exists() else None  # of every id
        self._extras = {
            name: np.load(path, mmap_mode="r") for name in EXTRAS if (path := folder / f"{name}.npy").exists()
        }

    def __len__(self) -> int:
        return len(self._part_start) - 1 if self.which is None else len(self.which)

    @overload
    def __getitem__(self, index: int) -> TokenTree: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TokenTree, ...]: ...
    def __getitem__(self, index: int | slice) -> TokenTree | tuple[TokenTree, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        number = range(len(self))[index]
        row = number if self.which is None else int(self.which[number])
        start, end = int(self._part_start[row]), int(self._part_start[row + 1])
        end = min(end, start + 2) if self._first_only else end
        before = start - row  # completions of the trees before it, each of which has one prompt
        bounds = self._id_start[start : end + 1].tolist()
        prompt, *completions = (np.asarray(self._ids[a:b]) for a, b in itertools.pairwise(bounds))
        masks: Iterable[np.ndarray] = (
            () if self._masks is None else (self._masks[a:b] for a, b in itertools.pairwise(bounds[1:]))
        )
        completion_slice = slice(before, before + end - start - 1)
        truncated, labels, scores = (values[completion_slice].tolist() for values in self._per_completion.values())
        return TokenTree(
            self.first + number,
            prompt,
            tuple(completions),
            tuple(map(bool, truncated)),
            self._sources[row].as_py().decode("utf-8", "surrogatepass"),
            tuple(None if v == NO_LABEL else bool(v) for v in labels),
            tuple(None if v != v else v for v in scores),
            tuple(map(np.asarray, masks)),
            origin=int(self._extras["origin"][row]) if "origin" in self._extras else 0,
            weight=float(self._extras["weight"][row]) if "weight" in self._extras else 1.0,
        )

    def extra(self, name: str) -> np.ndarray:
        """(trees,) float64: ``weight`` or ``origin`` of each tree."""
        if name not in self._extras:
            return np.full(len(self), EXTRAS[name])
        values: np.ndarray = self._extras[name][self._rows(0, None)]
        return values

    @property
    def masked(self) -> bool:
        """Whether some completion tokens are not trained on."""
        return self._masks is not None

    def __iter__(self) -> Iterator[TokenTree]:
        return (self[i] for i in range(len(self)))

    def numbered_from(self, first: int) -> StoredTokens:
        """The same trees with other row numbers."""
        return self._view(first=first)

    def take(self, indices: np.ndarray) -> StoredTokens:
        """Some of the trees, by index among these."""
        return self._view(which=indices if self.which is None else self.which[indices])

    def first_completions(self) -> StoredTokens:
        """The same trees with the first completion only."""
        return self._view(_first_only=True)

    def _view(self, **changed: Any) -> StoredTokens:
        view = copy.copy(self)
        vars(view).update(changed)
        return view

    def part_counts(self, start: int = 0, end: int | None = None) -> np.ndarray:
        """(n,) int64: parts of each tree from `start` to `end`, its prompt and its completions."""
        rows = self._rows(start, end)
        counts = self._part_start[rows + 1] - self._part_start[rows]
        return np.minimum(counts, 2) if self._first_only else counts

    def part_lengths(self, start: int = 0, end: int | None = None) -> np.ndarray:
        """(parts,) int64: tokens of each part of the trees from `start` to `end`, tree after tree."""
        parts = self._parts(start, end)
        return self._id_start[parts + 1] - self._id_start[parts]

    def part_ids(self, start: int = 0, end: int | None = None) -> np.ndarray:
        """(tokens,) int32: the ids of all parts of the trees from `start` to `end`."""
        parts = self._parts(start, end)
        return self._ids[ranges(self._id_start[parts], self.part_lengths(start, end))]

    def _rows(self, start: int, end: int | None) -> np.ndarray:
        end = len(self) if end is None else min(end, len(self))
        return np.arange(start, end) if self.which is None else self.which[start:end]

    def _parts(self, start: int, end: int | None) -> np.ndarray:
        return ranges(self._part_start[self._rows(start, end)], self.part_counts(start, end))

    @property
    def total(self) -> int:
        """Tokens of all trees, prompts counted once."""
        return (
            int(self._id_start[-1]) if self.which is None and not self._first_only else int(self.part_lengths().sum())
        )


def part_lengths(trees: Sequence[TokenTree]) -> tuple[np.ndarray, np.ndarray]:
    """(trees,) int64: parts of each tree, its prompt and its completions; (parts,) int64: tokens of each part, tree after tree."""
    if isinstance(trees, StoredTokens):
        return trees.part_counts(), trees.part_lengths()
    sizes = [[len(t.prompt_ids), *map(len, t.completion_ids)] for t in trees]
    counts, lengths = map(len, sizes), itertools.chain.from_iterable(sizes)
    return np.array(list(counts), np.int64), np.array(list(lengths), np.int64)


def extra_of(trees: Sequence[TokenTree], name: str) -> np.ndarray:
    """(trees,) float64: ``weight`` or ``origin`` of each tree."""
    return trees.extra(name) if isinstance(trees, StoredTokens) else np.array([float(getattr(t, name)) for t in trees])


def row_weights(trees: Sequence[TokenTree]) -> np.ndarray | None:
    """(trees,) weight of each row in a loss; None if all are 1."""
    weights = extra_of(trees, "weight")
    return None if (weights == 1.0).all() else weights


def first_completions(trees: Sequence[TokenTree]) -> Sequence[TokenTree]:
    """Trees with their first completion only."""
    if isinstance(trees, StoredTokens):
        return trees.first_completions()
    fields = ("completion_ids", "truncated", "labels", "scores", "masks")  # one entry per completion
    return [replace(t, **{name: getattr(t, name)[:1] for name in fields}) for t in trees]


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(sum of counts,) int64: ``starts[i], starts[i] + 1, ...``, `counts[i]` numbers each, one after the other."""
    ends = np.cumsum(counts, dtype=np.int64)
    return np.repeat(starts - ends + counts, counts) + np.arange(ends[-1] if len(ends) else 0)


class TokenWriter:
    """Writes token trees for `StoredTokens`; until `close` they are buffered on disk, or in memory if there is no folder."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._ids, self._sources, self._masks = (_spill(folder) for _ in range(3))
        self._masked = False
        self._part_start, self._id_start, self._source_ends = (array("q", [0]) for _ in range(3))
        self._truncated, self._labels, self._scores = array("b"), array("b"), array("d")
        self._of_row, self._marks = array("i"), array("B")
        self._extras = {name: array("d") for name in EXTRAS}

    def end_row(self, trees: int, mark: int) -> None:
        """End a row that gave this many trees; `mark` is what happened to it, see `Mark`."""
        self._of_row.append(trees)
        self._marks.append(mark)

    def write(self, tree: TokenTree) -> None:
        """Add one tree, which has a label and a score, or None, for each completion."""
        parts = (tree.prompt_ids, *tree.completion_ids)
        if tree.masks and not self._masked:
            self._masks.write(b"\1" * self._id_start[-1])  # for the trees before it
            self._masked = True
        for ids in parts:
            self._ids.write(np.ascontiguousarray(ids, dtype="<i4").tobytes())
            self._id_start.append(self._id_start[-1] + len(ids))
        if self._masked:
            full_masks = [np.ones(len(ids), dtype=bool) for ids in parts]
            self._masks.write(np.concatenate([full_masks[0], *(tree.masks or full_masks[1:])]).tobytes())
        self._part_start.append(self._part_start[-1] + len(parts))
        self._truncated.extend(tree.truncated)
        self._labels.extend(NO_LABEL if label is None else int(label) for label in tree.labels)
        self._scores.extend(float("nan") if score is None else score for score in tree.scores)
        for name, values in self._extras.items():
            values.append(getattr(tree, name))
        source = tree.source.encode("utf-8", "surrogatepass")
        self._source_ends.append(self._source_ends[-1] + self._sources.write(source))

    def merge(self, other: TokenWriter) -> None:
        """Append the rows of another writer, which must be in memory."""
        if self._masked or other._masked:
            for writer in (self, other):
                if not writer._masked:
                    writer._masks.write(b"\1" * writer._id_start[-1])
            self._masked = True
        for own_spill, other_spill in zip(self._spills, other._spills, strict=True):
            _append_spill(own_spill, other_spill)
        for name in ("_part_start", "_id_start", "_source_ends"):
            _append_ends(getattr(self, name), getattr(other, name))
        for name in ("_truncated", "_labels", "_scores", "_of_row", "_marks"):
            getattr(self, name).extend(getattr(other, name))
        for name, values in self._extras.items():
            values.extend(other._extras[name])

    @property
    def _spills(self) -> tuple[IO[bytes], ...]:
        return self._ids, self._sources, self._masks

    def close(self) -> None:
        """Write the files."""
        import pyarrow as pa

        assert self.folder is not None
        starts = np.array(self._part_start) - np.arange(len(self._part_start))  # without prompts
        ids = pa.Array.from_buffers(pa.int32(), self._id_start[-1], [None, _buffer(self._ids)])
        parts = pa.LargeListArray.from_arrays(np.array(self._id_start), ids)
        columns = {"truncated": self._truncated, "labels": self._labels, "scores": self._scores}
        write_batch(
            self.folder / "tokens.arrow",
            parts=pa.LargeListArray.from_arrays(np.array(self._part_start), parts),
            source=_binary_array(self._source_ends, self._sources),
            **{name: pa.LargeListArray.from_arrays(starts, np.array(values)) for name, values in columns.items()},
        )
        write_batch(self.folder / "made.arrow", trees=np.array(self._of_row), marks=np.array(self._marks))
        for name, values in self._extras.items():
            extras = np.array(values)
            if (extras != EXTRAS[name]).any():
                np.save(self.folder / f"{name}.npy", extras)
        if self._masked:
            self._masks.flush()
            np.save(self.folder / MASKS, np.memmap(self._masks, dtype=bool, mode="r"))  # type: ignore[call-overload]
        for spill in self._spills:
            spill.close()


# ---- Arrow files of one record batch ----


def write_batch(path: Path, **columns: Any) -> None:
    """Write an Arrow IPC file of one record batch; columns are Arrow or numpy arrays of one length."""
    import pyarrow as pa

    batch = pa.record_batch(list(columns.values()), names=list(columns))
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, batch.schema) as writer:
        writer.write_batch(batch)


def read_batch(path: Path) -> Any:
    """Memory-map the record batch of a file that `write_batch` wrote; nothing is read before it is accessed.

    Raises:
        ValueError: it is not such a file.
    """
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def _spill(folder: Path | None) -> IO[bytes]:
    return io.BytesIO() if folder is None else tempfile.TemporaryFile(dir=folder)


def _append_spill(spill: IO[bytes], other: IO[bytes]) -> None:
    """Append the content of another spill, which must be in memory."""
    spill.write(other.getvalue())  # type: ignore[attr-defined]


def _append_ends(ends: array[int], other: array[int]) -> None:
    """Append the end offsets of another writer's parts."""
    ends.frombytes((np.array(other)[1:] + ends[-1]).tobytes())


def _buffer(spill: IO[bytes]) -> Any:
    """A temporary file as a memory-mapped buffer; an empty file, which cannot be mapped, as an empty one."""
    import pyarrow as pa

    spill.flush()
    return pa.py_buffer(np.memmap(spill, dtype=np.uint8, mode="r") if spill.tell() else b"")  # type: ignore[call-overload]


def _binary_array(ends: array[int], spill: IO[bytes]) -> Any:
    import pyarrow as pa

    return pa.Array.from_buffers(pa.large_binary(), len(ends) - 1, [None, pa.py_buffer(np.array(ends)), _buffer(spill)])
