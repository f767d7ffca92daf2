"""Rows in memory as a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from penchant.data.load import Dataset, Stream
from penchant.data.read import Row


def from_rows(
    rows: Iterable[Mapping[str, Any]], *, name: str = "rows", on_bad_row: str = "error", **how: Any
) -> Dataset:
    """As `load_preferences` of a file of these rows."""
    return Stream((Row(f"{name}:{i}", r) for i, r in enumerate(rows, 1)), name, **how).load(on_bad_row)
