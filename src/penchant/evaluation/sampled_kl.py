"""KL(policy || reference) from completions that the policy itself writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from penchant.data.packing import pack, plan_microbatches, tree_tokens
from penchant.evaluation.stats import bootstrap_ci
from penchant.losses.divergences import kl_estimate
from penchant.reference import LiveReference
from penchant.rollout.generate import sample
from penchant.types import TokenTree


def sampled_kl(
    policy: LiveReference,
    reference: LiveReference,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int | None,
    seed: int,
    tokens_per_step: int,
) -> dict[str, Any]:
    """KL of the policy from the reference on completions sampled at temperature 1.

    With ``d_t = log pi(y_t) - log ref(y_t)``: per completion ``k1 = sum_t d_t`` (unbiased), per token
    ``k3 = exp(-d_t) - 1 + d_t`` (unbiased, never negative; Schulman, "Approximating KL divergence", 2020).

    Args:
        policy, reference: both run live, without gradient.
        prompts: token ids; one completion each, of at most `max_new_tokens`.

    Returns:
        ``kl/policy_ref`` in nats per completion with its 95% interval by prompt, ``kl/per_token`` (k3), ``kl/completions``.
    """
    rows = sample(policy.scorer.model, prompts, max_new_tokens=max_new_tokens, seed=seed, eos_token_id=eos_token_id)
    trees = [
        TokenTree(i, np.array(p, np.int32), (np.array(r[0].ids, np.int32),), (not r[0].finished,))
        for i, (p, r) in enumerate(zip(prompts, rows, strict=True))
    ]
    return kl_on(policy, reference, trees, tokens_per_step=tokens_per_step)


def kl_on(
    policy: LiveReference, reference: LiveReference, trees: Sequence[TokenTree], *, tokens_per_step: int
) -> dict[str, Any]:
    """The same on completions that the policy has written already, at temperature 1; any number of a prompt.

    Args:
        trees: each prompt with its completions; the interval draws whole trees.
    """
    per_completion, per_token = kl_by_completion(policy, reference, trees, tokens_per_step=tokens_per_step)
    clusters = [i for i, t in enumerate(trees) for _ in t.completion_ids]
    interval = bootstrap_ci(per_completion, clusters=clusters, draws=2000)
    return {
        "kl/policy_ref": interval.estimate,
        "kl/policy_ref/ci": [interval.low, interval.high],
        "kl/per_token": per_token,
        "kl/completions": len(per_completion),
    }


def kl_by_completion(
    policy: LiveReference, reference: LiveReference, trees: Sequence[TokenTree], *, tokens_per_step: int
) -> tuple[np.ndarray, float]:
    """k1 of every completion in nats, (completions,) in order, and the mean of k3 per token."""
    shared = policy.scorer.shared
    device = next(policy.scorer.model.parameters()).device
    by_tree: dict[int, list[float]] = {}
    k3 = 0.0
    for members in plan_microbatches([tree_tokens(t, shared) for t in trees], tokens_per_step):
        batch = pack([trees[i] for i in members], shared=shared).to(device)
        logps, ref_logps = (m.completion_logps(batch).tokens.double() for m in (policy, reference))
        d = kl_estimate(logps, ref_logps, "k1")
        sums = torch.zeros(len(batch.lengths), dtype=d.dtype, device=device).index_add(0, batch.completion_of, d)
        for i, part in zip(members, sums.split([len(trees[i].completion_ids) for i in members]), strict=True):
            by_tree[i] = part.tolist()
        k3 += float(kl_estimate(logps, ref_logps, "k3").sum())
    k1 = np.array([v for i in range(len(trees)) for v in by_tree[i]])
    return k1, k3 / sum(len(c) for t in trees for c in t.completion_ids)
