"""The interface of algorithms: config sections whose members answer everything that other packages need to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import ConfigDict, Field, model_validator

from penchant.base.section import Section, refuse_idle
from penchant.types import Algorithm, PromptTree, Scored, TokenTree

if TYPE_CHECKING:
    import numpy as np
    import torch

    from penchant.logprobs import Scorer
    from penchant.logprobs.reference import LiveReference, Reference

Signal = Literal["tokens", "pairs", "unpaired", "lists", "prompts"]


SMALL_MODEL = 20_000_000  # parameters


def auto_lr(rates: Sequence[float], adapter: bool, parameters: int | None = None) -> float:
    """Resolve ``train.lr: auto`` from `Method.default_lr`; a small model gets ten times the rate for a whole model."""
    if adapter:
        return rates[1]
    return float(f"{rates[0] * 10:.3g}") if parameters is not None and parameters < SMALL_MODEL else rates[0]


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What the policy samples for each batch of prompts.

    Args:
        samples: completions per prompt; trained: how many of them a step trains on; max_new_tokens: limit per completion.
        minibatches: optimizer steps in a pass over them, each on an equal share of the prompts.
    """

    samples: int
    trained: int
    max_new_tokens: int
    minibatches: int = 1


@dataclass(slots=True)
class Parts:
    """The parts of a run, in the order in which they are built; each may use those above it.

    Args:
        config: the run's; device, dtype: of training.
        tokenizer: the policy's; asked: returns every prompt with its extra columns, by the row's source.
        trees: (train, held out); mismatched: by row, its prompt with another prompt's completion (if the method needs z0).
        model: the trained model, in `dtype`; modules: trained besides it, by the prefix of their weights' names (PPO's value).
        engine: runs the model (a `RewardScorer` for a reward model); reference: None if not needed.
    """

    config: Any
    device: torch.device
    dtype: torch.dtype
    tokenizer: Any
    asked: Callable[[], Mapping[str, PromptTree | None]]
    trees: tuple[Sequence[TokenTree], Sequence[TokenTree]]
    mismatched: Mapping[int, TokenTree]
    model: Any
    modules: Mapping[str, Any]
    engine: Any
    reference: Reference | None = None

    @property
    def scorer(self) -> Scorer:
        """The engine of a language model."""
        scorer: Scorer = self.engine
        return scorer

    @property
    def live_reference(self) -> LiveReference:
        """The reference, for a method that runs it in each step."""
        from penchant.logprobs.reference import LiveReference

        assert isinstance(self.reference, LiveReference)
        return self.reference


class EvaluationContext(Protocol):
    """What `Method.evaluate` can use: one evaluation on the held-out set, during or after training."""

    @property
    def parts(self) -> Parts: ...

    @property
    def algorithm(self) -> Any: ...

    @property
    def step(self) -> int:
        """Optimizer steps taken by the policy."""

    @property
    def budget(self) -> int:
        """Tokens per forward pass."""

    @property
    def keep(self) -> bool:
        """Whether the run is training; False for a separate evaluation afterwards."""

    def start(self) -> LiveReference:
        """The starting model (or reference.path) as a live reference, loaded if necessary."""

    def scored(self, algorithm: Algorithm, *, alike: bool = False) -> tuple[Scored, list[TokenTree]]:
        """Scores of the held-out trees, and the trees in that order; `alike`: the same for all runs from this start."""

    def by_set(self, algorithm: Algorithm, scored: Scored, trees: list[TokenTree]) -> dict[str, Any]:
        """Metrics of each of several held-out sets; empty if there is only one."""

    def loss_change(self, algorithm: Any, scored: Scored, trees: list[TokenTree]) -> dict[str, Any]:
        """Change of the loss since the start, row by row, if the start was evaluated; `trees` in the order of `scored`."""

    def completions(self) -> dict[str, Any]:
        """Metrics of completions of held-out prompts (KL, length, diversity, reward), if the config enables them."""

    def rewards_of_start(
        self, max_new_tokens: int, sampling: Mapping[str, Any], rewards: np.ndarray
    ) -> np.ndarray | None:
        """Rewards of the starting model's completions under the run's `reward`; None if the start was not evaluated.

        Args:
            sampling: settings that completions depend on; rewards: the policy's own, stored as the start's at step 0.
        """

    def keep_tables(self, tables: Mapping[str, Any]) -> None:
        """Store the tables for calibration.json."""


