"""Which trees a step trains on: a pure function of seed and step, so that a resumed run needs no data cursor but the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)  # drawn once an epoch, not at every step: a million rows take 20 ms
def _order(rows: int, seed: int | None, epoch: int) -> np.ndarray:
    order = np.arange(rows) if seed is None else np.random.default_rng([seed, epoch]).permutation(rows)
    order.flags.writeable = False
    return order


@dataclass(frozen=True, slots=True)
class BatchSchedule:
    """The batches of a run.

    Args:
        rows: trees in the training set; batch_size: trees per optimiser step (an epoch's last batch may be smaller; no row
            is ever left out).
        epochs: passes over the data, may be a fraction; max_steps: an upper bound, or None.
        seed: of the order; shuffle: False keeps the file's order.
        repeat: optimiser steps on each batch (online methods take several on the same rollouts).
    """

    rows: int
    batch_size: int
    epochs: float
    max_steps: int | None = None
    seed: int = 0
    shuffle: bool = True
    repeat: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.batch_size) * self.repeat

    @property
    def total_steps(self) -> int:
        steps = max(1, round(self.epochs * self.steps_per_epoch))
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def order(self, epoch: int) -> np.ndarray:
        """The order of rows in an epoch (0-based)."""
        return _order(self.rows, self.seed if self.shuffle else None, epoch)

    def batch(self, step: int) -> list[int]:
        """Row indices of optimiser step `step` (0-based)."""
        epoch, at = divmod(step, self.steps_per_epoch)
        order = self.order(epoch)
        at //= self.repeat
        return [int(i) for i in order[at * self.batch_size : (at + 1) * self.batch_size]]

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return step / self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether `step` steps done is the end of an epoch."""
        return step % self.steps_per_epoch == 0
