"""Curves of all runs, overlaid: a color and letter per setting, thin lines for seeds, a thick one for their mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from penchant.base.text import counted as count
from penchant.metrics import names
from penchant.report.data import ReportData, RunData, Setting
from penchant.report.html import Element, el, fold
from penchant.report.svg import Band, Level, Line, Plot, Point, figure, format_value, smooth, window
from penchant.runfolder.values import ci_of, mapping, num, sequence

MANY = 24  # training curves with at least this many points are drawn as running means
BANDS = 3  # intervals are drawn for up to this many settings


@dataclass(frozen=True, slots=True)
class Panel:
    """A plot of this section.

    Args:
        lines: (metric as logged, label); log: log axis if values span more than two decades; main: shown unfolded if several runs are drawn.
    """

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    log: bool = False
    main: bool = True

    @property
    def share(self) -> bool:
        return names.metric(self.lines[0][0]).share

    def plot(self, title: str, lines: Sequence[Line], note: str, levels: tuple[Level, ...] = ()) -> Plot:
        description = _describe(lines, self.share)
        key = "p-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in title.lower()).strip("-")
        return Plot(key, title, self.unit, "step", tuple(lines), description, note, self.share, self.log, levels)


def _train_and_held_out(title: str, name: str, unit: str = "", *, log: bool = False, main: bool = True) -> Panel:
    """A metric in training and on held-out rows."""
    return Panel(title, unit, ((name, "train"), (f"eval/{name}", "held out")), log, main)


def _chosen_and_rejected(title: str, name: str, unit: str = "", *, main: bool = True) -> Panel:
    """A metric of the chosen and the rejected answers."""
    return Panel(title, unit, tuple((f"{name}/{side}", side) for side in ("chosen", "rejected")), main=main)


def _training_only(title: str, name: str, unit: str = "", label: str = "train", *, log: bool = False) -> Panel:
    """A metric of training only, among the details."""
    return Panel(title, unit, ((name, label),), log, main=False)


ONE_REWARD = re.compile(r"(?:eval/)?rewards/.+/mean")
PANELS = (
    _train_and_held_out("Loss", "loss"),
    _train_and_held_out("Preference accuracy", "rewards/accuracies", "%"),
    _train_and_held_out("Reward margin", "rewards/margins", "chosen \u2212 rejected"),
    _train_and_held_out("Reward of completions", "reward"),
    Panel("Win rate against the start", "%", (("eval/win_rate", "held out"),)),
    _train_and_held_out("KL to the start", "kl/k3", "nats per completion"),
    _train_and_held_out("Perplexity", "perplexity", log=True),
    _chosen_and_rejected("Rewards, held out", "eval/rewards"),
    _chosen_and_rejected("Rewards in training", "rewards", main=False),
    _chosen_and_rejected("Log-probs, held out", "eval/logps", "nats per answer"),
    _chosen_and_rejected("Shift from the reference, held out", "eval/logratios", "nats per answer"),
    _training_only("Log-prob in training", "logps/per_token", "nats per token"),
    _train_and_held_out("Divergence", "divergence", "nats per token"),
    _train_and_held_out("Length of completions", "completions/length", "tokens"),
    _train_and_held_out("Completions that ended", "completions/ended", "%", main=False),
    _training_only("Spread of rewards", "reward/std", "within a prompt"),
    Panel("Clipped tokens", "%", (("clip_fraction", "train"), ("value/clip_fraction", "value")), main=False),
    _training_only("Value error", "value/error", log=True),
    _training_only("Entropy", "entropy/sampled", "nats per token"),
    _training_only("Scheduled \u03bb", "lambda", label="\u03bb"),
    _training_only("Scheduled \u03b2", "beta", label="\u03b2"),
    _training_only("Learning rate", "lr", label="learning rate"),
    _training_only("Gradient norm", "grad_norm", "before clipping", log=True),
)


def _panels(data: ReportData) -> tuple[Panel, ...]:
    """`PANELS`, with a panel for each reward after that of the total if a run's reward is a sum of several."""
    logged = {
        n for run in data.runs for line in (*run.trained[-1:], *run.evals[-1:]) for n in line if ONE_REWARD.fullmatch(n)
    }
    rewards = sorted({n.removeprefix("eval/") for n in logged})
    if len(rewards) < 2:
        return PANELS
    index = next(i for i, panel in enumerate(PANELS) if panel.lines[0][0] == "reward") + 1
    panels = (_train_and_held_out(f"Reward {n.split('/', 1)[1].removesuffix('/mean')}", n, main=False) for n in rewards)
    return (*PANELS[:index], *panels, *PANELS[index:])


