"""Groups of completions sampled from the policy, with their rewards: the training data of every online method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from penchant.algorithms.method import AlgorithmConfig, EvaluationContext, Parts, Rollouts, Signal
from penchant.base.lazy import Tensor, lazy, torch
from penchant.base.machine import moved, place_of
from penchant.data.packing import run_passes
from penchant.distributed.world import current
from penchant.errors import ConfigError, RewardError, RolloutError
from penchant.losses.policy_gradient import importance_weights
from penchant.rollout.options import RolloutConfig
from penchant.types import FURTHER, Algorithm, PackedBatch, PromptTree, TokenTree

if TYPE_CHECKING:
    from penchant.logprobs import Scorer
    from penchant.logprobs import reference as references
    from penchant.logprobs.reference import LiveReference
    from penchant.rewards import Reward
    from penchant.rollout.environment import Stage
    from penchant.rollout.generate import Sample
else:
    references = lazy("penchant.logprobs.reference")


class SamplingConfig(AlgorithmConfig):
    """Sampling settings of a method whose policy writes completions."""

    samples: int = Field(4, ge=1, le=4096, description="completions of each prompt")
    max_new_tokens: int = Field(64, ge=1, le=2**20, description="tokens of a completion")
    temperature: float = Field(1.0, gt=0, description="temperature of sampling and of every log-prob in the update")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the smallest set of tokens with this probability")
    min_p: float = Field(
        0.0, ge=0, lt=1, description="sample tokens of at least this share of the likeliest one's probability"
    )
    top_k: int = Field(0, ge=0, le=10**9, description="sample from this many of the likeliest tokens; 0: all")
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        le=100,
        description="divide the logits of tokens already in the prompt or completion by this; 1: off",
    )

    def check(self, parts: Parts) -> None:
        from penchant.models.load import base_model_of, head_scaling

        config = base_model_of(parts.model).config
        context = getattr(config, "max_position_embeddings", None)
        longest = max(len(t.prompt_ids) for part in parts.trees for t in part) + self.max_new_tokens
        if context is not None and longest > context:
            raise ConfigError(
                "algorithm.max_new_tokens",
                f"the longest prompt and its completion make {longest} tokens, beyond the model's context of {context}",
                "lower it, or data.max_length, which cuts prompts",
            )
        if self.temperature != 1.0 and head_scaling(config)[1] is not None:
            raise ConfigError("algorithm.temperature", "this model caps its logits", "set it to 1.0")


class OnlineConfig(SamplingConfig):
    """An online method, its rollouts and its update. If present, `loss` is not used and `reward` is required."""

    entropy_coef: float = Field(
        0.0,
        ge=0,
        description="weight of the entropy of the policy in the loss (all but online_dpo), exact over the vocabulary",
    )
    beta: float | Literal["auto"] = Field(
        "auto",
        description="weight of the KL to the reference; auto: 0.05 (rloo, ppo), 0.04 (grpo), 0.01 (reinforce_pp), 0.1 (online_dpo), 0 (others)",
    )
    epochs: int = Field(1, ge=1, le=10_000, description="passes over each batch of rollouts")
    minibatches: int = Field(1, ge=1, le=10_000, description="optimizer steps in each pass")
    clip: float = Field(0.2, gt=0, description="clip the probability ratio to 1 +- this")
    clip_high: float | None = Field(None, gt=0, description="upper clip, if it differs from the lower one (DAPO: 0.28)")
    clip_dual: float | None = Field(
        None, gt=1, description="a negative advantage's loss is at most this times its size (dual clip); null: no limit"
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="the standard deviation that rewards are divided by (grpo, dr_grpo, dapo, gspo, cispo); none: Dr. GRPO",
    )
    loss_mean: Literal["sequence", "token", "constant"] = Field(
        "sequence",
        description="grpo and its descendants, reinforce_pp: average over each completion's tokens, over all tokens (DAPO), or divide by a constant",
    )
    missing_eos_penalty: float = Field(
        0.0, ge=0, description="subtracted from the reward of a completion that did not end"
    )

    signal: ClassVar[Signal] = "prompts"
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    takes_reward: ClassVar[bool] = True
    live_reference: ClassVar[bool] = True  # a cache cannot hold completions that are not yet sampled
    metric: ClassVar[str] = "eval/reward"
    default_beta: ClassVar[float] = 0.05
    least_samples: ClassVar[int] = 1  # 2 if completions of one prompt are compared with each other

    @model_validator(mode="after")
    def _check_samples_and_beta(self) -> OnlineConfig:
        if self.samples < self.least_samples:
            raise ValueError(
                f"samples is {self.samples}; {self.name} judges completions of one prompt against each other: give "
                f"{self.least_samples} or more"
            )
        if self.kl_weight < 0:
            raise ValueError(f"beta is {self.kl_weight:g}; give a number of at least 0")
        return self

    @property
    def kl_weight(self) -> float:
        """beta, with auto resolved."""
        return self.default_beta if self.beta == "auto" else float(self.beta)

    @property
    def resolved(self) -> Mapping[str, float]:
        return {"beta": self.kl_weight}

    @property
    def updates(self) -> int:
        """Optimizer steps on each batch of rollouts."""
        return self.epochs * self.minibatches

    def of_later_updates(self, *keys: str, own: Mapping[str, Any] | None = None) -> dict[str, str]:
        """Of `keys`, those that change nothing with one update a batch, as in `idle`; own: values that a method sets by itself."""
        reason = "with one update a batch, whose ratio is 1; raise epochs or minibatches, or leave {} out"
        preset = own or {}
        return {k: reason for k in keys if self.updates == 1 and (k not in preset or getattr(self, k) != preset[k])}

    @property
    def rollouts(self) -> Rollouts:
        return Rollouts(self.samples, self.samples, self.max_new_tokens, self.minibatches)

    def check(self, parts: Parts) -> None:
        SamplingConfig.check(self, parts)
        rows = min(parts.config.train.batch_size, len(parts.trees[0]))
        if self.minibatches > rows:
            what = f"is {self.minibatches}, and a batch of rollouts is of {rows} prompts, each of which is in one minibatch"
            raise ConfigError("algorithm.minibatches", what, f"lower it to at most {rows}, or raise train.batch_size")

    def writer(self, parts: Parts) -> Writer:
        """Create what samples and scores completions; also set the method's temperature on policy and reference."""
        from penchant.rewards import load_reward
        from penchant.rewards.reward_model import PolicyText

        parts.scorer.temperature = parts.live_reference.scorer.temperature = self.temperature
        data = parts.config.data
        policy_text = PolicyText(parts.tokenizer, data.template, parts.asked(), data.template_options)
        reward = load_reward(parts.config.reward, policy_text, parts.device)
        config = parts.config
        if config.rollout.elsewhere and current().many:
            raise ConfigError("rollout.engine", "is not own, and several processes train", "train in one process")
        longest = max((len(t.prompt_ids) for part in parts.trees for t in part), default=1) + self.max_new_tokens
        writer = Writer(parts.model, parts.tokenizer, reward, self, config.train.seed, parts.engine, config.rollout)
        writer.longest, writer.folder = longest, Path(config.output)
        if config.rollout.environment is not None:
            writer.stage = self._stage(parts, policy_text.rows)
        return writer

    def _stage(self, parts: Parts, rows: Mapping[str, PromptTree | None]) -> Stage:
        from penchant.data.templates import end_ids, uses_chat
        from penchant.models.load import base_model_of
        from penchant.rollout.environment import Stage, find_environment

        data, rollout = parts.config.data, parts.config.rollout
        chat, end_tokens = uses_chat(data.template, parts.tokenizer), end_ids(parts.tokenizer, parts.model)
        make_environment = find_environment(rollout.environment)
        context = getattr(base_model_of(parts.model).config, "max_position_embeddings", None)
        return Stage(
            rollout.environment,
            make_environment,
            parts.tokenizer,
            chat,
            data.template_options,
            rows,
            rollout.turns,
            end_tokens,
            rollout.environment_timeout,
            context,
        )

    def evaluate(self, held_out: EvaluationContext) -> dict[str, Any]:
        """Reward, win rate against the start and KL, on one completion per held-out prompt."""
        from penchant.metrics.completions import evaluate_online

        sampling = self.model_dump(mode="json", include={"temperature", "top_p", "top_k", "missing_eos_penalty"})
        sampling |= {"min_p": self.min_p} if self.min_p else {}
        sampling |= {"repetition_penalty": self.repetition_penalty} if self.repetition_penalty != 1.0 else {}
        writer: Writer = held_out.algorithm.writer
        if not held_out.keep:  # the policy is loaded here, while the server used in training may be gone
            writer = replace(writer, rollout=writer.rollout.model_copy(update={"engine": "own"}))
        return evaluate_online(
            writer,
            held_out.parts.scorer,
            held_out.start(),
            held_out.parts.trees[1],
            held_out.budget,
            rewards_of_start=lambda rewards: held_out.rewards_of_start(self.max_new_tokens, sampling, rewards),
        )


