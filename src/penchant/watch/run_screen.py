"""A frame of one run: how far it is, its curves, the last evaluation beside the first, flags, and its last answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from penchant.training.progress import duration
from penchant.watch.lines import STYLES, Size, bar, beside, fit, heading, title, whole_frame, wrapped
from penchant.watch.plot import LINE, POINT, plot
from penchant.watch.run_view import RunView
from penchant.watch.text import clean, figure, interval, number, whole, with_interval

PANEL_WIDTH = 38  # the least
PANEL_HEIGHT = 7  # the least that shows a shape
TALLEST = 18
LABEL = 8  # cells before a sample's text


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture: its title, and the training and held-out figures in it ("" for none)."""

    title: str
    line: str
    points: str = ""


LOSS = Panel("loss", "loss", "eval/loss")
OFFLINE = (
    LOSS,
    Panel("preference accuracy", "rewards/accuracies", "eval/rewards/accuracies"),
    Panel("reward margin", "rewards/margins", "eval/rewards/margins"),
    Panel("KL to the start", "", "eval/kl/policy_ref"),
    Panel("reward", "", "eval/reward"),
    Panel("win rate", "", "eval/win_rate"),
    Panel("log-prob, chosen", "logps/chosen", "eval/logps/chosen"),
    Panel("perplexity", "", "eval/perplexity"),
    Panel("completion tokens", "", "eval/completions/length"),
    Panel("gradient norm", "grad_norm"),
    Panel("learning rate", "lr"),
)
ONLINE = (
    Panel("reward", "reward", "eval/reward"),
    Panel("KL to the start", "kl/policy_ref", "eval/kl/policy_ref"),
    Panel("completion tokens", "completions/length", "eval/completions/length"),
    Panel("loss", "loss"),  # held out it is another figure
    Panel("win rate", "", "eval/win_rate"),
    Panel("gradient norm", "grad_norm"),
    Panel("learning rate", "lr"),
)
TABLE = (
    ("eval/reward", "reward"),
    ("eval/win_rate", "win rate"),
    ("eval/loss", "loss"),
    ("eval/rewards/accuracies", "accuracy"),
    ("eval/rewards/margins", "margin"),
    ("eval/kl/policy_ref", "KL, nats"),
    ("eval/perplexity", "perplexity"),
    ("eval/completions/length", "tokens"),
    ("eval/logps/chosen", "log-prob, chosen"),
    ("eval/logps/rejected", "log-prob, rejected"),
    ("eval/calibration/ece", "calibration error"),
)
WAITING = {
    "waiting": "nothing there yet; it is shown when it begins",
    "preparing": "reading data and models; the first step is still to come",
}


def run_frame(view: RunView, size: Size) -> list[Text]:
    """A run in `size.height` lines at most."""
    lines = header(view, size)
    if view.state in WAITING and not view.last and not view.last_eval:
        lines.append(Text(WAITING[view.state], "dim"))
    lines += _flags(view, size)
    room = size.height - len(lines)
    table = _table(view, size)
    samples_room = 4 if view.samples else 0
    table = table[: max(0, room - samples_room - PANEL_HEIGHT)]
    curves = panels(view, size.lower(room - len(table) - samples_room))
    lines += curves + table
    lines += _samples(view, size.lower(size.height - len(lines)))
    return whole_frame(lines, size)


# ---------------------------------------------------------------------------------------------------------------------
# how far it is


def header(view: RunView, size: Size) -> list[Text]:
    """What it is and its state; progress; speed; and a line of explanation where the state wants one."""
    lines = [title(view.method, view.name, state_words(view), size.width)]
    if view.step or view.total:
        lines.append(_progress(view, size))
    if figures := _figures(view):
        lines.append(Text(size.dots).join(figures))
    if view.why:
        lines += wrapped("", view.why, size.width, 2, 0)
    if view.unreadable:
        n = view.unreadable
        lines.append(Text(f"{n} line{'s' if n > 1 else ''} of its logs cannot be read", "yellow"))
    return lines


def state_words(view: RunView) -> Text:
    """The state, with the time left or taken."""
    rest = ""
    if view.state == "running" and view.left is not None:
        rest = f", {duration(view.left)} left"
    elif view.state == "finished" and view.took is not None:
        rest = f" in {duration(view.took)}"
    return Text.assemble((view.state, STYLES[view.state]), rest)


def _progress(view: RunView, size: Size) -> Text:
    step, total = view.step, view.total
    said = f"step {step:,}" + (f"/{total:,}" if total else "")
    epoch, epochs = view.epoch
    end = "" if epoch is None else f"epoch {epoch:.2f}" + (f" of {epochs:.3g}" if epochs is not None else "")
    if not total:
        return Text(f"{said}  {end}")
    end = f"{min(100, 100 * step // total)}%  {end}".rstrip()
    room = max(4, min(60, size.width - len(said) - len(end) - 4))
    return Text.assemble(f"{said}  ", bar(step / total, room, size), f"  {end}")


