"""The frontier section: gain in reward or accuracy against KL from the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from penchant.metrics.names import with_k3
from penchant.report.curves import metric_points
from penchant.report.data import Comparison, ReportData, RunData, Setting
from penchant.report.html import Element, Node, el, fold, note, table, user_text
from penchant.report.svg import (
    BOTTOM,
    LEFT,
    TOP,
    Axis,
    Point,
    axis,
    format_value,
    grid,
    move_apart,
    number,
    path_data,
    style_classes,
    tag,
    with_interval,
)
from penchant.runfolder.read import start_names
from penchant.runfolder.values import ci_of, mapping, num

WIDTH, HEIGHT, RIGHT = 680, 390, 150
GAINS = (  # candidates for the y axis, first available wins: name, label, share
    ("reward", "reward", False),
    ("win_rate", "win rate against the start", True),
    ("rewards/accuracies", "preference accuracy", True),
)
COMPARED = (("reward", "reward", False), ("preference_accuracy", "held-out preference accuracy", True))
LABELLED = 14  # up to this many points are labeled with names; more get letters only
Pair = tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Spot:
    """A model in the plot: x is KL, y the gain, each with its interval; `trail`: its positions at earlier evaluations."""

    name: str
    key: str
    place: int
    x: float
    y: float
    x_ci: Pair = None
    y_ci: Pair = None
    runs: int = 1
    trail: tuple[Point, ...] = ()


@dataclass(frozen=True, slots=True)
class Frontier:
    """All spots of one plot, and the source of its figures."""

    label: str
    share: bool
    spots: tuple[Spot, ...]
    start: float | None
    source: str


def frontier(data: ReportData) -> Element | None:
    """Plot the frontier from a comparison if there is one, else from the runs' own evaluations; None without KL."""
    plot = next((f for c in data.comparisons if (f := comparison_frontier(c, data))), None) or runs_frontier(data)
    return None if plot is None else draw_frontier(plot)


def comparison_frontier(comparison: Comparison, data: ReportData) -> Frontier | None:
    """Frontier of a comparison's models: reward (or preference accuracy) against KL, on the same prompts."""
    models = mapping(comparison.figures.get("models"))
    for gain, label, share in COMPARED:
        spots = []
        for i, (name, figures) in enumerate(models.items()):
            figures = with_k3(figures)
            x, y, setting = num(figures, "kl_k3"), num(figures, gain), data.find_setting(name)
            if x is not None and y is not None:
                key, place = (setting.key, setting.place) if setting else ("", i)
                spots.append(Spot(name, key, place, x, y, ci_of(figures, "kl_k3"), ci_of(figures, gain)))
        if spots:
            first = next(iter(models.values()))
            start = num(first, gain) if num(first, "kl") is None else None
            source = "the comparison's prompts; bars are 95% intervals"
            return Frontier(label, share, tuple(spots), 0.5 if start is None and share else start, source)
    return None


def runs_frontier(data: ReportData) -> Frontier | None:
    """Frontier of settings at the end of their runs: held-out figures, or training rewards over the last quarter if there are none."""
    for gain, label, share in GAINS:
        for held_out in (True, False):
            if not held_out and gain != "reward":
                continue
            spots = [s for setting in data.settings if (s := _spot(setting, gain, held_out, len(data.runs) == 1))]
            if spots:
                starts = [v for r in data.runs if held_out and (v := num(r.first, f"eval/{gain}")) is not None]
                start = 0.5 if share else None
                if starts and _has_one_start(data):
                    start = mean(starts)
                return Frontier(label, share, tuple(spots), start, _source(data, spots, held_out))
    return None


def _has_one_start(data: ReportData) -> bool:
    return len({*start_names({run.name: run for run in data.runs}).values()}) == 1


def _source(data: ReportData, spots: Sequence[Spot], held_out: bool) -> str:
    evaluated = "held-out prompts, at the end of each run"
    source = evaluated if held_out else "completions in training, mean of the last quarter of the steps"
    if any(s.runs > 1 for s in spots):
        source += "; a setting with several seeds stands at their mean, its bars are their range"
    if any(s.x_ci and s.runs == 1 for s in spots):
        source += "; bars are 95% intervals by prompt"
    if not _has_one_start(data):
        source += "; the runs start from different models, and each one's KL is to its own start"
    missing = len(data.settings) - len(spots)
    return source + (f"; {missing} without these figures left out" if missing else "")


