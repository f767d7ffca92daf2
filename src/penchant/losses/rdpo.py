"""Robust DPO: unbiased under a known share of flipped labels."""

from __future__ import annotations

import math

import torch.nn.functional as F
from pydantic import Field

from penchant.losses.checks import pair_logratios
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import reward_metrics
from penchant.types import LossOutput, PairLogps


class RobustDPOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    label_smoothing: float = Field(0.1, ge=0, lt=0.5, description="share of flipped labels; 0 is DPO")


def rdpo(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1) -> LossOutput:
    """Robust DPO: its expectation over flipped labels is the DPO loss on clean ones.

    ``loss = (-(1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h)) / (1 - 2 eps)``

    Args:
        logps: summed log-probs in nats, each of shape (batch,); needs the reference's.
        beta: > 0; label_smoothing: eps in [0, 0.5), the share of flipped labels. The loss has no lower bound for eps > 0.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2403.00409.
    """
    chosen, rejected = pair_logratios(logps)
    z = beta * (chosen - rejected)
    eps = label_smoothing
    losses = (-(1 - eps) * F.logsigmoid(z) + eps * F.logsigmoid(-z)) / (1 - 2 * eps)
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


SPEC = LossSpec(
    name="rdpo",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=rdpo,
    params=RobustDPOParams,
    formula="(-(1-eps) log sigmoid(beta h) + eps log sigmoid(-beta h)) / (1 - 2 eps)",
    paper="2403.00409",
    equal_policy_loss=lambda **_: math.log(2.0),
)
