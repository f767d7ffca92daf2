"""Reward of the PPO and GRPO benchmarks: a function of the whole text, since TRL's PPO reward module sees only tokens."""

from __future__ import annotations

from collections.abc import Sequence

GOOD = ("good", "great", "love", "thank", "happy", "best", "nice", "glad")
BAD = ("bad", "hate", "worst", "kill", "awful", "stupid", "boring", "sorry")


def of_text(text: str) -> float:
    """Number of kind words minus number of unkind ones."""
    low = text.lower()
    return float(sum(map(low.count, GOOD)) - sum(map(low.count, BAD)))


def warmth(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """`of_text` as a Penchant reward function."""
    return [of_text(p + c) for p, c in zip(prompts, completions, strict=True)]
