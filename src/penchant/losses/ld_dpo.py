"""Length-desensitised DPO: what an answer says beyond the other one's length counts less."""

from __future__ import annotations

import math

from pydantic import Field

from penchant.losses.checks import pair_logratios, require
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import logistic, reward_metrics
from penchant.types import LossOutput, PairLogps


class LDDPOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    alpha: float = Field(
        0.5, ge=0, le=1, description="weight of the tokens beyond the shorter answer's length; 1 is DPO"
    )


def ld_dpo(logps: PairLogps, *, beta: float = 0.1, alpha: float = 0.5) -> LossOutput:
    """LD-DPO: DPO on ``log pi(first n tokens) + alpha log pi(the rest)``, n = min(|y_w|, |y_l|), reference alike.

    ``loss = -log sigmoid(beta h')``, ``d' = (1 - alpha) d(first n tokens) + alpha d``

    Args:
        logps: summed log-probs in nats, over whole completions and over their first n tokens, each of shape (batch,); needs
            the reference's.
        beta: > 0; alpha: in [0, 1].

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2409.06411.
    """
    chosen, rejected = pair_logratios(logps)
    first = require(
        logps,
        "policy_chosen_shared_logps",
        "policy_rejected_shared_logps",
        "ref_chosen_shared_logps",
        "ref_rejected_shared_logps",
    )
    chosen = (1 - alpha) * (first[0] - first[2]) + alpha * chosen
    rejected = (1 - alpha) * (first[1] - first[3]) + alpha * rejected
    losses = logistic(beta * (chosen - rejected))
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


SPEC = LossSpec(
    name="ld_dpo",
    signal="pairs",
    needs=frozenset({"reference", "shared_logps"}),
    fn=ld_dpo,
    params=LDDPOParams,
    formula="-log sigmoid(beta (d'_w - d'_l)),  d' = (1-alpha) d(first min(|y_w|, |y_l|) tokens) + alpha d",
    paper="2409.06411",
    equal_policy_loss=lambda **_: math.log(2.0),
    uses_lengths=True,
)
