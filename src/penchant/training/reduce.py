"""Reduction by global counts: sums over micro-batches, then one division, so that 1x8 equals 4x2."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from penchant.types import LossOutput


def reduced(output: LossOutput, totals: Mapping[str, float]) -> Tensor:
    """The micro-batch's part of the step's loss: each term over its global count; a term without a count is exactly zero."""
    parts = [values.sum() / totals[name] for name, (values, _) in output.summands().items() if totals[name] > 0]
    # no term at all counts (a batch of only bad answers with no weight on them): zero, with a graph to go back through
    return torch.stack(parts).sum() if parts else output.losses.sum() * 0.0


class Totals:
    """Sums and counts of losses and metrics over any number of micro-batches, in fp64."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}
        self.terms: set[str] = set()

    def add(self, output: LossOutput) -> None:
        """Add one micro-batch."""
        for name, (values, weights) in output.summands().items():
            self.terms.add(f"loss/{name}")
            self._add(f"loss/{name}", values.detach(), weights)
        for name, (values, weights) in output.metrics.items():
            self._add(name, values, weights)

    def _add(self, name: str, values: Tensor, weights: Tensor | None) -> None:
        count = float(weights.double().sum()) if weights is not None else float(values.numel())
        self.sums[name] = self.sums.get(name, 0.0) + float(values.double().sum())
        self.counts[name] = self.counts.get(name, 0.0) + count

    def means(self, prefix: str = "") -> dict[str, float]:
        """``loss``, its terms where it has several, and every metric; one without a single example is left out."""
        means = {name: s / self.counts[name] for name, s in self.sums.items() if self.counts[name] > 0}
        loss = {"loss": sum(v for name, v in means.items() if name in self.terms)}
        hidden = self.terms if len(self.terms) == 1 else set()
        return {prefix + name: v for name, v in (loss | means).items() if name not in hidden}
