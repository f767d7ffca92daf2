"""Kahneman-Tversky optimisation: single answers with a thumb up or down, against a reference point."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from penchant.losses.checks import require, require_vectors
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import side_metrics
from penchant.types import LossOutput, UnpairedLogps


class KTOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    desirable_weight: float = Field(1.0, ge=0, description="weight of good answers")
    undesirable_weight: float = Field(1.0, ge=0, description="weight of bad answers")


def kto(
    logps: UnpairedLogps, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> LossOutput:
    """KTO.

    ``loss = w_+ (1 - sigmoid(beta (d - z0)))`` for a good answer, ``w_- (1 - sigmoid(beta (z0 - d)))`` for a bad one, d its
    log-ratio; z0 estimates KL(policy || reference) and carries no gradient (see `kto_z0`).

    Args:
        logps: summed log-probs in nats and labels (1 good, 0 bad), each of shape (batch,); `z0` in nats; needs the reference's.
        beta: > 0; desirable_weight, undesirable_weight: >= 0; the paper keeps (w_+ n_+) / (w_- n_-) between 1 and 3/2.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2402.01306.
    """
    policy, ref, labels = require(logps, "policy_logps", "ref_logps", "labels")
    if logps.z0 is None:
        raise ValueError("this loss needs z0; estimate it with kto_z0 from mismatched completions")
    logratios = policy - ref
    sign = 2 * labels - 1
    weights = desirable_weight * labels + undesirable_weight * (1 - labels)
    losses = weights * torch.sigmoid(-sign * beta * (logratios - logps.z0))
    return LossOutput(losses, metrics=side_metrics(beta * logratios, labels))


def kto_z0(policy_logps: Tensor, ref_logps: Tensor) -> float:
    """The reference point: ``z0 = max(0, mean_i [log pi(y_j|x_i) - log ref(y_j|x_i)])`` over mismatched completions, j != i.

    Args:
        policy_logps, ref_logps: summed log-probs in nats of the whole optimiser step, (batch,), without gradient.
    """
    require_vectors(policy_logps, ref_logps)
    return max(0.0, float((policy_logps.double() - ref_logps.double()).mean()))


SPEC = LossSpec(
    name="kto",
    signal="unpaired",
    needs=frozenset({"reference", "labels", "z0"}),
    fn=kto,
    params=KTOParams,
    formula="w_+ (1 - sigmoid(beta (d - z0))) good, w_- (1 - sigmoid(beta (z0 - d))) bad,  z0 = max(0, mean mismatched d)",
    paper="2402.01306",
)
