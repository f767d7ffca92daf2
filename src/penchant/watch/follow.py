"""Files that another process writes: read as they grow, each byte once, and only read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHUNK = 1 << 20  # bytes read at once
MARK = 256  # bytes before the place reached, by which a file is known again
LARGEST = 1 << 24  # bytes of a file that is read whole; a longer one is not what it says


class Tail:
    """The rows of a JSONL file that grows.

    A last line without its end is left for the next call. Where the file became shorter, was replaced, or holds other bytes before the
    place reached (a resumed run cuts its log back and writes on), it is read from its start.

    Args:
        path: may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unreadable = 0  # whole lines that are no JSON object
        self._offset = 0
        self._mark = b""
        self._seen: tuple[int, int, int] | None = None

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
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
                return anew, self._rows(file)
        except OSError:  # not there (yet, or any more)
            anew = self._offset > 0
            self._forget()
            return anew, []

    def _forget(self) -> None:
        self._offset, self._mark, self._seen, self.unreadable = 0, b"", None, 0

    def _is_same(self, file: Any, inode: int) -> bool:
        if self._seen is None or inode != self._seen[0]:
            return False
        file.seek(self._offset - len(self._mark))
        return bool(file.read(len(self._mark)) == self._mark)

    def _rows(self, file: Any) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        file.seek(self._offset)
        rest = b""
        while chunk := file.read(CHUNK):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._offset += len(line) + 1
                self._mark = (self._mark + line + b"\n")[-MARK:]
                row = _object(line)
                if row is not None:
                    rows.append(row)
                elif line.strip():
                    self.unreadable += 1
        return rows


class Whole:
    """What a small file says, parsed again only when the file has changed; what it last said where it cannot be read now.

    Args:
        parse: of its text; raises ValueError where the text is not what it should be.
    """

    def __init__(self, path: Path, parse: Callable[[str], Any], empty: Any) -> None:
        self.path = path
        self.value = empty
        self._parse = parse
        self._seen: tuple[int, int, int] | None = None

    def read(self) -> Any:
        try:
            stat = self.path.stat()
            seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if seen != self._seen and stat.st_size <= LARGEST:
                self._seen = seen
                self.value = self._parse(self.path.read_text(encoding="utf-8", errors="replace"))
        except (OSError, ValueError, RecursionError):
            pass
        return self.value


def json_object(text: str) -> dict[str, Any]:
    """A JSON object; anything else is a ValueError."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def json_rows(text: str) -> list[dict[str, Any]]:
    """The objects of a JSONL text, without lines that are none."""
    return [row for line in text.split("\n") if (row := _object(line.encode(errors="replace"))) is not None]


def yaml_object(text: str) -> dict[str, Any]:
    """A YAML mapping; anything else is a ValueError."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if not isinstance(value, dict):
        raise ValueError("no mapping")
    return value


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
