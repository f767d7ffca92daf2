"""Whether a run's process is alive, found without touching its lock: a probe that held it for a moment could turn a run away."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Literal

LOCKS = Path("/proc/locks")
Held = Literal["held", "free", "elsewhere"]

_HOLDER = re.compile(r"PID (\d+) on (\S+)")


def lock_of(folder: Path, locks: Path = LOCKS) -> Held:
    """Who holds a run folder's ``.lock``: a process of this machine, nobody, or (as far as can be told from here) another machine.

    A process that has ended leaves its number in the file, and the system may give that number to another one; so the system's list of
    locks must show the file too, where there is such a list.
    """
    try:
        found = _HOLDER.search((folder / ".lock").read_text(errors="replace")[:200])
        inode = (folder / ".lock").stat().st_ino
    except OSError:
        return "free"
    if found is None:
        return "free"
    if found[2] != socket.gethostname():
        return "elsewhere"
    if not _alive(int(found[1])):
        return "free"
    try:
        listed = [line.split() for line in locks.read_text().splitlines()]
    except OSError:
        return "held"  # no such list on this system: the process is alive, and more is not known
    ours = any(found[1] in words and any(w.endswith(f":{inode}") for w in words) for words in listed)
    return "held" if ours else "free"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 is none: it only asks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
