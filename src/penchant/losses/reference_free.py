"""Losses on pairs without a reference. ``a = log pi(y|x) / |y|``: the log-prob per token."""

from __future__ import annotations

from typing import Annotated

from penchant.base.lazy import Tensor, torch
from penchant.losses.helpers import expm1_then_linear, log1mexp, logistic, pair_averages, pair_output, require
from penchant.losses.registry import LabelSmoothing, Range, loss
from penchant.types import LossOutput, PairLogps

Gamma = Annotated[float, Range(ge=0), "target margin between the rewards"]


@loss(
    "simpo",
    "-log sigmoid(beta (a_w - a_l) - gamma),  a = log pi / |y|",
    paper="2405.14734",
    needs=(),
    uses_lengths=True,
)
def simpo(
    logps: PairLogps,
    *,
    beta: Annotated[float, Range(gt=0), "scale of the reward (log-prob per token)"] = 2.0,
    gamma: Gamma = 1.0,
) -> LossOutput:
    """SimPO: length-normalized log-probs as reward, and a target margin.

    In the paper beta is 2 to 10, and gamma / beta 0.1 to 0.8.
    """
    chosen, rejected = pair_averages(logps)
    return pair_output(logistic(beta * (chosen - rejected) - gamma), beta * chosen, beta * rejected)


@loss(
    "alpha_po",
    "-log sigmoid(beta (r_w - r_l) - gamma),  r = (1 - e^(-alpha a)) / alpha,  a = log pi / |y|",
    paper="2501.03884",
    needs=(),
    uses_lengths=True,
)
def alpha_po(
    logps: PairLogps,
    *,
    beta: Annotated[float, Range(gt=0), "scale of the reward"] = 2.0,
    gamma: Gamma = 1.0,
    alpha: Annotated[float, "shape of the reward; 0 is SimPO"] = 0.25,
) -> LossOutput:
    """AlphaPO: SimPO with a reward of adjustable shape."""
    chosen, rejected = (shaped_reward(a, alpha) for a in pair_averages(logps))
    return pair_output(logistic(beta * (chosen - rejected) - gamma), beta * chosen, beta * rejected)


def shaped_reward(a: Tensor, alpha: float) -> Tensor:
    """``(1 - e^(-alpha a)) / alpha``, and `a` for alpha = 0; beyond an exponent of 20 it continues as its tangent."""
    return a if alpha == 0 else -expm1_then_linear(-alpha * a) / alpha


@loss(
    "orpo",
    "-a_w - beta log sigmoid(log odds_w - log odds_l),  odds = e^a / (1 - e^a),  a = log pi / |y|",
    paper="2403.07691",
    needs=(),
    uses_lengths=True,
    lr=(8e-6, 5e-5),
)
def orpo(
    logps: PairLogps,
    *,
    beta: Annotated[float, Range(gt=0), "weight of the odds-ratio term (lambda in the paper)"] = 0.1,
) -> LossOutput:
    """ORPO: negative log-likelihood of the chosen completion plus an odds-ratio term."""
    chosen, rejected = pair_averages(logps)
    log_odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    return pair_output(-chosen + beta * logistic(log_odds), beta * chosen, beta * rejected)


@loss(
    "cpo",
    "-log sigmoid(beta (log pi_w - log pi_l)) - alpha log pi_w / |y_w|",
    paper="2401.08417",
    needs=(),
    uses_lengths=True,
)
def cpo(
    logps: PairLogps,
    *,
    beta: Annotated[float, Range(gt=0), "scale of the log-prob margin"] = 0.1,
    alpha: Annotated[float, Range(ge=0), "weight of the chosen answer's negative log-likelihood per token"] = 1.0,
    label_smoothing: LabelSmoothing = 0.0,
) -> LossOutput:
    """CPO: DPO's loss on plain log-probs, plus the chosen answer's likelihood."""
    chosen, rejected = require(logps, "policy_chosen_logps", "policy_rejected_logps")
    losses = logistic(beta * (chosen - rejected), label_smoothing)
    if alpha:
        (lengths,) = require(logps, "chosen_lengths")
        losses = losses - alpha * chosen / lengths
    return pair_output(losses, beta * chosen, beta * rejected)


@loss("slic", "max(0, delta - log pi_w + log pi_l) - reg_weight log pi_w", paper="2305.10425", needs=())
def slic(
    logps: PairLogps,
    *,
    delta: Annotated[float, Range(gt=0), "margin in nats from which the ranking loss of a pair is zero"] = 1.0,
    reg_weight: Annotated[float, Range(ge=0), "weight of the chosen answer's negative log-likelihood (lambda)"] = 0.1,
) -> LossOutput:
    """SLiC-HF's rank calibration, with the chosen completion as regularization target."""
    chosen, rejected = require(logps, "policy_chosen_logps", "policy_rejected_logps")
    return pair_output(torch.relu(delta - chosen + rejected) - reg_weight * chosen, chosen, rejected)
