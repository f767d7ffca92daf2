"""Arenas on disk: their settings and the pairs of answers they are made of."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from penchant.base.files import file_sha256, fsync, temp_path, write_atomically, write_text_atomically, writing
from penchant.errors import DataError
from penchant.judges.humans import PREFERENCES, Preferences, prompt_key
from penchant.runfolder import COMPARISON, COMPARISON_ROWS, LOCK, SAMPLES, write_lock_holder
from penchant.runfolder.read import (
    json_object,
    lock_holder,
    lock_state,
    read_folder,
    read_lines,
    read_text,
    start_names,
)
from penchant.runfolder.values import mapping, sequence

ARENAS, ARENA, PAIRS, WRITTEN = "arenas", "arena.json", "pairs.jsonl", "written.jsonl"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,59}")
REASONS = ("correct", "clear", "helpful", "honest", "concise", "safe", "style")
MAX_PAIRS = 20_000
LOCK_TIMEOUT = 5.0  # seconds to wait for another process that holds an arena; its turns take milliseconds
CREATE_LOCK = threading.Lock()  # so that a button pressed twice makes one arena


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to a prompt.

    Args:
        id: hash of the content; prompt: text or messages, as JSON; models: who wrote a and b.
        answers: None if they are generated on demand.
        gold: for a check, the answer known to be better.
    """

    id: str
    prompt: Any
    models: tuple[str, str]
    answers: tuple[str, str] | None
    gold: str | None = None

    def to_json(self) -> dict[str, Any]:
        answers = {} if self.answers is None else {"answer_a": self.answers[0], "answer_b": self.answers[1]}
        gold = {} if self.gold is None else {"gold": self.gold}
        models = {"model_a": self.models[0], "model_b": self.models[1]}
        return {"pair": self.id, "prompt": self.prompt, **models, **answers, **gold}


