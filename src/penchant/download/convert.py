"""Published rows to the rows that training reads, one file at a time: filters, layout, labels, counts."""

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
from penchant.data.templates import apart, turns_with_answer
from penchant.errors import ConfigError, DataError, RewardError
from penchant.requests import GetRequest
from penchant.types import Completion, Prompt, PromptTree

# ---- files that are there whole or not at all, and counts ----


@dataclass(slots=True)
class Counts:
    """What became of the rows that were read.

    Args:
        rows: read; accepted: that gave at least one example; examples: rows that training reads; quarantined: kept aside;
            filtered: left out, by reason; unlabelled: answers without a label, of rows that have others.
    """

    rows: int = 0
    accepted: int = 0
    examples: int = 0
    quarantined: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    unlabelled: int = 0

    def add(self, other: Counts) -> None:
        """Take another file's counts."""
        for f in fields(self):  # numbers, and counters of reasons
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "filtered": dict(sorted(self.filtered.items()))}

    @staticmethod
    def from_json(held: Mapping[str, Any]) -> Counts:
        return Counts(**{**held, "filtered": Counter(held["filtered"])})


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees all of it or what was there before."""
    with whole(path) as out:
        out.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """A JSON file's content; None where it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its name when all of it is on disk."""
    made = path.with_name(path.name + ".part")
    with made.open("wb") as out:
        yield out
        out.flush()
        os.fsync(out.fileno())
    made.replace(path)


class Pace:
    """Says every few seconds how many rows are done and how fast.

    Args:
        say: takes a line; what: is being done; every: seconds.
    """

    def __init__(self, say: Callable[[str], None], what: str, every: float = 5.0) -> None:
        self._say, self._what, self._every = say, what, every
        self._started = self._last = monotonic()
        self.rows = 0

    def step(self, rows: int = 1) -> None:
        self.rows += rows
        if self.rows & 0xFF == 0 and monotonic() - self._last >= self._every:
            self._last = monotonic()
            speed = self.rows / (self._last - self._started)
            self._say(f"{self._what}: {counted(self.rows, 'row')}, {speed:,.0f} rows/s")


# ---- filters: language, redaction, moderation ----


Fields = Mapping[str, Any]
MODERATION = ("openai_moderation", "moderation")


class MissingColumn(Exception):
    """A row does not have the column that a filter reads."""


class Filters:
    """The filters that a request asks for, in one pass; `languages`: how often each one was met, for a message where none is left."""

    def __init__(self, asked: GetRequest) -> None:
        self.languages: Counter[str] = Counter()
        # a row is counted under the first reason whose test it does not pass
        self.tests: dict[str, Callable[[Fields], bool]] = {}
        if asked.language:
            wanted = {name.casefold() for name in asked.language}
            self.tests["language"] = lambda row: _language(row, self.languages).casefold() in wanted
        if asked.redacted != "keep":
            only = asked.redacted == "only"
            self.tests["not redacted" if only else "redacted"] = lambda row: _redacted(row) == only
        if asked.moderation != "keep":
            limit = asked.moderation if isinstance(asked.moderation, float) else None
            self.tests["moderation"] = lambda row: not _objected(row, limit)

    def reason(self, row: Fields, where: str) -> str | None:
        """Why a row is left out; None where it stays.

        Raises:
            DataError: it has not the column that a filter reads.
        """
        for reason, passes in self.tests.items():
            try:
                if not passes(row):
                    return reason
            except MissingColumn as error:
                columns = ", ".join(sorted(map(str, row)))
                raise DataError(where, f"--{error} needs a column that is not there", f"there are {columns}") from error
        return None


def _language(row: Fields, met: Counter[str]) -> str:
    value = next((row[c] for c in ("language", "lang") if row.get(c) is not None), None)
    if value is None and isinstance(row.get("prompt"), Mapping):  # a tree of messages: the language of its root
        value = row["prompt"].get("lang")
    if value is None and isinstance(row.get("messages"), Sequence) and row["messages"]:
        first = row["messages"][0]
        value = first.get("lang") if isinstance(first, Mapping) else None
    if value is None:
        raise MissingColumn("language")
    met[str(value)] += 1
    return str(value)


def _redacted(row: Fields) -> bool:
    value = row.get("redacted")
    if value is None:
        raise MissingColumn("redacted")
    return str(value).strip().lower() in ("true", "1", "1.0")


def _objected(row: Fields, limit: float | None) -> bool:
    """Whether any message was flagged, or scored `limit` or more in any category; one without a result counts as that."""
    column = next((c for c in MODERATION if c in row), None)
    if column is None:
        raise MissingColumn("moderation")
    value = row[column]
    results = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return not results or any(_bad(r, limit) for r in results)


