"""PMPO: accepted answers up, rejected answers down, each side by itself, held by an exact divergence from the reference."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from penchant.losses.checks import require
from penchant.losses.divergences import Direction, Divergence
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.rewards import Metrics, side_metrics
from penchant.types import LossOutput, UnpairedLogps


class PMPOParams(LossParams):
    alpha: float = Field(0.5, ge=0, le=1, description="1: accepted answers only, 0: rejected answers only")
    beta: float = Field(1.0, ge=0, description="weight of the divergence from the reference")
    weighting: Literal["alpha", "unit"] = Field("alpha", description="unit: both sides count 1, whatever alpha is")
    divergence: Divergence = Field(
        "kl", description="kl, js or renyi, exact over the vocabulary at every completion token"
    )
    direction: Direction = Field(
        "ref_policy", description="ref_policy: KL(ref || policy), as in the paper; or policy_ref"
    )
    renyi_alpha: float = Field(1.5, gt=0, description="order of the Renyi divergence; 1 is KL")
    reduction: Literal["token_mean", "sequence_sum"] = Field(
        "token_mean", description="each side's mean is over its tokens, or over its completions of summed tokens"
    )

    def arguments(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("alpha", "beta", "weighting", "reduction")}


def pmpo(
    logps: UnpairedLogps,
    *,
    alpha: float = 0.5,
    beta: float = 1.0,
    weighting: str = "alpha",
    reduction: str = "token_mean",
) -> LossOutput:
    """PMPO: maximise ``alpha E+[log pi] - (1 - alpha) E-[log pi] - beta D`` (``weighting=unit``: ``E+ - E- - beta D``).

    E+ and E- are means over accepted and rejected completions, D the mean divergence of policy and reference over the
    vocabulary at every completion token; each is divided by its own global count, so that an absent side is exactly zero.
    With ``direction=ref_policy`` and one token, the optimum is ``p* = (alpha A - (1 - alpha) R + beta q) / (2 alpha - 1 +
    beta)`` where that is a distribution; where it is not (beta small against 1 - alpha), the objective has no bound: the
    rejected answers' log-prob falls for ever, and the run is stopped at `train.logp_floor`.

    Args:
        logps: summed log-probs in nats, lengths in tokens, labels (1 accepted, 0 rejected) and `divergence` summed over
            tokens in nats, each of shape (batch,).
        alpha: in [0, 1]; beta: >= 0; weighting: ``alpha`` or ``unit``; reduction: ``token_mean`` or ``sequence_sum``.

    Returns:
        `losses` are the accepted side's, the terms ``negative`` and ``divergence`` the others, each with its own weights.

    Raises:
        ValueError: when a tensor is missing or its shape differs.

    Paper: arXiv 2410.04166.
    """
    policy, lengths, labels, divergence = require(logps, "policy_logps", "lengths", "labels", "divergence")
    up, down = (1.0, 1.0) if weighting == "unit" else (alpha, 1.0 - alpha)
    size = lengths if reduction == "token_mean" else lengths.new_ones(lengths.shape)
    metrics: Metrics = {"divergence": (divergence.detach(), lengths)}
    if logps.ref_logps is not None:
        metrics |= side_metrics(policy - logps.ref_logps, labels)
    return LossOutput(
        -up * policy * labels,
        weights=size * labels,
        metrics=metrics,
        terms={
            "negative": (down * policy * (1 - labels), size * (1 - labels)),
            "divergence": (beta * divergence, size),
        },
    )


SPEC = LossSpec(
    name="pmpo",
    signal="unpaired",
    needs=frozenset({"reference", "labels", "divergence"}),
    fn=pmpo,
    params=PMPOParams,
    formula="-alpha E+[log pi] + (1-alpha) E-[log pi] + beta D,  D = KL(ref || pi), KL(pi || ref), JS or Renyi over the vocabulary",
    paper="2410.04166",
    uses_lengths=True,
)
