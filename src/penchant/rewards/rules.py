"""Rules of length and format as rewards: ``words:20-60``, ``matches:REGEX``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from penchant.errors import ConfigError

Rule = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


def words_between(given: str) -> Rule:
    """0 for a completion of so many words (``20-60``, ``20-``, ``-60``), minus 1 for each word too few or too many."""
    found = re.fullmatch(r"(\d*)-(\d*)", given)
    low, high = (int(n) if n else None for n in found.groups()) if found else (None, None)
    if found is None or (low is None and high is None) or (low is not None and high is not None and low > high):
        raise ConfigError("reward", f"words:{given} is no range of words", "write words:20-60, words:20- or words:-60")

    def rule(prompts: Sequence[str], completions: Sequence[str]) -> Sequence[float]:
        counts = [len(c.split()) for c in completions]
        return [float(min(0, n - (low or 0)) + (min(0, high - n) if high is not None else 0)) for n in counts]

    return rule


def matches(given: str) -> Rule:
    """1 where the regular expression is found in the completion (``^``, ``$``: its start, its end; ``.`` is any character), else 0."""
    try:
        pattern = re.compile(given, re.DOTALL)
    except re.error as error:
        raise ConfigError("reward", f"matches:{given} is no regular expression ({error})", "mend it") from error

    def rule(prompts: Sequence[str], completions: Sequence[str]) -> Sequence[float]:
        return [float(pattern.search(c) is not None) for c in completions]

    return rule


RULES: dict[str, Callable[[str], Rule]] = {"words": words_between, "matches": matches}


def rule_of(name: str) -> Rule | None:
    """The rule of a reward's name, None where it is another kind of reward.

    Raises:
        ConfigError: a rule that cannot be read.
    """
    kind, colon, given = name.partition(":")
    return RULES[kind](given) if colon and kind in RULES else None
