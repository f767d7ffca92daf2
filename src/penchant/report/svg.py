"""Number formatting, axes and plots as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TypeVar

from penchant.report.html import Element, Node, el, fold, table, user_text

# ---- Number formatting, and round positions on an axis ----

MISSING = "–"
MINUS = "\u2212"
Point = tuple[float, float]
T = TypeVar("T")


def number(value: float | None) -> str:
    """Format a number: three significant digits, thousands separators, exponents only from 1e6 and below 1e-3."""
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
    """Format a share as a percentage with one decimal."""
    return MISSING if value is None or not math.isfinite(value) else _minus(f"{100 * value:.1f}%")


def format_value(value: float | None, share: bool = False) -> str:
    """Format a figure as a percentage if it is a share, else as a number."""
    return percent(value) if share else number(value)


def interval(low: float, high: float, share: bool = False) -> str:
    """``[low, high]`` with digits to match its width; empty if the width is zero, also after rounding."""
    digits = None if share else _digits(low, high)
    ends = [percent(v) if share else number(v) if digits is None else _fixed(v, digits) for v in (low, high)]
    return "" if ends[0] == ends[1] else f"[{ends[0]}, {ends[1]}]"


def estimate(value: float | None, ci: tuple[float, float] | None, share: bool = False) -> str:
    """Format a figure with as many digits as its interval."""
    digits = None if share or ci is None else _digits(*ci)
    if value is None or digits is None:
        return format_value(value, share)
    return _fixed(value, digits)


def with_interval(value: float, ci: tuple[float, float] | None, share: bool = False) -> str:
    """Format a figure followed by its interval, if any."""
    return f"{estimate(value, ci, share)} {interval(*ci, share) if ci else ''}".rstrip()


def _digits(low: float, high: float) -> int | None:
    """Decimals for two significant digits of the width, or more so that an end near zero is not shown as zero; None: use the default."""
    width, size = high - low, max(abs(low), abs(high))
    if not math.isfinite(width) or width <= 0 or not 1e-5 <= size < 1e6:  # beyond six digits all would look like zero
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
    """Format seconds: ``1 h 05 min``, ``12 min 30 s``, ``45 s``."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return MISSING
    rounded = round(seconds)
    if rounded < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    days, hours = divmod(rounded // 3600, 24)
    return (f"{days} d " if days else "") + f"{hours} h {rounded % 3600 // 60:02d} min"


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
    """Round positions on a log axis: 1, 2, 5 times powers of ten; only powers of ten if there are many decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors: Sequence[int] = (1, 2, 5) if last - first <= 3 else (1,)
    stride = max(1, (last - first) // 6)
    positions = [m * 10.0**e for e in range(first, last + 1) for m in factors if len(factors) > 1 or e % stride == 0]
    return [t for t in positions if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)] or [low]


def tick_labels(places: Sequence[float]) -> list[str]:
    """One label per tick, all with the same number of decimals; if that makes two the same, with as many digits as tell them apart."""
    if not places:
        return []
    sizes = [abs(p) for p in places if p]
    steps = [abs(b - a) for a, b in pairwise(places) if b != a]
    if sizes and (max(sizes) >= 1e5 or min(sizes) < 1e-4):
        labels = [_short(p) for p in places]
    else:
        digits = max(0, min(7, -math.floor(math.log10(min(steps)) + 1e-9))) if steps else 2
        labels = [_fixed(p, digits) for p in places]
    if steps and len(set(labels)) < len(set(places)):
        significant = math.ceil(math.log10(max(sizes) / min(steps))) + 1
        labels = [_minus(f"{p:.{significant}g}") for p in places]
    return labels


def log_labels(places: Sequence[float]) -> list[str]:
    """One label per tick of a log axis."""
    return [_short(p) if p >= 1e5 or p < 1e-3 else f"{p:,.10g}" for p in places]


def _short(value: float) -> str:
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        return _minus(f"{value:.6g}")
    mantissa, exponent = f"{value:.2e}".split("e")
    return _minus(f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}")


def downsample(points: Sequence[Point], columns: int) -> list[Point]:
    """Downsample a line to the first, lowest, highest and last point of each pixel column.

    No visible detail is lost: every peak stays.
    """
    if len(points) <= 4 * columns:
        return list(points)
    low, high = points[0][0], points[-1][0]
    width = (high - low) / columns or 1.0
    sampled: list[Point] = []
    bucket: list[Point] = []
    current = 0
    for p in points:
        column = min(columns - 1, int((p[0] - low) / width))
        if column != current and bucket:
            sampled += _extremes(bucket)
            bucket = []
        current = column
        bucket.append(p)
    return sampled + _extremes(bucket)


def _extremes(bucket: Sequence[Point]) -> list[Point]:
    ends = {bucket[0], bucket[-1], min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
    return sorted(ends)


def window(points: int) -> int:
    """Window size of the running mean for a line of `points` points."""
    return 2 * max(2, points // 60) + 1


def smooth(points: Sequence[Point]) -> tuple[Point, ...]:
    """Centered running mean; the window is truncated at the ends."""
    half = window(len(points)) // 2
    sums = [0.0, *accumulate(y for _, y in points)]
    ends = [(max(0, i - half), min(len(points), i + half + 1)) for i in range(len(points))]
    return tuple((x, (sums[b] - sums[a]) / (b - a)) for (x, _), (a, b) in zip(points, ends, strict=True))


def pick_evenly(items: Sequence[T], limit: int) -> list[T]:
    """Pick at most `limit` evenly spaced items, including the first and the last."""
    if len(items) <= limit:
        return list(items)
    indices = sorted({round(i * (len(items) - 1) / (limit - 1)) for i in range(limit)})
    return [items[p] for p in indices]


# ---- Plots as inline SVG: complete without script and on paper, colored by the stylesheet, with the figures in a folded table ----

WIDTH, HEIGHT = 520, 290
LEFT, TOP, BOTTOM = 60, 12, 44
PLAIN_RIGHT, LETTER_RIGHT, WORD_RIGHT = 16, 34, 88
COLORS, DASHES = 8, ("", "7 4", "2 3", "9 3 2 3")
ROWS_BEHIND = 40  # maximum rows of a plot's table
COLUMNS = 1500  # over all lines of a plot, at four points per column: keeps pages of many runs small
LARGEST = 1e150  # larger values would overflow in differences
LABEL_GAP = 15.0
MOST_TAGS = 16
Band = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot.

    Args:
        label: in the table; points: exact (x, y); place: index of its setting, for color and dashes.
        ends: (x, low, high) of intervals; marked: draw a dot at each point; look: ``thick``, ``thin``, ``faint``.
        tag: label at the end of the line, "" for none; column: whether the table includes it; group: key of the setting, for highlighting.
        drawn: points drawn instead of `points` (a running mean), or None.
    """

    label: str
    points: tuple[Point, ...]
    place: int = 0
    ends: tuple[Band, ...] = ()
    marked: bool = False
    look: str = "thick"
    tag: str = ""
    column: bool = True
    group: str = ""
    drawn: tuple[Point, ...] | None = None


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal reference line: chance, the start."""

    value: float
    label: str


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot of lines.

    Args:
        key: its id on the page; says: text description for screen readers; note: how it was drawn.
        share: values are shares, shown in percent; log_y: log axis if values span more than two decades; whole_x: integer ticks on the x axis.
    """

    key: str
    title: str
    unit: str
    x_label: str
    lines: tuple[Line, ...]
    says: str
    note: str = ""
    share: bool = False
    log_y: bool = False
    levels: tuple[Level, ...] = ()
    whole_x: bool = True


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale that maps values to coordinates of the picture."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        a, b, v = (math.log(z) for z in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (v - a) / (b - a) * (self.end - self.start)

    def ticks(self, wanted: int, whole: bool = False) -> list[tuple[float, str]]:
        """(value, label) of the ticks."""
        if self.log:
            places = log_ticks(self.low, self.high)
            return list(zip(places, log_labels(places), strict=True))
        places = ticks(self.low, self.high, wanted)
        if whole:
            places = [p for p in places if p == int(p)]
        return list(zip(places, tick_labels(places), strict=True))


def axis(values: Sequence[float], start: float, end: float, *, log: bool = False, pad: float = 0.06) -> Axis:
    """Make an axis that covers all values with some padding; with padding, its width is at least 2e-6 of the values."""
    low, high = min(values), max(values)
    if log and low > 0:
        factor = (high / low) ** pad if high > low else 2.0
        return Axis(low / factor, high * factor, start, end, log=True)
    margin = (high - low) * pad or (max(abs(low) * 0.1, 1e-9) if pad else 0.5)
    if pad:  # labels of narrower axes would be too long
        margin = max(margin, 1e-6 * max(abs(low), abs(high)))
    return Axis(low - margin, high + margin, start, end)


def figure(plot: Plot) -> Element | None:
    """Draw a plot with its title and a folded table of its figures; None if it has no points."""
    lines = [line for line in (_finite(line) for line in plot.lines) if line.points]
    if not lines:
        return None
    longest = max(len(line.tag) for line in lines)
    right = PLAIN_RIGHT if not longest else LETTER_RIGHT if longest <= 2 else WORD_RIGHT
    xs = [x for line in lines for x, _ in (line.points[0], line.points[-1])]
    ys = [y for line in lines for _, y in line.drawn or line.points]
    ys += [v for line in lines for _, low, high in line.ends for v in (low, high)]
    log = plot.log_y and min(ys) > 0 and 100 < max(ys) / min(ys) < 1e30
    ys += [level.value for level in plot.levels if not log or level.value > 0]
    across = axis(xs, LEFT, WIDTH - right, pad=0.0)
    up = axis(ys, HEIGHT - BOTTOM, TOP, log=log)
    columns = min(round(across.end - across.start), max(30, COLUMNS // len(lines)))
    svg = el(
        "svg",
        el("desc", plot.says),
        grid(across, up, plot.x_label, plot.share, whole=plot.whole_x),
        [_level(level, across, up) for level in plot.levels],
        [_draw(line, across, up, columns) for line in sorted(lines, key=lambda x: x.look == "thick")],
        _tags(lines, across, up),
        el("g", class_="cross"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{plot.title}. {plot.says}",
        class_="chart",
        tabindex="0",
    )
    unit = f", {plot.unit}" if plot.unit and plot.unit != "%" else ""
    return el(
        "figure",
        el("figcaption", el("b", plot.title), el("span", unit, class_="unit")),
        el("div", svg, el("div", class_="tip", hidden=True), class_="plot"),
        fold(
            ["figures", el("small", f" \u00b7 {plot.note}") if plot.note else None],
            _figures_table(plot, lines),
            key=f"plot-{plot.key}",
        ),
        id=plot.key,
        data_axis=f"{across.low:.10g} {across.high:.10g} {LEFT} {WIDTH - right} {TOP} {HEIGHT - BOTTOM}",
    )


def _finite(line: Line) -> Line:
    points = tuple((x, y) for x, y in line.points if math.isfinite(x) and abs(y) < LARGEST)
    drawn = None if line.drawn is None else tuple((x, y) for x, y in line.drawn if math.isfinite(x + y))
    return replace(line, points=points, drawn=drawn or None)


def grid(
    x_axis: Axis,
    y_axis: Axis,
    x_label: str,
    share: bool,
    *,
    wanted: int = 5,
    whole: bool = False,
    upright: bool = False,
) -> list[Element]:
    """Grid lines, tick labels and the x axis label; wanted: approximate number of x ticks; upright: vertical grid lines too."""
    left, right, bottom = x_axis.start, x_axis.end, y_axis.start
    elements = []
    for value, label in y_axis.ticks(5):
        y, text = y_axis(value), f"{100 * value:.6g}%".replace("-", MINUS) if share else label
        elements.append(el("line", class_="grid", x1=left, x2=right, y1=round(y, 1), y2=round(y, 1)))
        elements.append(el("text", text, class_="tick", x=left - 8, y=round(y + 4, 1), text_anchor="end"))
    for value, label in x_axis.ticks(wanted, whole):
        x = round(x_axis(value), 1)
        elements += [el("line", class_="grid", x1=x, x2=x, y1=y_axis.end, y2=bottom)] if upright else []
        elements.append(el("text", label, class_="tick", x=x, y=bottom + 19, text_anchor="middle"))
    middle = (left + right) / 2
    return [*elements, el("text", x_label, class_="axis", x=middle, y=bottom + BOTTOM - 6, text_anchor="middle")]


def _level(level: Level, x_axis: Axis, y_axis: Axis) -> Element | None:
    if not y_axis.low <= level.value <= y_axis.high:
        return None
    y = round(y_axis(level.value), 1)
    line = el("line", x1=x_axis.start, x2=x_axis.end, y1=y, y2=y)
    return el("g", line, el("text", level.label, x=x_axis.start + 5, y=y - 5), class_="level")


def style_classes(index: int) -> str:
    """CSS classes for a setting's color and dashes: eight colors, then the same colors dashed."""
    return f"c{index % COLORS} d{index // COLORS % len(DASHES)}"


def path_data(points: Iterable[Point], x_axis: Axis, y_axis: Axis) -> str:
    """SVG path data through the points, rounded to tenths; relative steps take half the space."""
    parts: list[str] = []
    previous = (0, 0)
    for x, y in points:
        point = (round(x_axis(x) * 10), round(y_axis(y) * 10))
        if not parts:
            parts.append(f"M{point[0] / 10:g} {point[1] / 10:g}l")
        else:
            dx, dy = point[0] - previous[0], point[1] - previous[1]
            parts.append(f"{_path_number(dx / 10, not parts[-1].endswith('l'))}{_path_number(dy / 10, True)}")
        previous = point
    return "".join(parts).removesuffix("l")


def _path_number(value: float, after_number: bool) -> str:
    text = f"{value:g}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:g}"
    return text if text.startswith("-") or not after_number else f" {text}"


def _draw(line: Line, x_axis: Axis, y_axis: Axis, columns: int) -> Element:
    points = line.drawn or line.points
    sampled = downsample(points, columns)
    parts: list[Node] = []
    if len(sampled) > 1:
        parts.append(el("path", class_=line.look, d=path_data(sampled, x_axis, y_axis)))
    ends = [e for e in line.ends if not y_axis.log or e[1] > 0]
    if len(ends) > 1:
        outline = [*((x, high) for x, _, high in ends), *((x, low) for x, low, _ in reversed(ends))]
        parts.insert(0, el("path", class_="band", d=path_data(outline, x_axis, y_axis) + "z"))
    elif ends and ends[0][1] < ends[0][2]:
        x, low, high = ends[0]
        parts.append(el("path", class_="whisker", d=f"M{x_axis(x):.1f} {y_axis(low):.1f}V{y_axis(high):.1f}"))
    if line.marked or len(points) == 1:
        parts += [el("circle", cx=f"{x_axis(x):.1f}", cy=f"{y_axis(y):.1f}", r=3) for x, y in points[:400]]
    return el("g", *parts, class_=f"s {style_classes(line.place)}", data_g=line.group or None)


def _tags(lines: Sequence[Line], x_axis: Axis, y_axis: Axis) -> list[Element]:
    """Letters or words at the ends of lines, moved apart if they would overlap."""
    tagged = [
        (y_axis((line.drawn or line.points)[-1][1]), x_axis((line.drawn or line.points)[-1][0]), line)
        for line in lines
        if line.tag
    ]
    if len(tagged) > MOST_TAGS:  # too many: the legend has to do
        return []
    elements = []
    for group in _sides(tagged):
        ys = move_apart([y for y, _, _ in group], TOP + 4.0, HEIGHT - BOTTOM + 2.0, LABEL_GAP)
        for y, (_, x, line) in zip(ys, group, strict=True):
            elements.append(tag(line.tag, line.place, f"{x + 7:.1f}", y + 4, line.group))
    return elements


def _sides(tagged: Sequence[tuple[float, float, Line]]) -> list[list[tuple[float, float, Line]]]:
    """Group the tags of lines that end at about the same x, which could overlap."""
    groups: list[list[tuple[float, float, Line]]] = []
    for item in sorted(tagged, key=lambda t: t[1]):
        if groups and item[1] - groups[-1][-1][1] < LABEL_GAP:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def move_apart(places: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    """Move positions so that neighbors are `gap` apart (less if there is no room), in order and near where they were."""
    if not places:
        return []
    order = sorted(range(len(places)), key=lambda i: places[i])
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    moved = [min(max(places[i], low), high) for i in order]
    for _ in range(60):
        for k in range(len(moved) - 1):
            overlap = gap - (moved[k + 1] - moved[k])
            if overlap > 0:
                moved[k] -= overlap / 2
                moved[k + 1] += overlap / 2
        moved = [min(max(m, low + k * gap), high - (len(moved) - 1 - k) * gap) for k, m in enumerate(moved)]
    placed = [0.0] * len(places)
    for k, i in enumerate(order):
        placed[i] = moved[k]
    return placed


def _figures_table(plot: Plot, lines: Sequence[Line]) -> Element:
    """Table of exact figures at up to `ROWS_BEHIND` (or twice as many) x values; the script reads its tooltips from it."""
    columns = [line for line in lines if line.column]
    limit = ROWS_BEHIND if len(columns) > 4 else 2 * ROWS_BEHIND
    xs = sorted({x for line in columns for x, _ in line.points})
    marked = {x for line in columns if line.marked for x, _ in line.points}
    chosen = set(pick_evenly(xs, limit)) | (marked if len(marked) <= limit else set())
    values = [dict(line.points) for line in columns]
    ends = [{x: (low, high) for x, low, high in line.ends} for line in columns]
    rows = []
    for x in sorted(chosen):
        cells = [_cell(points.get(x), cis.get(x), plot.share) for points, cis in zip(values, ends, strict=True)]
        rows.append([f"{x:,.0f}" if x == int(x) else number(x), *cells])
    caption = f"{plot.title}{f' ({plot.unit})' if plot.unit else ''}"
    if len(chosen) < len(xs):
        caption += f", {len(chosen)} of {len(xs):,} places"
    head: list[Node] = [plot.x_label, *(user_text(line.label, data_c=style_classes(line.place)) for line in columns)]
    return table(head, rows, numeric=range(len(head)), caption=caption)


def _cell(value: float | None, ends: tuple[float, float] | None, share: bool) -> str:
    return "" if value is None else with_interval(value, ends, share)


def tag(words: Node | Iterable[Node], index: int, x: float | str, y: float, group: str) -> Element:
    """A setting's letter or name next to its line."""
    return el("text", words, class_=f"tag {style_classes(index)}", x=x, y=f"{y:.1f}", data_g=group or None)


def swatch(index: int) -> Element:
    """A short line sample of a setting, for legends."""
    return el(
        "svg",
        el("path", class_="thick", d="M1 5H27"),
        viewBox="0 0 28 10",
        class_=f"swatch s {style_classes(index)}",
        aria_hidden="true",
    )


def interval_plot(
    value: float, ci: tuple[float, float] | None, null: float | None, low: float, high: float, place: int = 0
) -> Element:
    """A small plot of an estimate with its interval, and a line at `null`, its value if nothing was learned."""
    scale = Axis(low, high, 6, 154) if high > low else Axis(low - 1, high + 1, 6, 154)
    parts: list[Node] = [el("line", class_="grid", x1=0, x2=160, y1=10, y2=10)]
    if null is not None:
        parts.append(el("line", class_="null", x1=round(scale(null), 1), x2=round(scale(null), 1), y1=1, y2=19))
    if ci is not None:
        parts.append(el("path", class_="bar", d=f"M{scale(ci[0]):.1f} 10H{scale(ci[1]):.1f}"))
    parts.append(el("circle", cx=f"{scale(value):.1f}", cy=10, r=4))
    return el("svg", *parts, viewBox="0 0 160 20", class_=f"strip s c{place % COLORS}", aria_hidden="true")


def sparkline(values: Sequence[float], label: str) -> Element | None:
    """A small line plot for a flag's evidence; None for fewer than two values."""
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) < 2:
        return None
    across = Axis(0, len(finite) - 1, 3, 157)
    up = axis(finite, 33, 5, pad=0.05)
    points = downsample([(float(i), v) for i, v in enumerate(finite)], 120)
    return el(
        "svg",
        el("path", class_="thick", d=path_data(points, across, up)),
        el("circle", cx=157, cy=f"{up(finite[-1]):.1f}", r=2.5),
        viewBox="0 0 164 38",
        class_="spark s c1",
        role="img",
        aria_label=f"{label}: from {number(finite[0])} to {number(finite[-1])}",
    )
