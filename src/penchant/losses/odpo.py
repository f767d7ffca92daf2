"""DPO with an offset: how much better an answer is decides how far apart the two must be."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from penchant.losses.checks import pair_logratios, require
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import logistic, reward_metrics
from penchant.types import LossOutput, PairLogps


class ODPOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    alpha: float = Field(0.5, ge=0, description="weight of the offset; 0 is DPO")
    offset: Literal["log", "linear"] = Field("log", description="offset from the score gap g: log g, or g itself")


def odpo(logps: PairLogps, *, beta: float = 0.1, alpha: float = 0.5, offset: str = "log") -> LossOutput:
    """ODPO.

    ``loss = -log sigmoid(beta h - alpha f(score(y_w) - score(y_l)))``, f = log (the paper's) or the identity

    Args:
        logps: summed log-probs in nats, each of shape (batch,); needs the reference's, and scores with chosen above rejected.
        beta: > 0; alpha: >= 0; offset: ``log`` or ``linear``.

    Raises:
        ValueError: when a tensor is missing, its shape differs, or a chosen score is not above the rejected one.

    Paper: arXiv 2402.10571.
    """
    chosen, rejected = pair_logratios(logps)
    chosen_scores, rejected_scores = require(logps, "chosen_scores", "rejected_scores")
    gap = chosen_scores - rejected_scores
    if bool((gap <= 0).any()):
        raise ValueError("odpo needs chosen_scores above rejected_scores; drop the other pairs")
    losses = logistic(beta * (chosen - rejected) - alpha * (torch.log(gap) if offset == "log" else gap))
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


SPEC = LossSpec(
    name="odpo",
    signal="pairs",
    needs=frozenset({"reference", "scores", "score_gap"}),
    fn=odpo,
    params=ODPOParams,
    formula="-log sigmoid(beta h - alpha f(s_w - s_l)),  f = log or identity",
    paper="2402.10571",
)
