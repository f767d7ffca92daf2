"""Figures as a person reads them, and round places on an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

MISSING = "–"
MINUS = "\u2212"
Point = tuple[float, float]


def number(value: float | None) -> str:
    """Three significant digits, thousands separated, exponents only where they help."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return _minus(f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e"))
    if size >= 1000:
        return _minus(f"{value:,.0f}")
    return _minus(f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}")


def percent(value: float | None) -> str:
    """A share as a percentage with one digit."""
    return MISSING if value is None or not math.isfinite(value) else _minus(f"{100 * value:.1f}%")


def shown(value: float | None, share: bool = False) -> str:
    """A figure by its kind."""
    return percent(value) if share else number(value)


def interval(low: float, high: float, share: bool = False) -> str:
    """``[low, high]`` with as many digits as its width deserves."""
    if share:
        return f"[{percent(low)}, {percent(high)}]"
    digits = _digits(low, high)
    if digits is None:
        return f"[{number(low)}, {number(high)}]"
    return f"[{_fixed(low, digits)}, {_fixed(high, digits)}]"


def estimate(value: float | None, ci: tuple[float, float] | None, share: bool = False) -> str:
    """A figure with as many digits as its interval."""
    digits = None if share or ci is None else _digits(*ci)
    if value is None or digits is None:
        return shown(value, share)
    return _fixed(value, digits)


def _digits(low: float, high: float) -> int | None:
    """Decimals: two digits of the width, and so many that an end beside zero does not look like zero; None: as any number."""
    width = high - low
    if not math.isfinite(width) or width <= 0 or max(abs(low), abs(high)) >= 1e6:
        return None
    digits = max(0, 1 - math.floor(math.log10(width)))
    nearest = min((abs(v) for v in (low, high) if v), default=width)
    return min(6, max(digits, min(digits + 2, -math.floor(math.log10(nearest)))))


def _fixed(value: float, digits: int) -> str:
    text = f"{value:,.{digits}f}"
    return _minus(text if float(text.replace(",", "")) != 0 else text.lstrip("-"))


def _minus(text: str) -> str:
    return text.replace("-", MINUS, 1) if text.startswith("-") else text


def duration(seconds: float | None) -> str:
    """``1 h 05 min``, ``12 min 30 s``, ``45 s``."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    days, hours = divmod(whole // 3600, 24)
    return (f"{days} d " if days else "") + f"{hours} h {whole % 3600 // 60:02d} min"


def count(n: float, one: str, many: str | None = None) -> str:
    """``1 run``, ``1,200 runs``."""
    return f"{n:,.0f} {one if n == 1 else many or one + 's'}"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round positions between low and high: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = span / wanted
    base = 10.0 ** math.floor(math.log10(raw))
    step = next((m * base for m in (1, 2, 5, 10) if m * base >= raw * (1 - 1e-9)), 10 * base)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [round(i * step, digits) + 0.0 for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round positions on a log axis: 1, 2, 5 times powers of ten; of many decades powers of ten only."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors: Sequence[int] = (1, 2, 5) if last - first <= 3 else (1,)
    every = max(1, (last - first) // 6)
    found = [m * 10.0**e for e in range(first, last + 1) for m in factors if len(factors) > 1 or e % every == 0]
    return [t for t in found if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)] or [low]


def tick_labels(places: Sequence[float]) -> list[str]:
    """One text a tick, all with the same number of decimals."""
    if not places:
        return []
    sizes = [abs(p) for p in places if p]
    if sizes and (max(sizes) >= 1e5 or min(sizes) < 1e-4):
        return [_short(p) for p in places]
    steps = [abs(b - a) for a, b in pairwise(places) if b != a]
    digits = max(0, min(6, -math.floor(math.log10(min(steps)) + 1e-9))) if steps else 2
    return [_fixed(p, digits) for p in places]


def log_labels(places: Sequence[float]) -> list[str]:
    """One text a tick of a log axis."""
    return [_short(p) if p >= 1e5 or p < 1e-3 else f"{p:,.10g}" for p in places]


def _short(value: float) -> str:
    if value == 0:
        return "0"
    return _minus(f"{value:.6g}" if 1e-4 <= abs(value) < 1e5 else _exponent(value))


def _exponent(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def thin(points: Sequence[Point], columns: int) -> list[Point]:
    """What a line of many points looks like in so many columns: the first, lowest, highest and last point of each.

    Nothing that the eye could see is lost: every peak stays.
    """
    if len(points) <= 4 * columns:
        return list(points)
    low, high = points[0][0], points[-1][0]
    width = (high - low) / columns or 1.0
    kept: list[Point] = []
    bucket: list[Point] = []
    at = 0
    for p in points:
        place = min(columns - 1, int((p[0] - low) / width))
        if place != at and bucket:
            kept += _outline(bucket)
            bucket = []
        at = place
        bucket.append(p)
    return kept + _outline(bucket)


def _outline(bucket: Sequence[Point]) -> list[Point]:
    ends = {bucket[0], bucket[-1], min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
    return sorted(ends)


def smooth(points: Sequence[Point], windows: int = 30) -> tuple[list[Point], int]:
    """Means of a moving, centred window, and how many points it holds; at the ends the window is what there is of it."""
    half = max(2, len(points) // windows // 2)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    made = []
    for i, (x, _) in enumerate(points):
        a, b = max(0, i - half), min(len(points), i + half + 1)
        made.append((x, (sums[b] - sums[a]) / (b - a)))
    return made, 2 * half + 1


def spread_out(items: Sequence[int], limit: int) -> list[int]:
    """At most `limit` of sorted numbers, evenly among them, with the first and the last."""
    if len(items) <= limit:
        return list(items)
    places = sorted({round(i * (len(items) - 1) / (limit - 1)) for i in range(limit)})
    return [items[p] for p in places]
