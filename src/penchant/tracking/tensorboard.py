"""TensorBoard: event files, written without torch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penchant.tracking.protocol import Line, RunInfo, Started


class TensorBoard:
    """One folder of event files; a resumed run adds a file to it."""

    def start(self, info: RunInfo) -> Started:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = Path(info.dir) / "tensorboard" / info.id if info.id else self._free(info)
        self.writer = EventFileWriter(str(folder))
        if info.id is None:
            self._text("config", json.dumps(info.config, indent=1), 0)
        self.writer.flush()
        return Started(folder.name, str(folder))

    def _free(self, info: RunInfo) -> Path:
        """A folder that no earlier run has: curves of two runs in one are one tangle."""
        root = Path(info.dir) / "tensorboard"
        names = (info.name if i == 1 else f"{info.name}-{i}" for i in range(1, 10_000))
        return next(root / name for name in names if not (root / name).exists())

    def log(self, lines: Sequence[Line]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for line in lines:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in line.values.items()]
            self.writer.add_event(Event(wall_time=time.time(), step=line.step, summary=Summary(value=values)))
        self.writer.flush()

    def finish(self, status: str, summary: Mapping[str, Any], samples: Sequence[Mapping[str, str]]) -> None:
        self._text("status", status, int(summary.get("step", 0)))
        self.writer.close()

    def _text(self, tag: str, text: str, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.text.summary_v2 import text_pb

        # four spaces before each line: the text plugin reads Markdown, and a person's names are no markup
        shown = "\n".join(f"    {line}" for line in text.split("\n"))
        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=text_pb(tag, shown)))
