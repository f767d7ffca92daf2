"""chi-squared preference optimisation: a heavier penalty for what the reference finds unlikely."""

from __future__ import annotations

import math

from pydantic import Field

from penchant.losses.checks import pair_logratios
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import expm1_then_linear, logistic, reward_metrics
from penchant.types import LossOutput, PairLogps


class ChiPOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    r_max: float = Field(10.0, gt=0, description="bound of the reward: the margin is clipped to +-2 r_max")


def chi_po(logps: PairLogps, *, beta: float = 0.1, r_max: float = 10.0) -> LossOutput:
    """chi-PO: DPO's log-ratio ``d`` becomes ``phi(u) = u + log u``, ``u = e^d``: chi-squared plus KL regularisation.

    ``loss = -log sigmoid(clip(beta (phi(u_w) - phi(u_l)), -2 r_max, 2 r_max))``

    Args:
        logps: summed log-probs in nats, each of shape (batch,); needs the reference's.
        beta: > 0; r_max: > 0. A pair beyond the clip gives no gradient.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2407.13399.
    """
    logratios = pair_logratios(logps)
    chosen, rejected = (beta * (1 + expm1_then_linear(d) + d) for d in logratios)
    losses = logistic((chosen - rejected).clamp(-2 * r_max, 2 * r_max))
    return LossOutput(losses, metrics=reward_metrics(chosen, rejected))


SPEC = LossSpec(
    name="chi_po",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=chi_po,
    params=ChiPOParams,
    formula="-log sigmoid(clip(beta (phi_w - phi_l), +-2 r_max)),  phi = e^d + d",
    paper="2407.13399",
    equal_policy_loss=lambda **_: math.log(2.0),
)
