"""Losses on lists of k scored answers to one prompt. ``d = log pi(y|x) - log ref(y|x)``, s a score."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from penchant.base.lazy import F, Tensor, torch
from penchant.losses.registry import Beta, Range, loss
from penchant.types import ListLogps, LossOutput


@loss(
    "plackett_luce",
    "sum_i (log sum_{j: s_j <= s_i} exp(beta d_j) - beta d_i)",
    paper="2305.18290",
    signal="lists",
    needs=("reference", "scores"),
)
def plackett_luce(logps: ListLogps, *, beta: Beta = 0.1) -> LossOutput:
    """DPO on rankings: the likelihood of the whole order under the Plackett-Luce model (the paper's appendix A.3).

    Each answer is chosen among those that are not better. Two answers give DPO. Answers of equal score are in each other's
    denominator (Breslow's method for ties), so their order in the file does not matter.
    """
    rewards, scores, present = _rewards(logps, beta)
    candidates = (scores[:, None, :] <= scores[:, :, None]) & present[:, None, :]
    candidates = candidates | ~present[:, :, None]  # rows of absent answers are masked out below, but must not be empty
    log_denominators = torch.where(candidates, rewards[:, None, :], -math.inf).logsumexp(-1)
    return LossOutput(((log_denominators - rewards) * present).sum(1), metrics=_metrics(rewards, scores, present))


@loss(
    "lipo",
    "sum_{s_i > s_j} |G_i - G_j| |1/D_i - 1/D_j| log(1 + exp(-beta (d_i - d_j))),  G = 2^s - 1, D = log(1 + rank by d)",
    paper="2402.01878",
    signal="lists",
    needs=("reference", "scores"),
)
def lipo(
    logps: ListLogps,
    *,
    beta: Annotated[float, Range(gt=0), "strength of the pull towards the reference"] = 0.1,
    gains: Annotated[
        Literal["list", "scores"],
        "list: gains are computed from scores scaled to 0 (a list's worst) to 1 (its best); scores: from the scores as they are",
    ] = "list",
) -> LossOutput:
    """LiPO-lambda: DPO on all pairs of a list, each weighted by how much swapping the two would change DCG.

    Ranks are the policy's own, by ``beta d``, and carry no gradient. The paper's scores are between 0 and 1; on a scale up to
    10, ``gains=scores`` lets the best answer outweigh all others. Two answers give DPO times a constant.
    """
    rewards, scores, present = _rewards(logps, beta)
    if gains == "list":
        worst, best = (torch.where(present, scores, fill) for fill in (math.inf, -math.inf))
        lowest = worst.amin(1, keepdim=True)
        scores = (scores - lowest) / (best.amax(1, keepdim=True) - lowest).clamp(min=torch.finfo(scores.dtype).tiny)
    order = torch.where(present, rewards.detach(), -math.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    gain, discount = torch.where(present, torch.exp2(scores), 0.0), 1 / torch.log(2.0 + rank.to(rewards.dtype))
    is_better = (scores[:, :, None] > scores[:, None, :]) & present[:, :, None] & present[:, None, :]
    weights = (gain[:, :, None] - gain[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()
    losses = F.softplus(rewards[:, None, :] - rewards[:, :, None])
    total = torch.where(is_better, weights * losses, 0.0).sum((1, 2))
    return LossOutput(total, metrics=_metrics(rewards, scores, present))


def _rewards(logps: ListLogps, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """``beta d``, scores and the mask of present answers, (lists, k) each, checked."""
    columns = {name: getattr(logps, name) for name in ("policy_logps", "ref_logps", "scores", "present")}
    missing = [name for name, value in columns.items() if value is None]
    if missing:
        raise ValueError(f"this loss needs {' and '.join(missing)}")
    policy, ref, scores, present = columns.values()
    if any(c.ndim != 2 or c.shape != policy.shape for c in columns.values()):
        raise ValueError(
            f"every argument must be of the same shape (lists, k), got {[tuple(c.shape) for c in columns.values()]}"
        )
    return beta * (policy - ref), scores, present


def _metrics(rewards: Tensor, scores: Tensor, present: Tensor) -> dict[str, tuple[Tensor, None]]:
    """`rewards/*` of lists: those of the best and the worst answer, and the share of pairs of unequal score ranked correctly."""
    rewards = rewards.detach()
    best = torch.where(present, scores, -math.inf).argmax(1, keepdim=True)
    worst = torch.where(present, scores, math.inf).argmin(1, keepdim=True)
    chosen, rejected = (rewards.gather(1, index).squeeze(1) for index in (best, worst))
    margins = rewards[:, :, None] - rewards[:, None, :]
    is_better = (scores[:, :, None] > scores[:, None, :]) & present[:, :, None] & present[:, None, :]
    correct = torch.where(is_better, (margins > 0).to(rewards.dtype) + 0.5 * (margins == 0).to(rewards.dtype), 0.0).sum(
        (1, 2)
    )
    return {
        "rewards/chosen": (chosen, None),
        "rewards/rejected": (rejected, None),
        "rewards/margins": (chosen - rejected, None),
        "rewards/accuracies": (correct / is_better.sum((1, 2)).clamp(min=1), None),
    }