def _figures(view: RunView) -> list[Text]:
    """Speed, memory, learning rate, and how long it has been going."""
    found = []
    speed = view.speed
    if speed is not None:
        rows = {"sft": "rows", "kto": "rows", "bco": "rows", "pmpo": "rows"}.get(view.method, "pairs")
        found += [f"{speed.tokens:,.0f} tokens/s", f"{speed.trees:,.1f} {'prompts' if view.online else rows}/s"]
    if view.memory is not None:
        found.append(f"peak {view.memory:.2f} GB")
    rate = number(view.last.get("lr"))
    if rate is not None:
        found.append(f"lr {rate:.1e}")
    if view.state in ("running", "preparing") and view.took is not None:
        found.append(f"going for {duration(view.took)}")
    return [Text(f) for f in found]


def _flags(view: RunView, size: Size) -> list[Text]:
    most = max(1, size.height // 12)
    lines = []
    for flag in view.flags[:most]:
        style = "bold red" if flag.get("level") == "warning" else "yellow"
        named, sentence = clean(flag.get("title") or flag.get("name") or "flag", 80), clean(flag.get("sentence", ""))
        lines.append(fit(Text.assemble((f"! {named}: ", style), sentence), size.width))
    if len(view.flags) > most:
        lines.append(Text(f"! and {len(view.flags) - most} more in flags.json", "yellow"))
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# curves


def panels(view: RunView, size: Size) -> list[Text]:
    """As many pictures as fit, the most telling first."""
    wanted = [p for p in (ONLINE if view.online else OFFLINE) if view.line.get(p.line) or view.points.get(p.points)]
    across = min(len(wanted), max(1, (size.width + 2) // (PANEL_WIDTH + 2)))
    if not wanted or size.height < PANEL_HEIGHT:
        return []
    down = min(-(-len(wanted) // across), max(1, size.height // (PANEL_HEIGHT + 2)))
    height = min(TALLEST, size.height // down)
    width = (size.width - 2 * (across - 1)) // across
    lines: list[Text] = []
    for i in range(down):
        row = wanted[i * across : (i + 1) * across]
        lines += beside([_panel(view, p, width, height, size) for p in row], [width] * len(row))
    return lines


def _panel(view: RunView, panel: Panel, width: int, height: int, size: Size) -> list[Text]:
    line, points = view.line.get(panel.line, []), view.points.get(panel.points, [])
    trained = (f"  {figure(line[-1][1])}" if line else "", LINE)
    last = points[-1] if points else None
    words = [""] if last is None else [with_interval(last.value, last.interval), figure(last.value)]
    made = [
        Text.assemble((panel.title, "bold"), trained, (f"  {size.glyphs.point} {w}" if w else "", POINT)) for w in words
    ]
    shown = next((t for t in made if t.cell_len <= width), made[-1])  # without the interval where that does not fit
    return [shown, *plot(line, points, width, height - 1, size.glyphs, view.step)]


# ---------------------------------------------------------------------------------------------------------------------
# the last evaluation beside the first, and answers


def _table(view: RunView, size: Size) -> list[Text]:
    if view.last_eval:
        rows = [_held_out_row(view, key, name) for key, name in TABLE if number(view.last_eval.get(key)) is not None]
        first, last = (whole(e.get("step")) or 0 for e in (view.first_eval, view.last_eval))
        held = whole(view.last_eval.get("rows", view.last_eval.get("eval/rows")))
        which = "held out" + (f", {held:,} rows" if held else "")
        head = ("", f"step {first:,}", f"step {last:,}", "change") if first != last else ("", "", f"step {last:,}", "")
    else:
        keys = [(key.removeprefix("eval/"), name) for key, name in TABLE]
        rows = [(n, figure(e[0]), figure(e[1]), f"{e[1] - e[0]:+.4f}") for k, n in keys if (e := view.edges(k))]
        which, head = "training: mean of the first and of the last steps", ("", "first", "last", "change")
    if not rows:
        return []
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(4)]
    body = [heading(which, size.width, size.glyphs)]
    for cells, style in ((head, "dim"), *((r, "") for r in rows)):
        padded = [cells[0].ljust(widths[0]), *(c.ljust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        body.append(Text("  ".join(padded).rstrip(), style))
    return body


def _held_out_row(view: RunView, key: str, name: str) -> tuple[str, str, str, str]:
    """Where there is one evaluation only, it is the last."""
    first, last = (number(e.get(key)) for e in (view.first_eval, view.last_eval))
    before = with_interval(first, interval(view.first_eval.get(f"{key}/ci")))
    after = with_interval(last, interval(view.last_eval.get(f"{key}/ci")))
    if view.first_eval.get("step") == view.last_eval.get("step"):
        return name, "", after, ""
    change = "" if first is None or last is None else f"{last - first:+.4f}"
    return name, before if first is not None else "", after, change


def _samples(view: RunView, size: Size) -> list[Text]:
    rows = view.samples
    if not rows or size.height < 3:
        return []
    which = "last answers" if any("after" in r for r in rows) else "answers before training"
    lines = [heading(which, size.width, size.glyphs)]
    parts = [("prompt", "prompt"), ("before", "before"), ("completion", "start"), ("after", "after")]
    per = [[(label, clean(row[key])) for key, label in parts if isinstance(row.get(key), str)] for row in rows]
    per = [p for p in per if p]
    shown = max(1, (size.height - 1) // 4)
    per = per[-shown:]
    most = max(1, (size.height - 1) // max(1, sum(len(p) for p in per)))
    for sample in per:
        for label, text in sample:
            lines += wrapped(label, text, size.width, most, LABEL)
    return _cut(lines, size.height)


def _cut(lines: Sequence[Text], height: int) -> list[Text]:
    return list(lines[:height])
