"""What training did to held-out pairs, whatever the loss was: the same figures for every method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from penchant.reference import LiveReference, compute_logps
from penchant.types import TokenTree


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


def pair_change(
    policy: LiveReference, reference: LiveReference, trees: Sequence[TokenTree], tokens_per_step: int = 4096
) -> PairChange:
    """How the log-probs of pairs changed from reference to policy.

    Args:
        policy, reference: run without gradient; trees: pairs, chosen first.

    Raises:
        ValueError: a tree has not exactly two completions.
    """
    if any(len(t.completion_ids) != 2 for t in trees):
        raise ValueError("pair_change needs trees of two completions each, chosen first")
    now, then = (compute_logps(m, trees, tokens_per_step=tokens_per_step).sums for m in (policy, reference))
    change = (now.double() - then.double()).numpy().reshape(-1, 2)
    return PairChange(change[:, 0], change[:, 1])
