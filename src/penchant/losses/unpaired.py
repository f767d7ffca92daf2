"""Losses on single answers labeled good or bad; pairs are split for them. ``d = log pi(y|x) - log ref(y|x)``."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from penchant.base.lazy import Tensor, torch
from penchant.losses.helpers import Metrics, logistic, require, require_vectors, side_metrics
from penchant.losses.registry import Beta, Range, loss
from penchant.types import Direction, Divergence, LossOutput, UnpairedLogps


@loss(
    "kto",
    "w_+ (1 - sigmoid(beta (d - z0))) good, w_- (1 - sigmoid(beta (z0 - d))) bad,  z0 = max(0, mean mismatched d)",
    paper="2402.01306",
    signal="unpaired",
    needs=("reference", "labels", "z0"),
)
def kto(
    logps: UnpairedLogps,
    *,
    beta: Beta = 0.1,
    desirable_weight: Annotated[float, Range(ge=0), "weight of good answers"] = 1.0,
    undesirable_weight: Annotated[float, Range(ge=0), "weight of bad answers"] = 1.0,
) -> LossOutput:
    """KTO: thumbs up or down, against a reference point.

    z0 estimates KL(policy || reference) and carries no gradient (see `kto_z0`). The paper keeps (w_+ n_+) / (w_- n_-) between 1 and
    3/2.
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
        policy_logps, ref_logps: summed log-probs in nats of the whole optimizer step, (batch,), without gradient.
    """
    require_vectors(policy_logps, ref_logps)
    return max(0.0, float((policy_logps.double() - ref_logps.double()).mean()))


@loss(
    "bco",
    "-log sigmoid(beta d - delta) good, -log sigmoid(delta - beta d) bad,  delta = running mean of rewards",
    paper="2404.04656",
    signal="unpaired",
    needs=("reference", "labels", "delta"),
    equal=math.log(2.0),
)
def bco(logps: UnpairedLogps, *, beta: Beta = 0.1) -> LossOutput:
    """BCO: good against bad answers by a shifted logistic loss.

    delta is the running mean of rewards, ``(E+[r] + E-[r]) / 2`` over the previous steps, without gradient. The loss is a mean over
    all answers; the paper's reweighting of bad answers by a learned density ratio (UDM) is not included.
    """
    policy, ref, labels = require(logps, "policy_logps", "ref_logps", "labels")
    if logps.delta is None:
        raise ValueError("this loss needs delta; give the running mean of rewards, 0 at the start")
    rewards = beta * (policy - ref)
    losses = logistic((2 * labels - 1) * (rewards - logps.delta))
    return LossOutput(losses, metrics=side_metrics(rewards, labels))


def _idle_of_pmpo(weighting: str, divergence: str, **_: Any) -> dict[str, str]:
    idle = {} if weighting == "alpha" else {"alpha": "with unit weights; set weighting: alpha, or leave {} out"}
    if divergence == "js":
        idle["direction"] = "on js, which has none; leave {} out"
    if divergence != "renyi":
        idle["renyi_alpha"] = f"on {divergence}; set divergence: renyi, or leave {{}} out"
    return idle


@loss(
    "pmpo",
    "-alpha E+[log pi] + (1-alpha) E-[log pi] + beta D,  D = KL(ref || pi), KL(pi || ref), JS or Renyi over the vocabulary",
    paper="2410.04166",
    signal="unpaired",
    needs=("reference", "labels", "divergence"),
    uses_lengths=True,
    terms=("negative", "divergence"),
    idle=_idle_of_pmpo,
)
def pmpo(
    logps: UnpairedLogps,
    *,
    alpha: Annotated[
        float,
        Range(ge=0, le=1),
        "weight of accepted against rejected answers; 1: only accepted ones, 0: only rejected ones",
    ] = 0.5,
    beta: Annotated[float, Range(ge=0), "weight of the divergence from the reference"] = 1.0,
    weighting: Annotated[
        Literal["alpha", "unit"], "alpha: weights alpha and 1 - alpha; unit: weight 1 for both, whatever alpha is"
    ] = "alpha",
    divergence: Annotated[
        Divergence, "which divergence, computed exactly over the vocabulary at every completion token"
    ] = "kl",
    direction: Annotated[
        Direction,
        "direction of the KL; ref_policy: KL(ref || policy), as in the paper; policy_ref: the other way round",
    ] = "ref_policy",
    renyi_alpha: Annotated[float, Range(gt=0), "order of the Renyi divergence; 1 is KL"] = 1.5,
    reduction: Annotated[
        Literal["token_mean", "sequence_sum"],
        "average each side over its tokens, or sum over tokens and average over completions",
    ] = "token_mean",
) -> LossOutput:
    """PMPO: accepted answers up, rejected answers down, each side separately, with an exact divergence from the reference.

    E+ and E- are means over accepted and rejected completions, D the mean divergence of policy and reference over the
    vocabulary at every completion token; each is divided by its own global count, so that an absent side is exactly zero.
    ``weighting=unit``: ``-E+ + E- + beta D``. divergence, direction and renyi_alpha are used by the engine, which computes
    `logps.divergence` (summed over tokens, in nats) with them. The losses are those of the accepted side; the terms ``negative``
    and ``divergence`` are the other two, each with its own weights.

    With ``direction=ref_policy`` and one token, the optimum is ``p* = (alpha A - (1 - alpha) R + beta q) / (2 alpha - 1 +
    beta)`` if that is a distribution. If it is not (beta small against 1 - alpha), the objective is unbounded: the rejected
    answers' log-prob falls forever, and the run is stopped at `train.logp_floor`.
    """
    policy, lengths, labels, distance = require(logps, "policy_logps", "lengths", "labels", "divergence")
    accepted_weight, rejected_weight = (1.0, 1.0) if weighting == "unit" else (alpha, 1.0 - alpha)
    counts = lengths if reduction == "token_mean" else lengths.new_ones(lengths.shape)
    metrics: Metrics = {"divergence": (distance.detach(), lengths)}
    if logps.ref_logps is not None:
        metrics |= side_metrics(policy - logps.ref_logps, labels)
    return LossOutput(
        -accepted_weight * policy * labels,
        weights=counts * labels,
        metrics=metrics,
        terms={
            "negative": (rejected_weight * policy * (1 - labels), counts * (1 - labels)),
            "divergence": (beta * distance, counts),
        },
    )
