"""One run, composed: data, model, packing, reference, algorithm, loop, report. Reads from top to bottom."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from penchant.algorithms.build import OnlineAlgorithm, build_online, start_value
from penchant.algorithms.offline import Component, Offline
from penchant.algorithms.options import OnlineConfig, PPOConfig, RewardModelConfig
from penchant.algorithms.reward_model import RewardTraining
from penchant.base.files import read_jsonl
from penchant.base.machine import cores
from penchant.config import WATCHING_ONLY, RunConfig, default_settings, dump_config, with_absolute_paths
from penchant.data.adapt import adapt, mismatch
from penchant.data.audit import audit as run_audit
from penchant.data.audit.findings import Audit
from penchant.data.cached import DataCache
from penchant.data.load import Dataset, layout_line, summary, write_quarantine
from penchant.data.mapped import StoredTokens, first_completions, label_counts
from penchant.data.tokenize import TokenizedDataset
from penchant.errors import CheckpointError, ConfigError, DataError, PenchantError
from penchant.logprobs import Scorer
from penchant.logprobs.packing import choose_packing
from penchant.logprobs.reference import (
    CachedReference,
    LiveReference,
    MovingReference,
    Reference,
    adapter_off,
    cache_key,
    cached_reference,
    default_cache_dir,
    joined,
)
from penchant.losses.schedules import progress_at
from penchant.metrics.completions import (
    START_FILE,
    Fresh,
    Written,
    completion_figures,
    evaluate_online,
    gain_figures,
    keep_start,
    kept_start,
    kl_on,
    rows_of,
)
from penchant.metrics.flags import write_flags
from penchant.metrics.flags.rule import Flag
from penchant.metrics.heldout import heldout_metrics, pair_quality, score_heldout
from penchant.models.load import (
    add_lora,
    cast_parameters,
    effective_weights,
    load_causal_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    save_model,
    weights_sha256,
    write_state_dict,
)
from penchant.models.options import ModelConfig
from penchant.models.reward import ValueModel
from penchant.rewards import load_reward
from penchant.rewards.reward_model import PolicyText, RewardModelParts, RewardScorer, content_sha256, make_scorer
from penchant.runfolder import RunLock, finite, open_run
from penchant.runs.record import hardware, tokenizer_sha256, versions
from penchant.runs.sharing import Alone, Key
from penchant.track import Mirrors, check_installed
from penchant.training.checkpoint import find_checkpoint, latest_checkpoint, load_checkpoint
from penchant.training.console import console
from penchant.training.loop import Interrupted, Loop, Paused, algorithm_state
from penchant.training.optim import MasterAdamW
from penchant.training.steps import BatchSchedule
from penchant.types import Prompt, Scored, TokenTree

SMALL_MODEL = 20_000_000  # parameters; below this a second thread costs more in waiting than it brings
DEFAULT_LR = {("sft", False): 2e-5, ("sft", True): 2e-4}
DEFAULT_PREFERENCE_LR = {False: 1e-6, True: 5e-5}
# needs of a loss that change nothing in the log-probs that a pass over held-out rows leaves
SCORED_ALIKE = frozenset({"reference", "scores", "score_gap", "labels", "delta", "batch"})


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished run leaves.

    Args:
        folder: the run folder; model: the last checkpoint's model folder, which transformers or peft loads as it is.
        steps: optimizer steps done; before, after: held-out metrics at step 0 and at the end (empty without a held-out set).
        best_step: the step of the best checkpoint, or None; flags: what to know before trusting it, warnings first.
    """

    folder: Path
    model: Path
    steps: int
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    best_step: int | None
    flags: tuple[Flag, ...] = ()


