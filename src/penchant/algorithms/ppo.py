"""PPO: a value per token, generalized advantages, the clipped surrogate, and several passes over each batch of rollouts.

docs/ppo.md lists every detail with its source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from penchant.algorithms.advantages import at_last_token, gae, whiten
from penchant.algorithms.method import Parts
from penchant.algorithms.rollouts import (
    Group,
    OnlineConfig,
    OnPolicy,
    completion_masks,
    rollout_reward_metrics,
    score_groups,
)
from penchant.base.lazy import Tensor, lazy, torch
from penchant.data.tokenize import same_tokens
from penchant.errors import ConfigError
from penchant.losses.policy_gradient import clipped_surrogate, clipped_value_loss
from penchant.models.options import ModelConfig
from penchant.types import LossOutput, PackedBatch, Weighted

if TYPE_CHECKING:
    from penchant.logprobs import Scorer
    from penchant.logprobs import reference as references
    from penchant.losses import divergences
    from penchant.models.reward import ValueHead, ValueModel
    from penchant.rewards import RewardConfig
else:
    divergences = lazy("penchant.losses.divergences")
    references = lazy("penchant.logprobs.reference")


POLICY, VALUE = "policy", "value"  # `PPO.strands`


class PPOConfig(OnlineConfig):
    """PPO settings and defaults; docs/ppo.md has the source of each."""

    name: Literal["ppo"] = Field(description="ppo")
    samples: int = Field(1, ge=1, le=4096, description="completions of each prompt")
    temperature: float = Field(0.7, gt=0, description="temperature of sampling and of every log-prob in the update")
    epochs: int = Field(4, ge=1, le=10_000, description="passes over each batch of rollouts")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="estimator of the per-token KL penalty")
    kl_control: Literal["fixed", "adaptive"] = Field("fixed", description="keep beta, or adapt it towards kl_target")
    kl_target: float = Field(6.0, gt=0, description="adaptive: the target KL per completion, in nats")
    kl_horizon: float = Field(10_000, gt=0, description="adaptive: number of completions over which beta adapts")
    gamma: float = Field(1.0, ge=0, le=1, description="discount of later rewards")
    lam: float = Field(0.95, alias="lambda", ge=0, le=1, description="lambda of generalized advantage estimation")
    value: Literal["head", "separate"] = Field("head", description="value function: a head on the policy, or a model")
    value_init: Literal["auto", "zero", "reward"] = Field(
        "auto",
        description="start of a separate value model: the reward model (auto: if it fits), or the policy with a zero head",
    )
    value_coef: float = Field(0.1, ge=0, description="weight of the value loss")
    value_clip: float | None = Field(0.2, gt=0, description="clip the value to its old one +- this; null: off")
    whiten_advantages: bool = Field(
        True,
        description="normalize advantages to zero mean and unit variance over all completion tokens of the rollouts",
    )
    whiten_rewards: bool = Field(False, description="scale token rewards to unit variance and keep their mean")
    normalise_scores: bool = Field(False, description="divide rewards by their running standard deviation")
    score_clip: float | None = Field(None, gt=0, description="clip rewards to +- this")
    adam_eps: float = Field(1e-5, gt=0, description="Adam's epsilon, instead of train.adam_eps")
    ratio_limit: float = Field(10.0, gt=1, description="skip a minibatch whose mean probability ratio exceeds this")

    @property
    def idle(self) -> dict[str, str]:
        reasons = self.of_later_updates("clip", "clip_high", "clip_dual", "value_clip", "ratio_limit")
        reasons |= dict.fromkeys(("scale_rewards", "loss_mean"), "with ppo; leave it out")
        reasons["train.adam_eps"] = "with ppo; set algorithm.adam_eps"
        if self.value != "separate":
            reasons["value_init"] = "on a head on the policy; set value: separate, or leave {} out"
        if not self.value_coef:
            reasons["value_clip"] = "where value_coef is 0; leave it out"
        if self.kl_control == "fixed":
            reason = "while beta is fixed; set kl_control: adaptive, or leave {} out"
            reasons |= dict.fromkeys(("kl_target", "kl_horizon"), reason)
        if not self.start_beta:
            reasons |= dict.fromkeys(("kl_estimator", "kl_control"), "where beta is 0; set beta, or leave {} out")
        return reasons

    @property
    def start_beta(self) -> float:
        """beta, with auto resolved: 0.05 if fixed; adaptive control starts at 0.2."""
        return 0.2 if self.beta == "auto" and self.kl_control == "adaptive" else self.kl_weight

    about: ClassVar[str] = (
        "`ppo`: PPO: clipped policy gradient on generalized advantage estimates, with a KL penalty to the start."
    )

    @property
    def optimizer(self) -> dict[str, Any]:
        return {"adam_eps": self.adam_eps}

    @property
    def copies(self) -> int:
        return 1 if self.value == "separate" else 0

    def modules(self, parts: Parts, load: Callable[[], Any], note: Callable[[str], None]) -> dict[str, ValueModel]:
        """The value function: a head on the policy's hidden states, or a separate model started from the policy or reward model."""
        from penchant.models.reward import ValueModel

        backbone = load() if self.value == "separate" else None
        value_model = ValueModel(parts.model.get_input_embeddings().weight.shape[1], backbone)
        if backbone is not None and self.value_init != "zero":
            note(start_value(value_model, parts.config.reward, parts.tokenizer, demanded=self.value_init == "reward"))
        return {"value": value_model.to(next(parts.model.parameters()).device)}

    def build(self, parts: Parts) -> PPO:
        from penchant.distributed.shard import rooted

        writer, scorer, value = self.writer(parts), parts.scorer, parts.modules["value"]
        value_scorer = None
        if value.backbone is not None:
            value_scorer = rooted(scorer.on(value.backbone))
        return PPO(
            scorer, parts.live_reference, writer, self, parts.config.train.tokens_per_step, value.head, value_scorer
        )


