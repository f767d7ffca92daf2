"""What columns of a row tell beyond its prompt tree: which of two answers came first, and the row's language."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from penchant.data.formats import BadRow, Row


def _arena(row: Mapping[str, Any]) -> bool | None:
    if row.get("winner_model_a") is not None:
        a, b = row.get("winner_model_a"), row.get("winner_model_b")
        return None if bool(a) == bool(b) else bool(a)
    return {"model_a": True, "model_b": False}.get(str(row.get("winner")))


def _shp(row: Mapping[str, Any]) -> bool | None:
    return {"1": True, "0": False}.get(str(row.get("labels")))


def _pku(row: Mapping[str, Any]) -> bool | None:
    return {"0": True, "1": False}.get(str(row.get("better_response_id")))


# columns that a layout with two answers in the order in which they were shown has, and how it says which of them won
LAYOUTS: tuple[tuple[str, frozenset[str], Callable[[Mapping[str, Any]], bool | None]], ...] = (
    ("arena", frozenset({"winner_model_a", "winner_model_b"}), _arena),
    ("arena", frozenset({"winner", "model_a", "model_b"}), _arena),
    ("shp", frozenset({"human_ref_A", "human_ref_B", "labels"}), _shp),
    ("pku", frozenset({"response_0", "response_1", "better_response_id"}), _pku),
)
LANGUAGE_COLUMNS = ("language", "lang")


@dataclass(slots=True)
class Columns:
    """Counts of what the rows' own columns say.

    Args:
        first, decided: rows whose first answer won, of those where one of the two won; languages: as a column names them.
    """

    first: int = 0
    decided: int = 0
    layouts: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)

    def update_all(self, rows: Iterable[Row | BadRow]) -> None:
        """Count those that can be read."""
        for row in rows:
            if isinstance(row, Row):
                self.update(row.values)

    def update(self, row: Mapping[str, Any]) -> None:
        """Count one row."""
        keys = row.keys()
        for name, needed, first_won in LAYOUTS:
            if needed <= keys:
                won = first_won(row)
                self.layouts[name] += 1
                if won is not None:
                    self.decided += 1
                    self.first += won
                break
        for column in LANGUAGE_COLUMNS:
            value = row.get(column)
            if isinstance(value, str) and value:
                if value in self.languages or len(self.languages) < 1000:
                    self.languages[value[:40]] += 1
                break
