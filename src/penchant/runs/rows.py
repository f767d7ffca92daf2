"""The rows of a run: loaded from files, split, tokenized and numbered; the audit."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from penchant.base.text import counted
from penchant.config import RunConfig
from penchant.data.adapt import adapt, mismatched_rows, repeated_prompts
from penchant.data.audit import audit as run_audit
from penchant.data.audit.findings import Audit
from penchant.data.cached import DataCache
from penchant.data.load import FIRST_ROWS, Dataset, layout_line, summary, template_variables
from penchant.data.mapped import StoredTokens, extra_of, first_completions, label_counts, row_weights
from penchant.data.templates import unread_options, uses_chat, with_date
from penchant.data.tokenize import TokenizedDataset
from penchant.data.tokenize_pictures import PicturedTokenization
from penchant.errors import ConfigError, DataError, PenchantError
from penchant.metrics.names import METRICS
from penchant.models.load import load_processor, load_tokenizer
from penchant.models.reward import is_encoder, load_model_config
from penchant.rewards.functions import reads_columns
from penchant.rewards.reward_model import RewardModelParts, rows_by_source
from penchant.runs.sharing import Key, Uncached
from penchant.training.steps import Share, shares_of
from penchant.types import PromptTree, TokenTree


class Rows:
    """Rows and tokens for a run's config, each loaded or computed on first use, in any order.

    Args:
        shared: caches what other runs of this process can reuse; console: for notes on the rows.
        tokenizer: used instead of the config's (a checkpoint's own, as the starting model may be gone).
    """

    def __init__(self, config: RunConfig, shared: Uncached, console: Any, tokenizer: Any = None) -> None:
        self.config, self.shared, self.console = config, shared, console
        self.method = config.method
        # cache keys do not cover picture files
        cached = config.data.cache != "off" and not config.model.sees
        self.cache = DataCache(cached, console.note, config.data.workers)
        self._tokenizer = tokenizer

    @cached_property
    def processor(self) -> Any:
        """The processor of a vision-language model."""
        return load_processor(self.config.model)

    @cached_property
    def tokenizer(self) -> Any:
        if self.config.model.sees:
            return self.processor.tokenizer
        if self._tokenizer is not None:
            return self._tokenizer
        # a reward model may add a pad token
        get = self.shared.fresh if self.method.learns_reward else self.shared.once
        model = self.config.model
        path, revision = model.tokenizer or model.path, model.revision_of(model.tokenizer)
        return get(self.tokenizer_key, lambda: load_tokenizer(path, revision))

    @cached_property
    def keep_columns(self) -> bool:
        """Whether rows keep their extra columns, for a reward that reads them or an environment."""
        if self.config.rollout.environment is not None:
            return True
        try:
            return reads_columns(self.config.reward) or reads_columns(self.config.evaluation.reward)
        except ConfigError:
            return False  # its file may be gone; whatever needs it will report that

    @cached_property
    def loaded(self) -> dict[str, Dataset]:
        """The loaded files with their quarantined rows: ``train``, and ``heldout`` if it has files of its own."""
        names, by_source = self.held_out_sets, self.datasets_by_source
        datasets = {
            "train": self.cache.concatenate(list(by_source.values()), list(by_source))
            if len(by_source) > 1
            else next(iter(by_source.values()))
        }
        held_out = {name: self._load(path) for name, path in self.config.data.held_out_files.items()}
        if held_out:
            datasets["heldout"] = (
                self.cache.concatenate(list(held_out.values()), list(held_out))
                if len(held_out) > 1
                else next(iter(held_out.values()))
            )
        if names and self.method.rollouts is not None:
            self.console.note(
                f"held-out sets {', '.join(names)} are evaluated as one: {self.method.name} writes answers to all of them"
            )
        for name, dataset in datasets.items():
            self.console.note(f"{name}: {summary(dataset)}")
        return datasets

    @cached_property
    def datasets_by_source(self) -> dict[str, Dataset]:
        """The training data by source."""
        data = self.config.data
        sources = {", ".join(s.files): s for s in data.sources}
        if len(sources) < len(data.sources):
            how = "give one of them, and say repeat there"
            raise ConfigError("data.sources", "two sources have the same path", how)
        return {name: self._load(s.path, s.reading()) for name, s in sources.items()} or {"": self._load(data.path)}

    @cached_property
    def held_out_sets(self) -> list[str]:
        """The names of several held-out sets, in the order of their trees' `origin`; empty for a single unnamed one."""
        names = [name for name in self.config.data.held_out_files if name]
        reserved = {n.partition("/")[0] for n in METRICS} | {"loss"}
        for name in names:
            if name in reserved or not re.fullmatch(r"[A-Za-z][\w.-]*", name):
                what = f"{name!r} cannot be the name of a held-out set"
                raise ConfigError("data.eval_path", what, "take a word that no metric uses, such as general or math")
        return names

    @cached_property
    def shares(self) -> tuple[Share, ...]:
        """How many rows of each mixed source an epoch takes; empty if it takes every row once."""
        sources = self.config.data.sources
        if not any(s.weight or s.repeat for s in sources):
            return ()
        origins = extra_of(self.trees[0], "origin").astype(int)
        counts = np.bincount(origins, minlength=len(sources)).tolist()
        shares = shares_of(counts, [s.weight for s in sources], [s.repeat for s in sources])
        names = [", ".join(s.files) for s, count in zip(sources, counts, strict=True) if count]
        phrases = [
            f"{used:,} of {name} (of {available:,})" for name, (_, available, used) in zip(names, shares, strict=False)
        ]
        if phrases:
            self.console.note(f"rows that an epoch takes: {', '.join(phrases)}")
        return shares

    @cached_property
    def datasets(self) -> tuple[Dataset, Dataset | None]:
        """(train, held out), from separate files or split by prompt."""
        data = self.config.data
        train = self.loaded["train"]
        if "heldout" in self.loaded:
            return train, self.loaded["heldout"]
        if data.validation_rows is None and data.validation_fraction is None:
            if self.config.evaluation.reward is not None:
                what = "is set, but there is no held-out set to sample completions for"
                how = "set data.validation_rows, data.validation_fraction or data.eval_path, or leave it out"
                raise ConfigError("evaluation.reward", what, how)
            return train, None
        seed = self.config.train.seed if data.split_seed is None else data.split_seed
        train, heldout = self.shared.once(
            ("split", *dataset_key(train), str(data.path), data.validation_rows, data.validation_fraction, seed),
            lambda: self.cache.split(
                self.loaded["train"],
                validation_rows=data.validation_rows,
                validation_fraction=data.validation_fraction,
                seed=seed,
            ),
        )
        self.console.note(f"split by prompt: {train.accepted:,} train, {heldout.accepted:,} held out")
        return train, heldout

    def _load(self, path: Any, source_settings: Mapping[str, Any] | None = None) -> Dataset:
        """Load files as rows to train on; `source_settings` holds the source's own settings for reading them."""
        data, method = self.config.data, self.method
        options = data.reading(pictures=self.config.model.sees)
        if data.weight is not None:
            if method.signal == "prompts":
                how = "leave it out; data.sources mixes prompts by weight"
                raise ConfigError("data.weight", f"is set, and {method.name} writes its answers itself", how)
            options |= {"weight": data.weight}
        options |= source_settings or {}
        if self.keep_columns:
            options |= {"keep_columns": True, "rollouts": method.signal == "prompts"}
        dataset = self.shared.once(
            ("rows", str(path), json.dumps(options, sort_keys=True)), lambda: self.cache.load(path, **options)
        )
        self.console.note(layout_line(dataset, path))
        adapted = adapt(dataset, method.name, method.signal, method.needs, data, str(path))
        if method.signal == "prompts" and dataset.kind != "prompts":
            self.console.note(f"{path}: its answers are not used; each prompt is asked once")
        if method.signal == "prompts" and (note := repeated_prompts(adapted)):
            self.console.note(f"{path}: {note}")
        if method.signal == "unpaired":
            good, bad = label_counts(adapted.trees)
            self.console.note(f"{path}: {good:,} good and {counted(bad, 'bad answer')}")
        return adapted

    @cached_property
    def reward_parts(self) -> RewardModelParts | None:
        """How a reward model's rows are tokenized, and its other parts; None if a language model is trained."""
        if not self.method.learns_reward:
            return None
        cfg = self.config
        parts = RewardModelParts(cfg.model, cfg.data, cfg.lora, self.tokenizer)
        if parts.max_length < cfg.data.max_length:
            self.console.note(
                f"data.max_length {cfg.data.max_length} is beyond the encoder: rows have {parts.max_length}"
            )
        return parts

    @property
    def max_length(self) -> int:
        """Maximum number of tokens per row."""
        return self.config.data.max_length if self.reward_parts is None else self.reward_parts.max_length

    @cached_property
    def tokenized(self) -> tuple[TokenizedDataset, TokenizedDataset | None]:
        (train, heldout), data = self.datasets, self.config.data
        if uses_chat(data.template, self.tokenizer):
            row_variables = (
                template_variables(tree).keys() - {"tools"} for tree in itertools.islice(train.trees, FIRST_ROWS)
            )
            if warning := unread_options(
                self.tokenizer, {*data.template_options, *itertools.chain.from_iterable(row_variables)}
            ):
                self.console.note(f"{warning} (data.template_options, or chat_template_kwargs of the rows)")
        return self.tokenize(train), None if heldout is None else self.tokenize(heldout)

    def tokenize(self, dataset: Dataset, on_bad_row: str | None = None) -> TokenizedDataset:
        """Tokenize rows as this run trains on them."""
        data = self.config.data
        if self.reward_parts is not None:
            return self.reward_parts.tokenize(dataset, on_bad_row or data.on_bad_row)
        options = data.model_dump(
            include={"template", "template_options", "max_length", "truncation", "on_bad_row", "identical", "add_eos"}
        )
        options["on_bad_row"] = on_bad_row or data.on_bad_row
        if uses_chat(data.template, self.tokenizer):
            options["template_options"] = with_date(data.template_options, self.tokenizer)
        if self.config.model.sees:
            return PicturedTokenization(self.processor, dataset.kind, **options).all(dataset.trees)
        key = ("tokens", *self.tokenizer_key[1:], str(data.path), str(data.eval_path), *dataset_key(dataset))
        return self.shared.once(
            (*key, json.dumps(options, sort_keys=True)), lambda: self.cache.tokenize(dataset, self.tokenizer, **options)
        )

    @cached_property
    def trees(self) -> tuple[Sequence[TokenTree], Sequence[TokenTree]]:
        """(train, held out) token trees, numbered consecutively so that one reference cache covers both."""
        train, heldout = self.tokenized
        parts: list[Sequence[TokenTree]] = [train.trees, heldout.trees if heldout is not None else ()]
        if self.method.signal == "tokens":  # SFT on pairs learns the chosen completion only
            parts = [first_completions(part) for part in parts]
        numbered: list[Sequence[TokenTree]] = []
        start = 0
        for part in parts:
            if isinstance(part, StoredTokens):
                numbered.append(part.numbered_from(start))
            else:
                numbered.append([replace(t, row=start + i) for i, t in enumerate(part)])
            start += len(part)
        for name, part in (("train", numbered[0]), ("held out", numbered[1])):
            if (weights := row_weights(part)) is not None:
                self.console.note(
                    f"{name}: rows are weighted by {self.config.data.weight}, from {weights.min():g} to {weights.max():g}, "
                    f"{weights.mean():.4g} on average"
                )
        if not numbered[0]:
            raise DataError(str(self.config.data.path), "no row is left to train on", "look at the quarantine file")
        return numbered[0], numbered[1]

    @cached_property
    def mismatched(self) -> Mapping[int, TokenTree]:
        """Map each row to its prompt with a completion from the next row with another prompt, numbered after all other rows."""
        if "z0" not in self.method.needs:
            return {}
        mismatched: dict[int, TokenTree] = {}
        offset = sum(map(len, self.trees))
        for trees in self.trees:
            partners = mismatched_rows([t.prompt_key for t in trees])
            if partners is None and trees:
                what = "all rows have the same prompt, so KTO's reference point cannot be estimated"
                how = "give data with at least two prompts (in the held-out part too), or choose bco or pmpo"
                raise DataError(str(self.config.data.path), what, how)
            for tree, partner in zip(trees, partners or [], strict=True):
                other = trees[partner]
                ids = other.completion_ids[tree.row % len(other.completion_ids)]
                max_tokens = max(1, self.config.data.max_length - len(tree.prompt_ids))
                mismatched[tree.row] = TokenTree(
                    offset + tree.row,
                    tree.prompt_ids,
                    (ids[:max_tokens],),
                    (len(ids) > max_tokens,),
                    pictures=tree.pictures,
                )
        return mismatched

    @cached_property
    def prompts_by_source(self) -> Mapping[str, PromptTree | None]:
        """Map each row's source to its prompt with extra columns; None if files of the same name differ there."""
        return rows_by_source(t for d in self.datasets if d is not None for t in d.trees)

    def part(self, train: Sequence[int], heldout: int, config: RunConfig) -> Rows:
        """A subset for a run with another config: the given training rows and the first `heldout` held-out rows."""
        subset = copy.copy(self)  # with everything loaded so far
        subset.config = config
        vars(subset).pop("shares", None)
        subset.trees = [self.trees[0][i] for i in train], self.trees[1][:heldout]
        rows = {t.row for part in subset.trees for t in part}
        subset.mismatched = {row: t for row, t in self.mismatched.items() if row in rows}
        return subset

    def audit(self, tokenize: bool = True, *, languages: bool = False, counters: Sequence[Any] = ()) -> Audit:
        """The data audit of every split; an audit with additional `counters` is not shared between runs."""
        train, heldout = self.datasets
        splits = {"train": train} | ({"held out": heldout} if heldout is not None else {})
        all_rows, path = self.loaded["train"], self.config.data.path

        def run() -> Audit:
            tokens = self.tokenize(all_rows, on_bad_row="skip") if tokenize else None
            if counters:
                return run_audit(all_rows, tokens, splits, path, languages=languages, counters=counters)
            return self.cache.audit(all_rows, tokens, splits, path, languages=languages)

        if counters:
            return run()  # keys do not cover a user's own functions
        return self.shared.once(("audit", tokenize, languages, *dataset_key(all_rows), *self.key), run)

    # ---- keys for what runs can share ----------------------------------------------------------------------------------

    @property
    def tokenizer_key(self) -> Key:
        model = self.config.model
        vision = (json.dumps([model.vision, model.image_options], sort_keys=True),) if model.sees else ()
        return ("tokenizer", model.tokenizer or model.path, model.revision_of(model.tokenizer), *vision)

    @property
    def key(self) -> Key:
        """Everything that the token trees depend on."""
        content = [dataset_key(d) for d in self.datasets if d is not None]
        method = self.method.name if self.method.learns_reward else "rows"
        return (method, self.method.signal, self.tokenizer_key, self.config.data.model_dump_json(), *content)


