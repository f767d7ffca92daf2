"""Readings of a test set: each one is written down beside the file, and the next comparison on it says so.

A test set says what it promises once. Whoever looks, changes something and looks again has chosen by it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.errors import DataError
from penchant.files import file_sha256

READINGS = "test_readings.jsonl"


@dataclass(frozen=True, slots=True)
class Readings:
    """The readings of a file of test rows.

    Args:
        file: absolute; fingerprint: SHA-256 of its rows, whatever the file's name and layout.
    """

    file: Path
    fingerprint: str

    @property
    def log(self) -> Path:
        """Where its readings are kept: in the folder of the file, so that every comparison on it finds them."""
        return self.file.parent / READINGS

    def earlier(self) -> list[dict[str, Any]]:
        """Readings so far, oldest first: of the same rows, or of a file of the same name.

        Raises:
            DataError: a line is damaged.
        """
        if not self.log.exists():
            return []
        found = []
        for number, line in enumerate(self.log.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                _ = row["time"], row["runs"], row["fingerprint"], row["file"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{self.log}:{number}", "is no reading of a test set", "restore the line") from error
            if row["fingerprint"] == self.fingerprint or row["file"] == self.file.name:
                found.append(row)
        return found

    def check_writable(self) -> None:
        """A reading can be written down.

        Raises:
            DataError: the folder cannot be written, so that the next reader would not know.
        """
        try:
            known = self.log.exists()
            with self.log.open("ab"):
                pass
            if not known:  # nothing was read yet
                self.log.unlink()
        except OSError as error:
            raise DataError(
                str(self.log),
                f"cannot be written ({error.strerror}), so nobody would know that the test set was read",
                "put the file into a folder that you can write",
            ) from error

    def record(self, runs: Sequence[str], details: Mapping[str, Any]) -> None:
        """Write a reading down, on disk before this returns."""
        row = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "file": self.file.name,
            "sha256": file_sha256(self.file),
            "fingerprint": self.fingerprint,
            "runs": list(runs),
            **details,
        }
        with self.log.open("ab") as out:
            out.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            out.flush()
            os.fsync(out.fileno())

    def sentence(self, earlier: Sequence[Mapping[str, Any]]) -> str:
        """How often it was read before."""
        if not earlier:
            return f"This test set is read for the first time; the reading is written down in {self.log}."
        times = "once" if len(earlier) == 1 else f"{len(earlier)} times"
        first, last = earlier[0], earlier[-1]
        said = (
            f"This test set has been read {times} before, first on {first['time'][:10]} for {', '.join(first['runs'])}"
        )
        if len(earlier) > 1:
            said += f", last on {last['time'][:10]} for {', '.join(last['runs'])}"
        other = sum(row["fingerprint"] != self.fingerprint for row in earlier)
        changed = f" ({other} of them with other rows in the file)" if other else ""
        return f"{said}{changed}: what is chosen by it is no longer tested by it."
