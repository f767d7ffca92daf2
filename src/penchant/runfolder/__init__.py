"""The run folder: names of its files, lock, identity, checksums, and append-only logs that can be cut back to a checkpoint."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import tempfile
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

# ---- File names ----

CONFIG, IDENTITY, LOCK = "config.resolved.yaml", "identity.json", ".lock"
CONSOLE = "console.log"  # output of a run started by the studio
SUMS = "sums.json"  # SHA-256 of the small files in the folder; those of a checkpoint are in its manifest
METRICS, PERF, EVALUATIONS = "metrics.jsonl", "perf.jsonl", "evaluations.jsonl"
SAMPLES, SAMPLES_BEFORE = "samples.jsonl", "samples.before.jsonl"
AUDIT, CALIBRATION, FLAGS = "audit.json", "calibration.json", "flags.json"
RESULTS, REPORT = "results.json", "report.html"
GIVEN_FOLDER = "given"  # Python objects that were passed to the run
CHECKPOINTS = "checkpoints"  # contains step-N folders, each with its own manifest
COMPARISON, COMPARISON_ROWS = "comparison.json", "comparison.jsonl"  # in a comparison's folder
SWEEP, PIPELINE = "sweep.json", "pipeline.json"  # in the folder of a sweep or pipeline, which contains run folders


def leads_to_model(folder: Path) -> bool:
    """Whether a folder is of a run, checkpoint or adapter: not loadable by transformers itself, but leading to a model."""
    is_checkpoint = folder.name.startswith("step-") and (folder / "model").is_dir()
    return is_checkpoint or any((folder / name).exists() for name in (CONFIG, CHECKPOINTS, "adapter_config.json"))


def check_run_folder(folder: Path) -> None:
    """Refuse a folder that a run cannot use as its output, before any data is read. Leaves nothing behind.

    Raises:
        CheckpointError: the path is a file, is below one, or holds a model. DiskError: it cannot be written.
    """
    nearest = check_not_taken(folder)
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".penchant-", dir=nearest))  # os.access allows root everything, even in /proc
    except OSError as error:
        raise disk_error(folder, error) from error


def check_not_taken(folder: Path) -> Path:
    """The part of a run folder's path that exists. Writes nothing.

    Raises:
        CheckpointError: the path is a file, is below one, or holds a model. DiskError: it cannot be read.
    """
    try:
        nearest = next(p for p in (folder, *folder.parents) if p.exists())
        if (folder / "config.json").exists():
            what = "output is a model's folder (it holds config.json)"
            raise CheckpointError(str(folder), what, "choose another output")
        if os.path.lexists(folder / CHECKPOINTS) and not (folder / CHECKPOINTS).is_dir():
            raise CheckpointError(
                str(folder / CHECKPOINTS), "is not a folder", "move it away, or choose another output"
            )
    except OSError as error:
        raise disk_error(folder, error) from error
    if not nearest.is_dir():
        raise CheckpointError(str(folder), "output is a file, or lies below one", "choose another output")
    return nearest


def make_folder(folder: Path) -> None:
    """Create a run folder.

    Raises:
        CheckpointError: the path is a file, is below one, or holds a model.
        DiskError: it cannot be created for another reason.
    """
    check_run_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error) from error


def write_lock_holder(handle: int) -> None:
    """Write the process and machine that hold a lock into its file."""
    os.ftruncate(handle, 0)
    os.write(handle, f"PID {os.getpid()} on {socket.gethostname()}\n".encode())


class RunLock:
    """Limits a run folder to one process: an advisory lock on ``.lock``, which the kernel releases when the holder dies."""

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
            raise self._unlockable() from error
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise self._unlockable()  # writing to it could write to another file
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_lock_holder(handle)
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

    def _unlockable(self) -> CheckpointError:
        return CheckpointError(str(self.path), "is a link, a folder or a pipe, so nothing can be locked", "remove it")

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


# ---- Files with checksums ----


def write_summed(path: Path, content: str | bytes) -> None:
    """Write a file of a run atomically, and its SHA-256 to ``sums.json``.

    The new sum is listed next to the current one before the file is replaced, so that an interruption at any point leaves a file that
    matches one of the two.
    """
    content = content.encode() if isinstance(content, str) else content
    new_sum, known = hashlib.sha256(content).hexdigest(), _load_sums(path.parent) or {}
    old_sums = [file_sha256(path)] if path.is_file() else []
    if path.name in known and old_sums and old_sums[0] not in known[path.name]:
        old_sums = []  # the current file is damaged: its sum must not become a valid one
    files = {**known, path.name: sorted({*old_sums, new_sum})}
    write_atomically(path.parent / SUMS, {"files": files, "sha256": _json_sha256(files)})
    write_text_atomically(path, content)


def _load_sums(folder: Path) -> dict[str, list[str]] | None:
    """The valid SHA-256 sums of files by name; None if the list itself is damaged, empty if there is none."""
    try:
        record = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        files: dict[str, list[str]] = record["files"]
        valid = record["sha256"] == _json_sha256(files) and all(isinstance(v, list) for v in files.values())
        return files if valid else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


LINE_SUM = "sha256"  # key for the sum of the rest of a line, in files that several commands append to


def line_sha256(row: Mapping[str, Any]) -> str:
    """SHA-256 of a line without its own sum."""
    return _json_sha256({key: value for key, value in row.items() if key != LINE_SUM})


def _json_sha256(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def is_intact(path: Path) -> bool:
    """Whether a file of a run is unchanged since it was written; True if it is missing or has no known sum (older versions)."""
    for _ in range(2):  # a running process may replace both between the two reads
        try:
            known = (_load_sums(path.parent) or {}).get(path.name)
            if known is None or not path.is_file() or file_sha256(path) in known:
                return True
        except OSError:
            return False
    return False


def check_intact(
    path: Path, how: str = "restore it, or run penchant train with the run's own config, which writes it again"
) -> None:
    """Check that a file of a run is unchanged since it was written; see `is_intact`.

    Raises:
        CheckpointError: it was changed; `how` says how to fix it.
    """
    if not is_intact(path):
        what = "was changed after it was written"
        raise CheckpointError(str(path), what, f"{how} (to take it as it is, delete {SUMS} beside it)")


def damaged_files(folder: Path) -> list[str]:
    """Names of a run's files that were changed after they were written, as far as known."""
    known = _load_sums(folder)
    damaged = [SUMS] if known is None else [name for name in known if not is_intact(folder / name)]
    state = latest_state(folder)
    if state.get("metrics_sha256") and not prefix_matches(
        folder / METRICS, state.get("metrics_offset"), state["metrics_sha256"]
    ):
        damaged.append(METRICS)
    return sorted(damaged)


