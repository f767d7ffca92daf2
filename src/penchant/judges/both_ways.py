"""Each pair asked in both orders: what is left of a verdict when the position is taken out, and how large the position was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from penchant.judges.protocol import FIRST, TIE, PairJudge, Progress, Question


@dataclass(frozen=True, slots=True)
class BothWays:
    """What a judge made of pairs of answers a and b, each asked as (a, b) and as (b, a).

    Args:
        values: preference for the answer that stood first, (n, 2) in both orders; NaN where nothing could be read or nothing was asked.
        wins: of a, (n,): 1 won, 0 lost, 0.5 a tie; NaN where one of both verdicts is missing.
        agreed: whether both verdicts name the same one, (n,); identical: texts that are equal, so that nobody was asked, (n,).
        asked, cached, failures: questions in all, those answered by an earlier comparison, and those left without a verdict.
    """

    values: np.ndarray
    wins: np.ndarray
    agreed: np.ndarray
    identical: np.ndarray
    asked: int
    cached: int
    failures: int
    unread: list[str]

    @property
    def first_position(self) -> np.ndarray:
        """Mean preference of each pair's two verdicts for the first position, (n,); one half without a bias."""
        return np.asarray(self.values.mean(1))


def ask_both_ways(judge: PairJudge, pairs: Sequence[Question], progress: Progress | None = None) -> BothWays:
    """Ask for each pair twice, with its answers in either order; the same question is put once.

    Verdicts in words make a win where both orders name the same answer, else a tie. Verdicts in numbers are averaged:
    ``(v(a, b) + 1 - v(b, a)) / 2``.

    Papers: arXiv 2306.05685, 2305.17926.
    """
    identical = np.array([p.first == p.second for p in pairs], dtype=bool)
    both = [(p, p.swapped) for p in pairs]
    questions = list(dict.fromkeys(q for two, same in zip(both, identical, strict=True) if not same for q in two))
    found = judge.ask(questions, progress)
    place = {q: i for i, q in enumerate(questions)}
    values = np.full((len(pairs), 2), np.nan)
    graded = np.zeros((len(pairs), 2), dtype=bool)
    for i in np.flatnonzero(~identical).tolist():
        at = [place[q] for q in both[i]]
        values[i], graded[i] = found.values[at], found.graded[at]
    preferred = np.stack([values[:, 0], 1.0 - values[:, 1]], axis=1)  # of a
    agreed = (np.sign(preferred[:, 0] - TIE) == np.sign(preferred[:, 1] - TIE)) & ~np.isnan(preferred).any(1)
    wins = np.where(graded.any(1) | agreed | np.isnan(preferred).any(1), preferred.mean(1), TIE)
    wins[identical] = TIE
    failures = int(np.isnan(found.values).sum())
    return BothWays(values, wins, agreed, identical, found.asked, found.cached, failures, found.unread)


__all__ = ["FIRST", "BothWays", "ask_both_ways"]
