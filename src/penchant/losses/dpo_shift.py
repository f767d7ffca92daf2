"""DPO-Shift: the rejected answer's log-ratio counts less, so that the chosen one's probability falls less."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from penchant.losses.checks import pair_logratios
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import logistic, reward_metrics
from penchant.losses.schedules import Schedule
from penchant.types import LossOutput, PairLogps


class DPOShiftParams(LossParams):
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    lam: float = Field(
        0.75, alias="lambda", gt=0, le=1, description="weight of the rejected log-ratio where it is fixed; 1 is DPO"
    )
    schedule: Literal["fixed", "increase_linear", "decrease_linear", "linear_increase", "linear_decrease"] = Field(
        "fixed", description="lambda over the run, from its first optimiser step to its last one"
    )
    lambda_min: float = Field(0.5, gt=0, le=1, description="lowest lambda of a linear schedule")
    lambda_max: float = Field(1.0, gt=0, le=1, description="highest lambda of a linear schedule")

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> DPOShiftParams:
        if self.schedule != "fixed" and "lam" in self.model_fields_set:
            raise ValueError("lambda and a linear schedule are both set; a schedule goes from lambda_min to lambda_max")
        if self.schedule == "fixed" and self.model_fields_set & {"lambda_min", "lambda_max"}:
            raise ValueError("lambda_min and lambda_max are of a linear schedule; set schedule, or lambda alone")
        if self.lambda_min > self.lambda_max:
            raise ValueError(f"lambda_min ({self.lambda_min:g}) is above lambda_max ({self.lambda_max:g})")
        return self

    def arguments(self) -> dict[str, Any]:
        return {"beta": self.beta, "lam": self.lam}

    def to_mapping(self) -> dict[str, Any]:
        unused = {"lambda_min", "lambda_max"} if self.schedule == "fixed" else {"lambda"}
        return {k: v for k, v in super().to_mapping().items() if k not in unused}

    def schedules(self) -> dict[str, Schedule]:
        ends = {
            "fixed": (self.lam, self.lam),
            "increase": (self.lambda_min, self.lambda_max),
            "decrease": (self.lambda_max, self.lambda_min),
        }
        kind = self.schedule.replace("linear", "").strip("_")
        start, end = ends[kind]
        return {"lam": Schedule(start=start, end=end)}


def dpo_shift(logps: PairLogps, *, beta: float = 0.1, lam: float = 0.75) -> LossOutput:
    """DPO-Shift: DPO with the rejected log-ratio weighed by lambda.

    ``loss = -log sigmoid(beta (d_w - lambda d_l))``, d the policy/reference log-ratios of chosen and rejected

    Args:
        logps: summed log-probs in nats, each of shape (batch,); needs the reference's.
        beta: > 0; lam: lambda in (0, 1]. Schedules pass the current value in.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2502.07599.
    """
    chosen, rejected = pair_logratios(logps)
    losses = logistic(beta * (chosen - lam * rejected))
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


SPEC = LossSpec(
    name="dpo_shift",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=dpo_shift,
    params=DPOShiftParams,
    formula="-log sigmoid(beta (d_w - lambda d_l))",
    paper="2502.07599",
    equal_policy_loss=lambda **_: math.log(2.0),
)
