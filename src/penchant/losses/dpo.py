"""Direct preference optimisation (sigmoid), with label smoothing (cDPO)."""

from __future__ import annotations

import math

from pydantic import Field

from penchant.losses.checks import pair_logratios
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import logistic, reward_metrics
from penchant.types import LossOutput, PairLogps


class DPOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference; larger stays closer")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="assumed share of flipped labels (cDPO); 0 is plain DPO"
    )


def dpo(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> LossOutput:
    """DPO: a logistic loss on the difference of policy/reference log-ratios.

    ``h = (log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x))``
    ``loss = -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)``

    Args:
        logps: summed completion log-probs in nats, each of shape (batch,); needs the reference's.
        beta: inverse temperature of the implicit reward, > 0.
        label_smoothing: eps in [0, 0.5).

    Returns:
        Losses of shape (batch,); metrics `rewards/*` are ``beta * (policy - reference)`` log-probs.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2305.18290; label smoothing: Mitchell (2023), "A note on DPO with noisy preferences".
    """
    chosen, rejected = pair_logratios(logps)
    losses = logistic(beta * (chosen - rejected), label_smoothing)
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


SPEC = LossSpec(
    name="dpo",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=dpo,
    params=DPOParams,
    formula="-(1-eps) log sigmoid(beta h) - eps log sigmoid(-beta h),  h = d_w - d_l",
    paper="2305.18290",
    equal_policy_loss=lambda **_: math.log(2.0),
)
