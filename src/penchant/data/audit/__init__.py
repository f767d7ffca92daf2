"""The data audit: what is wrong or lopsided, counted, with line numbers; of rows in memory or of files in one pass."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Unpack

import numpy as np

from penchant.data.audit.counters import (
    AuditCounter,
    Copies,
    Labels,
    Lengths,
    Named,
    Near,
    PositionBias,
    Refusals,
    Scores,
    Sensitive,
    View,
    linked_rows,
)
from penchant.data.audit.findings import Audit, Finding, Places, Tally
from penchant.data.audit.languages import Languages
from penchant.data.audit.near import NearIndex, first_with
from penchant.data.layouts.fields import NOTHING_WRONG
from penchant.data.load import (
    IDENTICAL,
    Columns,
    Dataset,
    Quarantined,
    Reading,
    first_text,
    is_identical,
    layout_line,
    prompt_text,
    stream_preferences,
    summary_of,
)
from penchant.data.mapped import StoredTokens, ranges
from penchant.data.tokenize import TokenizedDataset
from penchant.errors import DataError
from penchant.types import PromptTree, TokenTree

REASONS = 1000  # different reasons told apart


class Auditor:
    """Takes rows one by one, in bounded memory (about 700 bytes a row), and says at the end what was found.

    Args:
        shape, kind: of the rows; columns: what the rows' own columns say, where it is counted already.
        languages: whether to guess them; counters: further accumulators, for pairs those of rewards.
    """

    def __init__(
        self,
        shape: str,
        kind: str,
        *,
        columns: Columns | None = None,
        languages: bool = True,
        counters: Sequence[AuditCounter] = (),
    ) -> None:
        self.shape, self.kind = shape, kind
        self.rows = self.examples = 0  # a row gives one example in most layouts
        self.places = Places()
        self.columns = columns or Columns()
        self.lengths = Lengths(kind)
        copies = Copies(kind, self.places, people=shape == "studio")
        self._parts: list[AuditCounter] = [copies, Near(kind, self.places, copies)]
        self._parts += [Labels()] if kind == "unpaired" else [Scores()] if kind == "scored" else []
        self._parts += [self.lengths, *([PositionBias(self.columns)] if kind == "pairs" else [])]
        self._parts += [Languages(self.columns)] if languages else []
        self._parts += [] if kind in ("prompts", "text") else [Refusals(kind)]
        self._parts += [Sensitive(), *counters]
        self._aside = 0
        self._bad, self._left_out, self._identical, self._empty = Tally(), Tally(), Tally(), Tally()
        self._reasons: Counter[str] = Counter()

    def update(self, tree: PromptTree) -> None:
        """Count an example."""
        row = View(self.examples, tree)
        self.examples += 1
        self.places.append(tree.source)
        if is_identical(tree):
            self._identical.add(tree.source)
        for part in self._parts:
            part.update(row)

    def keep_aside(self, row: Quarantined) -> None:
        """Count a row that was kept aside."""
        self._aside += 1
        (self._left_out if row.how.startswith(NOTHING_WRONG) else self._bad).add(row.where)
        if row.what in self._reasons or len(self._reasons) < REASONS:
            self._reasons[row.what] += 1
        if row.what.startswith(IDENTICAL):
            self._identical.add(row.where)
        if is_empty(row):
            self._empty.add(row.where)

    def result(self, more: Mapping[str, Finding], lengths: Mapping[str, Mapping[str, float]], layout: str) -> Audit:
        """All findings, with `more` behind them."""
        total = self.rows + self._aside
        found = {
            "bad_rows": self._bad.finding("rows kept aside, all reasons", total),
            "left_out": self._left_out.finding("rows left out, with which nothing is wrong", total),
            "identical_pairs": self._identical.finding(IDENTICAL, total),
            "empty_completions": self._empty.finding("empty completions or prompts", total),
        }
        for part in self._parts:
            found |= dict(part.findings())
        said = summary_of(self.shape, self.rows, self._reasons, self._aside, self.examples)
        return Audit(said, {**found, **more}, lengths, self.lengths.table(), layout)


def is_empty(row: Quarantined) -> bool:
    """Whether a row was kept aside for an empty prompt or answer."""
    return any(said in row.what for said in ("is empty", "empty answer", "has no content"))


LEAKING = "figures on such rows flatter: penchant data fix IN OUT --drop leakage --against THE_OTHER_FILE"
WITHIN = "figures on such rows flatter: drop near-duplicates before the split, penchant data fix IN OUT --drop near_duplicates"


class Leakage:
    """Prompts that stand in more than one split, the same or nearly the same."""

    def __init__(self, names: Sequence[str], advice: str = LEAKING) -> None:
        self.names, self.advice = list(names), advice
        self._index, self._places = NearIndex(), Places()
        self._split = array("h")

    def update(self, split: int, tree: PromptTree) -> None:
        """Count a row of the split of this number."""
        self._index.add([prompt_text(tree.prompt) or first_text(tree)])  # plain texts are keyed by themselves
        self._places.append(tree.source)
        self._split.append(split)

    def shared(self, split: int) -> np.ndarray:
        """(n,) bool: rows of this split whose prompt, or nearly the same one, stands in another."""
        of, groups = np.array(self._split), self._index.groups()
        return (of == split) & np.isin(groups, groups[of != split])

    def findings(self) -> Named:
        """``leakage_A_B`` and ``near_leakage_A_B`` for each two splits."""
        split = np.array(self._split)
        exact, near = self._index.exact_ids(), self._index.groups()
        for i, a in enumerate(self.names):
            for j, b in enumerate(self.names[i + 1 :], i + 1):
                name, of = f"{a}_{b}".replace(" ", "_"), int((split == j).sum())
                same = _first_in(exact, split == i, split == j)
                alike = np.where(same < 0, _first_in(near, split == i, split == j), -1)
                for kind, title, first in (
                    ("leakage", f"leakage: prompts of {b} that also stand in {a}", same),
                    ("near_leakage", f"near leakage: prompts of {b} that nearly stand in {a}", alike),
                ):
                    yield f"{kind}_{name}", linked_rows(title, first, self._places, "as", self.advice, of)


def _first_in(ids: np.ndarray, there: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(n,) int64: for each wanted row the first row `there` with the same id, -1 where there is none or it is not wanted."""
    rows = np.append(np.flatnonzero(there), -1)  # the last one stands for none
    return np.where(wanted, rows[first_with(ids[rows[:-1]], ids)], -1)


