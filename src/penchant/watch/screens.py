"""Renders the frames of `penchant watch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from penchant.base.text import clean, counted
from penchant.metrics.names import METRICS
from penchant.training.console import duration
from penchant.watch.plot import ASCII, LINE, POINT, UNICODE, Glyphs, plot
from penchant.watch.views import (
    FIGURES,
    OPEN_STATES,
    GroupView,
    Member,
    Metric,
    RunView,
    interval,
    number,
    step_count,
)

# ---- Building blocks: lines of Text cut to the terminal's width ----

CONSOLE = Console()  # only used for wrapping
STYLES = {
    "running": "bold green",
    "preparing": "green",
    "paused": "cyan",
    "finished": "bold",
    "stopped": "bold red",
    "interrupted": "bold yellow",
    "cut": "dim",
    "to come": "dim",
    "waiting": "dim",
}


def format_figure(value: float | None) -> str:
    """Format a figure with up to four decimals: ``0.5833``, ``-165.74``, ``1.20e-05``."""
    if value is None:
        return "-"
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.2e}"
    return f"{value + 0.0:,.{4 if size < 10 else 2 if size < 1000 else 0}f}"  # + 0.0: a negative zero loses its sign


def format_change(change: float) -> str:
    """Format a difference as a figure, with its sign: ``+0.0800``, ``-1.20e-05``."""
    return f"{'+' if change >= 0 else ''}{format_figure(change)}"


def with_interval(value: float | None, ci: tuple[float, float] | None) -> str:
    """Format ``0.7000 [0.6000, 0.8000]``; the interval is left out if it has no width after rounding."""
    ends = [] if ci is None else [format_figure(end) for end in ci]
    return format_figure(value) + (f" [{', '.join(ends)}]" if len(set(ends)) == 2 else "")


@dataclass(frozen=True, slots=True)
class Size:
    """Size of a frame in cells, and the characters it is drawn with."""

    width: int
    height: int
    glyphs: Glyphs = UNICODE

    def with_height(self, height: int) -> Size:
        return Size(self.width, max(0, height), self.glyphs)


def fit(text: Text, width: int) -> Text:
    """Cut or pad a text to exactly `width` cells."""
    fitted = text.copy()
    fitted.truncate(width, overflow="ellipsis", pad=True)
    return fitted


def justify(left: Text, right: Text, width: int) -> Text:
    """Put one text at each end of a line; the left one is cut if both do not fit."""
    available = max(0, width - right.cell_len - 2)
    return fit(Text.assemble(fit(left, available), "  ", right), width)


def title(kind: str, name: str, state: Text, width: int) -> Text:
    """Return the first line: what is shown, and its state at the right. A long path keeps its end, which distinguishes it from others."""
    kind = f"{kind}  " if kind else ""
    available = max(1, width - state.cell_len - 2 - cell_len(kind))
    if cell_len(name) > available:
        while name and cell_len(name) >= available:
            name = name[1:]
        name = f"…{name}"
    return justify(Text.assemble((kind, "bold cyan"), (name, "bold")), state, width)


def columns(cells: Sequence[Text], widths: Sequence[int]) -> Text:
    """Join cells into one line; those that have a width are fitted to it."""
    fitted = [fit(c, w) for c, w in zip(cells, widths, strict=False)]
    return Text("  ").join([*fitted, *cells[len(fitted) :]])


def wrap_labelled(label: str, text: str, width: int, max_lines: int, label_width: int) -> list[Text]:
    """Wrap a labelled text to at most `max_lines` lines; an ellipsis marks a cut."""
    available = max(1, width - label_width)
    lines = [line.plain.strip() for line in Text(text).wrap(CONSOLE, available)]
    if len(lines) > max_lines:
        last = Text(lines[max_lines - 1] + "…")
        last.truncate(available, overflow="ellipsis")
        lines = [*lines[: max_lines - 1], last.plain]
    first = [label, *[""] * (len(lines) - 1)]
    return [Text.assemble((f"{w:<{label_width}}", "dim"), line) for w, line in zip(first, lines, strict=True)]


def heading(title: str, width: int, glyphs: Glyphs) -> Text:
    """Return a rule with a title in it."""
    start = f"{glyphs.rule * 2} {title} "
    return Text(start + glyphs.rule * max(0, width - cell_len(start)), "dim")


def bar(fraction: float, width: int, size: Size) -> Text:
    """Draw a progress bar."""
    filled, empty = ("#", "-") if size.glyphs is ASCII else ("━", "─")
    n = min(width, max(0, round(fraction * width)))
    return Text.assemble((filled * n, "green"), (empty * (width - n), "dim"))


def crop_frame(lines: Sequence[Text], size: Size) -> list[Text]:
    """Return at most `size.height` lines, each of exactly its width."""
    return [fit(line, size.width) for line in lines[: size.height]]


# ---- A single run: progress, curves, the last evaluation beside the first, flags, and the latest answers ----

PANEL_WIDTH = 38  # minimum
PANEL_HEIGHT = 7  # minimum to show the shape of a curve
MAX_PANEL_HEIGHT = 18
LABEL_WIDTH = 8  # cells before a sample's text

OFFLINE = (  # panels, most informative first
    *("loss", "rewards/accuracies", "rewards/margins", "kl/k3", "reward", "win_rate", "logps/chosen"),
    *("perplexity", "completions/length", "grad_norm", "lr"),
)
ONLINE = ("reward", "kl/k3", "completions/length", "loss", "win_rate", "grad_norm", "lr")
WAITING = {
    "waiting": "nothing there yet; it is shown when it begins",
    "preparing": "reading data and models; the first step is still to come",
}


def run_frame(view: RunView, size: Size) -> list[Text]:
    """Render a run in at most `size.height` lines."""
    lines = header(view, size)
    if view.state in WAITING and not view.last and not view.last_eval:
        lines.append(Text(WAITING[view.state], "dim"))
    lines += _flags(view, size)
    available = size.height - len(lines)
    table = _table(view, size)
    samples_room = 4 if view.samples else 0
    table = table[: max(0, available - samples_room - PANEL_HEIGHT)]
    curves = panels(view, size.with_height(available - len(table) - samples_room))
    lines += curves + table
    lines += _samples(view, size.with_height(size.height - len(lines)))
    return crop_frame(lines, size)


# ---- progress ----


def header(view: RunView, size: Size) -> list[Text]:
    """Return the method and state, the progress, the speed, and an explanation if the state needs one."""
    lines = [title(view.method, view.name, state_text(view), size.width)]
    if view.step or view.total:
        lines.append(_progress(view, size))
    if figures := _progress_figures(view):
        lines.append(Text("  ".join(figures)))
    if view.why:
        lines += wrap_labelled("", view.why, size.width, 2, 0)
    if view.unreadable:
        n = view.unreadable
        lines.append(Text(f"{n} line{'s' if n > 1 else ''} of its logs cannot be read", "yellow"))
    return lines


def state_text(view: RunView) -> Text:
    """Return the state, with the time left or taken."""
    time_text = ""
    if view.state == "running" and view.seconds_left is not None:
        time_text = f", {duration(view.seconds_left)} left"
    elif view.state == "finished" and view.elapsed is not None:
        time_text = f" in {duration(view.elapsed)}"
    return Text.assemble((view.state, STYLES[view.state]), time_text)


def _progress(view: RunView, size: Size) -> Text:
    step, total = view.step, view.total
    step_text = f"step {step:,}" + (f"/{total:,}" if total else "")
    epoch, epochs = view.epoch
    suffix = "" if epoch is None else f"epoch {epoch:.2f}" + (f" of {epochs:.3g}" if epochs is not None else "")
    if not total:
        return Text(f"{step_text}  {suffix}")
    suffix = f"{min(100, 100 * step // total)}%  {suffix}".rstrip()
    available = max(4, min(60, size.width - len(step_text) - len(suffix) - 4))
    return Text.assemble(f"{step_text}  ", bar(step / total, available, size), f"  {suffix}")


def _progress_figures(view: RunView) -> list[str]:
    """Return speed, memory, learning rate, and elapsed time."""
    figures = []
    speed = view.speed
    if speed is not None:
        rows = {
            "sft": "rows",
            "dft": "rows",
            "plackett_luce": "lists",
            "lipo": "lists",
            "kto": "rows",
            "bco": "rows",
            "pmpo": "rows",
        }.get(view.method, "pairs")
        figures += [f"{speed.tokens:,.0f} tokens/s", f"{speed.trees:,.1f} {'prompts' if view.online else rows}/s"]
    if view.memory is not None:
        figures.append(f"peak {view.memory:.2f} GB")
    rate = number(view.last.get("lr"))
    if rate is not None:
        figures.append(f"lr {rate:.1e}")
    if view.state in ("running", "preparing") and view.elapsed is not None:
        figures.append(f"running for {duration(view.elapsed)}")
    return figures


def _flags(view: RunView, size: Size) -> list[Text]:
    limit = max(1, size.height // 12)
    lines = []
    for flag in view.flags[:limit]:
        style = "bold red" if flag.get("level") == "warning" else "yellow"
        label, sentence = clean(flag.get("title") or flag.get("name") or "flag", 80), clean(flag.get("sentence", ""))
        lines.append(fit(Text.assemble((f"! {label}: ", style), sentence), size.width))
    if len(view.flags) > limit:
        lines.append(Text(f"! and {len(view.flags) - limit} more in flags.json", "yellow"))
    return lines


# ---- curves ----


def panels(view: RunView, size: Size) -> list[Text]:
    """Return as many panels as fit, most informative first."""
    keys = [(key, f"eval/{key}") for key in (ONLINE if view.online else OFFLINE)]
    panel_keys = [(line, points) for line, points in keys if view.line.get(line) or view.points.get(points)]
    panel_columns = min(len(panel_keys), max(1, (size.width + 2) // (PANEL_WIDTH + 2)))
    if not panel_keys or size.height < PANEL_HEIGHT:
        return []
    panel_rows = min(-(-len(panel_keys) // panel_columns), max(1, size.height // (PANEL_HEIGHT + 2)))
    height, width = (
        min(MAX_PANEL_HEIGHT, size.height // panel_rows),
        (size.width - 2 * (panel_columns - 1)) // panel_columns,
    )
    lines: list[Text] = []
    for i in range(panel_rows):
        row = [
            _panel(view, *keys, width, height, size) for keys in panel_keys[i * panel_columns : (i + 1) * panel_columns]
        ]
        lines += [columns(cells, [width] * len(cells)) for cells in zip(*row, strict=True)]
    return lines


def _panel(view: RunView, key: str, held_out: str, width: int, height: int, size: Size) -> list[Text]:
    line, points = view.line.get(key, []), view.points.get(held_out, [])
    if view.online and key == "loss":
        points = []  # on held-out rows, loss is a different figure
    train_text = (f"  {format_figure(line[-1][1])}" if line else "", LINE)
    values = [with_interval(points[-1].value, points[-1].interval), format_figure(points[-1].value)] if points else [""]
    titles = [
        Text.assemble((METRICS[key].picture, "bold"), train_text, (f"  {size.glyphs.point} {v}" if v else "", POINT))
        for v in values
    ]
    top = next((t for t in titles if t.cell_len <= width), titles[-1])  # drop the interval if it does not fit
    return [top, *plot(line, points, width, height - 1, size.glyphs, view.step)]


# ---- the last evaluation beside the first, and sampled answers ----


def _table(view: RunView, size: Size) -> list[Text]:
    keys = [(key, METRICS[key].row) for key in FIGURES if METRICS[key].row]
    first, last = view.first_eval, view.last_eval
    if last:
        rows = [
            _held_out_row(view, f"eval/{k}", label) for k, label in keys if number(last.get(f"eval/{k}")) is not None
        ]
        first_step, last_step = (f"step {step_count(e.get('step')) or 0:,}" for e in (first, last))
        row_count = step_count(last.get("rows", last.get("eval/rows")))
        heading_text = "held out" + (f", {counted(row_count, 'row')}" if row_count else "")
        head = ("", first_step, last_step, "change") if first_step != last_step else ("", "", last_step, "")
    else:
        rows = [
            (label, format_figure(e[0]), format_figure(e[1]), format_change(e[1] - e[0]))
            for k, label in keys
            if (e := view.edges(k))
        ]
        heading_text, head = "training: mean of the first and of the last steps", ("", "first", "last", "change")
    if not rows:
        return []
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(4)]
    lines = [("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip()) for r in (head, *rows)]
    return [heading(heading_text, size.width, size.glyphs), Text(lines[0], "dim"), *map(Text, lines[1:])]


def _held_out_row(view: RunView, key: str, label: str) -> tuple[str, str, str, str]:
    """Return a table row of a held-out figure; a single evaluation is shown as the last one."""
    first, last = number(view.first_eval.get(key)), number(view.last_eval.get(key))
    before, after = (with_interval(v, interval(e, key)) for v, e in ((first, view.first_eval), (last, view.last_eval)))
    if first is None or last is None or view.first_eval.get("step") == view.last_eval.get("step"):
        return label, "", after, ""
    return label, before, after, format_change(last - first)


def _samples(view: RunView, size: Size) -> list[Text]:
    rows = view.samples
    if not rows or size.height < 3:
        return []
    heading_text = "last answers" if any("after" in r for r in rows) else "answers before training"
    lines = [heading(heading_text, size.width, size.glyphs)]
    parts = [("prompt", "prompt"), ("before", "before"), ("completion", "start"), ("after", "after")]
    samples = [[(label, clean(row[key])) for key, label in parts if isinstance(row.get(key), str)] for row in rows]
    samples = [p for p in samples if p]
    sample_count = max(1, (size.height - 1) // 4)
    samples = samples[-sample_count:]
    lines_each = max(1, (size.height - 1) // max(1, sum(len(p) for p in samples)))
    for sample in samples:
        for label, text in sample:
            lines += wrap_labelled(label, text, size.width, lines_each, LABEL_WIDTH)
    return lines[: size.height]


# ---- Several runs: one line each, the time left for all, and below them the run in progress ----

BAR_WIDTH = 10  # cells
STATE_ORDER = ("running", "preparing", "interrupted", "paused", "stopped", "finished", "cut", "to come", "waiting")


def group_frame(view: GroupView, size: Size) -> list[Text]:
    """Render the runs in at most `size.height` lines."""
    lines = [title(view.kind, view.title, _group_state(view), size.width)]
    if not view.members:
        return crop_frame([*lines, Text("no run has begun", "dim")], size)
    lines.append(_counts(view))
    height_left = size.height - len(lines)
    line_count = len(view.members) + 1
    lines += _runs(view, size.with_height(height_left if height_left < line_count + 1 + PANEL_HEIGHT else line_count))
    plotted = _run_to_plot(view)
    available = size.height - len(lines) - 1
    if plotted is not None and available >= PANEL_HEIGHT:
        curves = panels(plotted.view, size.with_height(available))
        lines += [heading(plotted.view.name, size.width, size.glyphs), *curves] if curves else []
    return crop_frame(lines, size)


def _group_state(view: GroupView) -> Text:
    if view.is_active:
        seconds_left = view.seconds_left
        prefix = "at most " if view.about.get("halving") else ""
        time_left = f", {prefix}{duration(seconds_left)} left" if seconds_left is not None else ""
        return Text.assemble(("running", STYLES["running"]), time_left)
    if view.kind == "pipeline" and any(m.state == "stopped" for m in view.members):
        return Text("stopped", STYLES["stopped"])
    # in a sweep a stopped run counts as a result; elsewhere it may be resumed
    is_over = [m.ended if view.kind == "sweep" else m.state == "finished" for m in view.members]
    return Text("finished", "bold") if is_over and all(is_over) else Text("not running", STYLES["interrupted"])


def _counts(view: GroupView) -> Text:
    counts = view.counts
    parts = [f"{counts[s]} {s}" for s in STATE_ORDER if s in counts]
    n = len(view.members)
    return Text(f"{n} run{'s' if n > 1 else ''}: {', '.join(parts)}")


def _runs(view: GroupView, size: Size) -> list[Text]:
    """Return one line per run. If not all fit, active runs are kept first and the omitted ones are counted."""
    members = view.members
    available = size.height - 1
    if len(members) > available:
        ranked = sorted(members, key=lambda m: STATE_ORDER.index(m.state) if m.state in STATE_ORDER else 0)
        kept_ids = {id(m) for m in ranked[: max(0, available - 1)]}
        members = [m for m in members if id(m) in kept_ids]
    metrics = [m.metric(view.metric) for m in members]
    names = sorted({m.name for m in metrics if m is not None})
    rows = [_row(m, metric, size, mixed=len(names) > 1) for m, metric in zip(members, metrics, strict=True)]
    words = ("run", "state", "steps", clean(names[0]) if len(names) == 1 else "metric", "")
    head = [Text(w, "dim") for w in words]
    widths = [max(r[i].cell_len for r in (head, *rows)) for i in range(4)]
    notes = min(10, max((r[4].cell_len for r in rows), default=0))
    widths[0] = min(widths[0], max(12, size.width - sum(widths[1:]) - 2 * 4 - notes))
    for row in rows:
        row[0] = _without_middle(row[0].plain, widths[0])
    lines = [columns(row, widths) for row in (head, *rows)]
    if len(members) < len(view.members):
        lines.append(Text(f"and {len(view.members) - len(members)} more that do not fit", "dim"))
    return lines


def _without_middle(name: str, width: int) -> Text:
    """Cut a run's name in the middle: what tells runs apart is often at its end (`-seed-1`)."""
    kept = len(name)
    while (
        cell_len(shown := name if kept == len(name) else f"{name[: kept // 3]}…{name[-(kept - kept // 3) :]}") > width
    ):
        kept -= 1
    return Text(shown)


