"""Rewards from a config: built-in ones and a person's own Python functions, summed by weight; what goes wrong inside is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from penchant.base.functions import is_own, no_exit, python_function
from penchant.base.text import closest
from penchant.errors import ConfigError, PenchantError, RewardError
from penchant.rewards.builtin import BUILT_IN, RewardConfig, RewardFunction, rule_of
from penchant.types import TokenTree

if TYPE_CHECKING:
    import torch

    from penchant.rewards.reward_model import PolicyText


@dataclass(frozen=True, slots=True)
class RewardTerm:
    """One summand: its name in the config, its function and its weight."""

    name: str
    function: RewardFunction
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Reward:
    """A weighted sum of reward functions."""

    terms: tuple[RewardTerm, ...]

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], trees: Sequence[TokenTree] | None = None
    ) -> np.ndarray:
        """The reward of each completion, (n,) float64.

        Args:
            prompts, completions: texts without special tokens; trees: the rollouts that they are the texts of, completions in the same
                order: what a function with a method `score_trees` (a reward model) gets in their place.

        Raises:
            RewardError: a function raised, or gave something other than one finite number per completion; it names the function
                and the first completion that is to blame.
        """
        total = np.zeros(len(completions))
        for term in self.terms:
            total += term.weight * _values(term, prompts, completions, trees)
        return total


def _values(
    term: RewardTerm, prompts: Sequence[str], completions: Sequence[str], trees: Sequence[TokenTree] | None
) -> np.ndarray:
    on_trees = getattr(term.function, "score_trees", None) if trees is not None else None
    try:
        with no_exit():
            given = term.function(list(prompts), list(completions)) if on_trees is None else on_trees(trees)
    except (Exception, SystemExit) as error:  # a function that ends the process must not end the run unsaid
        at = _first_to_blame(term.function, prompts, completions) if on_trees is None else None
        if isinstance(error, PenchantError):  # a reward model's own sentence; there is no function to fix
            raise RewardError(f"reward {term.name}", error.what, error.how) from error
        raise RewardError(
            f"reward {term.name}",
            f"{type(error).__name__}: {error}"
            + (f" (completion {at}: {completions[at][:60]!r})" if at is not None else ""),
            "fix the function; it gets lists of prompts and completions and returns one number each",
        ) from error
    values = _numbers(term.name, given)
    if values.shape != (len(completions),):
        shape = (
            "" if values.ndim == 1 else f" (an array of shape {list(values.shape)})" if values.ndim else " (no list)"
        )
        raise RewardError(
            f"reward {term.name}",
            f"returned {values.size} values{shape} for {len(completions)} completions",
            "return one number for each completion, in order",
        )
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        at = int(bad[0])
        what = None if isinstance(given, (list, tuple)) and given[at] is None else values[at]
        raise RewardError(
            f"reward {term.name}",
            f"returned {what} for completion {at}: {completions[at][:60]!r}",
            "return finite numbers",
        )
    return values


def _numbers(name: str, given: Any) -> np.ndarray:
    if given is None:
        raise RewardError(f"reward {name}", "returned None", "return a list of numbers")
    if hasattr(given, "detach"):  # a tensor: numpy takes none with a gradient, on a GPU or in bf16
        given = given.detach().cpu().double().numpy()
    try:
        return np.asarray(given, dtype=np.float64)
    except Exception as error:  # whatever conversions the elements bring
        raise RewardError(
            f"reward {name}", f"returned {type(given).__name__} that holds no numbers", "return a list of numbers"
        ) from error


def _first_to_blame(function: RewardFunction, prompts: Sequence[str], completions: Sequence[str]) -> int | None:
    """The first completion that fails by itself too, if there is one."""
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        try:
            with no_exit():
                function([prompt], [completion])
        except (Exception, SystemExit):
            return i
    return None


def load_reward(
    spec: str | Mapping[str, float] | RewardConfig, policy: PolicyText | None = None, device: Any = "cpu"
) -> Reward:
    """A reward from a config: a name, ``path.py:function``, a reward model's folder, or a mapping of those to weights.

    Args:
        policy: whose completions are judged; device: of reward models, where the config does not say.

    Raises:
        ConfigError: no such built-in, file, folder or function, or it does not take (prompts, completions).
    """
    config = spec if isinstance(spec, RewardConfig) else RewardConfig.model_validate(spec)
    if not config.terms:
        raise ConfigError("reward", "is empty", f"name one: {', '.join(BUILT_IN)}, path.py:function or a folder")
    return Reward(tuple(RewardTerm(n, _named(n, config, policy, device), float(w)) for n, w in config.terms.items()))


def _named(name: str, config: RewardConfig, policy: PolicyText | None, device: Any) -> RewardFunction:
    rule = rule_of(name)
    if rule is not None:
        return rule
    if name in BUILT_IN or is_own(name):
        return _function(name)
    from penchant.rewards.reward_model import find_reward_model, load_reward_function

    folder = find_reward_model(name)
    if folder is None:
        return _function(name)  # which says that there is none
    return load_reward_function(name, folder, reward_device(config.device, device), policy)


def check_reward_name(name: str) -> None:
    """Refuse a reward that is nowhere, by its name and whether its file is there; nothing is loaded."""
    here = Path(name.rpartition(":")[0] if is_own(name) else name).expanduser().exists()
    if rule_of(name) is None and not here:
        _function(name)


def check_reward(name: str) -> None:
    """Refuse a reward that is not there, as `load_reward` does, without loading a model."""
    check_reward_name(name)
    if rule_of(name) is not None or name in BUILT_IN:
        return
    from penchant.rewards.reward_model import find_reward_model

    if is_own(name) or find_reward_model(name) is None:
        _function(name)


def reward_device(wanted: str, policys: Any = "cpu") -> torch.device:
    """Where reward models run; auto is where the policy is."""
    from penchant.models.load import resolve_device

    try:
        return resolve_device(wanted if wanted != "auto" else str(policys))
    except ConfigError as error:
        raise ConfigError("reward.device", f"is {wanted}, but {error.what}", "set it to cpu or auto") from error


def _function(name: str) -> RewardFunction:
    if name in BUILT_IN:
        return BUILT_IN[name]
    if not is_own(name):
        if name.startswith("stage:"):
            raise ConfigError("reward", f"{name!r} is a pipeline's stage", "here give that stage's run folder")
        if "/" in name:
            raise ConfigError(
                "reward", f"{name}: no such folder", "give a reward model's folder or run, or path.py:function"
            )
        near = closest(name, BUILT_IN)
        raise ConfigError(
            "reward",
            f"{name!r} is no reward",
            (f"did you mean {near}? " if near else "")
            + f"there are {', '.join(BUILT_IN)}, words:20-60, matches:REGEX; or give path.py:function or a reward model's folder",
        )
    return python_function(name)  # type: ignore[no-any-return]
