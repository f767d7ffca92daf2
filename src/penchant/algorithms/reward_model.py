"""Training a reward model: Bradley-Terry on pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from penchant.algorithms.options import RewardModelConfig
from penchant.losses.supervised import bradley_terry
from penchant.rewards.reward_model import RewardScorer
from penchant.types import LossOutput, PackedBatch, Scored, TokenTree


@dataclass(slots=True)
class RewardTraining:
    """The Bradley-Terry loss on packed batches of pairs; see `losses/reward.py`.

    Args:
        scorer: the reward model; config: margin, label smoothing, centring.
    """

    scorer: RewardScorer
    config: RewardModelConfig
    coupled: bool = False

    def begin_step(self, step: int, progress: float, trees: Sequence[TokenTree]) -> Sequence[TokenTree]:
        return trees

    def weights(self, batch: PackedBatch) -> Mapping[str, float]:
        return {"main": float(batch.trees)}

    def score(self, batch: PackedBatch) -> Scored:
        """Rewards ride where other methods have log-probs: one number a completion, like those."""
        rewards = self.scorer.rewards(batch)
        return Scored(
            tree=batch.completion_tree,
            slot=batch.completion_slot,
            lengths=batch.lengths.to(rewards.dtype),
            policy_logps=rewards,
            scores=None if batch.scores is None else batch.scores.to(rewards.dtype),
        )

    def loss(self, scored: Scored) -> LossOutput:
        chosen, rejected = scored.slot == 0, scored.slot == 1
        margin = None
        if self.config.margin == "scores":
            assert scored.scores is not None  # the data layer keeps pairs without scores aside
            margin = scored.scores[chosen] - scored.scores[rejected]
        return bradley_terry(
            scored.policy_logps[chosen],
            scored.policy_logps[rejected],
            margin,
            label_smoothing=self.config.label_smoothing,
            centring=self.config.centring,
        )

    def step_values(self) -> dict[str, float]:
        return {}

    def accepts(self, means: Mapping[str, float]) -> bool:
        return True

    def end_step(self, step: int, means: Mapping[str, float]) -> None:
        pass

    def state_tensors(self) -> dict[str, Tensor]:
        return {}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        pass
