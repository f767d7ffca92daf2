"""Building blocks of online methods: advantages, generalized advantage estimation, whitening, surrogate losses.

The tokens of all completions are concatenated in one vector (R,); `completion_of` (R,) maps each token to its completion. There
is no padding that could be rewarded, whitened or averaged over.
"""

from __future__ import annotations

from typing import Literal

from penchant.base.lazy import Tensor, torch
from penchant.losses.helpers import require_vectors

LOG_RATIO_LIMIT = 20.0  # e^20: a larger ratio is an accident, and its square must not overflow


def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO's advantages: each reward minus the mean of the others of its group.

    ``A_i = r_i - mean_{j != i} r_j``

    Args:
        rewards: (groups, k), k >= 2 samples of one prompt each; NaN: unknown, excluded from all means, with advantage 0.

    Raises:
        ValueError: fewer than two samples per group.

    Paper: arXiv 2402.14740.
    """
    _require_group(rewards)
    rewards, k = _minus_group_min(rewards), rewards.shape[1]
    if not bool(rewards.isnan().any()):
        return (rewards - rewards.mean(1, keepdim=True)) * (k / (k - 1))
    counts = (~rewards.isnan()).sum(1, keepdim=True)
    centered = (rewards - rewards.nanmean(1, keepdim=True)).nan_to_num()
    return centered * (counts / (counts - 1).clamp(min=1))  # a single known reward is its own mean


def group_normalized(rewards: Tensor, scale: Literal["group", "batch", "none"] = "group", eps: float = 1e-4) -> Tensor:
    """GRPO's advantages: rewards centered within their group and divided by a standard deviation.

    ``A_i = (r_i - mean(r)) / (std(r) + eps)``; ``scale``: the group's standard deviation, the batch's, or none (Dr. GRPO: no
    prompt counts more because its rewards are close together).

    Args:
        rewards: (groups, k), k >= 2; NaN: unknown, excluded from means and deviations, with advantage 0.

    Raises:
        ValueError: fewer than two samples per group.

    Paper: arXiv 2402.03300; without the standard deviation: arXiv 2503.20783.
    """
    _require_group(rewards)
    missing = rewards.isnan()
    has_missing = bool(missing.any())
    raw_rewards, rewards = rewards, _minus_group_min(rewards)
    centered = (
        (rewards - rewards.nanmean(1, keepdim=True)).nan_to_num()
        if has_missing
        else rewards - rewards.mean(1, keepdim=True)
    )
    if scale == "none":
        return centered
    if scale == "batch":
        return centered / (raw_rewards[~missing].std() + eps)
    if has_missing:
        degrees_of_freedom = (~missing).sum(1, keepdim=True) - 1
        std = (centered.square().sum(1, keepdim=True) / degrees_of_freedom.clamp(min=1)).sqrt()
    else:
        std = rewards.std(1, keepdim=True)
    return centered / (std + eps)


def _require_group(rewards: Tensor) -> None:
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (groups, k) with k >= 2, got {tuple(rewards.shape)}")


def _minus_group_min(rewards: Tensor) -> Tensor:
    """Rewards minus their group's minimum: equal rewards become exactly 0, whereas their mean may differ from them by rounding."""
    return rewards - torch.where(rewards.isnan(), torch.inf, rewards).amin(1, keepdim=True)


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over completions of unequal length.

    ``delta_t = r_t + gamma V_(t+1) - V_t``, ``A_t = delta_t + gamma lam A_(t+1)``, both zero beyond the last token; returns are
    ``A_t + V_t``.

    Args:
        rewards, values: (R,), token by token, completion after completion; values: V before token t is written.
        lengths: (C,) tokens of each completion, >= 1; gamma, lam: in [0, 1].

    Returns:
        Advantages and returns, (R,) each.

    Raises:
        ValueError: the shapes differ, or the lengths do not add up to R.

    Paper: arXiv 1506.02438.
    """
    require_vectors(rewards, values)
    if int(lengths.sum()) != len(rewards) or bool((lengths < 1).any()):
        raise ValueError(f"lengths add up to {int(lengths.sum())} for {len(rewards)} tokens; each must be at least 1")
    last_positions = lengths.cumsum(0) - 1
    is_last = torch.zeros(len(rewards), dtype=torch.bool, device=rewards.device)
    is_last[last_positions] = True
    next_values = torch.cat([values[1:], values.new_zeros(1)]).masked_fill(is_last, 0.0)
    deltas = rewards + gamma * next_values - values
    # all completions at once, from their ends: sorting by length would save work, but a loop over the longest is short enough
    advantages = torch.zeros_like(deltas)
    running = deltas.new_zeros(len(lengths))
    for steps_back in range(int(lengths.max())):
        active = lengths > steps_back
        positions = (last_positions - steps_back)[active]
        running[active] = deltas[positions] + gamma * lam * running[active]
        advantages[positions] = running[active]
    return advantages, advantages + values


def whiten(x: Tensor, *, which: Tensor | None = None, keep_mean: bool = False, eps: float = 1e-8) -> Tensor:
    """Zero mean (unless kept) and unit variance over all real tokens.

    ``(x - mean) / sqrt(var + eps)``, var unbiased; a single token is only centered.

    Args:
        x: (R,); which: (R,) bool, the tokens to whiten over; the others stay as they are; None: all.

    Raises:
        ValueError: x is not a vector.
    """
    require_vectors(x)
    if which is not None:
        whitened = whiten(x[which], keep_mean=keep_mean, eps=eps) if bool(which.any()) else x[which]
        return x.masked_scatter(which, whitened)
    mean = x.mean()
    centered = x - mean
    if len(x) > 1:
        centered = centered * torch.rsqrt(x.var() + eps)
    return centered + mean if keep_mean else centered


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


def kl_to_go(kl: Tensor, lengths: Tensor) -> Tensor:
    """The sum of each token's KL and that of all later tokens of its completion, (R,).

    Args:
        kl: (R,) of tokens, completion after completion; lengths: (C,) tokens of each.
    """
    preceding = kl.cumsum(0) - kl
    end_sums = kl.cumsum(0)[lengths.cumsum(0) - 1]
    return torch.repeat_interleave(end_sums, lengths) - preceding


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


def at_last_token(values: Tensor, lengths: Tensor) -> Tensor:
    """Turn a number per completion (C,) into one per token (R,): at each completion's last token, zero elsewhere."""
    out = values.new_zeros(int(lengths.sum()))
    out[lengths.cumsum(0) - 1] = values
    return out
