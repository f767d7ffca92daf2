"""Loading, splitting, tokenising and auditing with the cache: what was made once of the same content is opened, not made again."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from penchant.data.audit import audit
from penchant.data.cache import AUTO_BYTES, Entry, FileHashes, cache_root, key_of, tokenizer_key
from penchant.data.converters import Detection
from penchant.data.findings import Audit, Finding
from penchant.data.load import Dataset, Quarantined, Reading, fingerprint, load_preferences, stream_preferences
from penchant.data.order import Columns
from penchant.data.split import held_out_rows, split_by_prompt
from penchant.data.stored import StoredRows, StoredTokens, TokenWriter, ranges, write_rows
from penchant.data.tokenise import ASIDE, CUT_COMPLETION, CUT_PROMPT, SPLIT, TokenisedDataset, Tokenising, tokenise
from penchant.errors import DataError

T = TypeVar("T")


class NotStorable(Exception):
    """A row kept aside that is no JSON (bytes or dates of a Parquet file): such data is not cached."""


@dataclass(slots=True)
class DataCache:
    """The cache as one run uses it.

    Args:
        on: False makes everything anew and writes nothing; note: told once for each entry that was found or made.
    """

    on: bool = True
    note: Callable[[str], None] = lambda _: None
    _tokens: dict[Path, StoredDataset] = field(default_factory=dict)

    def load(self, path: str | Sequence[str], **reading: Any) -> Dataset:
        """`load_preferences`."""
        paths = [path] if isinstance(path, str) else [str(p) for p in path]
        files = [Path(p).expanduser() for p in paths]
        if not self.on or not all(f.is_file() for f in files) or sum(f.stat().st_size for f in files) < AUTO_BYTES:
            return load_preferences(path, **reading)
        contents = [(f.name, digest) for f, digest in zip(files, FileHashes().of(files), strict=True)]
        key = key_of("rows", {"files": contents, **reading})
        entry = Entry("rows", key)

        def write(folder: Path) -> Mapping[str, Any]:
            how = {k: v for k, v in reading.items() if k != "on_bad_row"}
            stream, going = stream_preferences(path, **how), Reading(reading.get("on_bad_row", "error"))
            write_rows(folder, going.trees(stream))
            return _described(going.result(StoredRows(folder, key), stream, ", ".join(paths)))

        def read(folder: Path, meta: Mapping[str, Any]) -> Dataset:
            aside = tuple(Quarantined(*q) for q in meta["quarantined"])
            said = meta["columns"]
            columns = Columns(said["first"], said["decided"], Counter(said["layouts"]), Counter(said["languages"]))
            rows = StoredRows(folder, key)
            found = meta["detection"]
            return Dataset(
                rows,
                meta["shape"],
                meta["kind"],
                meta["total"],
                aside,
                meta["fingerprint"],
                meta["accepted"],
                None if found is None else Detection(**{**found, "others": tuple(found["others"])}),
                columns,
            )

        return self._made(entry, "rows", write, read) or load_preferences(path, **reading)

    def split(self, dataset: Dataset, **how: Any) -> tuple[Dataset, Dataset]:
        """`split_by_prompt`."""
        rows = dataset.trees
        if not isinstance(rows, StoredRows):
            return split_by_prompt(dataset, **how)
        key = key_of("split", {"rows": rows.key, "kind": dataset.kind, **how})

        def write(folder: Path) -> Mapping[str, Any]:
            held = np.array(held_out_rows(dataset, **how), dtype=np.int64)
            kept = np.setdiff1d(np.arange(len(rows)), held)
            np.save(folder / "train.npy", kept)
            np.save(folder / "held.npy", held)
            return {name: fingerprint(rows.take(which, "")) for name, which in (("train", kept), ("held", held))}

        def read(folder: Path, meta: Mapping[str, Any]) -> tuple[Dataset, Dataset]:
            train, held = (
                self._subset(dataset, np.load(folder / f"{n}.npy"), meta[n], f"{key}/{n}") for n in ("train", "held")
            )
            return train, held

        return self._made(Entry("split", key), "split", write, read) or split_by_prompt(dataset, **how)

    @staticmethod
    def _subset(dataset: Dataset, which: np.ndarray, content: str, key: str) -> Dataset:
        assert isinstance(dataset.trees, StoredRows)
        trees = dataset.trees.take(which, key)
        rows = len(trees)
        return replace(
            dataset, trees=trees, total=rows, accepted=rows, quarantined=(), fingerprint=content, columns=None
        )

    def tokenise(self, dataset: Dataset, tokenizer: Any, **how: Any) -> TokenisedDataset:
        """`tokenise`. An entry is made with bad rows kept aside; where those are errors, the first one is raised afterwards."""
        rows, by = dataset.trees, tokenizer_key(tokenizer)
        if not isinstance(rows, StoredRows) or by is None or (how["add_eos"] and tokenizer.eos_token_id is None):
            return tokenise(dataset, tokenizer, **how)
        making_how = {**how, "on_bad_row": "skip"}
        depends_on = {"rows": rows.whole, "kind": dataset.kind, "tokenizer": by, **making_how}
        entry = Entry("tokens", key_of("tokens", depends_on))

        def write(folder: Path) -> Mapping[str, Any]:
            making, writer = Tokenising(tokenizer, dataset.kind, **making_how), TokenWriter(folder)
            whole = rows.all_rows()
            for trees, mark in making.by_row(whole):
                for tree in trees:
                    writer.write(tree)
                writer.end_row(len(trees), mark)
            writer.close()
            done = making.result((), len(whole))
            return {
                "quarantined": _storable(done.quarantined),
                "cut_prompts": done.cut_prompts,
                "cut_completions": done.cut_completions,
                "template": done.template,
            }

        found = self._tokens.get(entry.folder)
        if found is None:
            found = self._made(entry, "tokens", write, StoredDataset.read)
            if found is None:
                return tokenise(dataset, tokenizer, **how)
            self._tokens[entry.folder] = found
        made = found.rows(rows.which)
        if how["on_bad_row"] == "error" and made.quarantined:
            first = made.quarantined[0]
            raise DataError(first.where, first.what, f"{first.how} (or set data.on_bad_row=skip)")
        return made

    def audit(
        self,
        dataset: Dataset,
        tokenised: TokenisedDataset | None,
        splits: Mapping[str, Dataset],
        path: str | Sequence[str],
        *,
        languages: bool,
    ) -> Audit:
        """`audit`, without opinions."""
        rows = {"": dataset, **splits}
        tokens = None if tokenised is None else tokenised.trees
        stored = {n: d.trees.key for n, d in rows.items() if isinstance(d.trees, StoredRows)}
        known = tokens is None or (isinstance(tokens, StoredTokens) and tokens.which is None)
        if len(stored) < len(rows) or not known:
            return audit(dataset, tokenised, splits, path, languages=languages)
        by = tokens.folder.name if isinstance(tokens, StoredTokens) else None
        entry = Entry(
            "audit",
            key_of("audit", {"rows": stored, "kind": dataset.kind, "tokens": by, "path": path, "languages": languages}),
        )

        def write(folder: Path) -> Mapping[str, Any]:
            return asdict(audit(dataset, tokenised, splits, path, languages=languages))

        def read(folder: Path, meta: Mapping[str, Any]) -> Audit:
            found = {name: _finding(f) for name, f in meta["findings"].items()}
            return Audit(meta["summary"], found, meta["lengths"], meta["characters"], meta["layout"])

        return self._made(entry, "audit", write, read) or audit(dataset, tokenised, splits, path, languages=languages)

    def _made(
        self,
        entry: Entry,
        what: str,
        write: Callable[[Path], Mapping[str, Any]],
        read: Callable[[Path, Mapping[str, Any]], Any],
    ) -> Any:
        """The entry, made where it is not there yet; None where it cannot be kept."""
        found = entry.get(read)
        if found is not None:
            self.note(f"data cache: {what} read from {entry.folder}")
            return found
        try:
            kept = entry.put(write)
        except NotStorable:
            return None
        if not kept:
            self.note(f"data cache: {cache_root()} cannot be written; going on without")
            return None
        self.note(f"data cache: {what} kept in {entry.folder}")
        return entry.get(read)


@dataclass(frozen=True, slots=True)
class StoredDataset:
    """All tokens of an entry, and what happened to each of its rows: those of a split are told from it, not made again.

    Args:
        of_row: (rows,) int32: trees of each row; marks: (rows,) uint8: see `Tokenising.by_row`.
    """

    trees: StoredTokens
    of_row: np.ndarray
    marks: np.ndarray
    quarantined: tuple[Quarantined, ...]
    cut_prompts: tuple[str, ...]
    cut_completions: tuple[str, ...]
    template: str

    @staticmethod
    def read(folder: Path, meta: Mapping[str, Any]) -> StoredDataset:
        """Of an entry's folder."""
        return StoredDataset(
            StoredTokens(folder),
            np.load(folder / "row_trees.npy"),
            np.load(folder / "row_marks.npy"),
            tuple(Quarantined(*q) for q in meta["quarantined"]),
            tuple(meta["cut_prompts"]),
            tuple(meta["cut_completions"]),
            meta["template"],
        )

    def rows(self, which: np.ndarray | None) -> TokenisedDataset:
        """What `tokenise` makes of these rows (ascending), or of all."""
        trees, marks = self.trees, self.marks
        if which is not None:
            marks = self.marks[which]
            starts = np.cumsum(self.of_row, dtype=np.int64) - self.of_row
            trees = trees.take(ranges(starts[which], self.of_row[which]))
        return TokenisedDataset(
            trees,
            len(marks),
            self._told(self.quarantined, ASIDE, which),
            self._told(self.cut_prompts, CUT_PROMPT, which),
            self._told(self.cut_completions, CUT_COMPLETION, which),
            int(((marks & SPLIT) > 0).sum()),
            self.template,
        )

    def _told(self, what: tuple[T, ...], mark: int, which: np.ndarray | None) -> tuple[T, ...]:
        """What is told of some of the rows, of what is told of all that have this mark."""
        if which is None:
            return what
        kept = np.isin(np.flatnonzero(self.marks & mark), which, assume_unique=True)
        return tuple(itertools.compress(what, kept.tolist()))


def _described(dataset: Dataset) -> dict[str, Any]:
    said = dataset.columns or Columns()
    return {
        "shape": dataset.shape,
        "kind": dataset.kind,
        "total": dataset.total,
        "accepted": dataset.accepted,
        "detection": None if dataset.detection is None else asdict(dataset.detection),
        "quarantined": _storable(dataset.quarantined),
        "fingerprint": dataset.fingerprint,
        "columns": {
            "first": said.first,
            "decided": said.decided,
            "layouts": dict(said.layouts),  # asdict cannot take counters
            "languages": dict(said.languages),
        },
    }


def _storable(aside: Sequence[Quarantined]) -> list[list[Any]]:
    rows = [[q.where, q.what, q.how, q.raw] for q in aside]
    try:
        if json.loads(json.dumps(rows)) != rows:
            raise NotStorable
    except (TypeError, ValueError) as error:
        raise NotStorable from error
    return rows


def _finding(stored: Mapping[str, Any]) -> Finding:
    interval = stored["interval"]
    return Finding(
        **{**stored, "where": tuple(stored["where"]), "interval": None if interval is None else tuple(interval)}
    )
