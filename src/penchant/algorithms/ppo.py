"""PPO: a value for every token, generalized advantages, the clipped surrogate; several passes over each batch of rollouts.

docs/ppo.md lists every detail with its source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penchant.algorithms.options import PPOConfig
from penchant.algorithms.rollouts import Buffer, Group, Writer, reward_metrics_of, score_groups
from penchant.logprobs import Scorer
from penchant.logprobs.reference import LiveReference
from penchant.losses.divergences import kl_estimate
from penchant.losses.policy_gradient import at_last_token, clipped_surrogate, clipped_value_loss, gae, whitened
from penchant.models.reward import ValueHead
from penchant.types import LossOutput, PackedBatch, TokenTree


@dataclass(frozen=True, slots=True)
class ScoredSteps:
    """A forward pass over completions, token by token (R,)."""

    logps: Tensor
    values: Tensor
    old_logps: Tensor
    old_values: Tensor
    ref_logps: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(slots=True)
class PPO:
    """PPO (arXiv 1707.06347) on completions, as in arXiv 1909.08593 and 2009.01325.

    Token reward ``r_t = -beta kl_t``, plus the completion's reward at its last real token; advantages by GAE; loss
    ``mean_t [-min(ratio A, clip(ratio) A)] + value_coef mean_t [value loss]`` over the tokens of a minibatch.

    Args:
        scorer: the policy, with the rollouts' temperature; reference: runs once a batch of rollouts.
        value_head: on the policy's hidden states, or on `value_scorer`'s, a model of its own.
        writer: samples and judges; config: the method; tokens_per_step: tokens of one forward pass.
    """

    scorer: Scorer
    reference: LiveReference
    value_head: ValueHead
    writer: Writer
    config: PPOConfig
    tokens_per_step: int
    value_scorer: Scorer | None = None
    coupled: bool = False
    buffer: Buffer = field(init=False)
    beta: float = field(init=False)
    _moments: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))  # count, mean, sum of squares

    def __post_init__(self) -> None:
        self.buffer = Buffer(self.writer, self.config.epochs, self.config.minibatches)
        self.beta = self.config.start_beta

    # ---- rollouts ---------------------------------------------------------------------------------------------------

    def begin_step(self, step: int, progress: float, trees: Sequence[TokenTree]) -> Sequence[TokenTree]:
        """The completions of this update: new rollouts at the first update of an iteration, else a part of the old ones."""
        return self.buffer.part(step, trees, self._prepare)

    def _prepare(self, groups: list[Group]) -> None:
        """Old log-probs and values by the engine that trains, token rewards, advantages and returns."""
        cfg = self.config
        passes = [self._old_and_values, lambda batch: {"ref": self.reference.token_logps(batch)}]
        score_groups(groups, passes, self.scorer, self.tokens_per_step)
        lengths = torch.tensor([len(c) for g in groups for c in g.tree.completion_ids])
        old, ref, values = (torch.cat([g.extras[name] for g in groups]) for name in ("old", "ref", "values"))
        scores = self._shaped(torch.cat([g.rewards for g in groups])).to(old.dtype)
        rewards = at_last_token(scores, lengths) - self.beta * kl_estimate(old, ref, cfg.kl_estimator)
        if cfg.whiten_rewards:
            rewards = whitened(rewards, keep_mean=True)
        advantages, returns = gae(rewards, values, lengths, gamma=cfg.gamma, lam=cfg.lam)
        if cfg.whiten_advantages:
            advantages = whitened(advantages)
        sizes = [sum(map(len, g.tree.completion_ids)) for g in groups]
        for name, per_token in (("advantages", advantages), ("returns", returns)):
            for g, part in zip(groups, per_token.split(sizes), strict=True):
                g.extras[name] = part
        if cfg.kl_control == "adaptive":  # arXiv 1909.08593, section 2.2: proportional, the error held at 0.2
            kl = float((old - ref).sum() / len(lengths))
            error = min(0.2, max(-0.2, kl / cfg.kl_target - 1.0))
            self.beta *= 1.0 + error * len(lengths) / cfg.kl_horizon

    def _shaped(self, scores: Tensor) -> Tensor:
        """Rewards over their running standard deviation, and held within +- score_clip, where asked for."""
        if self.config.normalise_scores:
            self._moments = _with(self._moments, scores)
            count, _, squares = self._moments.tolist()
            if count > 1 and squares > 0:
                scores = scores / (squares / (count - 1)) ** 0.5
        clip = self.config.score_clip
        return scores if clip is None else scores.clamp(-clip, clip)

    def _values(self, batch: PackedBatch, hidden: Tensor) -> Tensor:
        return self.value_head(hidden if self.value_scorer is None else self.value_scorer.predicting(batch))

    def _old_and_values(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Log-probs and values of the policy that wrote: with a head on the policy, one forward pass gives both."""
        model = self.scorer.model
        training = model.training
        model.eval()
        with torch.no_grad():
            hidden = self.scorer.predicting(batch)
            found = {"old": self.scorer.logps(batch, hidden=hidden).tokens, "values": self._values(batch, hidden)}
        model.train(training)
        return found

    # ---- the update ---------------------------------------------------------------------------------------------------

    def weights(self, batch: PackedBatch) -> Mapping[str, float]:
        tokens = float(batch.lengths.sum())
        return {"main": tokens, "value": tokens}

    def score(self, batch: PackedBatch) -> ScoredSteps:
        hidden = self.scorer.predicting(batch)
        logps = self.scorer.logps(batch, hidden=hidden).tokens
        values = self._values(batch, hidden)
        old, old_values, ref, advantages, returns = (
            self.buffer.of(batch, name).to(logps) for name in ("old", "values", "ref", "advantages", "returns")
        )
        return ScoredSteps(logps, values, old, old_values, ref, advantages, returns)

    def loss(self, scored: ScoredSteps) -> LossOutput:
        s, cfg = scored, self.config
        losses, ratios, bound = clipped_surrogate(
            s.logps, s.old_logps, s.advantages, clip=cfg.clip, clip_high=cfg.clip_high
        )
        value_losses, value_bound = clipped_value_loss(s.values, s.old_values, s.returns, clip=cfg.value_clip)
        ones = torch.ones_like(ratios)
        explained = (s.returns - s.values.detach()).square()
        metrics = {
            "ratio": (ratios, None),
            "clip_fraction": (bound, None),
            "value/clip_fraction": (value_bound, None),
            "value/error": (explained, None),
            "value/mean": (s.values.detach(), None),
            "kl/per_token": (kl_estimate(s.logps.detach(), s.ref_logps, "k3"), None),
            "kl/old_new": (kl_estimate(s.old_logps, s.logps.detach(), "k3"), None),
            "entropy/sampled": (-s.logps.detach(), None),
            "logps/per_token": (s.logps.detach(), None),
        }
        return LossOutput(losses, ones, metrics, {"value": (cfg.value_coef * value_losses, ones)})

    # ---- around a step ------------------------------------------------------------------------------------------------

    def step_values(self) -> dict[str, float]:
        groups = self.buffer.groups
        drift = torch.cat([g.extras["old"] - g.extras["ref"] for g in groups])
        count = sum(len(g.tree.completion_ids) for g in groups)
        return reward_metrics_of(groups) | {"kl/policy_ref": float(drift.sum() / count), "beta": self.beta}

    def accepts(self, means: Mapping[str, float]) -> bool:
        """Not beyond `ratio_limit`: there the rollouts say nothing of the policy that is trained."""
        return means["ratio"] <= self.config.ratio_limit

    def end_step(self, step: int, means: Mapping[str, float]) -> None:
        pass

    def state_tensors(self) -> dict[str, Tensor]:
        """The rollouts, the adaptive beta and the running moments of rewards."""
        own = {"beta": torch.tensor(self.beta, dtype=torch.float64), "moments": self._moments.clone()}
        return self.buffer.state_tensors() | own

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.buffer.load_state_tensors(tensors)
        if "beta" in tensors:
            self.beta, self._moments = float(tensors["beta"]), tensors["moments"].clone()


def _with(moments: Tensor, new: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations with new numbers added (Chan's update)."""
    count, mean, squares = moments.tolist()
    n, m = len(new), float(new.mean())
    total = count + n
    gap = m - mean
    squares += float((new - m).square().sum()) + gap * gap * count * n / total
    return torch.tensor([total, mean + gap * n / total, squares], dtype=torch.float64)
