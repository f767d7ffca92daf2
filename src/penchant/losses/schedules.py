"""Hyperparameters that change over a run, as pure functions of its progress."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import ConfigDict, Field

from penchant.base.section import Section

Shape = Literal["linear", "cosine"]


class Schedule(Section):
    """A value that goes from `from` at the first optimizer step to `to` at the last one."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", populate_by_name=True)

    start: float = Field(alias="from", description="value at the first optimizer step")
    end: float = Field(alias="to", description="value at the last optimizer step")
    shape: Shape = Field("linear", description="linear, or half a cosine")

    def at(self, t: float) -> float:
        """``from + (to - from) s(t)`` with s(t) = t (linear) or (1 - cos(pi t)) / 2 (cosine), for t in [0, 1]; both ends are exact."""
        s = t if self.shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * t))
        return (1.0 - s) * self.start + s * self.end


def progress_at(step: int, total: int) -> float:
    """Progress at optimizer step `step` (0-based) of `total`: 0 at the first, 1 at the last and after it."""
    return min(1.0, step / max(1, total - 1))