def _row(member: Member, metric: Metric | None, size: Size, mixed: bool) -> list[Text]:
    step, total = member.steps
    steps = Text(f"{step:,}" if step else "")
    if total:
        steps = Text.assemble(bar(step / total, BAR_WIDTH, size), f" {step:,}/{total:,}")
    note, view, elapsed = "", member.view, member.elapsed
    if member.state in ("stopped", "cut"):
        note = member.why.removeprefix("stopped at ")
    elif member.state == "running":
        note = "" if view.seconds_left is None else f"{duration(view.seconds_left)} left"
        note += "" if view.speed is None else f", {view.speed.tokens:,.0f} tokens/s"
    elif member.state == "finished" and elapsed is not None:
        note = duration(elapsed)
    value = "" if metric is None else with_interval(metric.value, metric.interval)
    if mixed and metric is not None:
        value += f" {metric.name}"
    return [Text(view.name), Text(member.state, STYLES.get(member.state, "")), steps, Text(value), Text(note)]


def _run_to_plot(view: GroupView) -> Member | None:
    """Return the run to plot: the first active one, else the last finished one, else the last one with figures, else None."""
    members = [m for m in view.members if m.view.last]
    active = [m for m in members if m.state in OPEN_STATES]
    finished = [m for m in members if m.state == "finished"] or members
    return active[0] if active else finished[-1] if finished else None
