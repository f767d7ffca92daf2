"""Held-out evaluation of a run, during and after training, also compared with the starting model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from penchant.algorithms.method import Parts
from penchant.base.files import optional_write
from penchant.config import RunConfig
from penchant.distributed.shard import whole_weights
from penchant.distributed.world import current
from penchant.logprobs.reference import LiveReference
from penchant.losses.schedules import progress_at
from penchant.metrics.completions import (
    START_FILE,
    Completions,
    CompletionSampler,
    completion_figures,
    completion_rows,
    estimate_kl,
    gain_figures,
    load_start_rewards,
    save_start,
)
from penchant.metrics.heldout import loss_change, metrics_by_set, row_losses, score_heldout
from penchant.models.load import widened
from penchant.rewards import load_reward
from penchant.rewards.reward_model import PolicyText
from penchant.runfolder import is_intact, write_summed
from penchant.runs.identity import reward_contents
from penchant.runs.parts import Built, frozen_scorer, start_key
from penchant.runs.rows import Rows
from penchant.runs.sharing import Uncached
from penchant.types import Algorithm, Scored, TokenTree

START_LOSSES = "start.losses.json"  # in the run folder: losses of held-out rows before the first step


def load_start_losses(path: Path) -> dict[int, tuple[float, float]] | None:
    """Map each data row to its loss at the start and its weight; None if the file is missing or damaged."""
    try:
        if is_intact(path):
            return {int(row): (float(v), float(w)) for row, (v, w) in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        pass
    return None


def writes_completions(config: RunConfig, rows: Rows) -> bool:
    """Whether evaluations also sample completions: with offline preference losses always, with SFT only if evaluation.reward is set."""
    method, evaluation = config.method, config.evaluation
    if (
        method.rollouts is not None
        or method.learns_reward
        or not evaluation.kl_prompts
        or rows.datasets[0].kind == "text"
    ):
        return False
    return method.signal != "tokens" or evaluation.reward is not None


def completion_prompts(config: RunConfig, rows: Rows, device: Any) -> CompletionSampler:
    """The prompts to complete at every evaluation, and the reward that scores the completions.

    Raises:
        ConfigError, RewardError: the reward cannot be loaded.
    """
    sources: dict[tuple[int, ...], str] = {}
    for tree in rows.trees[1]:
        sources.setdefault(tuple(tree.prompt_ids.tolist()), tree.source)
    prompts = list(sources)[: config.evaluation.kl_prompts]
    reward, reward_function = config.evaluation.reward, None
    if reward is not None:
        policy_text = PolicyText(
            rows.tokenizer, config.data.template, rows.prompts_by_source, config.data.template_options
        )
        reward_function = load_reward(reward, policy_text, device)
    return CompletionSampler(
        rows.tokenizer,
        prompts,
        [sources[p] for p in prompts],
        config.evaluation.sample_tokens,
        config.train.seed,
        reward_function,
        None if reward is None else [reward.model_dump(mode="json"), reward_contents(config)],
    )


@dataclass
class HeldOut:
    """Evaluates a run on its held-out set.

    Args:
        folder: the run folder, which stores results of the starting model; total_steps: of the whole run.
        fresh: prompts to complete besides the method's own evaluation, or None.
        tables: of the last evaluation (a reward model's calibration).
        step: optimizer steps of the evaluated policy; keep: whether to store results of the starting model in the folder.
        start_results: these results by file name, in memory too, so that a failed write does not change any metric.
    """

    config: RunConfig
    rows: Rows
    built: Built
    folder: Path
    shared: Uncached
    console: Any
    total_steps: int
    fresh: CompletionSampler | None = None
    tables: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    keep: bool = False
    start_results: dict[str, Any] = field(default_factory=dict)

    def at(self, step: int, *, keep: bool = False) -> dict[str, Any]:
        """Metrics of the policy after `step` optimizer steps."""
        context = replace(self, step=step, keep=keep)
        metrics = self.config.method.evaluate(context)
        self.tables = context.tables
        return metrics

    @property
    def parts(self) -> Parts:
        return self.built.parts

    @property
    def algorithm(self) -> Any:
        return self.built.algorithm

    @property
    def budget(self) -> int:
        return self.config.evaluation.tokens_per_step or self.config.train.tokens_per_step

    # ---- the start --------------------------------------------------------------------------------------------------

    def start(self) -> LiveReference:
        """The starting model (or reference.path) as a live reference, loaded if necessary."""
        parts = self.parts
        if type(parts.reference) is LiveReference:
            return parts.reference
        if self.built.start is not None and self.config.reference.path is None:
            return self.built.start
        return LiveReference(frozen_scorer(parts, self.shared))

    def _start_policy(self) -> LiveReference:
        """The starting model, whatever reference.path is, loaded if necessary."""
        if self.config.reference.path is None:
            return self.start()
        if self.built.start is not None:
            return self.built.start
        return LiveReference(frozen_scorer(self.parts, self.shared, start=True))

    def _start_rewards(self, completion_sampler: CompletionSampler, generated: Completions | None) -> np.ndarray:
        """Rewards of the starting model's completions of the same prompts, computed once and stored for resumed runs.

        Args:
            generated: these completions, if the policy is still the starting model.
        """
        path = self.folder / START_FILE
        if generated is None:
            stored = current().share(self._stored_start_rewards(completion_sampler.cache_key))
            if stored is not None:
                return stored
            start = self._start_policy()
            model = start.scorer.model
            with start.off(), whole_weights(start.scorer), widened(model) if start.scorer.narrowed else nullcontext():
                generated = completion_sampler.write(model, 0)
        if self.keep and current().leads:
            with optional_write(path, self.console.note):
                save_start(path, completion_sampler.cache_key, completion_rows(generated, self.rows.tokenizer))
        assert generated.rewards is not None
        self.start_results[START_FILE] = generated.rewards
        return generated.rewards

    def _stored_start_rewards(self, settings: dict[str, Any]) -> np.ndarray | None:
        rewards = self.start_results.get(START_FILE)
        return load_start_rewards(self.folder / START_FILE, settings) if rewards is None else rewards

    # ---- what `Method.evaluate` can use (`algorithms.method.EvaluationContext`) ---------------------------------------------

    def scored(self, algorithm: Algorithm, *, alike: bool = False) -> tuple[Scored, list[TokenTree]]:
        trees = self.parts.trees[1]
        progress = progress_at(max(0, self.step - 1), self.total_steps)

        if self.step == 0 and alike:
            # the starting model's log-probs are the same under every loss, its loss values are not
            algorithm.begin_step(0, progress, trees)
            needs = tuple(sorted(self.config.method.needs))
            scored, order = self.shared.once(
                ("start", start_key(self.config), self.rows.key, needs, self.budget),
                lambda: self._score(algorithm, progress),
            )
        else:
            scored, order = self._score(algorithm, progress)
        return scored, [trees[i] for i in order]

    def by_set(self, algorithm: Algorithm, scored: Scored, trees: list[TokenTree]) -> dict[str, Any]:
        return metrics_by_set(algorithm, scored, trees, self.rows.held_out_sets)

    def _score(self, algorithm: Algorithm, at: float) -> tuple[Scored, list[int]]:
        """Score the held-out trees at progress `at`; return the scores and the trees' order."""
        return score_heldout(
            algorithm,
            self.parts.trees[1],
            shared=self.parts.engine.shared,
            tokens_per_step=self.budget,
            device=self.parts.device,
            at=at,
            progress=self.console.counter("held-out rows"),
        )

    def loss_change(self, algorithm: Any, scored: Scored, trees: list[TokenTree]) -> dict[str, Any]:
        """Change of the rows' losses since the start. The starting losses are stored, and recomputed if missing or damaged."""
        path, losses = self.folder / START_LOSSES, row_losses(algorithm, scored, trees)
        if not losses or not self.config.evaluation.at_start:
            return {}
        before = (
            losses
            if self.step == 0
            else current().share(self.start_results.get(START_LOSSES) or load_start_losses(path))
        )
        if before is None and self.keep:  # all ranks recompute, or none
            start = self._start_policy()
            with start.off():
                scored, order = self._score(replace(algorithm, scorer=start.scorer), progress_at(0, self.total_steps))
                before = row_losses(algorithm, scored, [self.parts.trees[1][i] for i in order])
        if self.keep and START_LOSSES not in self.start_results and before is not None:
            self.start_results[START_LOSSES] = before
            if current().leads and (self.step == 0 or not (path.is_file() and is_intact(path))):
                with optional_write(path, self.console.note):
                    write_summed(path, json.dumps({str(row): before[row] for row in sorted(before)}))
        return {} if self.step == 0 else loss_change(before or {}, losses, trees)

    def completions(self) -> dict[str, Any]:
        """KL to the start (or reference.path), length and diversity of sampled completions, and their reward versus the start's.

        If no model to compare with is in memory, one is loaded temporarily.
        """
        sampler = self.fresh
        if sampler is None:
            return {}
        settings = json.dumps(sampler.cache_key, sort_keys=True)

        def estimate() -> tuple[Completions, dict[str, Any]]:
            with whole_weights(self.parts.engine):
                completions = sampler.write(self.parts.model, self.step)
            if self.config.method.signal == "tokens":
                return completions, {}
            policy = LiveReference(self.parts.scorer)
            return completions, estimate_kl(policy, self.start(), completions.trees, tokens_per_step=self.budget)

        key = ("start completions", start_key(self.config), self.rows.key, settings, self.budget)
        completions, metrics = estimate() if self.step else self.shared.once(key, estimate)
        metrics = metrics | completion_figures(completions)
        if completions.rewards is not None:
            start_rewards = self._start_rewards(sampler, None if self.step else completions)
            metrics |= gain_figures(completions.rewards, start_rewards)
        return {f"eval/{name}": value for name, value in metrics.items()}

    def rewards_of_start(
        self, max_new_tokens: int, sampling: Mapping[str, Any], rewards: np.ndarray
    ) -> np.ndarray | None:
        config = self.config
        assert config.reward is not None
        reward_key = [config.reward.model_dump(mode="json"), reward_contents(config)]
        prompts = [t.prompt_ids.tolist() for t in self.parts.trees[1]]
        sampler = CompletionSampler(
            self.rows.tokenizer, prompts, [], max_new_tokens, config.train.seed, None, reward_key
        )
        settings, path = {**sampler.cache_key, **sampling}, self.folder / START_FILE
        if self.step:
            return current().share(self._stored_start_rewards(settings))
        self.start_results[START_FILE] = rewards
        if self.keep and current().leads:
            with optional_write(path, self.console.note):
                save_start(path, settings, [{"reward": float(r)} for r in rewards])
        return rewards

    def keep_tables(self, tables: Mapping[str, Any]) -> None:
        self.tables = dict(tables)
