"""f-DPO: DPO for divergences other than the reverse KL."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from penchant.losses.checks import pair_logratios
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import expm1_then_linear, logistic, reward_metrics
from penchant.types import LossOutput, PairLogps

FDivergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


class FDPOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    divergence: FDivergence = Field("js", description="which f; reverse_kl is DPO")
    alpha: float = Field(0.5, gt=0, lt=1, description="of divergence=alpha: towards 0 reverse KL, towards 1 forward KL")


def f_dpo(logps: PairLogps, *, beta: float = 0.1, divergence: str = "js", alpha: float = 0.5) -> LossOutput:
    """f-DPO: the implicit reward is ``beta f'(u)`` with ``u = pi(y|x) / ref(y|x) = e^d``.

    ``loss = -log sigmoid(beta f'(u_w) - beta f'(u_l))``, f' without its constant: reverse KL ``d``; forward KL ``-e^(-d)``;
    JS ``log 2 + d - log(1 + e^d)``; alpha ``(1 - e^(-alpha d)) / alpha``

    Args:
        logps: summed log-probs in nats, each of shape (batch,); needs the reference's.
        beta: > 0; divergence: which f; alpha: in (0, 1). Beyond an exponent of 20, e^x goes on as its
            tangent: a rejected-looking chosen answer keeps a finite gradient.

    Raises:
        ValueError: when a tensor is missing, its shape differs, or the divergence is unknown.

    Paper: arXiv 2309.16240.
    """
    logratios = pair_logratios(logps)
    chosen, rejected = (beta * f_prime(d, divergence, alpha) for d in logratios)
    return LossOutput(logistic(chosen - rejected), metrics=reward_metrics(chosen, rejected))


def f_prime(d: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(e^d), shape of d."""
    if divergence == "reverse_kl":
        return d
    if divergence == "forward_kl":
        return -1 - expm1_then_linear(-d)
    if divergence == "js":
        return math.log(2.0) - F.softplus(-d)  # d - log(1 + e^d) without cancellation
    if divergence == "alpha":
        return -expm1_then_linear(-alpha * d) / alpha
    raise ValueError(f"{divergence!r} is none of reverse_kl, forward_kl, js, alpha")


SPEC = LossSpec(
    name="f_dpo",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=f_dpo,
    params=FDPOParams,
    formula="-log sigmoid(beta f'(u_w) - beta f'(u_l)),  u = e^d",
    paper="2309.16240",
    equal_policy_loss=lambda **_: math.log(2.0),
)
