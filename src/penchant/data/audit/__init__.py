"""The data audit: counts what is wrong or lopsided, with line numbers, in rows in memory or in files in one pass."""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import numpy as np

from penchant.base.processes import RAY, Workers, in_order, number_of
from penchant.data.audit.counters import (
    AuditCounter,
    ExactDuplicates,
    Labels,
    Lengths,
    MergeableCounter,
    Named,
    NearDuplicates,
    PositionBias,
    Refusals,
    RowView,
    Scores,
    Sensitive,
    linked_rows_finding,
)
from penchant.data.audit.findings import Audit, Finding, Places, Tally
from penchant.data.audit.languages import Languages
from penchant.data.audit.near import NearIndex, first_index
from penchant.data.layouts.fields import NOTHING_WRONG
from penchant.data.load import (
    IDENTICAL,
    LANGUAGES,
    Columns,
    ConversionSettings,
    Converted,
    Dataset,
    Quarantined,
    Reading,
    add_capped,
    first_text,
    is_identical,
    layout_line,
    prompt_text,
    stream_preferences,
    summary_of,
)
from penchant.data.mapped import RowsPart, StoredRows, part_lengths, parts_of, ranges
from penchant.data.read import BOUNDS, Bounds, Shard, read_shard, shards_of
from penchant.data.tokenize import TokenizedDataset
from penchant.errors import DataError
from penchant.types import PromptTree, TokenTree

REASONS = 1000  # distinct reasons counted


class Auditor:
    """Counts rows one by one, in bounded memory (less than 300 bytes a row, and disk), and reports findings at the end.

    Args:
        shape, kind: of the rows; columns: counts of the rows' own columns, if they exist already.
        languages: whether to guess them; counters: further accumulators, e.g. of rewards for pairs.
        most: limit on distinct reasons; None: `REASONS`.
    """

    def __init__(
        self,
        shape: str,
        kind: str,
        *,
        columns: Columns | None = None,
        languages: bool = True,
        counters: Sequence[AuditCounter] = (),
        most: int | None = None,
    ) -> None:
        self.shape, self.kind, self._max_reasons = shape, kind, most
        self.rows = self.examples = 0  # a row gives one example in most layouts
        self.places = Places()
        self.columns = columns or Columns()
        self.lengths = Lengths(kind)
        copies = ExactDuplicates(kind, self.places, people=shape == "studio")
        self._builtin_counters: list[MergeableCounter] = [copies, NearDuplicates(kind, self.places, copies)]
        self._builtin_counters += [Labels()] if kind == "unpaired" else [Scores()] if kind == "scored" else []
        self._builtin_counters += [self.lengths, *([PositionBias(self.columns)] if kind == "pairs" else [])]
        self._builtin_counters += [Languages(self.columns)] if languages else []
        self._builtin_counters += [] if kind in ("prompts", "text") else [Refusals(kind)]
        self._builtin_counters += [Sensitive()]
        self._counters: list[AuditCounter] = [*self._builtin_counters, *counters]
        self._n_quarantined = 0
        self._bad, self._left_out, self._identical, self._empty = self._tallies = Tally(), Tally(), Tally(), Tally()
        self._reasons: Counter[str] = Counter()

    def update(self, tree: PromptTree) -> None:
        """Count an example."""
        row = RowView(self.examples, tree)
        self.examples += 1
        self.places.append(tree.source)
        if is_identical(tree):
            self._identical.add(tree.source)
        for part in self._counters:
            part.update(row)

    def merge(self, other: Auditor) -> None:
        """Add the counts of later rows, which must hold all reasons and languages."""
        self.rows += other.rows
        self.examples += other.examples
        self._n_quarantined += other._n_quarantined
        self.places.merge(other.places)
        self.columns.merge(other.columns)
        add_capped(self._reasons, other._reasons, REASONS)
        for counter, other_counter in zip(self._builtin_counters, other._builtin_counters, strict=True):
            counter.merge(other_counter)
        for tally, other_tally in zip(self._tallies, other._tallies, strict=True):
            tally.merge(other_tally)

    def add_quarantined(self, row: Quarantined) -> None:
        """Count a row that was kept aside."""
        self._n_quarantined += 1
        (self._left_out if row.how.startswith(NOTHING_WRONG) else self._bad).add(row.where)
        add_capped(self._reasons, {row.what: 1}, self._max_reasons or REASONS)
        if row.what.startswith(IDENTICAL):
            self._identical.add(row.where)
        if is_empty(row):
            self._empty.add(row.where)

    def result(self, extra: Mapping[str, Finding], lengths: Mapping[str, Mapping[str, float]], layout: str) -> Audit:
        """All findings, followed by `extra`."""
        total = self.rows + self._n_quarantined
        findings = {
            "bad_rows": self._bad.finding("rows kept aside, all reasons", total),
            "left_out": self._left_out.finding("rows left out, with which nothing is wrong", total),
            "identical_pairs": self._identical.finding(IDENTICAL, total),
            "empty_completions": self._empty.finding("empty completions or prompts", total),
        }
        for counter in self._counters:
            findings |= dict(counter.findings())
        summary = summary_of(self.shape, self.rows, self._reasons, self._n_quarantined, self.examples)
        return Audit(summary, {**findings, **extra}, lengths, self.lengths.table(), layout)


