"""RLOO and GRPO: k completions of a prompt, each judged against the others; trained on one prompt tree, so the prompt is computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from penchant.algorithms.options import OnlineConfig
from penchant.algorithms.rollouts import Group, Writer, pack_groups, reward_metrics_of, unpack_groups
from penchant.data.packing import pack, plan_microbatches, tree_tokens
from penchant.logprobs import Scorer
from penchant.losses.kl import kl_estimate
from penchant.losses.policy_gradient import clipped_surrogate, group_normalised, leave_one_out
from penchant.reference import LiveReference
from penchant.types import LossOutput, PackedBatch, TokenTree


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """A forward pass over groups, token by token (R,), and whose token each is."""

    logps: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    advantages: Tensor  # (C,)
    completion_of: Tensor
    lengths: Tensor  # (C,)


@dataclass(slots=True)
class GroupPolicyGradient:
    """RLOO (arXiv 2402.14740) and GRPO (arXiv 2402.03300).

    RLOO: ``A_i = R_i - mean_{j != i} R_j`` with ``R = r - beta sum_t (log pi - log ref)``, summed over a completion's tokens.
    GRPO: ``A_i = (r_i - mean r) / std r``, and ``beta k3`` of each token in the loss.
    Both: the clipped surrogate of PPO; on the first update of a batch of rollouts its gradient is ``-A grad log pi``.

    Args:
        scorer: the policy, with the rollouts' temperature; reference: runs once a batch of rollouts.
        writer: samples and judges; config: the method; tokens_per_step: tokens of one forward pass.
    """

    scorer: Scorer
    reference: LiveReference
    writer: Writer
    config: OnlineConfig
    tokens_per_step: int
    coupled: bool = False
    _groups: list[Group] = field(default_factory=list)
    _iteration: int = -1
    _by_row: dict[int, Group] = field(default_factory=dict)

    # ---- a step ---------------------------------------------------------------------------------------------------

    def begin_step(self, step: int, progress: float, trees: Sequence[TokenTree]) -> Sequence[TokenTree]:
        """The groups of this update: new rollouts at the first update of an iteration, else a part of the old ones."""
        iteration, update = divmod(step, self.config.updates)
        if iteration != self._iteration:
            self._roll_out(trees, iteration)
        epoch, part = divmod(update, self.config.minibatches)
        order = np.random.default_rng([self.writer.seed, iteration, epoch]).permutation(len(self._groups))
        mine = sorted(np.array_split(order, self.config.minibatches)[part].tolist())
        chosen = [self._groups[i] for i in mine]
        self._by_row = {g.tree.row: g for g in chosen}
        return [g.tree for g in chosen]

    def _roll_out(self, prompts: Sequence[TokenTree], iteration: int) -> None:
        groups = self.writer.write(prompts, iteration)
        self._log_probs(groups)
        for g in groups:
            drift = g.extras["old"] - g.extras["ref"]
            lengths = [len(c) for c in g.tree.completion_ids]
            g.extras["kl"] = torch.stack([d.sum() for d in drift.split(lengths)]).double()
        rewards = torch.stack([g.rewards for g in groups])
        if self.config.name == "rloo":
            rewards = rewards - self.config.kl_weight * torch.stack([g.extras["kl"] for g in groups])
            advantages = leave_one_out(rewards)
        else:
            advantages = group_normalised(rewards, self.config.scale_rewards)
        for g, a in zip(groups, advantages, strict=True):
            g.extras["advantages"] = a
        self._groups, self._iteration = groups, iteration

    def _log_probs(self, groups: Sequence[Group]) -> None:
        """Log-probs of policy and reference, by the engine that trains: the ratio of the first update is exactly 1."""
        live = LiveReference(self.scorer)
        trees = [g.tree for g in groups]
        device = next(self.scorer.model.parameters()).device
        for members in plan_microbatches([tree_tokens(t, self.scorer.shared) for t in trees], self.tokens_per_step):
            batch = pack([trees[i] for i in members], shared=self.scorer.shared).to(device)
            sizes = [sum(map(len, trees[i].completion_ids)) for i in members]
            for name, model in (("old", live), ("ref", self.reference)):
                for i, part in zip(members, model.token_logps(batch).cpu().split(sizes), strict=True):
                    groups[i].extras[name] = part

    def weights(self, batch: PackedBatch) -> Mapping[str, float]:
        if self.config.name == "grpo" and self.config.loss_mean == "token":
            return {"main": float(batch.lengths.sum())}
        return {"main": float(len(batch.lengths))}

    def score(self, batch: PackedBatch) -> ScoredTokens:
        groups = [self._by_row[row] for row in batch.rows]
        tokens = self.scorer.logps(batch).tokens

        def of(name: str) -> Tensor:
            return torch.cat([g.extras[name] for g in groups]).to(tokens)

        return ScoredTokens(
            tokens, of("old"), of("ref"), of("advantages"), batch.completion_of, batch.lengths.to(tokens.dtype)
        )

    def loss(self, scored: ScoredTokens) -> LossOutput:
        s, cfg = scored, self.config
        losses, ratios, bound = clipped_surrogate(
            s.logps, s.old_logps, s.advantages[s.completion_of], clip=cfg.clip, clip_high=cfg.clip_high
        )
        k3 = kl_estimate(s.logps, s.ref_logps, "k3")
        tokens = torch.ones_like(ratios)
        metrics = {
            "ratio": (ratios, None),
            "clip_fraction": (bound, None),
            "kl/per_token": (k3.detach(), None),
            "logps/per_token": (s.logps.detach(), None),
        }
        if cfg.name == "rloo":
            return LossOutput(_sums(losses, s), None, metrics)
        losses = losses + cfg.kl_weight * k3
        if cfg.loss_mean == "token":
            return LossOutput(losses, tokens, metrics)
        size = s.lengths if cfg.loss_mean == "sequence" else torch.full_like(s.lengths, cfg.max_new_tokens)
        return LossOutput(_sums(losses, s) / size, None, metrics)

    # ---- around a step ----------------------------------------------------------------------------------------------

    def step_values(self) -> dict[str, float]:
        values = reward_metrics_of(self._groups)
        return values | {"kl/policy_ref": float(torch.cat([g.extras["kl"] for g in self._groups]).mean())}

    def end_step(self, step: int, means: Mapping[str, float]) -> None:
        pass

    def state_tensors(self) -> dict[str, Tensor]:
        """The current rollouts: a run that stops between two updates goes on with the same ones."""
        if self._iteration < 0 or self.config.updates == 1:
            return {}
        packed = {f"rollouts/{name}": value.contiguous() for name, value in pack_groups(self._groups).items()}
        return packed | {"iteration": torch.tensor(self._iteration)}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if "iteration" in tensors:
            self._iteration = int(tensors["iteration"])
            prefix = "rollouts/"
            self._groups = unpack_groups(
                {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            )


def _sums(values: Tensor, s: ScoredTokens) -> Tensor:
    return values.new_zeros(len(s.lengths)).index_add(0, s.completion_of, values)
