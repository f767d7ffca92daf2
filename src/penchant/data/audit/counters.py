"""The counters of an audit: each takes rows one by one and gives its findings at the end."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import resources
from typing import Any, Protocol

import numpy as np

from penchant.data.audit import sensitive
from penchant.data.audit.findings import KEPT, Finding, Places, Tally, balance_finding, estimated_finding, quantiles
from penchant.data.audit.near import NearIndex, first_index, first_occurrence, text_hash
from penchant.data.load import Columns, prompt_text
from penchant.errors import DataError
from penchant.types import PromptTree

Named = Iterator[tuple[str, Finding]]


class RowView:
    """An accepted row for counters: its index among those (from 0), its place, its prompt as one string, its answers' texts."""

    __slots__ = ("index", "prompt", "texts", "tree", "where")

    def __init__(self, index: int, tree: PromptTree) -> None:
        self.index, self.tree, self.where = index, tree, tree.source
        self.prompt, self.texts = prompt_text(tree.prompt), tuple(c.whole for c in tree.completions)


class AuditCounter(Protocol):
    """Counts something in bounded memory."""

    def update(self, row: RowView) -> None:
        """Count one accepted row."""

    def findings(self) -> Named:
        """The findings, by name."""


class MergeableCounter(AuditCounter):
    """A counter whose counts over shards can be merged to those of a single pass."""

    def merge(self, other: Any) -> None:
        """Add the counts of another counter of this kind over the rows after these."""
        for name, count in vars(other).items():
            setattr(self, name, merge_counts(getattr(self, name), count))


def merge_counts(counts: Any, other: Any) -> Any:
    """Merge two counts: add numbers and counters, append containers of rows, and keep texts, which are equal."""
    if isinstance(counts, (int, Counter)) and not isinstance(counts, bool):
        return counts + other
    if isinstance(counts, dict):
        return {**counts, **{k: merge_counts(counts[k], v) if k in counts else v for k, v in other.items()}}
    if isinstance(counts, list):
        return [merge_counts(a, b) for a, b in zip(counts, other, strict=True)]
    if isinstance(counts, array):
        counts.extend(other)
    elif isinstance(counts, (Tally, NearIndex)):
        counts.merge(other)
    return counts


def text_key(*texts: str) -> int:
    """A 64-bit hash of several texts."""
    return text_hash("\0".join(texts))


def linked_rows_finding(
    title: str, linked_rows: np.ndarray, places: Places, relation: str = "", advice: str = "", total: int = -1
) -> Finding:
    """A finding about the rows that are linked to another row.

    Args:
        linked_rows: (n,) int64: the row that each row is linked to, -1 if none.
        relation: the word between the two places; empty: show only the row's own. total: number of rows examined (default: n).
    """
    rows = np.flatnonzero(linked_rows >= 0)
    pairs = ((places[i], places[int(linked_rows[i])]) for i in rows[:KEPT].tolist())
    where = tuple(f"{place} ({relation} {other_place})" if relation else place for place, other_place in pairs)
    return Finding(title, len(rows), len(linked_rows) if total < 0 else total, where, advice=advice)


# ---- Copies ----

BY_PEOPLE = "penchant compare --judge humans:preferences.jsonl"


