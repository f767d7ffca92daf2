"""DiscoPOP: the log-ratio modulated loss that a language model discovered."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field

from penchant.losses.checks import pair_logratios
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import logistic, reward_metrics
from penchant.types import LossOutput, PairLogps


class DiscoPOPParams(LossParams):
    beta: float = Field(0.05, gt=0, description="strength of the pull towards the reference")
    tau: float = Field(0.05, gt=0, lt=1, description="temperature of the modulation")


def discopop(logps: PairLogps, *, beta: float = 0.05, tau: float = 0.05) -> LossOutput:
    """DiscoPOP: logistic where the pair is ranked wrongly, exponential where it is ranked rightly.

    ``loss = (1 - m) (-log sigmoid(z)) + m e^(-z)`` with ``z = beta h``, ``m = sigmoid(z / tau)``

    Args:
        logps: summed log-probs in nats, each of shape (batch,); needs the reference's.
        beta: > 0; tau: in (0, 1).

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2406.08414.
    """
    chosen, rejected = pair_logratios(logps)
    z = beta * (chosen - rejected)
    # m e^-z as one exponential: each factor alone is 0 or infinite for large |z|
    losses = torch.sigmoid(-z / tau) * logistic(z) + torch.exp(F.logsigmoid(z / tau) - z)
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


SPEC = LossSpec(
    name="discopop",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=discopop,
    params=DiscoPOPParams,
    formula="(1-m) (-log sigmoid(z)) + m e^-z,  z = beta h,  m = sigmoid(z / tau)",
    paper="2406.08414",
    equal_policy_loss=lambda **_: 0.5 * math.log(2.0) + 0.5,
)