def is_empty(row: Quarantined) -> bool:
    """Whether a row was kept aside for an empty prompt or answer."""
    return any(phrase in row.what for phrase in ("is empty", "empty answer", "has no content"))


LEAKAGE_ADVICE = "figures on such rows are optimistic: penchant data fix IN OUT --drop leakage --against THE_OTHER_FILE"
ONE_FILE_ADVICE = "figures on such rows are optimistic: drop near-duplicates before the split, penchant data fix IN OUT --drop near_duplicates"


class Leakage:
    """Prompts that are in more than one split, the same or nearly the same."""

    def __init__(self, names: Sequence[str], advice: str = LEAKAGE_ADVICE) -> None:
        self.names, self.advice = list(names), advice
        self._index, self._places = NearIndex(), Places()
        self._split = array("h")

    def update(self, split_index: int, tree: PromptTree) -> None:
        """Count a row of the split."""
        self._index.add([prompt_text(tree.prompt) or first_text(tree)])  # plain texts are keyed by themselves
        self._places.append(tree.source)
        self._split.append(split_index)

    def merge(self, other: Leakage) -> None:
        """Append the rows of another one."""
        self._index.merge(other._index)
        self._places.merge(other._places)
        self._split.extend(other._split)

    def leaked_rows(self, split_index: int) -> np.ndarray:
        """(n,) bool: rows of this split whose prompt, or nearly the same one, is in another split."""
        splits, groups = np.array(self._split), self._index.groups()
        return (splits == split_index) & np.isin(groups, groups[splits != split_index])

    def findings(self) -> Named:
        """``leakage_A_B`` and ``near_leakage_A_B`` for each pair of splits."""
        splits = np.array(self._split)
        exact, near = self._index.exact_ids(), self._index.groups()
        for i, a in enumerate(self.names):
            for j, b in enumerate(self.names[i + 1 :], i + 1):
                name, total = f"{a}_{b}".replace(" ", "_"), int((splits == j).sum())
                exact_matches = _first_match(exact, splits == i, splits == j)
                near_matches = np.where(exact_matches < 0, _first_match(near, splits == i, splits == j), -1)
                for kind, title, matches in (
                    ("leakage", f"leakage: prompts of {b} that are also in {a}", exact_matches),
                    ("near_leakage", f"near leakage: prompts of {b} that are nearly equal to one in {a}", near_matches),
                ):
                    yield f"{kind}_{name}", linked_rows_finding(title, matches, self._places, "as", self.advice, total)


def _first_match(ids: np.ndarray, is_candidate: np.ndarray, is_query: np.ndarray) -> np.ndarray:
    """(n,) int64: for each row of `is_query` the first row of `is_candidate` with the same id; -1 if none, and for other rows."""
    rows = np.append(np.flatnonzero(is_candidate), -1)  # the last one stands for none
    return np.where(is_query, rows[first_index(ids[rows[:-1]], ids)], -1)


