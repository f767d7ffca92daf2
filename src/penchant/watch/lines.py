"""Lines of a frame: Texts that are cut to the terminal's width, side by side and one below the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from penchant.watch.plot import ASCII, UNICODE, Glyphs

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


@dataclass(frozen=True, slots=True)
class Size:
    """Cells of a frame, and what it is drawn with."""

    width: int
    height: int
    glyphs: Glyphs = UNICODE

    def lower(self, height: int) -> Size:
        return Size(self.width, max(0, height), self.glyphs)

    @property
    def dots(self) -> str:
        """Between figures of one line."""
        return "  "

    @property
    def full(self) -> tuple[str, str]:
        """A progress bar's two halves."""
        return ("#", "-") if self.glyphs is ASCII else ("━", "─")


def fit(text: Text, width: int) -> Text:
    """The text in exactly `width` cells."""
    made = text.copy()
    made.truncate(width, overflow="ellipsis", pad=True)
    return made


def ends(left: Text, right: Text, width: int) -> Text:
    """One text at each end of a line; the left one is cut where both do not fit."""
    room = max(0, width - right.cell_len - 2)
    return fit(Text.assemble(fit(left, room), "  ", right), width)


def title(kind: str, name: str, state: Text, width: int) -> Text:
    """The first line: what is shown, and its state at the other end. Of a long path the end is kept, which tells it from others."""
    kind = f"{kind}  " if kind else ""
    room = max(1, width - state.cell_len - 2 - cell_len(kind))
    if cell_len(name) > room:
        while name and cell_len(name) >= room:
            name = name[1:]
        name = f"…{name}"
    return ends(Text.assemble((kind, "bold cyan"), (name, "bold")), state, width)


def beside(blocks: Sequence[Sequence[Text]], widths: Sequence[int], gap: int = 2) -> list[Text]:
    """Blocks of lines next to each other."""
    height = max((len(b) for b in blocks), default=0)
    rows = []
    for i in range(height):
        cells = [fit(b[i] if i < len(b) else Text(), w) for b, w in zip(blocks, widths, strict=True)]
        rows.append(Text(" " * gap).join(cells))
    return rows


def wrapped(label: str, text: str, width: int, most: int, label_width: int) -> list[Text]:
    """A labelled text on at most `most` lines, the last one cut with an ellipsis where it goes on."""
    room = max(1, width - label_width)
    lines = list(_broken(text, room)) or [""]
    if len(lines) > most:
        last = Text(lines[most - 1] + "…")
        last.truncate(room, overflow="ellipsis")
        lines = [*lines[: most - 1], last.plain]
    first = [label, *[""] * (len(lines) - 1)]
    return [Text.assemble((f"{w:<{label_width}}", "dim"), line) for w, line in zip(first, lines, strict=True)]


def _broken(text: str, width: int) -> Iterator[str]:
    """Pieces of at most `width` cells, cut at spaces where there are any."""
    line = ""
    for word in text.split(" "):
        if line and cell_len(f"{line} {word}") > width:
            yield line
            line = ""
        line = f"{line} {word}" if line else word
        while cell_len(line) > width:
            n = max(1, next((i for i in range(len(line)) if cell_len(line[: i + 1]) > width), len(line)))
            yield line[:n]
            line = line[n:]
    if line:
        yield line


def heading(title: str, width: int, glyphs: Glyphs) -> Text:
    """A rule with a title in it."""
    start = f"{glyphs.rule * 2} {title} "
    return Text(start + glyphs.rule * max(0, width - cell_len(start)), "dim")


def bar(done: float, width: int, size: Size) -> Text:
    """A progress bar."""
    full, rest = size.full
    n = min(width, max(0, round(done * width)))
    return Text.assemble((full * n, "green"), (rest * (width - n), "dim"))


def whole_frame(lines: Sequence[Text], size: Size) -> list[Text]:
    """At most `size.height` lines, each of exactly its width."""
    return [fit(line, size.width) for line in lines[: size.height]]
