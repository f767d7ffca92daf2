"""What an algorithm is to the rest of Penchant: its config section answers every question that other packages have about it."""

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
    """The rate that ``train.lr: auto`` stands for: one of `Method.default_lr`; ten times the whole model's for a small model."""
    if adapter:
        return rates[1]
    return float(f"{rates[0] * 10:.3g}") if parameters is not None and parameters < SMALL_MODEL else rates[0]


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What the policy writes for each batch of prompts.

    Args:
        samples: completions of each prompt; trained: how many of them a step trains on; max_new_tokens: of a completion, at most.
        minibatches: optimizer steps of a pass over them, each with an equal part of the prompts.
    """

    samples: int
    trained: int
    max_new_tokens: int
    minibatches: int = 1


@dataclass(slots=True)
class Parts:
    """What a run is made of, in the order in which it is made; each part may use those above it.

    Args:
        config: the run's; device, dtype: of training.
        tokenizer, asked: the policy's, and every prompt as the data has it, with further columns, by its row's source.
        trees: (train, held out); mismatched: by row, its prompt with another prompt's completion (where the method needs z0).
        model: what is trained, cast to `dtype`; modules: what is trained beside it, by the prefix of its weights' names (PPO's value).
        engine: runs the model (a `RewardScorer` where a reward model is learned); reference: None where none is needed.
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
        """The reference of a method that needs one which runs in each step."""
        from penchant.logprobs.reference import LiveReference

        assert isinstance(self.reference, LiveReference)
        return self.reference


class EvaluationContext(Protocol):
    """What `Method.evaluate` can use: one evaluation of the held-out rows, in training or after it."""

    @property
    def parts(self) -> Parts: ...

    @property
    def algorithm(self) -> Any: ...

    @property
    def step(self) -> int:
        """Optimizer steps that the policy has taken."""

    @property
    def budget(self) -> int:
        """Tokens of a forward pass."""

    @property
    def keep(self) -> bool:
        """Whether the run is being trained; else it is evaluated by itself, later."""

    def start(self) -> LiveReference:
        """The model that training starts from (or reference.path), run live; it may be loaded for this."""

    def scored(self, algorithm: Algorithm, *, alike: bool = False) -> tuple[Scored, list[TokenTree]]:
        """The held-out trees as `algorithm` scores them, and the trees in that order; `alike`: other runs from this start score them alike."""

    def by_set(self, algorithm: Algorithm, scored: Scored, trees: list[TokenTree]) -> dict[str, Any]:
        """The figures of each of several held-out sets; nothing where there is one."""

    def loss_change(self, algorithm: Any, scored: Scored, trees: list[TokenTree]) -> dict[str, Any]:
        """How the loss changed since the start, row by row, where the start was evaluated; `trees` in the order of `scored`."""

    def completions(self) -> dict[str, Any]:
        """Figures of what the policy writes to held-out prompts (KL, length, variety, reward), where the config asks for them."""

    def rewards_of_start(
        self, max_new_tokens: int, sampling: Mapping[str, Any], rewards: np.ndarray
    ) -> np.ndarray | None:
        """What the start's completions were worth to the run's `reward`; None: the start was not evaluated.

        Args:
            sampling: settings that completions depend on; rewards: the policy's own, which are kept as the start's at step 0.
        """

    def keep_tables(self, tables: Mapping[str, Any]) -> None:
        """Tables that go into calibration.json."""


class Method:
    """One way to train: what it learns from, what it needs, how it is built and evaluated.

    A subclass overrides what differs from a loss on given pairs. What no member answers, no other package may ask.
    """

    learns_reward: ClassVar[bool] = False  # the model that is trained is a reward model, which writes nothing
    takes_reward: ClassVar[bool] = False  # completions are judged by the config's `reward`

    if TYPE_CHECKING:

        @property
        def name(self) -> str:
            """What a config calls it."""

    @property
    def about(self) -> str:
        """What it does, as Markdown, for a model card."""
        return f"`{self.name}`: {(type(self).__doc__ or '').strip().splitlines()[0]}"

    @property
    def signal(self) -> Signal:
        """What a row must be: a text to learn, a pair, a labeled answer, or a prompt alone."""
        return "pairs"

    @property
    def needs(self) -> frozenset[str]:
        """What it needs beside the policy's log-probs: keys of `losses.registry.NEEDS`."""
        return frozenset()

    @property
    def live_reference(self) -> bool:
        """Whether the reference must run in each step: its log-probs cannot be computed once and kept."""
        return False

    @property
    def metric(self) -> str:
        """The held-out figure that runs are judged by; whether more is better, `metrics.names` says."""
        return "eval/rewards/accuracies"

    @property
    def rollouts(self) -> Rollouts | None:
        """What the policy writes in each step; None for methods on given answers."""
        return None

    @property
    def updates(self) -> int:
        """Optimizer steps on each batch of rows."""
        return 1

    @property
    def copies(self) -> int:
        """Models of the policy's size that are trained beside it."""
        return 0

    @property
    def optimizer(self) -> Mapping[str, Any]:
        """Keys of the `train` section that it gives another value (PPO's adam_eps)."""
        return {}

    @property
    def idle(self) -> Mapping[str, str]:
        """Keys that change nothing with it, its own and those of other sections (``rollout.lag``): see `refuse_idle`."""
        return {}

    @property
    def default_lr(self) -> tuple[float, float]:
        """Peak learning rate where the config says auto: of the whole model, of an adapter. `auto_lr` reads it."""
        return 1e-6, 5e-5

    @property
    def resolved(self) -> Mapping[str, float]:
        """What an ``auto`` among its keys stands for."""
        return {}

    def check(self, parts: Parts) -> None:
        """Raise ConfigError where model and rows cannot serve; nothing but the model is there yet."""

    def modules(self, parts: Parts, load: Callable[[], Any], note: Callable[[str], None]) -> Mapping[str, Any]:
        """What is trained beside the model, by the prefix of its weights' names.

        Args:
            load: one more copy of the model as training starts, in fp32; note: writes a line to the log.
        """
        return {}

    def build(self, parts: Parts) -> Algorithm:
        """What the loop trains."""
        raise NotImplementedError

    def evaluate(self, held_out: EvaluationContext) -> dict[str, Any]:
        """Held-out metrics; keys start with ``eval/``."""
        from penchant.metrics.heldout import heldout_metrics

        scored, trees = held_out.scored(held_out.algorithm)
        return heldout_metrics(held_out.algorithm, scored, trees) | held_out.completions()


class AlgorithmConfig(Section, Method):
    """Base of every `algorithm` section: the keys of one algorithm, and what it is."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", populate_by_name=True)

    name: str = Field(description="an algorithm's name, or path.py:Class")

    @model_validator(mode="after")
    def _nothing_in_vain(self) -> AlgorithmConfig:
        refuse_idle(self, {key: why for key, why in self.idle.items() if "." not in key})
        return self
