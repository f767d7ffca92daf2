"""DPO-Positive (Smaug): DPO that punishes a chosen answer that becomes less likely than under the reference."""

from __future__ import annotations

import math

import torch
from pydantic import Field

from penchant.losses.checks import pair_logratios
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import logistic, reward_metrics
from penchant.types import LossOutput, PairLogps


class DPOPParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    penalty: float = Field(50.0, ge=0, description="weight of the chosen answer's lost log-prob (lambda); 0 is DPO")


def dpop(logps: PairLogps, *, beta: float = 0.1, penalty: float = 50.0) -> LossOutput:
    """DPOP.

    ``loss = -log sigmoid(beta (h - penalty max(0, log ref(y_w|x) - log pi(y_w|x))))``

    Args:
        logps: summed log-probs in nats, each of shape (batch,); needs the reference's.
        beta: > 0; penalty: >= 0.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2402.13228.
    """
    chosen, rejected = pair_logratios(logps)
    losses = logistic(beta * (chosen - rejected - penalty * torch.relu(-chosen)))
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


SPEC = LossSpec(
    name="dpop",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=dpop,
    params=DPOPParams,
    formula="-log sigmoid(beta (h - penalty max(0, -d_w)))",
    paper="2402.13228",
    equal_policy_loss=lambda **_: math.log(2.0),
)
