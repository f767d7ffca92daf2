"""Sequence likelihood calibration (SLiC-HF): a margin on plain log-probs, and a pull towards the chosen answer."""

from __future__ import annotations

import torch
from pydantic import Field

from penchant.losses.checks import pair_policy
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import reward_metrics
from penchant.types import LossOutput, PairLogps


class SLiCParams(LossParams):
    delta: float = Field(1.0, gt=0, description="margin in nats at which a pair is done")
    reg_weight: float = Field(0.1, ge=0, description="weight of the chosen answer's negative log-likelihood (lambda)")


def slic(logps: PairLogps, *, delta: float = 1.0, reg_weight: float = 0.1) -> LossOutput:
    """SLiC-HF's rank calibration, with the chosen completion as regularisation target. No reference model.

    ``loss = max(0, delta - log pi(y_w|x) + log pi(y_l|x)) - reg_weight log pi(y_w|x)``

    Args:
        logps: summed log-probs in nats, each of shape (batch,).
        delta: > 0, nats; reg_weight: >= 0.

    Raises:
        ValueError: when a shape differs.

    Paper: arXiv 2305.10425.
    """
    chosen, rejected = pair_policy(logps)
    losses = torch.relu(delta - chosen + rejected) - reg_weight * chosen
    return LossOutput(losses, metrics=reward_metrics(chosen, rejected))


SPEC = LossSpec(
    name="slic",
    signal="pairs",
    needs=frozenset(),
    fn=slic,
    params=SLiCParams,
    formula="max(0, delta - log pi_w + log pi_l) - reg_weight log pi_w",
    paper="2305.10425",
)
