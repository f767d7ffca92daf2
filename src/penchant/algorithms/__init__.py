"""Algorithms, which compute losses from packed batches; the loop does everything else.

`ALGORITHMS` maps names to config sections (see `Method`); ``path.py:Class`` names a user's own section.
"""

from __future__ import annotations

import functools
import inspect

from penchant.algorithms.gkd import GKDConfig
from penchant.algorithms.grpo import GroupConfig
from penchant.algorithms.method import AlgorithmConfig, Method
from penchant.algorithms.online_dpo import OnlineDPOConfig
from penchant.algorithms.ppo import PPOConfig
from penchant.algorithms.reward_model import RewardModelConfig
from penchant.base.functions import is_own, own_sha256, python_object
from penchant.base.text import did_you_mean
from penchant.errors import ConfigError

ALGORITHMS: dict[str, type[AlgorithmConfig]] = {
    "rloo": GroupConfig,
    "grpo": GroupConfig,
    "dr_grpo": GroupConfig,
    "dapo": GroupConfig,
    "gspo": GroupConfig,
    "cispo": GroupConfig,
    "reinforce_pp": GroupConfig,
    "online_dpo": OnlineDPOConfig,
    "gkd": GKDConfig,
    "ppo": PPOConfig,
    "reward_model": RewardModelConfig,
}


def find_algorithm(name: str) -> type[AlgorithmConfig]:
    """The config section of an algorithm, from `ALGORITHMS` or a user's file.

    Raises:
        ConfigError: no such file or class, or a class that is not an `AlgorithmConfig`. ValueError: no such algorithm.
    """
    if is_own(name):
        return _load_own_algorithm(name, own_sha256(name))
    if name.endswith(".py"):
        raise ValueError(f"name is {name!r}, which names no class; write {name}:NAME")
    if name not in ALGORITHMS:
        raise ValueError(f"name is {name!r}; {did_you_mean(name, ALGORITHMS)}")
    return ALGORITHMS[name]


@functools.lru_cache(maxsize=16)
def _load_own_algorithm(name: str, sha256: str | None) -> type[AlgorithmConfig]:
    """Cached by file content: `sha256` is an argument so that an edited file is loaded again."""
    where = "algorithm.name"
    section = python_object(name, where, "class")
    if not inspect.isclass(section) or not issubclass(section, AlgorithmConfig):
        raise ConfigError(where, f"{name} is not an AlgorithmConfig", "docs/own_algorithms.md has an example")
    if section.build is Method.build:
        raise ConfigError(where, f"{name} has no method build(parts)", "docs/own_algorithms.md has an example")
    return section


__all__ = ["ALGORITHMS", "AlgorithmConfig", "Method", "find_algorithm"]
