"""The hinge loss on DPO's margin (RSO)."""

from __future__ import annotations

import torch
from pydantic import Field

from penchant.losses.checks import pair_logratios
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import reward_metrics
from penchant.types import LossOutput, PairLogps


class HingeParams(LossParams):
    beta: float = Field(0.1, gt=0, description="1 / beta is the margin in nats at which a pair is done (gamma in RSO)")


def hinge(logps: PairLogps, *, beta: float = 0.1) -> LossOutput:
    """RSO's hinge: SLiC's loss on normalised likelihoods.

    ``loss = max(0, 1 - beta h)``

    Args:
        logps: summed log-probs in nats, each of shape (batch,); needs the reference's.
        beta: > 0.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2309.06657.
    """
    chosen, rejected = pair_logratios(logps)
    losses = torch.relu(1 - beta * (chosen - rejected))
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


SPEC = LossSpec(
    name="hinge",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=hinge,
    params=HingeParams,
    formula="max(0, 1 - beta h)",
    paper="2309.06657",
    equal_policy_loss=lambda **_: 1.0,
)
