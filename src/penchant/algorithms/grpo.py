"""RLOO, GRPO, Dr. GRPO, DAPO, GSPO, CISPO, REINFORCE++: k completions per prompt, in one tree that computes the prompt once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from penchant.algorithms.advantages import group_normalized, kl_to_go, leave_one_out, whiten
from penchant.algorithms.method import Parts
from penchant.algorithms.rollouts import (
    Group,
    OnlineConfig,
    OnPolicy,
    completion_masks,
    measured,
    rollout_reward_metrics,
    score_groups,
)
from penchant.base.lazy import Tensor, lazy, torch
from penchant.losses.policy_gradient import LOG_RATIO_LIMIT, cispo_surrogate, clipped_surrogate, sequence_log_ratio
from penchant.types import LossOutput, PackedBatch, TokenTree

if TYPE_CHECKING:
    from penchant import logprobs
    from penchant.logprobs import reference as references
    from penchant.losses import divergences
else:
    logprobs, divergences = lazy("penchant.logprobs"), lazy("penchant.losses.divergences")
    references = lazy("penchant.logprobs.reference")


ABOUT = {
    "rloo": "RLOO: policy gradient whose baseline is the mean reward of the prompt's other completions",
    "grpo": "GRPO: clipped policy gradient on rewards normalized within a prompt's completions",
    "dr_grpo": "Dr. GRPO: GRPO without its two biases, by length and by a prompt's spread of rewards",
    "dapo": "DAPO: GRPO over all tokens alike, with a higher upper clip, prompts that teach, and no cut completions",
    "gspo": "GSPO: GRPO whose probability ratio and clip are of whole completions",
    "cispo": "CISPO: policy gradient whose importance weights are clipped, so that every token keeps its gradient",
    "reinforce_pp": "REINFORCE++: clipped policy gradient on rewards with the KL in them, normalized over the whole batch",
}

# defaults that a method overrides
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "dr_grpo": {"scale_rewards": "none", "loss_mean": "constant"},
    "dapo": {"clip_high": 0.28, "loss_mean": "token", "dynamic_sampling": 3, "overlong_filter": True},
    "gspo": {"clip": 3e-4, "clip_high": 4e-4},
    "cispo": {"clip_high": 4.0, "loss_mean": "token"},
    "reinforce_pp": {"loss_mean": "token"},
}
IDLE = {
    "rloo": ("scale_rewards", "loss_mean"),
    "cispo": ("clip_dual",),
    "reinforce_pp": ("scale_rewards",),
}
BETAS = {"rloo": 0.05, "grpo": 0.04, "reinforce_pp": 0.01}  # the others have no KL


class GroupConfig(OnlineConfig):
    """RLOO, GRPO and their descendants, which compare the completions of one prompt with each other."""

    name: Literal["rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce_pp"] = Field(
        description="rloo, grpo, dr_grpo, dapo, gspo, cispo or reinforce_pp"
    )
    kl_in: Literal["auto", "reward", "loss"] = Field(
        "auto", description="where beta times the KL goes; auto: the reward (rloo, reinforce_pp), the loss (others)"
    )
    kl_estimator: Literal["auto", "k1", "k2", "k3", "unbiased"] = Field(
        "auto",
        description="estimator of the KL; auto: k1 in the reward, k3 in the loss; unbiased: k3 times the probability ratio",
    )
    dynamic_sampling: int = Field(
        0, ge=0, le=100, description="rounds in which prompts with equal rewards are replaced by others (dapo: 3)"
    )
    overlong_filter: bool = Field(False, description="leave cut completions out of the update (dapo: true)")
    group_baseline: bool = Field(
        False, description="reinforce_pp: first subtract the mean reward of the prompt's completions"
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        return {**PRESETS.get(str(values.get("name")), {}), **values} if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _check_estimator(self) -> GroupConfig:
        if self.kl_in_reward and self.kl_estimator == "unbiased":
            raise ValueError("kl_estimator is unbiased, which corrects a gradient; in the reward take k1, k2 or k3")
        return self

    @property
    def idle(self) -> dict[str, str]:
        reasons = self.of_later_updates("clip", "clip_high", "clip_dual", own=PRESETS.get(self.name, {}))
        reasons |= dict.fromkeys(IDLE.get(self.name, ()), f"with {self.name}; leave it out")
        if self.name == "cispo" and self.clip_high is not None:
            reasons["clip"] = "with cispo, which has an upper clip alone; set clip_high"
        if not self.kl_weight:
            reasons |= dict.fromkeys(("kl_in", "kl_estimator"), "where beta is 0; set beta, or leave {} out")
        if self.name != "reinforce_pp":
            reasons["group_baseline"] = (
                f"with {self.name}, which compares completions of one prompt anyway; leave it out"
            )
        return reasons

    @property
    def least_samples(self) -> int:  # type: ignore[override]
        return 2 if self.name != "reinforce_pp" or self.group_baseline or self.dynamic_sampling else 1

    @property
    def about(self) -> str:
        return f"`{self.name}`: {ABOUT[self.name]}."

    @property
    def default_beta(self) -> float:  # type: ignore[override]
        return BETAS.get(self.name, 0.0)

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_in == "reward" or (self.kl_in == "auto" and self.name in ("rloo", "reinforce_pp"))

    @property
    def estimator(self) -> Literal["k1", "k2", "k3", "unbiased"]:
        """`kl_estimator`, with auto resolved."""
        if self.kl_estimator == "auto":
            return "k1" if self.kl_in_reward else "k3"
        return self.kl_estimator

    def build(self, parts: Parts) -> GroupPolicyGradient:
        writer = self.writer(parts)
        budget = parts.config.train.tokens_per_step
        return GroupPolicyGradient(parts.scorer, parts.live_reference, writer, self, budget, parts.trees[0])


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Per-token results (R,) of a forward pass over groups."""

    logps: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    advantages: Tensor  # (C,) or (R,)
    completion_of: Tensor
    lengths: Tensor  # (C,) int64
    entropy: Tensor | None = None  # if it is in the loss
    keep: Tensor | None = None  # (C,) 1 or 0: whether a completion is in the update; None: all are
    importance: Tensor | None = None  # (R,) importance weights if something else sampled; None: 1
    sampled: Tensor | None = None  # (R,) log-probs at sampling time, if this is the policy's first pass over them


