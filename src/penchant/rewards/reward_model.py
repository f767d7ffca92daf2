"""Reward models: a trained one as a reward function, and the parts for training one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from penchant.base.files import file_sha256
from penchant.base.functions import imported_sha256, is_own, own_file
from penchant.base.machine import moved, place_of
from penchant.data.load import Dataset
from penchant.data.options import DataConfig
from penchant.data.packing import run_passes
from penchant.data.templates import DATE, end_ids, uses_chat, writes_date
from penchant.data.tokenize import (
    PairFormat,
    TokenizedDataset,
    pair_format,
    same_tokens,
    tokenize,
    tokenize_text_pairs,
)
from penchant.errors import CheckpointError, ConfigError, DataError, ModelError
from penchant.logprobs import Scorer
from penchant.logprobs.packing import choose_packing
from penchant.models.folder import read_object
from penchant.models.load import DTYPES, add_lora, cast_parameters, load_tokenizer
from penchant.models.options import LoraConfig, ModelConfig
from penchant.models.reward import (
    HEADS,
    SETTINGS,
    architectures_of,
    choose_padding,
    context_of,
    head_of,
    head_scores,
    is_encoder,
    is_reward_model,
    load_model_config,
    load_reward_model,
    save_reward_model,
    set_padding,
)
from penchant.rewards.builtin import kind_of
from penchant.runfolder import CHECKPOINTS, CONFIG, checkpoint_state, checkpoints
from penchant.training.checkpoint import latest_checkpoint
from penchant.types import Completion, PackedBatch, PromptTree, Segment, TokenTree

# ---- From a packed batch to one reward for each completion: causal models on shared prompts, encoders on text pairs ----

SHORTEST = 0.75  # shortest row of a padded pass relative to its longest, so that at most a quarter is padding


class RewardScorer(Protocol):
    """The interface of a reward model for training, evaluation and reward functions."""

    model: Any  # the transformers model, or peft's wrapper
    shared: bool  # whether batches are packed with shared prompts
    packing: str  # how rows are laid out, for the log
    fast: bool  # whether a model-family fast path runs
    side_by_side: bool  # whether a CPU may run several passes at once

    def rewards(self, batch: PackedBatch) -> Tensor:
        """The reward of each completion (C,), fp32 (fp64)."""


class CausalRewards:
    """A causal reward model: the head reads the last real token of each completion (EOS, unless it was truncated).

    Args:
        scorer: runs the backbone, which has no language-model head.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.model = scorer, scorer.model
        self.shared, self.packing, self.fast = scorer.shared, str(scorer.packing), scorer.fast
        self.side_by_side = scorer.fast

    def rewards(self, batch: PackedBatch) -> Tensor:
        last = moved(torch.tensor(last_positions(batch)), batch.input_ids.device)
        return head_scores(head_of(self.model), self.scorer.hidden(batch).index_select(0, last))


def last_positions(batch: PackedBatch) -> list[int]:
    """Position of each completion's last token in the packed row."""
    positions = []
    for s in batch.segments:
        end = s.start + s.prompt_len
        for n in s.completion_lens:
            end += n
            positions.append(end - 1)
    return positions


@dataclass(slots=True)
class EncoderRewards:
    """An encoder reward model: each prompt with each completion is a separate row, padded with rows of similar length.

    Args:
        model: for sequence classification with one output; layout: of its tokenizer's text pairs.
    """

    model: Any
    layout: PairFormat
    shared: bool = False
    packing: str = "text pairs, padded by length"
    fast: bool = False
    side_by_side: bool = False

    def rewards(self, batch: PackedBatch) -> Tensor:
        # packed separately: one completion per segment
        groups = by_length([s.length for s in batch.segments])
        rewards = [self._padded(batch, [batch.segments[i] for i in members]) for members in groups]
        inverse = torch.tensor([i for members in groups for i in members]).argsort()
        return torch.cat(rewards).index_select(0, moved(inverse, batch.input_ids.device))

    def _padded(self, batch: PackedBatch, rows: Sequence[Segment]) -> Tensor:
        """Rewards of rows of similar length; all their indices go to the device in one copy."""
        lengths, prompts, starts = np.array([(s.length, s.prompt_len, s.start) for s in rows]).T[:, :, None]
        column = np.arange(lengths.max())
        is_token = column < lengths
        first_type, second_type = (0, 0) if self.layout.types is None else self.layout.types
        type_ids = np.where(is_token, np.where(column < prompts, first_type, second_type), 0)
        index, mask, types = moved(
            torch.from_numpy(np.stack([np.where(is_token, starts + column, 0), is_token, type_ids])),
            batch.input_ids.device,
        )
        ids = torch.where(mask.bool(), batch.input_ids[index], self.layout.pad)
        extra = {} if self.layout.types is None else {"token_type_ids": types}
        head = head_of(self.model)
        features: list[Tensor] = []
        # run the head again in fp32, on the features that the model passes to it
        hook = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        try:
            self.model(input_ids=ids, attention_mask=mask, **extra)
        finally:
            hook.remove()
        return head_scores(head, features[0])


