"""Turn exceptions that are not bugs in Penchant into one-sentence errors instead of tracebacks."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from traceback import walk_tb

from penchant.base.files import ANYWHERE, disk_error, os_error
from penchant.base.functions import OWN
from penchant.base.text import short
from penchant.errors import PenchantError


def mistake(error: BaseException) -> PenchantError | None:
    """The error for an exception that users can fix: lack of memory, a missing operation, a disk, their own file; else None."""
    if isinstance(error, PenchantError):
        return error
    message = short(str(error), 200)
    if isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", str(error)):
        return PenchantError("not enough memory", message or "there is none left", "ask for less at a time")
    if isinstance(error, NotImplementedError) and (match := re.search(r"for the (MPS|XPU) device", str(error))):
        return PenchantError(f"torch lacks an operation {match[0]}", message, "set model.device=cpu")
    cause = os_error(error)
    if cause is not None and cause.errno in ANYWHERE | {errno.ENAMETOOLONG}:
        return disk_error(Path(getattr(error, "filename", None) or "."), cause)
    return _own(error)


def _own(error: BaseException) -> PenchantError | None:
    """The error for an exception raised in a user's own file, or outside Penchant in what that file called."""
    for frame, line in reversed(list(walk_tb(error.__traceback__))):
        module = frame.f_globals.get("__name__", "")
        if module.startswith(OWN):
            return PenchantError(f"{frame.f_code.co_filename}:{line}", f"{type(error).__name__}: {error}", "fix it")
        if module.partition(".")[0] == "penchant":
            return None
    return None