@dataclass(slots=True)
class Group:
    """One prompt's completions.

    Args:
        tree: the prompt with its k completions; `truncated` marks those that did not end by themselves.
        rewards: (k,) from the reward function, minus the missing-EOS penalty; NaN for a completion without a reward.
        texts: the completions as given to the reward function.
        extras: a method's per-token or per-completion tensors: ``sampled`` log-probs at sampling time, ``old`` log-probs
            (initially the same), advantages; with another engine, older weights or a correction also the ``version`` of
            the weights (optimizer steps).
        terms: (k,) the values of each reward by name, NaN if it gives none; logged: what reward functions log per batch.
    """

    tree: TokenTree
    rewards: Tensor
    texts: tuple[str, ...] = ()
    extras: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)
    logged: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class PendingRollouts:
    """Completions that are being sampled for a later iteration.

    Args:
        of: (iteration, rows, completions per row); version: of the sampling weights; result: returns them, or None if lost.
    """

    of: tuple[int, tuple[int, ...], int]
    version: int
    result: Callable[[], list[list[Sample]] | None]

    def samples(self) -> list[list[Sample]] | None:
        """Wait for the completions; None if they are lost."""
        return self.result()

    def tensors(self) -> dict[str, Tensor]:
        """The completions as tensors for a checkpoint; empty if they are lost."""
        if (by_prompt := self.samples()) is None:
            return {}
        iteration, rows, k = self.of
        samples = [s for prompt_samples in by_prompt for s in prompt_samples]
        return {
            "ahead/of": torch.tensor([iteration, k, self.version]),
            "ahead/rows": torch.tensor(rows),
            "ahead/lengths": torch.tensor([len(s.ids) for s in samples]),
            "ahead/ids": torch.tensor([t for s in samples for t in s.ids]),
            "ahead/logps": torch.tensor([p for s in samples for p in s.logps], dtype=torch.float64),
            "ahead/finished": torch.tensor([s.finished for s in samples]),
            "ahead/own": torch.tensor([o for s in samples for o in s.own or [True] * len(s.ids)], dtype=torch.bool),
            "ahead/prompt_lengths": torch.tensor([len(s.prompt) for s in samples]),
            "ahead/prompts": torch.tensor([t for s in samples for t in s.prompt], dtype=torch.int64),
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> PendingRollouts | None:
        """The inverse of `tensors`; None if there are no completions in them."""
        from penchant.rollout.generate import Sample

        if "ahead/of" not in tensors:
            return None
        iteration, k, version = tensors["ahead/of"].tolist()
        lengths = tensors["ahead/lengths"].tolist()
        ids, logps = (tensors[f"ahead/{n}"].split(lengths) for n in ("ids", "logps"))
        ended = tensors["ahead/finished"].tolist()
        own = tensors["ahead/own"].split(lengths)
        sizes = tensors.get("ahead/prompt_lengths", torch.zeros(len(lengths), dtype=torch.int64)).tolist()
        prompts = tensors.get("ahead/prompts", torch.zeros(0, dtype=torch.int64)).split(sizes)
        samples = [
            Sample(i.tolist(), p.tolist(), finished, [] if bool(o.all()) else o.tolist(), prompt.tolist())
            for i, p, finished, o, prompt in zip(ids, logps, ended, own, prompts, strict=True)
        ]
        groups = [samples[i : i + k] for i in range(0, len(samples), k)]
        return PendingRollouts((iteration, tuple(tensors["ahead/rows"].tolist()), k), version, lambda: groups)


@dataclass(slots=True)
class Writer:
    """Samples groups from the policy and scores them with the reward function.

    Args:
        model, tokenizer: the policy's; reward: scores texts, None if only `written` is used; config: samples, length,
            temperature; seed: of the run.
        engine: runs the model if several processes share it; each completes a share of the prompts.
        stage: runs conversations with an environment, if there is one.
        rollout: settings of the sampling engine; longest: tokens of the longest prompt plus completion; folder: of the run.
        version: optimizer steps taken by the policy, to give another engine the right weights.
    """

    model: Any
    tokenizer: Any
    reward: Reward | None
    config: SamplingConfig
    seed: int
    engine: Any = None
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    longest: int = 0
    folder: Path = Path()
    version: int = 0
    stage: Stage | None = None
    ahead: PendingRollouts | None = field(default=None, init=False)
    _sampler: Any = field(default=None, init=False)

    @property
    def sampler(self) -> Any:
        """The `Engine` that samples, created on first use."""
        if self._sampler is None:
            from penchant.distributed.shard import whole_weights
            from penchant.rollout.engines import make_engine

            gather_weights = partial(whole_weights, self.engine)
            self._sampler = make_engine(self.rollout, self.model, self.folder, self.longest, gather_weights)
        return self._sampler

    def _engine_arguments(self, prompts: Sequence[TokenTree], iteration: int, k: int) -> tuple[Any, ...]:
        """Arguments for an engine, which depend only on seed, iteration and rows."""
        from penchant.data.templates import end_ids
        from penchant.rollout.generate import Settings

        cfg = self.config
        end_tokens = frozenset(end_ids(self.tokenizer, self.model))
        settings = Settings(
            k, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k, end_tokens, cfg.min_p, cfg.repetition_penalty
        )
        seed = (self.seed * 1_000_003 + iteration) % 2**63
        return [t.prompt_ids.tolist() for t in prompts], settings, seed, [t.row for t in prompts]

    def _sample(self, prompts: Sequence[TokenTree], iteration: int, k: int) -> list[list[Sample]]:
        """`k` completions of each prompt; conversations if there is an environment."""
        prompt_ids, settings, seed, seeds = self._engine_arguments(prompts, iteration, k)

        def draw(rows: Sequence[Sequence[int]], seeds: Sequence[int], rooms: Sequence[int]) -> list[Sample]:
            turn_settings = replace(settings, n=1, max_new_tokens=max(rooms), rooms=tuple(rooms))
            samples = self.sampler.sample(rows, turn_settings, seed, seeds)
            return [sample for (sample,) in samples]

        if self.stage is None:
            return self.sampler.sample(prompt_ids, settings, seed, seeds)  # type: ignore[no-any-return]
        return self.stage.play(prompts, k, settings.max_new_tokens, draw)

    def _take_or_sample(self, prompts: Sequence[TokenTree], iteration: int, k: int) -> tuple[list[list[Sample]], int]:
        """Completions of each prompt, and the version of the weights that sampled them."""
        pending, rows = self.ahead, tuple(t.row for t in prompts)
        if pending is not None and pending.of == (iteration, rows, k):
            self.ahead = None
            if (samples := pending.samples()) is not None:
                return samples, pending.version
        elif pending is not None:
            pending.samples()  # its weights must not change before it is done
        return self._sample_share(prompts, iteration, k), self.version

    def _sample_share(self, prompts: Sequence[TokenTree], iteration: int, k: int) -> list[list[Sample]]:
        """Sample with the current weights, each process for its share of the prompts."""
        from penchant.distributed.shard import whole_weights

        world = current()
        own_prompts = [prompts[i] for i in range(world.rank, len(prompts), world.size)]
        with whole_weights(None if self.rollout.elsewhere else self.engine):
            samples = self._sample_with_retries(own_prompts, iteration, k)
        return world.dealt(samples, len(prompts))

    def _sample_with_retries(self, prompts: Sequence[TokenTree], iteration: int, k: int) -> list[list[Sample]]:
        """Sample with the current weights; if an engine has lost them, they are sent again and the batch is retried."""
        from penchant.rollout.engines import WeightsLost

        for _ in range(self.rollout.attempts):
            self.sampler.update(self.version)
            try:
                samples = self._sample(prompts, iteration, k)
            except WeightsLost:
                continue
            return samples
        what = f"lost the weights that it was sent, {self.rollout.attempts} times in a row"
        raise RolloutError(self.sampler.where, what, "is another run using it, or does it keep restarting?")

    def begin(self, prompts: Sequence[TokenTree], iteration: int) -> None:
        """Start sampling a later iteration with the current weights; another engine does this in the background."""
        from penchant.rollout.engines import WeightsLost
        from penchant.training.loop import in_background

        prompts, k = told_apart(prompts), self.config.samples
        key = iteration, tuple(t.row for t in prompts), k
        if not self.rollout.elsewhere:  # the policy itself samples, and its weights are about to change
            samples = self._sample_share(prompts, iteration, k)
            self.ahead = PendingRollouts(key, self.version, lambda: samples)
            return
        self.sampler.update(self.version)

        def draw() -> list[list[Sample]] | None:
            try:
                return self._sample(prompts, iteration, k)
            except WeightsLost:  # weights lost here too: the batch is sampled with later ones
                return None

        self.ahead = PendingRollouts(key, self.version, in_background(draw))

    def write(self, prompts: Sequence[TokenTree], iteration: int, samples: int | None = None) -> list[Group]:
        """Sample and score `samples` completions (default: the method's) per prompt; depends only on weights, seed and iteration.

        Raises:
            RewardError: the reward function failed; it names the completion.
        """
        from penchant.metrics.completions import EVALUATION_ITERATION
        from penchant.metrics.names import METRICS, REWARDS

        cfg = self.config
        assert isinstance(cfg, OnlineConfig) and self.reward is not None
        k = samples or cfg.samples
        trees, logps, version = self.written(prompts, iteration, k)
        prompt_texts = [self.tokenizer.decode(t.prompt_ids, skip_special_tokens=True) for t in prompts]
        texts = [[self.tokenizer.decode(ids, skip_special_tokens=True) for ids in t.completion_ids] for t in trees]
        # evaluations are not steps of the run
        step = iteration * cfg.updates if iteration != EVALUATION_ITERATION else 0
        judgement = self.reward.judge(
            [p for p in prompt_texts for _ in range(k)], [t for row in texts for t in row], trees, step
        )
        reserved = (
            METRICS.keys()
            | {"kind", "step", "skipped"}
            | {f"rewards/{name}/{statistic}" for name in judgement.terms for statistic in REWARDS}
        )
        if conflicts := [n for n in judgement.metrics if n in reserved]:
            what = f'log_metric("{conflicts[0]}") would overwrite a metric of the run'
            raise RewardError("reward", what, "log another name")
        rewards = torch.from_numpy(judgement.total).view(len(prompts), k)
        terms = {name: torch.from_numpy(values).view(len(prompts), k) for name, values in judgement.terms.items()}
        groups = []
        for i, (tree, sampled_logps) in enumerate(zip(trees, logps, strict=True)):
            penalty = cfg.missing_eos_penalty * torch.tensor(tree.truncated, dtype=torch.float64)
            own_terms = {name: values[i] for name, values in terms.items()}
            extras = {"old": sampled_logps, "sampled": sampled_logps}
            if self.rollout.measured:
                extras["version"] = torch.full((k,), float(version))
            group = Group(tree, rewards[i] - penalty, tuple(texts[i]), extras, own_terms, judgement.metrics)
            groups.append(group)
        return groups

    def written(
        self, prompts: Sequence[TokenTree], iteration: int, samples: int
    ) -> tuple[list[TokenTree], list[Tensor], int]:
        """Each prompt with `samples` completions, their tokens' log-probs (R,) at sampling time, and the version of the weights."""
        from penchant.rollout.environment import masked

        prompts = told_apart(prompts)
        rows, version = self._take_or_sample(prompts, iteration, samples)
        trees = []
        for prompt, row in zip(prompts, rows, strict=True):
            ids = tuple(np.array(s.ids, np.int32) for s in row)
            truncated = tuple(not s.finished for s in row)
            prompt_ids = np.array(row[0].prompt, np.int32) if row[0].prompt else prompt.prompt_ids
            trees.append(masked(TokenTree(prompt.row, prompt_ids, ids, truncated, prompt.source), row))
        return trees, [torch.tensor([p for s in row for p in s.own_logps]) for row in rows], version


def told_apart(prompts: Sequence[TokenTree]) -> list[TokenTree]:
    """The prompts, with a row number of its own for each further time that a row is among them, and so with its own draws."""
    times: Counter[int] = Counter()
    numbered = []
    for prompt in prompts:
        numbered.append(replace(prompt, row=prompt.row + times[prompt.row] * FURTHER) if times[prompt.row] else prompt)
        times[prompt.row] += 1
    return numbered


@dataclass(slots=True)
class OnPolicy(Algorithm):
    """Base class of RLOO, GRPO and PPO: the rollouts of an iteration, and the share of them that an update trains on.

    Args:
        scorer: the policy, with the rollouts' temperature; reference: runs once per batch of rollouts.
        writer: samples and scores; config: the method; tokens_per_step: tokens in one forward pass.
    """

    scorer: Scorer
    reference: LiveReference
    writer: Writer
    config: OnlineConfig
    tokens_per_step: int
    groups: list[Group] = field(default_factory=list, init=False)
    iteration: int = field(default=-1, init=False)
    _by_row: dict[int, Group] = field(default_factory=dict, init=False)

    @property
    def side_by_side(self) -> bool:
        return self.scorer.side_by_side and self.reference.side_by_side

    def begin_step(self, step: int, progress: float, trees: Sequence[TokenTree]) -> Sequence[TokenTree]:
        """The groups of this update; an iteration's first update samples new rollouts, the others use them again."""
        iteration, update = divmod(step, self.config.updates)
        self.writer.version = step
        if iteration != self.iteration:
            groups = self.written(trees, iteration)
            self.prepare(groups)
            if measured(groups):
                self._correct_and_check(groups, step)
            self.groups, self.iteration = groups, iteration
        epoch, minibatch = divmod(update, self.config.minibatches)
        order = np.random.default_rng([self.writer.seed, iteration, epoch]).permutation(len(self.groups))
        selected = sorted(np.array_split(order, self.config.minibatches)[minibatch].tolist())
        chosen = [g for i in selected if self.teaches(g := self.groups[i])]
        self._by_row = {g.tree.row: g for g in chosen}
        return [g.tree for g in chosen]

    def look_ahead(self, step: int, total: int, rows: Callable[[int], Sequence[TokenTree]]) -> None:
        """With rollout.lag, start sampling the next iteration with the weights at the start of this one."""
        updates, writer = self.config.updates, self.writer
        later_step = step + updates
        if step % updates or later_step >= total or not getattr(writer, "rollout", RolloutConfig()).lag:
            return
        if writer.ahead is None:  # else they came from a checkpoint
            writer.begin(rows(later_step), later_step // updates)

    def end_step(self, step: int, means: Mapping[str, float]) -> None:
        self.writer.version = step
        references.followed(self.reference, step)

    def _correct_and_check(self, groups: Sequence[Group], step: int) -> None:
        """Compute importance weights, and check that an engine's log-probs match the policy's.

        Raises:
            RolloutError: they differ by more than `rollout.tolerance`, with the same weights and unrestricted sampling.
        """
        rollout, cfg = self.writer.rollout, self.config
        is_unrestricted = cfg.top_p == 1.0 and not cfg.top_k and not cfg.min_p and cfg.repetition_penalty == 1.0
        mismatch = logp_mismatch(groups)["rollout/logp_mismatch"]
        is_current = all(bool((g.extras["version"] == step).all()) for g in groups)
        if rollout.elsewhere and is_unrestricted and is_current and not mismatch <= self.writer.sampler.tolerance:
            raise RolloutError(
                self.writer.sampler.where,
                f"the log-probs of what it wrote differ from the policy's by {mismatch:.2g} nats a token on average "
                f"(rollout.tolerance: {self.writer.sampler.tolerance:g})",
                "start it with --logprobs-mode processed_logprobs and the run's dtype; where that is bf16, raise rollout.tolerance",
            )
        if rollout.correction == "none":
            return
        for g in groups:
            lengths = torch.tensor(g.tree.trained)
            g.extras["importance"] = importance_weights(
                g.extras["old"].double(),
                g.extras["sampled"].double(),
                lengths,
                kind=rollout.correction,
                level=rollout.correction_level,
                low=rollout.correction_low,
                high=rollout.correction_high,
            )

    def importance(self, batch: PackedBatch, like: Tensor) -> Tensor | None:
        """(R,) importance weights of a batch's tokens; None without rollout.correction."""
        if "importance" not in self._by_row[batch.rows[0]].extras:
            return None
        return self.extra(batch, "importance").to(like)

    def rollout_values(self) -> dict[str, float]:
        """Metrics of how far the log-probs at sampling time are from the policy's, and of the version of the sampling weights."""
        has_sampled = self.rescored(self.groups) and "sampled" in self.groups[0].extras  # an older checkpoint has none
        metrics = logp_mismatch(self.groups) if has_sampled else {}
        if not measured(self.groups):
            return metrics
        versions = torch.cat([g.extras["version"] for g in self.groups])
        lag = float(self.iteration * self.config.updates - versions.mean())
        metrics |= {"rollout/version": float(versions.min()), "rollout/lag": lag}
        if "importance" in self.groups[0].extras:
            weights = torch.cat([g.extras["importance"] for g in self.groups])
            rollout = self.writer.rollout
            at_bound = weights >= rollout.correction_high if rollout.correction == "tis" else weights == 0
            metrics |= {
                "rollout/weight": float(weights.mean()),
                "rollout/weight_bound": float(at_bound.double().mean()),
            }
        return metrics

    def rescored(self, groups: Sequence[Group]) -> bool:
        """Whether ``old`` log-probs are those of the training engine."""
        return True

    def written(self, prompts: Sequence[TokenTree], iteration: int) -> list[Group]:
        """Sample an iteration's groups."""
        return self.writer.write(prompts, iteration)

    def teaches(self, group: Group) -> bool:
        """Whether an update trains on a group: enough of its completions have a reward."""
        return int(torch.isfinite(group.rewards).sum()) >= self.config.least_samples

    def prepare(self, groups: list[Group]) -> None:
        """Prepare new rollouts for training: store advantages and other inputs of the loss as extras.

        A completion without a reward (NaN) must not contribute to the update, see `completion_masks`.
        """
        raise NotImplementedError

    def extra(self, batch: PackedBatch, name: str) -> Tensor:
        """An extra of the groups in a batch, in batch order; the loop's batches already carry it."""
        if name in batch.columns:
            return batch.columns[name]
        return moved(torch.cat([self._by_row[row].extras[name] for row in batch.rows]), batch.input_ids.device)

    def columns(self, batch: PackedBatch) -> Mapping[str, Tensor]:
        return {name: self.extra(batch, name) for name in self._by_row[batch.rows[0]].extras}

    def state_tensors(self) -> dict[str, Tensor]:
        """The current and pending rollouts and a moving reference, so that a run resumes exactly between two updates."""
        pending = getattr(self.writer, "ahead", None)
        state = ({} if pending is None else pending.tensors()) | references.moved_state(self.reference)
        if self.iteration < 0 or self.config.updates == 1:
            return state
        packed = {f"rollouts/{name}": value.contiguous() for name, value in pack_groups(self.groups).items()}
        return state | packed | {"iteration": torch.tensor(self.iteration)}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        references.load_moved_state(self.reference, tensors)
        if (pending := PendingRollouts.from_tensors(tensors)) is not None:
            self.writer.ahead = pending
        if "iteration" in tensors:
            self.iteration = int(tensors["iteration"])
            prefix = "rollouts/"
            self.groups = unpack_groups({n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)})


def measured(groups: Sequence[Group]) -> bool:
    """Whether another engine or older weights may have sampled, or importance weights apply, see `RolloutConfig.measured`."""
    return bool(groups) and "version" in groups[0].extras


def logp_mismatch(groups: Sequence[Group]) -> dict[str, float]:
    """How far sampling log-probs (mu) are from the policy's (pi): mean and max ``|log pi - log mu|`` per token, KL(mu || pi) by k3."""
    from penchant.losses.divergences import kl_estimate

    old, sampled = (torch.cat([g.extras[name] for g in groups]).double() for name in ("old", "sampled"))
    differences = (old - sampled).abs()
    return {
        "rollout/logp_mismatch": float(differences.mean()),
        "rollout/logp_mismatch_max": float(differences.max()),
        "rollout/kl_k3": float(kl_estimate(sampled, old, "k3").mean()),
    }


def completion_masks(groups: Sequence[Group], finished_only: bool = False) -> list[Tensor] | None:
    """(k,) of each group: 1 for completions that an update trains on, 0 for those without a reward; None if all are 1.

    Args:
        finished_only: also 0 for truncated ones (DAPO's overlong filter); their rewards still count in the group's mean.
    """
    masks = [(~g.rewards.isnan()).double() for g in groups]
    if finished_only:
        masks = [k * (1.0 - torch.tensor(g.tree.truncated).double()) for k, g in zip(masks, groups, strict=True)]
    return masks if any(bool((k == 0).any()) for k in masks) else None


def score_groups(
    groups: Sequence[Group],
    passes: Sequence[Callable[[PackedBatch], Mapping[str, Tensor]]],
    scorer: Scorer,
    tokens_per_step: int,
    lanes: bool,
) -> None:
    """Run forward passes and store their per-token results (R,) (log-probs, values) as extras, by name."""
    trees = [g.tree for g in groups]
    device = place_of(scorer.model)

    def pass_figures(batch: PackedBatch) -> dict[str, Tensor]:
        return {name: values for run_pass in passes for name, values in run_pass(batch).items()}

    results = run_passes(pass_figures, trees, tokens_per_step, shared=scorer.shared, device=device, lanes=lanes)
    for members, figures in results:
        sizes = [sum(trees[i].trained) for i in members]
        for name, values in figures.items():
            for i, part in zip(members, values.cpu().split(sizes), strict=True):
                groups[i].extras[name] = part


def _spread(rewards: Tensor) -> Tensor:
    """The standard deviation of the rewards that exist, exactly 0 if they are equal; NaN if there are fewer than two."""
    known = rewards[~rewards.isnan()]
    return (known - known[0]).std() if len(known) > 1 else rewards.new_tensor(torch.nan)


def rollout_reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics of a step's rollouts: reward, its spread (within groups of several completions), length, share that ended."""
    rewards = torch.stack([g.rewards for g in groups])
    lengths = [n for g in groups for n in g.tree.trained]
    is_group = rewards.shape[1] > 1
    missing = float(torch.isnan(rewards).double().mean())
    finite = rewards[~rewards.isnan()]
    metrics = {"reward": float(finite.mean())}
    if is_group:
        spreads = torch.stack([_spread(of_prompt) for of_prompt in rewards])
        metrics["reward/std"] = float(spreads.nanmean())
        metrics["frac_reward_zero_std"] = float((spreads.nan_to_num() == 0).double().mean())
    else:
        metrics["reward/std"] = float(_spread(finite))
    metrics |= {"reward/none": missing} if missing else {}
    metrics |= {
        "completions/length": float(np.mean(lengths)),
        "completions/ended": 1.0 - float(np.mean([u for g in groups for u in g.tree.truncated])),
    }
    for name in sorted(groups[0].terms):  # in the order that a checkpoint restores
        values = torch.stack([g.terms[name] for g in groups])
        finite = values[~values.isnan()]
        metrics |= {f"rewards/{name}/mean": float(finite.mean()), f"rewards/{name}/std": float(_spread(values))}
        if len(finite) < values.numel():
            metrics[f"rewards/{name}/none"] = 1.0 - len(finite) / values.numel()
    metrics |= dict(sorted(groups[0].logged.items()))
    # NaN: one completion has no spread, none has no mean
    return {name: value for name, value in metrics.items() if value == value}


def pack_groups(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Pack groups into tensors for a checkpoint."""
    names = sorted(groups[0].extras) if groups else []
    packed = {
        "rows": torch.tensor([g.tree.row for g in groups]),
        "prompt_lengths": torch.tensor([len(g.tree.prompt_ids) for g in groups]),
        "prompts": _concatenate([g.tree.prompt_ids for g in groups]),
        "lengths": torch.tensor([[len(c) for c in g.tree.completion_ids] for g in groups]),
        "completions": _concatenate([c for g in groups for c in g.tree.completion_ids]),
        "trained": torch.tensor([g.tree.trained for g in groups]),
        "unfinished": torch.tensor([g.tree.truncated for g in groups]),
        "rewards": torch.stack([g.rewards for g in groups]) if groups else torch.zeros(0, 0),
    }
    if any(g.tree.masks for g in groups):
        masks = [m for g in groups for m in g.tree.masks or [np.ones(len(c), bool) for c in g.tree.completion_ids]]
        packed["masks"] = torch.from_numpy(np.concatenate(masks))
    packed |= {f"extras/{name}": torch.cat([g.extras[name] for g in groups]) for name in names}
    if groups:
        packed |= {f"terms/{name}": torch.stack([g.terms[name] for g in groups]) for name in groups[0].terms}
        packed |= {f"logged/{n}": torch.tensor(v, dtype=torch.float64) for n, v in groups[0].logged.items()}
    return packed


def _concatenate(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.int32)


def unpack_groups(packed: dict[str, Tensor]) -> list[Group]:
    """The inverse of `pack_groups`, without texts."""
    prompts = packed["prompts"].split(packed["prompt_lengths"].tolist())
    k = packed["lengths"].shape[1]
    completions = packed["completions"].split(packed["lengths"].flatten().tolist())
    trained_counts = packed.get("trained", packed["lengths"]).sum(1).tolist()  # in an older checkpoint all are trained
    masks = packed["masks"].split(packed["lengths"].flatten().tolist()) if "masks" in packed else ()
    extras = {}
    logged = {n.removeprefix("logged/"): float(v) for n, v in packed.items() if n.startswith("logged/")}
    for name, values in packed.items():
        if name.startswith("extras/"):
            per_token = len(values) == sum(trained_counts) and len(values) != len(prompts) * k
            extras[name.removeprefix("extras/")] = values.split(trained_counts if per_token else k)
    groups = []
    for i, row in enumerate(packed["rows"].tolist()):
        ids = tuple(c.numpy() for c in completions[i * k : (i + 1) * k])
        own_masks = tuple(m.numpy() for m in masks[i * k : (i + 1) * k])
        tree = TokenTree(row, prompts[i].numpy(), ids, tuple(packed["unfinished"][i].tolist()), masks=own_masks)
        own_terms = {n.removeprefix("terms/"): v[i] for n, v in packed.items() if n.startswith("terms/")}
        groups.append(Group(tree, packed["rewards"][i], (), {n: v[i] for n, v in extras.items()}, own_terms, logged))
    return groups
