"""Progress output of a run: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TextIO

from penchant.base.text import counted, for_terminal, unescaped
from penchant.runfolder.values import format_decimals

SHOWN = {
    "loss": "loss",
    "rewards/accuracies": "acc",
    "rewards/margins": "margin",
    "reward": "reward",
    "kl/k3": "KL",
    "lr": "lr",
}


def duration(seconds: float) -> str:
    """Format seconds as ``45s``, ``3m20s`` or ``1h05m``."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"


FEW = 4  # rows: accuracy over fewer is meaningless


def figures(metrics: Mapping[str, Any], prefix: str = "") -> str:
    """The few metrics of a line that fit beside a progress bar."""
    parts, too_few = [], metrics.get("rows", FEW) < FEW
    for name, label in SHOWN.items():
        value = metrics.get(prefix + name)
        if value is not None and not (too_few and name == "rewards/accuracies"):
            parts.append(f"{label} {value:.2e}" if name == "lr" else f"{label} {format_decimals(value, '.4f')}")
    return "  ".join(parts)


class PlainConsole:
    """One line every few seconds, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None, every_seconds: float = 5.0) -> None:
        self.stream = stream or sys.stderr
        self.every = every_seconds
        self.started: float | None = None
        self.first_step = 0
        self.last = 0.0

    def step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if self.started is None:
            # the first step is left out of the estimate, as it includes warm-up
            self.started, self.first_step = now, step
        if now - self.last < self.every and step != total:
            return
        self.last = now
        done = step - self.first_step
        eta = duration((now - self.started) / done * (total - step)) if done else "?"
        speed = f"{metrics.get('tokens_per_second', 0):,.0f} tok/s"
        self._print(f"step {step}/{total}  {figures(metrics)}  {speed}  left {eta}")

    def evaluated(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._print(
            f"eval at step {step}: {figures(metrics, 'eval/')}  ({counted(metrics.get('eval/rows', 0), 'row')})"
        )

    def note(self, text: str) -> None:
        self._print(text)

    def counter(self, label: str) -> Callable[[int, int], None]:
        """A callback (done, total) that shows the progress and ETA of a pass over the data."""
        started = last = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= self.every and done < total:
                last = now
                self._print(f"{label}: {done:,}/{total:,}  left {duration((now - started) / done * (total - done))}")

        return update

    def _print(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a closed pipe must not end the run
            print(text, file=self.stream, flush=True)


class RichConsole(PlainConsole):
    """A live bar with ETA and current metrics."""

    def __init__(self) -> None:
        super().__init__()
        from rich import progress
        from rich.console import Console

        self.progress = progress.Progress(
            progress.TextColumn("training"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[figures]}"),
            console=Console(file=unescaped(sys.stderr)),
        )
        self.task: Any = None

    def step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        if self.task is None:
            self.progress.start()
            self.task = self.progress.add_task("", total=total, completed=step - 1, figures="")
        self.progress.update(self.task, completed=step, figures=figures(metrics))
        if step == total:
            self.progress.stop()

    def _print(self, text: str) -> None:
        self.progress.console.print(for_terminal(text), markup=False, highlight=False)


class QuietConsole(PlainConsole):
    """No output, for tests and library use."""

    def _print(self, text: str) -> None:
        pass


def console(quiet: bool = False) -> PlainConsole:
    """Choose a console: none if `quiet`, a live bar in a terminal, plain lines elsewhere."""
    if quiet:
        return QuietConsole()
    return RichConsole() if sys.stderr.isatty() else PlainConsole()
