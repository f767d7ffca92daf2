"""A frame of several runs: one line each, what is left of all, and below them the one that goes on."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from penchant.training.progress import duration
from penchant.watch.group_view import OPEN_STATES, GroupView, Member, Metric, steps_of
from penchant.watch.lines import STYLES, Size, bar, fit, heading, title, whole_frame
from penchant.watch.run_screen import PANEL_HEIGHT, panels
from penchant.watch.text import clean, with_interval

BAR = 10  # cells
ORDER = ("running", "preparing", "interrupted", "paused", "stopped", "finished", "cut", "to come", "waiting")


def group_frame(view: GroupView, size: Size) -> list[Text]:
    """The runs in `size.height` lines at most."""
    lines = [title(view.kind, view.title, _state(view), size.width)]
    if not view.members:
        return whole_frame([*lines, Text("no run has begun", "dim")], size)
    lines.append(_counts(view))
    rest = size.height - len(lines)
    table = _table(view, size.lower(rest if rest < len(view.members) + 2 + PANEL_HEIGHT else len(view.members) + 1))
    lines += table
    shown = _shown(view)
    room = size.height - len(lines) - 1
    if shown is not None and room >= PANEL_HEIGHT:
        curves = panels(shown.view, size.lower(room))
        lines += [heading(shown.view.name, size.width, size.glyphs), *curves] if curves else []
    return whole_frame(lines, size)


def _state(view: GroupView) -> Text:
    if view.going:
        left = view.left
        upper = "at most " if view.about.get("halving") else ""
        rest = f", {upper}{duration(left)} left" if left is not None else ""
        return Text.assemble(("running", STYLES["running"]), rest)
    done = bool(view.members) and all(m.ended for m in view.members)
    return Text("finished", "bold") if done else Text("not running", STYLES["interrupted"])


def _counts(view: GroupView) -> Text:
    counts = view.counts
    said = [f"{counts[s]} {s}" for s in ORDER if s in counts]
    n = len(view.members)
    return Text(f"{n} run{'s' if n > 1 else ''}: {', '.join(said)}")


def _table(view: GroupView, size: Size) -> list[Text]:
    """One line a run; where they do not all fit, those that go on first, and how many are left out."""
    members = view.members
    room = size.height - 1
    if len(members) > room:
        ranked = sorted(members, key=lambda m: ORDER.index(m.state) if m.state in ORDER else 0)
        kept = {id(m) for m in ranked[: max(0, room - 1)]}
        members = [m for m in members if id(m) in kept]
    metrics = [m.metric(view.metric) for m in members]
    names = sorted({m.name for m in metrics if m is not None})
    rows = [_row(m, found, size, mixed=len(names) > 1) for m, found in zip(members, metrics, strict=True)]
    words = ("run", "state", "steps", clean(names[0]) if len(names) == 1 else "metric", "")
    head = [Text(w, "dim") for w in words]
    widths = [max(r[i].cell_len for r in (head, *rows)) for i in range(4)]
    widths[0] = min(widths[0], max(12, size.width - sum(widths[1:]) - 2 * 4 - 12))
    lines = [_line(row, widths) for row in (head, *rows)]
    if len(members) < len(view.members):
        lines.append(Text(f"and {len(view.members) - len(members)} more, for which there is no room", "dim"))
    return lines


def _row(member: Member, metric: Metric | None, size: Size, mixed: bool) -> list[Text]:
    step, total = steps_of(member)
    steps = (
        Text.assemble(bar(step / total, BAR, size), f" {step:,}/{total:,}")
        if total
        else Text(f"{step:,}" if step else "")
    )
    end = ""
    if member.state in ("stopped", "cut"):
        end = member.why.removeprefix("stopped at ")
    elif member.state == "running":
        speed, left = member.view.speed, member.view.left
        end = "" if left is None else f"{duration(left)} left"
        end += "" if speed is None else f", {speed.tokens:,.0f} tokens/s"
    elif member.state == "finished" and (took := member.took) is not None:
        end = duration(took)
    value = "" if metric is None else with_interval(metric.value, metric.interval)
    if mixed and metric is not None:
        value += f" {metric.name}"
    return [Text(member.view.name), Text(member.state, STYLES.get(member.state, "")), steps, Text(value), Text(end)]


def _line(cells: Sequence[Text], widths: Sequence[int]) -> Text:
    return Text("  ").join([*(fit(c, w) for c, w in zip(cells, widths, strict=False)), cells[-1]])


def _shown(view: GroupView) -> Member | None:
    """The run below the lines: the first that goes on, else the last that came to its end, else the last that has figures."""
    members = [m for m in view.members if m.view.last]
    going = [m for m in members if m.state in OPEN_STATES]
    done = [m for m in members if m.state == "finished"] or members
    return going[0] if going else done[-1] if done else None
