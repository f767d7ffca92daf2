"""Noise contrastive alignment on pairs: absolute rewards, so that the chosen answer's probability does not fall."""

from __future__ import annotations

import math

import torch.nn.functional as F
from pydantic import Field

from penchant.losses.checks import pair_logratios
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import reward_metrics
from penchant.types import LossOutput, PairLogps


class NCAParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")


def nca(logps: PairLogps, *, beta: float = 0.1) -> LossOutput:
    """NCA on pairs.

    ``loss = -log sigmoid(beta d_w) - 0.5 log sigmoid(-beta d_w) - 0.5 log sigmoid(-beta d_l)``

    Args:
        logps: summed log-probs in nats, each of shape (batch,); needs the reference's.
        beta: > 0.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2402.05369.
    """
    chosen, rejected = pair_logratios(logps)
    w, r = beta * chosen, beta * rejected
    losses = -F.logsigmoid(w) - 0.5 * F.logsigmoid(-w) - 0.5 * F.logsigmoid(-r)
    return LossOutput(losses, metrics=reward_metrics(w, r))


SPEC = LossSpec(
    name="nca",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=nca,
    params=NCAParams,
    formula="-log sigmoid(beta d_w) - 0.5 log sigmoid(-beta d_w) - 0.5 log sigmoid(-beta d_l)",
    paper="2402.05369",
    equal_policy_loss=lambda **_: 2 * math.log(2.0),
)
