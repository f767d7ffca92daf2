"""What a pairwise judge is asked and what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Progress = Callable[[int, int], None]
FIRST, TIE, SECOND = 1.0, 0.5, 0.0


@dataclass(frozen=True, slots=True)
class Question:
    """Two answers to a prompt, in the order in which the judge reads them; texts without special tokens."""

    prompt: str
    first: str
    second: str

    @property
    def swapped(self) -> Question:
        """The same question, the other way round."""
        return Question(self.prompt, self.second, self.first)


@dataclass(frozen=True, slots=True)
class Answers:
    """What a judge said, question by question.

    Args:
        values: how much the first answer is preferred, (n,) in [0, 1]: 1 first, 0 second, 0.5 a tie; NaN where nothing could be read.
        graded: whether the value is a number of the judge's own rather than a word, (n,).
        asked: how many questions there were; cached: how many of them an earlier comparison had put, so that nobody was asked.
        unread: the first few replies that could not be read, or why there was none.
    """

    values: np.ndarray
    graded: np.ndarray
    asked: int
    cached: int = 0
    unread: list[str] = field(default_factory=list)


class PairJudge(Protocol):
    """Anything that decides between two answers."""

    @property
    def name(self) -> str:
        """What it is called in tables and sentences."""
        ...

    def check(self) -> str | None:
        """Fail now, with a sentence, rather than when the models have written; a sentence where something is odd.

        Raises:
            RewardError, CheckpointError: it cannot be asked.
        """
        ...

    def ask(self, questions: Sequence[Question], progress: Progress | None = None) -> Answers:
        """Decide each question, in the order in which its answers are given.

        Raises:
            RewardError: it broke, or cannot be reached.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What its verdicts depend on, as it stands in comparison.json; never a key."""
        ...