class ExactDuplicates(MergeableCounter):
    """Exact copies of an earlier row, the same pair the other way round, and answers labeled both good and bad.

    Args:
        people: each row is one person's judgment; those of several people on one pair are not copies.
    """

    def __init__(self, kind: str, places: Places, people: bool = False) -> None:
        self.kind, self.places, self.people = kind, places, people
        self._row, self._content_keys, self._swapped_keys = array("Q"), array("Q"), array("Q")
        self._label, self._owner = array("b"), array("q")  # of each labeled answer: good or bad, and its row

    def update(self, row: RowView) -> None:
        # an answer with another label is a contradiction, not a duplicate
        self._row.append(text_key(row.prompt, *(f"{c.whole}\0{c.label}\0{c.score}" for c in row.tree.completions)))
        if self.kind == "pairs":
            a, b = row.texts[:2]
            self._content_keys.append(text_key(row.prompt, a, b))
            self._swapped_keys.append(text_key(row.prompt, b, a) if a != b else 0)
        elif self.kind == "unpaired":
            for answer in row.tree.completions:
                self._content_keys.append(text_key(row.prompt, answer.whole))
                self._label.append(-1 if answer.label is None else int(answer.label))
                self._owner.append(len(self._row) - 1)

    def merge(self, other: ExactDuplicates) -> None:
        offset = len(self._row)
        other._owner = array("q", (np.array(other._owner) + offset).tobytes())
        super().merge(other)

    def duplicates(self) -> np.ndarray:
        """(n,) int64: the first row equal to each row."""
        return first_occurrence(np.array(self._row))

    def contradicted_rows(self) -> np.ndarray:
        """(n,) int64: the first earlier row that contradicts each row, -1 if there is none."""
        keys, contradicted = np.array(self._content_keys), np.full(len(self._row), -1)
        if self.kind == "pairs":
            return earlier_match(keys, np.array(self._swapped_keys))
        first, owner = first_occurrence(keys), np.array(self._owner)
        for answer in self._contradicting(first)[::-1]:  # the first of a row's answers is written last
            contradicted[owner[answer]] = owner[first[answer]]
        return contradicted

    def _contradicting(self, first: np.ndarray) -> np.ndarray:
        """Indices of answers whose label differs from that of the first equal answer."""
        label = np.array(self._label)
        return np.flatnonzero(label != label[first])

    def contradictory(self) -> np.ndarray:
        """(n,) bool: rows that some row, earlier or later, contradicts."""
        if self.kind == "pairs":
            return np.isin(
                np.array(self._swapped_keys), np.array(self._content_keys)
            )  # 0 stands for a pair of equal answers
        contradicted = np.zeros(len(self._row), bool)
        if self.kind == "unpaired":
            first, owner = first_occurrence(np.array(self._content_keys)), np.array(self._owner)
            contradicted[owner[np.isin(first, first[self._contradicting(first)])]] = True
        return contradicted

    def findings(self) -> Named:
        first, rows = self.duplicates(), np.arange(len(self._row))
        copies = np.where(first != rows, first, -1)
        if self.people:
            yield (
                "agreed",
                linked_rows_finding("pairs on which another person gave the same verdict", copies, self.places, "as"),
            )
            title, advice = (
                "pairs on which another person gave the opposite verdict",
                "see how far people agree: " + BY_PEOPLE,
            )
            yield "disagreed", linked_rows_finding(title, self.contradicted_rows(), self.places, "against", advice)
            return
        title = "exact duplicates of an earlier row"
        yield "duplicates", linked_rows_finding(title, copies, self.places, "as", "drop them: data fix")
        if self.kind in ("pairs", "unpaired"):
            contradiction = (
                "the same pair the other way round" if self.kind == "pairs" else "one answer labeled good and bad"
            )
            advice = "look at both and drop the wrong one; many mean noisy labels: a loss with label smoothing"
            finding = linked_rows_finding(
                f"contradictions: {contradiction}", self.contradicted_rows(), self.places, "against", advice
            )
            yield "contradictions", finding


def earlier_match(keys: np.ndarray, wanted_keys: np.ndarray) -> np.ndarray:
    """(n,) int64: for each row the first row before it whose key is `wanted_keys` of the row, -1 if there is none."""
    first = first_index(keys, wanted_keys)
    return np.where(first < np.arange(len(keys)), first, -1)


