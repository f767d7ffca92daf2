"""DPO plus the chosen answer's likelihood (iterative RPO)."""

from __future__ import annotations

from pydantic import Field

from penchant.losses.checks import pair_logratios, require
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import logistic, reward_metrics
from penchant.types import LossOutput, PairLogps


class RPOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    alpha: float = Field(
        1.0, ge=0, description="weight of the chosen answer's negative log-likelihood per token; 0 is DPO"
    )


def rpo(logps: PairLogps, *, beta: float = 0.1, alpha: float = 1.0) -> LossOutput:
    """Iterative RPO's loss.

    ``loss = -log sigmoid(beta h) - alpha log pi(y_w|x) / |y_w|``

    Args:
        logps: summed log-probs in nats and lengths in tokens, each of shape (batch,); needs the reference's.
        beta: > 0; alpha: >= 0.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2404.19733.
    """
    chosen, rejected = pair_logratios(logps)
    (lengths,) = require(logps, "chosen_lengths")
    losses = logistic(beta * (chosen - rejected)) - alpha * logps.policy_chosen_logps / lengths
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


SPEC = LossSpec(
    name="rpo",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=rpo,
    params=RPOParams,
    formula="-log sigmoid(beta h) - alpha log pi_w / |y_w|",
    paper="2404.19733",
    uses_lengths=True,
)
