"""The loss registry. To add a loss: one file with its function, params and SPEC, and one line here."""

from __future__ import annotations

from penchant.losses import dpo, sft
from penchant.losses.registry import LossParams, LossSpec

LOSSES: dict[str, LossSpec] = {spec.name: spec for spec in (sft.SPEC, dpo.SPEC)}

__all__ = ["LOSSES", "LossParams", "LossSpec"]