@dataclass(slots=True)
class GroupPolicyGradient(OnPolicy):
    """Policy gradients on groups of completions.

    RLOO (arXiv 2402.14740): ``A_i = R_i - mean_{j != i} R_j`` with ``R = r - beta sum_t (log pi - log ref)``, summed over
    the completion's tokens. GRPO (arXiv 2402.03300): ``A_i = (r_i - mean r) / std r``, and ``beta k3`` per token in the loss.
    Both use PPO's clipped surrogate, whose gradient on the first update of a batch of rollouts is ``-A grad log pi``.
    Dr. GRPO (arXiv 2503.20783): no std, and a constant instead of lengths. DAPO (arXiv 2503.14476): mean over all tokens, a
    higher upper clip; prompts with equal rewards are replaced, truncated completions left out. GSPO (arXiv 2507.18071): ratio
    and clip per completion. CISPO (arXiv 2506.13585): clips importance weights, so that every token keeps its gradient.
    REINFORCE++ (arXiv 2501.03262): per token ``r - beta sum_{s >= t} kl_s``, normalized over all tokens of the batch.

    Args:
        pool: prompts that dynamic sampling may use as replacements.
    """

    config: GroupConfig
    pool: Sequence[TokenTree] = ()

    def written(self, prompts: Sequence[TokenTree], iteration: int) -> list[Group]:
        """Sample an iteration's groups; dynamic sampling replaces those without a learning signal, for several rounds."""
        cfg = self.config
        groups = self.writer.write(prompts, iteration)
        if not cfg.dynamic_sampling:
            return groups
        used_rows = {t.row for t in prompts}
        informative = [g for g in groups if self.teaches(g)]
        sampled = list(groups)
        for attempt in range(cfg.dynamic_sampling):
            missing = len(groups) - len(informative)
            rng = np.random.default_rng([self.writer.seed, iteration, attempt, len(used_rows)])
            candidates = rng.permutation(len(self.pool))[: missing + len(used_rows)] if missing else ()
            new_prompts = [t for i in candidates if (t := self.pool[int(i)]).row not in used_rows][:missing]
            if not new_prompts:
                break
            replacements = self.writer.write(new_prompts, iteration)
            used_rows |= {t.row for t in new_prompts}
            sampled += replacements
            informative += [g for g in replacements if self.teaches(g)]
        # if no group has a signal, keep the first ones: the step is empty, and its line reports the rollouts
        selected = informative or groups
        # metrics over everything sampled, as those of the kept prompts alone would misrepresent the policy
        metrics = rollout_reward_metrics(sampled) | {"dynamic_sampling/kept": len(informative) / len(sampled)}
        return [replace(g, logged={**g.logged, **metrics}) for g in selected]

    def teaches(self, group: Group) -> bool:
        if not OnPolicy.teaches(self, group):
            return False
        has_reward = ~group.rewards.isnan()
        if self.config.overlong_filter and not bool((has_reward & ~torch.tensor(group.tree.truncated)).any()):
            return False
        rewards = group.rewards[has_reward]
        return not self.config.dynamic_sampling or bool((rewards != rewards[0]).any())

    def rescored(self, groups: Sequence[Group]) -> bool:
        """True for several updates or `measured` rollouts; otherwise the update's own forward pass gives the same log-probs."""
        return self.config.updates > 1 or measured(groups)

    @property
    def token_mean(self) -> bool:
        """Whether all tokens have equal weight (DAPO), rather than all completions."""
        return self.config.name != "rloo" and self.config.loss_mean == "token"

    def prepare(self, groups: list[Group]) -> None:
        """Compute advantages and, if `rescored`, old log-probs with the training engine, so that the first ratio is exactly 1."""
        cfg = self.config
        passes: list[Callable[[PackedBatch], Mapping[str, Tensor]]] = [
            lambda batch: {"ref": self.reference.token_logps(batch)}
        ]
        if self.rescored(groups):
            passes.append(lambda batch: {"old": references.LiveReference(self.scorer).token_logps(batch)})
        score_groups(groups, passes, self.scorer, self.tokens_per_step, self.side_by_side)
        for g in groups:
            log_ratio = g.extras["old"] - g.extras["ref"]
            g.extras["kl"] = _sums(log_ratio, g).double()
        masks = completion_masks(groups, cfg.overlong_filter)
        if cfg.name == "reinforce_pp":
            self._normalize_over_the_batch(groups, masks)
        else:
            rewards = torch.stack([g.rewards for g in groups])
            if cfg.kl_in_reward:
                penalties = [g.extras["kl"] if cfg.estimator == "k1" else _sums(self._kl(g), g) for g in groups]
                rewards = rewards - cfg.kl_weight * torch.stack(penalties)
            advantages = leave_one_out(rewards) if cfg.name == "rloo" else group_normalized(rewards, cfg.scale_rewards)
            for g, a in zip(groups, advantages, strict=True):
                g.extras["advantages"] = a
        for g, mask in zip(groups, masks or [], strict=False):
            g.extras["keep"] = mask

    def _kl(self, group: Group) -> Tensor:
        """(R,) KL estimates for the tokens of a group at sampling time, in fp64."""
        old, ref = group.extras["old"].double(), group.extras["ref"].double()
        return divergences.kl_estimate(old, ref, "k3" if self.config.estimator == "unbiased" else self.config.estimator)

    def _normalize_over_the_batch(self, groups: list[Group], keep: list[Tensor] | None) -> None:
        """REINFORCE++: per-token advantages, including the KL from each token on, whitened over all tokens in the update."""
        cfg = self.config
        token_rewards = []
        for g in groups:
            rewards = g.rewards - g.rewards.nanmean() if cfg.group_baseline else g.rewards
            lengths = torch.tensor(_lengths(g))
            per_token = rewards.nan_to_num().repeat_interleave(lengths)
            if cfg.kl_in_reward and cfg.kl_weight:
                per_token = per_token - cfg.kl_weight * kl_to_go(self._kl(g), lengths)
            token_rewards.append(per_token)
        sizes = [len(p) for p in token_rewards]
        advantages = torch.cat(token_rewards)
        kept = keep or [torch.ones(len(_lengths(g))) for g in groups]
        by_group = [
            (k * self.teaches(g)).repeat_interleave(torch.tensor(_lengths(g)))
            for k, g in zip(kept, groups, strict=True)
        ]
        advantages = whiten(advantages, which=torch.cat(by_group) > 0)
        for g, part in zip(groups, advantages.split(sizes), strict=True):
            g.extras["advantages"] = part

    def keep(self, batch: PackedBatch) -> Tensor | None:
        """(C,) 1 or 0: whether a completion is in the update; None if all are."""
        if "keep" not in self._by_row[batch.rows[0]].extras:
            return None
        return self.extra(batch, "keep")

    def weights(self, batch: PackedBatch) -> Mapping[str, float]:
        keep = self.keep(batch)
        if keep is not None:
            sizes = batch.lengths.to(keep) if self.token_mean else torch.ones_like(keep)
            return {"main": float((keep * sizes).sum())}
        if self.token_mean:
            return {"main": float(batch.lengths.sum())}
        return {"main": float(len(batch.lengths))}

    def score(self, batch: PackedBatch) -> ScoredTokens:
        policy = self.scorer.logps(batch, entropy=bool(self.config.entropy_coef))
        tokens = policy.tokens
        ref, advantages = (self.extra(batch, name).to(tokens) for name in ("ref", "advantages"))
        # with one update per batch of rollouts, the policy is still the one that sampled
        old = tokens.detach() if self.config.updates == 1 else self.extra(batch, "old").to(tokens)
        keep = self.keep(batch)
        weights = None if keep is None else keep.to(tokens)
        importance = self.importance(batch, tokens)
        is_first_pass = not self.rescored(self.groups) and "sampled" in self._by_row[batch.rows[0]].extras
        sampled = self.extra(batch, "sampled").to(tokens) if is_first_pass else None
        return ScoredTokens(
            tokens,
            old,
            ref,
            advantages,
            batch.completion_of,
            batch.lengths,
            policy.entropy,
            weights,
            importance,
            sampled,
        )

    def loss(self, scored: ScoredTokens) -> LossOutput:
        s, cfg = scored, self.config
        advantages = s.advantages if len(s.advantages) == len(s.logps) else s.advantages[s.completion_of]
        losses, ratios, clipped = self._surrogate(s, advantages)
        if s.importance is not None:
            losses = losses * s.importance
        k3 = divergences.kl_estimate(s.logps, s.ref_logps, "k3")
        tokens = torch.ones_like(ratios)
        metrics = {
            "ratio": (ratios, None),
            "clip_fraction": (clipped, None),
            "kl/per_token": (k3.detach(), None),
            "kl/old_new": (divergences.kl_estimate(s.old_logps, s.logps.detach(), "k3"), None),
            "logps/per_token": (s.logps.detach(), None),
        }
        if s.sampled is not None:
            difference = s.logps.detach() - s.sampled
            metrics["rollout/logp_mismatch"] = (difference.abs(), None)
            metrics["rollout/kl_k3"] = (divergences.kl_estimate(s.sampled, s.logps.detach(), "k3"), None)
        if s.entropy is not None:
            losses = losses - cfg.entropy_coef * s.entropy
            metrics["policy/entropy"] = (s.entropy.detach(), None)
        if not cfg.kl_in_reward:
            losses = losses + cfg.kl_weight * self._kl_in_loss(s, k3)
        if cfg.name == "rloo":
            return self._masked_output(s, logprobs.per_completion(losses, s.lengths), metrics)
        if cfg.loss_mean == "token":
            if s.keep is not None:
                tokens = s.keep[s.completion_of]
                losses = losses * tokens
            return LossOutput(losses, tokens, metrics)
        divisor = s.lengths if cfg.loss_mean == "sequence" else torch.full_like(s.lengths, cfg.max_new_tokens)
        return self._masked_output(s, logprobs.per_completion(losses, s.lengths) / divisor, metrics)

    def _surrogate(self, s: ScoredTokens, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, ratios and whether the clip is active, (R,) each."""
        cfg = self.config
        if cfg.name == "cispo":
            high = cfg.clip if cfg.clip_high is None else cfg.clip_high
            return cispo_surrogate(s.logps, s.old_logps, advantages, clip_high=high)
        if cfg.name == "gspo":
            log_ratio = sequence_log_ratio(s.logps, s.old_logps, s.lengths)
            per_completion = clipped_surrogate(
                log_ratio,
                torch.zeros_like(log_ratio),
                s.advantages,
                clip=cfg.clip,
                clip_high=cfg.clip_high,
                dual=cfg.clip_dual,
            )
            losses, ratios, clipped = (values[s.completion_of] for values in per_completion)
            return losses, ratios, clipped
        return clipped_surrogate(
            s.logps, s.old_logps, advantages, clip=cfg.clip, clip_high=cfg.clip_high, dual=cfg.clip_dual
        )

    def _kl_in_loss(self, s: ScoredTokens, k3: Tensor) -> Tensor:
        """(R,); unbiased: the gradient of its expectation is that of the KL, even off-policy (arXiv 2512.02556)."""
        estimator = self.config.estimator
        if estimator == "k3":
            return k3
        if estimator == "unbiased":
            return torch.exp((s.logps - s.old_logps).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)) * k3
        return divergences.kl_estimate(s.logps, s.ref_logps, estimator)

    def _masked_output(self, s: ScoredTokens, losses: Tensor, metrics: Mapping[str, Any]) -> LossOutput:
        return LossOutput(losses if s.keep is None else losses * s.keep, s.keep, metrics)

    def step_values(self) -> dict[str, float]:
        groups = self.groups
        kl, old, ref = (torch.cat([g.extras[name] for g in groups]) for name in ("kl", "old", "ref"))
        k3 = divergences.kl_estimate(old, ref, "k3").sum() / len(kl)
        kl_metrics = {"kl/policy_ref": float(kl.mean()), "kl/k3": float(k3)}
        return rollout_reward_metrics(groups) | kl_metrics | self.rollout_values()


def _lengths(group: Group) -> list[int]:
    return list(group.tree.trained)


def _sums(per_token: Tensor, group: Group) -> Tensor:
    """(k,) sums of per-token values over each completion."""
    return torch.stack([part.sum() for part in per_token.split(_lengths(group))])
