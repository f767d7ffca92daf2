"""Identity preference optimisation: a squared loss that cannot run away."""

from __future__ import annotations

from pydantic import Field

from penchant.losses.checks import pair_logratios, require
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import reward_metrics
from penchant.types import LossOutput, PairLogps


class IPOParams(LossParams):
    beta: float = Field(0.1, gt=0, description="regularisation (tau in the paper); the target margin is 1 / (2 beta)")
    average: bool = Field(
        True,
        description="log-ratios per token (default: the target then means the same for short and long answers, as the "
        "authors advised the field's implementations) or, false, the paper's sums",
    )


def ipo(logps: PairLogps, *, beta: float = 0.1, average: bool = True) -> LossOutput:
    """IPO: the log-ratio margin is drawn to ``1 / (2 beta)``.

    ``loss = (h - 1 / (2 beta))^2``, h from log-ratios per token (``average``) or summed.

    Args:
        logps: summed log-probs in nats and lengths in tokens, each of shape (batch,); needs the reference's.
        beta: > 0; average: divide each log-ratio by its completion's length. Averaging is the default since a margin of
            1 / (2 beta) nats over a whole sequence is nearly nothing for long answers and a lot for short ones.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2310.12036.
    """
    chosen, rejected = pair_logratios(logps)
    if average:
        chosen_lengths, rejected_lengths = require(logps, "chosen_lengths", "rejected_lengths")
        chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
    losses = (chosen - rejected - 1 / (2 * beta)) ** 2
    return LossOutput(losses, metrics=reward_metrics(beta * chosen, beta * rejected))


SPEC = LossSpec(
    name="ipo",
    signal="pairs",
    needs=frozenset({"reference"}),
    fn=ipo,
    params=IPOParams,
    formula="(h - 1/(2 beta))^2,  h per token by default",
    paper="2310.12036",
    equal_policy_loss=lambda beta, **_: (1 / (2 * beta)) ** 2,
    uses_lengths=True,
)
