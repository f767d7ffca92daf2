"""Losses on targets: cross-entropy of completion tokens, and a reward model's Bradley-Terry loss."""

from __future__ import annotations

from penchant.base.lazy import Tensor
from penchant.losses.helpers import logistic, require, require_vectors, reward_metrics
from penchant.losses.registry import loss
from penchant.types import LossOutput, UnpairedLogps


@loss("sft", "-sum_i log pi(y_i|x_i) / sum_i |y_i|", signal="tokens", needs=(), uses_lengths=True)
def sft(logps: UnpairedLogps) -> LossOutput:
    """SFT: mean negative log-likelihood per completion token, over all tokens of the global batch.

    The losses are ``-log pi(y|x)``, their weights ``|y|``.
    """
    require_vectors(logps.policy_logps, logps.lengths)
    losses = -logps.policy_logps
    return LossOutput(losses, weights=logps.lengths, metrics={"nll": (losses.detach(), logps.lengths)})


@loss(
    "dft",
    "-sum_t sg[pi(y_t)] log pi(y_t) / sum_i |y_i|",
    paper="2508.05629",
    signal="tokens",
    needs=("token_probs",),
    uses_lengths=True,
)
def dft(logps: UnpairedLogps) -> LossOutput:
    """DFT: SFT with each token's loss weighted by its own probability (without gradient), which cancels 1/pi in SFT's gradient.

    The mean is over all tokens of the global batch; `nll` is logged as for sft.
    """
    policy, lengths, weighted = require(logps, "policy_logps", "lengths", "weighted_logps")
    return LossOutput(-weighted, weights=lengths, metrics={"nll": (-policy.detach(), lengths)})


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    centring: float = 0.0,
) -> LossOutput:
    """The negative log-likelihood of the preferences under P(y_w > y_l) = sigmoid(r_w - r_l).

    It takes rewards, not log-probs, so it is not in the registry.

    ``z = r_w - r_l - m``
    ``loss = -(1 - eps) log sigmoid(z) - eps log sigmoid(-z) + c (r_w + r_l)^2``

    Args:
        chosen, rejected: rewards r_w and r_l of shape (batch,), dimensionless.
        margin: m of shape (batch,), by how much the chosen answer should be ahead; None: 0.
        label_smoothing: eps in [0, 0.5), the assumed share of flipped labels.
        centring: c >= 0; without it only differences of rewards are determined, with it the mean reward goes to 0.

    Returns:
        Losses of shape (batch,); metrics `rewards/*` and, if c > 0, `rewards/centring`, the last term.

    Raises:
        ValueError: shapes differ, or a number is out of its range.

    Papers: Bradley and Terry (1952); arXiv 2009.01325 (reward models from comparisons); arXiv 2307.09288 (margin); arXiv 2312.09244
    (centring).
    """
    require_vectors(chosen, rejected, *(() if margin is None else (margin,)))
    if not 0.0 <= label_smoothing < 0.5 or centring < 0.0:
        raise ValueError(f"label_smoothing is {label_smoothing:g}, centring {centring:g}; give [0, 0.5) and at least 0")
    z = chosen - rejected if margin is None else chosen - rejected - margin
    losses = logistic(z, label_smoothing)
    metrics = reward_metrics(chosen, rejected)
    if centring:
        off_center = centring * (chosen + rejected).square()
        losses = losses + off_center
        metrics["rewards/centring"] = (off_center.detach(), None)
    return LossOutput(losses, metrics=metrics)
