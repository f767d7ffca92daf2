"""RLOO and GRPO: k completions of a prompt, each judged against the others; trained on one prompt tree, so the prompt is computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from penchant.algorithms.method import Parts
from penchant.algorithms.rollouts import Group, OnlineConfig, OnPolicy, kept, reward_metrics_of, score_groups
from penchant.base.lazy import Tensor, lazy, torch
from penchant.losses.policy_gradient import clipped_surrogate, group_normalized, leave_one_out
from penchant.types import LossOutput, PackedBatch

if TYPE_CHECKING:
    from penchant import logprobs
    from penchant.logprobs import reference as references
    from penchant.losses import divergences
else:
    logprobs, divergences = lazy("penchant.logprobs"), lazy("penchant.losses.divergences")
    references = lazy("penchant.logprobs.reference")


class GroupConfig(OnlineConfig):
    """RLOO or GRPO: completions of one prompt are judged against each other."""

    name: Literal["rloo", "grpo"] = Field(description="rloo or grpo")

    least_samples: ClassVar[int] = 2

    @property
    def about(self) -> str:
        how = {
            "rloo": "RLOO: policy gradient whose baseline is the mean reward of the prompt's other completions",
            "grpo": "GRPO: clipped policy gradient on rewards normalized within a prompt's completions",
        }
        return f"`{self.name}`: {how[self.name]}."

    @property
    def default_beta(self) -> float:  # type: ignore[override]
        return 0.04 if self.name == "grpo" else 0.05

    def build(self, parts: Parts) -> GroupPolicyGradient:
        writer = self.writer(parts)
        return GroupPolicyGradient(parts.scorer, parts.live_reference, writer, self, parts.config.train.tokens_per_step)


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """A forward pass over groups, token by token (R,), and whose token each is."""

    logps: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    advantages: Tensor  # (C,)
    completion_of: Tensor
    lengths: Tensor  # (C,) int64
    keep: Tensor | None = None  # (C,) 1 or 0: whether a completion is in the update; None: all are


@dataclass(slots=True)
class GroupPolicyGradient(OnPolicy):
    """RLOO (arXiv 2402.14740) and GRPO (arXiv 2402.03300).

    RLOO: ``A_i = R_i - mean_{j != i} R_j`` with ``R = r - beta sum_t (log pi - log ref)``, summed over a completion's tokens.
    GRPO: ``A_i = (r_i - mean r) / std r``, and ``beta k3`` of each token in the loss.
    Both: the clipped surrogate of PPO; on the first update of a batch of rollouts its gradient is ``-A grad log pi``.
    """

    @property
    def token_mean(self) -> bool:
        """Whether every token counts the same (DAPO), not every completion."""
        return self.config.name == "grpo" and self.config.loss_mean == "token"

    def prepare(self, groups: list[Group]) -> None:
        """Advantages; and, where rollouts serve several updates, log-probs by the engine that trains: the first ratio is exactly 1."""
        passes: list[Callable[[PackedBatch], Mapping[str, Tensor]]] = [
            lambda batch: {"ref": self.reference.token_logps(batch)}
        ]
        if self.config.updates > 1:
            passes.append(lambda batch: {"old": references.LiveReference(self.scorer).token_logps(batch)})
        score_groups(groups, passes, self.scorer, self.tokens_per_step, self.side_by_side)
        for g in groups:
            drift = g.extras["old"] - g.extras["ref"]
            lengths = [len(c) for c in g.tree.completion_ids]
            g.extras["kl"] = torch.stack([d.sum() for d in drift.split(lengths)]).double()
        rewards = torch.stack([g.rewards for g in groups])
        if self.config.name == "rloo":
            rewards = rewards - self.config.kl_weight * torch.stack([g.extras["kl"] for g in groups])
            advantages = leave_one_out(rewards)
        else:
            advantages = group_normalized(rewards, self.config.scale_rewards)
        for g, a in zip(groups, advantages, strict=True):
            g.extras["advantages"] = a
        for g, keep in zip(groups, kept(groups) or [], strict=False):
            g.extras["keep"] = keep

    def keep(self, batch: PackedBatch) -> Tensor | None:
        """(C,) 1 or 0: whether a completion is in the update; None where all are."""
        if "keep" not in self._by_row[batch.rows[0]].extras:
            return None
        return self.extra(batch, "keep")

    def weights(self, batch: PackedBatch) -> Mapping[str, float]:
        keep = self.keep(batch)
        if keep is not None:
            per = batch.lengths.to(keep) if self.token_mean else torch.ones_like(keep)
            return {"main": float((keep * per).sum())}
        if self.token_mean:
            return {"main": float(batch.lengths.sum())}
        return {"main": float(len(batch.lengths))}

    def score(self, batch: PackedBatch) -> ScoredTokens:
        tokens = self.scorer.logps(batch).tokens
        ref, advantages = (self.extra(batch, name).to(tokens) for name in ("ref", "advantages"))
        # with one update a batch of rollouts, the policy that is trained is the one that wrote
        old = tokens.detach() if self.config.updates == 1 else self.extra(batch, "old").to(tokens)
        keep = self.keep(batch)
        weights = None if keep is None else keep.to(tokens)
        return ScoredTokens(tokens, old, ref, advantages, batch.completion_of, batch.lengths, weights)

    def loss(self, scored: ScoredTokens) -> LossOutput:
        s, cfg = scored, self.config
        losses, ratios, bound = clipped_surrogate(
            s.logps, s.old_logps, s.advantages[s.completion_of], clip=cfg.clip, clip_high=cfg.clip_high
        )
        k3 = divergences.kl_estimate(s.logps, s.ref_logps, "k3")
        tokens = torch.ones_like(ratios)
        metrics = {
            "ratio": (ratios, None),
            "clip_fraction": (bound, None),
            "kl/per_token": (k3.detach(), None),
            "logps/per_token": (s.logps.detach(), None),
        }
        if cfg.name == "rloo":
            return self._kept(s, logprobs.per_completion(losses, s.lengths), metrics)
        losses = losses + cfg.kl_weight * k3
        if cfg.loss_mean == "token":
            if s.keep is not None:
                tokens = s.keep[s.completion_of]
                losses = losses * tokens
            return LossOutput(losses, tokens, metrics)
        size = s.lengths if cfg.loss_mean == "sequence" else torch.full_like(s.lengths, cfg.max_new_tokens)
        return self._kept(s, logprobs.per_completion(losses, s.lengths) / size, metrics)

    def _kept(self, s: ScoredTokens, losses: Tensor, metrics: Mapping[str, Any]) -> LossOutput:
        return LossOutput(losses if s.keep is None else losses * s.keep, s.keep, metrics)

    def step_values(self) -> dict[str, float]:
        groups = self.groups
        kl, old, ref = (torch.cat([g.extras[name] for g in groups]) for name in ("kl", "old", "ref"))
        k3 = divergences.kl_estimate(old, ref, "k3").sum() / len(kl)
        return reward_metrics_of(groups) | {"kl/policy_ref": float(kl.mean()), "kl/k3": float(k3)}