def damage_notes(folder: Path) -> list[str]:
    """A sentence for each damaged file, to show next to the run's figures."""
    found = [folder / name for name in damaged_files(folder)]
    return [f"{path} {'was changed after it was written' if path.exists() else 'is missing'}." for path in found]


def prefix_matches(path: Path, offset: Any, sha256: Any) -> bool:
    """Whether the first `offset` bytes of a file have the given SHA-256."""
    try:
        with path.open("rb") as file:
            return hashlib.sha256(file.read(offset)).hexdigest() == sha256
    except (OSError, TypeError, ValueError):
        return False


def latest_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of the newest checkpoint in which it is intact; empty if there is none."""
    for path in reversed(checkpoints(folder)):
        with suppress(CheckpointError, OSError, ValueError, TypeError):
            return checkpoint_state(path)
    return {}


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run, oldest first."""
    steps = [(int(m[1]), p) for p in (folder / CHECKPOINTS).glob("step-*") if (m := re.search(r"step-(\d+)$", p.name))]
    return [p for _, p in sorted(steps)]


def checkpoint_state(path: Path) -> dict[str, Any]:
    """Read ``state.json`` of a checkpoint, its state apart from tensors.

    Raises:
        CheckpointError: the file is missing or was changed after it was written.
    """
    check_sums(path, "state.json")
    return dict(json.loads((path / "state.json").read_text()))


CONTENT = "content of "  # prefix of identity keys with the SHA-256 of inputs other than config and data
IN_CACHE = " in the hub's cache"  # suffix of keys that may be on one side only: the file was not there to be read
TOKENS = f"{CONTENT}the rows as tokens"  # missing in runs of older versions