def audit(
    dataset: Dataset,
    tokenized: TokenizedDataset | None = None,
    splits: Mapping[str, Dataset] | None = None,
    path: str | Sequence[str] | None = None,
    *,
    languages: bool = True,
    counters: Sequence[AuditCounter] = (),
    workers: int = 1,
) -> Audit:
    """Count what users should know before training on this data.

    Args:
        dataset: as loaded; rows kept aside count too.
        tokenized: adds truncation and token lengths.
        splits: by name; adds prompts that are in more than one. path: of the data; adds the detected layout, and why.
        languages: whether to guess them; counters: further accumulators (see `counters`). workers: processes that count stored rows.
    """
    columns = dataset.columns
    auditor = Auditor(dataset.shape, dataset.kind, columns=columns, languages=languages, counters=counters)
    for tree_or_counts in _count_parts(
        dataset.trees, partial(_StoredRowsTask, shape=dataset.shape, kind=dataset.kind, languages=languages), workers
    ):
        if isinstance(tree_or_counts, PromptTree):
            auditor.update(tree_or_counts)
        else:
            auditor.merge(tree_or_counts)
    auditor.rows = dataset.accepted
    for row in dataset.quarantined:
        auditor.add_quarantined(row)
    one_file = sum(split.accepted for split in (splits or {}).values()) == dataset.accepted
    leakage = Leakage(list(splits or ()), ONE_FILE_ADVICE if one_file else LEAKAGE_ADVICE)
    for i, split in enumerate((splits or {}).values()):
        for tree_or_counts in _count_parts(split.trees, partial(_StoredRowsTask, split=i), workers):
            if isinstance(tree_or_counts, PromptTree):
                leakage.update(i, tree_or_counts)
            else:
                leakage.merge(tree_or_counts)
    findings, lengths = dict(leakage.findings()), {}
    if tokenized is not None:
        findings, lengths = findings | _truncation(tokenized), _token_lengths(tokenized)
    return auditor.result(findings, lengths, "" if path is None else layout_line(dataset, path))


@dataclass(frozen=True, slots=True)
class _StoredRowsTask:
    """A worker's task: count some stored rows, or their prompts as those of a split."""

    rows: RowsPart
    shape: str = ""
    kind: str = ""
    languages: bool = False
    split: int = -1

    def run(self) -> Auditor | Leakage:
        auditor = Auditor(self.shape, self.kind, languages=self.languages, most=sys.maxsize)
        leakage = Leakage([])
        update = auditor.update if self.split < 0 else partial(leakage.update, self.split)
        for tree in self.rows.open():
            update(tree)
        return auditor if self.split < 0 else leakage


def _count_parts(
    trees: Sequence[PromptTree], part: Callable[[RowsPart], _StoredRowsTask], workers: int
) -> Iterator[Any]:
    """The trees themselves, or the counts of worker processes, in order."""
    if workers < 2 or not isinstance(trees, StoredRows):
        return iter(trees)
    return in_order(_StoredRowsTask.run, map(part, parts_of(trees)), workers)


@dataclass(slots=True)
class _AuditPass:
    """One pass over the rows of several splits, or of a shard of one; passes over consecutive shards can be merged."""

    auditor: Auditor
    leakage: Leakage | None
    first: Quarantined | None = None  # first row kept aside
    most: int | None = None

    def take(self, split_index: int, rows: Iterable[Converted]) -> None:
        for converted in rows:
            self.auditor.columns.update(converted.source, self.most or LANGUAGES)
            self.auditor.rows += converted.rows if converted.trees else 0
            for tree in converted.trees:
                self.auditor.update(tree)
                if self.leakage is not None:
                    self.leakage.update(split_index, tree)
            for row in converted.aside:
                self.auditor.add_quarantined(row)
                self.first = self.first or row

    def merge(self, other: _AuditPass) -> None:
        self.auditor.merge(other.auditor)
        self.first = self.first or other.first
        if self.leakage is not None and other.leakage is not None:
            self.leakage.merge(other.leakage)


@dataclass(frozen=True, slots=True)
class _ShardTask:
    """A worker's task: count a shard of a split."""

    shard: Shard
    bounds: Bounds
    how: ConversionSettings
    kind: str
    split: int
    names: tuple[str, ...]
    languages: bool

    def run(self) -> _AuditPass:
        auditor = Auditor(self.how.shape, self.kind, languages=self.languages, most=sys.maxsize)
        audit_pass = _AuditPass(auditor, Leakage(self.names) if len(self.names) > 1 else None, most=sys.maxsize)
        audit_pass.take(self.split, self.how.convert(read_shard(self.shard, self.bounds)))
        return audit_pass