def _spot(setting: Setting, gain: str, held_out: bool, is_only: bool) -> Spot | None:
    ends: list[Point] = []
    trail: tuple[Point, ...] = ()
    x_ci: Pair = None
    y_ci: Pair = None
    for run in setting.runs:
        if held_out:
            end = _point_at(run.last, gain) if num(run.last, "step") else None
        else:
            end = _in_training(run, gain)
        if end is None or not (is_only or run.status in ("finished", "")):  # among several settings, only finished runs
            continue
        ends.append(end)
        if held_out:
            x_ci, y_ci = ci_of(run.last, "eval/kl/k3"), ci_of(run.last, f"eval/{gain}")
            trail = tuple(point for line in run.evals if (point := _point_at(line, gain)) is not None)
    if not ends:
        return None
    x, y = mean(e[0] for e in ends), mean(e[1] for e in ends)
    if len(ends) > 1:
        x_ci, y_ci = ((min(v), max(v)) for v in zip(*ends, strict=True))
        trail = ()
    return Spot(setting.name, setting.key, setting.place, x, y, x_ci, y_ci, len(ends), trail)


def _point_at(line: Mapping[str, Any], gain: str) -> Point | None:
    x, y = num(line, "eval/kl/k3"), num(line, f"eval/{gain}")
    return None if x is None or y is None else (x, y)


