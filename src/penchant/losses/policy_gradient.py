"""Policy-gradient losses of online methods: clipped surrogates, importance weights, the value loss.

The tokens of all completions are concatenated in one vector (R,), so there is no padding that could be rewarded, whitened or
averaged over. Advantages are in algorithms/advantages.py.
"""

from __future__ import annotations

from typing import Literal

from penchant.base.lazy import Tensor, torch
from penchant.losses.helpers import require_vectors

LOG_RATIO_LIMIT = 20.0  # e^20: a larger ratio is an accident, and its square must not overflow


def clipped_surrogate(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped policy loss, token by token.

    ``ratio = e^(log pi - log old)``, ``loss = -min(ratio A, clip(ratio, 1 - clip, 1 + clip_high) A)``; the log-ratio is clamped to
    +-20. With ``dual`` c > 1 the loss of a negative advantage is at most ``-c A``, so that a token that became far more likely
    cannot dominate the step.

    Args:
        logps, old_logps, advantages: (R,), of tokens, or of sequences (GSPO); old_logps and advantages carry no gradient.
        clip: > 0; clip_high: its upper end if that differs (DAPO); dual: > 1, None: no second clip.

    Returns:
        Losses, ratios (detached) and whether the clip was active (detached, 1 or 0), (R,) each.

    Raises:
        ValueError: the shapes differ.

    Paper: arXiv 1707.06347; the asymmetric clip: arXiv 2503.14476; the dual clip: arXiv 1912.09729.
    """
    require_vectors(logps, old_logps, advantages)
    ratio = torch.exp((logps - old_logps).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    clipped_ratio = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    losses = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    clipped = -advantages * clipped_ratio > -advantages * ratio
    if dual is not None:
        dual_losses = -dual * advantages
        dual_clipped = (advantages < 0) & (losses > dual_losses)
        losses, clipped = torch.where(dual_clipped, dual_losses, losses), clipped | dual_clipped
    return losses, ratio.detach(), clipped.detach().to(losses.dtype)


def sequence_log_ratio(logps: Tensor, old_logps: Tensor, lengths: Tensor) -> Tensor:
    """GSPO's log of the importance ratio of whole completions, (C,): ``(1/|y|) sum_t (log pi - log old)``.

    Args:
        logps, old_logps: (R,), completion after completion; lengths: (C,) tokens of each.

    Paper: arXiv 2507.18071.
    """
    require_vectors(logps, old_logps)
    return torch.segment_reduce(logps - old_logps, "sum", lengths=lengths, unsafe=True) / lengths


def importance_weights(
    logps: Tensor,
    sampled_logps: Tensor,
    lengths: Tensor,
    *,
    kind: Literal["tis", "mis"],
    level: Literal["token", "sequence"] = "token",
    low: float = 0.0,
    high: float = 2.0,
) -> Tensor:
    """Weights of the tokens' losses for tokens sampled by another engine or by older weights than the policy being trained.

    ``r = e^(log pi - log mu)`` of a token, or ``e^(sum_t (log pi - log mu))`` of its whole completion; truncated (TIS): ``min(r, high)``;
    masked (MIS): ``r`` if ``low <= r <= high``, else 0. The log-ratio is clamped to +-20; no gradient flows through a weight.

    Args:
        logps: (R,) of the policy being trained, before the batch's first update; sampled_logps: (R,) as the sampler gave them.
        lengths: (C,) tokens of each completion; high: > 0; low: for MIS only, < high.

    Returns:
        (R,) detached.

    Raises:
        ValueError: the shapes differ.

    Paper: truncated importance sampling: Ionides (2008), https://doi.org/10.1198/106186008X320456; masked at both ends: arXiv 2510.18855.
    """
    require_vectors(logps, sampled_logps)
    log_ratio = (logps - sampled_logps).detach()
    if level == "sequence":
        completion_of = torch.repeat_interleave(torch.arange(len(lengths), device=log_ratio.device), lengths)
        log_ratio = log_ratio.new_zeros(len(lengths)).index_add(0, completion_of, log_ratio)[completion_of]
    ratio = torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    if kind == "tis":
        return ratio.clamp(max=high)
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def cispo_surrogate(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """CISPO's policy loss, token by token: the weight is clipped, but every token keeps its gradient.

    ``loss = -sg[min(ratio, 1 + clip_high)] A log pi``.

    Args:
        logps, old_logps, advantages: (R,); clip_high: > 0.

    Returns:
        Losses, ratios (detached) and whether the clip was active (detached, 1 or 0), (R,) each.

    Paper: arXiv 2506.13585.
    """
    require_vectors(logps, old_logps, advantages)
    ratio = torch.exp((logps.detach() - old_logps).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    weights = ratio.clamp(max=1 + clip_high)
    return -weights * advantages * logps, ratio, (ratio > weights).to(logps.dtype)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.2
) -> tuple[Tensor, Tensor]:
    """PPO's value loss, token by token.

    ``loss = max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2``; ``clip=None``: the plain squared error.

    Args:
        values, old_values, returns: (R,); the last two carry no gradient.

    Returns:
        Losses and whether the clip was active (detached, 1 or 0), (R,) each.

    Raises:
        ValueError: the shapes differ.
    """
    require_vectors(values, old_values, returns)
    losses = (values - returns).square()
    if clip is None:
        return 0.5 * losses, torch.zeros_like(losses).detach()
    clipped_values = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    clipped_losses = (clipped_values - returns).square()
    return 0.5 * torch.maximum(losses, clipped_losses), (clipped_losses > losses).to(losses.dtype).detach()
