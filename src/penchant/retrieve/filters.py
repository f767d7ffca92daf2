"""Which published rows are kept: by language, by whether names were redacted, by what a moderation service said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from penchant.errors import DataError
from penchant.retrieve.request import GetRequest

Fields = Mapping[str, Any]
MODERATION = ("openai_moderation", "moderation")


class MissingColumn(Exception):
    """A row does not have the column that a filter reads."""


@dataclass(slots=True)
class Filters:
    """The filters of a request, in one pass.

    Args:
        tests: reason to test; a row is counted under the first reason whose test it does not pass.
        languages: how often each language was met, for a message where none is left.
    """

    tests: Mapping[str, Callable[[Fields], bool]]
    languages: Counter[str] = field(default_factory=Counter)

    def reason(self, row: Fields, where: str) -> str | None:
        """Why a row is left out; None where it stays.

        Raises:
            DataError: it has not the column that a filter reads.
        """
        for reason, passes in self.tests.items():
            try:
                if not passes(row):
                    return reason
            except MissingColumn as error:
                columns = ", ".join(sorted(map(str, row)))
                raise DataError(where, f"--{error} needs a column that is not there", f"there are {columns}") from error
        return None


def filters_of(asked: GetRequest) -> Filters:
    """The filters that a request asks for."""
    found = Filters({})
    tests: dict[str, Callable[[Fields], bool]] = {}
    if asked.language:
        wanted = {name.casefold() for name in asked.language}
        tests["language"] = lambda row: _language(row, found.languages).casefold() in wanted
    if asked.redacted != "keep":
        tests["redacted" if asked.redacted == "drop" else "not redacted"] = lambda row: (
            _redacted(row) == (asked.redacted == "only")
        )
    if asked.moderation != "keep":
        limit = asked.moderation if isinstance(asked.moderation, float) else None
        tests["moderation"] = lambda row: not _objected(row, limit)
    found.tests = tests
    return found


def _language(row: Fields, met: Counter[str]) -> str:
    value = next((row[c] for c in ("language", "lang") if row.get(c) is not None), None)
    if value is None and isinstance(row.get("prompt"), Mapping):  # a tree of messages: the language of its root
        value = row["prompt"].get("lang")
    if value is None and isinstance(row.get("messages"), Sequence) and row["messages"]:
        first = row["messages"][0]
        value = first.get("lang") if isinstance(first, Mapping) else None
    if value is None:
        raise MissingColumn("language")
    met[str(value)] += 1
    return str(value)


def _redacted(row: Fields) -> bool:
    value = row.get("redacted")
    if value is None:
        raise MissingColumn("redacted")
    return str(value).strip().lower() in ("true", "1", "1.0")


def _objected(row: Fields, limit: float | None) -> bool:
    """Whether any message was flagged, or scored `limit` or more in any category; one without a result counts as that."""
    column = next((c for c in MODERATION if c in row), None)
    if column is None:
        raise MissingColumn("moderation")
    results = list(_results(row[column]))
    return not results or any(_bad(r, limit) for r in results)


def _results(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _bad(result: Any, limit: float | None) -> bool:
    if not isinstance(result, Mapping):
        return True
    if limit is None:
        return bool(result.get("flagged", True))
    scores = result.get("category_scores")
    if not isinstance(scores, Mapping):
        return True
    return any(isinstance(s, (int, float)) and s >= limit for s in scores.values())
