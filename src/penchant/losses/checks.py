"""Rank and presence checks that every loss makes first."""

from __future__ import annotations

from torch import Tensor

from penchant.types import PairLogps


def require_vectors(*tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are of one shape (batch,): a silent broadcast would be a wrong loss."""
    shapes = [tuple(t.shape) for t in tensors]
    if any(len(s) != 1 for s in shapes) or len(set(shapes)) > 1:
        raise ValueError(f"every argument must be of the same shape (batch,), got {shapes}")


def require_reference(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """The reference's log-probs, or a ValueError that says what is missing."""
    if logps.ref_chosen_logps is None or logps.ref_rejected_logps is None:
        raise ValueError("this loss needs ref_chosen_logps and ref_rejected_logps; give the reference's log-probs")
    return logps.ref_chosen_logps, logps.ref_rejected_logps
