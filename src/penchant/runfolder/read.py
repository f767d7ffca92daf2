"""The one reader of folders that runs, sweeps, pipelines and comparisons leave, whole (`read`) or as they go on (`follow`).

Whatever is absent, torn, foreign or damaged is empty: no file can bring a reader down. Nothing is ever written.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
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
    is_whole,
    line_sum,
)
from penchant.runfolder.values import mapping, mappings

T = TypeVar("T")
Row = dict[str, Any]

# ---- Texts of files; what is not as it should be is a ValueError ----


def json_object(text: str) -> Row:
    """A JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("is not an object")
    return value


def yaml_object(text: str) -> Row:
    """A YAML mapping, its keys as text."""
    try:
        value = yaml_value(text, YAML_LOADER)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if not isinstance(value, dict):
        raise ValueError("is not a mapping")
    return mapping(value)


def flag_list(text: str) -> list[Row]:
    """The flags of flags.json: a list, or a list under `flags`."""
    value = json.loads(text)
    return mappings(value.get("flags") if isinstance(value, dict) else value)


def json_rows(text: str) -> tuple[list[Row], int]:
    """The objects of a JSONL text, and how many whole lines were none; the last line of a run that goes on may be half."""
    *lines, last = text.split("\n")  # not splitlines: JSON strings may hold U+2028
    found = [_row(line) for line in lines if line.strip()]
    return [row for row in (*found, _row(last)) if row is not None], found.count(None)


def _row(line: str) -> Row | None:
    try:
        return json_object(line)
    except (ValueError, RecursionError):
        return None


def read_text(path: Path) -> str:
    """A file's text; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:
        return ""


def read_lines(path: Path) -> tuple[list[Row], int]:
    """The objects of a JSONL file, and how many whole lines were none."""
    return json_rows(read_text(path))


# ---- A folder as it is ----


def _whole(name: str, parse: Callable[[str], T], empty: T, *, summed: bool = False) -> cached_property[T]:
    """A file's value; `summed`: empty too where it is not as it was written."""

    def value(folder: Folder) -> T:
        try:
            whole = not summed or is_whole(folder.path / name)
            return parse(read_text(folder.path / name)) if whole else empty
        except (ValueError, RecursionError):
            return empty

    return cached_property(value)


def _object(name: str, parse: Callable[[str], Row] = json_object, *, summed: bool = False) -> cached_property[Row]:
    return _whole(name, parse, {}, summed=summed)


def _rows(name: str) -> cached_property[list[Row]]:
    return cached_property(lambda folder: folder.rows(name))


class Folder:
    """What the folder of a run, a sweep, a pipeline or a comparison holds; each file is read once, when it is first asked for.

    Args:
        path: may not exist.
    """

    config_text = cached_property(lambda self: read_text(self.path / CONFIG))
    config = _object(CONFIG, yaml_object)
    identity, manifest, results = _object(IDENTITY), _object(MANIFEST), _object(RESULTS)
    audit, calibration = _object(AUDIT), _object(CALIBRATION)
    comparison, sweep, pipeline = (_object(name, summed=True) for name in (COMPARISON, SWEEP, PIPELINE))
    flags: cached_property[list[Row] | None] = _whole(FLAGS, flag_list, None)  # None: nobody looked for any
    metrics, perf = _rows(METRICS), _rows(PERF)
    samples, samples_before = _rows(SAMPLES), _rows(SAMPLES_BEFORE)

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unreadable: dict[str, int] = {}  # whole lines that are none, by the name of the file

    def rows(self, name: str) -> list[Row]:
        found, self.unreadable[name] = read_lines(self.path / name)
        return found

    @cached_property
    def evaluations(self) -> list[Row]:
        """Of evaluations.jsonl: the lines that are as they were written."""
        lines = self.rows(EVALUATIONS)
        whole = [line for line in lines if line.pop(LINE_SUM, None) in (None, line_sum(line))]
        self.unreadable[EVALUATIONS] += len(lines) - len(whole)
        return whole

    @cached_property
    def comparison_rows(self) -> list[Row]:
        """Of comparison.jsonl; none where it is not as it was written."""
        return self.rows(COMPARISON_ROWS) if is_whole(self.path / COMPARISON_ROWS) else []

    @property
    def is_run(self) -> bool:
        """Whether it holds anything of a run."""
        return any((self.path / name).is_file() for name in (METRICS, MANIFEST, CONFIG, RESULTS))


def read(folder: Path | str) -> Folder:
    """What a folder holds; see `Folder`."""
    return Folder(Path(folder))


# ---- A folder as it goes on: files that another process writes, each byte read once ----

CHUNK = 1 << 20  # bytes read at once
BRIEF = 1 << 14, 1 << 11  # bytes at the end of metrics.jsonl and perf.jsonl that say where a run is
MARK = 256  # bytes before the place reached, by which a file is known again
LARGEST = 1 << 24  # bytes of a file that is read whole; a longer one is not what it says


