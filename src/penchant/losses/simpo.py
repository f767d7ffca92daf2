"""SimPO: length-normalised log-probs as reward, a target margin, no reference."""

from __future__ import annotations

from pydantic import Field

from penchant.losses.checks import pair_averages
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import logistic, reward_metrics
from penchant.types import LossOutput, PairLogps


class SimPOParams(LossParams):
    beta: float = Field(2.0, gt=0, description="scale of the reward (log-prob per token)")
    gamma: float = Field(1.0, ge=0, description="target margin between the rewards")


def simpo(logps: PairLogps, *, beta: float = 2.0, gamma: float = 1.0) -> LossOutput:
    """SimPO. No reference model.

    ``loss = -log sigmoid(beta a_w - beta a_l - gamma)`` with ``a = log pi(y|x) / |y|``

    Args:
        logps: summed log-probs in nats and lengths in tokens, each of shape (batch,).
        beta: > 0 (2 to 10 in the paper); gamma: >= 0 (gamma / beta from 0.1 to 0.8 there).

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2405.14734.
    """
    chosen, rejected = pair_averages(logps)
    losses = logistic(beta * (chosen - rejected) - gamma)
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


SPEC = LossSpec(
    name="simpo",
    signal="pairs",
    needs=frozenset(),
    fn=simpo,
    params=SimPOParams,
    formula="-log sigmoid(beta (a_w - a_l) - gamma),  a = log pi / |y|",
    paper="2405.14734",
    uses_lengths=True,
)
