"""Calibrated DPO: the implicit rewards get a scale, not only an order."""

from __future__ import annotations

import math

from pydantic import Field

from penchant.losses.checks import pair_logratios
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import logistic, reward_metrics
from penchant.types import LossOutput, PairLogps


class CalDPOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="the log-ratios are drawn to +-1 / (2 beta) nats")
    calibration: float = Field(1.0, ge=0, description="weight of the squared terms (the authors' own runs use 0.5)")


def cal_dpo(logps: PairLogps, *, beta: float = 0.1, calibration: float = 1.0) -> LossOutput:
    """Cal-DPO.

    ``loss = -log sigmoid(h) + calibration ((d_w - 1 / (2 beta))^2 + (d_l + 1 / (2 beta))^2)``

    Args:
        logps: summed log-probs in nats, each of shape (batch,); needs the reference's.
        beta: > 0; calibration: >= 0.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2412.14516.
    """
    chosen, rejected = pair_logratios(logps)
    target = 1 / (2 * beta)
    losses = logistic(chosen - rejected) + calibration * ((chosen - target) ** 2 + (rejected + target) ** 2)
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


SPEC = LossSpec(
    name="cal_dpo",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=cal_dpo,
    params=CalDPOParams,
    formula="-log sigmoid(h) + calibration ((d_w - 1/(2 beta))^2 + (d_l + 1/(2 beta))^2)",
    paper="2412.14516",
    equal_policy_loss=lambda beta, calibration: math.log(2.0) + 2 * calibration * (1 / (2 * beta)) ** 2,
)
