"""Rank and presence checks that every loss makes first."""

from __future__ import annotations

from torch import Tensor

from penchant.types import PairLogps, UnpairedLogps


def require_vectors(*tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are of one shape (batch,): a silent broadcast would be a wrong loss."""
    shapes = [tuple(t.shape) for t in tensors]
    if any(len(s) != 1 for s in shapes) or len(set(shapes)) > 1:
        raise ValueError(f"every argument must be of the same shape (batch,), got {shapes}")


def require(logps: PairLogps | UnpairedLogps, *names: str) -> tuple[Tensor, ...]:
    """The named fields, all of one shape (batch,); ValueError says which are missing."""
    found = {name: getattr(logps, name) for name in names}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ValueError(f"this loss needs {' and '.join(missing)}; give {'it' if len(missing) == 1 else 'them'}")
    require_vectors(*found.values())
    return tuple(found.values())


def pair_policy(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """(policy_chosen_logps, policy_rejected_logps), checked."""
    chosen, rejected = require(logps, "policy_chosen_logps", "policy_rejected_logps")
    return chosen, rejected


def pair_logratios(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """(d_w, d_l): ``log pi(y|x) - log ref(y|x)`` of chosen and rejected, checked."""
    chosen, rejected, ref_chosen, ref_rejected = require(
        logps, "policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps"
    )
    return chosen - ref_chosen, rejected - ref_rejected


def pair_averages(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """(a_w, a_l): log-probs per token, ``log pi(y|x) / |y|``, checked."""
    chosen, rejected, chosen_lengths, rejected_lengths = require(
        logps, "policy_chosen_logps", "policy_rejected_logps", "chosen_lengths", "rejected_lengths"
    )
    return chosen / chosen_lengths, rejected / rejected_lengths
