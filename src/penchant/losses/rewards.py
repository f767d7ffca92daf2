"""The `rewards/*` metrics of the field, from a loss's own implicit rewards."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Metrics = dict[str, tuple[Tensor, Tensor | None]]


def reward_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Metrics:
    """`rewards/*` of pairs from implicit rewards of shape (batch,); a tie counts as half right."""
    chosen_rewards, rejected_rewards = chosen_rewards.detach(), rejected_rewards.detach()
    margins = chosen_rewards - rejected_rewards
    accuracies = (margins > 0).to(margins.dtype) + 0.5 * (margins == 0).to(margins.dtype)
    return {
        "rewards/chosen": (chosen_rewards, None),
        "rewards/rejected": (rejected_rewards, None),
        "rewards/margins": (margins, None),
        "rewards/accuracies": (accuracies, None),
    }


def side_metrics(rewards: Tensor, positive: Tensor) -> Metrics:
    """`rewards/chosen` and `rewards/rejected` of labelled completions: each a mean over its own side. `positive` is 1 or 0, (batch,)."""
    rewards = rewards.detach()
    return {
        "rewards/chosen": (rewards * positive, positive),
        "rewards/rejected": (rewards * (1 - positive), 1 - positive),
    }


def logistic(z: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """``-(1 - eps) log sigmoid(z) - eps log sigmoid(-z)``, (batch,)."""
    if label_smoothing == 0.0:
        return -F.logsigmoid(z)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def expm1_then_linear(x: Tensor, cap: float = 20.0) -> Tensor:
    """``e^x - 1`` up to `cap`, and its tangent beyond: finite in fp32 as its square is, and a pair beyond still learns."""
    return torch.expm1(x.clamp(max=cap)) + math.exp(cap) * torch.relu(x - cap)
