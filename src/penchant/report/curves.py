"""Curves of all runs, overlaid: settings by color and letter, seeds thin, their mean thick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from penchant.metrics.names import METRICS
from penchant.report.data import ReportData, RunData, Setting
from penchant.report.html import Element, el, fold
from penchant.report.svg import Band, Level, Line, Plot, Point, count, figure, shown, smooth
from penchant.runfolder.values import ci_of, num

MANY = 24  # points from which a training curve is drawn as its running mean
BANDS = 3  # settings up to which intervals are drawn


@dataclass(frozen=True, slots=True)
class Panel:
    """A plot of this section.

    Args:
        lines: (metric as logged, label); log: a log axis where values span more than two decades; main: among those that stand open when many
            runs are drawn.
    """

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    log: bool = False
    main: bool = True

    @property
    def share(self) -> bool:
        return METRICS[self.lines[0][0].removeprefix("eval/")].share


def _both(title: str, name: str, unit: str = "", *, log: bool = False, main: bool = True) -> Panel:
    """A metric in training and on held-out rows."""
    return Panel(title, unit, ((name, "train"), (f"eval/{name}", "held out")), log, main)


def _sides(title: str, name: str, unit: str = "", *, main: bool = True) -> Panel:
    """A metric of the chosen and of the rejected answer."""
    return Panel(title, unit, tuple((f"{name}/{side}", side) for side in ("chosen", "rejected")), main=main)


def _trained(title: str, name: str, unit: str = "", label: str = "train", *, log: bool = False) -> Panel:
    """A metric of training that is a detail."""
    return Panel(title, unit, ((name, label),), log, main=False)


PANELS = (
    _both("Loss", "loss"),
    _both("Preference accuracy", "rewards/accuracies", "%"),
    _both("Reward margin", "rewards/margins", "chosen \u2212 rejected"),
    _both("Reward of completions", "reward"),
    Panel("Win rate against the start", "%", (("eval/win_rate", "held out"),)),
    _both("KL to the start", "kl/policy_ref", "nats per completion"),
    _both("Perplexity", "perplexity", log=True),
    _sides("Rewards, held out", "eval/rewards"),
    _sides("Rewards in training", "rewards", main=False),
    _sides("Log-probs, held out", "eval/logps", "nats per answer"),
    _sides("Shift from the reference, held out", "eval/logratios", "nats per answer"),
    _trained("Log-prob in training", "logps/per_token", "nats per token"),
    _both("Divergence", "divergence", "nats per token"),
    _both("Length of completions", "completions/length", "tokens"),
    _both("Completions that ended", "completions/ended", "%", main=False),
    _trained("Spread of rewards", "reward/std", "within a prompt"),
    Panel("Clipped tokens", "%", (("clip_fraction", "train"), ("value/clip_fraction", "value")), main=False),
    _trained("Value error", "value/error", log=True),
    _trained("Entropy", "entropy/sampled", "nats per token"),
    _trained("Scheduled \u03bb", "lambda", label="\u03bb"),
    _trained("Scheduled \u03b2", "beta", label="\u03b2"),
    _trained("Learning rate", "lr", label="learning rate"),
    _trained("Gradient norm", "grad_norm", "before clipping", log=True),
)


def curves(data: ReportData) -> Element | None:
    """Every plot that has a point; None where there is none."""
    if len(data.runs) == 1:
        plots = [_of_one(panel, data.runs[0]) for panel in PANELS]
        plots.append(_reliability(data.runs[0].calibration))
        main = [p for p in plots if p is not None]
        rest: list[Plot] = []
    else:
        made = [(p.main, plot) for p in PANELS for plot in _of_many(p, data)]
        main, rest = [p for m, p in made if m], [p for m, p in made if not m]
    figures = [f for f in map(figure, main) if f is not None]
    more = [f for f in map(figure, rest) if f is not None]
    if not figures and not more:
        return None
    return el(
        "div",
        el("div", figures, class_="plots") if figures else None,
        fold(
            f"{count(len(more), 'more plot')}: optimization and training details",
            el("div", more, class_="plots"),
            key="more-plots",
            open_=not figures,
        )
        if more
        else None,
    )


def points_of(run: RunData, metric: str) -> tuple[Point, ...]:
    """(step, value) of a metric as logged; of a step that was logged again after a resume the last line counts."""
    lines = run.evals if metric.startswith("eval/") else run.trained
    found: dict[float, float] = {}
    for line in lines:
        step, value = num(line, "step"), num(line, metric)
        if step is not None and value is not None:
            found[step] = value
    return tuple(sorted(found.items()))


def ends_of(lines: Sequence[Mapping[str, Any]], metric: str) -> tuple[Band, ...]:
    """(step, low, high) of a metric's intervals."""
    found: dict[float, Band] = {}
    for line in lines:
        step, ci = num(line, "step"), ci_of(line, metric)
        if step is not None and ci is not None:
            found[step] = (step, *ci)
    return tuple(found[s] for s in sorted(found))


