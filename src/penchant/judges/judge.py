"""The protocol of pairwise judges, judging each pair in both orders, and judges that are Python functions."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from penchant.base.functions import guarded, is_own, own_sha256, python_function
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
        """The question with its answers in the opposite order."""
        return Question(self.prompt, self.second, self.first)


@dataclass(frozen=True, slots=True)
class Answers:
    """A judge's verdicts, question by question.

    Args:
        values: preference for the first answer, (n,) in [0, 1]: 1 first, 0 second, 0.5 a tie; NaN if the reply could not be read.
        graded: whether the judge gave a number rather than a word, (n,).
        asked: number of questions; cached: how many of them were answered from the cache of an earlier comparison.
        unread: the first few replies that could not be read, or the reasons why there was none.
    """

    values: np.ndarray
    graded: np.ndarray
    asked: int
    cached: int = 0
    unread: list[str] = field(default_factory=list)


class PairJudge(Protocol):
    """Protocol of anything that decides between two answers."""

    @property
    def name(self) -> str:
        """Its name in tables and sentences."""
        ...

    def check(self) -> str | None:
        """Fail early, before models generate, if the judge cannot be used; return a note if something looks wrong.

        Raises:
            RewardError, CheckpointError: the judge cannot be used.
        """
        ...

    def ask(self, questions: Sequence[Question], progress: Progress | None = None) -> Answers:
        """Judge each question, with its answers in the given order.

        Raises:
            RewardError: the judge failed or cannot be reached.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Everything its verdicts depend on, for comparison.json; never an API key."""
        ...


# ---- both orders ----


@dataclass(frozen=True, slots=True)
class BothOrders:
    """A judge's verdicts on pairs of answers a and b, each asked as (a, b) and as (b, a).

    Args:
        values: preference for the first position in both orders, (n, 2); NaN if the reply could not be read or the pair was not asked.
        wins: of a, (n,): 1 won, 0 lost, 0.5 a tie; NaN if either verdict is missing.
        agreed: whether both verdicts name the same answer, (n,); identical: whether both texts are equal, so the pair was not asked, (n,).
        asked, cached, failures: number of questions, of those answered from the cache, and of those without a verdict.
        unread: as in `Answers`.
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
        """Mean preference for the first position over each pair's two verdicts, (n,); one half means no bias."""
        return np.asarray(self.values.mean(1))


def ask_both_orders(judge: PairJudge, pairs: Sequence[Question], progress: Progress | None = None) -> BothOrders:
    """Judge each pair in both orders of its answers; duplicate questions are asked only once.

    Verdicts in words count as a win if both orders name the same answer, else as a tie. Verdicts in numbers are averaged:
    ``(v(a, b) + 1 - v(b, a)) / 2``.

    Papers: arXiv 2306.05685, 2305.17926.
    """
    identical = np.array([p.first == p.second for p in pairs], dtype=bool)
    orders = [(p, p.swapped) for p in pairs]
    questions = list(dict.fromkeys(q for pair, same in zip(orders, identical, strict=True) if not same for q in pair))
    answers = judge.ask(questions, progress)
    index = {q: i for i, q in enumerate(questions)}
    values = np.full((len(pairs), 2), np.nan)
    graded = np.zeros((len(pairs), 2), dtype=bool)
    for i in np.flatnonzero(~identical).tolist():
        rows = [index[q] for q in orders[i]]
        values[i], graded[i] = answers.values[rows], answers.graded[rows]
    preferred = np.stack([values[:, 0], 1.0 - values[:, 1]], axis=1)  # preference for a
    agreed = (np.sign(preferred[:, 0] - TIE) == np.sign(preferred[:, 1] - TIE)) & ~np.isnan(preferred).any(1)
    wins = np.where(graded.any(1) | agreed | np.isnan(preferred).any(1), preferred.mean(1), TIE)
    wins[identical] = TIE
    failures = int(np.isnan(answers.values).sum())
    return BothOrders(values, wins, agreed, identical, answers.asked, answers.cached, failures, answers.unread)


# ---- a Python function ----

