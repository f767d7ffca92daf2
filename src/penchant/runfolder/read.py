"""The reader for folders of runs, sweeps, pipelines and comparisons: once (`read_folder`) or while they are being written (`follow`).

Missing, incomplete, foreign or damaged files read as empty, so no file can crash a reader. Nothing is ever written.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import yaml

from penchant.base.files import YAML_LOADER, yaml_value
from penchant.runfolder import (
    AUDIT,
    CALIBRATION,
    COMPARISON,
    COMPARISON_ROWS,
    CONFIG,
    EVALUATIONS,
    FLAGS,
    IDENTITY,
    LINE_SUM,
    LOCK,
    MANIFEST,
    METRICS,
    PERF,
    PIPELINE,
    RESULTS,
    SAMPLES,
    SAMPLES_BEFORE,
    SWEEP,
    is_intact,
    line_sha256,
)
from penchant.runfolder.values import mapping, mappings, text

T = TypeVar("T")
Row = dict[str, Any]

# ---- Parsing texts of files; invalid content raises ValueError ----


def json_object(text: str) -> Row:
    """Parse a JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("is not an object")
    return value


def yaml_object(text: str) -> Row:
    """Parse a YAML mapping, with its keys as text."""
    try:
        value = yaml_value(text, YAML_LOADER)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if not isinstance(value, dict):
        raise ValueError("is not a mapping")
    return mapping(value)


def flag_list(text: str) -> list[Row]:
    """Parse the flags of flags.json: a list, or a list under `flags`."""
    value = json.loads(text)
    return mappings(value.get("flags") if isinstance(value, dict) else value)


def json_rows(text: str) -> tuple[list[Row], int]:
    """Parse JSONL into its objects and the number of invalid lines. A last line without its end is not counted as invalid."""
    *lines, last = text.split("\n")  # not splitlines: JSON strings may hold U+2028
    rows = [_parse_row(line) for line in lines if line.strip()]
    return [row for row in (*rows, _parse_row(last)) if row is not None], rows.count(None)


def _parse_row(line: str) -> Row | None:
    try:
        return json_object(line)
    except (ValueError, RecursionError):
        return None


def read_text(path: Path) -> str:
    """A file's text; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:
        return ""


def read_lines(path: Path) -> tuple[list[Row], int]:
    """The objects of a JSONL file, and the number of invalid lines."""
    return json_rows(read_text(path))


# ---- Reading a folder once ----


def _file_property(name: str, parse: Callable[[str], T], empty: T, *, summed: bool = False) -> cached_property[T]:
    """A cached property with a file's value, `empty` if it is invalid or, with `summed`, was changed after it was written."""

    def value(folder: Folder) -> T:
        try:
            intact = not summed or is_intact(folder.path / name)
            return parse(read_text(folder.path / name)) if intact else empty
        except (ValueError, RecursionError):
            return empty

    return cached_property(value)


def _object_property(
    name: str, parse: Callable[[str], Row] = json_object, *, summed: bool = False
) -> cached_property[Row]:
    return _file_property(name, parse, {}, summed=summed)


def _rows_property(name: str) -> cached_property[list[Row]]:
    return cached_property(lambda folder: folder.rows(name))


