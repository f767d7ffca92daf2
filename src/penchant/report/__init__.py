"""The report: one self-contained HTML file for a run, a sweep, a pipeline or a comparison."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from penchant.base.files import PAGE, check_output, write_output
from penchant.errors import CheckpointError, ConfigError
from penchant.report.curves import curves
from penchant.report.data import ReportData, read_report
from penchant.report.html import document, note
from penchant.report.page import render
from penchant.report.verdict import headline as first_sentence
from penchant.runfolder import REPORT

__all__ = ["Curves", "LiveReport", "curves_of", "headline", "write_report"]


# ---- Write a report: one HTML file that can be read offline and makes no network requests ----


def write_report(
    paths: Path | str | Sequence[Path | str], output: Path | str | None = None, *, strict: bool = False
) -> Path:
    """Write the report of one or several runs, a sweep, a pipeline or a comparison. The page says what a folder lacks.

    Args:
        paths: one or more folders. output: the file; default: ``report.html`` in the folder, or in the current one for several folders.
        strict: raise if a section fails. By default the page shows the error instead.

    Raises:
        CheckpointError: a path does not exist or holds nothing of Penchant's, the file cannot be written, or it exists and is not a report.
    """
    folders = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    data = read_report(folders, time.time())
    target = _target(data, output)
    text = render(data, strict=strict)
    try:
        if not target.parent.is_dir():
            raise ConfigError(str(target), "cannot be written (its folder does not exist)")
        return write_output(target, text)  # atomic: a page that reloads itself never sees half a file
    except ConfigError as error:
        raise CheckpointError(error.where, error.what, "choose another --output") from error


def headline(run: Path) -> str:
    """Return the first sentence of the report on a run folder, in plain text."""
    return first_sentence(read_report([run], time.time()))


@dataclass(frozen=True, slots=True)
class Curves:
    """The curves of one or several runs as an HTML page, displayed by notebooks."""

    html: str

    def __str__(self) -> str:
        return self.html

    def _repr_html_(self) -> str:
        # an iframe keeps the page's styles to itself and applies its content security policy
        return f'<iframe srcdoc="{escape(self.html, quote=True)}" style="width:100%;height:640px;border:0"></iframe>'


def curves_of(*paths: Path | str) -> Curves:
    """Return the curves of one or several runs, overlaid.

    Raises:
        CheckpointError: a folder holds nothing of Penchant's.
    """
    data = read_report([Path(p) for p in paths], time.time())
    return Curves(document(data.title, str(curves(data) or note("nothing was logged yet"))))


def _target(data: ReportData, output: Path | str | None) -> Path:
    folder = Path.cwd() if len(data.paths) > 1 else data.paths[0]
    target = folder if output is None else Path(output).expanduser()
    target = target / REPORT if target.is_dir() else target
    try:
        return check_output(target, PAGE)
    except ConfigError as error:
        what = "already exists, and is not a report that Penchant wrote"
        raise CheckpointError(str(target), what, "give another --output") from error


# ---- The report of a run or sweep in progress, rewritten from time to time ----

EVERY = 30.0  # seconds between two reports
SHARE = 50.0  # writing reports may take at most 1/50 of the time


class LiveReport:
    """Writes a folder's report at most every 30 seconds and at evaluations, limited to 2% of the time.

    A report that cannot be written never stops the run.

    Args:
        folder: of the run or sweep; say: receives a message at the first failure.
    """

    def __init__(
        self, folder: Path, say: Callable[[str], None] = lambda _: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder = folder
        self.path = folder / REPORT
        self.say = say
        self.clock = clock
        self.failed = False
        self._written_at: float | None = None
        self._duration = 0.0

    def on_event(self, event: str) -> None:
        """Write the report if it is due, after a step (``"step"``) or an evaluation (``"eval"``)."""
        self._write(0.0 if event == "eval" else EVERY)

    def now(self) -> None:
        """Write the report regardless of time limits, at the end of a run."""
        self._written_at, self.failed = None, False
        self._write(0.0)

    def _write(self, at_least: float) -> None:
        now = self.clock()
        if self.failed or (
            self._written_at is not None and now - self._written_at < max(at_least, SHARE * self._duration)
        ):
            return
        try:
            write_report(self.folder)
        except Exception as error:  # a failing report must never end the run
            self.failed = True
            self.say(f"the report could not be written ({error}); `penchant report` tries again")
        self._written_at = self.clock()
        self._duration = self._written_at - now
