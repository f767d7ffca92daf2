"""Weighted preference optimisation: pairs that the policy could have written itself count more."""

from __future__ import annotations

from pydantic import Field

from penchant.losses.checks import pair_logratios, require
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import logistic, reward_metrics
from penchant.types import LossOutput, PairLogps


class WPOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")


def wpo(logps: PairLogps, *, beta: float = 0.1) -> LossOutput:
    """WPO with sampled alignment: DPO weighed by how on-policy both answers are; the weight carries no gradient.

    ``loss = min(1, w_w w_l) (-log sigmoid(beta h))``, ``w = exp(mean_t [log pi(y_t) - log sum_v pi(v)^2])``

    Args:
        logps: summed log-probs in nats and alignments (the mean in the exponent, nats), each of shape (batch,); needs the
            reference's.
        beta: > 0.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2406.11827.
    """
    chosen, rejected = pair_logratios(logps)
    chosen_alignment, rejected_alignment = require(logps, "chosen_alignment", "rejected_alignment")
    weights = (chosen_alignment + rejected_alignment).detach().clamp(max=0.0).exp()
    metrics = {**reward_metrics(beta * chosen, beta * rejected), "weights": (weights, None)}
    return LossOutput(weights * logistic(beta * (chosen - rejected)), metrics=metrics)


SPEC = LossSpec(
    name="wpo",
    signal="pairs",
    needs=frozenset({"reference", "alignment"}),
    fn=wpo,
    params=WPOParams,
    formula="min(1, w_w w_l) (-log sigmoid(beta h)),  w = exp(mean_t [log pi(y_t) - log sum_v pi(v)^2])",
    paper="2406.11827",
)
