"""Advantages of online methods: leave-one-out, group-normalized, generalized advantage estimation (GAE), whitening.

The tokens of all completions are concatenated in one vector (R,), as in losses/policy_gradient.py.
"""

from __future__ import annotations

from typing import Literal

from penchant.base.lazy import Tensor, torch
from penchant.losses.helpers import require_vectors


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


def kl_to_go(kl: Tensor, lengths: Tensor) -> Tensor:
    """The sum of each token's KL and that of all later tokens of its completion, (R,).

    Args:
        kl: (R,) of tokens, completion after completion; lengths: (C,) tokens of each.
    """
    preceding = kl.cumsum(0) - kl
    end_sums = kl.cumsum(0)[lengths.cumsum(0) - 1]
    return torch.repeat_interleave(end_sums, lengths) - preceding


def at_last_token(values: Tensor, lengths: Tensor) -> Tensor:
    """Turn a number per completion (C,) into one per token (R,): at each completion's last token, zero elsewhere."""
    out = values.new_zeros(int(lengths.sum()))
    out[lengths.cumsum(0) - 1] = values
    return out