BY_SET = (("Loss", "loss", ""), ("Preference accuracy", "rewards/accuracies", "%"), ("Perplexity", "perplexity", ""))


def _by_set(runs: Sequence[RunData]) -> list[Panel]:
    """Panels with a line for each of several held-out sets (`data.eval_path: {name: path}`)."""
    logged = {name: None for run in runs for line in run.evals for name in map(str, line) if name.count("/") == 2}
    sets = [name.split("/")[1] for name in logged if name.startswith("eval/") and name.endswith("/rows")]
    return [
        Panel(f"{title} by held-out set", unit, tuple((f"eval/{s}/{name}", s) for s in sets))
        for title, name, unit in BY_SET
        if sets
    ]


def curves(data: ReportData) -> Element | None:
    """All plots that have points; None if there are none."""
    panels = (*_panels(data), *_by_set(data.runs))
    if len(data.runs) == 1:
        plots = [(True, _single_run_plot(panel, data.runs[0])) for panel in panels]
        plots.append((True, _reliability(data.runs[0].calibration)))
    else:
        plots = [(panel.main, plot) for panel in panels for plot in _overlaid_plots(panel, data)]
    pictures = [(main, picture) for main, plot in plots if plot is not None and (picture := figure(plot)) is not None]
    if not pictures:
        return None
    main_plots, detail_plots = ([picture for main, picture in pictures if main is is_main] for is_main in (True, False))
    details = fold(
        f"{count(len(detail_plots), 'more plot')}: optimization and training details",
        el("div", detail_plots, class_="plots"),
        key="more-plots",
        open_=not main_plots,
    )
    return el("div", el("div", main_plots, class_="plots") if main_plots else None, details if detail_plots else None)


def metric_points(run: RunData, metric: str) -> tuple[Point, ...]:
    """(step, value) of a metric as logged; if a step was logged again after a resume, its last line counts."""
    by_step = {
        step: value
        for line in (run.evals if metric.startswith("eval/") else run.trained)
        if (step := num(line, "step")) is not None
        and (value := num(line, metric)) is not None
        # an online method's held-out loss is minus its reward, for choosing a checkpoint; it is not comparable to the training loss
        and not (metric == "eval/loss" and num(line, "eval/reward") == -value)
    }
    return tuple(sorted(by_step.items()))


def metric_intervals(run: RunData, metric: str) -> tuple[Band, ...]:
    """(step, low, high) of a metric's intervals on held-out rows."""
    by_step = {
        step: ci
        for line in run.evals
        if (step := num(line, "step")) is not None and (ci := ci_of(line, metric)) is not None
    }
    return tuple((step, *by_step[step]) for step in sorted(by_step))


def _single_run_plot(panel: Panel, run: RunData) -> Plot | None:
    lines: list[Line] = []
    note = ""
    for place, (metric, label) in enumerate(panel.lines):
        points = metric_points(run, metric)
        if not points:
            continue
        held_out = metric.startswith("eval/")
        place = 1 if label == "held out" else place
        if held_out or len(points) < MANY:
            ends = metric_intervals(run, metric) if held_out else ()
            lines.append(Line(label, points, place, ends, marked=held_out, tag=label))
            continue
        lines.append(Line(label, points, place, look="faint"))
        lines.append(Line(label, points, place, drawn=smooth(points), tag=label, column=False))
        note = f"thick: running mean of {window(len(points))} steps"
    if not lines:
        return None
    if len([line for line in lines if line.tag]) == 1 and panel.lines[0][1] in ("train", "held out", panel.title):
        lines = [line if line.label == "held out" else replace(line, tag="") for line in lines]
    levels = (Level(0.5, "one half"),) if panel.share and "win rate" in panel.title.lower() else ()
    return panel.plot(panel.title, lines, note, levels)