def open_run(
    folder: Path,
    resolved_config: str,
    identity: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    later: Callable[[], Mapping[str, Any]] = dict,
) -> list[str]:
    """Create or reopen a run folder; the caller must hold its lock.

    Args:
        resolved_config: YAML text, written to ``config.resolved.yaml``.
        identity: what must be equal for a run to continue (JSON); written to ``identity.json``.
        defaults: default settings, in the same shape: the values of settings that a run of an older version did not have.
        later: computes the expensive part of the identity, called only if the rest is equal.

    Returns:
        Sentences about damage that was repaired, or about what an older version did not record.

    Raises:
        CheckpointError: the folder is a file, or holds another run's checkpoints (the message lists the differences).
        DiskError: the folder cannot be written.
    """
    make_folder(folder)
    sweep(folder)
    sweep(folder / CHECKPOINTS)
    saved, notes = load_identity(folder)
    current = json.loads(json.dumps(identity))
    if saved is not None:
        saved = json.loads(without_passwords(json.dumps(saved)))  # older versions kept passwords in it
    for part in (dict, later):
        current |= json.loads(json.dumps(part()))
        changes = [] if saved is None else identity_changes(saved, current, json.loads(json.dumps(defaults or {})))
        if changes:
            lines = "".join(f"\n  {line}" for line in changes)
            put_back = (
                "put back what has changed, " if all(line.startswith((CONTENT, "data: ")) for line in changes) else ""
            )
            only_training = all(line.startswith("config.train.") for line in changes)
            last = checkpoints(folder)[-1] / "model" if only_training else ""
            train_on = (
                f"; to train on from its last checkpoint, set model.path={last} and another output"
                if only_training
                else ""
            )
            how = f"{put_back}choose another output, or delete the folder to start over{train_on}. What differs:{lines}"
            raise CheckpointError(str(folder), "holds checkpoints of a different run", how)
    unrecorded = [key for key in current if saved is not None and key.startswith(CONTENT) and key not in saved]
    if unrecorded:
        names = ", ".join(key.removeprefix(CONTENT) for key in unrecorded)
        notes.append(
            f"{folder}: an older version made it, which did not record this; it is taken as unchanged: {names}"
        )
    write_summed(folder / IDENTITY, json.dumps(current, indent=1))
    write_summed(folder / CONFIG, without_passwords(resolved_config))
    return notes