PARAMETERS = ("prompt", "a", "b")
BATCH = "prompts"  # name of the first parameter if the function takes lists
RETURN = 'return "a", "b" or "tie", or how much a is preferred as a number from 0 to 1'


@dataclass(frozen=True, slots=True)
class FunctionJudge:
    """A Python function that decides between two answers.

    Args:
        name: as given; function: called with (prompt, a, b), or with three lists if `batch`.
    """

    name: str
    function: Callable[..., Any]
    batch: bool

    def check(self) -> str | None:
        """Nothing to check: loading has already validated the function."""
        return None

    def ask(self, questions: Sequence[Question], progress: Progress | None = None) -> Answers:
        """Return the function's verdict on each question.

        Raises:
            RewardError: the function raised, or returned an invalid verdict; the message names the question.
        """
        verdicts = (
            self._judge_batch(questions) if self.batch else [self._judge_one(i, q) for i, q in enumerate(questions)]
        )
        if progress is not None and questions:
            progress(len(questions), len(questions))
        values = np.array([self._parse_verdict(i, v, questions[i]) for i, v in enumerate(verdicts)], dtype=np.float64)
        return Answers(values, np.array([not isinstance(v, str) for v in verdicts], dtype=bool), len(questions))

    def describe(self) -> dict[str, Any]:
        """The function's name and the SHA-256 of its code."""
        return {"kind": "function", "function": self.name, "sha256": own_sha256(self.name)}

    def _judge_one(self, pair_index: int, q: Question) -> Any:
        return self._call(
            (q.prompt, q.first, q.second), f" (pair {pair_index}: {_quote_answers(q)})", "a prompt and two answers"
        )

    def _judge_batch(self, questions: Sequence[Question]) -> list[Any]:
        if not questions:
            return []
        lists = ([q.prompt for q in questions], [q.first for q in questions], [q.second for q in questions])
        verdicts = self._call(lists, "", "lists of prompts, of first and of second answers")
        if hasattr(verdicts, "detach"):  # a tensor, on any device
            verdicts = verdicts.detach().cpu().double().numpy()
        if isinstance(verdicts, str) or not hasattr(verdicts, "__len__"):
            raise RewardError(f"judge {self.name}", f"returned {type(verdicts).__name__}", "return a list of verdicts")
        if len(verdicts) != len(questions):
            what = f"returned {len(verdicts)} verdicts for {counted(len(questions), 'pair')}"
            raise RewardError(f"judge {self.name}", what, "return one for each pair, in order")
        return list(verdicts)

    def _call(self, arguments: tuple[Any, ...], where: str, parameters: str) -> Any:
        try:
            return guarded(lambda: self.function(*arguments), None)
        except (Exception, SystemExit) as error:
            what = f"{type(error).__name__}: {shown(str(error))}{where}"
            raise RewardError(f"judge {self.name}", what, f"fix the function; it gets {parameters}") from error

    def _parse_verdict(self, pair_index: int, verdict: Any, q: Question) -> float:
        if isinstance(verdict, str) and verdict.strip().lower() in WORDS:
            return WORDS[verdict.strip().lower()]
        if isinstance(verdict, (numbers.Real, np.bool_)) and 0.0 <= float(verdict) <= 1.0:
            return float(verdict)
        raise RewardError(
            f"judge {self.name}", f"returned {str(verdict)[:60]!r} for pair {pair_index} ({_quote_answers(q)})", RETURN
        )


def _quote_answers(q: Question) -> str:
    return f"{q.first[:40]!r} and {q.second[:40]!r}"


def load_function_judge(spec: str) -> FunctionJudge:
    """Load a judge from ``path.py:function``.

    A function whose first parameter is named ``prompts`` gets lists of all prompts, first and second answers and returns a list. Any
    other function is called with one prompt and two answers at a time.

    Raises:
        ConfigError: no such file or function, or it does not take three arguments.
    """
    if not is_own(spec):
        how = "give path.py:function, or an endpoint: http://HOST:PORT/v1"
        raise ConfigError("judge", f"{spec!r} is not a judge", how)
    function = python_function(spec, "judge", PARAMETERS)
    first = next(iter(inspect.signature(function).parameters), "")
    return FunctionJudge(spec, function, first == BATCH)
