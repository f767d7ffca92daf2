"""Convert published rows to the rows that training reads, one file at a time: filters, layout, labels, counts."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from time import monotonic
from typing import IO, Any

from penchant.base.text import counted
from penchant.data.layouts import Layout, LeftOut, RowError, layout_named
from penchant.data.layouts import fields as row_fields
from penchant.data.load import (
    IDENTICAL,
    Converted,
    answer_turn,
    convert_rows,
    is_identical,
    message_json,
    prompt_json,
    prompt_text,
)
from penchant.data.read import BadRow, Row
from penchant.data.templates import split_answers, turns_with_answer
from penchant.errors import ConfigError, DataError, RewardError
from penchant.requests import GetRequest
from penchant.types import Completion, Prompt, PromptTree

# ---- Atomic files, and counts ----


@dataclass(slots=True)
class Counts:
    """Counts of the rows that were read.

    Args:
        rows: rows read; accepted: rows that gave at least one example; examples: rows written for training; quarantined: rows kept
            aside; filtered: rows left out, by reason; unlabelled: answers left out for want of a label, in rows with labeled ones.
    """

    rows: int = 0
    accepted: int = 0
    examples: int = 0
    quarantined: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    unlabelled: int = 0

    def add(self, other: Counts) -> None:
        """Add another file's counts."""
        for f in fields(self):  # ints and Counters
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "filtered": dict(sorted(self.filtered.items()))}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Counts:
        return Counts(**{**record, "filtered": Counter(record["filtered"])})


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as out:
        out.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; None if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that is renamed to `path` once it is completely on disk."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as out:
        yield out
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)


class Pace:
    """Reports every few seconds how many rows are done and how fast.

    Args:
        say: called with a line; what: is being done; interval: seconds between lines.
    """

    def __init__(self, say: Callable[[str], None], what: str, interval: float = 5.0) -> None:
        self._say, self._what, self._interval = say, what, interval
        self._started = self._last = monotonic()
        self.rows = 0

    def step(self, rows: int = 1) -> None:
        self.rows += rows
        if self.rows & 0xFF == 0 and monotonic() - self._last >= self._interval:
            self._last = monotonic()
            speed = self.rows / (self._last - self._started)
            self._say(f"{self._what}: {counted(self.rows, 'row')}, {speed:,.0f} rows/s")


# ---- Filters: language, redaction, moderation ----


Fields = Mapping[str, Any]
MODERATION = ("openai_moderation", "moderation")


class MissingColumn(Exception):
    """A row lacks the column that a filter reads."""


class Filters:
    """The filters of a request. `languages` counts each language, for the message if no row is left."""

    def __init__(self, request: GetRequest) -> None:
        self.languages: Counter[str] = Counter()
        # a row is counted under the first test that it fails
        self.tests: dict[str, Callable[[Fields], bool]] = {}
        if request.language:
            languages = {name.casefold() for name in request.language}
            self.tests["language"] = lambda row: _language(row, self.languages).casefold() in languages
        if request.redacted != "keep":
            only = request.redacted == "only"
            self.tests["not redacted" if only else "redacted"] = lambda row: _is_redacted(row) == only
        if request.moderation != "keep":
            limit = request.moderation if isinstance(request.moderation, float) else None
            self.tests["moderation"] = lambda row: not _is_flagged(row, limit)

    def reason(self, row: Fields, where: str) -> str | None:
        """Why a row is left out, or None if it is kept.

        Raises:
            DataError: the row lacks the column that a filter reads.
        """
        for reason, passes in self.tests.items():
            try:
                if not passes(row):
                    return reason
            except MissingColumn as error:
                columns = ", ".join(sorted(map(str, row)))
                raise DataError(where, f"--{error} needs a column that is not there", f"there are {columns}") from error
        return None


