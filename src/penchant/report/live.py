"""The report of something that still goes on, written now and then, and never at the cost of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from penchant.report.build import NAME, write_report

EVERY = 30.0  # seconds between two reports
SHARE = 50.0  # a report may take one fiftieth of the time


class LiveReport:
    """Writes a folder's report at most every 30 seconds, and at evaluations, as long as that takes no more than 2% of the time.

    Args:
        folder: the run's or the sweep's; say: where a failure is told, once; a report that cannot be written stops nothing.
    """

    def __init__(
        self, folder: Path, say: Callable[[str], None] = lambda _: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder = folder
        self.say = say
        self.clock = clock
        self.failed = False
        self._written: float | None = None
        self._took = 0.0

    @property
    def path(self) -> Path:
        """Where it stands."""
        return self.folder / NAME

    def told(self, what: str) -> None:
        """After a step (``"step"``) or an evaluation (``"eval"``)."""
        self._write(0.0 if what == "eval" else EVERY)

    def now(self) -> None:
        """At an end, whatever it costs."""
        self._written, self.failed = None, False
        self._write(0.0)

    def _write(self, at_least: float) -> None:
        now = self.clock()
        if self.failed or (self._written is not None and now - self._written < max(at_least, SHARE * self._took)):
            return
        try:
            write_report(self.folder)
        except Exception as error:  # whatever it is, the run is worth more
            self.failed = True
            self.say(f"the report could not be written ({error}); `penchant report` tries again")
        self._written = self.clock()
        self._took = self._written - now
