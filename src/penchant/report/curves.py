"""Line charts as inline SVG: no scripts, colours from CSS, a table behind every picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 34
MAX_POINTS = 400  # a wider line than the picture has pixels tells nothing more

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its label, points (x, y), and whether its points are marked (few, exact) or not (many, noisy)."""

    label: str
    points: tuple[Point, ...]
    marked: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart ready for the page."""

    title: str
    svg: str
    labels: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str
    x_label: str = "step"


def number(value: float | None) -> str:
    """Three significant digits, thousands separated, exponents only where they help."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round positions between low and high: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = span / wanted
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(m * base for m in (1, 2, 5, 10) if m * base >= raw)
    first = math.ceil(low / step - 1e-9) * step
    return [first + i * step for i in range(int((high - first) / step + 1e-9) + 1)]


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points, each the mean of a run of neighbours."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / limit)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in r) / len(r), sum(y for _, y in r) / len(r)) for r in runs]


def line_chart(title: str, series: Sequence[Series], *, x_label: str = "step") -> Chart | None:
    """A chart of one or more series; None when there is no finite point at all."""
    kept = []
    thinned = False
    for s in series:
        finite = [(x, y) for x, y in s.points if math.isfinite(x) and math.isfinite(y)]
        thinned |= len(finite) > MAX_POINTS
        if finite:
            kept.append(Series(s.label, tuple(thin(finite)), s.marked))
    if not kept:
        return None
    xs = [x for s in kept for x, _ in s.points]
    ys = [y for s in kept for _, y in s.points]
    x0, x1 = min(xs), max(xs)
    y0, y1 = min(ys), max(ys)
    if x0 == x1:
        x0, x1 = x0 - 0.5, x1 + 0.5
    pad = (y1 - y0) * 0.06 or max(abs(y0) * 0.1, 1e-9)
    y0, y1 = y0 - pad, y1 + pad

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}" class="chart">',
        f"<title>{escape(title)}</title>",
    ]
    for y in ticks(y0, y1):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{py(y) + 3.5:.1f}" text-anchor="end">{number(_snap(y, y1 - y0))}</text>'
        )
    for x in ticks(x0, x1, 6):
        if x == int(x):
            parts.append(
                f'<text class="tick" x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{int(x):,}</text>'
            )
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(x_label)}</text>')
    for i, s in enumerate(kept):
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in s.points)
        kind = "marked" if s.marked else "plain"
        if len(s.points) > 1:
            parts.append(f'<polyline class="s{i % 6} {kind}" points="{path}"/>')
        if s.marked or len(s.points) == 1:
            parts += [f'<circle class="s{i % 6}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3"/>' for x, y in s.points]
    parts.append("</svg>")
    rows = _table(kept)
    note = "each point is the mean of neighbouring steps" if thinned else ""
    return Chart(title, "".join(parts), tuple(s.label for s in kept), rows, note, x_label)


def _snap(value: float, span: float) -> float:
    return 0.0 if abs(value) < span * 1e-9 else value


def _table(series: Sequence[Series], limit: int = 40) -> tuple[tuple[str, ...], ...]:
    """Rows (x, value of each series) behind the picture, thinned to `limit`."""
    columns = [dict(thin(s.points, limit) if not s.marked else s.points) for s in series]
    xs = sorted({x for c in columns for x in c})
    return tuple((number(x), *(number(c.get(x)) for c in columns)) for x in xs)
