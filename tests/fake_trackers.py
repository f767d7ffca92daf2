"""Fake trackers that misbehave, and one that records its calls. They run in a tracker's own process."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penchant.track.tracker import Line, RunInfo, Started


class Records:
    """Appends every call to ``DIR/calls.jsonl``."""

    def start(self, info: RunInfo) -> Started:
        self.path = Path(info.dir) / "calls.jsonl"
        self.id = info.id or os.urandom(4).hex()
        self._write({"start": self.id, "given": info.id, "name": info.name, "group": info.group})
        return Started(self.id, "https://somebody:secret-word@example.org/run")

    def log(self, lines: Sequence[Line]) -> None:
        for line in lines:
            self._write({"kind": line.kind, "step": line.step, "values": dict(line.values)})

    def finish(self, status: str, summary: Mapping[str, Any], samples: Sequence[Mapping[str, str]]) -> None:
        self._write({"finish": status, "loss": summary.get("eval/loss"), "samples": len(samples)})

    def _write(self, what: Mapping[str, Any]) -> None:
        with self.path.open("a") as out:
            out.write(json.dumps(what) + "\n")


class Hangs(Records):
    def log(self, lines: Sequence[Line]) -> None:
        time.sleep(3600)


class Raises(Records):
    """Raises on every line, with a token in its message."""

    def log(self, lines: Sequence[Line]) -> None:
        raise RuntimeError(f"401 for {os.environ['FAKE_API_KEY']}\x1b[2J\nmore")


class Dies(Records):
    def start(self, info: RunInfo) -> Started:
        os._exit(3)


class LastTwoOnly(Records):
    """Fails as long as the file ``DIR/down`` exists."""

    def log(self, lines: Sequence[Line]) -> None:
        if (self.path.parent / "down").exists():
            raise ConnectionError("down")
        super().log(lines)


class FailsOnce(Records):
    """Refuses the first lines, and accepts them when they are sent again."""

    failed = False

    def log(self, lines: Sequence[Line]) -> None:
        if not self.failed:
            self.failed = True
            raise ConnectionError("down")
        super().log(lines)