def _overlaid_plots(panel: Panel, data: ReportData) -> list[Plot]:
    """One plot for each line of the panel, since with many runs a shared plot would be crowded."""
    plots = []
    for metric, label in panel.lines:
        bands = len(data.settings) <= BANDS
        lines = [line for setting in data.settings for line in _setting_lines(setting, metric, bands)]
        if not lines:
            continue
        source = "held out" if metric.startswith("eval/") else "training"
        title = panel.title
        if len(panel.lines) > 1:
            title = f"{panel.title}, {label if label not in ('train', 'held out') else source}"
        sizes = [window(len(line.points)) for line in lines if line.drawn]
        notes = [f"running means of {max(sizes)} steps"] if sizes else []
        notes += ["thick: mean over seeds"] if any(len(s.runs) > 1 for s in data.settings) else []
        plots.append(panel.plot(title, lines, ", ".join(notes)))
    return plots


def _setting_lines(setting: Setting, metric: str, bands: bool) -> list[Line]:
    held_out = metric.startswith("eval/")
    series = [(run, p) for run in setting.runs if (p := metric_points(run, metric))]
    if not series:
        return []

    def line(label: str, points: tuple[Point, ...], **look: Any) -> Line:
        drawn = smooth(points) if not held_out and len(points) >= MANY else None
        return Line(label, points, setting.place, group=setting.key, drawn=drawn, **look)

    full_name = f"{setting.key} {setting.name}"
    if len(series) == 1:
        ends = metric_intervals(series[0][0], metric) if held_out and bands else ()
        return [line(full_name, series[0][1], ends=ends, marked=held_out, tag=setting.key)]
    lines = [line(f"{setting.key} seed {run.seed or '?'}", p, look="thin", column=False) for run, p in series]
    values = [dict(p) for _, p in series]
    mean = tuple((x, sum(v[x] for v in values) / len(values)) for x in sorted(set.intersection(*map(set, values))))
    name = f"{full_name}, mean of {len(series)} seeds"
    return [*lines, line(name, mean, marked=held_out, tag=setting.key)] if mean else lines


def _describe(lines: Sequence[Line], share: bool) -> str:
    """Describe the first and last values of each line, for screen readers."""
    parts: list[str] = []
    for line in lines:
        if line.column and len(parts) < 12:
            (x0, y0), (x1, y1) = line.points[0], line.points[-1]
            parts.append(
                f"{line.label}: {format_value(y0, share)} at step {x0:,.0f}, {format_value(y1, share)} at step {x1:,.0f}"
            )
    return "; ".join(dict.fromkeys(parts))


def _reliability(quality: Mapping[str, Any]) -> Plot | None:
    """Plot a reward model's confidence against the share of pairs it ranks correctly; a calibrated model is on the diagonal."""
    points = tuple(
        (100 * c, r)
        for b in sequence(mapping(quality.get("calibration")).get("bins"))
        if (c := num(b, "confidence")) is not None and (r := num(b, "right")) is not None
    )
    if not points:
        return None
    diagonal = Line("calibrated", ((50.0, 0.5), (100.0, 1.0)), 6, look="faint", tag="calibrated", column=False)
    measured = Line("share right", points, 0, marked=True, tag="")
    description = f"{len(points)} bins of held-out pairs; on the diagonal confidence and share right agree"
    title, unit, across = "Reliability on held-out pairs", "% right", "confidence, %"
    return Plot("reliability", title, unit, across, (diagonal, measured), description, share=True)
