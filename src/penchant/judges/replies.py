"""Replies of a judge on disk, so that a second comparison asks nothing again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penchant.errors import CheckpointError
from penchant.judges.protocol import Question

VERSION = 1  # part of every key: raise it when the same question is put otherwise


def default_folder() -> Path:
    """``$PENCHANT_CACHE/judge`` or ``~/.cache/penchant/judge``."""
    return Path(os.environ.get("PENCHANT_CACHE", "~/.cache/penchant")).expanduser() / "judge"


def key_of(model: str, instruction: str, parameters: Mapping[str, Any], question: Question) -> str:
    """SHA-256 over all that a reply depends on: the model, the instruction, the parameters, the prompt, and both answers in their order."""
    parts = [VERSION, model, instruction, parameters, question.prompt, question.first, question.second]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass
class Replies:
    """Verdicts by key, in one file a judge; each new one is a line that is appended whole.

    Args:
        path: a JSONL file of ``{"key", "verdict", "reply"}``; a damaged line is one that was never written.
    """

    path: Path
    known: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, model: str, instruction: str, parameters: Mapping[str, Any]) -> Replies:
        """The replies of a judge so far; the file can be written.

        Raises:
            CheckpointError: it cannot.
        """
        made = json.dumps([VERSION, model, instruction, parameters], sort_keys=True)
        path = folder / f"{hashlib.sha256(made.encode()).hexdigest()[:16]}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as out:
                torn = out.tell() > 0 and path.read_bytes()[-1:] != b"\n"
                out.write(b"\n" if torn else b"")
            found = cls(path)
            found._read()
        except OSError as error:
            raise CheckpointError(
                str(path),
                f"a judge's replies cannot be kept ({error.strerror})",
                "set PENCHANT_CACHE to another folder",
            ) from error
        return found

    def _read(self) -> None:
        for line in self.path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
                verdict = float(row["verdict"])
            except (ValueError, KeyError, TypeError):
                continue
            if 0.0 <= verdict <= 1.0:
                self.known[str(row["key"])] = verdict

    def keep(self, key: str, verdict: float, reply: str) -> None:
        """Write a reply down."""
        self.known[key] = verdict
        line = json.dumps({"key": key, "verdict": verdict, "reply": reply}) + "\n"
        with self.path.open("ab") as out:
            out.write(line.encode())
