"""Words and numbers for a terminal. What comes from files, models or data may hold anything, so nothing of it reaches the terminal as it is."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

LARGEST = 1e100  # differences of larger numbers may not be finite


def clean(text: object, most: int = 4000) -> str:
    """A text as one line that no terminal acts on: control, format and bidirectional characters are written out as escapes."""
    return "".join(_shown(c) for c in str(text)[:most])


def _shown(c: str) -> str:
    if c == "\n":
        return "↵ "
    if c.isprintable():
        return c
    if c == "\t" or unicodedata.category(c) == "Zs":
        return " "
    return c.encode("unicode_escape").decode("ascii")


def number(value: Any) -> float | None:
    """A number that can be drawn, or None for anything else that a file may hold in its place."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        made = float(value)
    except OverflowError:
        return None
    return made if math.isfinite(made) and abs(made) < LARGEST else None


def whole(value: Any) -> int | None:
    """A number of steps: whole and not below 0."""
    made = number(value)
    return int(made) if made is not None and made >= 0 and made == int(made) else None


def interval(value: Any) -> tuple[float, float] | None:
    """(low, high), or None."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def figure(value: float | None) -> str:
    """A figure with four decimals, fewer where it is large: ``0.5833``, ``-165.74``, ``1.20e-05``."""
    if value is None:
        return "-"
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.{4 if size < 10 else 2 if size < 1000 else 0}f}"


def with_interval(value: float | None, ci: tuple[float, float] | None) -> str:
    """``0.7000 [0.6000, 0.8000]``."""
    return figure(value) if ci is None else f"{figure(value)} [{figure(ci[0])}, {figure(ci[1])}]"
