"""What an algorithm gives the loop, refused with a sentence if it has another form than the loop needs: it may be a user's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor

from penchant.errors import ConfigError
from penchant.types import Algorithm, LossOutput, PackedBatch, check_output


def check_methods(algorithm: Any) -> None:
    """Refuse an algorithm that lacks a method, or whose methods do not take what the loop gives them.

    Raises:
        ConfigError: likewise for the other functions here.
    """
    for name, declared in inspect.getmembers(Algorithm, inspect.isfunction):
        arguments = list(inspect.signature(declared).parameters)[1:]
        if name.startswith("_"):
            continue
        call = f"{name}({', '.join(arguments)})"
        if name in ("weights", "score", "loss") and getattr(type(algorithm), name) is declared:
            _refuse(algorithm, f"has no method {call}")
        try:
            inspect.signature(getattr(algorithm, name)).bind(*arguments)
        except TypeError as error:
            _refuse(algorithm, f"has a method {name} that the loop cannot call as {call}: {error}")


def weights_of(algorithm: Algorithm, batch: PackedBatch) -> Mapping[str, float]:
    """The batch's share of each term's denominator."""
    weights: Any = algorithm.weights(batch)
    if not (isinstance(weights, Mapping) and "main" in weights):
        given = f"the keys {sorted(weights)}" if isinstance(weights, Mapping) else type(weights).__name__
        _refuse(algorithm, f'returns {given} from weights; return {{"main": batch.trees}}, a number for each term')
    return weights


def loss_of(algorithm: Algorithm, scored: Any) -> LossOutput:
    """The loss and the metrics of what `score` returned."""
    out = algorithm.loss(scored)
    try:
        check_output(out)
        if not out.losses.dim():
            raise ValueError("gives losses of shape []; give one for each example, not their mean")
    except ValueError as error:
        _refuse(algorithm, f"has a loss that {error}", error)
    return out


def state_of(algorithm: Algorithm) -> dict[str, Tensor]:
    """The tensors of `state_tensors`."""
    state: Any = algorithm.state_tensors()
    if not isinstance(state, Mapping):
        _refuse(algorithm, f"returns {type(state).__name__} from state_tensors; return {{name: tensor}}")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            what = f"returns {name} as {type(value).__name__} from state_tensors; write {name!r}: torch.tensor(...)"
            _refuse(algorithm, what)
    return dict(state)


def _refuse(algorithm: Any, what: str, error: Exception | None = None) -> NoReturn:
    how = "fix the file; docs/own_algorithms.md has an example"
    raise ConfigError("algorithm", f"{type(algorithm).__name__} {what}", how) from error
