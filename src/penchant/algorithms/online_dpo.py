"""Online DPO: the policy's own best against its own worst completion of each prompt, by reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from penchant.algorithms.offline import Offline
from penchant.algorithms.rollouts import Group, Writer, reward_metrics_of
from penchant.types import LossOutput, PackedBatch, Scored, TokenTree


@dataclass(slots=True)
class OnlineDPO:
    """Online DPO (arXiv 2402.04792): DPO on pairs that are written and judged in each step.

    Args:
        offline: DPO with a reference that runs in each step; writer: samples and judges.
    """

    offline: Offline
    writer: Writer
    coupled: bool = False
    _groups: list[Group] = field(default_factory=list)

    def begin_step(self, step: int, progress: float, trees: Sequence[TokenTree]) -> Sequence[TokenTree]:
        """Pairs of this step's rollouts; a group whose completions are all alike by reward or text teaches nothing."""
        self._groups = self.writer.write(trees, step)
        pairs = [best_against_worst(g) for g in self._groups]
        # every prompt stays in the step's count of trees, so at least one pair must be there to train on
        return self.offline.begin_step(step, progress, [p for p in pairs if p is not None])

    def weights(self, batch: PackedBatch) -> Mapping[str, float]:
        return self.offline.weights(batch)

    def score(self, batch: PackedBatch) -> Scored:
        return self.offline.score(batch)

    def loss(self, scored: Scored) -> LossOutput:
        return self.offline.loss(scored)

    def step_values(self) -> dict[str, float]:
        used = sum(best_against_worst(g) is not None for g in self._groups)
        return {**reward_metrics_of(self._groups), "pairs": float(used), **self.offline.step_values()}

    def accepts(self, means: Mapping[str, float]) -> bool:
        return self.offline.accepts(means)

    def end_step(self, step: int, means: Mapping[str, float]) -> None:
        self.offline.end_step(step, means)

    def state_tensors(self) -> dict[str, Tensor]:
        return self.offline.state_tensors()

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.offline.load_state_tensors(tensors)


def best_against_worst(group: Group) -> TokenTree | None:
    """The pair of a group, chosen first; None where all rewards are equal, or both are the same tokens."""
    best, worst = int(group.rewards.argmax()), int(group.rewards.argmin())
    tree = group.tree
    ids = (tree.completion_ids[best], tree.completion_ids[worst])
    if group.rewards[best] == group.rewards[worst] or ids[0].tolist() == ids[1].tolist():
        return None
    cut = (tree.truncated[best], tree.truncated[worst])
    scores = (float(group.rewards[best]), float(group.rewards[worst]))
    return replace(tree, completion_ids=ids, truncated=cut, labels=(True, False), scores=scores)
