"""Every loss over a fixed data set: SFT and the preference losses, told apart by their spec alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from penchant.errors import ConfigError
from penchant.logprobs import Scorer
from penchant.losses.registry import LossSpec
from penchant.reference import Reference
from penchant.types import LossOutput, PackedBatch, PairLogps, UnpairedLogps


@dataclass(slots=True)
class Offline:
    """A loss of the registry on packed batches of a fixed data set.

    Args:
        scorer: the policy.
        spec, params: the loss and its hyperparameters.
        reference: where reference log-probs come from; required when the loss needs them.
    """

    scorer: Scorer
    spec: LossSpec
    params: Mapping[str, Any]
    reference: Reference | None = None

    def __post_init__(self) -> None:
        if "reference" in self.spec.needs and self.reference is None:
            raise ConfigError("loss.name", f"{self.spec.name} needs a reference model", "set reference.kind")

    def weight(self, batch: PackedBatch) -> float:
        """Completion tokens for a loss that is a mean over tokens, else trees (pairs) or completions."""
        if self.spec.signal == "tokens":
            return float(batch.lengths.sum())
        return float(batch.trees if self.spec.signal == "pairs" else len(batch.lengths))

    def loss(self, batch: PackedBatch) -> LossOutput:
        # the reference first: its activations are gone before the policy's are made
        ref = self.reference.logps(batch) if self.reference is not None and "reference" in self.spec.needs else None
        policy = self.scorer.logps(batch).sums
        lengths = batch.lengths.to(policy.dtype)
        if self.spec.signal != "pairs":
            return self.spec.fn(UnpairedLogps(policy, lengths, ref), **self.params)
        logps = pair_logps(batch, policy, ref)
        out = self.spec.fn(logps, **self.params)
        return LossOutput(out.losses, out.weights, {**out.metrics, **logp_metrics(logps)})


def pair_logps(batch: PackedBatch, policy: Tensor, ref: Tensor | None) -> PairLogps:
    """Take the completions of a batch of pairs apart into chosen (slot 0) and rejected (slot 1)."""
    chosen = batch.completion_slot == 0
    rejected = batch.completion_slot == 1
    lengths = batch.lengths.to(policy.dtype)
    return PairLogps(
        policy_chosen_logps=policy[chosen],
        policy_rejected_logps=policy[rejected],
        ref_chosen_logps=None if ref is None else ref[chosen].to(policy.dtype),
        ref_rejected_logps=None if ref is None else ref[rejected].to(policy.dtype),
        chosen_lengths=lengths[chosen],
        rejected_lengths=lengths[rejected],
    )


def logp_metrics(logps: PairLogps) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The `logps/*` metrics (nats per completion), and how often the policy alone ranks the chosen one higher."""
    chosen, rejected = logps.policy_chosen_logps.detach(), logps.policy_rejected_logps.detach()
    metrics: dict[str, tuple[Tensor, Tensor | None]] = {
        "logps/chosen": (chosen, None),
        "logps/rejected": (rejected, None),
        "logps/accuracies": ((chosen > rejected).to(chosen.dtype), None),
    }
    if logps.ref_chosen_logps is not None and logps.ref_rejected_logps is not None:
        metrics["logratios/chosen"] = (chosen - logps.ref_chosen_logps, None)
        metrics["logratios/rejected"] = (rejected - logps.ref_rejected_logps, None)
    return metrics