@dataclass(frozen=True, slots=True)
class ScoredSteps:
    """Per-token results (R,) of a forward pass; with a separate value model, a pass has either log-probs or values."""

    logps: Tensor | None
    values: Tensor | None
    old_logps: Tensor
    old_values: Tensor
    ref_logps: Tensor
    advantages: Tensor
    returns: Tensor
    keep: Tensor  # 1 or 0: whether a token is in the update
    entropy: Tensor | None = None  # if it is in the loss
    importance: Tensor | None = None  # importance weights if something else sampled; None: 1


@dataclass(slots=True)
class PPO(OnPolicy):
    """PPO (arXiv 1707.06347) on completions, as in arXiv 1909.08593 and 2009.01325.

    Token reward ``r_t = -beta kl_t``, plus the completion's reward at its last real token; advantages by GAE; loss
    ``mean_t [-min(ratio A, clip(ratio) A)] + value_coef mean_t [value loss]`` over the tokens of a minibatch.

    Args:
        value_head: on the hidden states of the policy, or of `value_scorer`, a separate model.
    """

    config: PPOConfig
    value_head: ValueHead
    value_scorer: Scorer | None = None
    beta: float = field(init=False)  # of the next rollouts
    used_beta: float = field(init=False)  # of the current ones
    _moments: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))  # count, mean, sum of squares

    def __post_init__(self) -> None:
        self.beta = self.used_beta = self.config.start_beta

    # ---- rollouts ---------------------------------------------------------------------------------------------------

    @property
    def side_by_side(self) -> bool:
        value_side_by_side = self.value_scorer is None or self.value_scorer.side_by_side
        return value_side_by_side and self.scorer.side_by_side and self.reference.side_by_side

    @property
    def strands(self) -> tuple[str, ...]:
        """A separate value model has separate passes."""
        return ("",) if self.value_scorer is None else (POLICY, VALUE)

    def prepare(self, groups: list[Group]) -> None:
        """Compute old log-probs and values with the training engine, token rewards, advantages and returns."""
        cfg = self.config
        passes = [self._old_logps_and_values, lambda batch: {"ref": self.reference.token_logps(batch)}]
        score_groups(groups, passes, self.scorer, self.tokens_per_step, self.side_by_side)
        lengths = torch.tensor([n for g in groups for n in g.tree.trained])
        old, ref, values = (torch.cat([g.extras[name] for g in groups]) for name in ("old", "ref", "values"))
        sizes = [sum(g.tree.trained) for g in groups]
        has_reward = None if (masks := completion_masks(groups)) is None else torch.cat(masks) > 0  # of completions
        scores = self._shape_rewards(torch.cat([g.rewards for g in groups]), has_reward).to(old.dtype)
        self.used_beta = self.beta
        rewards = at_last_token(scores, lengths) - self.beta * divergences.kl_estimate(old, ref, cfg.kl_estimator)
        in_update = None if has_reward is None else has_reward.repeat_interleave(lengths)  # tokens that are trained on
        if cfg.whiten_rewards:
            rewards = whiten(rewards, which=in_update, keep_mean=True)
        advantages, returns = gae(rewards, values, lengths, gamma=cfg.gamma, lam=cfg.lam)
        if cfg.whiten_advantages:
            advantages = whiten(advantages, which=in_update)
        if in_update is not None:
            for g, part in zip(groups, in_update.to(old.dtype).split(sizes), strict=True):
                g.extras["keep"] = part
        for name, per_token in (("advantages", advantages), ("returns", returns)):
            for g, part in zip(groups, per_token.split(sizes), strict=True):
                g.extras[name] = part
        if cfg.kl_control == "adaptive":  # arXiv 1909.08593, section 2.2: proportional, error clipped to 0.2
            kl = float((old - ref).sum() / len(lengths))
            error = min(0.2, max(-0.2, kl / cfg.kl_target - 1.0))
            self.beta *= 1.0 + error * len(lengths) / cfg.kl_horizon

    def _shape_rewards(self, scores: Tensor, valid: Tensor | None = None) -> Tensor:
        """Rewards divided by their running standard deviation and clipped to +- score_clip, if enabled; unknown ones are 0."""
        if valid is not None:
            shaped = torch.zeros_like(scores)
            if bool(valid.any()):
                shaped[valid] = self._shape_rewards(scores[valid])
            return shaped
        if self.config.normalise_scores:
            self._moments = _update_moments(self._moments, scores)
            count, _, squares = self._moments.tolist()
            if count > 1 and squares > 0:
                scores = scores / (squares / (count - 1)) ** 0.5
        clip = self.config.score_clip
        return scores if clip is None else scores.clamp(-clip, clip)

    def _logps_and_values(
        self, batch: PackedBatch, entropy: bool = False
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Log-probs, values and, on request, entropy, (R,) each; with a separate value model, only those of the batch's strand."""
        if self.value_scorer is None:
            logps, values = self.scorer.valued(batch, self.value_head, entropy=entropy)
            return logps.tokens, values, logps.entropy
        policy = None if batch.strand == VALUE else self.scorer.logps(batch, entropy=entropy)
        own_values = None if batch.strand == POLICY else self.value_scorer.values(batch, self.value_head)
        return (None, own_values, None) if policy is None else (policy.tokens, own_values, policy.entropy)

    def _old_logps_and_values(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Log-probs and values of the policy that sampled."""
        with references.LiveReference(self.scorer).at_rest():
            logps, values, _ = self._logps_and_values(batch)
            assert logps is not None and values is not None
            return {"old": logps, "values": values}

    # ---- the update ---------------------------------------------------------------------------------------------------

    def weights(self, batch: PackedBatch) -> Mapping[str, float]:
        keep = self._keep(batch)
        tokens = float(batch.lengths.sum()) if keep is None else float(keep.sum())
        return {"main": tokens * (batch.strand != VALUE), "value": tokens * (batch.strand != POLICY)}

    def _keep(self, batch: PackedBatch) -> Tensor | None:
        """(R,) 1 or 0: whether a token is in the update; None if all are."""
        return self.extra(batch, "keep") if "keep" in self._by_row[batch.rows[0]].extras else None

    def score(self, batch: PackedBatch) -> ScoredSteps:
        logps, values, entropy = self._logps_and_values(batch, bool(self.config.entropy_coef))
        like = (logps if values is None else values).detach()  # type: ignore[union-attr]
        old, old_values, ref, advantages, returns = (
            self.extra(batch, name).to(like) for name in ("old", "values", "ref", "advantages", "returns")
        )
        keep = self._keep(batch)
        weights = torch.ones_like(like) if keep is None else keep.to(like)
        importance = self.importance(batch, like)
        return ScoredSteps(logps, values, old, old_values, ref, advantages, returns, weights, entropy, importance)

    def loss(self, scored: ScoredSteps) -> LossOutput:
        s, cfg, empty = scored, self.config, scored.keep.new_zeros(0)
        losses, weights, metrics = (empty, empty, {}) if s.logps is None else self._policy_loss(s, s.logps)
        terms = {}
        if s.values is not None:
            value_losses, clipped = clipped_value_loss(s.values, s.old_values, s.returns, clip=cfg.value_clip)
            terms["value"] = (cfg.value_coef * value_losses * s.keep, s.keep)
            metrics |= {
                "value/clip_fraction": (clipped, None),
                "value/error": ((s.returns - s.values.detach()).square(), None),
                "value/mean": (s.values.detach(), None),
            }
        return LossOutput(losses, weights, metrics, terms)

    def _policy_loss(self, s: ScoredSteps, logps: Tensor) -> tuple[Tensor, Tensor, dict[str, Weighted]]:
        """Losses and weights (R,), and metrics."""
        cfg, detached = self.config, logps.detach()
        losses, ratios, clipped = clipped_surrogate(
            logps, s.old_logps, s.advantages, clip=cfg.clip, clip_high=cfg.clip_high, dual=cfg.clip_dual
        )
        if s.importance is not None:
            losses = losses * s.importance
        metrics: dict[str, Weighted] = {
            "ratio": (ratios, None),
            "clip_fraction": (clipped, None),
            "kl/per_token": (divergences.kl_estimate(detached, s.ref_logps, "k3"), None),
            "kl/old_new": (divergences.kl_estimate(s.old_logps, detached, "k3"), None),
            "entropy/sampled": (-detached, None),
            "logps/per_token": (detached, None),
        }
        if s.entropy is not None:
            losses = losses - cfg.entropy_coef * s.entropy
            metrics["policy/entropy"] = (s.entropy.detach(), None)
        return losses * s.keep, s.keep, metrics

    # ---- around a step ------------------------------------------------------------------------------------------------

    def step_values(self) -> dict[str, float]:
        groups = self.groups
        old, ref = (torch.cat([g.extras[name] for g in groups]) for name in ("old", "ref"))
        count = sum(len(g.tree.completion_ids) for g in groups)
        kl = {
            "kl/policy_ref": float(divergences.kl_estimate(old, ref, "k1").sum() / count),
            "kl/k3": float(divergences.kl_estimate(old, ref, "k3").sum() / count),
        }
        return rollout_reward_metrics(groups) | kl | {"beta": self.used_beta} | self.rollout_values()

    def accepts(self, means: Mapping[str, float]) -> bool:
        """False beyond `ratio_limit`, where the rollouts no longer represent the current policy."""
        return means["ratio"] <= self.config.ratio_limit

    def state_tensors(self) -> dict[str, Tensor]:
        """The rollouts, the adaptive beta and the running moments of rewards."""
        betas = {"beta": self.beta, "used_beta": self.used_beta}
        own_state = {name: torch.tensor(value, dtype=torch.float64) for name, value in betas.items()}
        return OnPolicy.state_tensors(self) | own_state | {"moments": self._moments.clone()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        OnPolicy.load_state_tensors(self, tensors)
        if "beta" in tensors:
            self.beta, self._moments = float(tensors["beta"]), tensors["moments"].clone()
            self.used_beta = float(tensors.get("used_beta", tensors["beta"]))  # older checkpoints have one


def _update_moments(moments: Tensor, values: Tensor) -> Tensor:
    """Update (count, mean, sum of squared deviations) with new numbers (Chan's method)."""
    count, mean, squares = moments.tolist()
    n, m = len(values), float(values.mean())
    total = count + n
    delta = m - mean
    squares += float((values - m).square().sum()) + delta * delta * count * n / total
    return torch.tensor([total, mean + delta * n / total, squares], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# initialization of a separate value model


def start_value(value: ValueModel, reward: RewardConfig, tokenizer: Any, *, demanded: bool) -> str:
    """Initialize a separate value model from the reward model: its backbone, and its head times the reward's weight.

    Returns:
        A sentence for the log.

    Raises:
        ConfigError: `demanded`, but the rewards do not hold exactly one causal reward model of the policy's architecture
            and tokenizer.
    """
    from penchant.rewards.reward_model import find_reward_model

    folders = {name: path for name in reward.terms if (path := find_reward_model(name)) is not None}
    reason = "" if len(folders) == 1 else f"{len(folders)} of the rewards are reward models"
    if not reason:
        ((name, folder),) = folders.items()
        reason = _copy_weights(value, str(folder), reward.terms[name], tokenizer)
        if not reason:
            return f"value model: starts as {name}"
    if demanded:
        raise ConfigError("algorithm.value_init", f"is reward, but {reason}", "set it to auto or zero")
    return f"value model: starts as the policy, its head from zero ({reason})"


def _copy_weights(value: ValueModel, folder: str, weight: float, tokenizer: Any) -> str:
    """Copy the weights; return the reason if that is impossible, else an empty string."""
    from penchant.models.load import backbone_of, load_tokenizer
    from penchant.models.reward import head_of, is_encoder, load_model_config, load_reward_model

    if is_encoder(load_model_config(folder), folder):
        return "the reward model is an encoder, which gives no value to each token"
    if not same_tokens(tokenizer, load_tokenizer(folder)):
        return "the reward model has another tokenizer"
    reward_model = load_reward_model(ModelConfig(path=folder), torch.device("cpu")).model
    value_weights = backbone_of(value.backbone).state_dict() if value.backbone is not None else {}
    # an added padding token has a row after the others, which is never read
    reward_weights = {
        n: w[: value_weights[n].shape[0]] if n in value_weights and w.ndim == 2 else w
        for n, w in backbone_of(reward_model).state_dict().items()
    }
    if {n: w.shape for n, w in reward_weights.items()} != {n: w.shape for n, w in value_weights.items()}:
        return "the reward model has another architecture"
    with torch.no_grad():
        for name, target in value_weights.items():
            target.copy_(reward_weights[name])
        value.head.weight.copy_(weight * head_of(reward_model).weight)
    return ""
