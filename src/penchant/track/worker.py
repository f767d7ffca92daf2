"""The process of one tracker: reads a run's logs and sends their lines. Training neither waits for it nor hears of its troubles.

Its input: one JSON line with the request, then perhaps ``{"end": STATUS, ...}``; the end of the input alone means that the run's process
is gone. Its output: one JSON line when the tracker's run stands, one at the first error, one at the end.
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
from penchant.runfolder.read import read
from penchant.track.tracker import Line, RunInfo, Tail, Tracker, sent_to, unsent

EVERY = 0.5  # seconds between two looks at the logs
BATCH = 200  # lines of one call: the file that says what was sent is never far behind
PATIENCE = 1.0  # seconds between two tries of a call that failed, doubled up to a minute
LAST_TRIES = 2  # calls after the run's end, before what is left is given up


class Worker:
    """Sends the lines of one run to one tracker.

    Args:
        tracker: made, not started; name: of its file in the run's folder; say: a message to the run's process.
    """

    def __init__(self, tracker: Tracker, name: str, info: RunInfo, say: Any) -> None:
        self.tracker, self.name, self.info, self.say = tracker, name, info, say
        self.folder = Path(info.folder)
        self.tail = Tail(self.folder)
        self.sent = sent_to(self.folder, name)
        self.sent.error = None
        self.waiting: list[Line] = []
        self.started = False
        self.not_before = 0.0
        self.failures = 0

    def look(self, *, at_once: bool = False) -> bool:
        """Send what is new; returns whether everything known is sent."""
        self.waiting += self.tail.new()
        self.waiting = unsent(self.waiting, self.sent.sent)
        if not at_once and time.monotonic() < self.not_before:
            return False
        try:
            self._start()
            while self.waiting:
                batch = self.waiting[:BATCH]
                self.tracker.log(batch)
                self.sent.add(batch)
                del self.waiting[: len(batch)]
                self._write()
        except Exception as error:  # whatever a library raises, the run goes on and the lines are kept
            self._failed(error)
            return False
        self.failures = 0
        return True

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        """Send the rest and close the tracker's run."""
        for _ in range(LAST_TRIES):
            if self.look(at_once=True):
                break
        if self.started:
            try:
                self.tracker.finish(status, summary, read(self.folder).samples)
            except Exception as error:
                self._failed(error)
        self._write()
        self.say({"done": True})

    def _start(self) -> None:
        if self.started:
            return
        began = self.tracker.start(self.info)
        self.started = True
        self.sent.id, self.sent.where = began.id, one_line(redact(began.where))
        self._write()
        self.say({"where": self.sent.where})

    def _failed(self, error: Exception) -> None:
        self.not_before = time.monotonic() + min(60.0, PATIENCE * 2.0**self.failures)
        self.failures += 1
        if self.sent.error is None:
            self.sent.error = told(error)
            self.say({"error": self.sent.error})
        self._write()

    def _write(self) -> None:
        self.sent.unsent = len(self.waiting)
        self.sent.write(self.folder, self.name)


def _listen(lines: queue.Queue[dict[str, Any]], timeout: float) -> None:
    """The rest of the input; when it ends, nobody waits for longer than `timeout` seconds for a tracker that hangs."""
    for text in sys.stdin:
        lines.put(json.loads(text))
    lines.put({"end": "killed"})
    time.sleep(timeout)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)  # the tracker's own helpers are of this group too
    os._exit(1)


def main() -> int:
    """Serve one run; see the module's first lines."""
    out = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)  # libraries write what they like to nowhere
    os.dup2(null, 2)
    request = json.loads(sys.stdin.readline())
    module, _, name = request["factory"].partition(":")
    info = RunInfo(**{**request["info"], "tags": tuple(request["info"]["tags"])})

    def say(message: Mapping[str, Any]) -> None:
        try:
            print(json.dumps(dict(message)), file=out, flush=True)
        except OSError:
            return  # the run's process is gone; the tracker's run is still brought to its end

    messages: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(messages, float(request["timeout"])), daemon=True).start()
    tracker = getattr(importlib.import_module(module), name)()
    worker = Worker(tracker, request["tracker"], info, say)
    while True:
        worker.look()
        try:
            message = messages.get(timeout=EVERY)
        except queue.Empty:
            continue
        if "end" in message:
            worker.end(message["end"], message.get("summary", {}))
            return 0


if __name__ == "__main__":
    sys.exit(main())
