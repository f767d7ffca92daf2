"""The data of an evaluation: rows with prompts, their answers, and texts, read and tokenized as the model's run would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from penchant.base.text import counted
from penchant.config import RunConfig, config_from_mapping
from penchant.data.adapt import adapt
from penchant.data.load import Dataset, load_preferences
from penchant.data.tokenize import TokenizedDataset, tokenize
from penchant.errors import DataError
from penchant.metrics.answers import is_answer, strip_eos
from penchant.models.load import load_tokenizer
from penchant.requests import EvalRequest
from penchant.rewards.functions import reads_columns
from penchant.runs import Run
from penchant.runs.find import START, Source
from penchant.runs.rows import within_context
from penchant.types import TokenTree


@dataclass
class EvaluationData:
    """Rows, answers, prompts and texts of one evaluation, each read on first use.

    Args:
        source: the model; request: the options; overrides: ``key.path=value`` for a model without a config of its own.
        notes: sentences about data that was left out or cut.

    Raises:
        ConfigError, DataError, ModelError: the user can fix it.
    """

    source: Source
    request: EvalRequest
    overrides: Sequence[str] = ()
    quiet: bool = False
    notes: list[str] = field(default_factory=list)

    @cached_property
    def config(self) -> RunConfig:
        """The config of the model's run, or a default config for this model and data if it has none."""
        if self.source.run is not None:
            return self.source.run
        model = self.source.base.model_dump(exclude_unset=True) | {"tokenizer": self.source.tokenizer}
        values = {"model": model, "data": {"path": self.request.data or self.request.text or ""}, "output": "."}
        config = config_from_mapping(values, list(self.overrides))
        return within_context(config)

    @property
    def policy(self) -> Source:
        """The model with overrides such as ``model.revision`` applied; for a run they are already in its config."""
        return self.source if self.source.run is not None else replace(self.source, base=self.config.model)

    @cached_property
    def run(self) -> Run:
        """The run that reads rows, tokenizes them, and sets the precision and device of models."""
        is_checkpoint = self.source.adapter is not None or self.source.checkpoint not in ("", START)
        # the checkpoint's own tokenizer, because the model that it started from may be gone
        tokenizer = load_tokenizer(self.source.tokenizer) if is_checkpoint else None
        return Run(self.config, quiet=self.quiet, tokenizer=tokenizer)

    @cached_property
    def rows(self) -> Dataset | None:
        """The rows with prompts: those of --data, or the run's held-out rows; None if there are none."""
        data = self.config.data
        needs_columns = any(reads_columns(reward) for reward in (self.request.reward, *self.request.also))
        if self.request.data is None:
            if self.source.run is None:
                return None
            self.run.rows.keep_columns |= needs_columns
            held_out = self.run.rows.datasets[1]
            return None if held_out is None or held_out.kind == "text" else held_out
        own_shape = self.source.run is not None  # an online run reads only prompts, but these rows may have answers
        own_limit = self.source.run is None or any(o.startswith("data.limit=") for o in self.overrides)
        how = data.reading(pictures=self.config.model.sees)
        how |= {"shape": "auto"} if own_shape and data.shape == "prompts" else {}
        how |= {} if own_limit else {"limit": None}
        rollouts = needs_columns and self.run.rows.method.signal == "prompts"
        rows = load_preferences(self.request.data, keep_columns=needs_columns, rollouts=rollouts, **how)
        if rows.kind == "text":
            raise DataError(", ".join(self.request.files), "holds texts without prompts", "give it as --text")
        if data.weight is not None:
            self.notes.append("Every row of --data counts once: data.weight is for training and its held-out rows.")
        if rows.quarantined:
            self.notes.append(f"Kept aside: {counted(len(rows.quarantined), 'bad row')} of {rows.total:,}.")
        if rows.kind == "scored" and data.pairs_from_scores != "off":
            rows = adapt(rows, "eval", "pairs", frozenset(), data, ", ".join(self.request.files))
        return rows

    @cached_property
    def tokens(self) -> TokenizedDataset:
        assert self.rows is not None
        tokenized = self.run.rows.tokenize(self.rows)
        for label, count in (
            ("rows could not be made into tokens", len(tokenized.quarantined)),
            ("prompts lost their start", len(tokenized.cut_prompts)),
            ("rows have an answer that lost its end", len(tokenized.cut_completions)),
        ):
            if count:
                self.notes.append(f"At data.max_length {self.config.data.max_length}: {count:,} {label}.")
        if not tokenized.trees:
            how = "look at data.max_length"
            raise DataError(", ".join(self.request.files), "no row is left after cutting rows into tokens", how)
        return tokenized

    @cached_property
    def answers(self) -> list[TokenTree]:
        """Tokenized rows whose answers are known to be good or bad."""
        if self.request.text_alone or self.rows is None or self.rows.kind not in ("pairs", "sft", "unpaired"):
            return []
        return [t for t in self.tokens.trees if is_answer(t)]

    @cached_property
    def documents(self) -> tuple[list[TokenTree], dict[str, int], str]:
        """Chunks of --text, bytes of each document, and the file's fingerprint."""
        assert self.request.text is not None
        data, tokenizer = self.config.data, self.run.rows.tokenizer
        texts = load_preferences(
            self.request.text, shape="text", on_bad_row=data.on_bad_row, bounds=data.bounds.model_dump()
        )
        if texts.quarantined:
            self.notes.append(f"Kept aside: {len(texts.quarantined):,} bad documents of {texts.total:,}.")
        tokenized = tokenize(
            texts, tokenizer, max_length=data.max_length, add_eos=tokenizer.eos_token_id is not None, on_bad_row="error"
        )
        if tokenized.split_documents:
            self.notes.append(
                f"{tokenized.split_documents:,} documents longer than data.max_length {data.max_length} are read in parts, "
                "each without what came before it."
            )
        size = {t.source: len(t.completions[0].text.encode()) for t in texts.trees}
        return strip_eos(tokenized.trees, tokenizer.eos_token_id), size, texts.fingerprint

    @cached_property
    def prompts(self) -> list[TokenTree]:
        """The first row of each distinct prompt, up to the requested number."""
        first: dict[bytes, TokenTree] = {}
        for t in self.tokens.trees:
            first.setdefault(t.prompt_ids.tobytes(), t)
        requested = self.request.generate or 0
        if len(first) < requested:
            self.notes.append(f"There are {counted(len(first), 'prompt')}, not {requested:,}.")
        return list(first.values())[:requested]

    @cached_property
    def good_answers(self) -> dict[bytes, list[str]]:
        """Texts of the good answers by prompt."""
        assert self.rows is not None
        tree_of = {t.source: t for t in self.rows.trees}
        answers: dict[bytes, list[str]] = {}
        for t in self.answers:
            for i, c in enumerate(tree_of[t.source].completions):
                if c.label if c.label is not None else i == 0:
                    answers.setdefault(t.prompt_ids.tobytes(), []).append(c.text.strip())
        return answers
