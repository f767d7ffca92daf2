"""Losses, one file per family. A loss is a function decorated with `@loss`; importing its file registers it."""

from __future__ import annotations

from penchant.losses import listwise, pairwise, reference_free, supervised, unpaired  # noqa: F401  they fill LOSSES
from penchant.losses.registry import LOSSES, Key, LossParams, LossSpec, Range, loss

__all__ = ["LOSSES", "Key", "LossParams", "LossSpec", "Range", "loss"]
