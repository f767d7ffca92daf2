"""The languages of the rows: from their own column, else guessed for a sample."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from functools import cache

from penchant.base.text import counted
from penchant.data.audit.counters import MergeableCounter, Named, RowView
from penchant.data.audit.findings import Finding, estimated_finding
from penchant.data.audit.near import text_hash
from penchant.data.load import Columns

SAMPLE = 2000  # rows
SHOWN = 8  # languages named
LETTERS = 20  # no guess for a text with fewer
TITLE = "rows in the most common language"


@cache
def guesser() -> Callable[[str], str] | None:
    """py3langid's classifier, None if it is not installed."""
    try:
        from py3langid import classify
    except ImportError:
        return None
    return lambda text: str(classify(text)[0])


def guess(text: str) -> str:
    """A text's language, ``?`` if it is too short."""
    classify = guesser()
    assert classify is not None
    return classify(text) if sum(map(str.isalpha, text)) >= LETTERS else "?"


class Languages(MergeableCounter):
    """The languages in the rows' own columns, else those guessed for `SAMPLE` rows (from an answer, or the prompt if none)."""

    def __init__(self, columns: Columns) -> None:
        self._heap: list[tuple[int, str]] = []  # the smallest draws, negated; the largest of them first
        self.columns = columns

    def update(self, row: RowView) -> None:
        draw = -text_hash(row.where)  # the same rows each time, in any order of reading
        if len(self._heap) < SAMPLE or draw > self._heap[0][0]:
            self._offer((draw, (*row.texts, row.prompt)[0][:1000]))

    def _offer(self, sample: tuple[int, str]) -> None:
        (heapq.heappush if len(self._heap) < SAMPLE else heapq.heappushpop)(self._heap, sample)

    def merge(self, other: Languages) -> None:
        for draw in other._heap:
            self._offer(draw)

    def findings(self) -> Named:
        languages = self.columns.languages
        if languages:
            yield "languages", _finding(languages, languages.total(), "as the rows say")
        elif guesser() is None:
            yield "languages", Finding(TITLE, 0, 0, (), "not known: pip install 'penchant[languages]'")
        else:
            counts = Counter(guess(text) for _, text in sorted(self._heap))
            yield (
                "languages",
                _finding(counts, len(self._heap), f"guessed for {counted(len(self._heap), 'row')}", guessed=True),
            )


def _finding(counts: Counter[str], total: int, how: str, guessed: bool = False) -> Finding:
    top = sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))[:SHOWN]
    names = ", ".join(f"{name} {n / total:.1%}" for name, n in top) if total else "none"
    note = f"{how}: {names}"
    top_count = top[0][1] if top else 0
    return estimated_finding(TITLE, top_count, total, note) if guessed else Finding(TITLE, top_count, total, (), note)
