"""Detect which published layout rows have and look layouts up by name; importing this package fills the registry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from penchant.base.functions import is_own
from penchant.base.text import closest
from penchant.data.layouts import compared, factory, hh, oasst, own, plain, rated  # noqa: F401  they fill LAYOUTS
from penchant.data.layouts.fields import LABELS, RATING_COLUMNS, LeftOut, RowError, finite
from penchant.data.layouts.layout import LAYOUTS, Detection, Group, Layout, Option
from penchant.errors import ConfigError, setting

__all__ = [
    "LAYOUTS",
    "Detection",
    "Group",
    "Layout",
    "LeftOut",
    "Option",
    "RowError",
    "alternative_columns",
    "detect",
    "layout_named",
    "likely_typo_of",
    "unknown_layout_advice",
]


def layout_named(name: str, where: str = "") -> Layout:
    """Look up a layout by name in the registry, or load a user's own (``path.py:Name``).

    Raises:
        ConfigError: there is no layout of this name, or the user's own is invalid.
    """
    if is_own(name):
        return own.own_layout(name, where or setting("data.shape"))
    if name not in LAYOUTS:
        raise ConfigError(where or setting("data.shape"), f"{name!r} is not a layout", unknown_layout_advice(name))
    return LAYOUTS[name]


def unknown_layout_advice(name: str) -> str:
    """Advice for an unknown layout name: the closest known name, or the list of all."""
    suggestion = closest(name, LAYOUTS)
    if suggestion:
        return f'did you mean "{suggestion}"?'
    return f"choose auto, path.py:Name of your own, or one of {', '.join(LAYOUTS)}"


NAMES = (
    "prompt", "chosen", "rejected", "completion", "label", "score", "messages", "conversations", "instruction", "output",
    "system", "kto_tag",
)  # fmt: skip


def likely_typo_of(column: str) -> str:
    """The known column name that `column` is one typo away from, or "" if there is none or `column` is itself known.

    A typo is another case or separator, a letter missing or extra, two swapped letters or, in names over 5 letters, a wrong one.
    """
    if column in NAMES:
        return ""
    normalized = column.strip().lower().replace("-", "_").replace(" ", "_")
    return next((name for name in NAMES if normalized == name or _is_one_typo_away(normalized, name)), "")


def _is_one_typo_away(word: str, name: str) -> bool:
    short, long = sorted((word, name), key=len)
    if len(long) - len(short) == 1:
        return any(long[:i] + long[i + 1 :] == short for i in range(len(long)))
    differences = [i for i, (a, b) in enumerate(zip(word, name, strict=False)) if a != b]
    if len(word) != len(name) or len(differences) > 2:
        return False
    if len(differences) == 1:
        return len(name) > 5
    i, j = differences
    return j == i + 1 and word[i] == name[j] and word[j] == name[i]


# other common names for a prompt, an answer and its label
OTHER_NAMES = {
    "prompt": ("question", "query"),
    "completion": ("answer", "response", "output", "reply"),
    "label": (*(n for n in RATING_COLUMNS if n != "rating"), "thumbs_up"),
}


def alternative_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """``{our name: theirs}`` for texts (for a label: words such as thumbs_up) that all rows hold under exactly one other name."""
    shared = set.intersection(*map(set, rows)) if rows else set()
    columns: dict[str, str] = {}
    for ours, names in OTHER_NAMES.items():
        fits = _is_word if ours == "label" else lambda value: isinstance(value, str)
        matches = [n for n in names if n in shared and all(fits(row[n]) for row in rows)]
        if len(matches) == 1 and not any(ours in row for row in rows):
            columns[ours] = matches[0]
    return columns


def _is_word(value: Any) -> bool:
    """Whether a value is a boolean or a word for good or bad. Numbers are not: they may be ratings on any scale."""
    return isinstance(value, bool) or (
        isinstance(value, str) and finite(value) is None and value.strip().lower() in LABELS
    )


STEPWISE = (
    "this is stepwise supervision (a list of completions with a list of labels), which no method here learns from"
)


SEVERAL = "these rows have a prompt and several answers, or a ranking of them, in an unknown layout"
HOW_SEVERAL = (
    "write a row for each answer with prompt, completion and score (the higher the better), or pairs with prompt, chosen and "
    "rejected; with two answers in columns of their own, map them with "
)


def _is_stepwise(row: Mapping[str, Any]) -> bool:
    """Whether a row is TRL's stepwise supervision: the steps of one answer, each with a label."""
    return "prompt" in row and isinstance(row.get("completions"), list) and isinstance(row.get("labels"), list)


def detect(rows: Iterable[Mapping[str, Any]]) -> Detection:
    """Detect the layout of most rows from their columns and contents, without converting them."""
    votes: Counter[str] = Counter()
    fits: Counter[str] = Counter()
    for row in rows:
        if _is_stepwise(row):
            votes["stepwise"] += 1
            continue
        matches = [name for name, layout in LAYOUTS.items() if layout.fits(row)]
        if not matches and plain.has_several_answers(row):
            votes["several"] += 1
            continue
        fits.update(matches)
        votes.update(matches[:1])
    if not votes:
        return Detection(None, "the columns fit no known layout")
    name = max(votes, key=lambda n: votes[n])  # the first seen wins a tie: a Counter keeps insertion order
    if name == "stepwise":
        return Detection(
            None, STEPWISE, how="there are no process rewards here; make one completion and one label of it"
        )
    if name == "several":
        mapping = setting("data.columns", {"chosen": "BETTER", "rejected": "WORSE"})
        return Detection(None, SEVERAL, how=HOW_SEVERAL + mapping)
    others = tuple(n for n in LAYOUTS if n != name and 2 * fits[n] >= votes[name])
    return Detection(name, LAYOUTS[name].why, others)
