"""What several runs of one process have in common, made once: rows, tokens, weights, the figures of the model they start from."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")
Key = tuple[Hashable, ...]
MANY = 16  # of what takes little room, for each model


class Alone:
    """A run by itself: everything is made when it is asked for, and nothing is kept."""

    def once(self, key: Key, make: Callable[[], T]) -> T:
        """What `make` gives. Nobody may change it.

        Args:
            key: its kind, and everything that it depends on.
        """
        return make()

    def fresh(self, key: Key, make: Callable[[], T]) -> T:
        """The same, to be changed by whoever asked."""
        return make()


class Shared(Alone):
    """Keeps what was made, by key.

    Args:
        kept: the most models that are kept, and a MANYth of what is kept of every other kind; what was not asked for longest goes first.
    """

    def __init__(self, kept: int = 4) -> None:
        self.kept = kept
        self.made: Counter[Hashable] = Counter()  # by kind: how often something was really made
        self._found: dict[Key, Any] = {}

    def once(self, key: Key, make: Callable[[], T]) -> T:
        if key in self._found:
            self._found[key] = self._found.pop(key)  # the newest stands last
            return self._found[key]
        value = make()
        self.made[key[0]] += 1
        self._found[key] = value
        of_kind = [k for k in self._found if k[0] == key[0]]
        for old in of_kind[: -self.kept * (1 if key[0] == "model" else MANY)]:
            del self._found[old]
        return value

    def fresh(self, key: Key, make: Callable[[], T]) -> T:
        """A deep copy of what is kept: a run that trains it changes nothing for the next."""
        return copy.deepcopy(self.once(key, make))
