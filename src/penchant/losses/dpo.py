"""Direct preference optimisation (sigmoid), with label smoothing (cDPO)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from penchant.losses.checks import require_reference, require_vectors
from penchant.losses.registry import LossParams, LossSpec
from penchant.types import LossOutput, PairLogps


class DPOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference; larger stays closer")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="assumed share of flipped labels (cDPO); 0 is plain DPO"
    )


def dpo(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> LossOutput:
    """DPO: a logistic loss on the difference of policy/reference log-ratios.

    ``h = (log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x))``
    ``loss = -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)``

    Args:
        logps: summed completion log-probs in nats, each of shape (batch,); needs the reference's.
        beta: inverse temperature of the implicit reward, > 0.
        label_smoothing: eps in [0, 0.5).

    Returns:
        Losses of shape (batch,); metrics `rewards/*` are ``beta * (policy - reference)`` log-probs.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2305.18290; label smoothing: Mitchell (2023), "A note on DPO with noisy preferences".
    """
    ref_chosen_logps, ref_rejected_logps = require_reference(logps)
    require_vectors(logps.policy_chosen_logps, logps.policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen_logratios = logps.policy_chosen_logps - ref_chosen_logps
    rejected_logratios = logps.policy_rejected_logps - ref_rejected_logps
    z = beta * (chosen_logratios - rejected_logratios)
    losses = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    return LossOutput(losses, metrics=reward_metrics(beta * chosen_logratios, beta * rejected_logratios))


def reward_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The field's `rewards/*` metrics from implicit rewards of shape (batch,); a tie counts as half right."""
    chosen_rewards, rejected_rewards = chosen_rewards.detach(), rejected_rewards.detach()
    margins = chosen_rewards - rejected_rewards
    accuracies = (margins > 0).to(margins.dtype) + 0.5 * (margins == 0).to(margins.dtype)
    return {
        "rewards/chosen": (chosen_rewards, None),
        "rewards/rejected": (rejected_rewards, None),
        "rewards/margins": (margins, None),
        "rewards/accuracies": (accuracies, None),
    }


SPEC = LossSpec(
    name="dpo",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=dpo,
    params=DPOParams,
    formula="-(1-eps) log sigmoid(beta h) - eps log sigmoid(-beta h),  h = log(pi_w/ref_w) - log(pi_l/ref_l)",
    paper="2305.18290",
    equal_policy_loss=lambda **_: math.log(2.0),
)