class NearDuplicates(MergeableCounter):
    """Near-duplicate rows, pairs that nearly contradict each other, nearly equal answers, and cycles of preferences.

    Prompts and answers are put into groups of near-duplicates, and rows are compared by group. `ExactDuplicates` counts exact copies.
    """

    def __init__(self, kind: str, places: Places, copies: ExactDuplicates) -> None:
        self.kind, self.places, self.copies = kind, places, copies
        self._prompts, self._answers = NearIndex(), NearIndex()
        self._ends = array("q")  # of each row's answers

    def update(self, row: RowView) -> None:
        self._prompts.add([row.prompt])
        self._answers.add(row.texts)
        self._ends.append(len(self._answers))

    def merge(self, other: NearDuplicates) -> None:
        offset = len(self._answers)
        other._ends = array("q", (np.array(other._ends) + offset).tobytes())
        super().merge(other)

    def groups(self) -> tuple[np.ndarray, np.ndarray]:
        """((n,) group of each row's prompt, (n, k) groups of its answers), padded with -1 to k, the most answers of a row."""
        prompts = self._prompts.groups()
        answers = self._answers.groups()
        ends = np.array(self._ends)
        starts = np.r_[0, ends][:-1]
        width = int((ends - starts).max(initial=0))
        padded = np.full((len(ends), width), -1, dtype=np.int64)
        for j in range(width):
            present = starts + j < ends
            padded[present, j] = answers[starts[present] + j]
        return prompts, padded

    def rows(self) -> dict[str, np.ndarray]:
        """By finding: (n,) int64, the row that each row is linked to, -1 if none."""
        prompts, answers = self.groups()
        n = len(prompts)
        rows = np.arange(n)
        # the others are counted as exact
        not_exact = (self.copies.duplicates() == rows) & (self.copies.contradicted_rows() < 0)
        first = first_occurrence(_hash_columns(prompts, *answers.T))
        links = {"near_duplicates": np.where((first != rows) & not_exact, first, -1)}
        if self.kind == "pairs" and n:
            good, bad = answers[:, 0], answers[:, 1]
            contradicted = earlier_match(_hash_columns(prompts, good, bad), _hash_columns(prompts, bad, good))
            links["near_contradictions"] = np.where((good != bad) & not_exact, contradicted, -1)
            links["near_identical"] = np.where(good == bad, rows, -1)
            links["cycles"] = np.where(
                edges_in_cycles(_hash_columns(prompts, good), _hash_columns(prompts, bad)), rows, -1
            )
        return links

    def contradictory(self) -> np.ndarray:
        """(n,) bool: pairs that some row, earlier or later, nearly or exactly contradicts."""
        prompts, answers = self.groups()
        if self.kind != "pairs" or not len(prompts):
            return np.zeros(len(prompts), bool)
        good, bad = answers[:, 0], answers[:, 1]
        return (good != bad) & np.isin(_hash_columns(prompts, good, bad), _hash_columns(prompts, bad, good))

    def findings(self) -> Named:
        for name, linked in self.rows().items():
            title, joined, advice = NEAR_FINDINGS[name]
            yield name, linked_rows_finding(title, linked, self.places, joined, advice)


NEAR_FINDINGS = {  # title, what joins the two places, advice
    "near_duplicates": (
        "near-duplicates of an earlier row (Jaccard about 0.8 or more)", "as",
        "data fix --drop near_duplicates drops them"),
    "near_contradictions": (
        "near contradictions: nearly the same pair the other way round", "against", "look at both"),
    "near_identical": (
        '"chosen" nearly equals "rejected"', "",
        "the signal of such pairs is small: check that it is the one you mean"),
    "cycles": (
        "cycles: A over B, B over C, C over A for one prompt", "", "at least one label of each cycle is wrong"),
}  # fmt: skip