def _language(row: Fields, counts: Counter[str]) -> str:
    value = next((row[c] for c in ("language", "lang") if row.get(c) is not None), None)
    if value is None and isinstance(row.get("prompt"), Mapping):  # a tree of messages: the language of its root
        value = row["prompt"].get("lang")
    if value is None and isinstance(row.get("messages"), Sequence) and row["messages"]:
        first = row["messages"][0]
        value = first.get("lang") if isinstance(first, Mapping) else None
    if value is None:
        raise MissingColumn("language")
    counts[str(value)] += 1
    return str(value)


def _is_redacted(row: Fields) -> bool:
    value = row.get("redacted")
    if value is None:
        raise MissingColumn("redacted")
    return str(value).strip().lower() in ("true", "1", "1.0")


def _is_flagged(row: Fields, limit: float | None) -> bool:
    """Whether any message was flagged or, with a limit, scored at least `limit` in any category. Messages without a result count."""
    column = next((c for c in MODERATION if c in row), None)
    if column is None:
        raise MissingColumn("moderation")
    value = row[column]
    results = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return not results or any(_result_is_flagged(r, limit) for r in results)


def _result_is_flagged(result: Any, limit: float | None) -> bool:
    if not isinstance(result, Mapping):
        return True
    if limit is None:
        return bool(result.get("flagged", True))
    scores = result.get("category_scores")
    if not isinstance(scores, Mapping):
        return True
    return any(isinstance(s, (int, float)) and s >= limit for s in scores.values())


# ---- Labels: from a reward and a threshold, or from a user's own function ----


BATCH = 256  # answers labeled at a time
LabelFunction = Callable[[Sequence[Prompt], Sequence[str]], list[tuple[bool | None, float | None]]]


@dataclass(frozen=True, slots=True)
class Labeller:
    """Labels trees of one answer each, in batches.

    Args:
        judge: maps prompts and answers to (label, score) pairs; a label of None leaves the answer out.
        sha256: hash of the reward's or function's files; None for a built-in reward.
    """

    judge: LabelFunction
    sha256: str | None

    def label(self, trees: Sequence[PromptTree]) -> list[PromptTree | None]:
        """The trees with labels, and None for each tree without one.

        Raises:
            RewardError: the function raised, or returned something other than labels.
        """
        answers = [t.completions[0].text for t in trees]
        labels = self.judge([t.prompt for t in trees], answers)
        return [
            None if label is None else replace(t, completions=(Completion(a, label, score),))
            for t, a, (label, score) in zip(trees, answers, labels, strict=True)
        ]


def labeller_of(request: GetRequest) -> Labeller | None:
    """The labeller of a request, or None if it asks for no labels.

    Raises:
        ConfigError: there is no such reward, file or function.
    """
    sha256 = labels_sha256(request)
    if request.label_with is not None:
        return Labeller(_by_function(request.label_with), sha256)
    if request.reward is None or request.threshold is None:
        return None
    return Labeller(_by_reward(request.reward, request.threshold), sha256)


def labels_sha256(request: GetRequest) -> str | None:
    """The hash of the files that label answers; None if nothing does, or a built-in reward."""
    name = request.label_with if request.label_with is not None else request.reward
    if name is None:
        return None
    from penchant.rewards.reward_model import content_sha256, contents_beside

    own_hash, beside_hashes = content_sha256(name), contents_beside(name)
    return hashlib.sha256(repr((own_hash, beside_hashes)).encode()).hexdigest() if beside_hashes else own_hash


