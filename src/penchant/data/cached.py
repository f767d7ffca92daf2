"""Loading, splitting, tokenizing and auditing with a cache on disk, keyed by the content of the data."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from time import time_ns
from typing import Any, TypeVar, Unpack

import numpy as np

from penchant.base.files import cache_folder, file_sha256, write_atomically, write_text_atomically
from penchant.base.functions import own_sha256
from penchant.base.processes import in_order, number_of
from penchant.data.audit import audit
from penchant.data.audit.findings import Audit, Finding
from penchant.data.layouts import Detection
from penchant.data.load import (
    Columns,
    Conversion,
    ConversionSettings,
    Dataset,
    Quarantined,
    Reading,
    concatenate_datasets,
    content_of,
    load_preferences,
    stream_preferences,
)
from penchant.data.mapped import (
    PART,
    RowsPart,
    RowWriter,
    StoredRows,
    StoredTokens,
    TokenWriter,
    parts_of,
    ranges,
    read_batch,
)
from penchant.data.read import BOUNDS, Bounds, Shard, named_files, read_shard, shards_of
from penchant.data.split import held_out_rows, prompt_digests, split_by_prompt
from penchant.data.tokenize import CausalTokenization, Mark, TokenizedDataset, is_forced, is_moved, is_split, tokenize
from penchant.errors import DataError
from penchant.types import PromptTree

# ---- Entries on disk ----
# An entry is a folder named by the SHA-256 of everything it depends on: the bytes of the data files, the settings, the tokenizer's
# definition, this package's own data code. So it can be missing or right, never stale. It is written to a temporary folder and
# renamed. Its ``meta.json`` holds every file's size and CRC-32, which are checked when the entry is opened.


T = TypeVar("T")
AUTO_BYTES = 4 << 20  # smaller data is read and tokenized faster than a cache is checked
META, HASHES = "meta.json", "files.json"
RACY_NS = 2_000_000_000  # the coarsest clock of a file system (FAT) ticks every two seconds
ABANDONED_NS = 86_400 * 10**9  # after this time an entry that is still being made counts as abandoned
MANY_ROWS = 200_000  # from here on several processes are worth starting
MANY_SHARDS = 8  # the same for shards of files, whose rows are not counted yet
FILES_KEPT = 1000  # in the table of hashes


def hashes_of(files: Sequence[Path]) -> list[str]:
    """SHA-256 of files. A table next to the cache keeps them, so that a file is read again only if it has changed.

    Size, mtime, ctime, inode and device must be the same, as in git's index. And as there, an entry is not trusted if the file was
    changed less than two seconds before it was read: a later change may have the same time.
    """
    path = cache_folder("data") / HASHES
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        stored = None
    table = stored if isinstance(stored, dict) and stored.pop("", None) == _sha256_of(stored) else {}
    new: dict[str, list[Any]] = {}
    digests = []
    for file in files:
        name, stat = str(file.resolve()), _file_stat(file)
        entry = table.get(name)
        if isinstance(entry, list) and len(entry) == 3 and entry[0] == stat and _is_settled(stat, entry[1]):
            digests.append(str(entry[2]))
            continue
        read_at = time_ns()
        digest = file_sha256(file)
        digests.append(digest)
        if _file_stat(file) == stat and _is_settled(stat, read_at):
            new[name] = [stat, read_at, digest]
    if new:
        merged = {**{k: v for k, v in table.items() if k not in new}, **new}
        with suppress(OSError):  # if two processes write at once, one loses, and a file is read again
            path.parent.mkdir(parents=True, exist_ok=True)
            merged = dict(list(merged.items())[-FILES_KEPT:])
            write_atomically(path, {**merged, "": _sha256_of(merged)})
    return digests


def _file_stat(file: Path) -> list[int]:
    """What a change of a file changes: size, mtime, ctime (which cannot be set back), inode, device."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def _is_settled(stat: Sequence[int], read_at: Any) -> bool:
    """Whether the last change was so long before the read that a later change would have another time."""
    return isinstance(read_at, int) and read_at - max(stat[1], stat[2]) > RACY_NS


