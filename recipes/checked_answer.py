"""Reward for recipes/grpo_arithmetic.yaml: whether the last number in a completion is the row's answer."""

import re
from collections.abc import Sequence
from typing import Any


def right(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
    """1 if the last number is the answer, otherwise 0. Completions may be texts or conversations."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(_last_number(text) == str(a)) for text, a in zip(texts, answer, strict=True)]


def _last_number(text: str) -> str:
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else ""
