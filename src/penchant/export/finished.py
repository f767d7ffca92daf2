"""A folder that an earlier export left: is it what is asked for now, untouched? Then it can be pushed as it stands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from penchant.errors import CheckpointError
from penchant.export.card import CARD, hashes
from penchant.export.check import Check

ABOUT = "export.json"


def finished(folder: Path, asked: Mapping[str, Any]) -> tuple[Check, tuple[str, ...]]:
    """The comparison and the notes of a finished export.

    Args:
        folder: what is there; asked: what its record must say (run, step, format, dtype, checkpoint).

    Raises:
        CheckpointError: it is no export, one of something else, or its files are not as they were written. The card may be another:
            whoever publishes adds a licence to it.
    """
    record = _record(folder)
    for name, value in asked.items():
        if record.get(name) != value:
            how = (
                f"is of another {name} ({record[name]!r}, not {value!r})"
                if name in record
                else f"does not say which {name}"
            )
            raise taken(folder, f"it {how}")
    found, written = hashes(folder), record.get("sha256")
    written = written if isinstance(written, Mapping) else {}
    for name in sorted({*found, *written, CARD}):
        if name not in found:
            raise taken(folder, f"{name!r} is gone from it")
        if name not in (ABOUT, CARD) and found[name] != written.get(name):
            raise taken(folder, f"{name!r} is not as the export wrote it")
    check, notes = _check(record.get("check")), record.get("notes")
    if check is None or not check.good or not isinstance(notes, list) or not all(map(_is_line, notes)):
        raise taken(folder, f"its {ABOUT} records no comparison that was passed")
    return check, tuple(notes)


def taken(folder: Path, why: str | None = None) -> CheckpointError:
    """What is there stays; why: it cannot be pushed as it is."""
    reason = "nothing is overwritten" if why is None else f"{why}, and nothing is overwritten"
    return CheckpointError(str(folder), f"is there already, and {reason}", "give another --output")


def _record(folder: Path) -> Mapping[str, Any]:
    try:
        found = None if folder.is_symlink() else json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, Mapping):
        raise taken(folder, "it is no finished export")
    return found


def _check(found: Any) -> Check | None:
    there = found if isinstance(found, Mapping) else {}
    values: dict[str, Any] = {f.name: there.get(f.name) for f in fields(Check)}
    numbers = [v for name, v in values.items() if not (name == "greedy" and v is None)]
    return Check(**values) if all(isinstance(v, (int, float)) for v in numbers) else None


def _is_line(note: Any) -> bool:
    return isinstance(note, str) and note.isprintable()
