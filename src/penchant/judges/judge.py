"""What a pairwise judge is, each pair asked in both orders, and a person's own function as a judge."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from penchant.base.functions import is_own, own_sha256, python_function
from penchant.base.text import counted, shown
from penchant.errors import ConfigError, RewardError

Progress = Callable[[int, int], None]
FIRST, TIE, SECOND = 1.0, 0.5, 0.0
WORDS = {"a": FIRST, "b": SECOND, "tie": TIE}


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
        """What its verdicts depend on, as written in comparison.json; never a key."""
        ...


# ---- both orders ----


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


# ---- a Python function ----

TAKES = ("prompt", "a", "b")
BATCH = "prompts"  # the first parameter's name of a function that takes lists
RETURN = 'return "a", "b" or "tie", or how much a is preferred as a number from 0 to 1'


@dataclass(frozen=True, slots=True)
class FunctionJudge:
    """A Python function that decides between two answers.

    Args:
        name: as it was given; function: called with (prompt, a, b), or where `batch` with three lists.
    """

    name: str
    function: Callable[..., Any]
    batch: bool

    def check(self) -> str | None:
        """Nothing: loading it has looked at it."""
        return None

    def ask(self, questions: Sequence[Question], progress: Progress | None = None) -> Answers:
        """Its verdict of each question.

        Raises:
            RewardError: it raised, or returned no verdict; the question that is to blame is named.
        """
        given = self._all(questions) if self.batch else [self._one(i, q) for i, q in enumerate(questions)]
        if progress is not None and questions:
            progress(len(questions), len(questions))
        values = np.array([self._value(i, v, questions[i]) for i, v in enumerate(given)], dtype=np.float64)
        return Answers(values, np.array([not isinstance(v, str) for v in given], dtype=bool), len(questions))

    def describe(self) -> dict[str, Any]:
        """Its name, and what its file held."""
        return {"kind": "function", "function": self.name, "sha256": own_sha256(self.name)}

    def _one(self, at: int, q: Question) -> Any:
        return self._called((q.prompt, q.first, q.second), f" (pair {at}: {_answers(q)})", "a prompt and two answers")

    def _all(self, questions: Sequence[Question]) -> list[Any]:
        if not questions:
            return []
        lists = ([q.prompt for q in questions], [q.first for q in questions], [q.second for q in questions])
        given = self._called(lists, "", "lists of prompts, of first and of second answers")
        if hasattr(given, "detach"):  # a tensor, wherever it is
            given = given.detach().cpu().double().numpy()
        if isinstance(given, str) or not hasattr(given, "__len__"):
            raise RewardError(f"judge {self.name}", f"returned {type(given).__name__}", "return a list of verdicts")
        if len(given) != len(questions):
            what = f"returned {len(given)} verdicts for {counted(len(questions), 'pair')}"
            raise RewardError(f"judge {self.name}", what, "return one for each pair, in order")
        return list(given)

    def _called(self, arguments: tuple[Any, ...], where: str, gets: str) -> Any:
        try:
            return self.function(*arguments)
        except Exception as error:
            what = f"{type(error).__name__}: {shown(str(error))}{where}"
            raise RewardError(f"judge {self.name}", what, f"fix the function; it gets {gets}") from error

    def _value(self, at: int, verdict: Any, q: Question) -> float:
        if isinstance(verdict, str) and verdict.strip().lower() in WORDS:
            return WORDS[verdict.strip().lower()]
        if isinstance(verdict, (numbers.Real, np.bool_)) and 0.0 <= float(verdict) <= 1.0:
            return float(verdict)
        raise RewardError(f"judge {self.name}", f"returned {str(verdict)[:60]!r} for pair {at} ({_answers(q)})", RETURN)


def _answers(q: Question) -> str:
    return f"{q.first[:40]!r} and {q.second[:40]!r}"


def load_function_judge(spec: str) -> FunctionJudge:
    """A judge from ``path.py:function``.

    A function whose first parameter is called ``prompts`` gets lists of all prompts, first and second answers and returns a list; any other one
    gets a prompt and two answers at a time.

    Raises:
        ConfigError: no such file or function, or it does not take three arguments.
    """
    if not is_own(spec):
        how = "give path.py:function, or an endpoint: http://HOST:PORT/v1"
        raise ConfigError("judge", f"{spec!r} is not a judge", how)
    function = python_function(spec, "judge", TAKES)
    first = next(iter(inspect.signature(function).parameters), "")
    return FunctionJudge(spec, function, first == BATCH)