def identity_changes(saved: Mapping[str, Any], current: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """One line for each difference between two identities; what an older version did not record counts as equal."""
    recorded = {key.partition(": ")[0] for key in saved} if TOKENS in saved else set()
    not_recorded = {k: v for k, v in current.items() if k.startswith(CONTENT) and k.partition(": ")[0] not in recorded}
    saved = {**not_recorded, **saved}
    on_one_side = {k for k in current.keys() ^ saved.keys() if k.partition(": ")[0].endswith(IN_CACHE)}
    saved, current = ({k: v for k, v in side.items() if k not in on_one_side} for side in (saved, current))
    if TOKENS not in current:
        saved = {key: value for key, value in saved.items() if key != TOKENS}
    names = sorted(k for k in saved.keys() | current.keys() if k.startswith(CONTENT) and saved.get(k) != current.get(k))
    files = [f"{k} {'is new' if k not in saved else 'has changed' if k in current else 'is gone'}" for k in names]
    old, new = (
        {k: v for k, v in side.items() if k != "data" and not k.startswith(CONTENT)} for side in (saved, current)
    )
    changes = [*differences(old, new, defaults=defaults), *files]
    # other settings of the data make other rows of the same files
    if saved.get("data") != current.get("data") and not any(c.startswith("config.data.") for c in changes):
        changes.append(f"data: the rows of {_data_files(current)} have changed")
    return changes


def _data_files(identity: Mapping[str, Any]) -> str:
    data = identity.get("config", {}).get("data", {})
    sources = [p for name in ("path", "eval_path") for p in [data.get(name)] if p]
    paths = [p for path in sources for p in (path.values() if isinstance(path, dict) else [path])]
    return ", ".join(str(p) for path in paths for p in (path if isinstance(path, list) else [path])) or "the run"


def load_identity(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The identity of the run whose checkpoints a folder holds, None if it holds none, and sentences about damage.

    Raises:
        CheckpointError: the identity is lost.
    """
    if not any((folder / CHECKPOINTS).glob("step-*")):
        return None, []
    return _read_identity(folder / IDENTITY)


def _read_identity(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read identity.json, or if it is damaged or missing the copy in the newest checkpoint, with a sentence that says so."""
    damage = "was changed after it was written"
    try:
        if is_intact(path):
            return dict(json.loads(path.read_text(encoding="utf-8"))), []
    except FileNotFoundError:
        damage = "is gone"
    except (OSError, ValueError, TypeError) as error:
        damage = f"cannot be read ({error})"
    identity = latest_state(path.parent).get("identity")
    if not isinstance(identity, dict):
        problem = f"holds checkpoints but no {IDENTITY}" if damage == "is gone" else f"its {IDENTITY} {damage}"
        how = "restore it, choose another output, or delete the folder to start over"
        raise CheckpointError(str(path.parent), f"{problem}, so it is unknown which run they belong to", how)
    return identity, [f"{path}: {damage}; it is written again as the newest checkpoint has it"]


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


STORAGE = (
    "reference.cache_dir",
    "checkpoint.keep_last",
    "checkpoint.keep_best",
    "checkpoint.pt",
)  # what is kept, and where


def differences(old: Any, new: Any, prefix: str = "", defaults: Any = None) -> list[str]:
    """``key.path: old -> new`` for every leaf that differs; a key missing in `old` has its default.

    Settings of `STORAGE` may differ, and so may the number of a device: ``cuda:1`` computes what ``cuda:0`` computes.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        known = defaults if isinstance(defaults, Mapping) else {}
        return [
            d
            for k in sorted({*old, *new})
            for d in differences(old.get(k, known.get(k)), new.get(k), f"{prefix}.{k}" if prefix else k, known.get(k))
        ]
    is_equal = old == new or prefix.removeprefix("config.") in STORAGE
    if prefix.endswith(".device") and isinstance(old, str) and isinstance(new, str):
        is_equal = old.partition(":")[0] == new.partition(":")[0]
    return [] if is_equal else [f"{prefix}: {_as_json(old)} -> {_as_json(new)}"]


class MetricsLog:
    """An append-only JSONL file, written line by line. NaN and infinities are written as null, because JSON has neither.

    A line that cannot be written completely is removed again. Half a line left by a killed process is cut off on opening.

    Args:
        say: receives one message if lines cannot be written and are dropped; None: raise an error instead.
    """

    def __init__(self, path: Path, say: Callable[[str], None] | None = None) -> None:
        self.path, self._say = path, say
        self._file: Any = None
        try:
            self._file = path.open("ab+", buffering=0)
            whole_lines(self._file.fileno())
        except OSError as error:
            self._handle_error(error)

    def write(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        line = memoryview((json.dumps(nan_to_none(row), ensure_ascii=False) + "\n").encode())
        end = self._size()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)
            self._handle_error(error)

    def offset(self) -> int:
        """Bytes written so far, after syncing them to disk."""
        os.fsync(self._file.fileno())
        return self._size()

    def sha256(self) -> str:
        """SHA-256 of everything written so far."""
        return file_sha256(self.path)

    def truncate(self, offset: int, sha256: str | None = None) -> None:
        """Truncate the file to its state at a checkpoint.

        Args:
            sha256: of that state, if known.

        Raises:
            CheckpointError: the file is shorter or differs from that state, so lines of this run are lost.
        """
        size = self._size()
        what = ""
        if size < offset:
            what = f"has {size:,} bytes, but the checkpoint was written when it had {offset:,}"
        elif sha256 is not None and not prefix_matches(self.path, offset, sha256):
            what = f"its first {offset:,} bytes are not those that it had when the checkpoint was written"
        if what:
            raise CheckpointError(str(self.path), what, "restore the file, or delete the run folder to start over")
        self._file.truncate(offset)

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _handle_error(self, error: OSError) -> None:
        if self._say is None:
            raise error
        self._say(f"{self.path}: {error.strerror}; lines that cannot be written are left out")
        self._say = lambda _: None


class NullLog(MetricsLog):
    """A log that writes nothing, for ranks other than the one that writes the file."""

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


def nan_to_none(value: Any) -> Any:
    """Replace every NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if isinstance(value, Mapping):
        return {k: nan_to_none(v) for k, v in value.items()}
    return [nan_to_none(v) for v in value] if isinstance(value, (list, tuple)) else value
