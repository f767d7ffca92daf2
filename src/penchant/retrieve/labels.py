"""Answers without labels become good or bad ones: by a reward and a threshold, or by a person's own function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from penchant.data.converters import RowError, label_field
from penchant.data.load import prompt_text
from penchant.errors import RewardError
from penchant.retrieve.request import GetRequest
from penchant.types import Completion, Prompt, PromptTree

BATCH = 256  # answers that are judged at a time
Judged = Callable[[Sequence[Prompt], Sequence[str]], list[tuple[bool | None, float | None]]]


@dataclass(frozen=True, slots=True)
class Labeller:
    """Labels trees of one answer each, many at a time.

    Args:
        name: of the reward or function; judge: prompts and answers to (label, score); a label of None leaves the answer out.
        sha256: of what it is made of; None for a built-in reward.
    """

    name: str
    judge: Judged
    sha256: str | None

    def label(self, trees: Sequence[PromptTree]) -> list[PromptTree | None]:
        """The trees with labels; None for each that gets none.

        Raises:
            RewardError: the function raised, or gave something else than it should.
        """
        answers = [t.completions[0].text for t in trees]
        found = self.judge([t.prompt for t in trees], answers)
        return [
            None if label is None else replace(t, completions=(Completion(a, label, score),))
            for t, a, (label, score) in zip(trees, answers, found, strict=True)
        ]


def labeller_of(asked: GetRequest) -> Labeller | None:
    """What labels the answers of a request; None where nothing does.

    Raises:
        ConfigError: no such reward, file or function.
    """
    if asked.label_with is not None:
        return Labeller(asked.label_with, _by_function(asked.label_with), _sha256(asked.label_with))
    if asked.reward is None or asked.threshold is None:
        return None
    return Labeller(asked.reward, _by_reward(asked.reward, asked.threshold), _sha256(asked.reward))


def _sha256(name: str) -> str | None:
    from penchant.rewards.model import content_sha256

    return content_sha256(name)


def _by_reward(name: str, threshold: float) -> Judged:
    from penchant.rewards import load_reward

    reward = load_reward(name)
    # a reward model puts messages into its own chat template; a function is promised text
    whole = all(hasattr(term.function, "score_trees") for term in reward.terms)

    def judge(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[tuple[bool | None, float | None]]:
        shown: Any = list(prompts) if whole else [prompt_text(p) for p in prompts]
        return [(bool(v >= threshold), float(v)) for v in reward(shown, answers)]

    return judge


def _by_function(name: str) -> Judged:
    from penchant.base.functions import python_function

    function = python_function(name, "--label-with")

    def judge(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[tuple[bool | None, float | None]]:
        try:
            given = list(function([prompt_text(p) for p in prompts], list(answers)))
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise RewardError(name, what, "mend the function; it gets lists of prompts and answers") from error
        if len(given) != len(answers):
            how = "return one label for each answer: True, False, or None to leave it out"
            raise RewardError(name, f"returned {len(given)} labels for {len(answers)} answers", how)
        return [(None if v is None else _label(name, v), None) for v in given]

    return judge


def _label(name: str, value: Any) -> bool:
    plain = value.item() if hasattr(value, "item") else value
    try:
        return label_field({"label": plain}, "label")
    except RowError as error:
        raise RewardError(name, f"returned {str(value)[:40]!r} as a label", "return True, False or None") from error
