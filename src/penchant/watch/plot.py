"""Plots in character cells: a braille line (2 by 4 dots per cell), evaluations as points with intervals, labelled axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

GUTTER = 8  # cells for the labels of the y axis
LINE, POINT, AXIS = "cyan", "yellow", "dim"
_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # braille dots by row and column of a cell

Pair = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Point:
    """An evaluation: step, value and, if known, its interval."""

    step: float
    value: float
    interval: Pair | None = None


@dataclass(frozen=True, slots=True)
class Glyphs:
    """The characters that plots are drawn with."""

    point: str = "●"
    whisker: str = "│"
    bar: str = "│"
    rule: str = "─"
    corner: str = "└"
    braille: bool = True


UNICODE = Glyphs()
ASCII = Glyphs(point="o", whisker="|", bar="|", rule="-", corner="+", braille=False)


def axis_label(value: float, span: float, largest: float) -> str:
    """Format a value on an axis with just enough decimals to tell it from others within the span."""
    decimals = max(0, 1 - math.floor(math.log10(span))) if span > 0 else 2
    if largest >= 1e5 or decimals > 4:
        return f"{value:.1e}"
    label = f"{value:.{decimals}f}"
    return label.lstrip("-") if float(label) == 0 else label


def bin_points(line: Sequence[Pair], x0: float, x1: float, columns: int) -> list[tuple[int, float]]:
    """Return (column, mean) of the points that fall into each dot column; empty columns are left out."""
    sums: dict[int, tuple[float, int]] = {}
    for x, y in line:
        column = _to_cell(x, x0, x1, columns)
        total, n = sums.get(column, (0.0, 0))
        sums[column] = (total + y, n + 1)
    return [(column, total / n) for column, (total, n) in sorted(sums.items())]


def _to_cell(v: float, low: float, high: float, cells: int) -> int:
    share = (v - low) / (high - low) if high > low else 0.5
    return min(cells - 1, max(0, round(share * (cells - 1))))


def _limits(values: Sequence[float]) -> Pair:
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        pad = abs(low) * 0.05 or 0.5
        return low - pad, high + pad
    return low, high


def plot(
    line: Sequence[Pair], points: Sequence[Point], width: int, height: int, glyphs: Glyphs = UNICODE, x_end: float = 0
) -> list[Text]:
    """Draw a plot of `height` lines of `width` cells; the last line is the x axis, labelled with its first and last step.

    Args:
        line: (step, value) pairs, drawn as a line through the mean of each column; points: drawn on top, with their intervals.
        x_end: the axis reaches at least this step.
    """
    steps = [x for x, _ in line] + [p.step for p in points]
    if not steps or width < GUTTER + 4 or height < 2:
        return [Text(" " * max(0, width)) for _ in range(max(0, height))]
    columns, rows = width - GUTTER - 1, height - 1
    x0, x1 = min(steps), max(*steps, x_end)
    means = bin_points(line, x0, x1, columns * 2)
    y0, y1 = _limits([y for _, y in means] + [e for p in points for e in (p.value, *(p.interval or ()))])

    def dots_from_top(value: float) -> int:
        """Return the distance from the top, in dots."""
        return rows * 4 - 1 - _to_cell(value, y0, y1, rows * 4)

    dots = _braille_bits([(x, dots_from_top(y)) for x, y in means])
    overlay: dict[tuple[int, int], str] = {}
    point_columns = [_to_cell(p.step, x0, x1, columns * 2) // 2 for p in points]
    for x, p in zip(point_columns, points, strict=True):
        if p.interval is not None:
            overlay |= {
                (x, y): glyphs.whisker
                for y in range(dots_from_top(p.interval[1]) // 4, dots_from_top(p.interval[0]) // 4 + 1)
            }
    overlay |= {(x, dots_from_top(p.value) // 4): glyphs.point for x, p in zip(point_columns, points, strict=True)}
    # the outer labels give the edges of the plot, the middle one gives the center of its row
    middle = {(rows - 1) // 2: y1 - (y1 - y0) * ((rows - 1) // 2 + 0.5) / rows} if rows >= 5 else {}
    labels = {y: axis_label(v, y1 - y0, max(abs(y0), abs(y1))) for y, v in {0: y1, **middle, rows - 1: y0}.items()}
    lines = [
        Text.assemble(
            (f"{labels.get(y, '')[:GUTTER]:>{GUTTER}}{glyphs.bar}", AXIS),
            *(
                (overlay[x, y], POINT) if (x, y) in overlay else _glyph(dots.get((x, y), 0), glyphs)
                for x in range(columns)
            ),
        )
        for y in range(rows)
    ]
    first, last = f"{x0:,.0f}", f"{x1:,.0f}"
    rule = glyphs.rule * max(1, columns - len(first) - len(last))
    return [*lines, Text(f"{'':>{GUTTER}}{glyphs.corner}{first}{rule}{last}"[:width], AXIS)]


def _braille_bits(path: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Return the braille bits of each cell that a path through the dots touches."""
    bits: dict[tuple[int, int], int] = {}
    for (x0, y0), (x1, y1) in zip(path, [*path[1:], *path[-1:]], strict=True):
        n = max(abs(x1 - x0), abs(y1 - y0), 1)
        for i in range(n + 1):
            x, y = round(x0 + (x1 - x0) * i / n), round(y0 + (y1 - y0) * i / n)
            bits[x // 2, y // 4] = bits.get((x // 2, y // 4), 0) | _BITS[y % 4][x % 2]
    return bits


def _glyph(bits: int, glyphs: Glyphs) -> tuple[str, str]:
    if not bits:
        return " ", ""
    if glyphs.braille:
        return chr(0x2800 + bits), LINE
    return "." if bits & 0xE4 else "'", LINE  # whether the lower half has a dot
