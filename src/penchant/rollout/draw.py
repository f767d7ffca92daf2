"""One token of every row: temperature, top-k, top-p, and a draw that belongs to the row alone."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 256  # probabilities are summed block by block: one exact cumulative sum over blocks, one inside the block that was hit
_LIKELY = 512  # top-p first looks among so many most likely tokens


def row_uniforms(seed: int, prompt_seed: int, sample: int, count: int) -> np.ndarray:
    """The uniform numbers (count,) in [0, 1) of one completion: a function of these three numbers and nothing else."""
    keys = np.random.SeedSequence([seed, prompt_seed, sample])
    return np.random.Generator(np.random.Philox(keys)).random(count)


def draw(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """The next token of each row, by the inverse of the distribution function at that row's uniform number.

    Args:
        logits: (B, V); uniforms: (B,) float64 in [0, 1).
        temperature: 0 takes the most likely token; top_p: of the smallest set of tokens with at least this probability;
        top_k: of so many most likely tokens, 0 for all (before top_p, which then counts their probabilities only).

    Returns:
        tokens (B,) int64, and their log-probs (B,) under ``softmax(logits / temperature)``, before top-k and top-p.
    """
    if logits.ndim != 2 or uniforms.shape != logits.shape[:1]:
        raise ValueError(f"logits (B, V) and uniforms (B,) are wanted, not {logits.shape} and {uniforms.shape}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        logps = torch.log_softmax(logits, dim=-1)
        tokens = logits.argmax(-1)
        return tokens, logps.gather(1, tokens[:, None]).squeeze(1)
    logits = logits / temperature if temperature != 1.0 else logits
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()  # unnormalised probabilities: at least one is 1
    total = weights.sum(-1)
    if top_k or top_p < 1.0:
        tokens = _draw_among_likely(weights, total, uniforms, top_p, top_k)
    else:
        tokens = _inverse(weights, uniforms)
    chosen = logits.gather(1, tokens[:, None]).squeeze(1)
    return tokens, chosen - top.squeeze(1) - total.log()


def _inverse(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds ``u * total``; never one of weight zero."""
    short = -weights.shape[1] % _BLOCK
    blocks = (F.pad(weights, (0, short)) if short else weights).view(len(weights), -1, _BLOCK)
    ends = blocks.sum(-1).double().cumsum(-1)
    goal = _below(uniforms * ends[:, -1], ends[:, -1])
    block = torch.searchsorted(ends, goal[:, None], right=True)
    starts = F.pad(ends, (1, 0))
    goal = goal - starts.gather(1, block).squeeze(1)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK)).squeeze(1).double().cumsum(-1)
    goal = _below(goal.clamp(min=0.0), inside[:, -1])
    at = torch.searchsorted(inside, goal[:, None], right=True)
    return (block * _BLOCK + at).squeeze(1)


def _below(goal: Tensor, total: Tensor) -> Tensor:
    """Strictly below the total, which rounding may have passed."""
    return torch.minimum(goal, total * (1.0 - 1e-12))


def _draw_among_likely(weights: Tensor, total: Tensor, uniforms: Tensor, top_p: float, top_k: int) -> Tensor:
    """The same over a row's most likely tokens, in falling order."""
    vocabulary = weights.shape[1]
    count = min(top_k or _LIKELY, vocabulary)
    ordered, index = weights.topk(count, dim=-1)
    if top_k:
        total = ordered.sum(-1)
    elif count < vocabulary and bool((ordered.double().sum(-1) < top_p * total).any()):
        ordered, index = weights.sort(dim=-1, descending=True)  # a flat row reaches further than the first look
    before = ordered.double().cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= top_p * total[:, None], 0.0)
    ordered[:, 0] = ordered[:, 0].clamp(min=torch.finfo(ordered.dtype).tiny)  # the most likely token always stays
    return index.gather(1, _inverse(ordered, uniforms)[:, None]).squeeze(1)
