"""A first look at data and model, before any question is asked."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from penchant.base.hub import HubUnreachable
from penchant.base.text import counted
from penchant.data.load import Dataset, load_preferences, reasons_of, unused_of
from penchant.data.read import Row, named_files, read_rows
from penchant.data.tokenize import tokenize
from penchant.errors import ConfigError, DataError, PenchantError
from penchant.models.load import load_tokenizer
from penchant.models.lora import is_adapter
from penchant.models.options import ModelConfig, check_model_path
from penchant.models.reward import is_encoder, load_model_config
from penchant.runs.find import resolve_model
from penchant.types import Prompt

SAMPLE = 2000  # maximum number of rows to tokenize
NO_TRUNCATION = 1 << 30
CHARACTERS_PER_TOKEN = 3.5  # estimate without a tokenizer: English text has about four


@dataclass(frozen=True, slots=True)
class DataFacts:
    """Properties of a data file.

    Args:
        path: as given; layout, kind: detected; rows: all rows; aside: number of those that are bad; prompts: number of distinct prompts.
        longest: quantiles of prompt plus longest completion (50%, 95%, 99%, maximum); prompt: the same for prompts alone.
        columns: ``{our field: the file's column}``, as given.
        reasons: summary of the bad rows, such as ``3 x "chosen" is empty``; unused: columns that are not read.
        answers: column with reference answers, None if there is none; several: number of conversations with more than one answer.
        unit: ``tokens``, or ``tokens (a guess from characters)``; median_score: if rows have scores.
    """

    path: str
    layout: str
    kind: str
    rows: int
    aside: int
    prompts: int
    longest: tuple[int, ...]
    prompt: tuple[int, ...]
    unit: str
    median_score: float | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    reasons: str = ""
    unused: str = ""
    answers: str | None = None
    several: int = 0

    def to_kind(self) -> str:
        """Return ``layout: kind`` of the rows, or one name if both are the same."""
        if self.layout == "sft":
            return "prompts with answers (sft)"
        return self.layout if self.layout == self.kind else f"{self.layout}: {self.kind}"

    def to_text(self) -> str:
        bad_rows = f", {self.aside:,} of them bad rows, kept aside and counted ({self.reasons})" if self.aside else ""
        unused = f"; columns that are not used: {self.unused}" if self.unused else ""
        return (
            f"{counted(self.rows, 'row')}, {self.to_kind()}{bad_rows}; prompt and answer: half have {self.longest[0]:,} or less, "
            f"95% {self.longest[1]:,}, longest {self.longest[3]:,} {self.unit}{unused}"
        )


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out rows in a file of their own.

    Args:
        path: as given; rows: all rows; aside, reasons: number of those that are bad, and why.
    """

    path: str
    rows: int
    aside: int
    reasons: str = ""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Properties of a model.

    Args:
        path: as given; parameters: approximate count, None if it is unknown; context: maximum tokens.
        encoder: a BERT-like model, which can only become a reward model.
    """

    path: str
    parameters: int | None = None
    context: int | None = None
    encoder: bool = False


def look_at_data(path: str, model: str | None, columns: Mapping[str, str] | None = None) -> DataFacts:
    """Read the file as training would, and measure its rows.

    Args:
        columns: ``{our field: the file's column}``.

    Raises:
        DataError: the file cannot be read, or its layout is unknown.
    """
    answers = answer_column(path, columns)
    try:
        dataset = load_preferences(path, columns=columns, on_bad_row="skip", identical="bad_row")
    except DataError:
        if answers is None:
            raise
        # not demonstrations (the answer is a number) but prompts with reference answers
        dataset = load_preferences(path, columns=columns, on_bad_row="skip", keep_columns=True, rollouts=True)
    row_lengths, prompts, unit = _lengths(dataset, model)
    scores = [c.score for t in dataset.trees for c in t.completions if c.score is not None]
    return DataFacts(
        path,
        dataset.shape,
        dataset.kind,
        dataset.total,
        len(dataset.quarantined),
        len({t.prompt for t in dataset.trees}),
        _quantiles(row_lengths),
        _quantiles(prompts),
        unit,
        float(np.median(scores)) if scores and dataset.kind == "scored" else None,
        columns or {},
        reasons_of(dataset),
        unused_of(dataset),
        answers,
        sum(not isinstance(t.prompt, str) and any(m.role == "assistant" for m in t.prompt) for t in dataset.trees),
    )


def answer_column(path: str, columns: Mapping[str, str] | None = None) -> str | None:
    """Return the column that the accuracy reward compares with, ``answer`` or ``solution``, if the first rows have one, else None."""
    key_sets = [r.values.keys() for r in itertools.islice(read_rows([path]), 100) if isinstance(r, Row)]
    for name in ("answer", "solution"):
        if key_sets and (name in (columns or {}) or all(name in keys for keys in key_sets)):
            return name
    return None


def look_at_held_out(path: str, data: DataFacts) -> HeldOut:
    """Read a file of held-out rows as training would.

    Raises:
        DataError: it cannot be read. ConfigError: it is the training file, or holds rows of another kind.
    """
    if {f and f.resolve() for _, f in named_files(path)} & {f and f.resolve() for _, f in named_files(data.path)}:
        raise ConfigError("--eval-data", f"{path} is the training data", "give another file, or leave it out")
    dataset = load_preferences(path, columns=data.columns, on_bad_row="skip", identical="bad_row")
    if dataset.kind != data.kind:
        raise ConfigError(
            "--eval-data", f"{path} holds {dataset.kind}, {data.path} {data.kind}", "give rows of one kind"
        )
    return HeldOut(path, dataset.total, len(dataset.quarantined), reasons_of(dataset))


def validation_beside(path: str) -> str | None:
    """Return the validation.jsonl beside `path` if `path` is the train.jsonl of a `penchant data get` folder, else None."""
    train = Path(path)
    held_out = train.with_name("validation.jsonl")
    if train.name != "train.jsonl" or not held_out.is_file() or not train.with_name("data.json").is_file():
        return None
    return str(held_out) if held_out.stat().st_size else None


def _quantiles(lengths: Sequence[int]) -> tuple[int, ...]:
    values = np.quantile(lengths or [1], (0.5, 0.95, 0.99, 1.0), method="inverted_cdf")
    return tuple(int(q) for q in values)


def _lengths(dataset: Dataset, model: str | None) -> tuple[list[int], list[int], str]:
    """Return the lengths of at most SAMPLE evenly spaced rows (prompt plus longest completion), of their prompts, and the unit."""
    rows = len(dataset.trees)
    count = min(rows, SAMPLE)
    sample = dataset.subset([i * rows // count for i in range(count)])
    try:
        tokenizer = load_tokenizer(model) if model is not None else None
    except PenchantError:
        tokenizer = None
    if tokenizer is not None:
        has_eos = tokenizer.eos_token_id is not None
        tokenized = tokenize(sample, tokenizer, max_length=NO_TRUNCATION, on_bad_row="skip", add_eos=has_eos)
        row_lengths = [len(t.prompt_ids) + max(map(len, t.completion_ids), default=0) for t in tokenized.trees]
        return row_lengths, [len(t.prompt_ids) for t in tokenized.trees], "tokens"
    prompts = [_count_characters(t.prompt) for t in sample.trees]
    answers = [max((len(c.whole) for c in t.completions), default=0) for t in sample.trees]
    estimates = [round((p + a) / CHARACTERS_PER_TOKEN) for p, a in zip(prompts, answers, strict=True)]
    return estimates, [round(p / CHARACTERS_PER_TOKEN) for p in prompts], "tokens (a guess from characters)"


def _count_characters(prompt: Prompt) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(m.content) for m in prompt)


def look_at_model(path: str) -> ModelFacts:
    """Determine a model's size from its shapes alone; unknown values stay None (e.g. a hub id without a network).

    Raises:
        ModelError: there is no such model, or its config cannot be read.
    """
    from penchant.plan.outline import outline, parameter_counts

    source = resolve_model(path)
    if source is not None and not is_adapter(source[0]):
        return replace(look_at_model(str(source[0])), path=path)
    try:
        check_model_path(path)
        config = load_model_config(path)
    except HubUnreachable:
        return ModelFacts(path)
    encoder, limit = is_encoder(config, path), getattr(config, "max_position_embeddings", None)
    try:
        parameters = parameter_counts(outline(ModelConfig(path=path), reward=encoder))[0]
    except PenchantError:
        parameters = None
    return ModelFacts(path, parameters, int(limit) if limit else None, encoder)
