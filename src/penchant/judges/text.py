"""Text of others, shown."""

from __future__ import annotations

from penchant.printable import printable


def shown(text: str) -> str:
    """Text of others as it may stand in a terminal: one line, control characters escaped."""
    return printable(" ".join(text.split()))
