"""What a loss is: a pure function, a typed spec of its hyperparameters, and what it needs. One file a family; the registry lists them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from penchant.schema import Section
from penchant.types import LossOutput

Signal = Literal["tokens", "pairs", "unpaired"]


class LossParams(Section):
    """Base of every loss's hyperparameters; each field carries its range and a one-line description."""


@dataclass(frozen=True, slots=True)
class LossSpec:
    """A registered loss.

    Args:
        name: what `loss.name` in a config says.
        signal: ``tokens`` (every completion is a target), ``pairs`` (chosen against rejected) or ``unpaired`` (labelled completions).
        needs: what beyond policy log-probs it needs; ``"reference"``, ``"lengths"``, ``"labels"``, ``"scores"``.
        fn: the loss; called as ``fn(logps, **params)`` with `PairLogps` or `UnpairedLogps`, returns `LossOutput`.
        params: the typed hyperparameters.
        formula: one line, as `penchant losses` prints it.
        paper: arXiv id, or an empty string.
        equal_policy_loss: the loss's value per example when policy and reference are equal, as a function of the
            hyperparameters; the loop asserts it at step 0. None where there is no such value.
    """

    name: str
    signal: Signal
    needs: frozenset[str]
    fn: Callable[..., LossOutput]
    params: type[LossParams]
    formula: str
    paper: str = ""
    equal_policy_loss: Callable[..., float] | None = None