def audit(
    dataset: Dataset,
    tokenized: TokenizedDataset | None = None,
    splits: Mapping[str, Dataset] | None = None,
    path: str | Sequence[str] | None = None,
    *,
    languages: bool = True,
    counters: Sequence[AuditCounter] = (),
) -> Audit:
    """Count what a person should know before training on this data.

    Args:
        dataset: as loaded; rows that were kept aside count too.
        tokenized: adds truncation and token lengths.
        splits: by name; adds prompts that stand in more than one. path: of the data; adds the layout that was found, and why.
        languages: whether to guess them; counters: further accumulators (see `counters`).
    """
    columns = dataset.columns
    auditor = Auditor(dataset.shape, dataset.kind, columns=columns, languages=languages, counters=counters)
    auditor.rows = dataset.accepted
    for tree in dataset.trees:
        auditor.update(tree)
    for aside in dataset.quarantined:
        auditor.keep_aside(aside)
    one_file = sum(part.accepted for part in (splits or {}).values()) == dataset.accepted
    leakage = Leakage(list(splits or ()), WITHIN if one_file else LEAKING)
    for i, part in enumerate((splits or {}).values()):
        for tree in part.trees:
            leakage.update(i, tree)
    findings, lengths = dict(leakage.findings()), {}
    if tokenized is not None:
        findings, lengths = findings | _truncation(tokenized), _token_lengths(tokenized)
    return auditor.result(findings, lengths, "" if path is None else layout_line(dataset, path))


