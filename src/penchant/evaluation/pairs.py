"""What training did to held-out pairs, whatever the loss was: the same figures for every method."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairChange:
    """Log-prob changes of held-out pairs in nats per completion, (rows,) each: policy minus reference."""

    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def margins(self) -> np.ndarray:
        """``d_w - d_l``: DPO's margin without its beta."""
        return self.chosen - self.rejected

    @property
    def correct(self) -> np.ndarray:
        """1 where the chosen completion gained more than the rejected one, 0.5 for a tie."""
        return (self.margins > 0) + 0.5 * (self.margins == 0)


def pair_change(policy: Tensor, reference: Tensor) -> PairChange:
    """How the log-probs of pairs changed from reference to policy.

    Args:
        policy, reference: summed log-probs in nats, (2 x rows,), each pair's chosen completion before its rejected one.

    Raises:
        ValueError: the shapes differ, or the length is odd.
    """
    if policy.shape != reference.shape or policy.ndim != 1 or len(policy) % 2:
        raise ValueError(f"log-probs must both be (2 x rows,), got {tuple(policy.shape)}, {tuple(reference.shape)}")
    change = (policy.double() - reference.double()).numpy().reshape(-1, 2)
    return PairChange(change[:, 0], change[:, 1])
