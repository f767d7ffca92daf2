"""Text of others as it may reach a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` with whatever is not printable written out as an escape: a name may come from a stranger's file."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shown(text: str) -> str:
    """Text of others on one line, control characters escaped."""
    return printable(" ".join(text.split()))
