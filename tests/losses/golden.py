"""Float64 points and closed forms in plain `math`, for checks of every loss's golden values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from penchant.types import PairLogps, UnpairedLogps


@dataclass(frozen=True)
class Point:
    """One pair: summed log-probs of policy (w, l) and reference, lengths, scores, log-probs over the shared tokens, alignments."""

    w: float
    l: float  # noqa: E741
    ref_w: float
    ref_l: float
    len_w: float = 5.0
    len_l: float = 4.0
    score_w: float = 1.5
    score_l: float = -0.25
    shared_w: float = -3.0
    shared_l: float = -4.0
    ref_shared_w: float = -2.5
    ref_shared_l: float = -4.5
    align_w: float = -0.7
    align_l: float = -0.1

    @property
    def dw(self) -> float:
        return self.w - self.ref_w

    @property
    def dl(self) -> float:
        return self.l - self.ref_l

    @property
    def h(self) -> float:
        return self.dw - self.dl

    @property
    def aw(self) -> float:
        return self.w / self.len_w

    @property
    def al(self) -> float:
        return self.l / self.len_l


POINTS = [
    Point(-10.0, -9.0, -12.0, -8.0),  # learned
    Point(-10.0, -9.0, -9.0, -12.0),  # the wrong way round
    Point(-3.0, -40.0, -3.0, -40.0, 2.0, 31.0),  # equal to the reference
    Point(-700.0, -20.0, -20.0, -650.0, 80.0, 9.0),  # far off: |h| = 1,310
    Point(-20.0, -700.0, -650.0, -20.0, 9.0, 80.0),
]
ORDINARY = POINTS[:3]

FIELDS = {
    "policy_chosen_logps": "w",
    "policy_rejected_logps": "l",
    "ref_chosen_logps": "ref_w",
    "ref_rejected_logps": "ref_l",
    "chosen_lengths": "len_w",
    "rejected_lengths": "len_l",
    "chosen_scores": "score_w",
    "rejected_scores": "score_l",
    "policy_chosen_shared_logps": "shared_w",
    "policy_rejected_shared_logps": "shared_l",
    "ref_chosen_shared_logps": "ref_shared_w",
    "ref_rejected_shared_logps": "ref_shared_l",
    "chosen_alignment": "align_w",
    "rejected_alignment": "align_l",
}


def pairs(points: list[Point], dtype: torch.dtype = torch.float64, grad: bool = False) -> PairLogps:
    """The points as a batch, with policy log-probs as leaves that require gradients."""
    made = {name: torch.tensor([getattr(p, attr) for p in points], dtype=dtype) for name, attr in FIELDS.items()}
    if grad:
        for name in made:
            if name.startswith("policy_"):
                made[name].requires_grad_()
    return PairLogps(**made)


def check_golden(
    fn: Callable[..., Any],
    loss: Callable[[Point], float],
    gradient: Callable[[Point], tuple[float, float]],
    points: list[Point] = POINTS,
    **params: Any,
) -> None:
    """Check values and gradients (with respect to chosen and rejected log-probs) against their closed forms."""
    logps = pairs(points, grad=True)
    out = fn(logps, **params)
    assert out.losses.tolist() == pytest.approx([loss(p) for p in points], rel=1e-12, abs=1e-300)
    out.losses.sum().backward()
    for name, i in (("policy_chosen_logps", 0), ("policy_rejected_logps", 1)):
        got = getattr(logps, name).grad
        got = [0.0] * len(points) if got is None else got.tolist()
        assert got == pytest.approx([gradient(p)[i] for p in points], rel=1e-11, abs=1e-30), name


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def labelled(
    policy: list[float], ref: list[float], labels: list[float], grad: bool = False, **more: Any
) -> UnpairedLogps:
    """Single completions with labels, float64, four tokens each."""
    logps = torch.tensor(policy, dtype=torch.float64, requires_grad=grad)
    make = lambda v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    lengths = torch.full((len(policy),), 4.0, dtype=torch.float64)
    return UnpairedLogps(logps, lengths, make(ref), make(labels), **more)
