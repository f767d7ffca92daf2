"""A run's folder: the names of its files, one lock, one identity, append-only logs that can be cut back to a checkpoint."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from penchant.base.files import (
    MANIFEST,  # noqa: F401  a checkpoint has one too
    check_sums,
    disk_error,
    file_sha256,
    sweep,
    whole_lines,
    write_atomically,
    write_text_atomically,
)
from penchant.base.text import without_passwords
from penchant.errors import CheckpointError, PenchantError

# ---- Its files ----

CONFIG, IDENTITY, LOCK = "config.resolved.yaml", "identity.json", ".lock"
CONSOLE = "console.log"  # what a run that the studio started has said
SUMS = "sums.json"  # SHA-256 of the small files here; a checkpoint's are in its manifest
METRICS, PERF, EVALUATIONS = "metrics.jsonl", "perf.jsonl", "evaluations.jsonl"
SAMPLES, SAMPLES_BEFORE = "samples.jsonl", "samples.before.jsonl"
AUDIT, CALIBRATION, FLAGS = "audit.json", "calibration.json", "flags.json"
RESULTS, REPORT = "results.json", "report.html"
GIVEN_FOLDER = "given"  # what a run was given as Python objects
CHECKPOINTS = "checkpoints"  # a folder of step-N, each with a manifest of its own
COMPARISON, COMPARISON_ROWS = "comparison.json", "comparison.jsonl"  # of a comparison's folder
SWEEP, PIPELINE = "sweep.json", "pipeline.json"  # of a sweep's and a pipeline's, in which runs' folders lie


def stands_for_model(folder: Path) -> bool:
    """Whether a folder is a run's, a checkpoint's or an adapter's: transformers does not load it, but it leads to a model."""
    inside = folder.name.startswith("step-") and (folder / "model").is_dir()
    return inside or any((folder / name).exists() for name in (CONFIG, CHECKPOINTS, "adapter_config.json"))


def check_run_folder(folder: Path) -> None:
    """Meet what would keep a run from writing into its folder, before anything is read; makes nothing.

    Raises:
        CheckpointError: it is a file, lies below one, or holds a model. DiskError: it cannot be written.
    """
    try:
        there = next(p for p in (folder, *folder.parents) if p.exists())
        if (folder / "config.json").exists():
            what = "output is a model's folder (it holds config.json)"
            raise CheckpointError(str(folder), what, "choose another output")
    except OSError as error:
        raise disk_error(folder, error) from error
    if not there.is_dir():
        raise CheckpointError(str(folder), "output is a file, or lies below one", "choose another output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise disk_error(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def make_folder(folder: Path) -> None:
    """Make a run's folder.

    Raises:
        CheckpointError, DiskError: it cannot be made.
    """
    check_run_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error) from error


def sign(handle: int) -> None:
    """Say in a lock's file which process holds it."""
    os.ftruncate(handle, 0)
    os.write(handle, f"PID {os.getpid()} on {socket.gethostname()}\n".encode())