def _hash_columns(*columns: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row of several columns."""
    hashes = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        hashes = (hashes ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def edges_in_cycles(winners: np.ndarray, losers: np.ndarray) -> np.ndarray:
    """(n,) bool: edges winner -> loser inside a strongly connected component of at least three answers."""
    from networkx import DiGraph, strongly_connected_components

    in_cycle = np.zeros(len(winners), bool)
    candidates = np.flatnonzero((winners != losers) & _isin(winners, losers) & _isin(losers, winners))
    nodes, members = np.unique(np.concatenate([winners[candidates], losers[candidates]]), return_inverse=True)
    a, b = members[: len(candidates)], members[len(candidates) :]
    remaining = a != b
    while remaining.any():  # edges without a successor or a predecessor are on no cycle
        has_successor, has_predecessor = np.zeros(len(nodes), bool), np.zeros(len(nodes), bool)
        has_successor[a[remaining]], has_predecessor[b[remaining]] = True, True
        keep = remaining & has_successor[b] & has_predecessor[a]
        if (keep == remaining).all():
            break
        remaining = keep
    edges = np.flatnonzero(remaining)
    ends = list(zip(a[edges].tolist(), b[edges].tolist(), strict=True))
    components = strongly_connected_components(DiGraph(ends))
    component_of = {node: i for i, nodes in enumerate(components) if len(nodes) >= 3 for node in nodes}
    in_cycle[candidates[edges]] = [
        winner in component_of and component_of[winner] == component_of.get(loser) for winner, loser in ends
    ]
    return in_cycle


def _isin(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n,) bool: like `np.isin(values, others)`, which would hold several copies of both."""
    sorted_others = np.sort(others)
    index = np.searchsorted(sorted_others, values)
    index[index == len(sorted_others)] = 0
    return sorted_others[index] == values if len(sorted_others) else np.zeros(len(values), bool)


# ---- Answers ----


class Lengths(MergeableCounter):
    """How long prompts and answers are, and whether the longer answer is the chosen one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.longer = self.differing = self.rows = 0
        self.histograms: dict[str, Counter[int]] = {}

    def update(self, row: RowView) -> None:
        self.rows += 1
        self._count("prompt", len(row.prompt))
        names = ("chosen", "rejected") if self.kind == "pairs" else ("completion",) * len(row.texts)
        for name, text in zip(names, row.texts, strict=False):
            self._count(name, len(text))
        if self.kind == "pairs":
            difference = len(row.texts[0]) - len(row.texts[1])
            self.longer += difference > 0
            self.differing += difference != 0

    def _count(self, name: str, length: int) -> None:
        self.histograms.setdefault(name, Counter())[length] += 1

    def findings(self) -> Named:
        if self.kind != "pairs":
            return
        title = "length bias: the longer answer is the chosen one"
        if not self.differing:
            yield "length_bias", Finding(title, 0, 0, (), "all lengths are equal")
            return
        ties = self.rows - self.differing
        note = f"not counting {ties:,} ties" if ties else ""
        advice = "far from 50%: the model may learn length; a length-controlled comparison shows it, length-normalized losses help"
        yield "length_bias", balance_finding(title, self.longer, self.differing, note, advice)

    def table(self) -> dict[str, dict[str, float]]:
        """Mean, percentiles and maximum of the lengths in characters."""
        return {name: quantiles(h) for name, h in self.histograms.items()}


class Labels(MergeableCounter):
    """The share of good answers."""

    def __init__(self) -> None:
        self.good = self.answers = 0

    def update(self, row: RowView) -> None:
        self.answers += len(row.tree.completions)
        self.good += sum(bool(c.label) for c in row.tree.completions)

    def findings(self) -> Named:
        yield "good_answers", Finding("answers labeled good", self.good, self.answers, ())


class Scores(MergeableCounter):
    """The distribution of scores, to choose data.score_threshold from."""

    def __init__(self) -> None:
        self.values = array("d")

    def update(self, row: RowView) -> None:
        self.values.extend(c.score for c in row.tree.completions if c.score is not None)

    def findings(self) -> Named:
        scores = np.array(self.values)
        if not len(scores):
            return
        low, mid, high = np.quantile(scores, [0.25, 0.5, 0.75])
        above, note = int((scores >= mid).sum()), f"quartiles {low:g}, {mid:g}, {high:g}"
        yield "scores", Finding("answers at or above the median score", above, len(scores), (), note)


@cache
def refusal_phrases() -> tuple[str, ...]:
    """The documented list, refusals.txt in the data package."""
    text = (resources.files("penchant.data") / "refusals.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


def refuses(text: str) -> bool:
    """Whether a text has one of the phrases in its first 200 characters."""
    head = text[:200].lower().replace("\u2019", "'")
    return any(phrase in head for phrase in refusal_phrases())


class Refusals(MergeableCounter):
    """Answers that begin like a refusal, counted separately for chosen and rejected ones."""

    def __init__(self, kind: str) -> None:
        self.names = ("chosen", "rejected") if kind == "pairs" else ("",)
        self.tallies = [Tally() for _ in self.names]
        self.of = [0 for _ in self.names]

    def update(self, row: RowView) -> None:
        for i, text in enumerate(row.texts):
            slot = min(i, len(self.names) - 1)
            self.of[slot] += 1
            if refuses(text):
                self.tallies[slot].add(row.where)

    def findings(self) -> Named:
        for name, tally, total in zip(self.names, self.tallies, self.of, strict=True):
            title = f"{name or 'answers'} {'answers ' if name else ''}that begin like a refusal (phrase match)"
            advice = "look at some: too many chosen ones teach over-refusal" if name != "rejected" else ""
            yield f"refusals_{name}" if name else "refusals", tally.finding(title, total, advice=advice)


ADVICE = {
    "pii": "data fix --redact pii puts [EMAIL] and the like in their place",
    "secrets": "revoke those that are yours; data fix --drop secrets drops the rows, --redact secrets masks them",
}


class Sensitive(MergeableCounter):
    """Rows with values that look like personal data or secrets; the values themselves are never kept."""

    def __init__(self) -> None:
        self.rows = 0
        self.tallies = {name: Tally() for name in sensitive.TITLES}

    def update(self, row: RowView) -> None:
        self.rows += 1
        spans = sensitive.find("\n".join((row.prompt, *row.texts)))
        for kind in dict.fromkeys(s.kind for s in spans):
            self.tallies[kind].add(row.where)

    def findings(self) -> Named:
        for group, names in sensitive.GROUPS.items():
            for name in names:
                title = f"rows with {sensitive.TITLES[name]}"
                yield f"{group}_{name}", self.tallies[name].finding(title, self.rows, advice=ADVICE[group])


class PositionBias(MergeableCounter):
    """How often the answer that was shown first won, according to the rows' own columns."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def update(self, row: RowView) -> None:
        """Do nothing: columns are counted when rows are read."""

    def findings(self) -> Named:
        title, columns = "position bias: the answer shown first wins", self.columns
        if columns.decided:
            advice = "far from 50%: the raters looked at the order"
            yield (
                "position_bias",
                balance_finding(title, columns.first, columns.decided, ", ".join(columns.layouts), advice),
            )
        else:
            note = "not known: the rows do not say which answer was shown first"
            yield "position_bias", Finding(title, 0, 0, (), note)


# ---- A reward's disagreement with the labels, and a user's own check of texts ----


BATCH = 64
SURE = 0.9  # the probability from which the reward counts as sure

RewardFunction = Callable[[Sequence[str], Sequence[str]], Any]
TextFunction = Callable[[Sequence[str]], Any]


class RewardDisagreement:
    """Pairs in which a reward prefers the rejected answer, as an estimate of how noisy the labels are.

    The reward's margins are calibrated on the pairs themselves, with the scale s that makes the labels most likely under
    sigmoid(s * margin). A reward unrelated to the labels gets s = 0 and is never sure.
    """

    def __init__(self, name: str, reward: RewardFunction) -> None:
        self.name, self.reward = name, reward
        self._waiting: list[RowView] = []
        self._margins = array("d")
        self._worst: list[tuple[float, int, str]] = []

    def update(self, row: RowView) -> None:
        self._waiting.append(row)
        if len(self._waiting) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows, self._waiting = self._waiting, []
        prompts = [r.prompt for r in rows]
        values = self.reward([p for p in prompts for _ in (0, 1)], [t for r in rows for t in r.texts[:2]])
        margins = np.asarray(values, dtype=np.float64).reshape(-1, 2) @ [1.0, -1.0]
        self._margins.extend(margins.tolist())
        for row, margin in zip(rows, margins.tolist(), strict=True):
            if margin < 0:
                item = (-margin, -row.index, row.where)
                (heapq.heappush if len(self._worst) < KEPT else heapq.heappushpop)(self._worst, item)

    def findings(self) -> Named:
        self._flush()
        margins = np.array(self._margins)
        decided = margins[margins != 0]
        disagreeing = decided[decided < 0]
        scale = calibrate(decided)
        sure = int((-scale * disagreeing > np.log(SURE / (1 - SURE))).sum())
        places = tuple(where for _, _, where in sorted(self._worst, reverse=True))
        note = f"not counting {len(margins) - len(decided):,} ties; " if len(margins) > len(decided) else ""
        note += f"in {sure:,} of them it is at least {SURE:.0%} sure (margins times {scale:.3g})"
        note += ", the largest margin first"
        title, advice = f"label noise: {self.name} prefers the rejected answer", "look at the first of these places"
        yield (
            "reward_disagreement",
            estimated_finding(title, len(disagreeing), len(decided), note, where=places, advice=advice),
        )


def calibrate(margins: np.ndarray) -> float:
    """The s >= 0 that maximizes the sum of log sigmoid(s * margin); at most 1000 / mean(abs(margin)) if no pair disagrees."""
    if not len(margins):
        return 0.0
    size = float(np.abs(margins).mean())
    scaled = margins / size
    low, high = 0.0, 1000.0
    if _slope(scaled, 0.0) <= 0:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(scaled, middle) > 0 else (low, middle)
    return low / size


def _slope(margins: np.ndarray, s: float) -> float:
    """The derivative of the sum of log sigmoid(s m) by s: the sum of m sigmoid(-s m)."""
    return float((margins * np.exp(-np.logaddexp(0.0, s * margins))).sum())


class TextCheck:
    """A user's own function over all texts: it gets a list of texts and returns a bool or a number for each."""

    def __init__(self, name: str, function: TextFunction) -> None:
        self.name, self.function = name, function
        self._texts: list[str] = []
        self._places: list[str] = []
        self._values = array("d")
        self._tally = Tally()
        self._bools = True

    def update(self, row: RowView) -> None:
        for part, text in [("prompt", row.prompt), *((f"answer {i}", t) for i, t in enumerate(row.texts, 1))]:
            self._texts.append(text)
            self._places.append(f"{row.where} ({part})")
        if len(self._texts) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        if not self._texts:
            return
        texts, places = self._texts, self._places
        self._texts, self._places = [], []
        values = _call_check(self.name, self.function, texts)
        self._bools &= bool(np.isin(values, (0.0, 1.0)).all())
        self._values.extend(values.tolist())
        for place, value in zip(places, values.tolist(), strict=True):
            if value >= 0.5:
                self._tally.add(place)

    def findings(self) -> Named:
        self._flush()
        values = np.array(self._values)
        note = ""
        if len(values) and not self._bools:
            note = "quantiles {:.3g}, {:.3g}, {:.3g} (50%, 95%, 99%)".format(*np.quantile(values, [0.5, 0.95, 0.99]))
        title = f"texts of which {self.name} says {'yes' if self._bools else 'at least 0.5'}"
        yield f"check_{self.name}", self._tally.finding(title, len(values), note)


def _call_check(name: str, function: TextFunction, texts: list[str]) -> np.ndarray:
    try:
        values = np.asarray([float(v) for v in function(list(texts))], dtype=np.float64)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        how = "it gets a list of texts and returns a bool or a number of each"
        raise DataError(f"check {name}", what, how) from error
    if values.shape != (len(texts),) or not np.isfinite(values).all():
        mismatch = f"returned {values.size} values for {len(texts)} texts"
        what = mismatch if values.size != len(texts) else "returned NaN or infinity"
        raise DataError(f"check {name}", what, "return one finite number or bool for each text, in order")
    return values
