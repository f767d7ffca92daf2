"""A person's own pairwise judge: ``path.py:function``."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from penchant.base.functions import python_function
from penchant.errors import ConfigError, RewardError
from penchant.files import file_sha256
from penchant.judges.protocol import FIRST, SECOND, TIE, Answers, Progress, Question
from penchant.judges.text import shown

TAKES = ("prompt", "a", "b")
BATCH = "prompts"  # the first parameter's name of a function that takes lists
WORDS = {"a": FIRST, "b": SECOND, "tie": TIE}
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
        return {"kind": "function", "function": self.name, "sha256": file_sha256(_file(self.name))}

    def _one(self, at: int, q: Question) -> Any:
        try:
            return self.function(q.prompt, q.first, q.second)
        except Exception as error:
            raise RewardError(
                f"judge {self.name}",
                f"{type(error).__name__}: {shown(str(error))} (pair {at}: {q.first[:40]!r} and {q.second[:40]!r})",
                "mend the function; it gets a prompt and two answers",
            ) from error

    def _all(self, questions: Sequence[Question]) -> list[Any]:
        if not questions:
            return []
        try:
            given = self.function(
                [q.prompt for q in questions], [q.first for q in questions], [q.second for q in questions]
            )
        except Exception as error:
            raise RewardError(
                f"judge {self.name}",
                f"{type(error).__name__}: {shown(str(error))}",
                "mend the function; it gets lists of prompts, of first and of second answers",
            ) from error
        if hasattr(given, "detach"):  # a tensor, wherever it is
            given = given.detach().double().cpu().numpy()
        if isinstance(given, str) or not hasattr(given, "__len__"):
            raise RewardError(f"judge {self.name}", f"returned {type(given).__name__}", "return a list of verdicts")
        if len(given) != len(questions):
            raise RewardError(
                f"judge {self.name}",
                f"returned {len(given)} verdicts for {len(questions)} pairs",
                "return one for each pair, in order",
            )
        return list(given)

    def _value(self, at: int, verdict: Any, q: Question) -> float:
        if isinstance(verdict, str) and verdict.strip().lower() in WORDS:
            return WORDS[verdict.strip().lower()]
        if isinstance(verdict, (numbers.Real, np.bool_)) and 0.0 <= float(verdict) <= 1.0:
            return float(verdict)
        raise RewardError(
            f"judge {self.name}",
            f"returned {str(verdict)[:60]!r} for pair {at} ({q.first[:40]!r} and {q.second[:40]!r})",
            RETURN,
        )


def load_function_judge(spec: str) -> FunctionJudge:
    """A judge from ``path.py:function``.

    A function whose first parameter is called ``prompts`` gets lists of all prompts, first and second answers and returns a list; any other one
    gets a prompt and two answers at a time.

    Raises:
        ConfigError: no such file or function, or it does not take three arguments.
    """
    path, colon, _ = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ConfigError(
            "judge", f"{spec!r} is no judge", "give path.py:function, or an endpoint: http://HOST:PORT/v1"
        )
    function = python_function(spec, "judge", TAKES)
    first = next(iter(inspect.signature(function).parameters), "")
    return FunctionJudge(spec, function, first == BATCH)


def _file(spec: str) -> Path:
    return Path(spec.rpartition(":")[0]).expanduser()
