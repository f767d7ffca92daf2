"""What an online method gained on held-out prompts: reward of fresh completions, and how far the policy went for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from penchant.evaluation.stats import bootstrap_ci, share_ci
from penchant.logprobs import Scorer
from penchant.reference import LiveReference, compute_logps
from penchant.types import TokenTree

EVALUATION = 2**40  # an iteration of its own: training never draws with this seed


class Judged(Protocol):
    """A prompt's completions and their rewards."""

    tree: TokenTree
    rewards: torch.Tensor


class Writes(Protocol):
    """What writes completions and judges them; see `algorithms/rollouts.py`."""

    def write(self, prompts: Sequence[TokenTree], iteration: int, samples: int | None = None) -> Sequence[Judged]: ...


def evaluate_online(
    writer: Any,
    scorer: Scorer,
    start: LiveReference,
    prompts: Sequence[TokenTree],
    tokens_per_step: int,
    *,
    rewards_of_start: Callable[[np.ndarray], np.ndarray | None] = lambda _: None,
) -> dict[str, Any]:
    """Mean reward of one completion a held-out prompt, with its 95% interval by prompt, and KL(policy || start) on them.

    Args:
        rewards_of_start: what the start's completions of the same prompts were worth, (prompts,), given the policy's own rewards (which they
            are at the start); None: nobody knows.

    Returns:
        ``eval/reward``, ``eval/win_rate`` against the start (ties half) and ``eval/kl/policy_ref`` with ``/ci``, ``eval/completions/length``, ``eval/completions/ended``, ``eval/rows``;
        ``eval/loss`` is minus the reward, so that the best checkpoint is the one with the highest.
    """
    source: Writes = writer
    groups = source.write(prompts, EVALUATION, 1)
    rewards = np.array([float(g.rewards[0]) for g in groups])
    trees = [g.tree for g in groups]
    now, then = (
        compute_logps(m, trees, tokens_per_step=tokens_per_step).sums.double().numpy()
        for m in (LiveReference(scorer), start)
    )
    metrics: dict[str, Any] = {"eval/loss": -float(rewards.mean()), "eval/rows": len(trees)}
    values_of = {"reward": rewards, "kl/policy_ref": now - then}
    start_rewards = rewards_of_start(rewards)
    if start_rewards is not None:
        values_of["win_rate"] = (rewards > start_rewards) + 0.5 * (rewards == start_rewards)
    for name, values in values_of.items():
        interval = (share_ci if name == "win_rate" else bootstrap_ci)(values, draws=2000)
        metrics |= {f"eval/{name}": interval.estimate, f"eval/{name}/ci": [interval.low, interval.high]}
    metrics["eval/completions/length"] = float(np.mean([len(t.completion_ids[0]) for t in trees]))
    metrics["eval/completions/ended"] = float(np.mean([not t.truncated[0] for t in trees]))
    return metrics
