"""DPO with a length penalty (R-DPO): what is only longer is not better."""

from __future__ import annotations

from pydantic import Field

from penchant.losses.checks import pair_logratios, require
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import logistic, reward_metrics
from penchant.types import LossOutput, PairLogps


class LengthDPOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    alpha: float = Field(0.01, ge=0, description="reward that a token costs; 0 is DPO")


def r_dpo(logps: PairLogps, *, beta: float = 0.1, alpha: float = 0.01) -> LossOutput:
    """R-DPO: DPO for the reward ``r - alpha |y|``.

    ``loss = -log sigmoid(beta h + alpha (|y_w| - |y_l|))``: a longer chosen answer is already explained by its length.

    Args:
        logps: summed log-probs in nats and lengths in tokens, each of shape (batch,); needs the reference's.
        beta: > 0; alpha: >= 0, per token.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2403.19159.
    """
    chosen, rejected = pair_logratios(logps)
    chosen_lengths, rejected_lengths = require(logps, "chosen_lengths", "rejected_lengths")
    losses = logistic(beta * (chosen - rejected) + alpha * (chosen_lengths - rejected_lengths))
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


SPEC = LossSpec(
    name="r_dpo",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=r_dpo,
    params=LengthDPOParams,
    formula="-log sigmoid(beta h + alpha (|y_w| - |y_l|))",
    paper="2403.19159",
    uses_lengths=True,
)
