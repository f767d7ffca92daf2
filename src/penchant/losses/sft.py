"""Supervised fine-tuning: cross-entropy of completion tokens."""

from __future__ import annotations

from penchant.losses.checks import require_vectors
from penchant.losses.registry import LossParams, LossSpec
from penchant.types import LossOutput, UnpairedLogps


class SFTParams(LossParams):
    pass


def sft(logps: UnpairedLogps) -> LossOutput:
    """SFT: mean negative log-likelihood per completion token, over all tokens of the global batch.

    ``loss = -sum_i log pi(y_i|x_i) / sum_i |y_i|``

    Args:
        logps: `policy_logps` summed log-probs in nats and `lengths` in tokens, each of shape (batch,).

    Returns:
        Losses ``-log pi(y|x)`` with weights ``|y|``, each of shape (batch,).

    Raises:
        ValueError: when the shapes differ.
    """
    require_vectors(logps.policy_logps, logps.lengths)
    losses = -logps.policy_logps
    return LossOutput(losses, weights=logps.lengths, metrics={"nll": (losses.detach(), logps.lengths)})


SPEC = LossSpec(
    name="sft",
    signal="tokens",
    needs=frozenset(),
    fn=sft,
    params=SFTParams,
    formula="-sum_i log pi(y_i|x_i) / sum_i |y_i|",
    uses_lengths=True,
)
