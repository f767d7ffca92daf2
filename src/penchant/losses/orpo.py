"""ORPO: supervised fine-tuning with an odds-ratio penalty, no reference."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from penchant.losses.checks import pair_averages
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import logistic, reward_metrics
from penchant.types import LossOutput, PairLogps


class ORPOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="weight of the odds-ratio term (lambda in the paper)")


def orpo(logps: PairLogps, *, beta: float = 0.1) -> LossOutput:
    """ORPO: negative log-likelihood of the chosen completion plus an odds-ratio term. No reference model.

    ``loss = -a_w - beta log sigmoid(log odds_w - log odds_l)`` with ``a = log pi(y|x) / |y|``, ``odds = e^a / (1 - e^a)``

    Args:
        logps: summed log-probs in nats and lengths in tokens, each of shape (batch,).
        beta: > 0.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2403.07691.
    """
    chosen, rejected = pair_averages(logps)
    log_odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    losses = -chosen + beta * logistic(log_odds)
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - e^x)`` for x < 0 without cancellation; x is held below zero by one rounding step, where it would be -inf."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2.0)
    # the branch not taken gets a harmless argument: its infinite gradient times zero would be NaN
    by_expm1 = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    by_log1p = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, by_expm1, by_log1p)


SPEC = LossSpec(
    name="orpo",
    signal="pairs",
    needs=frozenset(),
    fn=orpo,
    params=ORPOParams,
    formula="-a_w - beta log sigmoid(log odds_w - log odds_l),  odds = e^a / (1 - e^a),  a = log pi / |y|",
    paper="2403.07691",
    uses_lengths=True,
)
