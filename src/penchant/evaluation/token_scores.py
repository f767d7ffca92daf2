"""Both models' log-probs of every completion token, and the exact KL between them there: the whole vocabulary, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penchant.data.packing import pack, plan_microbatches, tree_tokens
from penchant.errors import ModelError
from penchant.losses.divergences import DivergenceKind, log_probs, value_of
from penchant.reference import LiveReference
from penchant.types import PackedBatch, TokenTree

CHUNK_ELEMENTS = 1 << 22  # logits of one model alive at once: 16 MB in fp32
POLICY_REF, REF_POLICY = DivergenceKind("kl", "policy_ref"), DivergenceKind("kl", "ref_policy")


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One number a completion token, in the trees' order, nats, float64, (R,) each.

    Args:
        policy, reference: log-probs; policy_ref: ``KL(policy || reference)`` of the next token there, ref_policy: the other way round.
            None where there is no reference, or the exact KL was not asked for.
    """

    policy: np.ndarray
    reference: np.ndarray | None = None
    policy_ref: np.ndarray | None = None
    ref_policy: np.ndarray | None = None


def score_tokens(
    policy: LiveReference,
    reference: LiveReference | None,
    trees: Sequence[TokenTree],
    *,
    exact: bool,
    tokens_per_step: int,
    progress: Callable[[int, int], None] | None = None,
) -> TokenScores:
    """Run the models over `trees`, without gradient.

    ``KL(p || q) = sum_v p_v (log p_v - log q_v)`` at every position that predicts a completion token, in fp32 log space; logits are
    never held for more than a few rows.

    Args:
        exact: also the exact KL, both ways round; tokens_per_step: of a forward pass.

    Raises:
        ModelError: the models' vocabularies differ in size.
    """
    device = next(policy.scorer.model.parameters()).device
    sizes = [tree_tokens(t, policy.scorer.shared) for t in trees]
    parts: dict[int, Tensor] = {}
    for members in plan_microbatches(sizes, tokens_per_step):
        chosen = [trees[i] for i in members]
        batch = pack(chosen, shared=policy.scorer.shared).to(device)
        if reference is None:
            found = policy.completion_logps(batch).tokens[None]
        else:
            # completions are numbered tree by tree however they are laid out
            same = reference.scorer.shared == policy.scorer.shared
            other = batch if same else pack(chosen, shared=reference.scorer.shared).to(device)
            found = _exact(policy, reference, batch, other) if exact else _sampled(policy, reference, batch, other)
        counts = [sum(map(len, t.completion_ids)) for t in chosen]
        parts |= dict(zip(members, found.double().cpu().split(counts, dim=1), strict=True))
        if progress is not None:
            progress(len(parts), len(trees))
    whole = torch.cat([parts[i] for i in range(len(trees))], dim=1).numpy()
    return TokenScores(*whole)


def _sampled(policy: LiveReference, reference: LiveReference, batch: PackedBatch, other: PackedBatch) -> Tensor:
    return torch.stack([policy.completion_logps(batch).tokens, reference.completion_logps(other).tokens])


def _exact(policy: LiveReference, reference: LiveReference, batch: PackedBatch, other: PackedBatch) -> Tensor:
    """(4, R): both log-probs, both divergences."""
    of_policy, of_reference = policy.row_logits(batch), reference.row_logits(other)
    models: list[Any] = [policy.scorer.model, reference.scorer.model]
    rows = max(16, CHUNK_ELEMENTS // max(m.get_input_embeddings().weight.shape[0] for m in models))
    found = []
    for targets, at in zip(batch.target_ids.split(rows), range(0, len(batch.target_ids), rows), strict=True):
        p, q = of_policy(slice(at, at + rows)), of_reference(slice(at, at + rows))
        if p.shape != q.shape:
            raise ModelError(
                "reference",
                f"has {q.shape[1]:,} logits a token, the model {p.shape[1]:,}",
                "leave out the exact KL with --no-exact-kl, or give another --reference",
            )
        lp, lq = log_probs(p), log_probs(q)
        picked = [x.gather(1, targets[:, None]).squeeze(1) for x in (lp, lq)]
        found.append(torch.stack([*picked, value_of(lp, lq, POLICY_REF), value_of(lp, lq, REF_POLICY)]))
    return torch.cat(found, dim=1)
