"""`penchant watch`: follows runs in a terminal. It only reads their files, and loads neither torch nor a model."""

from __future__ import annotations

import os
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from penchant.base.signals import interrupted_by
from penchant.base.text import clean, closest, unescaped
from penchant.errors import CheckpointError, ConfigError
from penchant.runfolder import damage_notes
from penchant.watch.plot import ASCII, UNICODE
from penchant.watch.screens import Size, crop_frame, group_frame, justify, run_frame, wrap_labelled
from penchant.watch.views import GroupView, RunView, is_run, open_view

__all__ = ["watch"]


# ---- The main loop: read what is new, draw a frame, wait for a key ----

SLICE = 0.1  # seconds between two checks of the keyboard and the window size
PRINTED = (80, 40)  # columns and lines of a frame that is not shown on a terminal
QUIT, NEXT, BACK = ("q", "Q", "\x03", "\x04"), ("n", "\t"), ("p", "b")

View = RunView | GroupView


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command line, as for every command whose reader is gone (`| head`); rich would exit with 1."""
        raise BrokenPipeError


class Watch:
    """The runs being watched, and which of them is on the screen.

    Args:
        paths: run, sweep and pipeline folders.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.view: View = open_view(paths)
        self.chosen = 0  # 0: all runs; n: the n-th run

    def refresh(self) -> None:
        if isinstance(self.view, RunView) and not is_run(self.view.folder):
            self.view = open_view(self.paths)  # a folder without a run may have become a sweep
        self.view.refresh()

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to show yet."""
        return isinstance(self.view, RunView) and not is_run(self.view.folder)

    def press(self, key: str) -> None:
        runs = len(self.view.members) if isinstance(self.view, GroupView) else 0
        move = 1 if key in NEXT else -1 if key in BACK else 0
        self.chosen = (self.chosen + move) % (runs + 1)

    def frame(self, size: Size) -> list[Text]:
        if self.is_empty:
            return crop_frame(wrap_labelled("", waiting_message(self.paths[0]), size.width, size.height, 0), size)
        if isinstance(self.view, RunView):
            return run_frame(self.view, size)
        if 0 < self.chosen <= len(self.view.members):
            return run_frame(self.view.members[self.chosen - 1].view, size)
        return group_frame(self.view, size)

    def footer(self, interval: float, width: int) -> Text:
        keys = "q quits" + (", n and p: next and previous run" if isinstance(self.view, GroupView) else "")
        return justify(Text(keys, "dim"), Text(f"{time.strftime('%H:%M:%S')}, every {interval:g} s", "dim"), width)


def watch(paths: Sequence[str], *, once: bool = False, interval: float = 2.0) -> int:
    """Show runs in the terminal until q or Ctrl-C. Nothing is written to their folders.

    Args:
        paths: folders of runs, of a sweep or of a pipeline; once: print one frame and exit (always so if the output is not a terminal).
        interval: seconds between two frames.

    Returns:
        the exit code 0.

    Raises:
        ConfigError: a path is a file, or the interval is not above 0. CheckpointError: with `once`, there is nothing to show.
    """
    if not interval > 0:
        raise ConfigError("--interval", f"is {interval:g}", "give seconds above 0")
    for path in paths:
        if Path(path).is_file():
            raise ConfigError(clean(path), "is a file", "give the folder that its `output` names")
    watched = Watch([Path(p) for p in paths])
    with suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    console = _Console(file=unescaped(sys.stdout), highlight=False)
    if once or not console.is_terminal or console.is_dumb_terminal:
        return _print(watched, console)
    return _follow(watched, console, interval)


def waiting_message(path: Path) -> str:
    """Return a message that there is nothing yet, with the name of a similar folder if there is one."""
    if path.is_dir():
        return f"{clean(path)}: no run in this folder yet"
    with suppress(OSError):
        similar = closest(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], 0.7)
        if similar:
            return f"{clean(path)}: no such folder yet; there is {clean(path.with_name(similar))}"
    return f"{clean(path)}: no such folder yet"


def _size(console: Console, width: int, height: int) -> Size:
    """Return the frame size, with glyphs that the output can encode (read off the console: during Live, sys.stdout has no encoding)."""
    return Size(max(20, width), height, UNICODE if console.encoding.startswith("utf") else ASCII)


def _print(watched: Watch, console: Console) -> int:
    watched.refresh()
    if watched.is_empty:
        what = waiting_message(watched.paths[0]).rpartition(": ")[2]
        raise CheckpointError(clean(watched.paths[0]), what, "give a run's folder")
    columns, lines = shutil.get_terminal_size(PRINTED)
    frame = watched.frame(_size(console, columns, lines - 1))
    console.width = max(20, columns)
    for line in frame:
        line.rstrip()
        console.print(line, no_wrap=True, overflow="crop", markup=False, soft_wrap=False)
    for path in watched.paths:
        for sentence in damage_notes(path):
            print(clean(sentence), file=sys.stderr)
    return 0


def _follow(watched: Watch, console: Console, interval: float) -> int:
    try:
        with (
            interrupted_by("SIGTERM", "SIGHUP"),  # so that the terminal is restored
            _key_reader() as read_key,
            Live(console=console, screen=True, auto_refresh=False) as live,
        ):
            while True:
                watched.refresh()
                if not _show_until(time.monotonic() + interval, watched, console, live, read_key, interval):
                    return 0
    except KeyboardInterrupt:
        return 0


def _show_until(
    end: float, watched: Watch, console: Console, live: Live, read_key: Callable[[float], str], interval: float
) -> bool:
    """Show the frame until it is time for the next one; return False if a key ended it."""
    last_drawn = None
    while time.monotonic() < end:
        width, height = console.size
        if (current := (width, height, watched.chosen)) != last_drawn:
            last_drawn = current
            size = _size(console, width, height - 1)
            frame = watched.frame(size)
            frame += [Text()] * (size.height - len(frame))
            live.update(Group(*frame, watched.footer(interval, size.width)), refresh=True)
        key = read_key(min(SLICE, max(0.0, end - time.monotonic())))
        if key in QUIT and key:
            return False
        watched.press(key)
    return True


@contextmanager
def _key_reader() -> Iterator[Callable[[float], str]]:
    """Yield a function that waits up to some seconds for a key and returns it, "" for none; without a terminal it only waits."""
    if not sys.stdin or not sys.stdin.isatty():
        yield _wait_without_keys
        return
    import termios
    import tty

    handle = sys.stdin.fileno()
    saved_settings = termios.tcgetattr(handle)

    def read_key(seconds: float) -> str:
        if not select.select([handle], [], [], seconds)[0]:
            return ""
        return os.read(handle, 1).decode(errors="replace") or "q"  # end of input: the terminal is gone

    tty.setcbreak(handle)
    try:
        yield read_key
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, saved_settings)


def _wait_without_keys(seconds: float) -> str:
    time.sleep(seconds)
    return ""
