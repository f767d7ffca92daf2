"""Self-play preference optimisation with hard labels: each log-ratio has a target of its own."""

from __future__ import annotations

from pydantic import Field

from penchant.losses.checks import pair_logratios
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import reward_metrics
from penchant.types import LossOutput, PairLogps


class SPPOParams(LossParams):
    beta: float = Field(
        0.1, gt=0, description="1 / eta; the targets are +-1 / (2 beta) nats (the paper's eta is 1000: beta 0.001)"
    )


def sppo(logps: PairLogps, *, beta: float = 0.1) -> LossOutput:
    """SPPO with win probabilities 1 and 0.

    ``loss = (d_w - 1 / (2 beta))^2 + (d_l + 1 / (2 beta))^2``

    Args:
        logps: summed log-probs in nats, each of shape (batch,); needs the reference's.
        beta: > 0.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2405.00675.
    """
    chosen, rejected = pair_logratios(logps)
    target = 1 / (2 * beta)
    losses = (chosen - target) ** 2 + (rejected + target) ** 2
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


SPEC = LossSpec(
    name="sppo",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=sppo,
    params=SPPOParams,
    formula="(d_w - 1/(2 beta))^2 + (d_l + 1/(2 beta))^2",
    paper="2405.00675",
    equal_policy_loss=lambda beta: 2 * (1 / (2 * beta)) ** 2,
)
