"""One model on the prompts shared by all compared models: its completions, log-probs and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from penchant.base.text import counted
from penchant.errors import RewardError
from penchant.judges.judge import PairJudge
from penchant.logprobs import CompletionLogps, Scorer
from penchant.logprobs.reference import LiveReference, compute_logps
from penchant.metrics.completions import (
    Completions,
    RewardFunction,
    distinct_n,
    kl_by_completion,
    sample_completions,
    score_completions,
)
from penchant.metrics.figures import prompt_numbers
from penchant.metrics.heldout import pair_change
from penchant.metrics.stats import Interval, bootstrap_ci, interval_from_sources, share_ci
from penchant.types import TokenTree

Metrics = dict[str, Any]
SEVERAL_DRAWS = 2000  # bootstrap draws for figures with thousands of values


@dataclass(frozen=True, slots=True)
class Setting:
    """The conditions shared by all models.

    Args:
        tokenizer: of all models; prompts: token ids, no duplicates; sources: where each came from; answers: held-out rows of those
            prompts, pairs (chosen first) or single answers; may be empty.
        judge: the reward, or None; also: other rewards by name; pairwise: the pairwise judge, or None.
        samples: completions per prompt, 0 to only score given answers; seed: of sampling; tokens_per_step: tokens per forward pass.
        turns: `turns_of` of each prompt, for files; may be empty.
    """

    tokenizer: Any
    prompts: Sequence[Sequence[int]]
    sources: Sequence[str]
    answers: Sequence[TokenTree]
    judge: RewardFunction | None
    samples: int
    max_new_tokens: int
    seed: int
    tokens_per_step: int = 4096
    also: Mapping[str, RewardFunction] = field(default_factory=dict)
    pairwise: PairJudge | None = None
    progress: Callable[[str], Callable[[int, int], None]] | None = None
    turns: Sequence[Mapping[str, Any]] = ()

    @property
    def prompt_texts(self) -> list[str]:
        """The texts of the prompts."""
        return [self.tokenizer.decode(list(p), skip_special_tokens=True) for p in self.prompts]

    @property
    def is_paired(self) -> bool:
        """Whether the answers are pairs."""
        return bool(self.answers) and all(len(t.completion_ids) == 2 for t in self.answers)


@dataclass(frozen=True)
class Measurement:
    """A model's raw figures; those relative to the first model are None for the first model itself.

    Args:
        name: of the model; answers: log-probs of the setting's answers; correct: for each pair, 1 if the chosen answer gained more
            log-prob over the first model than the rejected one, 0.5 for a tie, else 0.
        also: other rewards of its completions by name, (prompts x samples,).
        kl, kl_k3: k1 and k3 of each completion against the first model, nats, (prompts x samples,).
    """

    name: str
    setting: Setting
    written: Completions
    answers: CompletionLogps | None
    also: Mapping[str, np.ndarray] = field(default_factory=dict)
    correct: np.ndarray | None = None
    kl: np.ndarray | None = None
    kl_k3: np.ndarray | None = None

    def rewards(self, judge: str | None = None) -> np.ndarray | None:
        """Values of the reward, or of the other reward named `judge`, (prompts, samples); None without a reward.

        Raises:
            RewardError: the reward does not apply to some completions.
        """
        values = self.written.rewards if judge is None else self.also[judge]
        if values is not None and (missing := int(np.isnan(values).sum())):
            what = f"gives no value for {missing} of {counted(len(values), 'completion')}, so that models cannot be compared prompt by prompt"
            raise RewardError(f"reward {judge or ''}".strip(), what, "give one that judges every completion")
        return None if values is None else values.reshape(-1, self.setting.samples)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each completion, (prompts, samples)."""
        lengths = np.array([len(i) for i in self.written.ids], dtype=np.float64)
        return lengths.reshape(len(self.setting.prompts), self.setting.samples)

    @cached_property
    def values(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For each figure, the values that it is the mean of, and the prompt index of each."""
        w = self.written
        by_figure: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        if w.rewards is not None:
            by_figure["reward"] = w.rewards, w.prompts
        if w.trees:
            by_figure["ended"] = w.ended.astype(np.float64), w.prompts
            by_figure["tokens"] = self.lengths.reshape(-1), w.prompts
        for name, values in (("kl", self.kl), ("kl_k3", self.kl_k3)):
            if values is not None:
                by_figure[name] = values, w.prompts
        if self.correct is not None:
            by_figure["preference_accuracy"] = self.correct, prompt_numbers(self.setting.answers)
        return by_figure

    @cached_property
    def chosen_nlls(self) -> tuple[np.ndarray, np.ndarray]:
        """``-log p`` of every trained token of the chosen answers, and the prompt index of each."""
        assert self.answers is not None
        answers = self.setting.answers
        sizes = [n for t in answers for n in t.trained]
        is_chosen = [i == 0 for t in answers for i in range(len(t.completion_ids))]
        parts = [p for p, chosen in zip(self.answers.tokens.double().split(sizes), is_chosen, strict=True) if chosen]
        return -np.concatenate([p.numpy() for p in parts]), np.repeat(prompt_numbers(answers), [len(p) for p in parts])


def measure(
    name: str, scorer: Scorer, setting: Setting, first: Measurement | None = None, first_scorer: Scorer | None = None
) -> Measurement:
    """Sample and score a model's completions and given answers, and compare them with the first model's if given."""
    progress = setting.progress
    completions = Completions([], [], None)
    if setting.samples:
        completions = sample_completions(
            scorer.model,
            setting.tokenizer,
            setting.prompts,
            n=setting.samples,
            max_new_tokens=setting.max_new_tokens,
            seed=setting.seed,
            judge=setting.judge,
            sources=setting.sources,
            progress=progress(f"{name} writes, prompts") if progress else None,
        )
    answers = None
    if setting.answers:
        answers = compute_logps(LiveReference(scorer), setting.answers, tokens_per_step=setting.tokens_per_step)
    also = {
        n: score_completions(j, setting.tokenizer, completions.trees, completions.texts)
        for n, j in setting.also.items()
    }
    if first is None or first_scorer is None:
        return Measurement(name, setting, completions, answers, also)
    correct = None
    if setting.is_paired and answers is not None and first.answers is not None:
        correct = pair_change(answers.sums, first.answers.sums).correct
    if not completions.trees:
        return Measurement(name, setting, completions, answers, also, correct)
    kl, kl_k3 = kl_by_completion(
        LiveReference(scorer),
        LiveReference(first_scorer),
        completions.trees,
        tokens_per_step=setting.tokens_per_step,
    )
    return Measurement(name, setting, completions, answers, also, correct, kl, kl_k3)


def figures(seeds: Sequence[Measurement]) -> Metrics:
    """A setting's figures: of its only model, with intervals by prompt, or means over the models of several seeds.

    With several seeds, intervals come from `interval_from_sources` over the seeds' means and the prompts' means.
    """
    metrics: Metrics = {}
    for name in seeds[0].values:
        draws, share = SEVERAL_DRAWS if name.startswith("kl") else 10_000, name in ("ended", "preference_accuracy")
        metrics |= _interval([m.values[name] for m in seeds], draws, share=share).named(name)
    if seeds[0].also:
        metrics["also"] = {
            judge: _interval([(m.also[judge], m.written.prompts) for m in seeds], 10_000).named("reward")
            for judge in seeds[0].also
        }
    if seeds[0].kl_k3 is not None:
        per_token = [m.kl_k3.sum() / m.lengths.sum() for m in seeds if m.kl_k3 is not None]
        metrics["kl_per_token"] = float(np.mean(per_token))
    if seeds[0].written.trees:
        metrics["distinct_2"] = float(np.mean([distinct_n(m.written.ids) for m in seeds]))
    if seeds[0].answers is not None:
        nll = _interval([m.chosen_nlls for m in seeds], SEVERAL_DRAWS)
        metrics |= Interval(*(float(np.exp(v)) for v in (nll.estimate, nll.low, nll.high))).named("perplexity")
    return metrics


def _interval(seeds: Sequence[tuple[np.ndarray, np.ndarray]], draws: int, *, share: bool = False) -> Interval:
    if len(seeds) == 1:
        return (share_ci if share else bootstrap_ci)(seeds[0][0], clusters=seeds[0][1], draws=draws)
    prompt_means = np.stack([by_prompt(values, clusters) for values, clusters in seeds])
    sources = [prompt_means.mean(1), prompt_means.mean(0)] if prompt_means.shape[1] > 1 else [prompt_means.mean(1)]
    return interval_from_sources(prompt_means.mean(), sources, share=share)


def by_prompt(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """One value per prompt, (prompts,), whose mean over prompts equals the mean of all values.

    Prompts with more values count more: ``v_p = m + (sum_p - n_p m) / mean(n_p)``, the linearization of the mean.
    """
    _, member = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(member, weights=values), np.bincount(member)
    mean = values.mean()
    return np.asarray(mean + (sums - counts * mean) / counts.mean())