class Run:
    """Everything between a config and a result; parts are made when they are first needed.

    Args:
        shared: keeps what other runs of this process can use as it is; it changes no figure.
        pause_at: an optimizer step at which training pauses, see `Loop`; a later call goes on from there.
    """

    def __init__(
        self, config: RunConfig, *, quiet: bool = False, shared: Alone | None = None, pause_at: int | None = None
    ) -> None:
        self.config = config = with_absolute_paths(config)
        self.shared = Alone() if shared is None else shared
        self.folder = Path(config.output)
        self.pause_at = pause_at
        self.console = console(quiet)
        self.online = config.algorithm if isinstance(config.algorithm, OnlineConfig) else None
        self.learns_reward = config.algorithm if isinstance(config.algorithm, RewardModelConfig) else None
        self.specs = [c.spec for c in config.loss.components] if config.algorithm is None else []
        self.method = "+".join(s.name for s in self.specs) if config.algorithm is None else config.algorithm.name
        needs: frozenset[str] = frozenset().union(*(s.needs for s in self.specs))
        if self.learns_reward is not None and self.learns_reward.margin == "scores":
            needs = frozenset({"scores"})
        self.needs = needs if self.online is None else frozenset({"reference"})
        # what the data must be: one loss on labels among them takes pairs apart, one on pairs needs both answers
        signals: set[str] = {s.signal for s in self.specs} or {"prompts" if self.online is not None else "pairs"}
        self.signal = next(s for s in ("pairs", "unpaired", "tokens", "prompts") if s in signals)
        self.device = resolve_device(config.model.device)
        self.dtype = resolve_dtype(config.model.dtype, self.device)
        self.quality: dict[str, Any] = {}  # tables of the last evaluation of a reward model

    # ---- data -----------------------------------------------------------------------------------------------------

    @cached_property
    def data_cache(self) -> DataCache:
        return DataCache(self.config.data.cache != "off", self.console.note)

    @cached_property
    def tokenizer(self) -> Any:
        get = (
            self.shared.once if self.learns_reward is None else self.shared.fresh
        )  # a reward model may add a pad token
        model = self.config.model
        return get(self._tokenizer_key, lambda: load_tokenizer(model.tokenizer or model.path, model.revision))

    @cached_property
    def loaded(self) -> dict[str, Dataset]:
        """What the files hold, with the rows kept aside: ``train``, and ``heldout`` where it has a file of its own."""
        found = {"train": self._load(self.config.data.path)}
        if self.config.data.eval_path is not None:
            found["heldout"] = self._load(self.config.data.eval_path)
        for name, dataset in found.items():
            self.console.note(f"{name}: {summary(dataset)}")
        return found

    @cached_property
    def datasets(self) -> tuple[Dataset, Dataset | None]:
        """(train, held out): as files say, or split off by prompt."""
        data = self.config.data
        train = self.loaded["train"]
        if "heldout" in self.loaded:
            return train, self.loaded["heldout"]
        if data.validation_rows is None and data.validation_fraction is None:
            if self.config.evaluation.reward is not None:
                raise ConfigError(
                    "evaluation.reward",
                    "is set, but nothing is held out whose prompts could be answered",
                    "set data.validation_rows, data.validation_fraction or data.eval_path, or leave it out",
                )
            return train, None
        seed = self.config.train.seed if data.split_seed is None else data.split_seed
        train, heldout = self.shared.once(
            ("split", *_content(train), str(data.path), data.validation_rows, data.validation_fraction, seed),
            lambda: self.data_cache.split(
                self.loaded["train"],
                validation_rows=data.validation_rows,
                validation_fraction=data.validation_fraction,
                seed=seed,
            ),
        )
        self.console.note(f"split by prompt: {train.accepted:,} train, {heldout.accepted:,} held out")
        return train, heldout

    def _load(self, path: Any) -> Dataset:
        data = self.config.data
        reading = data.model_dump(include={"shape", "columns", "on_bad_row", "identical", "limit", "layout_options"})
        dataset = self.shared.once(
            ("rows", str(path), json.dumps(reading, sort_keys=True)), lambda: self.data_cache.load(path, **reading)
        )
        self.console.note(layout_line(dataset, path))
        adapted = adapt(dataset, self.method, self.signal, self.needs, data, str(path))
        if self.signal == "unpaired":
            good, bad = label_counts(adapted.trees)
            self.console.note(f"{path}: {good:,} good and {bad:,} bad answers")
        return adapted

    @cached_property
    def tokenized(self) -> tuple[TokenizedDataset, TokenizedDataset | None]:
        train, heldout = self.datasets
        return self.tokenize_rows(train), None if heldout is None else self.tokenize_rows(heldout)

    def tokenize_rows(self, dataset: Dataset, on_bad_row: str | None = None) -> TokenizedDataset:
        """Rows as this run would train on them."""
        data = self.config.data
        if self.reward_parts is not None:
            return self.reward_parts.tokenize(dataset, on_bad_row or data.on_bad_row)
        how = data.model_dump(include={"template", "max_length", "truncation", "on_bad_row", "identical", "add_eos"})
        how["on_bad_row"] = on_bad_row or data.on_bad_row
        key = ("tokens", *self._tokenizer_key[1:], str(data.path), str(data.eval_path), *_content(dataset))
        return self.shared.once(
            (*key, json.dumps(how, sort_keys=True)), lambda: self.data_cache.tokenize(dataset, self.tokenizer, **how)
        )

    @cached_property
    def trees(self) -> tuple[Sequence[TokenTree], Sequence[TokenTree]]:
        """(train, held out) token trees; rows are numbered through both, so that one reference cache holds both."""
        train, heldout = self.tokenized
        parts: list[Sequence[TokenTree]] = [train.trees, heldout.trees if heldout is not None else ()]
        if self.signal == "tokens":  # SFT on pairs learns the chosen completion only
            parts = [first_completions(part) for part in parts]
        numbered: list[Sequence[TokenTree]] = []
        start = 0
        for part in parts:
            if isinstance(part, StoredTokens):
                numbered.append(part.numbered_from(start))
            else:
                numbered.append([replace(t, row=start + i) for i, t in enumerate(part)])
            start += len(part)
        if not numbered[0]:
            raise DataError(str(self.config.data.path), "no row is left to train on", "look at the quarantine file")
        return numbered[0], numbered[1]

    @cached_property
    def mismatched(self) -> dict[int, TokenTree]:
        """By row: its prompt with a completion of the next row that has another prompt. Rows go on counting behind the others."""
        if "z0" not in self.needs:
            return {}
        found: dict[int, TokenTree] = {}
        offset = sum(map(len, self.trees))
        for trees in self.trees:
            partners = mismatch([t.prompt_ids.tobytes() for t in trees])
            if partners is None and trees:
                raise DataError(
                    str(self.config.data.path),
                    "all rows have the same prompt, so KTO's reference point cannot be estimated",
                    "give data with at least two prompts (in the held-out part too), or choose bco or pmpo",
                )
            for tree, partner in zip(trees, partners or [], strict=True):
                other = trees[partner]
                ids = other.completion_ids[tree.row % len(other.completion_ids)]
                room = max(1, self.config.data.max_length - len(tree.prompt_ids))
                found[tree.row] = TokenTree(offset + tree.row, tree.prompt_ids, (ids[:room],), (len(ids) > room,))
        return found

    def audit(self, tokenize: bool = True, *, languages: bool = False, counters: Sequence[Any] = ()) -> Audit:
        """The data audit, over every split; `counters` are further accumulators (they are no part of what runs share)."""
        train, heldout = self.datasets
        splits = {"train": train} | ({"held out": heldout} if heldout is not None else {})
        whole, path = self.loaded["train"], self.config.data.path

        def made() -> Audit:
            tokens = self.tokenize_rows(whole, on_bad_row="skip") if tokenize else None
            if counters:
                return run_audit(whole, tokens, splits, path, languages=languages, counters=counters)
            return self.data_cache.audit(whole, tokens, splits, path, languages=languages)

        if counters:
            return made()  # a person's own functions are in no key
        return self.shared.once(("audit", tokenize, languages, *_content(whole), *self._rows_key), made)

    # ---- what parts depend on: keys of what runs can share -------------------------------------------------------------

    @property
    def _tokenizer_key(self) -> Key:
        model = self.config.model
        return ("tokenizer", model.tokenizer or model.path, model.revision)

    @property
    def _rows_key(self) -> Key:
        """Everything that the token trees depend on."""
        content = [_content(d) for d in self.datasets if d is not None]
        method = "rows" if self.learns_reward is None else self.method
        return (method, self.signal, self._tokenizer_key, self.config.data.model_dump_json(), *content)

    def _weights_key(self, source: ModelConfig) -> Key:
        """Everything that a model's weights in fp32 depend on before it is trained."""
        seed = self.config.train.seed if source.init == "random" else None
        return (source.path, source.revision, source.init, seed)

    @property
    def _start_key(self) -> Key:
        """Everything that figures of the untrained policy depend on, apart from the rows and from what is asked of them."""
        cfg = self.config
        adapter = None if cfg.lora is None else (cfg.lora.model_dump_json(), cfg.train.seed)
        t = cfg.train
        held = (str(self.device), str(self.dtype), cfg.model.kernels, t.packing, t.gradient_checkpointing, t.threads)
        return (
            self._weights_key(cfg.model),
            adapter,
            *held,
            self.learns_reward is None,
            cfg.reference.model_dump_json(),
        )

    # ---- model ----------------------------------------------------------------------------------------------------

    @cached_property
    def reward_parts(self) -> RewardModelParts | None:
        """What training a reward model has of its own; None for every other method."""
        cfg = self.config
        if self.learns_reward is None:
            return None
        parts = RewardModelParts(cfg.model, cfg.data, cfg.lora, self.tokenizer)
        if parts.max_length < cfg.data.max_length:
            self.console.note(
                f"data.max_length {cfg.data.max_length} is beyond the encoder: rows have {parts.max_length}"
            )
        return parts

    @cached_property
    def model(self) -> Any:
        """The trained model: fp32 as loaded, with its adapter; `optimizer` takes the masters, then it is cast."""
        cfg = self.config
        model = self._untrained_model()
        self.set_threads(sum(p.numel() for p in model.parameters()))
        self._check_vocabulary(model)
        if cfg.lora is not None and self.reward_parts is None:
            model = add_lora(model, cfg.lora, cfg.train.seed)
        if cfg.train.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if cfg.lora is not None:
                model.enable_input_require_grads()
        return model

    def _untrained_model(self) -> Any:
        """As loaded, in fp32; a reward model has its adapter already, for its head is trained with it."""
        if self.reward_parts is not None:
            return self.reward_parts.load(self.device, self.config.train.seed)
        return self._fresh_model(self.config.model)

    def _fresh_model(self, source: ModelConfig) -> Any:
        """A causal model as loaded, in fp32, of which nobody else holds a part."""
        if type(self.shared) is Alone:
            return load_causal_model(source, self.device, self.config.train.seed)
        key: Key = ("model", *self._weights_key(source))
        seed = self.config.train.seed
        kept = self.shared.fresh(key, lambda: load_causal_model(source, torch.device("cpu"), seed))
        return kept.to(self.device)

    def set_threads(self, parameters: int) -> None:
        """As `train.threads` says for a model of this size."""
        torch.set_num_threads(self.threads_for(parameters))

    def threads_for(self, parameters: int) -> int:
        threads = self.config.train.threads
        if threads == "auto":
            return 1 if parameters < SMALL_MODEL else cores()
        return int(threads)

    def _check_vocabulary(self, model: Any) -> None:
        rows = model.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) > rows:
            raise ConfigError(
                "model.tokenizer",
                f"the tokenizer has {len(self.tokenizer):,} tokens but the model's embedding only {rows:,}",
                "give the tokenizer that the model was trained with",
            )
        limit = getattr(model.config, "max_position_embeddings", None)
        wanted = self.config.data.max_length if self.reward_parts is None else self.reward_parts.max_length
        if limit is not None and wanted > limit:
            raise ConfigError(
                "data.max_length",
                f"{wanted} is beyond the model's context of {limit}",
                f"set it to at most {limit}",
            )

    @cached_property
    def optimizer(self) -> MasterAdamW:
        t = self.config.train
        value = [(f"value.{name}", p) for name, p in self.value.named_parameters()] if self.value is not None else []
        made = MasterAdamW(
            [*self.model.named_parameters(), *value],
            dtype=self.dtype,
            betas=(t.adam_beta1, t.adam_beta2),
            eps=self.online.adam_eps if isinstance(self.online, PPOConfig) else t.adam_eps,
            weight_decay=t.weight_decay,
        )
        cast_parameters(self.model, self.dtype)
        if self.value is not None and self.value.backbone is not None:
            cast_parameters(self.value.backbone, self.dtype)
        return made

    @cached_property
    def value(self) -> ValueModel | None:
        """PPO's value: a head on the policy's hidden states, or a model of its own that starts as the policy does."""
        if not isinstance(self.online, PPOConfig):
            return None
        own = None
        if self.online.value == "separate":
            own = self._fresh_model(self.config.model)
        made = ValueModel(self.model.get_input_embeddings().weight.shape[1], own)
        if own is not None and self.online.value_init != "zero":
            assert self.config.reward is not None
            demanded = self.online.value_init == "reward"
            self.console.note(start_value(made, self.config.reward, self.tokenizer, demanded=demanded))
        return made.to(self.device)

    @cached_property
    def reward_scorer(self) -> RewardScorer:
        """The model as reward training and its evaluation see it."""
        _ = self.optimizer  # masters are taken before the cast
        assert self.reward_parts is not None
        train = self.config.train
        scorer, note = make_scorer(
            self.model, self.reward_parts.encoder, self.tokenizer, train.packing, self.config.model.kernels
        )
        self.console.note(note)
        return scorer

    @property
    def engine(self) -> Scorer | RewardScorer:
        """What runs the trained model: how rows are packed is its business."""
        return self.scorer if self.learns_reward is None else self.reward_scorer

    @cached_property
    def scorer(self) -> Scorer:
        _ = self.optimizer  # masters are taken before the cast
        kernels = self.config.model.kernels
        found: list[Scorer] = []

        def choose() -> tuple[Any, str]:
            scorer, note = choose_packing(self.model, self.config.train.packing, kernels)
            found.append(scorer)
            return scorer.packing, note

        packing, note = self.shared.once(("packing", self._start_key), choose)
        self.console.note(note)
        return found[0] if found else Scorer(self.model, packing, kernels)

    # ---- reference ------------------------------------------------------------------------------------------------

    @cached_property
    def reference_kind(self) -> str:
        kind = self.config.reference.kind
        if kind == "auto" and self.config.reference.moves:
            kind = "frozen"
        elif kind == "auto" and self.config.lora is None and (self.online or "divergence" in self.needs):
            kind = "frozen"  # a cache holds neither whole distributions nor completions that are yet to be written
        elif kind == "auto":
            kind = "adapter" if self.config.lora is not None and self.config.reference.path is None else "cached"
        if kind == "adapter" and (self.config.lora is None or self.config.reference.path is not None):
            raise ConfigError(
                "reference.kind",
                "adapter means the model with its LoRA adapter off",
                "add a lora section and no reference.path",
            )
        return kind

    @cached_property
    def reference(self) -> Reference | None:
        cfg = self.config.reference
        if "reference" not in self.needs:
            if cfg.moves:
                raise ConfigError(
                    "reference", f"{self.method} has no reference that could move", "leave out ema and sync_every"
                )
            return None
        if cfg.moves:
            every, mixup = (cfg.sync_every, cfg.sync_mixup) if cfg.ema is None else (1, 1.0 - cfg.ema)
            return MovingReference(
                self._frozen_scorer(),
                policy=lambda: effective_weights(self.model, self.optimizer.masters),
                every=int(every or 1),
                mixup=mixup,
            )
        if self.reference_kind == "adapter":
            return adapter_off(self.scorer)
        if self.reference_kind == "frozen":
            return LiveReference(self._frozen_scorer())
        return self._cached_reference()

    def _frozen_scorer(self, start: bool = False) -> Scorer:
        """A frozen model in the policy's precision: the reference, or the `start` of training where they differ."""
        source = self.config.model
        if self.config.reference.path is not None and not start:
            source = source.model_copy(update={"path": self.config.reference.path, "init": "pretrained"})
        model = self._fresh_model(source)
        cast_parameters(model, self.dtype)
        model.requires_grad_(False).eval()
        # the policy's own numeric path: with an adapter it has no fast one, and the start would not be equal
        return Scorer(model, self.scorer.packing, "auto" if self.scorer.fast else "off")

    def _cached_reference(self) -> CachedReference:
        """From disk, or computed now: with the initial policy itself where it is the reference, so no copy is held."""
        cfg = self.config
        live = LiveReference(self.scorer) if cfg.lora is None else adapter_off(self.scorer)
        if cfg.reference.path is not None:
            live = LiveReference(self._frozen_scorer())
        found_for: list[CachedReference] = []
        for name, (trees, path) in self.cache_paths(live.scorer.model).items():
            progress = self.console.counter(f"reference log-probs of {name} rows")
            cached, found = cached_reference(
                live,
                trees,
                path.stem,
                path.parent,
                tokens_per_step=cfg.train.tokens_per_step,
                tokens="shared_logps" in self.needs,
                progress=progress,
            )
            verb = "read from cache" if found else "computed and cached"
            self.console.note(f"reference log-probs of {len(trees):,} {name} rows: {verb}")
            found_for.append(cached)
        return joined(found_for)

    def cache_paths(self, reference: Any) -> dict[str, tuple[Sequence[TokenTree], Path]]:
        """By name of the rows: them, and the file that holds (or will hold) their log-probs under this reference model."""
        cfg = self.config
        folder = Path(cfg.reference.cache_dir).expanduser() if cfg.reference.cache_dir else default_cache_dir()
        source = cfg.model
        if cfg.reference.path is not None:
            source = source.model_copy(update={"path": cfg.reference.path, "init": "pretrained"})
        weights = self._weights_sha256(reference, source)
        groups = {"training": self.trees[0], "held-out": self.trees[1], "mismatched": list(self.mismatched.values())}
        how = {"dtype": str(self.dtype), "tokenizer": tokenizer_sha256(self.tokenizer), "template": cfg.data.template}
        return {
            name: (trees, folder / f"{cache_key(weights, trees, **how)}.safetensors")
            for name, trees in groups.items()
            if trees
        }

    def _weights_sha256(self, model: Any, source: ModelConfig) -> str:
        """Of an untrained model that was loaded from `source`."""
        key = ("sha256", *self._weights_key(source), str(self.dtype))
        if self.learns_reward is not None:  # its head depends on the seed
            return weights_sha256(model)
        return self.shared.once(key, lambda: weights_sha256(model))

    # ---- the verbs ------------------------------------------------------------------------------------------------

    @cached_property
    def algorithm(self) -> Offline | OnlineAlgorithm | RewardTraining:
        if self.online is not None:
            return self._online(self.online)
        if self.learns_reward is not None:
            _ = self.reference  # there is none; settings that would move it are refused
            return RewardTraining(self.reward_scorer, self.learns_reward)
        loss = self.config.loss
        components = [
            Component(spec, c.params, c.weight, c.schedules)
            for spec, c in zip(self.specs, loss.components, strict=True)
        ]
        return Offline(
            self.scorer,
            components,
            self.reference,
            nll_weight=loss.nll_weight,
            average_log_prob=loss.average_log_prob,
            mismatched=self.mismatched,
            tokens_per_step=self.config.evaluation.tokens_per_step or self.config.train.tokens_per_step,
        )

    def _online(self, online: OnlineConfig) -> OnlineAlgorithm:
        if self.reference_kind == "cached":
            raise ConfigError(
                "reference.kind",
                "a cache does not hold completions that are yet to be written",
                "set reference.kind=frozen (or adapter, with LoRA)",
            )
        reference = self.reference
        assert isinstance(reference, LiveReference) and self.config.reward is not None
        return build_online(
            online,
            self.config.reward,
            self.scorer,
            reference,
            PolicyText(self.tokenizer, self.config.data.template, self._prompts()),
            self.value,
            longest_prompt=max(len(t.prompt_ids) for part in self.trees for t in part),
            seed=self.config.train.seed,
            tokens_per_step=self.config.train.tokens_per_step,
        )

    def _prompts(self) -> dict[str, Prompt]:
        """Every prompt as the data has it, by its row's source."""
        return {t.source: t.prompt for d in self.datasets if d is not None for t in d.trees}

    @property
    def peak_lr(self) -> float:
        lr = self.config.train.lr
        if lr != "auto":
            return float(lr)
        if self.reward_parts is not None:
            return self.reward_parts.default_lr(sum(p.numel() for p in self.model.parameters()))
        lora = self.config.lora is not None
        return DEFAULT_LR["sft", lora] if self.signal == "tokens" else DEFAULT_PREFERENCE_LR[lora]

    def _evaluate_now(self, step: int = 0, keep: bool = False) -> dict[str, Any]:
        budget = self.config.evaluation.tokens_per_step or self.config.train.tokens_per_step
        if isinstance(self.algorithm, RewardTraining):
            return self._evaluate_reward(self.algorithm, budget)
        if not isinstance(self.algorithm, Offline):
            rewards_of_start = partial(self._online_start_rewards, step, keep)
            start = self._start_reference()
            return evaluate_online(
                self.algorithm.writer, self.scorer, start, self.trees[1], budget, rewards_of_start=rewards_of_start
            )
        algorithm = self.algorithm
        if (
            self.config.reference.moves
        ):  # rewards against a reference that went along would say nothing of what was learned
            algorithm = replace(algorithm, reference=self._start_reference())
        trees = self.trees[1]
        at = progress_at(max(0, step - 1), self.schedule.total_steps)

        def score() -> tuple[Scored, list[int]]:
            return score_heldout(
                algorithm,
                trees,
                shared=self.scorer.shared,
                tokens_per_step=budget,
                device=self.device,
                at=at,
                progress=self.console.counter("held-out rows"),
            )

        if step == 0 and self.needs <= SCORED_ALIKE and not self.config.reference.moves:
            # the start's log-probs are the same under every loss; what a loss makes of them is not
            algorithm.begin_step(0, at, trees)
            rows = ("start", self._start_key, self._rows_key, tuple(sorted(self.needs)), budget)
            scored, order = self.shared.once(rows, score)
        else:
            scored, order = score()
        metrics = heldout_metrics(algorithm, scored, [trees[i] for i in order])
        if self.writes_fresh:
            metrics |= {f"eval/{name}": value for name, value in self._fresh_figures(step, budget, keep).items()}
        return metrics

    def _evaluate_reward(self, algorithm: RewardTraining, budget: int) -> dict[str, Any]:
        """Loss and accuracy on held-out pairs, calibration, and what length has to do with it; tables go to `quality`."""
        trees = self.trees[1]
        scored, order = score_heldout(
            algorithm,
            trees,
            shared=algorithm.scorer.shared,
            tokens_per_step=budget,
            device=self.device,
            progress=self.console.counter("held-out rows"),
        )
        metrics = heldout_metrics(algorithm, scored, [trees[i] for i in order])
        rewards, lengths = (v.double().cpu().numpy().reshape(-1, 2) for v in (scored.policy_logps, scored.lengths))
        flat, self.quality = pair_quality(rewards[:, 0] - rewards[:, 1], lengths[:, 0] - lengths[:, 1])
        return metrics | flat

    def _evaluate_in_training(self, step: int) -> dict[str, Any]:
        metrics = self._evaluate_now(step, keep=True)
        if self.quality:
            (self.folder / "calibration.json").write_text(json.dumps({"step": step, **self.quality}, indent=1))
        return metrics

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; needs the data, and no model."""
        return self.schedule.total_steps

    @property
    def schedule(self) -> BatchSchedule:
        """Which rows each optimizer step trains on."""
        t = self.config.train
        return BatchSchedule(len(self.trees[0]), t.batch_size, t.epochs, t.max_steps, t.seed, t.shuffle, self._updates)

    @property
    def _updates(self) -> int:
        """Optimizer steps on each batch of prompts."""
        return 1 if self.online is None else self.online.updates

    # ---- completions that the policy writes at evaluations ----------------------------------------------------------------

    @property
    def writes_fresh(self) -> bool:
        """Whether held-out prompts are answered at evaluations: methods on completions always, SFT where somebody judges."""
        if not self.config.evaluation.kl_prompts or self.datasets[0].kind == "text":
            return False
        return self.signal != "tokens" or self.config.evaluation.reward is not None

    @cached_property
    def fresh(self) -> Fresh:
        """What is asked of the policy at every evaluation, and who judges it."""
        cfg = self.config
        sources: dict[tuple[int, ...], str] = {}
        for tree in self.trees[1]:
            sources.setdefault(tuple(tree.prompt_ids.tolist()), tree.source)
        prompts = list(sources)[: cfg.evaluation.kl_prompts]
        reward, judge = cfg.evaluation.reward, None
        if reward is not None:
            judge = load_reward(reward, PolicyText(self.tokenizer, cfg.data.template, self._prompts()), self.device)
        return Fresh(
            self.tokenizer,
            prompts,
            [sources[p] for p in prompts],
            cfg.evaluation.sample_tokens,
            cfg.train.seed,
            judge,
            None if reward is None else [reward.model_dump(mode="json"), reward_contents(cfg)],
        )

    def _fresh_figures(self, step: int, budget: int, keep: bool) -> dict[str, Any]:
        """KL to the start (or reference.path), length and variety of sampled completions, and their reward against the start's.

        Where no model to compare with is held, one is loaded and let go again.
        """
        fresh = self.fresh

        def estimate() -> tuple[Written, dict[str, Any]]:
            written = fresh.write(self.scorer.model, step)
            if self.signal == "tokens":
                return written, {}
            policy = LiveReference(self.scorer)
            return written, kl_on(policy, self._start_reference(), written.trees, tokens_per_step=budget)

        asked = ("start completions", self._start_key, self._rows_key, json.dumps(fresh.asked, sort_keys=True), budget)
        written, metrics = estimate() if step else self.shared.once(asked, estimate)
        metrics = metrics | completion_figures(written)
        if written.rewards is None:
            return metrics
        return metrics | gain_figures(written.rewards, self._start_rewards(written if step == 0 else None, keep))

    def _start_rewards(self, written: Written | None, keep: bool) -> np.ndarray:
        """What the start's completions of the same prompts were worth; asked once and kept, so that a resumed run has the same.

        Args:
            written: the start's own, where the policy is still the start; keep: whether they may be written into the run's folder.
        """
        path = self.folder / START_FILE
        if written is None:
            found = kept_start(path, self.fresh.asked)
            if found is not None:
                return found
            start = self._start_policy()
            with start.off():
                written = self.fresh.write(start.scorer.model, 0)
        if keep:
            keep_start(path, self.fresh.asked, rows_of(written, self.tokenizer))
        assert written.rewards is not None
        return written.rewards

    def _online_start_rewards(self, step: int, keep: bool, rewards: np.ndarray) -> np.ndarray | None:
        """The same for an online method, which is judged by its own reward; None where the start was not evaluated."""
        assert self.online is not None and self.config.reward is not None
        judge = [self.config.reward.model_dump(mode="json"), reward_contents(self.config)]
        prompts = [t.prompt_ids.tolist() for t in self.trees[1]]
        sampling = self.online.model_dump(mode="json", include={"temperature", "top_p", "top_k", "missing_eos_penalty"})
        seed, longest = self.config.train.seed, self.online.max_new_tokens
        asked = {**Fresh(self.tokenizer, prompts, [], longest, seed, None, judge).asked, **sampling}
        path = self.folder / START_FILE
        if step:
            return kept_start(path, asked)
        if keep:
            keep_start(path, asked, [{"reward": float(r)} for r in rewards])
        return rewards

    def _start_policy(self) -> LiveReference:
        """The model that training starts from, whatever reference.path says; it may be loaded for this."""
        if self.config.reference.path is None:
            return self._start_reference()
        if self.config.lora is not None:
            return adapter_off(self.scorer)
        return LiveReference(self._frozen_scorer(start=True))

    def _start_reference(self) -> LiveReference:
        """The model that training starts from (or reference.path), run live; it may be loaded for this."""
        if type(self.reference) is LiveReference:
            return self.reference
        if self.config.lora is not None and self.config.reference.path is None:
            return adapter_off(self.scorer)
        return LiveReference(self._frozen_scorer())

    def train(self) -> TrainResult:
        """Train to the end (resuming by itself), evaluate, sample, write the report."""
        from penchant.report import LiveReport

        started = time.time()
        live = LiveReport(self.folder, self.console.note)
        check_installed(self.config.logging.trackers)
        rewards = reward_contents(self.config) | loss_contents(self.config)
        identity = run_identity(self.config, [d.fingerprint for d in self.datasets if d is not None], rewards)
        # a run of an older version did not keep what its rewards were made of: it counts as unchanged
        open_run(self.folder, dump_config(self.config), identity, {"config": default_settings(), **rewards})
        with RunLock(self.folder):
            for name, dataset in self.loaded.items():
                write_quarantine(dataset.quarantined, self.folder, name)
            for name, tokenized in zip(("train", "heldout"), self.tokenized, strict=True):
                if tokenized is not None:
                    self.console.note(f"{name}: {tokenized.summary()}")
                    write_quarantine(tokenized.quarantined, self.folder, f"{name}.tokens")
            if self.writes_fresh and self.trees[1]:
                _ = self.fresh  # a judge that cannot be loaded is met before any work is done
            (self.folder / "audit.json").write_text(json.dumps(self.audit().to_json(), indent=1))
            if latest_checkpoint(self.folder)[0] is None:  # what another start wrote is not this one's
                (self.folder / START_FILE).unlink(missing_ok=True)
            loop = self.make_loop()
            mirrors = self._mirrors()
            loop.watched = self._watchers(live.told, mirrors)
            self._write_manifest(loop, started, status="running")
            before = self._samples("before", lambda: latest_checkpoint(self.folder)[0] is None)
            try:
                loop.run()
            except BaseException as error:
                self._write_manifest(loop, started, *_ended_by(error))
                write_flags(self.folder)
                live.now()
                mirrors.finish(_ended_by(error)[0], finite(loop.state.last_eval))
                raise
            after = self._samples("after", lambda: True)
            self._write_samples(before, after)
            self._write_manifest(loop, started, status="finished")
            flags = write_flags(self.folder)
            live.now()
            mirrors.finish("finished", finite(loop.state.last_eval))
        self.console.note(f"report: {live.path}")
        evals = [line for line in read_jsonl(self.folder / "metrics.jsonl") if line["kind"] == "eval"]
        return TrainResult(
            folder=self.folder,
            model=self.folder / "checkpoints" / f"step-{loop.state.step}" / "model",
            steps=loop.state.step,
            before=evals[0] if evals and evals[0]["step"] == 0 else {},
            after=evals[-1] if evals else {},
            best_step=loop.state.best_step,
            flags=tuple(flags),
        )

    def _mirrors(self) -> Mirrors:
        """The run's trackers, not started."""
        config = self.config.model_dump(mode="json")
        return Mirrors(self.folder, self.config.logging, config, self.console.note)

    def _watchers(self, report: Callable[[str], None], mirrors: Mirrors) -> Callable[[str], None]:
        anew = latest_checkpoint(self.folder)[0] is None

        def told(what: str) -> None:
            if what == "start":
                mirrors.begin(anew=anew)
                return
            report(what)
            mirrors.poll()

        return told

    def make_loop(self) -> Loop:
        """The loop of this run, ready to start; nothing is written before it does."""
        cfg = self.config
        algorithm = self.algorithm  # the reference first: a cached one is computed with the untouched policy
        check = None
        offline = algorithm.reference if isinstance(algorithm, Offline) else None
        if offline is not None and cfg.reference.path is None and cfg.model.init == "pretrained":
            check = self._start_tolerance(offline)
        return Loop(
            model=self.model,
            algorithm=algorithm,
            optimizer=self.optimizer,
            trees=self.trees[0],
            shared=self.engine.shared,
            folder=self.folder,
            train=cfg.train,
            peak_lr=self.peak_lr,
            evaluation=cfg.evaluation,
            checkpoint=cfg.checkpoint,
            logging=cfg.logging,
            write_model=self._write_model,
            console=self.console,
            evaluate=self._evaluate_in_training if self.trees[1] else None,
            start_tolerance=check,
            updates=self._updates,
            pause_at=self.pause_at,
        )

    def _write_model(self, folder: Path) -> None:
        if self.reward_parts is not None:
            self.reward_parts.save(self.model, self.optimizer.masters, folder)
        else:
            save_model(self.model, self.tokenizer, folder)
        if self.config.checkpoint.pt:
            write_state_dict(folder)

    def _start_tolerance(self, reference: Reference) -> tuple[float, float]:
        """Nats per completion and per token; zero when reference and policy run the same kernels on the same batch."""
        if reference.exact:
            return 0.0, 0.0
        # a cache was packed otherwise: rounding errors add up over tokens
        return {torch.bfloat16: (1.0, 0.05), torch.float32: (1e-3, 1e-4), torch.float64: (1e-9, 1e-10)}[self.dtype]

    def evaluate(self, step: str = "last") -> dict[str, Any]:
        """Held-out metrics of a checkpoint (``last``, ``best`` or a number), or of the start (``0``)."""
        if not self.trees[1]:
            raise ConfigError(
                "data", "there is nothing held out to evaluate on", "set data.eval_path or data.validation_rows"
            )
        _ = self.algorithm
        path = find_checkpoint(self.folder, step)
        if path is None and step != "0" and (self.folder / "identity.json").exists():
            raise CheckpointError(
                str(self.folder),
                "this run has no checkpoint yet",
                "train it on, or give --step 0 for the model it starts from",
            )
        if path is not None:
            tensors, _state = load_checkpoint(path)
            self.optimizer.load_state_tensors(tensors)
            self.algorithm.load_state_tensors(algorithm_state(tensors))
        self.model.eval()
        at = 0
        if path is not None:
            at = int(path.name.removeprefix("step-"))
        metrics = {"checkpoint": path.name if path else "start", **self._evaluate_now(at)}
        return metrics | ({"tables": self.quality} if self.quality else {})

    # ---- what a run leaves beside its checkpoints -------------------------------------------------------------------

    def _samples(self, name: str, wanted: Callable[[], bool]) -> list[dict[str, Any]]:
        """Greedy completions of the first held-out prompts; kept in a file, so that a resumed run still has its start."""
        path = self.folder / f"samples.{name}.jsonl"
        count = self.config.evaluation.samples
        trees = self.trees[1] or self.trees[0]
        if not count or self.learns_reward is not None or (self.signal == "tokens" and self.datasets[0].kind == "text"):
            return []
        if not wanted():
            return read_jsonl(path)
        from penchant.rollout.generate import greedy

        self.model.eval()
        prompts = [t.prompt_ids.tolist() for t in trees[:count]]
        longest = self.config.evaluation.sample_tokens

        def write() -> list[str]:
            return greedy(self.model, self.tokenizer, prompts, max_new_tokens=longest)

        asked = ("answers", self._start_key, self._rows_key, bool(self.trees[1]), count, longest)
        texts = self.shared.once(asked, write) if name == "before" else write()
        rows = [
            {"prompt": self.tokenizer.decode(p, skip_special_tokens=True), "completion": c}
            for p, c in zip(prompts, texts, strict=True)
        ]
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        return rows

    def _write_samples(self, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
        with (self.folder / "samples.jsonl").open("w", encoding="utf-8") as out:
            for b, a in zip(before, after, strict=False):
                row = {"prompt": a["prompt"], "before": b["completion"], "after": a["completion"]}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _write_manifest(self, loop: Loop, started: float, status: str, why: str | None = None) -> None:
        data = {
            name: {
                "layout": d.shape,
                "total": d.total,
                "accepted": d.accepted,
                "quarantined": len(d.quarantined),
                "fingerprint": d.fingerprint,
            }
            for name, d in self.loaded.items()
        }
        for name, split in zip(("train split", "held-out split"), self.datasets, strict=True):
            if split is not None:
                data[name] = {"rows": len(split.trees), "fingerprint": split.fingerprint}
        path = self.folder / "manifest.json"
        weights = (
            json.loads(path.read_text())["model"]["sha256"]
            if path.exists()
            else self._weights_sha256(self.model, self.config.model)
        )
        manifest = {
            **versions(),
            "status": status,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
            "seconds": round(time.time() - started, 1),
            "steps": loop.state.step,
            "total_steps": loop.schedule.total_steps,
            **({"why": why} if why is not None else {}),
            "seed": self.config.train.seed,
            "loss": self.method,
            "model": {
                "path": self.config.model.path,
                "sha256": weights,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            },
            "tokenizer_sha256": tokenizer_sha256(self.tokenizer),
            "packing": self.engine.packing + (" (fast path)" if self.engine.fast else ""),
            "reference": self.reference_kind if "reference" in self.needs else None,
            "data": data,
            "hardware": {**hardware(), "device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")},
        }
        path.write_text(json.dumps(manifest, indent=1))


