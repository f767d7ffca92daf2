"""What every converter reads a row with: a field as text, messages, a number or a label, or a `RowError` that says what is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from penchant.types import Message

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "system": "system",
}


class RowError(Exception):
    """A row that does not fit its shape: what is wrong, and how to mend it."""

    def __init__(self, what: str, how: str) -> None:
        super().__init__(what)
        self.what, self.how = what, how


def text_field(row: Mapping[str, Any], name: str) -> str:
    """A field as non-empty text."""
    if name not in row:
        raise RowError(
            f'"{name}" is missing', f"there are {', '.join(sorted(map(str, row)))}; map columns with data.columns"
        )
    value = row[name]
    if value is None:
        raise RowError(f'"{name}" is null', "give it a text or drop the row")
    if not isinstance(value, str):
        kind = (
            "boolean"
            if isinstance(value, bool)
            else "number"
            if isinstance(value, (int, float))
            else type(value).__name__
        )
        raise RowError(f'"{name}" is a {kind} ({str(value)[:40]})', "make it a string")
    if not value.strip():
        raise RowError(f'"{name}" is empty', "give it a text or drop the row")
    return value


def messages_field(row: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    """A field as a list of chat messages (role/content, or from/value)."""
    value = row.get(name)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowError(f'"{name}" is not a list of messages', 'write [{"role": "user", "content": "..."}, ...]')
    messages = []
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            raise RowError(f'"{name}"[{i}] is not a message', 'write {"role": "user", "content": "..."}')
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in ROLES:
            raise RowError(
                f'"{name}"[{i}] has the role {role!r}', f"roles are {', '.join(sorted(set(ROLES.values())))}"
            )
        if not isinstance(content, str) or not content.strip():
            raise RowError(f'"{name}"[{i}] has no content', "give it a text or drop the row")
        messages.append(Message(ROLES[role], content))
    return tuple(messages)


def split_last_answer(messages: tuple[Message, ...], name: str) -> tuple[tuple[Message, ...], str]:
    """Everything before the last assistant turn, and that turn's text."""
    if messages[-1].role != "assistant":
        raise RowError(f'"{name}" does not end with an assistant turn', "the last turn must be the answer")
    return messages[:-1], messages[-1].content


def score_field(row: Mapping[str, Any], *names: str) -> float | None:
    """The first of the named fields that is there, as a finite number; None where there is none of them."""
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RowError(f'"{name}" is {str(value)[:40]!r}', "make it a finite number")
        return number
    return None


LABELS = {
    **dict.fromkeys(("true", "1", "1.0", "yes", "good", "chosen", "desirable"), True),
    **dict.fromkeys(("false", "0", "0.0", "-1", "-1.0", "no", "bad", "rejected", "undesirable"), False),
}


def label_field(row: Mapping[str, Any], name: str) -> bool:
    """A field as good (True) or bad (False)."""
    if row.get(name) is None:
        raise RowError(f'"{name}" is missing', "give true (a good answer) or false (a bad one)")
    label = LABELS.get(str(row[name]).strip().lower())
    if label is None:
        raise RowError(f'"{name}" is {str(row[name])[:40]!r}', "give true or false (or 1 or 0, good or bad)")
    return label
