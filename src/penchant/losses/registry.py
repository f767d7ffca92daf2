"""What a loss is: a pure function, a typed spec of its hyperparameters, and what it needs. One file a family; the registry lists them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict

from penchant.losses.schedules import Schedule
from penchant.schema import Section
from penchant.types import LossOutput

Signal = Literal["tokens", "pairs", "unpaired"]

# what a loss may need beyond policy log-probs and lengths, and what it means in a sentence
NEEDS: Mapping[str, str] = {
    "reference": "log-probs of a reference model",
    "scores": "a score of each completion",
    "score_gap": "a chosen score above the rejected one",
    "labels": "a label (good or bad) of each completion",
    "shared_logps": "log-probs summed over the tokens that both completions of a pair have",
    "alignment": "how likely each token is under the policy compared with a token that the policy samples",
    "divergence": "the exact divergence from the reference over the whole vocabulary (a reference that runs in each step)",
    "z0": "log-ratios of mismatched completions (a prompt with another prompt's completion)",
    "delta": "the running mean of rewards",
    "batch": "the log-probs of the whole optimiser step at once",
}


class LossParams(Section):
    """Base of every loss's hyperparameters; each field carries its range and a one-line description."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", populate_by_name=True)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the loss function."""
        return self.model_dump()

    def to_mapping(self) -> dict[str, Any]:
        """What a config says to get these values again."""
        return self.model_dump(mode="json", by_alias=True)

    def schedules(self) -> dict[str, Schedule]:
        """Arguments that change over the run by the loss's own definition (DPO-Shift's lambda)."""
        return {}


@dataclass(frozen=True, slots=True)
class LossSpec:
    """A registered loss.

    Args:
        name: what `loss.name` in a config says.
        signal: ``tokens`` (every completion is a target), ``pairs`` (chosen against rejected) or ``unpaired`` (labelled completions).
        needs: what beyond policy log-probs and lengths it needs; keys of `NEEDS`.
        fn: the loss; called as ``fn(logps, **arguments)`` with `PairLogps` or `UnpairedLogps`, returns `LossOutput`.
        params: the typed hyperparameters.
        formula: one line, as `penchant losses` prints it.
        paper: arXiv id, or an empty string.
        equal_policy_loss: the loss's value per example when policy and reference are equal, as a function of the
            arguments; None where there is no such value.
        uses_lengths: whether it looks at lengths itself, so that log-probs must come to it as sums.
    """

    name: str
    signal: Signal
    needs: frozenset[str]
    fn: Callable[..., LossOutput]
    params: type[LossParams]
    formula: str
    paper: str = ""
    equal_policy_loss: Callable[..., float] | None = None
    uses_lengths: bool = False  # averages or weighs by length itself: log-probs must come to it as sums

    def __post_init__(self) -> None:
        unknown = self.needs - NEEDS.keys()
        if unknown:
            raise ValueError(f"{self.name} needs {sorted(unknown)}, which is nothing that an engine gives")