def audit_files(
    splits: Mapping[str, str | Sequence[str]],
    *,
    languages: bool = True,
    counters: Sequence[AuditCounter] = (),
    **how: Unpack[Reading],
) -> Audit:
    """The same of files, read once: no row is kept, memory grows by less than a kilobyte a row.

    Args:
        splits: files by the name of their split; with several, prompts that stand in more than one are counted.
        how: they are read; `limit` is of each split.

    Raises:
        DataError: a file that cannot be read, no usable row, splits of different kinds.
    """
    auditor: Auditor | None = None
    leakage = Leakage(list(splits))
    layouts: list[str] = []
    first: Quarantined | None = None
    for i, (name, path) in enumerate(splits.items()):
        stream = stream_preferences(path, **how)
        layouts.append(layout_line(stream, path))
        if auditor is None:
            auditor = Auditor(stream.shape, stream.kind, languages=languages, counters=counters)
        elif stream.kind != auditor.kind:
            what = f"holds {stream.kind}, the files before it hold {auditor.kind}"
            raise DataError(name, what, "audit them one by one, or set the shape")
        for made in stream:
            auditor.columns.update(made.source)
            auditor.rows += made.rows if made.trees else 0
            for tree in made.trees:
                auditor.update(tree)
                if len(splits) > 1:
                    leakage.update(i, tree)
            for aside in made.aside:
                auditor.keep_aside(aside)
                first = first or aside
    if auditor is None or not auditor.examples:
        at, what, fix = (first.where, first.what, first.how) if first else (", ".join(splits) or "audit", "no rows", "")
        raise DataError(at, f"{what}; no row could be used", fix or "give files with rows")
    return auditor.result(dict(leakage.findings()), {}, "\n".join(layouts))


def names_of(paths: Iterable[str]) -> dict[str, str]:
    """Files as splits, each named by its file, with a number where two have one name."""
    named: dict[str, str] = {}
    for path in paths:
        base = path.replace("\\", "/").rsplit("/", 1)[-1]
        name, number = base, 2
        while name in named:
            name, number = f"{base} ({number})", number + 1
        named[name] = path
    return named


def _truncation(tokenized: TokenizedDataset) -> dict[str, Finding]:
    bad = tuple(q.where for q in tokenized.quarantined)
    identical = tuple(q.where for q in tokenized.quarantined if q.what.startswith(IDENTICAL))
    cut = tuple(dict.fromkeys((*tokenized.cut_prompts, *tokenized.cut_completions)))
    found = {
        "cut_rows": ("rows cut to max_length, at either end", cut),
        "cut_prompts": ("prompts that lost their start to max_length", tokenized.cut_prompts),
        "cut_completions": ("rows with a cut completion (its EOS is gone)", tokenized.cut_completions),
        "identical_after_cut": ("pairs that became equal in tokens", identical),
        "bad_after_tokenising": ("rows kept aside when tokenizing", bad),
    }
    return {name: Finding(title, len(where), tokenized.total, where) for name, (title, where) in found.items()}


def _token_lengths(tokenized: TokenizedDataset) -> dict[str, dict[str, float]]:
    found = {}
    for name, values in _columns(tokenized.trees).items():
        middle = {f"p{q}": float(np.percentile(values, q)) for q in (5, 50, 95, 99)}
        found[name] = {"mean": float(np.mean(values)), **middle, "max": float(np.max(values))}
    return found


def _columns(trees: Sequence[TokenTree]) -> Mapping[str, np.ndarray]:
    """Tokens of prompts, of chosen and rejected answers of pairs, of all other completions, in the order in which they come."""
    if isinstance(trees, StoredTokens):
        parts, lengths = trees.part_counts(), trees.part_lengths()
    else:
        sizes = [[len(t.prompt_ids), *map(len, t.completion_ids)] for t in trees]
        parts, lengths = (np.array(list(n), dtype=np.int64) for n in (map(len, sizes), chain.from_iterable(sizes)))
    starts = np.cumsum(parts) - parts
    pairs, other = starts[parts == 3], parts != 3
    found = {"prompt": lengths[starts], "chosen": lengths[pairs + 1], "rejected": lengths[pairs + 2]}
    found["completion"] = lengths[ranges(starts[other] + 1, parts[other] - 1)]
    first = ["prompt", "completion"] if len(parts) and parts[0] != 3 else []
    return {name: found[name] for name in dict.fromkeys((*first, *found)) if len(found[name])}
