"""Judging in both orders: wins, ties, and position bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from penchant.judges import Answers, Question, ask_both_orders

NAN = float("nan")


@dataclass
class Says:
    """A judge defined by a table ``{(first, second): preference for the first}``."""

    table: dict[tuple[str, str], float]
    graded: bool = False
    name: str = "says"
    asked: list[Question] = field(default_factory=list)

    def check(self) -> None: ...

    def describe(self) -> dict[str, Any]:
        return {}

    def ask(self, questions: Sequence[Question], progress: Any = None) -> Answers:
        self.asked += questions
        values = np.array([self.table[q.first, q.second] for q in questions])
        return Answers(values, np.full(len(values), self.graded), len(values))


def wins(first: float, swapped: float, graded: bool = False) -> tuple[float, bool, float]:
    """(win of a, agreed, preference for the first position) of verdicts on (a, b) and on (b, a)."""
    both = ask_both_orders(Says({("a", "b"): first, ("b", "a"): swapped}, graded), [Question("p", "a", "b")])
    return both.wins[0], bool(both.agreed[0]), both.first_position[0]


@pytest.mark.parametrize(
    ("first", "swapped", "expected"),
    [
        (1.0, 0.0, (1.0, True, 0.5)),  # a both times
        (0.0, 1.0, (0.0, True, 0.5)),  # b both times
        (0.5, 0.5, (0.5, True, 0.5)),
        (1.0, 1.0, (0.5, False, 1.0)),  # the first position both times
        (0.0, 0.0, (0.5, False, 0.0)),
        (1.0, 0.5, (0.5, False, 0.75)),  # a win and a tie make no win
    ],
)
def test_words_win_where_both_orders_agree(first: float, swapped: float, expected: tuple[float, bool, float]) -> None:
    assert wins(first, swapped) == expected


def test_numbers_are_averaged() -> None:
    assert wins(0.9, 0.3, graded=True) == (pytest.approx(0.8), True, pytest.approx(0.6))
    assert wins(0.9, 0.6, graded=True) == (pytest.approx(0.65), False, pytest.approx(0.75))
    assert wins(1.0, 0.5, graded=True)[0] == 0.75


def test_a_missing_verdict_leaves_the_pair_out() -> None:
    both = ask_both_orders(Says({("a", "b"): NAN, ("b", "a"): 1.0}), [Question("p", "a", "b")])
    assert np.isnan(both.wins[0]) and not both.agreed[0] and np.isnan(both.first_position[0]) and both.failures == 1


def test_equal_texts_are_a_tie_that_nobody_is_asked_and_no_question_is_put_twice() -> None:
    judge = Says({("a", "b"): 1.0, ("b", "a"): 0.0})
    pairs = [Question("p", "a", "b"), Question("p", "x", "x"), Question("p", "b", "a"), Question("p", "a", "b")]
    both = ask_both_orders(judge, pairs)
    assert both.wins.tolist() == [1.0, 0.5, 0.0, 1.0] and both.identical.tolist() == [False, True, False, False]
    assert judge.asked == [Question("p", "a", "b"), Question("p", "b", "a")] and both.asked == 2
    assert np.isnan(both.first_position[1])
    none = ask_both_orders(judge, [Question("p", "x", "x")])
    assert none.wins.tolist() == [0.5] and none.asked == 0