@cache
def code_sha256() -> str:
    """SHA-256 over the sources of this package, so that entries made by other code are not used."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.*")):
        if path.suffix in (".py", ".txt", ".yaml"):
            digest.update(str(path.relative_to(Path(__file__).parent)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def key_of(kind: str, depends_on: Mapping[str, Any]) -> str:
    """The name of an entry."""
    content = {"kind": kind, "code": code_sha256(), **depends_on}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_version = cache(metadata.version)


def tokenizer_key(tokenizer: Any) -> str | None:
    """A hash of everything that a tokenizer's ids and texts depend on; None if that is unknown (a slow tokenizer)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template", "add_bos_token", "add_eos_token")
    parts = [type(tokenizer).__name__, backend.to_str(), *(repr(getattr(tokenizer, n, None)) for n in names)]
    parts += [_version(package) for package in ("tokenizers", "transformers")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Entry:
    """One folder of the cache."""

    def __init__(self, kind: str, key: str) -> None:
        self.folder = cache_folder("data") / kind / key[:40]

    def get(self, read: Callable[[Path, Mapping[str, Any]], T]) -> T | None:
        """Return `read(folder, meta)`, or None if the entry is missing or damaged; a damaged one is removed."""
        try:
            meta = json.loads((self.folder / META).read_text())
            if meta.pop("sha256") != _sha256_of(meta):
                raise ValueError(f"{self.folder / META} is damaged")
            for name, (size, crc) in meta["files"].items():
                path = self.folder / name
                if path.stat().st_size != size or crc32(path) != crc:
                    raise ValueError(f"{path} is damaged")
            return read(self.folder, meta["content"])
        except (ValueError, KeyError, TypeError, OSError):
            shutil.rmtree(self.folder, ignore_errors=True)
            return None

    def put(self, write: Callable[[Path], Mapping[str, Any]]) -> bool:
        """Make the entry: `write` fills a folder and returns the meta. Return False if it cannot be written to disk.

        Errors of `write` other than OSError, e.g. a `DataError`, propagate.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.parent.glob(".making-*"):
                if time_ns() - leftover.stat().st_mtime_ns > ABANDONED_NS:
                    shutil.rmtree(leftover, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=self.folder.parent))
        except OSError:
            return False
        try:
            content = write(temporary)
            files = {p.name: (p.stat().st_size, crc32(p)) for p in sorted(temporary.iterdir())}
            meta = json.loads(json.dumps({"content": content, "files": files}))
            write_text_atomically(temporary / META, json.dumps(meta | {"sha256": _sha256_of(meta)}))
            os.rename(temporary, self.folder)
        except OSError:
            return (self.folder / META).exists()  # another process was faster, or the disk is full
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return True


def _sha256_of(meta: Any) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def crc32(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


# ---- The steps of a run, each cached ----


class NotStorable(Exception):
    """A row that is not JSON (bytes or dates of a Parquet file): such data is not cached."""


@dataclass(slots=True)
class DataCache:
    """The data cache of one run.

    Args:
        on: False computes everything afresh and writes nothing; note: called with a line for each entry found or made.
        workers: processes that tokenize and audit; None: one per core if there are many rows.
    """

    on: bool = True
    note: Callable[[str], None] = lambda _: None
    workers: int | None = None
    _tokens: dict[str, StoredDataset] = field(default_factory=dict)  # by key

    def load(self, path: str | Sequence[str], *, on_bad_row: str = "error", **how: Unpack[Reading]) -> Dataset:
        """`load_preferences`, cached."""
        names_and_files = named_files(path)
        files = [f for _, f in names_and_files if f is not None]
        if not self.on or len(files) < len(names_and_files) or sum(f.stat().st_size for f in files) < AUTO_BYTES:
            return load_preferences(path, on_bad_row=on_bad_row, **how)
        contents = [(name, digest) for (name, _), digest in zip(names_and_files, hashes_of(files), strict=True)]
        layout = own_sha256(how.get("shape", "auto"))
        key = key_of("rows", {"files": contents, **how, "on_bad_row": on_bad_row, "layout": layout})

        def write(folder: Path) -> Mapping[str, Any]:
            stream, writer = stream_preferences(path, **how), RowWriter(folder)
            bounds = Bounds(**how["bounds"]) if "bounds" in how else BOUNDS.get() or Bounds()
            shards = shards_of(path, bounds) if stream.splittable else []
            workers = 1 if self.workers is None and len(shards) < MANY_SHARDS else number_of(self.workers, len(shards))
            if workers > 1:
                tasks = (_ShardTask(shard, bounds, stream.how, on_bad_row) for shard in shards)
                for rows, columns, accepted, aside, content in in_order(_ShardTask.run, tasks, workers):
                    writer.merge(_require_storable(rows))
                    stream.merge(columns, accepted, aside, content)
            else:
                try:
                    writer.write(stream.trees(on_bad_row))
                except TypeError as error:  # a column of bytes or dates
                    raise NotStorable from error
            writer.close()
            dataset = stream.dataset(StoredRows(folder, key))
            return {
                **{name: getattr(dataset, name) for name in ("shape", "kind", "total", "accepted", "fingerprint")},
                "detection": dataset.detection and asdict(dataset.detection),
                "quarantined": _quarantine_as_json(dataset.quarantined),
                "columns": {name: getattr(stream.columns, name) for name in Columns.__slots__},
            }

        def read(folder: Path, meta: Mapping[str, Any]) -> Dataset:
            detection, columns = meta["detection"], meta["columns"]
            fields = {
                "quarantined": tuple(Quarantined(*q) for q in meta["quarantined"]),
                "detection": detection and Detection(**{**detection, "others": tuple(detection["others"])}),
                "columns": Columns(**columns | {n: Counter(columns[n]) for n in ("layouts", "languages")}),
            }
            return Dataset(StoredRows(folder, key), **{**meta, **fields})

        return self._read_or_write("rows", key, write, read) or load_preferences(path, on_bad_row=on_bad_row, **how)

    def concatenate(self, parts: Sequence[Dataset], names: Sequence[str]) -> Dataset:
        """`load.concatenate_datasets`, on disk if any part is."""
        if not any(isinstance(d.trees, StoredRows) for d in parts):
            return concatenate_datasets(parts, names)
        key = key_of(
            "rows", {"mixed": [[n, d.fingerprint, d.kind, len(d.trees)] for n, d in zip(names, parts, strict=True)]}
        )

        def keep(_: Iterable[PromptTree]) -> tuple[Sequence[PromptTree], str] | None:
            def write(folder: Path) -> Mapping[str, Any]:
                writer, digest = RowWriter(folder), hashlib.sha256()
                tasks = (_SourceTask(part, i) for i, d in enumerate(parts) for part in _parts(d.trees))
                for rows, content in in_order(
                    _SourceTask.run, tasks, self._processes(sum(len(d.trees) for d in parts))
                ):
                    writer.merge(_require_storable(rows))
                    digest.update(content)
                writer.close()
                return {"fingerprint": digest.hexdigest()}

            stored: tuple[Sequence[PromptTree], str] | None = self._read_or_write(
                "rows", key, write, lambda folder, meta: (StoredRows(folder, key), str(meta["fingerprint"]))
            )
            return stored

        return concatenate_datasets(parts, names, keep)

    def split(self, dataset: Dataset, **how: Any) -> tuple[Dataset, Dataset]:
        """`split_by_prompt`, cached."""
        rows = dataset.trees
        if not isinstance(rows, StoredRows):
            return split_by_prompt(dataset, **how)
        key = key_of("split", {"rows": rows.key, "kind": dataset.kind, **how})

        def write(folder: Path) -> Mapping[str, Any]:
            def map_parts(function: Callable[[RowsPart], bytes], subset: StoredRows) -> Iterator[bytes]:
                return in_order(function, parts_of(subset), self._processes(len(subset)))

            def digests(_: Sequence[PromptTree], seed: int) -> bytes:
                return b"".join(map_parts(partial(_digests_of_part, seed), rows))

            def sha256(indices: np.ndarray) -> str:
                digest = hashlib.sha256()
                for content in map_parts(_content_of_part, rows.take(indices, "")):
                    digest.update(content)
                return digest.hexdigest()

            held_out = held_out_rows(dataset, digests=digests, **how)
            train = np.setdiff1d(np.arange(len(rows)), held_out)
            np.save(folder / "train.npy", train)
            np.save(folder / "held.npy", held_out)
            return {"train": sha256(train), "held": sha256(held_out)}

        def read(folder: Path, meta: Mapping[str, Any]) -> tuple[Dataset, Dataset]:
            train, held_out = (
                dataset.with_trees(rows.take(np.load(folder / f"{n}.npy"), f"{key}/{n}"), meta[n])
                for n in ("train", "held")
            )
            return train, held_out

        return self._read_or_write("split", key, write, read) or split_by_prompt(dataset, **how)

    def tokenize(self, dataset: Dataset, tokenizer: Any, **how: Any) -> TokenizedDataset:
        """`tokenize`, cached. Entries are made with bad rows kept aside; if those are errors, the first one is raised afterwards."""
        rows, tokenizer_hash = dataset.trees, tokenizer_key(tokenizer)
        if (
            not isinstance(rows, StoredRows)
            or tokenizer_hash is None
            or (how["add_eos"] and tokenizer.eos_token_id is None)
        ):
            return tokenize(dataset, tokenizer, **how)
        settings = {**how, "on_bad_row": "skip"}
        key = key_of("tokens", {"rows": rows.whole, "kind": dataset.kind, "tokenizer": tokenizer_hash, **settings})

        def write(folder: Path) -> Mapping[str, Any]:
            all_rows, writer = rows.all_rows(), TokenWriter(folder)
            workers = self._processes(len(all_rows))
            if workers == 1:
                results = [_tokenize_into(all_rows, tokenizer, dataset.kind, settings, writer)]
            else:
                pickled = tokenizer_hash, pickle.dumps(tokenizer)
                tasks = (_TokenizeTask(part, pickled, dataset.kind, settings) for part in parts_of(all_rows))
                results = []
                for part_writer, part_result in in_order(_TokenizeTask.run, tasks, workers):
                    writer.merge(part_writer)
                    results.append(part_result)
            writer.close()
            cut = {n: [s for d in results for s in getattr(d, n)] for n in ("cut_prompts", "cut_completions")}
            quarantined = [q for d in results for q in d.quarantined]
            return {"quarantined": _quarantine_as_json(quarantined), **cut, "template": results[0].template}

        if key not in self._tokens:
            stored = self._read_or_write("tokens", key, write, StoredDataset.read)
            if stored is None:
                return tokenize(dataset, tokenizer, **how)
            self._tokens[key] = stored
        tokenized = self._tokens[key].rows(rows.which)
        if how["on_bad_row"] == "error" and tokenized.quarantined:
            bad = tokenized.quarantined[0]
            raise DataError(bad.where, bad.what, f"{bad.how} (or set data.on_bad_row=skip)")
        return tokenized

    def audit(
        self,
        dataset: Dataset,
        tokenized: TokenizedDataset | None,
        splits: Mapping[str, Dataset],
        path: str | Sequence[str],
        *,
        languages: bool,
    ) -> Audit:
        """`audit`, cached, without opinions."""
        compute = partial(
            audit, dataset, tokenized, splits, path, languages=languages, workers=self._processes(len(dataset.trees))
        )
        datasets = {"": dataset, **splits}
        tokens = None if tokenized is None else tokenized.trees
        row_keys = {n: d.trees.key for n, d in datasets.items() if isinstance(d.trees, StoredRows)}
        cacheable = tokens is None or (isinstance(tokens, StoredTokens) and tokens.which is None)
        if len(row_keys) < len(datasets) or not cacheable:
            return compute()
        token_key = tokens.folder.name if isinstance(tokens, StoredTokens) else None
        depends_on = {"rows": row_keys, "kind": dataset.kind, "tokens": token_key, "path": path, "languages": languages}

        def read(folder: Path, meta: Mapping[str, Any]) -> Audit:
            return Audit(**{**meta, "findings": {name: _finding_from_json(f) for name, f in meta["findings"].items()}})

        return self._read_or_write("audit", key_of("audit", depends_on), lambda _: asdict(compute()), read) or compute()

    def _processes(self, rows: int) -> int:
        if self.workers is None and rows < MANY_ROWS:
            return 1
        return number_of(self.workers, -(-rows // PART))

    def _read_or_write(
        self,
        kind: str,
        key: str,
        write: Callable[[Path], Mapping[str, Any]],
        read: Callable[[Path, Mapping[str, Any]], Any],
    ) -> Any:
        """Read the entry, made first if it does not exist; None if it cannot be stored."""
        entry = Entry(kind, key)
        value = entry.get(read)
        if value is not None:
            self.note(f"data cache: {kind} read from {entry.folder}")
            return value
        try:
            written = entry.put(write)
        except NotStorable:
            return None
        if not written:
            self.note(f"data cache: {cache_folder('data')} cannot be written; continuing without it")
            return None
        self.note(f"data cache: {kind} kept in {entry.folder}")
        return entry.get(read)


def _require_storable(rows: RowWriter | None) -> RowWriter:
    if rows is None:
        raise NotStorable
    return rows


def _parts(trees: Sequence[PromptTree]) -> Iterator[RowsPart | Sequence[PromptTree]]:
    """Trees in parts for worker processes: by reference if they are stored, else the trees themselves."""
    if isinstance(trees, StoredRows):
        return parts_of(trees)
    return (trees[i : i + PART] for i in range(0, len(trees), PART))


@dataclass(frozen=True, slots=True)
class _ShardTask:
    """A worker's task: convert the rows of a part of a file."""

    shard: Shard
    bounds: Bounds
    how: ConversionSettings
    on_bad_row: str

    def run(self) -> tuple[RowWriter | None, Columns, int, list[Quarantined], bytes]:
        content: list[bytes] = []
        conversion = Conversion(self.how, read_shard(self.shard, self.bounds), content.append, sys.maxsize)
        writer = _write_in_memory(conversion.trees(self.on_bad_row))
        return writer, conversion.columns, conversion.accepted, conversion.aside, b"".join(content)


@dataclass(frozen=True, slots=True)
class _SourceTask:
    """A worker's task: write some rows with the `origin` of their source."""

    rows: RowsPart | Sequence[PromptTree]
    origin: int

    def run(self) -> tuple[RowWriter | None, bytes]:
        trees = self.rows.open() if isinstance(self.rows, RowsPart) else self.rows
        with_origin = [replace(t, origin=self.origin) for t in trees]
        return _write_in_memory(with_origin), b"".join(map(content_of, with_origin))


def _write_in_memory(trees: Iterable[PromptTree]) -> RowWriter | None:
    """A writer with these trees, or None if they cannot be written (a column of bytes or dates)."""
    writer = RowWriter(None)
    try:
        writer.write(trees)
    except TypeError:
        return None
    return writer


def _content_of_part(part: RowsPart) -> bytes:
    return b"".join(map(content_of, part.open()))


def _digests_of_part(seed: int, part: RowsPart) -> bytes:
    return prompt_digests(part.open(), seed)


@dataclass(frozen=True, slots=True)
class _TokenizeTask:
    """A worker's task: tokenize some stored rows."""

    rows: RowsPart
    tokenizer: tuple[str, bytes]  # its key and its pickle
    kind: str
    how: Mapping[str, Any]

    def run(self) -> tuple[TokenWriter, TokenizedDataset]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the worker processes already use the cores
        writer = TokenWriter(None)
        return writer, _tokenize_into(self.rows.open(), _unpickled(*self.tokenizer), self.kind, self.how, writer)


def _unpickled(key: str, tokenizer: bytes) -> Any:
    """Unpickle a tokenizer, once per process."""
    if key not in _UNPICKLED:
        _UNPICKLED[key] = pickle.loads(tokenizer)
    return _UNPICKLED[key]


_UNPICKLED: dict[str, Any] = {}


def _tokenize_into(
    rows: Sequence[PromptTree], tokenizer: Any, kind: str, options: Mapping[str, Any], writer: TokenWriter
) -> TokenizedDataset:
    """Tokenize rows into `writer`; return the counts and the rows kept aside, without trees."""
    tokenization = CausalTokenization(tokenizer, kind, **options)
    for trees, mark in tokenization.by_row(rows):
        for tree in trees:
            writer.write(tree)
        writer.end_row(len(trees), mark)
    return tokenization.result((), len(rows))


@dataclass(frozen=True, slots=True)
class StoredDataset:
    """All tokens of an entry and what happened to each of its rows, from which a split is selected without tokenizing again.

    Args:
        whole: all tokens; trees_per_row: (rows,) int32; marks: (rows,) uint8: see `Tokenization.by_row`.
    """

    whole: TokenizedDataset
    trees_per_row: np.ndarray
    marks: np.ndarray

    @staticmethod
    def read(folder: Path, meta: Mapping[str, Any]) -> StoredDataset:
        """Read an entry's folder."""
        batch = read_batch(folder / "made.arrow")
        trees_per_row, marks = (batch.column(name).to_numpy() for name in ("trees", "marks"))
        quarantined = tuple(Quarantined(*q) for q in meta["quarantined"])
        cut = tuple(meta["cut_prompts"]), tuple(meta["cut_completions"])
        split = int(((marks & Mark.SPLIT) > 0).sum())
        counts = int(is_moved(marks).sum()), int(is_split(marks).sum()), int(is_forced(marks).sum())
        whole = TokenizedDataset(StoredTokens(folder), len(marks), quarantined, *cut, split, meta["template"], *counts)
        return StoredDataset(whole, trees_per_row, marks)

    def rows(self, indices: np.ndarray | None) -> TokenizedDataset:
        """The result of `tokenize` for these rows (ascending), or for all."""
        if indices is None:
            return self.whole
        assert isinstance(self.whole.trees, StoredTokens)
        starts = np.cumsum(self.trees_per_row, dtype=np.int64) - self.trees_per_row

        # `what` has an item for each row with this mark
        def items_with_mark(items: tuple[T, ...], mark: int) -> tuple[T, ...]:
            selected = np.isin(np.flatnonzero(self.marks & mark), indices, assume_unique=True)
            return tuple(itertools.compress(items, selected.tolist()))

        return replace(
            self.whole,
            trees=self.whole.trees.take(ranges(starts[indices], self.trees_per_row[indices])),
            total=len(indices),
            quarantined=items_with_mark(self.whole.quarantined, Mark.ASIDE),
            cut_prompts=items_with_mark(self.whole.cut_prompts, Mark.CUT_PROMPT),
            cut_completions=items_with_mark(self.whole.cut_completions, Mark.CUT_COMPLETION),
            split_documents=int(((self.marks[indices] & Mark.SPLIT) > 0).sum()),
            moved_prompts=int(is_moved(self.marks[indices]).sum()),
            apart=int(is_split(self.marks[indices]).sum()),
            forced_prompts=int(is_forced(self.marks[indices]).sum()),
        )


def _quarantine_as_json(quarantined: Sequence[Quarantined]) -> list[list[Any]]:
    rows = [[q.where, q.what, q.how, q.raw] for q in quarantined]
    try:
        if json.loads(json.dumps(rows)) != rows:
            raise NotStorable
    except (TypeError, ValueError) as error:
        raise NotStorable from error
    return rows


def _finding_from_json(record: Mapping[str, Any]) -> Finding:
    interval = record["interval"]
    return Finding(**{**record, "where": tuple(record["where"]), "interval": interval and tuple(interval)})