def _in_training(run: RunData, gain: str) -> Point | None:
    xs, ys = metric_points(run, "kl/k3"), metric_points(run, gain)
    if not xs or not ys:
        return None
    return mean(v for _, v in xs[-max(1, len(xs) // 4) :]), mean(v for _, v in ys[-max(1, len(ys) // 4) :])


def pareto_front(spots: Sequence[Spot]) -> list[Spot]:
    """The Pareto-optimal spots, ordered by KL: no other reaches as much with less KL."""
    front: list[Spot] = []
    for spot in sorted(spots, key=lambda s: (s.x, -s.y)):
        if not front or spot.y > front[-1].y:
            front.append(spot)
    return front


def draw_frontier(frontier: Frontier) -> Element:
    """Draw the plot with its table."""
    spots = frontier.spots
    xs = [v for s in spots for v in (s.x, *(s.x_ci or ()), *(t[0] for t in s.trail))]
    ys = [v for s in spots for v in (s.y, *(s.y_ci or ()), *(t[1] for t in s.trail))]
    ys += [frontier.start] if frontier.start is not None else []
    kls = [s.x for s in spots]  # a trail begins at a KL of 0, and an interval's lower end may be negative
    log = min(kls) > 0 and max(kls) / min(kls) > 30
    across = axis([x for x in xs if x > min(kls) / 10] if log else [*xs, 0.0], LEFT, WIDTH - RIGHT, log=log, pad=0.04)
    up = axis(ys, HEIGHT - BOTTOM, TOP)
    front = pareto_front(spots)
    description = ", ".join(f"{s.name} ({format_value(s.y, frontier.share)} at {number(s.x)} nats)" for s in front)
    if len(spots) > 1:
        description = f"{len(spots)} models by KL to the start and {frontier.label}. None reaches as much with less KL: {description}"
    steps = "".join(f"H{across(s.x):.1f}V{up(s.y):.1f}" for s in front[1:])
    svg = el(
        "svg",
        el("desc", description),
        _axes(across, up, frontier),
        el("path", class_="edge", d=f"M{across(front[0].x):.1f} {up(front[0].y):.1f}{steps}") if steps else None,
        [_draw_spot(s, across, up, frontier.share) for s in spots],
        _names(spots, across, up),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=description,
        class_="chart frontier",
    )
    title = f"{frontier.label[0].upper()}{frontier.label[1:]} against KL"
    return el(
        "figure",
        el("figcaption", el("b", title), el("span", f" on {frontier.source}", class_="unit")),
        svg,
        None
        if len(spots) == 1
        else note(
            "Up and to the left is better. The dotted steps join those for which no other has as much with less KL; the steps are not a test."
        ),
        fold("figures", _table(frontier), key="plot-frontier"),
        class_="wide",
        id="p-frontier",
    )


def _axes(x_axis: Axis, y_axis: Axis, frontier: Frontier) -> list[Element]:
    title = "KL to the start, nats per completion" + (" (log scale)" if x_axis.log else "")
    *elements, x_label = grid(x_axis, y_axis, title, frontier.share, wanted=6, upright=True)
    if frontier.start is not None and y_axis.low <= frontier.start <= y_axis.high:
        y = round(y_axis(frontier.start), 1)
        label = f"the start: {format_value(frontier.start, frontier.share)}"
        line = el("line", x1=x_axis.start, x2=x_axis.end, y1=y, y2=y)
        text = el("text", label, x=x_axis.end - 6, y=y - 6, text_anchor="end")
        elements.append(el("g", line, text, class_="level"))
    return [*elements, x_label]


def _draw_spot(spot: Spot, x_axis: Axis, y_axis: Axis, share: bool) -> Element:
    x, y = x_axis(spot.x), y_axis(spot.y)
    parts: list[Node] = []
    trail = [t for t in spot.trail if t[0] >= x_axis.low]
    if len(trail) > 1:
        parts.append(el("path", class_="thin", d=path_data(trail, x_axis, y_axis)))
    if spot.x_ci:
        left = x_axis(max(spot.x_ci[0], x_axis.low))  # a log axis has no place for the rest of the bar
        parts.append(el("path", class_="whisker", d=f"M{left:.1f} {y:.1f}H{x_axis(spot.x_ci[1]):.1f}"))
    if spot.y_ci:
        parts.append(el("path", class_="whisker", d=f"M{x:.1f} {y_axis(spot.y_ci[0]):.1f}V{y_axis(spot.y_ci[1]):.1f}"))
    title = f"{spot.name}: KL {number(spot.x)}, {format_value(spot.y, share)}"
    parts.append(el("circle", el("title", title), cx=f"{x:.1f}", cy=f"{y:.1f}", r=5.5))
    return el("g", *parts, class_=f"s {style_classes(spot.place)}", data_g=spot.key or None)


def _names(spots: Sequence[Spot], x_axis: Axis, y_axis: Axis) -> list[Element]:
    """Names in the right margin in the order of the spots, each with a thin line to its spot; only letters if there are many."""
    ordered = sorted(spots, key=lambda s: y_axis(s.y))
    if len(spots) > LABELLED:
        return [tag(s.key or s.name[:8], s.place, f"{x_axis(s.x) + 9:.1f}", y_axis(s.y) - 7, s.key) for s in spots]
    positions = move_apart([y_axis(s.y) for s in ordered], TOP + 8.0, HEIGHT - BOTTOM - 4.0, 20.0)
    elements = []
    for spot, y in zip(ordered, positions, strict=True):
        margin = WIDTH - RIGHT
        elements.append(
            el("path", class_="lead", d=f"M{x_axis(spot.x) + 8:.1f} {y_axis(spot.y):.1f}L{margin + 2} {y:.1f}")
        )
        letter = el("tspan", f"{spot.key} " if spot.key else "", class_="letter")
        name = el("tspan", _short(spot.name, 17 - len(spot.key)), class_="name" if spot.key else None)
        elements.append(tag([letter, name], spot.place, margin + 6, y + 4, spot.key))
    return elements


def _short(name: str, max_chars: int) -> str:
    return name if len(name) <= max_chars else f"{name[: max_chars - 1]}\u2026"


def _table(frontier: Frontier) -> Element:
    rows: list[list[Node]] = []
    for s in sorted(frontier.spots, key=lambda s: s.x):
        x, y = with_interval(s.x, s.x_ci), with_interval(s.y, s.y_ci, frontier.share)
        rows.append([user_text(f"{s.key} {s.name}".strip()), x, y, str(s.runs)])
    head: list[Node] = ["model", "KL, nats per completion", frontier.label, "seeds"]
    return table(head, rows, numeric=(1, 2, 3), caption="The frontier's figures")
