"""Anchored preference optimisation: `apo_zero` lifts the chosen answer, `apo_down` lowers both and the rejected one more."""

from __future__ import annotations

import torch
from pydantic import Field

from penchant.losses.checks import pair_logratios
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import reward_metrics
from penchant.types import LossOutput, PairLogps


class APOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")


def apo_zero(logps: PairLogps, *, beta: float = 0.1) -> LossOutput:
    """APO-zero: chosen up, rejected down; for chosen answers that are better than the model's own.

    ``loss = 1 - sigmoid(beta d_w) + sigmoid(beta d_l)``

    Args:
        logps: summed log-probs in nats, each of shape (batch,); needs the reference's.
        beta: > 0.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2408.06266.
    """
    chosen, rejected = pair_logratios(logps)
    losses = torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


def apo_down(logps: PairLogps, *, beta: float = 0.1) -> LossOutput:
    """APO-down: chosen down, rejected down more; for chosen answers that are worse than the model's own.

    ``loss = sigmoid(beta d_w) + 1 - sigmoid(beta (d_w - d_l))``

    Args:
        logps: summed log-probs in nats, each of shape (batch,); needs the reference's.
        beta: > 0.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2408.06266.
    """
    chosen, rejected = pair_logratios(logps)
    losses = torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


ZERO = LossSpec(
    name="apo_zero",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=apo_zero,
    params=APOParams,
    formula="1 - sigmoid(beta d_w) + sigmoid(beta d_l)",
    paper="2408.06266",
    equal_policy_loss=lambda **_: 1.0,
)
DOWN = LossSpec(
    name="apo_down",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=apo_down,
    params=APOParams,
    formula="sigmoid(beta d_w) + 1 - sigmoid(beta (d_w - d_l))",
    paper="2408.06266",
    equal_policy_loss=lambda **_: 1.0,
)