def _by_reward(name: str, threshold: float) -> LabelFunction:
    from penchant.rewards import load_reward

    reward = load_reward(name)
    # a reward model applies its own chat template to messages; functions expect text
    takes_messages = all(hasattr(term.function, "score_trees") for term in reward.terms)

    def judge(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[tuple[bool | None, float | None]]:
        inputs: Any = list(prompts) if takes_messages else [prompt_text(p) for p in prompts]
        return [(bool(v >= threshold), float(v)) for v in reward(inputs, answers)]

    return judge


def _by_function(name: str) -> LabelFunction:
    from penchant.base.functions import python_function

    function = python_function(name, "--label-with")

    def judge(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[tuple[bool | None, float | None]]:
        try:
            labels = list(function([prompt_text(p) for p in prompts], list(answers)))
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise RewardError(name, what, "fix the function; it gets lists of prompts and answers") from error
        if len(labels) != len(answers):
            how = "return one label for each answer: True, False, or None to leave it out"
            raise RewardError(name, f"returned {len(labels)} labels for {counted(len(answers), 'answer')}", how)
        return [(None if v is None else _label(name, v), None) for v in labels]

    return judge


def _label(name: str, value: Any) -> bool:
    plain = value.item() if hasattr(value, "item") else value
    try:
        return row_fields.label({"label": plain}, "label")
    except RowError as error:
        raise RewardError(name, f"returned {str(value)[:40]!r} as a label", "return True, False or None") from error


# ---- From layout to the requested kind of data ----


@dataclass(frozen=True, slots=True)
class Conversion:
    """How to convert a file's rows: their layout, its options, and the resulting kind of data."""

    layout: Layout
    options: Mapping[str, Any]
    kind: str

    def layout_for_kind(self, preprocess: Callable[[Fields], Fields]) -> Layout:
        """The layout, changed to give data of the requested kind.

        Args:
            preprocess: applied to each row (or folded group) before conversion; raises `LeftOut` if a filter leaves it out.
        """

        def turn(values: Fields, options: Fields) -> tuple[PromptTree, ...]:
            trees = self.layout.convert(preprocess(values), options)
            split_trees = trees if self.kind == "sft" else (t for tree in trees for t in split_answers(tree))
            converted = tuple(t for tree in split_trees for t in KIND_CONVERTERS[self.kind](tree))
            if not converted:
                raise RowError(f"has nothing that can be {self.kind} data", "choose another --as")
            return converted

        return replace(self.layout, turn=turn)


def conversion_of(name: str, request: GetRequest) -> Conversion:
    """Choose the conversion of a layout's rows for a request.

    Raises:
        ConfigError: there is no such layout or option, or its rows cannot become the requested kind.
    """
    layout, as_, labelled = layout_named(name, "--layout"), request.as_, request.labels
    requested = dict(request.options)
    use_option = layout.options.get("use")
    if as_ is not None and use_option is not None and "use" not in requested:
        choice = "sft" if labelled else as_  # labeling needs single answers
        requested |= {"use": choice} if choice in use_option.choices else {}
    options = layout.settings(requested, "--set")
    kind = layout.kind_of(options)
    if as_ == "sft" and kind == "prompts":
        raise ConfigError("--as sft", f"rows of the layout {name} are prompts without answers", "choose --as prompts")
    if as_ == "unpaired" and kind not in ("pairs", "unpaired") and not labelled:
        how = "say which answers are good: --reward NAME --threshold X, or --label-with path.py:function"
        raise ConfigError("--as unpaired", f"rows of the layout {name} are {kind} and have no labels", how)
    if as_ == "unpaired" and kind in ("prompts", "text"):
        raise ConfigError("--as unpaired", f"rows of the layout {name} are {kind}, without answers to a prompt", "")
    return Conversion(layout, options, as_ or kind)


def _as_pairs(tree: PromptTree) -> list[PromptTree]:
    if is_identical(tree):
        raise RowError(IDENTICAL, "there is nothing to prefer")
    return [tree]


def _as_sft(tree: PromptTree) -> list[PromptTree]:
    """The preferred answer: among those not labeled bad, the best by score, or the first if one has no score."""
    good = [c for c in tree.completions if c.label is not False]
    if not good:
        return []
    best = max(good, key=lambda c: c.score) if all(c.score is not None for c in good) else good[0]  # type: ignore[arg-type,return-value]
    return [replace(tree, completions=(replace(best, label=None, score=None),))]


def _as_unpaired(tree: PromptTree) -> list[PromptTree]:
    """Each answer by itself, keeping its label. In a pair without labels, the first answer is the good one."""
    paired = len(tree.completions) == 2
    if is_identical(tree):
        raise RowError(IDENTICAL, "it cannot be good and bad at once")
    return [
        replace(tree, completions=(replace(c, label=c.label if c.label is not None else (i == 0 if paired else None)),))
        for i, c in enumerate(tree.completions)
    ]


KIND_CONVERTERS: dict[str, Callable[[PromptTree], list[PromptTree]]] = {
    **dict.fromkeys(("scored", "text"), lambda tree: [tree]),
    "pairs": _as_pairs,
    "prompts": lambda tree: [replace(tree, completions=())] if tree.prompt else [],
    "sft": _as_sft,
    "unpaired": _as_unpaired,
}


# ---- Written rows: a tree in the plain layout of its kind, which `penchant train` reads ----


def _pair_row(tree: PromptTree) -> list[dict[str, Any]]:
    good, bad = tree.completions
    row: dict[str, Any] = {"prompt": prompt_json(tree.prompt)}
    if any(c.reasoning or c.tool_calls or c.more for c in tree.completions):  # then both are written as turns
        row |= {
            n: [message_json(m) for m in (answer_turn(c), *c.more)]
            for n, c in zip(("chosen", "rejected"), tree.completions, strict=True)
        }
    else:
        row |= {"chosen": good.text, "rejected": bad.text}
    if good.score is not None and bad.score is not None:
        row |= {"chosen_score": good.score, "rejected_score": bad.score}
    return [row]


def _answer_rows(tree: PromptTree, extra_fields: Callable[[Completion], Mapping[str, Any]]) -> list[dict[str, Any]]:
    prompt = prompt_json(tree.prompt)
    return [
        {
            "prompt": prompt,
            "completion": [message_json(answer_turn(c))] if c.reasoning or c.tool_calls else c.text,
            **extra_fields(c),
        }
        for c in tree.completions
    ]


def _conversation_row(tree: PromptTree) -> list[dict[str, Any]]:
    """The row of a conversation with several trained answers (`data.layout_options.turns: all`); empty for other trees."""
    if not any(c.more for c in tree.completions):
        return []
    turns = [
        {**message_json(m), **({} if m.role != "assistant" else {"weight": int(m.trained)})}
        for m in turns_with_answer(tree)
    ]
    return [{"messages": turns}]


WRITERS: dict[str, Callable[[PromptTree], list[dict[str, Any]]]] = {
    "pairs": _pair_row,
    "unpaired": lambda tree: _answer_rows(
        tree, lambda c: {"label": c.label} | ({} if c.score is None else {"score": c.score})
    ),
    "scored": lambda tree: _answer_rows(tree, lambda c: {"score": c.score}),
    "sft": lambda tree: _conversation_row(tree) or _answer_rows(tree, lambda c: {}),
    "prompts": lambda tree: [{"prompt": prompt_json(tree.prompt)}],
    "text": lambda tree: [{"text": c.text} for c in tree.completions],
}


def written_rows(kind: str, tree: PromptTree) -> list[dict[str, Any]]:
    """The rows of a tree, with its tools and chat template options."""
    json_texts = {"tools": tree.tools, "chat_template_kwargs": tree.template_options}
    extra = {name: json.loads(text) for name, text in json_texts.items() if text}
    return [{**row, **extra} for row in WRITERS[kind](tree)]


def prompts_of_transcript(values: Fields) -> Fields:
    """The first prompt of a red-team transcript. Its publishers intend no other use of it for training."""
    text = values.get("transcript")
    if not isinstance(text, str) or "\n\nHuman:" not in text:
        raise RowError('"transcript" is no "\\n\\nHuman:" transcript', "drop the row")
    prompt = text.split("\n\nHuman:", 1)[1].split("\n\nAssistant:", 1)[0].strip()
    if not prompt:
        raise RowError('"transcript" starts with an empty turn', "drop the row")
    return {"prompt": [{"role": "user", "content": prompt}]}


# ---- One published file to one file of converted rows ----


@dataclass(frozen=True, slots=True)
class Converter:
    """Converts the rows of a file.

    Args:
        conversion: layout and kind; columns: ``{our name: the file's name}``; filters: rows to leave out; labeller: labels answers.
        transcripts: whether rows are red-team transcripts, of which only the first prompt is used.
    """

    conversion: Conversion
    columns: dict[str, str]
    filters: Filters
    labeller: Labeller | None
    transcripts: bool = False

    def convert(self, rows: Iterable[Row | BadRow], name: str, part: Part, pace: Pace) -> Counts:
        """Convert rows and write them as a part, completely or not at all.

        Args:
            name: of the file, for messages.

        Raises:
            DataError: the file is damaged, or lacks the column that a filter reads. RewardError: a labeling function failed.
        """
        counts = Counts()
        layout = self.conversion.layout_for_kind(lambda values: self._filter_row(values, name))
        with atomic_write(part.rows) as out, atomic_write(part.aside) as aside:
            writer = _Writer(out, aside, counts, self)
            for converted in convert_rows(rows, layout, self.conversion.options, self.columns, identical="keep"):
                pace.step(converted.rows)
                writer.take(converted)
            writer.flush()
        if counts.accepted + counts.quarantined + sum(counts.filtered.values()) != counts.rows:
            raise AssertionError(f"rows do not add up: {counts}")
        write_json(part.done, counts.to_json())
        return counts

    def _filter_row(self, values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        reason = self.filters.reason(values, name)
        if reason is not None:
            raise LeftOut(reason, "")
        return prompts_of_transcript(values) if self.transcripts else values


class Part:
    """Files with the converted rows of source `number`: one line per published row (or group), a JSON list of rows to write."""

    def __init__(self, folder: Path, number: int) -> None:
        self.rows = folder / f"part-{number:05d}.jsonl"
        self.aside = folder / f"part-{number:05d}.quarantine.jsonl"
        self.done = folder / f"part-{number:05d}.json"
        self.layout = folder / f"layout-{number:05d}.json"

    def counts(self) -> Counts | None:
        """The part's counts, or None if it is not finished."""
        saved = read_json(self.done)
        return None if saved is None else Counts.from_json(saved)

    def lines(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows to write, for one published row at a time."""
        with self.rows.open("rb") as stream:
            for line in stream:
                yield json.loads(line)


@dataclass(slots=True)
class _Writer:
    """Writes converted rows in order, labeling answers in batches."""

    out: IO[bytes]
    aside: IO[bytes]
    counts: Counts
    how: Converter
    waiting: list[Converted] = field(default_factory=list)
    answers: int = 0

    def take(self, converted: Converted) -> None:
        self.counts.rows += converted.rows
        if converted.left_out:
            self.counts.filtered[converted.aside[0].what] += converted.rows
        elif converted.aside:
            self.counts.quarantined += converted.rows
            for q in converted.aside:
                record = {"where": q.where, "what": q.what, "how": q.how, "row": q.raw}
                self.aside.write(json.dumps(record, default=str).encode() + b"\n")
        elif self.how.labeller is None:
            self._write(converted)
        else:
            self.waiting.append(converted)
            self.answers += len(converted.trees)
            if self.answers >= BATCH:
                self.flush()

    def flush(self) -> None:
        """Label and write the waiting rows."""
        if not self.waiting or self.how.labeller is None:
            return
        labelled = iter(self.how.labeller.label([t for converted in self.waiting for t in converted.trees]))
        for converted in self.waiting:
            labelled_trees = [next(labelled) for _ in converted.trees]
            kept_trees = tuple(t for t in labelled_trees if t is not None)
            if kept_trees:
                self.counts.unlabelled += len(labelled_trees) - len(kept_trees)
                self._write(replace(converted, trees=kept_trees))
            else:
                self.counts.filtered["no label"] += converted.rows
        self.waiting, self.answers = [], 0

    def _write(self, converted: Converted) -> None:
        rows = [row for tree in converted.trees for row in written_rows(self.how.conversion.kind, tree)]
        self.out.write(json.dumps(rows, ensure_ascii=False).encode() + b"\n")
        self.counts.accepted += converted.rows
        self.counts.examples += len(rows)