class Method:
    """A training method: what it learns from, what it needs, how it is built and evaluated.

    The defaults are those of a loss on given pairs. Other packages know a method only through these members.
    """

    learns_reward: ClassVar[bool] = False  # trains a reward model, which does not generate text
    takes_reward: ClassVar[bool] = False  # completions are scored by the config's `reward`

    if TYPE_CHECKING:

        @property
        def name(self) -> str:
            """Its name in a config."""

    @property
    def about(self) -> str:
        """Markdown description for a model card."""
        return f"`{self.name}`: {(type(self).__doc__ or '').strip().splitlines()[0]}"

    @property
    def signal(self) -> Signal:
        """The kind of row that it learns from: a text, a pair, a labeled answer, a list of answers, or a prompt alone."""
        return "pairs"

    @property
    def needs(self) -> frozenset[str]:
        """What it needs besides the policy's log-probs: keys of `losses.registry.NEEDS`."""
        return frozenset()

    @property
    def live_reference(self) -> bool:
        """Whether the reference must run in each step because its log-probs cannot be cached."""
        return False

    @property
    def metric(self) -> str:
        """The held-out metric that runs are judged by; see `metrics.names` for which direction is better."""
        return "eval/rewards/accuracies"

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """The parts of the loss that evaluations log as ``eval/loss/NAME``; empty if it has one part."""
        return ()

    @property
    def rollouts(self) -> Rollouts | None:
        """What the policy samples in each step; None for methods on given answers."""
        return None

    @property
    def updates(self) -> int:
        """Optimizer steps on each batch of rows."""
        return 1

    @property
    def copies(self) -> int:
        """Number of models of the policy's size that are trained besides it."""
        return 0

    @property
    def optimizer(self) -> Mapping[str, Any]:
        """Keys of the `train` section that it overrides (PPO's adam_eps)."""
        return {}

    @property
    def idle(self) -> Mapping[str, str]:
        """Keys that have no effect with it, its own and those of other sections (``rollout.lag``), see `refuse_idle`."""
        return {}

    @property
    def default_lr(self) -> tuple[float, float]:
        """Peak learning rates for ``lr: auto``: of the whole model, of an adapter. Read by `auto_lr`."""
        return 1e-6, 5e-5

    @property
    def resolved(self) -> Mapping[str, float]:
        """The values behind ``auto`` in its keys."""
        return {}

    def check(self, parts: Parts) -> None:
        """Raise ConfigError if model or rows do not fit; of the parts after the model, none exists yet."""

    def modules(self, parts: Parts, load: Callable[[], Any], note: Callable[[str], None]) -> Mapping[str, Any]:
        """Modules trained besides the model, by the prefix of their weights' names.

        Args:
            load: returns another copy of the starting model, in fp32; note: writes a line to the log.
        """
        return {}

    def build(self, parts: Parts) -> Algorithm:
        """Build the algorithm that the loop trains."""
        raise NotImplementedError

    def evaluate(self, held_out: EvaluationContext) -> dict[str, Any]:
        """Held-out metrics; keys start with ``eval/``."""
        from penchant.metrics.heldout import heldout_metrics

        scored, trees = held_out.scored(held_out.algorithm)
        return heldout_metrics(held_out.algorithm, scored, trees) | held_out.completions()


class AlgorithmConfig(Section, Method):
    """Base class of `algorithm` sections: the config keys of an algorithm, and its `Method`."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", populate_by_name=True)

    name: str = Field(description="an algorithm's name, or path.py:Class")

    @model_validator(mode="after")
    def _check_idle(self) -> AlgorithmConfig:
        refuse_idle(self, {key: why for key, why in self.idle.items() if "." not in key})
        return self