class RunLock:
    """One process a run folder: an advisory lock on ``.lock``, which the kernel drops when its holder dies."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        make_folder(self.path.parent)
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise disk_error(self.path, error) from error
            raise self._odd() from error
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                raise self._odd()  # to write into it would be to write into another file
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sign(handle)
        except BlockingIOError as error:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            what, how = f"another run holds this folder ({holder})", "wait for it, stop it, or choose another output"
            raise CheckpointError(str(self.path.parent), what, how) from error
        except OSError as error:
            os.close(handle)
            raise disk_error(self.path, error) from error
        except PenchantError:
            os.close(handle)
            raise
        self._handle = handle
        return self

    def _odd(self) -> CheckpointError:
        return CheckpointError(str(self.path), "is a link, a folder or a pipe, so nothing can be locked", "remove it")

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


# ---- Files with a sum ----


def keep(path: Path, content: str | bytes) -> None:
    """Write a file of a run whole or not at all, and its SHA-256 into ``sums.json``.

    The new sum is listed before the file is replaced, beside the one that it has: wherever this is cut off, the file is one of the two.
    """
    content = content.encode() if isinstance(content, str) else content
    new, known = hashlib.sha256(content).hexdigest(), _sums(path.parent) or {}
    old = [file_sha256(path)] if path.is_file() else []
    if path.name in known and old and old[0] not in known[path.name]:
        old = []  # it was damaged: its sum must not be taken for one that was written
    files = {**known, path.name: sorted({*old, new})}
    write_atomically(path.parent / SUMS, {"files": files, "sha256": _sum_of(files)})
    write_text_atomically(path, content)


def _sums(folder: Path) -> dict[str, list[str]] | None:
    """By name: the SHA-256 that a file may have; None where the list itself is damaged, empty where there is none."""
    try:
        found = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        files: dict[str, list[str]] = found["files"]
        good = found["sha256"] == _sum_of(files) and all(isinstance(v, list) for v in files.values())
        return files if good else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


LINE_SUM = "sha256"  # of the rest of a line, in files to which lines are added by whoever comes


def line_sum(row: Mapping[str, Any]) -> str:
    """SHA-256 of a line's other values."""
    return _sum_of({key: value for key, value in row.items() if key != LINE_SUM})


