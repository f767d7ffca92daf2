"""Contrastive preference optimisation: DPO with a uniform reference, plus the chosen answer's likelihood."""

from __future__ import annotations

from pydantic import Field

from penchant.losses.checks import pair_policy, require
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import logistic, reward_metrics
from penchant.types import LossOutput, PairLogps


class CPOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="scale of the log-prob margin")
    alpha: float = Field(1.0, ge=0, description="weight of the chosen answer's negative log-likelihood per token")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed share of flipped labels")


def cpo(logps: PairLogps, *, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0) -> LossOutput:
    """CPO. No reference model.

    ``loss = -(1 - eps) log sigmoid(z) - eps log sigmoid(-z) - alpha log pi(y_w|x) / |y_w|``,
    ``z = beta (log pi(y_w|x) - log pi(y_l|x))``

    Args:
        logps: summed log-probs in nats and lengths in tokens, each of shape (batch,).
        beta: > 0; alpha: >= 0; label_smoothing: eps in [0, 0.5).

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2401.08417.
    """
    chosen, rejected = pair_policy(logps)
    losses = logistic(beta * (chosen - rejected), label_smoothing)
    if alpha:
        (lengths,) = require(logps, "chosen_lengths")
        losses = losses - alpha * chosen / lengths
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


SPEC = LossSpec(
    name="cpo",
    signal="pairs",
    needs=frozenset(),
    fn=cpo,
    params=CPOParams,
    formula="-log sigmoid(beta (log pi_w - log pi_l)) - alpha log pi_w / |y_w|",
    paper="2401.08417",
    uses_lengths=True,
)
