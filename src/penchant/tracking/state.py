"""What a run folder remembers of a tracker: its run there, and the last step of each kind that it was sent."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from penchant.tracking.protocol import Line

FOLDER = "trackers"


@dataclass(slots=True)
class Sent:
    """`RUN/trackers/NAME.json`.

    Args:
        id, where: of the tracker's run, None before there is one; sent: last step by kind; lines: how many were sent.
        unsent: lines that are known and not sent; error: the first error of the last time, without secrets.
    """

    id: str | None = None
    where: str | None = None
    sent: dict[str, int] = field(default_factory=dict)
    lines: int = 0
    unsent: int = 0
    error: str | None = None

    def add(self, lines: Sequence[Line]) -> None:
        """Count lines that the tracker took."""
        self.lines += len(lines)
        for line in lines:
            self.sent[line.kind] = max(line.step, self.sent.get(line.kind, -1))


def path_of(folder: Path, tracker: str) -> Path:
    return folder / FOLDER / f"{tracker}.json"


def read(folder: Path, tracker: str) -> Sent:
    """What is known of a tracker; nothing where the file is absent or torn."""
    try:
        found = json.loads(path_of(folder, tracker).read_text(encoding="utf-8"))
        return Sent(**{name: found[name] for name in Sent.__dataclass_fields__ if name in found})
    except (OSError, ValueError, TypeError, AttributeError):
        return Sent()


def write(folder: Path, tracker: str, sent: Sent) -> None:
    """Replace the file at once; a reader sees the old or the new one."""
    path = path_of(folder, tracker)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(asdict(sent), indent=1), encoding="utf-8")
    os.replace(aside, path)


def forget(folder: Path, tracker: str) -> None:
    """A run that starts anew is a new run in its trackers."""
    path_of(folder, tracker).unlink(missing_ok=True)
