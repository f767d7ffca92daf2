"""Online DPO: DPO on the policy's own best and worst completion of each prompt, by reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from penchant.algorithms.method import Parts, Rollouts
from penchant.algorithms.offline import Component, Offline
from penchant.algorithms.rollouts import Group, OnlineConfig, Writer, rollout_reward_metrics
from penchant.losses import LOSSES
from penchant.types import TokenTree


class OnlineDPOConfig(OnlineConfig):
    """Online DPO: DPO on the best and the worst completion of each prompt."""

    name: Literal["online_dpo"] = Field(description="online_dpo")

    about: ClassVar[str] = (
        "`online_dpo`: online DPO: -log sigmoid(beta h) on pairs of its own completions, ranked by the reward."
    )
    default_beta: ClassVar[float] = 0.1
    least_samples: ClassVar[int] = 2

    @model_validator(mode="after")
    def _check_updates(self) -> OnlineDPOConfig:
        if self.updates > 1:
            raise ValueError("online_dpo takes one step on each batch of rollouts; leave out epochs and minibatches")
        if self.kl_weight == 0:
            raise ValueError("beta is 0; give a number above 0")
        return self

    @property
    def rollouts(self) -> Rollouts:
        return Rollouts(self.samples, 2, self.max_new_tokens)

    @property
    def idle(self) -> dict[str, str]:
        unused = ("entropy_coef", "clip", "clip_high", "clip_dual", "scale_rewards", "loss_mean")
        reason = "with online_dpo, which is no policy gradient method; leave it out"
        return dict.fromkeys((*unused, "rollout.lag", "rollout.correction"), reason)

    def build(self, parts: Parts) -> OnlineDPO:
        writer, dpo = self.writer(parts), LOSSES["dpo"]
        component = Component(dpo, dpo.params.model_validate({"beta": self.kl_weight}))
        return OnlineDPO(parts.scorer, [component], parts.live_reference, writer=writer)


@dataclass(slots=True, kw_only=True)
class OnlineDPO(Offline):
    """Online DPO (arXiv 2402.04792): DPO on pairs that are sampled and scored in each step.

    Args:
        writer: samples and scores completions; the other arguments are those of `Offline`, with a live reference.
    """

    writer: Writer
    _groups: list[Group] = field(default_factory=list)

    def begin_step(self, step: int, progress: float, trees: Sequence[TokenTree]) -> Sequence[TokenTree]:
        """Sample this step's pairs; groups whose completions have equal rewards or texts are left out."""
        self.writer.version = step
        self._groups = self.writer.write(trees, step)
        pairs = [best_against_worst(g) for g in self._groups]
        # without any pair, the step is empty
        return Offline.begin_step(self, step, progress, [p for p in pairs if p is not None])

    def end_step(self, step: int, means: Mapping[str, float]) -> None:
        self.writer.version = step
        Offline.end_step(self, step, means)

    def step_values(self) -> dict[str, float]:
        pair_count = sum(best_against_worst(g) is not None for g in self._groups)
        return {**rollout_reward_metrics(self._groups), "pairs": float(pair_count), **Offline.step_values(self)}


def best_against_worst(group: Group) -> TokenTree | None:
    """The (chosen, rejected) pair of a group; None if all rewards are equal or unknown, or both have the same tokens."""
    low, high = group.rewards.nan_to_num(float("-inf")), group.rewards.nan_to_num(float("inf"))
    best, worst = int(low.argmax()), int(high.argmin())
    tree = group.tree
    ids = (tree.completion_ids[best], tree.completion_ids[worst])
    if not group.rewards[best] > group.rewards[worst] or ids[0].tolist() == ids[1].tolist():
        return None
    truncated = (tree.truncated[best], tree.truncated[worst])
    scores = (float(group.rewards[best]), float(group.rewards[worst]))
    masks = (tree.masks[best], tree.masks[worst]) if tree.masks else ()
    return replace(tree, completion_ids=ids, truncated=truncated, labels=(True, False), scores=scores, masks=masks)