class Folder:
    """The contents of the folder of a run, sweep, pipeline or comparison; each file is read once, on first use.

    Args:
        path: may not exist.
    """

    config_text = cached_property(lambda self: read_text(self.path / CONFIG))
    config = _object_property(CONFIG, yaml_object)
    identity, manifest, results = _object_property(IDENTITY), _object_property(MANIFEST), _object_property(RESULTS)
    audit, calibration = _object_property(AUDIT), _object_property(CALIBRATION)
    comparison, sweep, pipeline = (_object_property(name, summed=True) for name in (COMPARISON, SWEEP, PIPELINE))
    flags: cached_property[list[Row] | None] = _file_property(FLAGS, flag_list, None)  # None: no readable flags.json
    metrics, perf = _rows_property(METRICS), _rows_property(PERF)
    samples, samples_before = _rows_property(SAMPLES), _rows_property(SAMPLES_BEFORE)

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unreadable: dict[str, int] = {}  # number of invalid lines by file name

    def rows(self, name: str) -> list[Row]:
        rows, self.unreadable[name] = read_lines(self.path / name)
        return rows

    @cached_property
    def evaluations(self) -> list[Row]:
        """The lines of evaluations.jsonl that are unchanged since they were written."""
        lines = self.rows(EVALUATIONS)
        intact = [line for line in lines if line.pop(LINE_SUM, None) in (None, line_sha256(line))]
        self.unreadable[EVALUATIONS] += len(lines) - len(intact)
        return intact

    @cached_property
    def comparison_rows(self) -> list[Row]:
        """The lines of comparison.jsonl; empty if it was changed after it was written."""
        return self.rows(COMPARISON_ROWS) if is_intact(self.path / COMPARISON_ROWS) else []

    @property
    def is_run(self) -> bool:
        """Whether it contains any file of a run; a checkpoint, which has a manifest too, is none."""
        return not (self.path / "state.json").is_file() and any(
            (self.path / name).is_file() for name in (METRICS, MANIFEST, CONFIG, RESULTS)
        )


def read_folder(folder: Path | str) -> Folder:
    """Open a folder for reading; see `Folder`."""
    return Folder(Path(folder))


START = "start"  # the name of the model that runs start from


def start_names(runs: Mapping[str, Folder]) -> dict[str, str]:
    """What each run's starting model is called, by the run's name: START, or by its first run if the runs start from several."""
    models = {name: mapping(folder.manifest.get("model")) for name, folder in runs.items()}
    keys = {name: text(model.get("sha256")) + text(model.get("adapter")) for name, model in models.items()}
    firsts = {key: name for name, key in reversed(keys.items())}
    return {name: START if len(firsts) == 1 else f"{START} of {firsts[key]}" for name, key in keys.items()}


# ---- Following a folder while another process writes it: each byte is read once ----

CHUNK = 1 << 20  # bytes per read
BRIEF = 1 << 14, 1 << 11  # bytes at the end of metrics.jsonl and perf.jsonl that are enough for a run's progress
MARK = 256  # bytes before the current offset that must be unchanged for a file to count as the same
LARGEST = 1 << 24  # maximum bytes of a file that is read as a whole; a larger one cannot be genuine


class Tail:
    """The rows of a growing JSONL file.

    An incomplete last line is left for the next call. The file is read from its start again if it became shorter, was replaced, or has
    other bytes before the current offset (a resumed run cuts its log back and continues it).

    Args:
        path: may not exist yet; last: if the file is longer, only read about this many bytes at its end; None: read all of it.
    """

    def __init__(self, path: Path, last: int | None = None) -> None:
        self.path, self._tail_bytes = path, last
        self._stat: tuple[int, int, int] | None = None
        self._reset()

    def read(self) -> tuple[bool, list[Row]]:
        """Return (whether rows from earlier calls are obsolete, the new rows)."""
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                if seen == self._stat:
                    return False, []
                restarted = self._offset > 0 and not self._is_same_file(file, stat.st_ino)
                if restarted:
                    self._reset()
                self._stat = seen
                return restarted, self._read_new_rows(file)
        except OSError:  # does not exist yet, or no longer
            restarted = self._offset > 0
            self._reset()
            return restarted, []

    def _reset(self) -> None:
        self._offset, self._mark, self._stat = 0, b"", None
        self.unreadable = 0  # number of lines that are not a JSON object

    def _is_same_file(self, file: Any, inode: int) -> bool:
        if self._stat is None or inode != self._stat[0]:
            return False
        file.seek(self._offset - len(self._mark))
        return bool(file.read(len(self._mark)) == self._mark)

    def _read_new_rows(self, file: Any) -> list[Row]:
        rows: list[Row] = []
        if (
            not self._offset
            and self._tail_bytes is not None
            and (size := os.fstat(file.fileno()).st_size) > self._tail_bytes
        ):
            file.seek(size - self._tail_bytes)
            self._offset = size - self._tail_bytes + len(file.readline())  # skip the partial line at that offset
        file.seek(self._offset)
        rest = b""
        while chunk := file.read(CHUNK):
            complete, end, rest = (rest + chunk).rpartition(b"\n")
            self._offset += len(complete + end)
            self._mark = (self._mark + complete + end)[-MARK:]
            new_rows, invalid = json_rows((complete + end).decode(errors="replace"))
            rows += new_rows
            self.unreadable += invalid
        return rows


