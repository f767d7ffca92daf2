"""What a reward or a person's own function says of the rows: disagreement with the labels, texts it points at."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from penchant.data.accumulators import Named, View
from penchant.data.findings import KEPT, Finding, Tally, sampled
from penchant.errors import DataError

BATCH = 64
SURE = 0.9  # the reward is sure of itself from this probability on

RewardFunction = Callable[[Sequence[str], Sequence[str]], Any]
TextFunction = Callable[[Sequence[str]], Any]


class Disagreement:
    """Pairs of which a reward prefers the rejected answer: an estimate of how noisy the labels are.

    The reward's margins are calibrated on the pairs themselves: the scale s that makes sigmoid(s * margin) the likeliest
    probabilities of the labels. A reward that knows nothing of the labels gets s = 0 and is sure of nothing.
    """

    def __init__(self, name: str, reward: RewardFunction) -> None:
        self.name, self.reward = name, reward
        self._waiting: list[View] = []
        self._margins = array("d")
        self._worst: list[tuple[float, int, str]] = []

    def update(self, row: View) -> None:
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
        against = decided[decided < 0]
        scale = calibrate(decided)
        sure = int((-scale * against > np.log(SURE / (1 - SURE))).sum())
        places = tuple(where for _, _, where in sorted(self._worst, reverse=True))
        note = f"{len(margins) - len(decided):,} ties apart; " if len(margins) > len(decided) else ""
        note += (
            f"in {sure:,} of them it is at least {SURE:.0%} sure (margins times {scale:.3g}), the largest margin first"
        )
        title = f"label noise: {self.name} prefers the rejected answer"
        yield (
            "reward_disagreement",
            sampled(title, len(against), len(decided), note, where=places, advice="look at the first of these places"),
        )


def calibrate(margins: np.ndarray) -> float:
    """The s >= 0 that maximises the sum of log sigmoid(s * margin); at most 1000 / the mean margin where no pair disagrees."""
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
    """The derivative of the sum of log sigmoid(s m): of m times sigmoid(-s m)."""
    return float((margins * np.exp(-np.logaddexp(0.0, s * margins))).sum())


class Check:
    """A person's own function over all texts: it gets a list of texts and returns a bool or a number of each."""

    def __init__(self, name: str, function: TextFunction) -> None:
        self.name, self.function = name, function
        self._texts: list[str] = []
        self._places: list[str] = []
        self._values = array("d")
        self._tally = Tally()
        self._bools = True

    def update(self, row: View) -> None:
        for what, text in [("prompt", row.prompt), *((f"answer {i}", t) for i, t in enumerate(row.texts, 1))]:
            self._texts.append(text)
            self._places.append(f"{row.where} ({what})")
        if len(self._texts) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        if not self._texts:
            return
        texts, places = self._texts, self._places
        self._texts, self._places = [], []
        values = _checked(self.name, self.function, texts)
        self._bools &= bool(np.isin(values, (0.0, 1.0)).all())
        self._values.extend(values.tolist())
        for place, value in zip(places, values.tolist(), strict=True):
            if value >= 0.5:
                self._tally.add(place)

    def findings(self) -> Named:
        self._flush()
        values = np.array(self._values)
        note = (
            ""
            if self._bools or not len(values)
            else "quantiles {:.3g}, {:.3g}, {:.3g} (50%, 95%, 99%)".format(*np.quantile(values, [0.5, 0.95, 0.99]))
        )
        title = f"texts of which {self.name} says {'yes' if self._bools else 'at least 0.5'}"
        yield f"check_{self.name}", Finding(title, self._tally.count, len(values), tuple(self._tally.where), note)


def _checked(name: str, function: TextFunction, texts: list[str]) -> np.ndarray:
    try:
        values = np.asarray([float(v) for v in function(list(texts))], dtype=np.float64)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(
            f"check {name}", what, "it gets a list of texts and returns a bool or a number of each"
        ) from error
    if values.shape != (len(texts),) or not np.isfinite(values).all():
        raise DataError(
            f"check {name}",
            f"returned {values.size} values for {len(texts)} texts"
            if values.size != len(texts)
            else "returned NaN or infinity",
            "return one finite number or bool for each text, in order",
        )
    return values
