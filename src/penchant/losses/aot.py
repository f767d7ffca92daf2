"""Alignment via optimal transport: preferences hold for the distributions of rewards, not pair by pair."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from penchant.losses.checks import pair_logratios
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import logistic, reward_metrics
from penchant.types import LossOutput, PairLogps


class AOTParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed share of flipped labels")


def aot(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> LossOutput:
    """AOT, paired: the k-th smallest policy margin of the batch against the k-th smallest reference margin.

    ``loss_i = l(beta (m_i - ref m_(rank of i)))``, ``m = log pi(y_w|x) - log pi(y_l|x)``, l the (smoothed) logistic loss

    Args:
        logps: summed log-probs in nats of the whole optimiser step, each of shape (batch,); needs the reference's.
        beta: > 0; label_smoothing: eps in [0, 0.5).

    Returns:
        Losses of shape (batch,), in the order of the rows: row i's margin is compared with the reference margin of its rank.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2406.05882.
    """
    chosen, rejected = pair_logratios(logps)
    margins = logps.policy_chosen_logps - logps.policy_rejected_logps
    assert logps.ref_chosen_logps is not None and logps.ref_rejected_logps is not None
    ref_margins = logps.ref_chosen_logps - logps.ref_rejected_logps
    losses = logistic(beta * (margins - by_rank(ref_margins, margins)), label_smoothing)
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


def aot_unpaired(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> LossOutput:
    """AOT, unpaired: the k-th smallest chosen log-ratio of the batch against the k-th smallest rejected one.

    ``loss_i = l(beta (d_w,i - d_l,(rank of i)))``; which answers stood together in the data does not matter.

    Args:
        logps: summed log-probs in nats of the whole optimiser step, each of shape (batch,); needs the reference's.
        beta: > 0; label_smoothing: eps in [0, 0.5).

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2406.05882.
    """
    chosen, rejected = pair_logratios(logps)
    losses = logistic(beta * (chosen - by_rank(rejected, chosen)), label_smoothing)
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


def by_rank(values: Tensor, like: Tensor) -> Tensor:
    """`values` put into the order of `like`: where `like` has its k-th smallest number stands the k-th smallest value."""
    ranks = torch.argsort(torch.argsort(like.detach(), stable=True))
    return values.sort(stable=True).values[ranks]


PAIRED = LossSpec(
    name="aot",
    signal="pairs",
    needs=frozenset({"reference", "batch"}),
    fn=aot,
    params=AOTParams,
    formula="l(beta (m_i - ref m_(rank i))),  m = log pi_w - log pi_l, sorted over the optimiser step",
    paper="2406.05882",
    equal_policy_loss=lambda **_: math.log(2.0),
)
UNPAIRED = LossSpec(
    name="aot_unpaired",
    signal="pairs",
    needs=frozenset({"reference", "batch"}),
    fn=aot_unpaired,
    params=AOTParams,
    formula="l(beta (d_w,i - d_l,(rank i))),  sorted over the optimiser step",
    paper="2406.05882",
    equal_policy_loss=lambda **_: math.log(2.0),
)