def _bad(result: Any, limit: float | None) -> bool:
    if not isinstance(result, Mapping):
        return True
    if limit is None:
        return bool(result.get("flagged", True))
    scores = result.get("category_scores")
    if not isinstance(scores, Mapping):
        return True
    return any(isinstance(s, (int, float)) and s >= limit for s in scores.values())


# ---- labels: from a reward and a threshold, or from a user's own function ----


BATCH = 256  # answers that are judged at a time
Judged = Callable[[Sequence[Prompt], Sequence[str]], list[tuple[bool | None, float | None]]]


@dataclass(frozen=True, slots=True)
class Labeller:
    """Labels trees of one answer each, many at a time.

    Args:
        judge: prompts and answers to (label, score); a label of None leaves the answer out.
        sha256: of what it is made of; None for a built-in reward.
    """

    judge: Judged
    sha256: str | None

    def label(self, trees: Sequence[PromptTree]) -> list[PromptTree | None]:
        """The trees with labels; None for each that gets none.

        Raises:
            RewardError: the function raised, or gave something else than it should.
        """
        answers = [t.completions[0].text for t in trees]
        found = self.judge([t.prompt for t in trees], answers)
        return [
            None if label is None else replace(t, completions=(Completion(a, label, score),))
            for t, a, (label, score) in zip(trees, answers, found, strict=True)
        ]


def labeller_of(asked: GetRequest) -> Labeller | None:
    """What labels the answers of a request; None where nothing does.

    Raises:
        ConfigError: no such reward, file or function.
    """
    if asked.label_with is None and (asked.reward is None or asked.threshold is None):
        return None
    from penchant.rewards.reward_model import content_sha256, contents_beside

    def content(name: str) -> str | None:
        own, beside = content_sha256(name), contents_beside(name)
        return hashlib.sha256(repr((own, beside)).encode()).hexdigest() if beside else own

    if asked.label_with is not None:
        return Labeller(_by_function(asked.label_with), content(asked.label_with))
    assert asked.reward is not None and asked.threshold is not None
    return Labeller(_by_reward(asked.reward, asked.threshold), content(asked.reward))