def _of_one(panel: Panel, run: RunData) -> Plot | None:
    lines: list[Line] = []
    note = ""
    for place, (metric, label) in enumerate(panel.lines):
        points = points_of(run, metric)
        if not points:
            continue
        held_out = metric.startswith("eval/")
        place = 1 if label == "held out" else place
        if held_out or len(points) < MANY:
            ends = ends_of(run.evals, metric) if held_out else ()
            lines.append(Line(label, points, place, ends, marked=held_out, tag=label))
            continue
        mean, size = smooth(points)
        lines.append(Line(label, points, place, look="faint", tag="" if size > 1 else label))
        if size > 1:
            lines.append(Line(label, points, place, drawn=tuple(mean), tag=label, column=False))
            note = f"thick: running mean of {size} steps"
    if not lines:
        return None
    if len([x for x in lines if x.tag]) == 1 and panel.lines[0][1] in ("train", "held out", panel.title):
        lines = [_untagged(x) for x in lines]
    levels = (Level(0.5, "one half"),) if panel.share and "win rate" in panel.title.lower() else ()
    return Plot(
        _slug(panel.title),
        panel.title,
        panel.unit,
        "step",
        tuple(lines),
        _says(lines, panel.share),
        note,
        panel.share,
        panel.log,
        levels,
    )


def _untagged(line: Line) -> Line:
    return line if line.label == "held out" else replace(line, tag="")


def _of_many(panel: Panel, data: ReportData) -> list[Plot]:
    """One plot a line of the panel: with many runs, each has its own."""
    made = []
    for metric, label in panel.lines:
        lines: list[Line] = []
        sizes: set[int] = set()
        for setting in data.settings:
            lines += _of_setting(setting, metric, sizes, len(data.settings) <= BANDS)
        if not lines:
            continue
        where = "held out" if metric.startswith("eval/") else "training"
        title = panel.title
        if len(panel.lines) > 1:
            title = f"{panel.title}, {label if label not in ('train', 'held out') else where}"
        several = any(len(s.runs) > 1 for s in data.settings)
        notes = [f"running means of {max(sizes)} steps"] if sizes and max(sizes) > 1 else []
        notes += ["thick: mean over seeds"] if several else []
        made.append(
            Plot(
                _slug(title),
                title,
                panel.unit,
                "step",
                tuple(lines),
                _says([x for x in lines if x.tag], panel.share),
                ", ".join(notes),
                panel.share,
                panel.log,
            )
        )
    return made


def _of_setting(setting: Setting, metric: str, sizes: set[int], bands: bool) -> list[Line]:
    held_out = metric.startswith("eval/")
    series = [(run, p) for run in setting.runs if (p := points_of(run, metric))]
    if not series:
        return []
    alone = len(series) == 1
    lines = []
    for run, points in series:
        drawn: tuple[Point, ...] | None = None
        if not held_out and len(points) >= MANY:
            mean, size = smooth(points)
            drawn = tuple(mean)
            sizes.add(size)
        lines.append(
            Line(
                f"{setting.key} {setting.name}" if alone else f"{setting.key} seed {run.seed or '?'}",
                points,
                setting.place,
                ends_of(run.evals, metric) if held_out and alone and bands else (),
                marked=held_out and alone,
                look="thick" if alone else "thin",
                tag=setting.key if alone else "",
                group=setting.key,
                drawn=drawn,
                column=alone,
            )
        )
    if alone:
        return lines
    shared = set.intersection(*({x for x, _ in p} for _, p in series))
    if not shared:
        return lines
    values = [dict(p) for _, p in series]
    mean_points = tuple((x, sum(v[x] for v in values) / len(values)) for x in sorted(shared))
    drawn = tuple(smooth(mean_points)[0]) if not held_out and len(mean_points) >= MANY else None
    name = f"{setting.key} {setting.name}, mean of {len(series)} seeds"
    return [
        *lines,
        Line(name, mean_points, setting.place, marked=held_out, tag=setting.key, group=setting.key, drawn=drawn),
    ]


def _says(lines: Sequence[Line], share: bool) -> str:
    """From where to where each line goes, for those who cannot see it."""
    parts: list[str] = []
    for line in lines:
        if line.column and len(parts) < 12:
            (x0, y0), (x1, y1) = line.points[0], line.points[-1]
            parts.append(f"{line.label}: {shown(y0, share)} at step {x0:,.0f}, {shown(y1, share)} at step {x1:,.0f}")
    return "; ".join(dict.fromkeys(parts))


def _reliability(quality: Mapping[str, Any]) -> Plot | None:
    """A reward model's confidence against the share of pairs that it ranks right; on the diagonal it is calibrated."""
    calibration = quality.get("calibration")
    bins = calibration.get("bins") if isinstance(calibration, Mapping) else None
    points = tuple(
        (100 * c, r)
        for b in (bins if isinstance(bins, list) else [])
        if (c := num(b, "confidence")) is not None and (r := num(b, "right")) is not None
    )
    if not points:
        return None
    diagonal = Line("calibrated", ((50.0, 0.5), (100.0, 1.0)), 6, look="faint", tag="calibrated", column=False)
    pairs = Line("share right", points, 0, marked=True, tag="")
    says = f"{len(points)} bins of held-out pairs; on the diagonal confidence and share right agree"
    return Plot(
        "reliability", "Reliability on held-out pairs", "% right", "confidence, %", (diagonal, pairs), says, share=True
    )


def _slug(title: str) -> str:
    return "p-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in title.lower()).strip("-")
