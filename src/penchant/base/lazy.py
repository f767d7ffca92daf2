"""Modules that are imported on first use: importing torch takes seconds, and `penchant losses` does not need it."""

from __future__ import annotations

import importlib
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["F", "Tensor", "lazy", "torch"]


class _Lazy:
    def __init__(self, name: str) -> None:
        self._name = name

    @cached_property
    def _module(self) -> ModuleType:
        return importlib.import_module(self._name)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._module, attribute)


def lazy(name: str) -> Any:
    """The module, imported on the first use of one of its attributes."""
    return _Lazy(name)


if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")
    Tensor = "Tensor"  # only for annotations, which are never evaluated