def by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Group indices by similar length, longest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[i] >= SHORTEST * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


# ---- A trained reward model as a reward function ----

TOKENS_PER_STEP = 4096


@dataclass(frozen=True)
class PolicyText:
    """What a reward needs to know about the policy whose completions it scores.

    Args:
        tokenizer, template, template_options: the policy's; rows: of the data, without completions, by the `source` of their
            trees; None for a source that several rows share.
    """

    tokenizer: Any
    template: str = "auto"
    rows: Mapping[str, PromptTree | None] = field(default_factory=dict)
    template_options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """All columns that any row has besides its prompt."""
        return tuple(dict.fromkeys(name for row in self.rows.values() if row is not None for name in row.columns))


def rows_by_source(trees: Iterable[PromptTree]) -> dict[str, PromptTree | None]:
    """Prompts and extra columns by the `source` of their rows; None if files of the same name differ there."""
    prompts: dict[str, PromptTree | None] = {}
    for tree in trees:
        prompt = replace(tree, completions=())
        prompts[tree.source] = prompt if prompts.get(tree.source, prompt) == prompt else None
    return prompts


@dataclass(slots=True)
class RewardModel:
    """Scores texts, or the policy's own tokens.

    If the policy has the same tokenizer and template, its token ids are scored directly. Otherwise prompt (from the data) and
    completion are tokenized again, as they were when the reward model was trained.

    Args:
        scorer, tokenizer: the reward model's; template, max_length, add_eos, template_options: as in its training.
        policy: whose completions `score_trees` gets.
    """

    scorer: RewardScorer
    tokenizer: Any
    encoder: bool
    template: str
    max_length: int
    add_eos: bool
    policy: PolicyText | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    _same_format: bool = field(init=False)

    def __post_init__(self) -> None:
        policy = self.policy
        if policy is not None and DATE in policy.template_options and writes_date(self.tokenizer):
            # a reward model trained without a fixed date gets the run's
            self.template_options = {DATE: policy.template_options[DATE], **self.template_options}
        self._same_format = (
            policy is not None
            and not self.encoder
            and self.add_eos
            and same_tokens(policy.tokenizer, self.tokenizer)
            and uses_chat(policy.template, policy.tokenizer) == uses_chat(self.template, self.tokenizer)
            and dict(policy.template_options) == dict(self.template_options)
        )

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """The reward of each completion, taken as complete (with its EOS)."""
        pairs = [PromptTree(p, (Completion(c),)) for p, c in zip(prompts, completions, strict=True)]
        return rewards_of(self.scorer, self._tokenized(pairs, [False] * len(pairs)))

    def score_trees(self, trees: Sequence[TokenTree]) -> list[float]:
        """The reward of each completion of rollouts, tree by tree; one that did not end by itself is scored without EOS."""

        def is_direct(tree: TokenTree) -> bool:  # tree by tree: a reward must not depend on what else is scored
            longest = max(map(len, tree.completion_ids))
            return self._same_format and len(tree.prompt_ids) + longest <= self.max_length

        of_ids = iter(rewards_of(self.scorer, [t for t in trees if is_direct(t)]))
        of_texts = iter(self._rewards_of_texts([t for t in trees if not is_direct(t)]))
        return [next(of_ids if is_direct(t) else of_texts) for t in trees for _ in t.completion_ids]

    def _rewards_of_texts(self, trees: Sequence[TokenTree]) -> list[float]:
        """The rewards of rollouts whose prompts and completions are tokenized again."""
        if not trees:
            return []
        assert self.policy is not None
        decode = self.policy.tokenizer.decode
        pairs, unfinished = [], []
        for tree in trees:
            rows = self.policy.rows
            if tree.source not in rows:
                prompt = PromptTree(decode(tree.prompt_ids, skip_special_tokens=True), ())
            elif (row := rows[tree.source]) is not None:
                prompt = row  # with its tools
            else:
                what = "stands for rows of several files, so the reward model cannot tell their prompts apart"
                raise DataError(tree.source, what, "give the data files different names")
            for ids, truncated in zip(tree.completion_ids, tree.truncated, strict=True):
                pairs.append(replace(prompt, completions=(Completion(decode(ids, skip_special_tokens=True)),)))
                unfinished.append(truncated)
        return rewards_of(self.scorer, self._tokenized(pairs, unfinished))

    def _tokenized(self, pairs: Sequence[PromptTree], unfinished: Sequence[bool]) -> list[TokenTree]:
        dataset = Dataset(tuple(pairs), "rollouts", "pairs", len(pairs), (), "")
        if self.encoder:
            return list(tokenize_text_pairs(dataset, self.tokenizer, max_length=self.max_length).trees)
        # a completion may be empty; if the reward model was trained without EOS too, only the prompt is left
        is_empty = [not self.add_eos and not p.completions[0].text for p in pairs]
        if any(is_empty):
            filled = [
                replace(p, completions=(Completion("."),)) if n else p for p, n in zip(pairs, is_empty, strict=True)
            ]
            dataset = replace(dataset, trees=tuple(filled))
        token_trees: Sequence[TokenTree] = tokenize(
            dataset,
            self.tokenizer,
            template=self.template,
            max_length=self.max_length,
            add_eos=self.add_eos,
            template_options=self.template_options,
            strict=False,
        ).trees
        token_trees = [
            replace(t, completion_ids=(t.completion_ids[0][:0],)) if n else t
            for t, n in zip(token_trees, is_empty, strict=True)
        ]
        end_tokens = end_ids(self.tokenizer)
        return [
            _without(end_tokens, t) if truncated else t for t, truncated in zip(token_trees, unfinished, strict=True)
        ]


