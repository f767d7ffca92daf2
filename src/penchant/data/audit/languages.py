"""Which languages the rows are in: as their own column says, else guessed for a sample."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from functools import cache

from penchant.base.text import counted
from penchant.data.audit.counters import Named, View
from penchant.data.audit.findings import Finding, sampled
from penchant.data.load import Columns

SAMPLE = 2000  # rows
SHOWN = 8  # languages named
LETTERS = 20  # a shorter text is not guessed
TITLE = "rows in the most common language"


@cache
def guesser() -> Callable[[str], str] | None:
    """py3langid's classifier, None where it is not installed."""
    try:
        from py3langid import classify
    except ImportError:
        return None
    return lambda text: str(classify(text)[0])


def guess(text: str) -> str:
    """A text's language, ``?`` where there is too little of it."""
    classify = guesser()
    assert classify is not None
    return classify(text) if sum(map(str.isalpha, text)) >= LETTERS else "?"


def draw(index: int) -> int:
    """A number that decides whether a row is in the sample; the same rows each time (splitmix64)."""
    x = (index * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & (1 << 64) - 1
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & (1 << 64) - 1
    return x ^ x >> 31


class Languages:
    """What the rows' own columns say, else the languages of `SAMPLE` rows (their answer, or their prompt where they have none)."""

    def __init__(self, columns: Columns) -> None:
        self._heap: list[tuple[int, str]] = []  # those with the smallest draws; the largest of them first
        self.columns = columns

    def update(self, row: View) -> None:
        drawn = -draw(row.index)
        if len(self._heap) < SAMPLE:
            heapq.heappush(self._heap, (drawn, (*row.texts, row.prompt)[0][:1000]))
        elif drawn > self._heap[0][0]:
            heapq.heapreplace(self._heap, (drawn, (*row.texts, row.prompt)[0][:1000]))

    def findings(self) -> Named:
        said = self.columns.languages
        if said:
            yield "languages", _finding(said, said.total(), "as the rows say")
        elif guesser() is None:
            yield "languages", Finding(TITLE, 0, 0, (), "not known: pip install 'penchant[languages]'")
        else:
            counts = Counter(guess(text) for _, text in sorted(self._heap))
            yield (
                "languages",
                _finding(counts, len(self._heap), f"guessed for {counted(len(self._heap), 'row')}", guessed=True),
            )


def _finding(counts: Counter[str], of: int, how: str, guessed: bool = False) -> Finding:
    shown = sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))[:SHOWN]
    names = ", ".join(f"{name} {n / of:.1%}" for name, n in shown) if of else "none"
    note = f"{how}: {names}"
    most = shown[0][1] if shown else 0
    return sampled(TITLE, most, of, note) if guessed else Finding(TITLE, most, of, (), note)
