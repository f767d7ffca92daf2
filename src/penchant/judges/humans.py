"""Human preferences between pairs of answers: `preferences.jsonl`, an append-only log with one record per line."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from penchant.base.files import append_line
from penchant.errors import DataError
from penchant.runfolder.read import json_rows
from penchant.runfolder.values import mapping, num

PREFERENCES = "preferences.jsonl"
VERDICTS = ("a", "b", "tie", "both_bad", "skip")
UNDO = "undo"  # verdict of a record that takes back the earlier one with the same id
WINS = {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5}

Prompt = str | tuple[tuple[str, str], ...]  # text, or (role, content) of a conversation


@dataclass(frozen=True, slots=True)
class Judgement:
    """One judgment of one person about one pair.

    Args:
        id: of the record; pair: id of the two answers to a prompt; order: number of earlier records of this annotator.
        prompt: text or messages, as JSON; answers: a and b; models: that wrote them; hashes: SHA-256 of their source files.
        verdict: one of `VERDICTS`; left: which answer was on the left; seconds: from display to verdict.
        gold: the answer known to be better, if the pair is a check; repeat_of: id of the person's earlier judgment of this pair.
        reasons: tags; edited: a better answer that the person wrote; time: ISO 8601.
    """

    id: str
    pair: str
    annotator: str
    order: int
    prompt: Any
    answers: tuple[str, str]
    models: tuple[str, str]
    hashes: tuple[str, str]
    verdict: str
    left: Literal["a", "b"]
    seconds: float
    gold: str | None = None
    repeat_of: str | None = None
    reasons: tuple[str, ...] = ()
    edited: str | None = None
    time: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    @property
    def counts(self) -> bool:
        """Whether it counts for the models: not a check, a repetition or a skip."""
        return self.gold is None and self.repeat_of is None and self.verdict in WINS

    @property
    def side(self) -> str | None:
        """The side that won; None if neither did."""
        return None if self.verdict not in ("a", "b") else "left" if self.verdict == self.left else "right"

    def to_json(self) -> dict[str, Any]:
        """The judgment as written to the file."""
        return {
            "id": self.id,
            "pair": self.pair,
            "annotator": self.annotator,
            "verdict": self.verdict,
            "prompt": self.prompt,
            "answer_a": self.answers[0],
            "answer_b": self.answers[1],
            "model_a": self.models[0],
            "model_b": self.models[1],
            "sha256_a": self.hashes[0],
            "sha256_b": self.hashes[1],
            "left": self.left,
            "seconds": round(self.seconds, 2),
            "order": self.order,
            "gold": self.gold,
            "repeat_of": self.repeat_of,
            "reasons": list(self.reasons),
            "edited": self.edited,
            "time": self.time,
        }


def parse_judgement(row: Mapping[str, Any]) -> Judgement | None:
    """Parse a record; None if it is not a judgment."""
    seconds, order = num(row, "seconds"), num(row, "order")
    texts = [row.get(k) for k in ("id", "pair", "annotator", "answer_a", "answer_b", "model_a", "model_b")]
    if row.get("verdict") not in VERDICTS or row.get("left") not in ("a", "b") or order is None:
        return None
    if not all(isinstance(t, str) for t in texts) or not isinstance(row.get("prompt"), (str, list)):
        return None
    id_, pair, annotator, a, b, model_a, model_b = map(str, texts)
    reasons, edited = row.get("reasons"), row.get("edited")
    return Judgement(
        id_,
        pair,
        annotator,
        int(order),
        row["prompt"],
        (a, b),
        (model_a, model_b),
        (str(row.get("sha256_a") or ""), str(row.get("sha256_b") or "")),
        row["verdict"],
        row["left"],
        seconds or 0.0,
        row["gold"] if row.get("gold") in ("a", "b") else None,
        row["repeat_of"] if isinstance(row.get("repeat_of"), str) else None,
        tuple(str(r) for r in reasons) if isinstance(reasons, list) else (),
        edited if isinstance(edited, str) and edited.strip() else None,
        str(row.get("time") or ""),
    )


@dataclass
class Preferences:
    """A preferences file, read incrementally as it grows. Several people and processes may append to it.

    Args:
        path: created with the first record; damaged: number of lines without a record that can be read.
    """

    path: Path
    judgements: dict[str, Judgement] = field(default_factory=dict)  # by id, in order, without those taken back
    records: dict[str, int] = field(default_factory=dict)  # number per annotator, including undos and those taken back
    undone: int = 0
    damaged: int = 0
    _offset: int = 0
    _file_id: tuple[int, int] = (0, 0)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def refresh(self) -> Preferences:
        """Read records appended since the last call; a file that was replaced or truncated is read from the start."""
        with self._lock:
            try:
                with self.path.open("rb") as file:
                    stat = os.fstat(file.fileno())
                    if (stat.st_dev, stat.st_ino) != self._file_id or stat.st_size < self._offset:
                        self._reset()
                        self._file_id = stat.st_dev, stat.st_ino
                    if stat.st_size == self._offset:
                        return self
                    file.seek(self._offset)
                    text = file.read()
            except FileNotFoundError:
                self._reset()
                return self
            complete = text[: text.rfind(b"\n") + 1]  # an incomplete last line is still being written
            self._offset += len(complete)
            rows, damaged = json_rows(complete.decode("utf-8", "replace"))
            self.damaged += damaged
            for row in rows:
                self._apply(row)
            return self

    def _reset(self) -> None:
        self.judgements.clear()
        self.records.clear()
        self.undone = self.damaged = self._offset = 0

    def _apply(self, row: dict[str, Any]) -> None:
        annotator = str(row.get("annotator"))
        judgement = parse_judgement(row)
        if judgement is None and row.get("verdict") != UNDO:
            self.damaged += 1
            return
        self.records[annotator] = self.records.get(annotator, 0) + 1
        if judgement is not None:
            self.judgements.setdefault(judgement.id, judgement)
        elif self.judgements.pop(str(row.get("id")), None) is not None:
            self.undone += 1

    def of(self, annotator: str) -> list[Judgement]:
        """The judgments of one annotator, in order."""
        return [j for j in list(self.judgements.values()) if j.annotator == annotator]

    def undo(self, judgement: Judgement) -> None:
        """Take a judgment back by appending an undo record."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.append({"id": judgement.id, "annotator": judgement.annotator, "verdict": UNDO, "time": now})

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a record; it is on disk when this returns.

        Raises:
            DiskError: see `append_line`.
        """
        with self._lock:
            append_line(self.path, row)
            self.refresh()


def read_preferences(path: Path | str) -> Preferences:
    """Read the judgments of a file, or of the preferences.jsonl in a folder.

    Raises:
        DataError: no such file, or no judgments in it.
    """
    file = Path(path).expanduser()
    file = file / PREFERENCES if file.is_dir() else file
    if not file.is_file():
        raise DataError(str(file), "no such file", "give the preferences.jsonl of an arena")
    preferences = Preferences(file).refresh()
    if not preferences.judgements and not preferences.undone:
        raise DataError(str(file), "holds no judgment", "give the preferences.jsonl of an arena of penchant studio")
    return preferences


def prompt_key(prompt: Any) -> str:
    """A text that identifies a prompt; equal prompts have equal keys."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def turns_of(prompt: Any) -> Iterator[tuple[str, str]]:
    """Yield (role, text) for each turn of a prompt as stored in files."""
    if isinstance(prompt, str):
        yield "user", prompt
        return
    for message in prompt if isinstance(prompt, Sequence) else ():
        turn = mapping(message)
        content = turn.get("content") or turn.get("tool_calls") or ""
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        yield str(turn.get("role") or "user"), text