def make_pair(prompt: Any, models: tuple[str, str], answers: tuple[str, str] | None, gold: str | None = None) -> Pair:
    """Make a pair whose id is a hash of its content."""
    content = json.dumps([prompt, models, answers, gold], sort_keys=True).encode()
    return Pair(hashlib.sha256(content).hexdigest()[:12], prompt, models, answers, gold)


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of an arena.

    Args:
        overlap: share of pairs that every annotator judges; the rest is judged once.
        checks: share of showings that are checks with a known answer; repeats: share of showings that repeat an earlier pair.
        first: ``balanced``: models that met least often come first; ``widest``: those with the most uncertain win rate.
        reasons: tags that may be given; seed: of the order, the sides, and which pairs overlap.
        writers: by name, what generates the answers of pairs that have none: {"run": ...} or {"url", "model", "key_env"}.
        models: by name, {"source", "sha256"}: the file its answers were read from.
    """

    question: str = "Which answer is better?"
    overlap: float = 0.2
    checks: float = 0.1
    repeats: float = 0.05
    first: str = "balanced"
    reasons: tuple[str, ...] = REASONS
    seed: int = 0
    models: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    writers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    created: str = ""


@dataclass
class Arena:
    """One arena's folder.

    Args:
        lock: held while the next pair is chosen and during a turn.
    """

    folder: Path
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def settings(self) -> Settings:
        """The arena's settings; damaged values fall back to their defaults."""
        try:
            saved = json_object(read_text(self.folder / ARENA))
        except (ValueError, RecursionError):
            saved = {}
        field_names = {f.name: f.type for f in fields(Settings)}
        values = {k: v for k, v in saved.items() if k in field_names}
        for name in ("overlap", "checks", "repeats"):
            value = values.get(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                values.pop(name, None)
        values["reasons"] = tuple(str(r) for r in sequence(values.get("reasons")))
        values["seed"] = values["seed"] if isinstance(values.get("seed"), int) else 0
        for name in ("models", "writers"):
            values[name] = {k: mapping(v) for k, v in mapping(values.get(name)).items()}
        return Settings(**values)

    @cached_property
    def pairs(self) -> dict[str, Pair]:
        """Pairs by id; answers generated on demand are filled in as far as they exist."""
        pairs: dict[str, Pair] = {}
        for row in read_lines(self.folder / PAIRS)[0]:
            pair = _parse_pair(row)
            if pair is not None:
                pairs[pair.id] = pair
        self._fill_answers(pairs)
        return pairs

    def _fill_answers(self, pairs: dict[str, Pair]) -> None:
        for row in read_lines(self.folder / WRITTEN)[0]:
            pair = pairs.get(str(row.get("pair")))
            if pair is not None and pair.answers is None:
                pairs[pair.id] = replace(pair, answers=(str(row.get("answer_a")), str(row.get("answer_b"))))

    @cached_property
    def preferences(self) -> Preferences:
        """The judgments so far."""
        return Preferences(self.folder / PREFERENCES)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the arena's lock, which keeps other threads and other studios from writing between our read and our write.

        Raises:
            DiskError: the folder cannot be written.
            DataError: another process does not release it.
        """
        with writing(self.folder):
            handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            deadline = time.monotonic() + LOCK_TIMEOUT
            while not _try_lock(handle):
                if time.monotonic() > deadline:
                    raise self._lock_error()
                time.sleep(0.005)
            with writing(self.folder):
                write_lock_holder(handle)
            with self.lock:  # only now, so that pages which only read do not wait for other processes
                yield
        finally:
            os.close(handle)

    def _lock_error(self) -> DataError:
        """Return the error for a lock that another process, perhaps a suspended one, does not release."""
        owner = lock_holder(self.folder) if lock_state(self.folder) == "held" else None
        who, how = "another process", "end the other studio of this folder, then try again"
        if owner is not None:
            who, wake = f"process {owner[0]}", f"wake it with kill -CONT {owner[0]} or end it with kill -9 {owner[0]}"
            how = f"if it was stopped (Ctrl-Z), {wake}, then try again"
        return DataError(
            self.name, f"{who} has held this arena for {LOCK_TIMEOUT:g} seconds, so nothing was written", how
        )

    def save_answers(self, pair: Pair, answers: tuple[str, str]) -> Pair:
        """Save newly generated answers, unless another request saved some first, and return the pair with its answers."""
        with self.locked():
            self._fill_answers(self.pairs)
            saved = self.pairs[pair.id]
            if saved.answers is None:
                row = {"pair": pair.id, "answer_a": answers[0], "answer_b": answers[1]}
                Preferences(self.folder / WRITTEN).append(row)
                saved = self.pairs[pair.id] = replace(pair, answers=answers)
            return saved


def _try_lock(handle: int) -> bool:
    """Try to take a lock; the kernel releases it when its holder dies."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _parse_pair(row: Mapping[str, Any]) -> Pair | None:
    texts = [row.get(k) for k in ("pair", "model_a", "model_b")]
    answers = (row.get("answer_a"), row.get("answer_b"))
    if not all(isinstance(t, str) for t in texts) or not isinstance(row.get("prompt"), (str, list)):
        return None
    answer_texts = (str(answers[0]), str(answers[1])) if all(isinstance(a, str) for a in answers) else None
    gold = row.get("gold")
    return Pair(
        str(texts[0]), row["prompt"], (str(texts[1]), str(texts[2])), answer_texts, gold if gold in ("a", "b") else None
    )


def arenas(folder: Path) -> list[Arena]:
    """List the arenas of a folder, newest first."""
    existing = [Arena(p.parent) for p in (folder / ARENAS).glob(f"*/{ARENA}") if is_arena(p.parent, folder)]
    return sorted(existing, key=lambda a: (str(a.settings.created), a.name), reverse=True)


def is_arena(arena_folder: Path, folder: Path) -> bool:
    """Return True if there is an arena and none of its files is a link that leads out of the folder."""
    files = (ARENA, PAIRS, WRITTEN, PREFERENCES)
    inside = all((arena_folder / name).resolve().is_relative_to(folder.resolve()) for name in files)
    return inside and NAME.fullmatch(arena_folder.name) is not None and (arena_folder / ARENA).is_file()


# ---- making one ----


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of several models to several prompts.

    Args:
        rows: (prompt as JSON, answers by model); models: as `Settings.models`.
    """

    rows: Sequence[tuple[Any, Mapping[str, str]]]
    models: Mapping[str, Mapping[str, str]]


def answers_from_runs(folders: Sequence[Path]) -> Answers:
    """Return the last samples of runs and of what they start from, grouped by prompt.

    Raises:
        DataError: no prompt has two answers.
    """
    rows_by_key: dict[tuple[str, int], tuple[Any, dict[str, str]]] = {}
    models: dict[str, dict[str, str]] = {}
    names = _short_names(folders)
    starts = start_names({names[folder]: read_folder(folder) for folder in folders})
    for folder in folders:
        occurrences: dict[str, int] = {}
        file = folder / SAMPLES
        for row in read_lines(file)[0]:
            prompt = _prompt_of_row(row)
            if prompt is None:
                continue
            key = prompt_key(prompt)
            occurrences[key] = occurrences.get(key, 0) + 1
            answers = rows_by_key.setdefault((key, occurrences[key]), (prompt, {}))[1]
            for name, text in ((starts[names[folder]], row.get("before")), (names[folder], row.get("after"))):
                if isinstance(text, str):
                    answers.setdefault(name, text)
                    models.setdefault(name, {"source": str(file), "sha256": file_sha256(file)})
    return _require_pairs(Answers(list(rows_by_key.values()), models), "the samples of these runs", SAMPLES)


def answers_from_comparison(folder: Path) -> Answers:
    """Return the completions of a comparison.

    Raises:
        DataError: no prompt has two answers.
    """
    file, rows, names = folder / COMPARISON_ROWS, [], set()
    for row in read_lines(file)[0]:
        texts = {str(n): mapping(c).get("text") for n, c in mapping(row.get("completions")).items()}
        answers = {n: t for n, t in texts.items() if isinstance(t, str)}
        prompt = _prompt_of_row(row)
        if prompt is not None:
            rows.append((prompt, answers))
            names |= set(answers)
    source = {"source": str(file), "sha256": file_sha256(file) if file.is_file() else ""}
    return _require_pairs(Answers(rows, dict.fromkeys(sorted(names), source)), folder.name, COMPARISON)


def answers_from_pairs(file: Path) -> Answers:
    """Return the pairs of a data file in any supported layout: the better answers as `chosen`, the others as `rejected`.

    Raises:
        DataError: it cannot be read or holds no pairs.
    """
    from penchant.data.load import load_preferences, prompt_json

    preferences = load_preferences(str(file), on_bad_row="skip")
    rows = []
    for tree in preferences.trees:
        texts = {bool(c.label): c.text for c in tree.completions if c.label is not None}
        if len(texts) == 2 and tree.prompt:
            rows.append((prompt_json(tree.prompt), {"chosen": texts[True], "rejected": texts[False]}))
    source = {"source": str(file), "sha256": file_sha256(file)}
    return _require_pairs(Answers(rows, {"chosen": source, "rejected": source}), file.name, "pairs")


def answers_to_generate(
    prompts: Sequence[Any], writers: Mapping[str, Mapping[str, str]], hashes: Mapping[str, str] | None = None
) -> Answers:
    """Return prompts whose answers are generated on demand; `hashes`: SHA-256 by writer, if known."""
    known_hashes = hashes or {}
    models = {n: {"source": _describe_writer(w), "sha256": known_hashes.get(n, "")} for n, w in writers.items()}
    return Answers([(p, {}) for p in prompts], models)


def _describe_writer(writer: Mapping[str, str]) -> str:
    return writer.get("run") or f"{writer.get('model')} at {writer.get('url')}"


def split_prompts(text: str) -> list[str]:
    """Split typed text into prompts: at lines of ``---`` if there are any, else one per line."""
    parts = re.split(r"^---[ \t]*$", text.replace("\r\n", "\n"), flags=re.M)
    prompts = parts if len(parts) > 1 else text.splitlines()
    return [p.strip() for p in prompts if p.strip()]


def _prompt_of_row(row: Mapping[str, Any]) -> Any:
    """Return a row's prompt: its messages if it has any, else its text, else None."""
    messages = row.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
        return messages
    return row.get("prompt") if isinstance(row.get("prompt"), str) else None


def _short_names(folders: Iterable[Path]) -> dict[Path, str]:
    """Return short names that tell folders apart."""
    paths = list(folders)
    names = [f.name for f in paths]
    return {f: f.name if names.count(f.name) == 1 else "/".join(f.parts[-2:]) for f in paths}


def _require_pairs(all_answers: Answers, where: str, what: str) -> Answers:
    if not any(len(answers) > 1 for _, answers in all_answers.rows):
        how = "choose runs that wrote samples (evaluation.samples), a comparison, or a file of pairs"
        raise DataError(where, f"no prompt has two answers ({what})", how)
    return all_answers


def make_pairs(answers: Answers, seed: int) -> list[Pair]:
    """Pair the different answers of every two models to each prompt; a given pair of models keeps the same order throughout."""
    matchups = list(combinations(answers.models, 2))
    pairs_by_id: dict[str, Pair] = {}
    for prompt, texts in answers.rows:
        for a, b in matchups:
            if not texts:
                pair = make_pair(prompt, (a, b), None)
            elif a in texts and b in texts and texts[a].strip() != texts[b].strip():
                pair = make_pair(prompt, (a, b), (texts[a], texts[b]))
            else:
                continue
            pairs_by_id.setdefault(pair.id, pair)
    pairs = list(pairs_by_id.values())
    random.Random(seed).shuffle(pairs)
    return pairs[:MAX_PAIRS]


def gold_pairs(answers: Answers) -> list[Pair]:
    """Return checks: pairs whose better answer is known."""
    return [
        make_pair(prompt, ("chosen", "rejected"), (texts["chosen"], texts["rejected"]), "a")
        for prompt, texts in answers.rows
        if texts.keys() >= {"chosen", "rejected"}
    ]


def make_arena(folder: Path, name: str, settings: Settings, pairs: Sequence[Pair]) -> Arena:
    """Write an arena, atomically.

    Raises:
        DataError: the name is invalid or taken, or there are no pairs.
    """
    if not NAME.fullmatch(name) or name == "new":  # `new` is the page where arenas are made
        raise DataError("name", f"{name!r} is not a name", "use letters, digits, spaces, '.', '_' and '-'")
    if not any(p.gold is None for p in pairs):
        raise DataError(name, "there is no pair of two different answers", "choose other models or prompts")
    with CREATE_LOCK:
        return _make_arena(folder / ARENAS / name, folder, settings, pairs)


def _make_arena(target: Path, folder: Path, settings: Settings, pairs: Sequence[Pair]) -> Arena:
    if not target.resolve().is_relative_to(folder.resolve()):
        raise DataError(ARENAS, "is a link that leads out of the studio's folder", "remove the link")
    if target.exists():
        raise DataError(target.name, "an arena of this name already exists", "choose another name")
    settings_json = {**asdict(settings), "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    temp = temp_path(target)
    with writing(target):
        try:
            shutil.rmtree(temp, ignore_errors=True)
            temp.mkdir(parents=True)
            lines = "".join(json.dumps(p.to_json(), ensure_ascii=False) + "\n" for p in pairs)
            write_text_atomically(temp / PAIRS, lines.encode("utf-8", "backslashreplace"))
            write_atomically(temp / ARENA, settings_json)
            os.rename(temp, target)
            fsync(target.parent)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
    return Arena(target)