def _by_reward(name: str, threshold: float) -> Judged:
    from penchant.rewards import load_reward

    reward = load_reward(name)
    # a reward model puts messages into its own chat template; a function is promised text
    whole = all(hasattr(term.function, "score_trees") for term in reward.terms)

    def judge(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[tuple[bool | None, float | None]]:
        shown: Any = list(prompts) if whole else [prompt_text(p) for p in prompts]
        return [(bool(v >= threshold), float(v)) for v in reward(shown, answers)]

    return judge


def _by_function(name: str) -> Judged:
    from penchant.base.functions import python_function

    function = python_function(name, "--label-with")

    def judge(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[tuple[bool | None, float | None]]:
        try:
            given = list(function([prompt_text(p) for p in prompts], list(answers)))
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise RewardError(name, what, "fix the function; it gets lists of prompts and answers") from error
        if len(given) != len(answers):
            how = "return one label for each answer: True, False, or None to leave it out"
            raise RewardError(name, f"returned {len(given)} labels for {counted(len(answers), 'answer')}", how)
        return [(None if v is None else _label(name, v), None) for v in given]

    return judge


def _label(name: str, value: Any) -> bool:
    plain = value.item() if hasattr(value, "item") else value
    try:
        return row_fields.label({"label": plain}, "label")
    except RowError as error:
        raise RewardError(name, f"returned {str(value)[:40]!r} as a label", "return True, False or None") from error


# ---- by layout, then as what was asked for ----


@dataclass(frozen=True, slots=True)
class Conversion:
    """How the rows of a file are converted: their layout, its options, the kind of data that comes out."""

    layout: Layout
    options: Mapping[str, Any]
    kind: str

    def turning(self, before: Callable[[Fields], Fields]) -> Layout:
        """The layout, with what was asked for in place of what it gives by itself.

        Args:
            before: a row (or folded group) to what is converted; it raises `LeftOut` for one that a filter leaves out.
        """

        def turn(values: Fields, options: Fields) -> tuple[PromptTree, ...]:
            found = self.layout.convert(before(values), options)
            each = found if self.kind == "sft" else (t for tree in found for t in apart(tree))
            turned = tuple(t for tree in each for t in TURNS[self.kind](tree))
            if not turned:
                raise RowError(f"has nothing that can be {self.kind} data", "choose another --as")
            return turned

        return replace(self.layout, turn=turn)


def conversion_of(name: str, asked: GetRequest) -> Conversion:
    """How a layout's rows are converted.

    Raises:
        ConfigError: no such layout or option, or it cannot become what is asked.
    """
    layout, as_, labelled = layout_named(name), asked.as_, asked.labels
    wanted = dict(asked.options)
    use = layout.options.get("use")
    if as_ is not None and use is not None and "use" not in wanted:
        fitting = "sft" if labelled else as_  # single answers are labelled
        wanted |= {"use": fitting} if fitting in use.choices else {}
    options = layout.settings(wanted, "--set")
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
    """The preferred answer: the one with the best score, else the first one that is not labelled bad."""
    good = [c for c in tree.completions if c.label is not False]
    if not good:
        return []
    best = max(good, key=lambda c: c.score) if all(c.score is not None for c in good) else good[0]  # type: ignore[arg-type,return-value]
    return [replace(tree, completions=(replace(best, label=None, score=None),))]


def _as_unpaired(tree: PromptTree) -> list[PromptTree]:
    """Each answer by itself; of a pair the first one is good."""
    pair = len(tree.completions) == 2
    if is_identical(tree):
        raise RowError(IDENTICAL, "it cannot be good and bad at once")
    return [
        replace(tree, completions=(replace(c, label=c.label if c.label is not None else (i == 0 if pair else None)),))
        for i, c in enumerate(tree.completions)
    ]


TURNS: dict[str, Callable[[PromptTree], list[PromptTree]]] = {
    **dict.fromkeys(("scored", "text"), lambda tree: [tree]),
    "pairs": _as_pairs,
    "prompts": lambda tree: [replace(tree, completions=())] if tree.prompt else [],
    "sft": _as_sft,
    "unpaired": _as_unpaired,
}


# ---- rows as they are written: those of a tree in the plain layout of its kind, which `penchant train` reads ----


def _pair_row(tree: PromptTree) -> list[dict[str, Any]]:
    good, bad = tree.completions
    row: dict[str, Any] = {"prompt": prompt_json(tree.prompt)}
    if any(c.reasoning or c.tool_calls or c.more for c in tree.completions):  # both as turns
        row |= {
            n: [message_json(m) for m in (answer_turn(c), *c.more)]
            for n, c in zip(("chosen", "rejected"), tree.completions, strict=True)
        }
    else:
        row |= {"chosen": good.text, "rejected": bad.text}
    if good.score is not None and bad.score is not None:
        row |= {"chosen_score": good.score, "rejected_score": bad.score}
    return [row]


def _answers(tree: PromptTree, more: Callable[[Completion], Mapping[str, Any]]) -> list[dict[str, Any]]:
    asked = prompt_json(tree.prompt)
    return [
        {
            "prompt": asked,
            "completion": [message_json(answer_turn(c))] if c.reasoning or c.tool_calls else c.text,
            **more(c),
        }
        for c in tree.completions
    ]


def _conversation_row(tree: PromptTree) -> list[dict[str, Any]]:
    """A conversation of which several answers are learned (`data.layout_options.turns: all`); nothing for others."""
    if not any(c.more for c in tree.completions):
        return []
    turns = [
        {**message_json(m), **({} if m.role != "assistant" else {"weight": int(m.trained)})}
        for m in turns_with_answer(tree)
    ]
    return [{"messages": turns}]


WRITERS: dict[str, Callable[[PromptTree], list[dict[str, Any]]]] = {
    "pairs": _pair_row,
    "unpaired": lambda tree: _answers(
        tree, lambda c: {"label": c.label} | ({} if c.score is None else {"score": c.score})
    ),
    "scored": lambda tree: _answers(tree, lambda c: {"score": c.score}),
    "sft": lambda tree: _conversation_row(tree) or _answers(tree, lambda c: {}),
    "prompts": lambda tree: [{"prompt": prompt_json(tree.prompt)}],
    "text": lambda tree: [{"text": c.text} for c in tree.completions],
}


def written_rows(kind: str, tree: PromptTree) -> list[dict[str, Any]]:
    """The rows of a tree, with what it hands to the chat template."""
    own = {"tools": tree.tools, "chat_template_kwargs": tree.template_options}
    more = {name: json.loads(text) for name, text in own.items() if text}
    return [{**row, **more} for row in WRITERS[kind](tree)]


def prompts_of_transcript(values: Fields) -> Fields:
    """A red-team transcript as its first prompt, which is all that its publishers mean it to be used for here."""
    text = values.get("transcript")
    if not isinstance(text, str) or "\n\nHuman:" not in text:
        raise RowError('"transcript" is no "\\n\\nHuman:" transcript', "drop the row")
    said = text.split("\n\nHuman:", 1)[1].split("\n\nAssistant:", 1)[0].strip()
    if not said:
        raise RowError('"transcript" starts with an empty turn', "drop the row")
    return {"prompt": [{"role": "user", "content": said}]}


# ---- one published file to one file of converted rows ----


@dataclass(frozen=True, slots=True)
class Converter:
    """What happens to the rows of a file.

    Args:
        conversion: layout and kind; columns: our names to a person's; filters: what is left out; labeller: what labels answers.
        transcripts: rows are red-team transcripts, of which the first prompt is taken.
    """

    conversion: Conversion
    columns: dict[str, str]
    filters: Filters
    labeller: Labeller | None
    transcripts: bool = False

    def convert(self, rows: Iterable[Row | BadRow], name: str, part: Part, pace: Pace) -> Counts:
        """Write a part: all of it, or nothing.

        Args:
            name: of the file, for messages.

        Raises:
            DataError: the file is damaged, or has not the column that a filter reads. RewardError: a function went wrong.
        """
        counts = Counts()
        layout = self.conversion.turning(lambda values: self._before(values, name))
        with whole(part.rows) as out, whole(part.aside) as aside:
            writer = _Writer(out, aside, counts, self)
            for made in convert_rows(rows, layout, self.conversion.options, self.columns, identical="keep"):
                pace.step(made.rows)
                writer.take(made)
            writer.flush()
        if counts.accepted + counts.quarantined + sum(counts.filtered.values()) != counts.rows:
            raise AssertionError(f"rows do not add up: {counts}")
        write_json(part.done, counts.to_json())
        return counts

    def _before(self, values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        reason = self.filters.reason(values, name)
        if reason is not None:
            raise LeftOut(reason, "")
        return prompts_of_transcript(values) if self.transcripts else values


class Part:
    """Where the converted rows of file `number` are kept: one line for each published row (or group), a list of rows to write."""

    def __init__(self, folder: Path, number: int) -> None:
        self.rows = folder / f"part-{number:05d}.jsonl"
        self.aside = folder / f"part-{number:05d}.quarantine.jsonl"
        self.done = folder / f"part-{number:05d}.json"
        self.layout = folder / f"layout-{number:05d}.json"

    def counts(self) -> Counts | None:
        """What was counted; None where the part is not done."""
        held = read_json(self.done)
        return None if held is None else Counts.from_json(held)

    def lines(self) -> Iterator[list[dict[str, Any]]]:
        """The rows to write, of one published row at a time."""
        with self.rows.open("rb") as stream:
            for line in stream:
                yield json.loads(line)


@dataclass(slots=True)
class _Writer:
    """Writes what was converted, in its order; answers are labelled many at a time."""

    out: IO[bytes]
    aside: IO[bytes]
    counts: Counts
    how: Converter
    waiting: list[Converted] = field(default_factory=list)
    answers: int = 0

    def take(self, made: Converted) -> None:
        self.counts.rows += made.rows
        if made.left_out:
            self.counts.filtered[made.aside[0].what] += made.rows
        elif made.aside:
            self.counts.quarantined += made.rows
            for q in made.aside:
                held = {"where": q.where, "what": q.what, "how": q.how, "row": q.raw}
                self.aside.write(json.dumps(held, default=str).encode() + b"\n")
        elif self.how.labeller is None:
            self._write(made)
        else:
            self.waiting.append(made)
            self.answers += len(made.trees)
            if self.answers >= BATCH:
                self.flush()

    def flush(self) -> None:
        """Label what waits, and write it."""
        if not self.waiting or self.how.labeller is None:
            return
        labelled = iter(self.how.labeller.label([t for made in self.waiting for t in made.trees]))
        for made in self.waiting:
            found = [next(labelled) for _ in made.trees]
            kept = tuple(t for t in found if t is not None)
            if kept:
                self.counts.unlabelled += len(found) - len(kept)
                self._write(replace(made, trees=kept))
            else:
                self.counts.filtered["no label"] += made.rows
        self.waiting, self.answers = [], 0

    def _write(self, made: Converted) -> None:
        rows = [row for tree in made.trees for row in written_rows(self.how.conversion.kind, tree)]
        self.out.write(json.dumps(rows, ensure_ascii=False).encode() + b"\n")
        self.counts.accepted += made.rows
        self.counts.examples += len(rows)