def audit_files(
    splits: Mapping[str, str | Sequence[str]],
    *,
    languages: bool = True,
    counters: Sequence[AuditCounter] = (),
    workers: Workers = None,
    **how: Unpack[Reading],
) -> Audit:
    """Audit files in one pass: no row is kept, and memory grows by less than 300 bytes a row.

    Args:
        splits: files by the name of their split; with several, prompts that are in more than one are counted.
        workers: processes that count shards of the files; None: one per core. Findings do not depend on their number; it is one
            if the files are small, cannot be split, or there are `counters`.
        how: see `Reading`; `limit` applies to each split.

    Raises:
        DataError: a file cannot be read, no row is usable, or splits are of different kinds.
    """
    bounds = Bounds(**how["bounds"]) if "bounds" in how else BOUNDS.get() or Bounds()
    streams = {name: stream_preferences(path, **how) for name, path in splits.items()}
    if not streams:
        raise DataError("audit", "no rows", "give files with rows")
    kinds = [stream.kind for stream in streams.values()]
    for name, kind in zip(splits, kinds, strict=True):
        if kind != kinds[0]:
            what = f"holds {kind}, the files before it hold {kinds[0]}"
            raise DataError(name, what, "audit them one by one, or set the shape")
    shape = next(iter(streams.values())).shape
    auditor = Auditor(shape, kinds[0], languages=languages, counters=counters)
    audit_pass = _AuditPass(auditor, Leakage(list(splits)) if len(splits) > 1 else None)
    shards = [shards_of(splits[n], bounds) if s.splittable and not counters else [] for n, s in streams.items()]
    processes = number_of(workers, sum(map(len, shards)) if all(shards) else 1)
    if processes > 1:
        tasks = (
            _ShardTask(shard, bounds, stream.how, kinds[0], i, tuple(splits), languages)
            for i, stream in enumerate(streams.values())
            for shard in shards[i]
        )
        for part in in_order(_ShardTask.run, tasks, RAY if workers == RAY else processes):
            audit_pass.merge(part)
    else:
        for i, stream in enumerate(streams.values()):
            audit_pass.take(i, stream)
    if not auditor.examples:
        first = audit_pass.first
        where, what, fix = (first.where, first.what, first.how) if first else (", ".join(splits), "no rows", "")
        raise DataError(where, f"{what}; no row could be used", fix or "give files with rows")
    leakage = audit_pass.leakage or Leakage(list(splits))
    layouts = [layout_line(stream, splits[name]) for name, stream in streams.items()]
    return auditor.result(dict(leakage.findings()), {}, "\n".join(layouts))


def split_names(paths: Iterable[str]) -> dict[str, str]:
    """Files as splits, each named after its file, with a number if two have the same name."""
    path_by_name: dict[str, str] = {}
    for path in paths:
        base = path.replace("\\", "/").rsplit("/", 1)[-1]
        name, number = base, 2
        while name in path_by_name:
            name, number = f"{base} ({number})", number + 1
        path_by_name[name] = path
    return path_by_name


def _truncation(tokenized: TokenizedDataset) -> dict[str, Finding]:
    bad_rows = tuple(q.where for q in tokenized.quarantined)
    identical = tuple(q.where for q in tokenized.quarantined if q.what.startswith(IDENTICAL))
    cut_rows = tuple(dict.fromkeys((*tokenized.cut_prompts, *tokenized.cut_completions)))
    checks = {
        "cut_rows": ("rows cut to max_length, at either end", cut_rows),
        "cut_prompts": ("prompts that lost their start to max_length", tokenized.cut_prompts),
        "cut_completions": ("rows with a cut completion (its EOS is gone)", tokenized.cut_completions),
        "identical_after_cut": ("pairs that became equal in tokens", identical),
        "bad_after_tokenising": ("rows kept aside when tokenizing", bad_rows),
    }
    return {name: Finding(title, len(where), tokenized.total, where) for name, (title, where) in checks.items()}


def _token_lengths(tokenized: TokenizedDataset) -> dict[str, dict[str, float]]:
    lengths = {}
    for name, values in _columns(tokenized.trees).items():
        percentiles = {f"p{q}": float(np.percentile(values, q)) for q in (5, 50, 95, 99)}
        lengths[name] = {"mean": float(np.mean(values)), **percentiles, "max": float(np.max(values))}
    return lengths


def _columns(trees: Sequence[TokenTree]) -> Mapping[str, np.ndarray]:
    """Token counts of prompts, chosen and rejected answers of pairs, and other completions; the first tree's kind comes first."""
    parts, lengths = part_lengths(trees)
    starts = np.cumsum(parts) - parts
    pair_starts, not_pairs = starts[parts == 3], parts != 3
    columns = {"prompt": lengths[starts], "chosen": lengths[pair_starts + 1], "rejected": lengths[pair_starts + 2]}
    columns["completion"] = lengths[ranges(starts[not_pairs] + 1, parts[not_pairs] - 1)]
    leading = ["prompt", "completion"] if len(parts) and parts[0] != 3 else []
    return {name: columns[name] for name in dict.fromkeys((*leading, *columns)) if len(columns[name])}
