"""Figures in sentences."""

from __future__ import annotations

from penchant.evaluation.trust.figures import Point


def number(value: float) -> str:
    """Three significant digits, no exponent where none is needed."""
    shown = f"{value:.3g}"
    return f"{value:,.0f}" if "e" in shown and abs(value) >= 100 else shown


def interval(p: Point, tests: int = 1) -> str:
    """`` (99% interval 1 to 2)``; empty where nothing is known of the noise."""
    if p.se is None:
        return ""
    low, high = p.bounds(tests)
    return f" (99% interval {number(low)} to {number(high)})"


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def share_interval(p: Point) -> str:
    """The same of a share, within 0 and 100%."""
    low, high = p.bounds()
    return f"{percent(p.value)} (99% interval {percent(max(0.0, low))} to {percent(min(1.0, high))})"
