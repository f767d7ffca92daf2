"""What a chat shows: text of models made harmless, wrapped, one column or two that grow together."""

from __future__ import annotations

from typing import TextIO

from rich.cells import cell_len, chop_cells

from penchant.watch.text import clean

GAP = " │ "
WIDE = 90  # cells from which two columns fit side by side


def safe(text: str) -> str:
    """Text of others as it may stand in a terminal: its lines are kept, everything that a terminal acts on is written out."""
    return "\n".join(clean(line, len(line)) for line in text.split("\n"))


class Wrapper:
    """Text that is wrapped at words as it grows; only its last line may still change.

    Args:
        width: cells of a line.
    """

    def __init__(self, width: int) -> None:
        self.width = max(1, width)
        self.lines: list[str] = [""]

    def add(self, text: str) -> None:
        """More text; it must be safe already."""
        for i, part in enumerate(text.split("\n")):
            if i:
                self.lines.append("")
            if part:
                self.lines[-1:] = _wrapped(self.lines[-1] + part, self.width)


def _wrapped(line: str, width: int) -> list[str]:
    made = []
    while cell_len(line.rstrip(" ")) > width:
        head = chop_cells(line, width)[0]
        rest = line[len(head) :]
        if not head:  # one character wider than the line
            head, rest = line[:1], line[1:]
        at = head.rfind(" ")
        if not rest.startswith(" ") and at > 0 and head[:at].strip(" "):
            head, rest = line[:at], line[at + 1 :]
        made.append(head.rstrip(" "))
        line = rest.lstrip(" ")
    return [*made, line]


def padded(text: str, width: int) -> str:
    """A line of exactly so many cells."""
    return text + " " * max(0, width - cell_len(text))


class OneColumn:
    """An answer that is written as it comes, without wrapping of its own."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._newline = out, True

    def add(self, side: int, text: str) -> None:
        if text:
            self._out.write(safe(text))
            self._out.flush()
            self._newline = text.endswith("\n")

    def end(self) -> None:
        if not self._newline:
            self._out.write("\n")
        self._out.flush()


class TwoColumns:
    """Two answers side by side: a line is final when both are past it, and the one below it is written anew until then.

    Args:
        width: cells of the terminal.
    """

    def __init__(self, out: TextIO, width: int, titles: tuple[str, str]) -> None:
        self._out = out
        self._width = (width - 1 - len(GAP)) // 2
        self._sides = (Wrapper(self._width), Wrapper(self._width))
        self._done = 0
        line = GAP.join(padded(clean(t)[: self._width], self._width) for t in titles)
        self._out.write(f"{line.rstrip()}\n{'─' * self._width}─┼─{'─' * self._width}\n")

    def add(self, side: int, text: str) -> None:
        self._sides[side].add(safe(text))
        while self._done < min(len(s.lines) for s in self._sides) - 1:
            self._out.write(f"\r\x1b[K{self._line(self._done)}\n")
            self._done += 1
        self._out.write(f"\r\x1b[K{self._line(self._done)}")
        self._out.flush()

    def end(self) -> None:
        """The lines that one side has more."""
        for at in range(self._done, max(len(s.lines) for s in self._sides)):
            self._out.write(f"\r\x1b[K{self._line(at)}\n")
        self._out.flush()

    def _line(self, at: int) -> str:
        left, right = (s.lines[at] if at < len(s.lines) else "" for s in self._sides)
        return f"{padded(left, self._width)}{GAP}{right}".rstrip(" ")