def _without(ends: frozenset[int], tree: TokenTree) -> TokenTree:
    ids = tree.completion_ids[0]
    return replace(tree, completion_ids=(ids[:-1],)) if len(ids) > 1 and int(ids[-1]) in ends else tree


def rewards_of(scorer: RewardScorer, trees: Sequence[TokenTree]) -> list[float]:
    """The reward of every completion, tree by tree, without gradient."""
    if not trees:
        return []
    device = place_of(scorer.model)
    rewards: list[list[float]] = [[] for _ in trees]
    training = scorer.model.training
    scorer.model.eval()
    with torch.no_grad():
        passes = run_passes(
            scorer.rewards, trees, TOKENS_PER_STEP, shared=scorer.shared, device=device, lanes=scorer.side_by_side
        )
        for members, values in passes:
            sizes = [len(trees[i].completion_ids) for i in members]
            for i, part in zip(members, values.cpu().double().split(sizes), strict=True):
                rewards[i] = part.tolist()
    scorer.model.train(training)
    return [r for tree_rewards in rewards for r in tree_rewards]


def make_scorer(
    model: Any,
    encoder: bool,
    tokenizer: Any,
    packing: str,
    kernels: str,
    attention: str = "auto",
    runs_as: tuple[torch.device, torch.dtype] | None = None,
) -> tuple[RewardScorer, str]:
    """The scorer for a reward model, and a sentence for the log; `runs_as` as for `choose_packing`."""
    if encoder:
        if attention in ("varlen", "flex"):
            what = f"{attention} is for packed rows of causal models, and this is an encoder"
            raise ConfigError("model.attention", what, "set model.attention=auto")
        scorer = EncoderRewards(model, pair_format(tokenizer))
        return scorer, f"packing: {scorer.packing}"
    causal_scorer, note = choose_packing(model, packing, kernels, attention, runs_as)
    return CausalRewards(causal_scorer), note


# ---- loading ----


def find_reward_model(path: str) -> Path | None:
    """The model folder behind a reward's name: a run's best or last checkpoint, or the folder itself; None for other rewards."""
    folder = Path(path).expanduser()
    if kind_of(path) is not None or not folder.is_dir():
        return None
    if not (folder / CHECKPOINTS).is_dir() and not (folder / CONFIG).exists():
        return folder
    last, _ = latest_checkpoint(folder)
    if last is None:
        raise CheckpointError(path, "this run has no checkpoint yet", "train the reward model first")
    best = checkpoint_state(last).get("best_step")
    by_name = {p.name: p for p in checkpoints(folder)}
    return by_name.get(f"step-{best}", last) / "model"


def check_reward_folder(name: str, folder: Path) -> Any:
    """The model config of a folder used as a reward.

    Raises:
        ConfigError: it holds another kind of model. ModelError: it holds no model.
    """
    config = load_model_config(str(folder))
    if not is_reward_model(config):
        kind = ", ".join(architectures_of(config)) or "no architecture named"
        how = "give the run folder of one, trained with algorithm.name=reward_model, or a classifier with one label"
        raise ConfigError("reward", f"{name} is not a reward model ({kind})", how)
    return config