def within_context(config: RunConfig, note: Callable[[str], None] = lambda text: None) -> RunConfig:
    """The config, with the default `data.max_length` reduced to fit the model's context.

    Raises:
        ConfigError: the config sets a `data.max_length` beyond the model's context.
    """
    data, source = config.data, config.model
    try:
        model_config = load_model_config(source.path, source.revision)
        limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(limit, int) or limit < 1 or (config.method.learns_reward and is_encoder(model_config)):
            return config  # an encoder's rows are truncated to its limit (`RewardModelParts`)
    except PenchantError:
        return config  # the model may be gone; whatever needs it will report that
    rollouts = config.method.rollouts
    room = max(8, limit - (rollouts.max_new_tokens if rollouts is not None else 0))
    is_set = "max_length" in data.model_fields_set
    if data.max_length <= (limit if is_set else room):
        return config
    if is_set:
        what = f"{data.max_length} is beyond the model's context of {limit}"
        raise ConfigError("data.max_length", what, f"set it to at most {limit}, or to auto")
    note(f"data.max_length: {room}, since the model's context is {limit} (the default is {data.max_length})")
    return config.model_copy(update={"data": data.model_copy(update={"max_length": room})})


def dataset_key(dataset: Dataset) -> Key:
    """A key that distinguishes a dataset from others made of the same files."""
    return (dataset.fingerprint, dataset.kind, dataset.accepted, dataset.total)
