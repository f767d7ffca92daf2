"""The process of one tracker: it reads a run's logs and sends their lines. Its errors and delays do not affect training.

Input: one JSON line with the request, then optionally ``{"end": STATUS, ...}``; end of input without that means the run's process died.
Output: one JSON line when the tracker's run is open, one at the first error, one at the end.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penchant.base.text import one_line, redact, told
from penchant.runfolder.read import read_folder
from penchant.track.tracker import Line, RunInfo, Tail, Tracker, sent_to, unsent

POLL_SECONDS = 0.5  # seconds between two reads of the logs
BATCH = 200  # lines per call; small, so that the record of what was sent stays up to date
RETRY_SECONDS = 1.0  # seconds before a failed call is repeated, doubled up to a minute
FINAL_ATTEMPTS = 2  # attempts after the run's end before the remaining lines are given up


class Worker:
    """Sends the lines of one run to one tracker.

    Args:
        tracker: constructed but not started; name: of its record in the run's folder; say: sends a message to the run's process.
    """

    def __init__(self, tracker: Tracker, name: str, info: RunInfo, say: Any) -> None:
        self.tracker, self.name, self.info, self.say = tracker, name, info, say
        self.folder = Path(info.folder)
        self.tail = Tail(self.folder)
        self.sent = sent_to(self.folder, name)
        self.sent.error = None
        self.pending: list[Line] = []
        self.started = False
        self.retry_at = 0.0
        self.failures = 0

    def send_pending(self, *, at_once: bool = False) -> bool:
        """Send new lines; return whether everything known has been sent."""
        self.pending += self.tail.new()
        self.pending = unsent(self.pending, self.sent.sent)
        if not at_once and time.monotonic() < self.retry_at:
            return False
        try:
            self._start()
            while self.pending:
                batch = self.pending[:BATCH]
                self.tracker.log(batch)
                self.sent.add(batch)
                del self.pending[: len(batch)]
                self._save_record()
        except Exception as error:  # no matter what a library raises, keep the lines and go on
            self._record_failure(error)
            return False
        if self.failures:
            self.failures, self.sent.error = 0, None
            self._save_record()
        return True

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        """Send the rest and close the tracker's run."""
        for _ in range(FINAL_ATTEMPTS):
            if self.send_pending(at_once=True):
                break
        if self.started:
            try:
                self.tracker.finish(status, summary, read_folder(self.folder).samples)
            except Exception as error:
                self._record_failure(error)
        self._save_record()
        self.say({"done": True})

    def _start(self) -> None:
        if self.started:
            return
        started_run = self.tracker.start(self.info)
        self.started = True
        self.sent.id, self.sent.where = started_run.id, one_line(redact(started_run.where))
        self._save_record()
        self.say({"where": self.sent.where})

    def _record_failure(self, error: Exception) -> None:
        self.retry_at = time.monotonic() + min(60.0, RETRY_SECONDS * 2.0**self.failures)
        self.failures += 1
        if self.sent.error is None:
            self.sent.error = told(error)
            self.say({"error": self.sent.error})
        self._save_record()

    def _save_record(self) -> None:
        self.sent.unsent = len(self.pending)
        self.sent.write(self.folder, self.name)


def _read_messages(lines: queue.Queue[dict[str, Any]], timeout: float) -> None:
    """Queue the rest of the input; `timeout` seconds after its end, kill the process group in case the tracker hangs."""
    for text in sys.stdin:
        lines.put(json.loads(text))
    lines.put({"end": "killed"})
    time.sleep(timeout)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)  # the group includes the tracker's helper processes
    os._exit(1)


def main() -> int:
    """Serve one run; see the module docstring."""
    out = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)  # discard whatever libraries print
    os.dup2(null, 2)
    request = json.loads(sys.stdin.readline())
    module, _, name = request["factory"].partition(":")
    info = RunInfo(**{**request["info"], "tags": tuple(request["info"]["tags"])})

    def say(message: Mapping[str, Any]) -> None:
        try:
            print(json.dumps(dict(message)), file=out, flush=True)
        except OSError:
            return  # the run's process is gone; still finish the tracker's run

    messages: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read_messages, args=(messages, float(request["timeout"])), daemon=True).start()
    tracker = getattr(importlib.import_module(module), name)()
    worker = Worker(tracker, request["tracker"], info, say)
    while True:
        worker.send_pending()
        try:
            message = messages.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        if "end" in message:
            worker.end(message["end"], message.get("summary", {}))
            return 0


if __name__ == "__main__":
    sys.exit(main())
