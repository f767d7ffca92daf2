"""Curves in character cells: a line in braille dots (2 by 4 a cell), evaluations as points with their intervals, labelled axes."""

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
    """An evaluation: step, value and its interval, if it has one."""

    step: float
    value: float
    interval: Pair | None = None


@dataclass(frozen=True, slots=True)
class Glyphs:
    """What curves are drawn with."""

    point: str = "●"
    whisker: str = "│"
    bar: str = "│"
    rule: str = "─"
    corner: str = "└"
    braille: bool = True


UNICODE = Glyphs()
ASCII = Glyphs(point="o", whisker="|", bar="|", rule="-", corner="+", braille=False)


def axis_label(value: float, span: float, largest: float) -> str:
    """A place on an axis, with as many decimals as tell it from others of that span."""
    decimals = max(0, 1 - math.floor(math.log10(span))) if span > 0 else 2
    if largest >= 1e5 or decimals > 4:
        return f"{value:.1e}"
    made = f"{value:.{decimals}f}"
    return made.lstrip("-") if float(made) == 0 else made


def binned(line: Sequence[Pair], x0: float, x1: float, columns: int) -> list[tuple[int, float]]:
    """(column, mean) of the points that fall into each dot column, where there are any."""
    sums: dict[int, tuple[float, int]] = {}
    for x, y in line:
        at = _scaled(x, x0, x1, columns)
        total, n = sums.get(at, (0.0, 0))
        sums[at] = (total + y, n + 1)
    return [(at, total / n) for at, (total, n) in sorted(sums.items())]


def _scaled(v: float, low: float, high: float, cells: int) -> int:
    share = (v - low) / (high - low) if high > low else 0.5
    return min(cells - 1, max(0, round(share * (cells - 1))))


def _limits(values: Sequence[float]) -> Pair:
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        pad = abs(low) * 0.05 or 0.5
        return low - pad, high + pad
    return low, high


class _Canvas:
    """Cells of a plot: dots of the line, and characters above them."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.dots = [[0] * width for _ in range(height)]
        self.over: dict[tuple[int, int], str] = {}

    def dot(self, x: int, y: int) -> None:
        """x from the left, y from the top, both in dots."""
        self.dots[y // 4][x // 2] |= _BITS[y % 4][x % 2]

    def segment(self, a: tuple[int, int], b: tuple[int, int]) -> None:
        steps = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1)
        for i in range(steps + 1):
            self.dot(round(a[0] + (b[0] - a[0]) * i / steps), round(a[1] + (b[1] - a[1]) * i / steps))

    def row(self, y: int, glyphs: Glyphs) -> Text:
        made = Text()
        for x in range(self.width):
            if (x, y) in self.over:
                made.append(self.over[x, y], POINT)
            elif not (dots := self.dots[y][x]):
                made.append(" ")
            elif glyphs.braille:
                made.append(chr(0x2800 + dots), LINE)
            else:
                made.append("." if dots & 0xE4 else "'", LINE)  # whether the lower half has a dot
        return made


def plot(
    line: Sequence[Pair], points: Sequence[Point], width: int, height: int, glyphs: Glyphs = UNICODE, x_end: float = 0
) -> list[Text]:
    """A plot of `height` lines of `width` cells: the last one is the x axis, labelled with its first and last step.

    Args:
        line: (step, value), drawn as a line through the means of its columns; points: drawn above it, with their intervals.
        x_end: the axis reaches at least to this step.
    """
    steps = [x for x, _ in line] + [p.step for p in points]
    if not steps or width < GUTTER + 4 or height < 2:
        return [Text(" " * max(0, width)) for _ in range(max(0, height))]
    canvas = _Canvas(width - GUTTER - 1, height - 1)
    x0, x1 = min(steps), max(*steps, x_end)
    columns = binned(line, x0, x1, canvas.width * 2)
    ends = [e for p in points for e in (p.value, *(p.interval or ()))]
    y0, y1 = _limits([y for _, y in columns] + ends)
    dots = [(at, canvas.height * 4 - 1 - _scaled(y, y0, y1, canvas.height * 4)) for at, y in columns]
    for a, b in zip(dots, [*dots[1:], dots[-1]] if dots else [], strict=True):
        canvas.segment(a, b)
    _draw_points(canvas, points, (x0, x1), (y0, y1), glyphs)
    return [*_rows(canvas, y0, y1, glyphs), _x_axis(x0, x1, width, glyphs)]


def _draw_points(canvas: _Canvas, points: Sequence[Point], xs: Pair, ys: Pair, glyphs: Glyphs) -> None:
    def cell(value: float) -> int:
        return (canvas.height * 4 - 1 - _scaled(value, *ys, canvas.height * 4)) // 4

    at = [_scaled(p.step, *xs, canvas.width * 2) // 2 for p in points]
    for x, p in zip(at, points, strict=True):
        if p.interval is not None:
            for y in range(cell(p.interval[1]), cell(p.interval[0]) + 1):
                canvas.over.setdefault((x, y), glyphs.whisker)
    for x, p in zip(at, points, strict=True):
        canvas.over[x, cell(p.value)] = glyphs.point


def _rows(canvas: _Canvas, y0: float, y1: float, glyphs: Glyphs) -> list[Text]:
    span, largest, last = y1 - y0, max(abs(y0), abs(y1)), canvas.height - 1
    # the outer labels are the plot's edges, the one between them stands for the middle of its row
    values = {0: y1, last // 2: y1 - span * (last // 2 + 0.5) / canvas.height, last: y0}
    if canvas.height < 5:
        values = {0: y1, last: y0}
    made = []
    for y in range(canvas.height):
        label = axis_label(values[y], span, largest) if y in values else ""
        left = Text(f"{label[:GUTTER]:>{GUTTER}}{glyphs.bar}", AXIS)
        made.append(Text.assemble(left, canvas.row(y, glyphs)))
    return made


def _x_axis(x0: float, x1: float, width: int, glyphs: Glyphs) -> Text:
    first, last = f"{x0:,.0f}", f"{x1:,.0f}"
    room = width - GUTTER - 1 - len(first) - len(last)
    rule = glyphs.rule * max(1, room)
    return Text(f"{'':>{GUTTER}}{glyphs.corner}{first}{rule}{last}"[:width], AXIS)