class CachedFile(Generic[T]):
    """The value of a small file, parsed again only if the file has changed; keeps the last value while it cannot be read.

    Args:
        parse: parses its text; raises ValueError if the text is invalid.
        empty: the value if there is no such file. A run replaces its files atomically, so a file that is gone was deleted.
    """

    def __init__(self, path: Path, parse: Callable[[str], T], empty: T) -> None:
        self.path = path
        self._value, self._empty, self._parse = empty, empty, parse
        self._stat: tuple[int, int, int] | None = None

    def read(self) -> T:
        try:
            stat = self.path.stat()
            seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if seen != self._stat and stat.st_size <= LARGEST:
                self._stat = seen
                self._value = self._parse(self.path.read_text(encoding="utf-8", errors="replace"))
        except FileNotFoundError:
            self._value, self._stat = self._empty, None
        except (OSError, ValueError, RecursionError):
            pass
        return self._value


class FollowedRun:
    """The files of a run folder that change during the run.

    Args:
        brief: read only the end of logs, and settings from identity.json, because JSON parses ten times as fast as YAML.
    """

    def __init__(self, folder: Path, brief: bool = False) -> None:
        last = BRIEF if brief else (None, None)
        self.metrics, self.perf = Tail(folder / METRICS, last[0]), Tail(folder / PERF, last[1])
        self.manifest = CachedFile[Row](folder / MANIFEST, json_object, {})
        self.config = (
            CachedFile[Row](folder / IDENTITY, lambda text: mapping(json_object(text).get("config")), {})
            if brief
            else CachedFile[Row](folder / CONFIG, yaml_object, {})
        )
        self.samples, self.samples_before = (
            CachedFile[list[Row]](folder / name, lambda text: json_rows(text)[0], [])
            for name in (SAMPLES, SAMPLES_BEFORE)
        )
        self.flags = CachedFile[list[Row]](folder / FLAGS, flag_list, [])


def follow(folder: Path, brief: bool = False) -> FollowedRun:
    """Follow a run folder while it is being written; see `FollowedRun`."""
    return FollowedRun(folder, brief)


# ---- Whether a process is using the folder, without taking its lock: even a brief probe could make a starting run fail ----

LOCKS = Path("/proc/locks")
LockState = Literal["held", "free", "elsewhere"]


def lock_holder(folder: Path) -> tuple[int, str] | None:
    """(PID, machine) that last held the folder, from its lock file; None if unknown."""
    match = re.match(r"PID (\d{1,20}) on (.*)", read_text(folder / LOCK))
    return None if match is None else (int(match[1]), match[2].strip())


def may_be_running(folder: Path) -> bool:
    """Whether a process may be using a folder; False only if its last holder is known and holds it no longer."""
    holder = lock_holder(folder)
    # on some file systems the kernel's list does not show a lock by the inode of its file: a run knows its own without the list
    return holder in (None, (os.getpid(), socket.gethostname())) or lock_state(folder) != "free"


def lock_state(folder: Path, locks: Path = LOCKS) -> LockState:
    """Whether a folder's lock is held by a process of this machine, free, or last held by another machine.

    A process leaves its PID in the file when it ends, and the system may reuse that PID. Therefore the system's list of locks must
    include the file too, if there is such a list.
    """
    holder = lock_holder(folder)
    if holder is None:
        return "free"
    if holder[1] != socket.gethostname():
        return "elsewhere"
    if not _process_exists(holder[0]):
        return "free"
    try:
        inode = (folder / LOCK).stat().st_ino
        entries = [line.split() for line in locks.read_text().splitlines()]
    except OSError:
        return "held"  # no such list on this system: all we know is that the process exists
    locked = any(str(holder[0]) in words and any(w.endswith(f":{inode}") for w in words) for words in entries)
    return "held" if locked else "free"


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only checks whether the process exists
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
