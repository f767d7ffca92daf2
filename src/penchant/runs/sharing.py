"""Objects shared by several runs in one process: rows, tokens, weights, metrics of the starting model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")
Key = tuple[Hashable, ...]
SMALL_OBJECTS_PER_MODEL = 16  # small objects kept per model


class Uncached:
    """For a single run: objects are made on request and nothing is cached."""

    def once(self, key: Key, make: Callable[[], T]) -> T:
        """Return the result of `make`, which the caller must not modify.

        Args:
            key: the kind of object, followed by everything that it depends on.
        """
        return make()

    def fresh(self, key: Key, make: Callable[[], T]) -> T:
        """Like `once`, but the caller may modify the result."""
        return make()


class ObjectCache(Uncached):
    """Caches objects by key; the least recently used are dropped first.

    Args:
        kept: the number of models to keep; of every other kind, `SMALL_OBJECTS_PER_MODEL` times as many are kept.
    """

    def __init__(self, kept: int = 4) -> None:
        self.kept = kept
        self.made: Counter[Hashable] = Counter()  # by kind: how many objects were made
        self._objects: dict[Key, Any] = {}

    def once(self, key: Key, make: Callable[[], T]) -> T:
        if key in self._objects:
            self._objects[key] = self._objects.pop(key)  # most recently used last
            return self._objects[key]
        value = make()
        self.made[key[0]] += 1
        self._objects[key] = value
        same_kind = [k for k in self._objects if k[0] == key[0]]
        for old in same_kind[: -self.kept * (1 if key[0] == "model" else SMALL_OBJECTS_PER_MODEL)]:
            del self._objects[old]
        return value

    def fresh(self, key: Key, make: Callable[[], T]) -> T:
        """A deep copy of the cached object, so that training it does not affect the next run."""
        return copy.deepcopy(self.once(key, make))
