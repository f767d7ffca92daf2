"""Reduction by global counts: sums over micro-batches, then one division, so that 1x8 equals 4x2."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from penchant.types import LossOutput


class Totals:
    """Sums and counts of losses and metrics over any number of micro-batches, in fp64."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def add(self, output: LossOutput) -> None:
        """Add one micro-batch."""
        self._add("loss", output.losses.detach(), output.weights)
        for name, (values, weights) in output.metrics.items():
            self._add(name, values, weights)

    def _add(self, name: str, values: Tensor, weights: Tensor | None) -> None:
        count = float(weights.double().sum()) if weights is not None else float(values.numel())
        self.sums[name] = self.sums.get(name, 0.0) + float(values.double().sum())
        self.counts[name] = self.counts.get(name, 0.0) + count

    def means(self, prefix: str = "") -> Mapping[str, float]:
        """Every mean so far; a metric without a single example is left out."""
        return {prefix + name: s / self.counts[name] for name, s in self.sums.items() if self.counts[name] > 0}
