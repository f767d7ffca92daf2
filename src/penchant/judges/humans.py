"""What people said of pairs of answers: `preferences.jsonl`, one record a line, appended at once and never changed."""

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
UNDO = "undo"  # the verdict of a record that takes an earlier one of the same id back
WINS = {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5}

Prompt = str | tuple[tuple[str, str], ...]  # text, or (role, content) of a conversation


@dataclass(frozen=True, slots=True)
class Judgement:
    """One word of one person about one pair.

    Args:
        id: of the record; pair: of the two answers to a prompt; order: how many records of this annotator came before it.
        prompt: what was asked, as JSON; answers: a and b; models, hashes: who wrote them, and the SHA-256 of what they were read from.
        verdict: one of `VERDICTS`, of a and b; left: which of them stood on the left; seconds: from its showing to the verdict.
        gold: which is known to be better, of a pair that is a check; repeat_of: the id of the same person's earlier word on this pair.
        reasons: tags; edited: a better answer that the person wrote; time: when, in ISO 8601.
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
        """Whether it says something about the models: neither a check nor a repetition nor a skip."""
        return self.gold is None and self.repeat_of is None and self.verdict in WINS

    @property
    def side(self) -> str | None:
        """The side that won; None where neither did."""
        return None if self.verdict not in ("a", "b") else "left" if self.verdict == self.left else "right"

    def to_json(self) -> dict[str, Any]:
        """As written in the file."""
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


def judgement_of(row: Mapping[str, Any]) -> Judgement | None:
    """A record that was read; None where it is none."""
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
    """The file as it stands, read on as it grows: several people, and several processes, may append to it.

    Args:
        path: made with its first record.
    """

    path: Path
    judgements: dict[str, Judgement] = field(default_factory=dict)  # those that were not taken back, by id, in order
    records: dict[str, int] = field(default_factory=dict)  # of each annotator, those taken back and undos among them
    undone: int = 0
    damaged: int = 0
    _read: int = 0
    _file: tuple[int, int] = (0, 0)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def refresh(self) -> Preferences:
        """Read what has come since; a file that was replaced or cut is read anew."""
        with self._lock:
            try:
                with self.path.open("rb") as file:
                    about = os.fstat(file.fileno())
                    if (about.st_dev, about.st_ino) != self._file or about.st_size < self._read:
                        self._forget()
                        self._file = about.st_dev, about.st_ino
                    if about.st_size == self._read:
                        return self
                    file.seek(self._read)
                    text = file.read()
            except FileNotFoundError:
                self._forget()
                return self
            whole = text[: text.rfind(b"\n") + 1]  # half a line is one that is being written
            self._read += len(whole)
            rows, damaged = json_rows(whole.decode("utf-8", "replace"))
            self.damaged += damaged
            for row in rows:
                self._take(row)
            return self

    def _forget(self) -> None:
        self.judgements.clear()
        self.records.clear()
        self.undone = self.damaged = self._read = 0

    def _take(self, row: dict[str, Any]) -> None:
        annotator = str(row.get("annotator"))
        found = judgement_of(row)
        if found is None and row.get("verdict") != UNDO:
            self.damaged += 1
            return
        self.records[annotator] = self.records.get(annotator, 0) + 1
        if found is not None:
            self.judgements.setdefault(found.id, found)
        elif self.judgements.pop(str(row.get("id")), None) is not None:
            self.undone += 1

    def of(self, annotator: str) -> list[Judgement]:
        """One person's, in order."""
        return [j for j in list(self.judgements.values()) if j.annotator == annotator]

    def undo(self, judgement: Judgement) -> None:
        """Take one back, by a record that says so."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.append({"id": judgement.id, "annotator": judgement.annotator, "verdict": UNDO, "time": now})

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one record; when this returns, it is on the disk.

        Raises:
            DiskError: as `append_line`.
        """
        with self._lock:
            append_line(self.path, row)
            self.refresh()


def read_preferences(path: Path | str) -> Preferences:
    """The judgements of a file.

    Raises:
        DataError: there is none, or it holds no judgement.
    """
    file = Path(path).expanduser()
    file = file / PREFERENCES if file.is_dir() else file
    if not file.is_file():
        raise DataError(str(file), "no such file", "give the preferences.jsonl of an arena")
    found = Preferences(file).refresh()
    if not found.judgements and not found.undone:
        raise DataError(str(file), "holds no judgment", "give the preferences.jsonl of an arena of penchant studio")
    return found


def prompt_key(prompt: Any) -> str:
    """A prompt as one text, by which equal ones are found."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def turns_of(prompt: Any) -> Iterator[tuple[str, str]]:
    """(role, text) of a prompt as files have it."""
    if isinstance(prompt, str):
        yield "user", prompt
        return
    for message in prompt if isinstance(prompt, Sequence) else ():
        turn = mapping(message)
        content = turn.get("content") or turn.get("tool_calls") or ""
        said = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        yield str(turn.get("role") or "user"), said
