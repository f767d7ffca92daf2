"""Reward model training with the Bradley-Terry loss on pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from penchant.algorithms.method import AlgorithmConfig, EvaluationContext, Parts
from penchant.losses.supervised import bradley_terry
from penchant.types import Algorithm, LossOutput, PackedBatch, Scored

if TYPE_CHECKING:
    from penchant.rewards.reward_model import RewardScorer


class RewardModelConfig(AlgorithmConfig):
    """Train a reward model on pairs, without `loss` and `reward`. See docs/reward_models.md."""

    name: Literal["reward_model"] = Field(description="reward_model")
    margin: Literal["none", "scores"] = Field(
        "none", description="scores: require a margin of chosen_score - rejected_score between the answers"
    )
    centring: float = Field(
        0.0, ge=0, description="weight of (r_chosen + r_rejected)^2, which keeps the mean reward near 0"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed share of flipped labels")

    about: ClassVar[str] = "`reward_model`: Bradley-Terry: -log sigmoid(r(x, y_w) - r(x, y_l))."
    learns_reward: ClassVar[bool] = True

    @property
    def default_lr(self) -> tuple[float, float]:
        return 1e-5, 1e-4  # an encoder has its own: RewardModelParts.encoder_lr

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"scores"}) if self.margin == "scores" else frozenset()

    def build(self, parts: Parts) -> RewardTraining:
        return RewardTraining(parts.engine, self)

    def evaluate(self, held_out: EvaluationContext) -> dict[str, Any]:
        """Loss and accuracy on held-out pairs, calibration, and the influence of length."""
        from penchant.metrics.heldout import heldout_metrics, pair_quality

        scored, trees = held_out.scored(held_out.algorithm)
        rewards, lengths = (v.cpu().double().numpy().reshape(-1, 2) for v in (scored.policy_logps, scored.lengths))
        metrics, tables = pair_quality(rewards[:, 0] - rewards[:, 1], lengths[:, 0] - lengths[:, 1])
        held_out.keep_tables(tables)
        by_set = held_out.by_set(held_out.algorithm, scored, trees)
        return heldout_metrics(held_out.algorithm, scored, trees) | by_set | metrics


@dataclass(slots=True)
class RewardTraining(Algorithm):
    """The Bradley-Terry loss on packed batches of pairs; see `losses/supervised.py`.

    Args:
        scorer: the reward model; config: margin, label smoothing, centring.
    """

    scorer: RewardScorer
    config: RewardModelConfig

    @property
    def side_by_side(self) -> bool:
        return self.scorer.side_by_side

    def weights(self, batch: PackedBatch) -> Mapping[str, float]:
        if batch.row_weights is None:
            return {"main": float(batch.trees)}
        return {"main": float(batch.row_weights.double().sum()) / 2}  # both answers of a pair have its weight

    def score(self, batch: PackedBatch) -> Scored:
        """Score a batch, with rewards in place of log-probs: one number per completion."""
        rewards = self.scorer.rewards(batch)
        return Scored(
            tree=batch.completion_tree,
            slot=batch.completion_slot,
            lengths=batch.lengths.to(rewards.dtype),
            policy_logps=rewards,
            scores=None if batch.scores is None else batch.scores.to(rewards.dtype),
            row_weights=None if batch.row_weights is None else batch.row_weights.to(rewards.dtype),
            pairs=batch.pairs,
        )

    def loss(self, scored: Scored) -> LossOutput:
        margin = None
        if self.config.margin == "scores":
            assert scored.scores is not None  # the data layer quarantines pairs without scores
            chosen, rejected = scored.sides(scored.scores)
            margin = chosen - rejected
        out = bradley_terry(
            *scored.sides(scored.policy_logps),
            margin,
            label_smoothing=self.config.label_smoothing,
            centring=self.config.centring,
        )
        return out if scored.row_weights is None else out.weighted(scored.sides(scored.row_weights)[0])
