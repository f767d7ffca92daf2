"""Helpers shared by losses: presence and shape checks, the logistic loss, the usual `rewards/*` metrics."""

from __future__ import annotations

import math

from penchant.base.lazy import F, Tensor, torch
from penchant.types import LossOutput, PairLogps, UnpairedLogps, Weighted

Metrics = dict[str, Weighted]


def require_vectors(*tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have the same shape (batch,): silent broadcasting would give a wrong loss."""
    shapes = [tuple(t.shape) for t in tensors]
    if any(len(s) != 1 for s in shapes) or len(set(shapes)) > 1:
        raise ValueError(f"every argument must be of the same shape (batch,), got {shapes}")


def require(logps: PairLogps | UnpairedLogps, *names: str) -> tuple[Tensor, ...]:
    """The named fields, all of the same shape (batch,); raise ValueError if any is missing."""
    tensors = {name: getattr(logps, name) for name in names}
    missing = [name for name, value in tensors.items() if value is None]
    if missing:
        raise ValueError(f"this loss needs {' and '.join(missing)}; give {'it' if len(missing) == 1 else 'them'}")
    require_vectors(*tensors.values())
    return tuple(tensors.values())


def pair_logratios(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """(d_w, d_l): ``log pi(y|x) - log ref(y|x)`` of chosen and rejected, checked."""
    chosen, rejected, ref_chosen, ref_rejected = require(
        logps, "policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps"
    )
    return chosen - ref_chosen, rejected - ref_rejected


def pair_averages(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """(a_w, a_l): log-probs per token, ``log pi(y|x) / |y|``, checked."""
    chosen, rejected, chosen_lengths, rejected_lengths = require(
        logps, "policy_chosen_logps", "policy_rejected_logps", "chosen_lengths", "rejected_lengths"
    )
    return chosen / chosen_lengths, rejected / rejected_lengths


def pair_output(losses: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> LossOutput:
    """Losses of pairs with their `rewards/*` metrics."""
    return LossOutput(losses, metrics=reward_metrics(chosen_rewards, rejected_rewards))


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
    """`rewards/chosen` and `rewards/rejected` of labeled completions, each a mean over its side. `positive`: 1 or 0, (batch,)."""
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
    """``e^x - 1`` up to `cap`, its tangent beyond: it and its square stay finite in fp32, and the gradient stays nonzero."""
    return torch.expm1(x.clamp(max=cap)) + math.exp(cap) * torch.relu(x - cap)


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - e^x)`` for x < 0 without cancellation; x is clamped one rounding step below zero, to avoid -inf."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2.0)
    # the branch not taken gets a harmless argument: its infinite gradient times zero would be NaN
    by_expm1 = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    by_log1p = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, by_expm1, by_log1p)
