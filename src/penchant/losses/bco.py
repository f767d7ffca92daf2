"""Binary classifier optimisation: good against bad answers by a shifted logistic loss."""

from __future__ import annotations

import math

from pydantic import Field

from penchant.losses.checks import require
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import logistic, side_metrics
from penchant.types import LossOutput, UnpairedLogps


class BCOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")


def bco(logps: UnpairedLogps, *, beta: float = 0.1) -> LossOutput:
    """BCO.

    ``loss = -log sigmoid(r - delta)`` for a good answer, ``-log sigmoid(-(r - delta))`` for a bad one, ``r = beta d``;
    delta is the running mean of rewards, ``(E+[r] + E-[r]) / 2`` over the steps before, without gradient.
    A mean over all answers; the paper's reweighting of bad answers by a learned density ratio (UDM) is not part of it.

    Args:
        logps: summed log-probs in nats and labels (1 good, 0 bad), each of shape (batch,); `delta`; needs the reference's.
        beta: > 0.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2404.04656.
    """
    policy, ref, labels = require(logps, "policy_logps", "ref_logps", "labels")
    if logps.delta is None:
        raise ValueError("this loss needs delta; give the running mean of rewards, 0 at the start")
    rewards = beta * (policy - ref)
    losses = logistic((2 * labels - 1) * (rewards - logps.delta))
    return LossOutput(losses, metrics=side_metrics(rewards, labels))


SPEC = LossSpec(
    name="bco",
    signal="unpaired",
    needs=frozenset({"reference", "labels", "delta"}),
    fn=bco,
    params=BCOParams,
    formula="-log sigmoid(beta d - delta) good, -log sigmoid(delta - beta d) bad,  delta = running mean of rewards",
    paper="2404.04656",
    equal_policy_loss=lambda **_: math.log(2.0),
)