def _ended_by(error: BaseException) -> tuple[str, str | None]:
    """(status, why) of a run that did not come to its end."""
    if isinstance(error, Paused):
        return "paused", f"at step {error.step}"
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        return "interrupted", None
    return "stopped", error.what if isinstance(error, PenchantError) else f"{type(error).__name__}: {error}"


def _content(dataset: Dataset) -> Key:
    """What tells a data set from every other that comes from the same files."""
    return (dataset.fingerprint, dataset.kind, dataset.accepted, dataset.total)


def run_identity(config: RunConfig, fingerprints: list[str], rewards: Mapping[str, str]) -> dict[str, Any]:
    """What must not change when a run is resumed: all settings but those that only watch, the data, and what rewards are made of."""
    settings = config.model_dump(mode="json")
    for section in WATCHING_ONLY:
        settings.pop(section, None)
    settings["data"].pop("cache", None)  # it changes no row
    if settings["algorithm"] is not None and settings["algorithm"].get("value_init") == "auto":
        settings["algorithm"].pop("value_init")  # older runs do not have it
    return {"config": settings, "data": fingerprints, **rewards}


def reward_contents(config: RunConfig) -> dict[str, str]:
    """SHA-256 of every reward's Python file or model, under the name that a person is told when it has changed."""
    rewards = [r for r in (config.reward, config.evaluation.reward) if r is not None]
    names = dict.fromkeys(name for reward in rewards for name in reward.terms)
    return {f"content of reward {name}": found for name in names if (found := content_sha256(name)) is not None}


def loss_contents(config: RunConfig) -> dict[str, str]:
    """The same of every loss that comes from a user's file."""
    return {f"content of loss {name}": sha256 for name, sha256 in config.loss.contents().items()}
