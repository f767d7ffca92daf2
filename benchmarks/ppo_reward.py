"""The reward of the PPO benchmark: of the whole text, so that TRL's reward module, which gets no more than tokens, can run it."""

from __future__ import annotations

from collections.abc import Sequence

GOOD = ("good", "great", "love", "thank", "happy", "best", "nice", "glad")
BAD = ("bad", "hate", "worst", "kill", "awful", "stupid", "boring", "sorry")


def of_text(text: str) -> float:
    """Kind words less unkind ones."""
    low = text.lower()
    return float(sum(map(low.count, GOOD)) - sum(map(low.count, BAD)))


def warmth(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The same as a Penchant reward function."""
    return [of_text(p + c) for p, c in zip(prompts, completions, strict=True)]
