"""Errors a user can fix: each says where, what, and how to fix it. The CLI prints them as one paragraph, exit code 2."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextvars import ContextVar

# for keys of a config, the running command's option for the same setting, such as data.shape: --layout; set by the command line
OPTIONS: ContextVar[Mapping[str, str] | None] = ContextVar("options", default=None)


def setting(key: str, value: str | Mapping[str, str] = "") -> str:
    """A setting as the user would write it: ``--layout NAME`` for a command with that option, else ``data.shape=NAME``."""
    flag = (OPTIONS.get() or {}).get(key)
    if not value:
        return flag or key
    if isinstance(value, str):
        return f"{flag} {value}" if flag else f"{key}={value}"
    if flag:
        return " ".join(f"{flag} {k}={shlex.quote(v)}" for k, v in value.items())
    return f"{key}={{{', '.join(f'{k}: {v}' for k, v in value.items())}}}"


class PenchantError(Exception):
    """Base class of errors that are the input's fault, not the program's.

    Args:
        where: the place, e.g. ``"train.jsonl:118"`` or ``"run.yaml:7"``.
        what: what is wrong there.
        how: how to fix it (may be empty when there is nothing to say).
    """

    exit_code = 2

    def __init__(self, where: str, what: str, how: str = "") -> None:
        # a line break in a file name must not look like a second message
        self.where, self.what, self.how = str(where).replace("\n", "\\n"), what, how
        super().__init__(f"{self.where}: {what}" + (f"; {how}" if how else ""))


class ConfigError(PenchantError):
    """A key, value or combination of settings that cannot be run."""


class DataError(PenchantError):
    """A file or row that cannot be read as preference data."""


class ModelError(PenchantError):
    """A model or tokenizer folder that cannot be loaded, or lacks what is needed."""


class CheckpointError(PenchantError):
    """A run folder or checkpoint that is locked, incomplete, or from another run."""


class DiskError(CheckpointError):
    """A disk that is full, failing, read-only or not writable; the same command continues once that is fixed."""

    exit_code = 5


class RewardError(PenchantError):
    """A reward function that raised, or returned anything but one finite number (or None) per completion."""


class RolloutError(PenchantError):
    """A sampling engine that does not reply, replies wrongly, or has other weights than the policy."""


class TrainingStopped(PenchantError):
    """The run stopped itself: NaN/Inf, a failed step-0 check, a limit that was crossed."""

    exit_code = 3
