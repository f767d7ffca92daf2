"""AlphaPO: SimPO with a reward whose shape is a choice."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from penchant.losses.checks import pair_averages
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import expm1_then_linear, logistic, reward_metrics
from penchant.types import LossOutput, PairLogps


class AlphaPOParams(LossParams):
    beta: float = Field(2.0, gt=0, description="scale of the reward")
    gamma: float = Field(1.0, ge=0, description="target margin between the rewards")
    alpha: float = Field(0.25, description="shape of the reward; 0 is SimPO")


def alpha_po(logps: PairLogps, *, beta: float = 2.0, gamma: float = 1.0, alpha: float = 0.25) -> LossOutput:
    """AlphaPO. No reference model.

    ``loss = -log sigmoid(beta (r_w - r_l) - gamma)`` with ``r = (1 - e^(-alpha a)) / alpha``, ``a = log pi(y|x) / |y|``

    Args:
        logps: summed log-probs in nats and lengths in tokens, each of shape (batch,).
        beta: > 0; gamma: >= 0; alpha: any; 0 is the limit ``r = a``.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2501.03884.
    """
    averages = pair_averages(logps)
    chosen, rejected = (shaped_reward(a, alpha) for a in averages)
    losses = logistic(beta * (chosen - rejected) - gamma)
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


def shaped_reward(a: Tensor, alpha: float) -> Tensor:
    """``(1 - e^(-alpha a)) / alpha``; beyond an exponent of 20 it goes on as its tangent."""
    return a if alpha == 0 else -expm1_then_linear(-alpha * a) / alpha


SPEC = LossSpec(
    name="alpha_po",
    signal="pairs",
    needs=frozenset(),
    fn=alpha_po,
    params=AlphaPOParams,
    formula="-log sigmoid(beta (r_w - r_l) - gamma),  r = (1 - e^(-alpha a)) / alpha,  a = log pi / |y|",
    paper="2501.03884",
    uses_lengths=True,
)
