"""REBEL: regress the log-ratio margin onto the difference of rewards."""

from __future__ import annotations

from pydantic import Field

from penchant.losses.checks import pair_logratios, require
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import reward_metrics
from penchant.types import LossOutput, PairLogps


class REBELParams(LossParams):
    eta: float = Field(1.0, gt=0, description="step size: the margin's target is eta x the score gap, in nats")


def rebel(logps: PairLogps, *, eta: float = 1.0) -> LossOutput:
    """REBEL.

    ``loss = (h / eta - (score(y_w) - score(y_l)))^2``

    Args:
        logps: summed log-probs in nats, each of shape (batch,); needs the reference's, and the scores.
        eta: > 0.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2404.16767.
    """
    chosen, rejected = pair_logratios(logps)
    chosen_scores, rejected_scores = require(logps, "chosen_scores", "rejected_scores")
    losses = ((chosen - rejected) / eta - (chosen_scores - rejected_scores)) ** 2
    return LossOutput(losses, metrics=reward_metrics(chosen / eta, rejected / eta))


SPEC = LossSpec(
    name="rebel",
    signal="pairs",
    needs=frozenset({"reference", "scores"}),
    fn=rebel,
    params=REBELParams,
    formula="(h / eta - (s_w - s_l))^2",
    paper="2404.16767",
)
