"""Text of others, shown."""

from __future__ import annotations


def shown(text: str) -> str:
    """Text of others as it may stand in a terminal: one line, control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