def load_reward_function(name: str, folder: Path, device: torch.device, policy: PolicyText | None) -> RewardModel:
    """Load a reward model from its folder, in the dtype it was saved in; raises as `check_reward_folder` does."""
    config = check_reward_folder(name, folder)
    loaded = load_reward_model(ModelConfig(path=str(folder)), device)
    if loaded.fresh:
        raise ModelError(str(folder), f"its weights lack {', '.join(loaded.fresh)}", "give a whole reward model")
    dtype = next((d for d in DTYPES.values() if d == getattr(config, "dtype", None)), torch.float32)
    cast_parameters(loaded.model, dtype)
    loaded.model.requires_grad_(False).eval()
    tokenizer = load_tokenizer(str(folder))
    scorer, _ = make_scorer(loaded.model, loaded.encoder, tokenizer, "auto", "auto")
    path = folder / SETTINGS
    settings = read_object(path) if path.exists() else {}
    return RewardModel(
        scorer,
        tokenizer,
        loaded.encoder,
        str(settings.get("template", "auto")),
        int(settings.get("max_length") or context_of(config, tokenizer) or 1024),
        bool(settings.get("add_eos", tokenizer.eos_token_id is not None)),
        policy,
        dict(settings.get("template_options", {})),
    )


def content_sha256(name: str) -> str | None:
    """SHA-256 of a reward's Python file, or of its model's weights and JSON files; None for a built-in reward."""
    folder = find_reward_model(name)
    file = Path(name.rpartition(":")[0]).expanduser()
    if folder is None and (not name.rpartition(":")[0] or not file.is_file()):
        return None
    files = [file] if folder is None else sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


def contents_beside(name: str) -> dict[str, str]:
    """SHA-256 of a reward's other contents by file: modules that its Python file imports, or its model's remaining files."""
    folder = find_reward_model(name)
    if folder is None:
        return imported_sha256(name) if is_own(name) and own_file(name).is_file() else {}
    return {
        p.name: file_sha256(p) for p in sorted(folder.iterdir()) if p.suffix in (".jinja", ".txt", ".model", ".bin")
    }


def reward_writes_date(name: str) -> bool:
    """Whether a reward is a model whose chat template inserts today's date."""
    folder = find_reward_model(name)
    files = [] if folder is None else [*folder.glob("*.jinja"), folder / "tokenizer_config.json"]
    return any(DATE in p.read_text(encoding="utf-8", errors="replace") for p in files if p.is_file())


# ---- Parts specific to training a reward model: its tokens, its model, its folder ----

SMALL_ENCODER = 50_000_000  # parameters


@dataclass
class RewardModelParts:
    """Parts for training a reward model from a causal model, an encoder or another reward model.

    Args:
        model_config, data, lora: the run's sections; tokenizer: the model's own.
    """

    model_config: ModelConfig
    data: DataConfig
    lora: LoraConfig | None
    tokenizer: Any

    def __post_init__(self) -> None:
        if not self.encoder:
            choose_padding(self.tokenizer)

    @cached_property
    def encoder(self) -> bool:
        path = self.model_config.path
        return is_encoder(load_model_config(path, self.model_config.revision), path)

    @cached_property
    def max_length(self) -> int:
        """Maximum tokens per row: `data.max_length`, or an encoder's own limit if that is lower."""
        if not self.encoder:
            return self.data.max_length
        config = load_model_config(self.model_config.path, self.model_config.revision)
        return min(self.data.max_length, context_of(config, self.tokenizer) or self.data.max_length)

    def tokenize(self, dataset: Dataset, on_bad_row: str) -> TokenizedDataset:
        options: dict[str, Any] = self.data.model_dump(include={"truncation", "identical"})
        options |= {"max_length": self.max_length, "on_bad_row": on_bad_row}
        if self.encoder:
            return tokenize_text_pairs(dataset, self.tokenizer, **options)
        options |= self.data.model_dump(include={"template", "template_options", "add_eos"})
        return tokenize(dataset, self.tokenizer, **options)

    def load(self, device: torch.device, seed: int) -> Any:
        """The trainable model in fp32: whole, or an adapter with a head (and any other new weights) trained with it."""
        loaded = load_reward_model(self.model_config, device, seed)
        if not self.encoder:
            set_padding(loaded.model, self.tokenizer)
        if self.lora is None:
            return loaded.model
        heads = [name for name in HEADS if hasattr(loaded.model, name)]
        return add_lora(loaded.model, self.lora, seed, task="SEQ_CLS", whole=sorted({*loaded.fresh, *heads}))

    def save(
        self,
        model: Any,
        folder: Path,
        whole: Mapping[str, Tensor] | None,
        sharded: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the model; the last two arguments are those of `save_reward_model`."""
        settings = {
            "template": self.data.template,
            **({"template_options": self.data.template_options} if self.data.template_options else {}),
            "max_length": self.max_length,
            "add_eos": self.data.add_eos and self.tokenizer.eos_token_id is not None,
        }
        save_reward_model(model, self.tokenizer, folder, settings, whole, sharded)

    def encoder_lr(self, parameters: int) -> float:
        """Peak learning rate of a whole encoder for ``lr: auto``; higher for small ones."""
        return 5e-5 if parameters < SMALL_ENCODER else 2e-5
