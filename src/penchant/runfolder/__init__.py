"""A run's folder: the names of its files, one lock, one identity, append-only logs that can be cut back to a checkpoint."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penchant.errors import CheckpointError

# ---- Its files ----

CONFIG, IDENTITY, MANIFEST, LOCK = "config.resolved.yaml", "identity.json", "manifest.json", ".lock"
METRICS, PERF, EVALUATIONS = "metrics.jsonl", "perf.jsonl", "evaluations.jsonl"
SAMPLES, SAMPLES_BEFORE = "samples.jsonl", "samples.before.jsonl"
AUDIT, CALIBRATION, FLAGS = "audit.json", "calibration.json", "flags.json"
RESULTS, REPORT = "results.json", "report.html"
CHECKPOINTS = "checkpoints"  # a folder of step-N, each with a manifest of its own
COMPARISON, COMPARISON_ROWS = "comparison.json", "comparison.jsonl"  # of a comparison's folder
SWEEP, PIPELINE = "sweep.json", "pipeline.json"  # of a sweep's and a pipeline's, in which runs' folders lie


class RunLock:
    """One process a run folder: an advisory lock on ``.lock``, which the kernel drops when its holder dies."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise CheckpointError(
                str(self.path.parent),
                f"another run holds this folder ({holder})",
                "wait for it, stop it, or choose another output",
            ) from error
        os.ftruncate(handle, 0)
        os.write(handle, f"PID {os.getpid()} on {socket.gethostname()}\n".encode())
        self._handle = handle
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def open_run(
    folder: Path, resolved_config: str, identity: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    """Make or reopen a run folder.

    Args:
        resolved_config: YAML text, kept as ``config.resolved.yaml``.
        identity: what must be equal for a run to be continued (JSON); kept as ``identity.json``.
        defaults: of settings, in the same shape: what a run of an older version that did not know a setting was run with.

    Raises:
        CheckpointError: the folder cannot be written, is a file, or holds another run's checkpoints (the differences are shown).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise CheckpointError(str(folder), "output is a file, or lies below one", "choose another output") from error
    except OSError as error:
        raise CheckpointError(
            str(folder), f"cannot be written ({error.strerror})", "choose another output or fix its permissions"
        ) from error
    mine = json.loads(json.dumps(identity))
    path = folder / IDENTITY
    has_checkpoints = any((folder / CHECKPOINTS).glob("step-*"))
    if has_checkpoints and not path.exists():
        raise CheckpointError(
            str(folder),
            "holds checkpoints but no identity.json, so it cannot be told which run they are of",
            "choose another output, or delete the folder to start over",
        )
    if has_checkpoints:
        theirs = json.loads(path.read_text())
        found = differences(theirs, mine, defaults=json.loads(json.dumps(defaults or {})))
        if found:
            shown = "".join(f"\n  {line}" for line in found)
            raise CheckpointError(
                str(folder),
                f"holds checkpoints of a different run; old -> new:{shown}\n",
                "choose another output, or delete the folder to start over",
            )
    path.write_text(json.dumps(mine, indent=1))
    (folder / CONFIG).write_text(resolved_config)


def differences(old: Any, new: Any, prefix: str = "", defaults: Any = None) -> list[str]:
    """``key.path: old -> new`` for every leaf that differs; a key that `old` does not have counts as its default."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        known = defaults if isinstance(defaults, Mapping) else {}
        return [
            d
            for k in sorted({*old, *new})
            for d in differences(old.get(k, known.get(k)), new.get(k), f"{prefix}.{k}" if prefix else k, known.get(k))
        ]
    return [] if old == new else [f"{prefix}: {json.dumps(old)} -> {json.dumps(new)}"]


class MetricsLog:
    """An append-only JSONL file, flushed line by line. NaN and infinities are written as null: JSON has neither."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab")

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write((json.dumps(finite(row), ensure_ascii=False) + "\n").encode())
        self._file.flush()

    def offset(self) -> int:
        """Bytes written so far, on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def truncate(self, offset: int) -> None:
        """Cut the file back to what it was at a checkpoint.

        Raises:
            CheckpointError: the file is shorter than that, so lines of this run are lost.
        """
        size = os.fstat(self._file.fileno()).st_size
        if size < offset:
            raise CheckpointError(
                str(self.path),
                f"has {size:,} bytes, but the checkpoint was written when it had {offset:,}",
                "restore the file, or delete the run folder to start over",
            )
        self._file.truncate(offset)
        self._file.seek(0, os.SEEK_END)


def finite(value: Any) -> Any:
    """A value with null for every NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value
