"""Built-in rewards: sentiment (VADER), words, matches; the reward section of a config."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import Field, model_serializer, model_validator

from penchant.base.machine import Device
from penchant.base.section import Section
from penchant.errors import ConfigError

RewardFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]  # (prompts, completions) -> one number each

# ---- Rewards by name: VADER's compound score, the number of words ----


@lru_cache(maxsize=1)
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentiment(texts: Iterable[str]) -> np.ndarray:
    """VADER's compound sentiment of each text, in [-1, 1] (Hutto & Gilbert, ICWSM 2014)."""
    analyzer = _analyzer()
    return np.array([analyzer.polarity_scores(text)["compound"] for text in texts], dtype=np.float64)


BUILT_IN: dict[str, RewardFunction] = {
    "sentiment": lambda prompts, completions: [float(v) for v in sentiment(completions)],
    "words": lambda prompts, completions: [float(len(c.split())) for c in completions],  # by a negative weight a price
}


# ---- Rules of length and format as rewards: ``words:20-60``, ``matches:REGEX`` ----


def words_between(given: str) -> RewardFunction:
    """0 for a completion of so many words (``20-60``, ``20-``, ``-60``), minus 1 for each word too few or too many."""
    found = re.fullmatch(r"(\d*)-(\d*)", given)
    low, high = (int(n) if n else None for n in found.groups()) if found else (None, None)
    if found is None or (low is None and high is None) or (low is not None and high is not None and low > high):
        raise ConfigError(
            "reward", f"words:{given} is not a range of words", "write words:20-60, words:20- or words:-60"
        )

    def rule(prompts: Sequence[str], completions: Sequence[str]) -> Sequence[float]:
        counts = [len(c.split()) for c in completions]
        return [float(min(0, n - (low or 0)) + (min(0, high - n) if high is not None else 0)) for n in counts]

    return rule


def matches(given: str) -> RewardFunction:
    """1 where the regular expression is found in the completion (``^``, ``$``: its start, its end; ``.`` is any character), else 0."""
    try:
        pattern = re.compile(given, re.DOTALL)
    except re.error as error:
        raise ConfigError("reward", f"matches:{given} is not a regular expression ({error})", "fix it") from error

    def rule(prompts: Sequence[str], completions: Sequence[str]) -> Sequence[float]:
        return [float(pattern.search(c) is not None) for c in completions]

    return rule


RULES: dict[str, Callable[[str], RewardFunction]] = {"words": words_between, "matches": matches}


def rule_of(name: str) -> RewardFunction | None:
    """The rule of a reward's name; None where it is another kind of reward."""
    kind, colon, given = name.partition(":")
    return RULES[kind](given) if colon and kind in RULES else None


# ---- The `reward` section of a config ----


class RewardConfig(Section):
    """What judges completions: a weighted sum of built-in rewards, Python functions and reward models.

    Written short: ``reward: words``, ``reward: {words: -0.01, runs/reward: 1.0}``, ``reward: {runs/reward: 1.0, device: cpu}``;
    it is kept in the form in which it was written.
    """

    terms: dict[str, float] = Field(description="name, path.py:function or a reward model's folder: its weight")
    device: Device = Field("auto", description="device of reward models; auto: the policy's")
    single: bool = Field(False, description="written as one name")

    @model_validator(mode="before")
    @classmethod
    def _from_shorthand(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"terms": {value: 1.0}, "single": True}
        if isinstance(value, dict) and "terms" not in value:
            terms = {name: weight for name, weight in value.items() if name != "device"}
            bad = [n for n, w in terms.items() if isinstance(w, bool) or not isinstance(w, (int, float))]
            if bad:
                raise ValueError(f"{bad[0]} is {terms[bad[0]]!r}; give each reward a number as its weight")
            return {"terms": {n: float(w) for n, w in terms.items()}} | (
                {"device": value["device"]} if "device" in value else {}
            )
        return value

    @model_serializer
    def _to_shorthand(self) -> Any:
        if self.single and self.device == "auto":
            return next(iter(self.terms))
        return dict(self.terms) | ({"device": self.device} if self.device != "auto" else {})
