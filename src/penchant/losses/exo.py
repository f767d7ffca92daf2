"""Efficient exact optimisation on pairs: reverse KL between the policy's and the preferences' distribution over the pair."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field

from penchant.losses.checks import pair_logratios
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import reward_metrics
from penchant.types import LossOutput, PairLogps


class EXOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    label_smoothing: float = Field(
        1e-3, gt=0, lt=0.5, description="probability that a label is wrong; 0 would make the target infinite"
    )


def exo(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> LossOutput:
    """EXO on pairs.

    ``loss = s (log s - log(1 - eps)) + (1 - s) (log(1 - s) - log eps)`` with ``s = sigmoid(beta h)``

    Args:
        logps: summed log-probs in nats, each of shape (batch,); needs the reference's.
        beta: > 0; label_smoothing: eps in (0, 0.5).

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2402.00856 (equation 16).
    """
    chosen, rejected = pair_logratios(logps)
    z = beta * (chosen - rejected)
    eps = label_smoothing
    losses = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-eps))
    losses = losses + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(eps))
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


SPEC = LossSpec(
    name="exo",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=exo,
    params=EXOParams,
    formula="s log(s / (1-eps)) + (1-s) log((1-s) / eps),  s = sigmoid(beta h)",
    paper="2402.00856",
    equal_policy_loss=lambda label_smoothing, **_: (
        -math.log(2.0) - 0.5 * (math.log1p(-label_smoothing) + math.log(label_smoothing))
    ),
)