def _sum_of(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def is_whole(path: Path) -> bool:
    """Whether a file of a run is as it was written; also True where it is absent or nothing is known of it (older versions)."""
    for _ in range(2):  # a run that goes on may replace both between two looks
        try:
            known = (_sums(path.parent) or {}).get(path.name)
            if known is None or not path.is_file() or file_sha256(path) in known:
                return True
        except OSError:
            return False
    return False


def check_whole(
    path: Path, how: str = "restore it, or run penchant train with the run's own config, which writes it again"
) -> None:
    """A file of a run is as it was written; see `is_whole`.

    Raises:
        CheckpointError: it was changed; `how` it is mended.
    """
    if not is_whole(path):
        what = "was changed after it was written"
        raise CheckpointError(str(path), what, f"{how} (to take it as it is, delete {SUMS} beside it)")


def damaged(folder: Path) -> list[str]:
    """Names of a run's files that are not as they were written, as far as that is known."""
    known = _sums(folder)
    found = [SUMS] if known is None else [name for name in known if not is_whole(folder / name)]
    at = newest_state(folder)
    if at.get("metrics_sha256") and not prefix_is(folder / METRICS, at.get("metrics_offset"), at["metrics_sha256"]):
        found.append(METRICS)
    return sorted(found)


def told_damage(folder: Path) -> list[str]:
    """A sentence for each of them, for whoever reads the run's figures."""
    return [f"{folder / name} was changed after it was written." for name in damaged(folder)]


def prefix_is(path: Path, offset: Any, sha256: Any) -> bool:
    """Whether the first `offset` bytes of a file have this SHA-256."""
    try:
        with path.open("rb") as file:
            return hashlib.sha256(file.read(offset)).hexdigest() == sha256
    except (OSError, TypeError, ValueError):
        return False


def newest_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of the newest whole checkpoint that can be read; empty where there is none."""
    for path in reversed(checkpoints(folder)):
        with suppress(CheckpointError, OSError, ValueError, TypeError):
            return checkpoint_state(path)
    return {}


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run, oldest first."""
    found = [(int(m[1]), p) for p in (folder / CHECKPOINTS).glob("step-*") if (m := re.search(r"step-(\d+)$", p.name))]
    return [p for _, p in sorted(found)]


def checkpoint_state(path: Path) -> dict[str, Any]:
    """What a checkpoint carries beside tensors.

    Raises:
        CheckpointError: the file is missing or was changed after it was written.
    """
    check_sums(path, "state.json")
    return dict(json.loads((path / "state.json").read_text()))


CONTENT = "content of "  # how keys of an identity begin that hold the SHA-256 of something beside config and data
IN_CACHE = " in the hub's cache"  # a file that appears there later is not a change: it was not read before
TOKENS = f"{CONTENT}the rows as tokens"  # a run of an older version does not have it


def open_run(
    folder: Path,
    resolved_config: str,
    identity: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    later: Callable[[], Mapping[str, Any]] = dict,
) -> list[str]:
    """Make or reopen a run folder; its lock must be held.

    Args:
        resolved_config: YAML text, kept as ``config.resolved.yaml``.
        identity: what must be equal for a run to be continued (JSON); kept as ``identity.json``.
        defaults: of settings, in the same shape: what a run of an older version that did not know a setting was run with.
        later: more of the identity, which is asked for once all else is equal.

    Returns:
        Sentences about what was damaged and could be mended, or was not kept by an older version.

    Raises:
        CheckpointError: the folder cannot be written, is a file, or holds another run's checkpoints (the differences are shown).
    """
    make_folder(folder)
    sweep(folder)
    sweep(folder / CHECKPOINTS)
    theirs, notes = kept_identity(folder)
    mine = json.loads(json.dumps(identity))
    if theirs is not None:
        theirs = json.loads(without_passwords(json.dumps(theirs)))  # an older version's has them
    for more in (dict, later):
        mine |= json.loads(json.dumps(more()))
        found = [] if theirs is None else changed(theirs, mine, json.loads(json.dumps(defaults or {})))
        if found:
            shown = "".join(f"\n  {line}" for line in found)
            back = "put back what has changed, " if all(line.startswith((CONTENT, "data: ")) for line in found) else ""
            longer = all(line.startswith("config.train.") for line in found)
            last = checkpoints(folder)[-1] / "model" if longer else ""
            on = f"; to train on from its last checkpoint, set model.path={last} and another output" if longer else ""
            how = f"{back}choose another output, or delete the folder to start over{on}. What differs:{shown}"
            raise CheckpointError(str(folder), "holds checkpoints of a different run", how)
    new = [key for key in mine if theirs is not None and key.startswith(CONTENT) and key not in theirs]
    if new:
        told = ", ".join(key.removeprefix(CONTENT) for key in new)
        notes.append(f"{folder}: an older version made it, which did not record this; it is taken as unchanged: {told}")
    keep(folder / IDENTITY, json.dumps(mine, indent=1))
    keep(folder / CONFIG, without_passwords(resolved_config))
    return notes


def changed(theirs: Mapping[str, Any], mine: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """What differs between a run's identity and another, a line each; what a run of an older version did not keep counts as equal."""
    looked_at = {key.partition(": ")[0] for key in theirs} if TOKENS in theirs else set()
    not_kept = {k: v for k, v in mine.items() if k.startswith(CONTENT) and k.partition(": ")[0] not in looked_at}
    theirs = {**not_kept, **theirs}
    on_one_side = {k for k in mine.keys() ^ theirs.keys() if k.partition(": ")[0].endswith(IN_CACHE)}
    theirs, mine = ({k: v for k, v in of.items() if k not in on_one_side} for of in (theirs, mine))
    if TOKENS not in mine:
        theirs = {key: value for key, value in theirs.items() if key != TOKENS}
    rows = [] if theirs.get("data") == mine.get("data") else [f"data: the rows of {_files_of(mine)} have changed"]
    names = sorted(k for k in theirs.keys() | mine.keys() if k.startswith(CONTENT) and theirs.get(k) != mine.get(k))
    files = [f"{k} {'is new' if k not in theirs else 'has changed' if k in mine else 'is gone'}" for k in names]
    old, new = ({k: v for k, v in of.items() if k != "data" and not k.startswith(CONTENT)} for of in (theirs, mine))
    return [*differences(old, new, defaults=defaults), *files, *rows]


def _files_of(identity: Mapping[str, Any]) -> str:
    data = identity.get("config", {}).get("data", {})
    named = [p for name in ("path", "eval_path") for p in [data.get(name)] if p]
    paths = [p for path in named for p in (path.values() if isinstance(path, dict) else [path])]
    return ", ".join(str(p) for path in paths for p in (path if isinstance(path, list) else [path])) or "the run"


def kept_identity(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The identity of the run whose checkpoints a folder holds (None: it holds none), and sentences about what was damaged.

    Raises:
        CheckpointError: nothing says which run they are of.
    """
    if not any((folder / CHECKPOINTS).glob("step-*")):
        return None, []
    return _identity_of(folder / IDENTITY)


def _identity_of(path: Path) -> tuple[dict[str, Any], list[str]]:
    """identity.json, or what the newest checkpoint says in its place; a sentence where it was damaged."""
    damage = "was changed after it was written"
    try:
        if is_whole(path):
            return dict(json.loads(path.read_text(encoding="utf-8"))), []
    except FileNotFoundError:
        damage = "is gone"
    except (OSError, ValueError, TypeError) as error:
        damage = f"cannot be read ({error})"
    kept = newest_state(path.parent).get("identity")
    if not isinstance(kept, dict):
        gone = f"holds checkpoints but no {IDENTITY}" if damage == "is gone" else f"its {IDENTITY} {damage}"
        how = "restore it, choose another output, or delete the folder to start over"
        raise CheckpointError(str(path.parent), f"{gone}, so it is unknown which run they belong to", how)
    return kept, [f"{path}: {damage}; it is written again as the newest checkpoint has it"]


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
    """An append-only JSONL file, written line by line. NaN and infinities are written as null: JSON has neither.

    A line that the disk does not take whole is taken back; half a line that a killed writer left is cut off.

    Args:
        say: where it is told, once, that lines cannot be written and are left out; None: that is an error.
    """

    def __init__(self, path: Path, say: Callable[[str], None] | None = None) -> None:
        self.path, self._say = path, say
        self._file: Any = None
        try:
            self._file = path.open("ab+", buffering=0)
            whole_lines(self._file.fileno())
        except OSError as error:
            self._failed(error)

    def write(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        line = memoryview((json.dumps(finite(row), ensure_ascii=False) + "\n").encode())
        end = self._size()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)
            self._failed(error)

    def offset(self) -> int:
        """Bytes written so far, on disk."""
        os.fsync(self._file.fileno())
        return self._size()

    def sha256(self) -> str:
        """Of what was written so far."""
        return file_sha256(self.path)

    def truncate(self, offset: int, sha256: str | None = None) -> None:
        """Cut the file back to what it was at a checkpoint.

        Args:
            sha256: of what it was, where that is known.

        Raises:
            CheckpointError: the file is shorter than that or other than it was, so lines of this run are lost.
        """
        size = self._size()
        what = ""
        if size < offset:
            what = f"has {size:,} bytes, but the checkpoint was written when it had {offset:,}"
        elif sha256 is not None and not prefix_is(self.path, offset, sha256):
            what = f"its first {offset:,} bytes are not those that it had when the checkpoint was written"
        if what:
            raise CheckpointError(str(self.path), what, "restore the file, or delete the run folder to start over")
        self._file.truncate(offset)

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _failed(self, error: OSError) -> None:
        if self._say is None:
            raise error
        self._say(f"{self.path}: {error.strerror}; lines that cannot be written are left out")
        self._say = lambda _: None


class NoLog(MetricsLog):
    """A log of which another process writes the file."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull))

    def write(self, row: Mapping[str, Any]) -> None:
        pass

    def offset(self) -> int:
        return 0

    def sha256(self) -> str:
        return ""

    def truncate(self, offset: int, sha256: str | None = None) -> None:
        pass


def finite(value: Any) -> Any:
    """A value with null for every NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value
