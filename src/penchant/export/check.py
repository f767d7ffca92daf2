"""Whether what was written computes what the run's model computes, and how far rounding took it away."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from penchant.models.merge import TOLERANCE

# how far rounding weights may move a logit, relative to the largest one; what is beyond is no rounding any more
ROUNDING = {"fp32": TOLERANCE, "fp16": 0.01, "bf16": 0.05, "q8_0": 0.1}


@dataclass(frozen=True, slots=True)
class Check:
    """Figures of a comparison, all in fp32 arithmetic on the same tokens.

    Args:
        tokens: positions that were compared; largest: of the run's own logits, in size.
        read: the largest difference between what was read back and the weights that were written; read_limit: what is allowed.
        own: the same between what was read back and the run's own model; own_limit: what is allowed.
        greedy: share of positions where both choose the same token; None of a reward model, which has one score.
    """

    tokens: int
    largest: float
    read: float
    read_limit: float
    own: float
    own_limit: float
    greedy: float | None

    @property
    def good(self) -> bool:
        return self.read <= self.read_limit and self.own <= self.own_limit

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"good": self.good}

    def to_text(self) -> str:
        """One line for a person."""
        what = "scores" if self.greedy is None else "logits"
        same = "" if self.greedy is None else f"; the same likeliest token at {self.greedy:.1%} of positions"
        return (
            f"read back and compared on {self.tokens} tokens: {what} differ by at most {self.read:.3g} from the weights that were "
            f"written (allowed: {self.read_limit:.3g}) and by {self.own:.3g} from the run's own model (allowed: {self.own_limit:.3g}, "
            f"largest: {self.largest:.3g}){same}"
        )


def compared(
    own: Tensor, written: Tensor, read: Tensor, *, equal: float, dtype: str, exact: bool, tokens: int
) -> Check:
    """Compare outputs, (tokens, V) each.

    Args:
        own: of the run's model; written: of the weights that the files should hold; read: of what was read back from them.
        equal: allowed between the last two, relative to the largest; dtype: of the files; exact: the run's weights are in that type
            already, so nothing may change.
    """
    largest = float(own.abs().max())
    scale = max(1.0, largest)
    return Check(
        tokens=tokens,
        largest=largest,
        read=_away(read, written),
        read_limit=equal * scale,
        own=_away(read, own),
        own_limit=equal * scale if exact else ROUNDING[dtype] * scale,
        greedy=None if own.shape[-1] == 1 else float((own.argmax(-1) == read.argmax(-1)).float().mean()),
    )


def _away(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape or not bool(torch.isfinite(one).all()):
        return float("inf")
    return float((one - other).abs().max())
