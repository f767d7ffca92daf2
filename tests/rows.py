"""Data sets from rows in memory, and a stand-in that runs worker tasks in this process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from penchant.data.load import Dataset, Stream
from penchant.data.read import Row


def from_rows(
    rows: Iterable[Mapping[str, Any]], *, name: str = "rows", on_bad_row: str = "error", **how: Any
) -> Dataset:
    """Like `load_preferences` of a file with these rows."""
    return Stream((Row(f"{name}:{i}", r) for i, r in enumerate(rows, 1)), name, **how).load(on_bad_row)


def in_this_process(function: Callable[[Any], Any], tasks: Iterable[Any], workers: object) -> Iterator[Any]:
    """Like `penchant.base.processes.in_order`, with everything pickled, but without starting processes."""
    for task in tasks:
        asked, given = pickle.loads(pickle.dumps((function, task)))
        yield pickle.loads(pickle.dumps(asked(given)))
