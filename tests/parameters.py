"""Which parameters of a test run in the default suite, and which in `make test-all` only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest

from penchant.losses import LOSSES


def by_default(values: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """Test parameters: those in `kept` by default, the others marked slow."""
    return [v if v in kept else _slow(v) for v in values]


def _slow(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)


def one_of_each(values: Iterable[Any], kind: Callable[[Any], Any]) -> list[Any]:
    """Test parameters: the first of each kind by default, the others marked slow."""
    found: list[Any] = []
    kinds: list[Any] = []
    for value in values:
        found.append(value if kind(value) not in kinds else _slow(value))
        kinds.append(kind(value))
    return found


def one_of_each_kind(names: Iterable[str]) -> list[Any]:
    """Names of losses: by default the first of each group that an engine treats alike."""
    specs = {name: LOSSES[name] for name in names}
    return one_of_each(specs, lambda name: (specs[name].signal, specs[name].needs, specs[name].uses_lengths))