class Tail:
    """The rows of a JSONL file that grows.

    A last line without its end is left for the next call. Where the file became shorter, was replaced, or holds other bytes before the
    place reached (a resumed run cuts its log back and writes on), it is read from its start.

    Args:
        path: may not exist yet; last: of a file that is long already, only about so many bytes at its end are read; None: all of it.
    """

    def __init__(self, path: Path, last: int | None = None) -> None:
        self.path, self._last = path, last
        self._seen: tuple[int, int, int] | None = None
        self._forget()

    def read(self) -> tuple[bool, list[Row]]:
        """(whether what earlier calls gave holds no longer, the new rows)."""
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                if seen == self._seen:
                    return False, []
                anew = self._offset > 0 and not self._is_same(file, stat.st_ino)
                if anew:
                    self._forget()
                self._seen = seen
                return anew, self._new(file)
        except OSError:  # not there (yet, or any more)
            anew = self._offset > 0
            self._forget()
            return anew, []

    def _forget(self) -> None:
        self._offset, self._mark, self._seen = 0, b"", None
        self.unreadable = 0  # whole lines that are no JSON object

    def _is_same(self, file: Any, inode: int) -> bool:
        if self._seen is None or inode != self._seen[0]:
            return False
        file.seek(self._offset - len(self._mark))
        return bool(file.read(len(self._mark)) == self._mark)

    def _new(self, file: Any) -> list[Row]:
        rows: list[Row] = []
        if not self._offset and self._last is not None and (size := os.fstat(file.fileno()).st_size) > self._last:
            file.seek(size - self._last)
            self._offset = size - self._last + len(file.readline())  # the line in which that place lies is left out
        file.seek(self._offset)
        rest = b""
        while chunk := file.read(CHUNK):
            whole, end, rest = (rest + chunk).rpartition(b"\n")
            self._offset += len(whole + end)
            self._mark = (self._mark + whole + end)[-MARK:]
            found, bad = json_rows((whole + end).decode(errors="replace"))
            rows += found
            self.unreadable += bad
        return rows


class Whole(Generic[T]):
    """What a small file says, parsed again only when the file has changed; what it last said where it cannot be read now.

    Args:
        parse: of its text; raises ValueError where the text is not what it should be.
    """

    def __init__(self, path: Path, parse: Callable[[str], T], empty: T) -> None:
        self.path = path
        self._value, self._parse = empty, parse
        self._seen: tuple[int, int, int] | None = None

    def read(self) -> T:
        try:
            stat = self.path.stat()
            seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if seen != self._seen and stat.st_size <= LARGEST:
                self._seen = seen
                self._value = self._parse(self.path.read_text(encoding="utf-8", errors="replace"))
        except (OSError, ValueError, RecursionError):
            pass
        return self._value


class Followed:
    """The files of a run's folder that change while it goes on.

    Args:
        brief: the end of its logs alone, and its settings as identity.json has them: JSON is read ten times as fast as YAML.
    """

    def __init__(self, folder: Path, brief: bool = False) -> None:
        last = BRIEF if brief else (None, None)
        self.metrics, self.perf = Tail(folder / METRICS, last[0]), Tail(folder / PERF, last[1])
        self.manifest = Whole[Row](folder / MANIFEST, json_object, {})
        self.config = (
            Whole[Row](folder / IDENTITY, lambda text: mapping(json_object(text).get("config")), {})
            if brief
            else Whole[Row](folder / CONFIG, yaml_object, {})
        )
        self.samples, self.samples_before = (
            Whole[list[Row]](folder / name, lambda text: json_rows(text)[0], []) for name in (SAMPLES, SAMPLES_BEFORE)
        )
        self.flags = Whole[list[Row]](folder / FLAGS, flag_list, [])


def follow(folder: Path, brief: bool = False) -> Followed:
    """A run's folder as it goes on; see `Followed`."""
    return Followed(folder, brief)


# ---- Whether a process is at work there, found without touching its lock: a probe that held it for a moment could turn a run away ----

LOCKS = Path("/proc/locks")
Held = Literal["held", "free", "elsewhere"]


def holder(folder: Path) -> tuple[int, str] | None:
    """(process, machine) that last held the folder, as its lock's file says."""
    found = re.match(r"PID (\d{1,20}) on (.*)", read_text(folder / LOCK))
    return None if found is None else (int(found[1]), found[2].strip())


def alive(folder: Path) -> bool:
    """Whether the process that last held a folder may still be there: False only where it is known to be gone."""
    found = holder(folder)
    return found is None or found[1] != socket.gethostname() or _is_there(found[0])


def lock_of(folder: Path, locks: Path = LOCKS) -> Held:
    """Who holds a folder's lock: a process of this machine, nobody, or (as far as can be told from here) another machine.

    A process that has ended leaves its number in the file, and the system may give that number to another one; so the system's list of
    locks must show the file too, where there is such a list.
    """
    found = holder(folder)
    if found is None:
        return "free"
    if found[1] != socket.gethostname():
        return "elsewhere"
    if not _is_there(found[0]):
        return "free"
    try:
        inode = (folder / LOCK).stat().st_ino
        listed = [line.split() for line in locks.read_text().splitlines()]
    except OSError:
        return "held"  # no such list on this system: the process is alive, and more is not known
    ours = any(str(found[0]) in words and any(w.endswith(f":{inode}") for w in words) for words in listed)
    return "held" if ours else "free"


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 is none: it only asks
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
