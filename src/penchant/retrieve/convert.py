"""A published row to the rows that training reads: by its layout, then as what was asked for, then with labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from penchant.data.converters import LAYOUTS, Layout, RowError
from penchant.data.formats import BadRow, Row
from penchant.data.load import IDENTICAL
from penchant.errors import ConfigError
from penchant.types import Completion, Prompt, PromptTree

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Unit:
    """Published rows that were read as one: one row, or the rows of a group.

    Args:
        where: the place of the first; rows: how many there were; values: what is converted.
    """

    where: str
    rows: int
    values: Fields


def units(rows: Iterable[Row | BadRow], layout: Layout, columns: Mapping[str, str]) -> Iterator[Unit | BadRow]:
    """Rows, with a person's column names turned into ours, put together where the layout's rows belong together."""
    renamed = (r if isinstance(r, BadRow) else Row(r.where, rename(r.values, columns)) for r in rows)
    group = layout.group
    if group is None:
        yield from (r if isinstance(r, BadRow) else Unit(r.where, 1, r.values) for r in renamed)
        return
    for _, members in groupby(renamed, key=_Key(group.key)):
        held = list(members)
        good = [r for r in held if isinstance(r, Row)]
        yield from (r for r in held if isinstance(r, BadRow))
        if good:
            try:
                yield Unit(good[0].where, len(good), group.fold([r.values for r in good]))
            except RowError as error:
                yield from (BadRow(r.where, error.what, error.how, dict(r.values)) for r in good)


class _Key:
    """What rows are grouped by; a row without a key is by itself, a row that cannot be read goes with those before it."""

    def __init__(self, key: Callable[[Fields], str]) -> None:
        self._key, self._last, self._alone = key, "", 0

    def __call__(self, row: Row | BadRow) -> str:
        if isinstance(row, Row):
            try:
                self._last = f"key {self._key(row.values)}"
            except (RowError, KeyError, TypeError):
                self._alone += 1
                self._last = f"alone {self._alone}"
        return self._last


def rename(values: Fields, columns: Mapping[str, str]) -> Fields:
    """A row with our names in place of a person's (`{ours: theirs}`)."""
    if not columns:
        return values
    taken = set(columns.values())
    kept = {k: v for k, v in values.items() if k not in taken and k not in columns}
    return kept | {ours: values[theirs] for ours, theirs in columns.items() if theirs in values}


# ---------------------------------------------------------------------------------------------------------------------
# as what


@dataclass(frozen=True, slots=True)
class Way:
    """How the rows of a file are converted: their layout, its options, the kind of data that comes out."""

    layout: Layout
    options: Mapping[str, Any]
    kind: str

    def trees(self, values: Fields) -> tuple[PromptTree, ...]:
        """The trees of a row, as what was asked for.

        Raises:
            RowError: the row does not fit, or has nothing of that kind.
        """
        found = self.layout.convert(values, self.options)
        for tree in found:
            texts = [c.text.strip() for c in tree.completions]
            if self.layout.kind == "pairs" and len(texts) == 2 and texts[0] == texts[1]:
                raise RowError(IDENTICAL, "there is nothing to prefer; the row is kept aside")
        turned = tuple(t for tree in found for t in TURNS[self.kind](tree))
        if not turned:
            raise RowError(f"has nothing that can be {self.kind} data", "choose another --as")
        return turned


# what a layout gives where a person asks for something else: options of the layout, tried in this order
_OPTIONS = {"sft": ("sft",), "prompts": ("prompts",), "unpaired": ("sft",)}


def way_of(name: str, given: Mapping[str, Any], as_: str | None, labelled: bool) -> Way:
    """How a layout's rows are converted.

    Args:
        given: its options; as_: sft, prompts or unpaired; labelled: whether a reward or a function labels the answers.

    Raises:
        ConfigError: no such layout or option, or it cannot become what is asked.
    """
    layout = layout_named(name)
    wanted = dict(given)
    use = layout.options.get("use")
    if as_ is not None and use is not None and "use" not in wanted:
        fitting = [choice for choice in _OPTIONS[as_] if choice in use.choices]
        wanted |= {"use": fitting[0]} if fitting else {}
    options = layout.settings(wanted, "--set")
    kind = layout.kind_of(options)
    if as_ == "sft" and kind == "prompts":
        raise ConfigError("--as sft", f"rows of the layout {name} are prompts without answers", "choose --as prompts")
    if as_ == "unpaired" and kind not in ("pairs", "unpaired") and not labelled:
        how = "say which answers are good: --reward NAME --threshold X, or --label-with path.py:function"
        raise ConfigError("--as unpaired", f"rows of the layout {name} are {kind} and have no labels", how)
    if as_ == "unpaired" and kind in ("prompts", "text"):
        raise ConfigError("--as unpaired", f"rows of the layout {name} are {kind}, without answers to a prompt", "")
    return Way(layout, options, as_ or kind)


def layout_named(name: str) -> Layout:
    """A layout of the registry.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in LAYOUTS:
        raise ConfigError("--layout", f"{name!r} is no layout", f"there are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _as_it_is(tree: PromptTree) -> list[PromptTree]:
    return [tree]


def _as_prompts(tree: PromptTree) -> list[PromptTree]:
    return [replace(tree, completions=())] if tree.prompt else []


def _as_sft(tree: PromptTree) -> list[PromptTree]:
    """The preferred answer: the one with the best score, else the first one that is not labelled bad."""
    good = [c for c in tree.completions if c.label is not False]
    if not good:
        return []
    best = max(good, key=lambda c: c.score) if all(c.score is not None for c in good) else good[0]  # type: ignore[arg-type,return-value]
    return [replace(tree, completions=(Completion(best.text),))]


def _as_unpaired(tree: PromptTree) -> list[PromptTree]:
    """Each answer by itself; of a pair the first one is good."""
    pair = len(tree.completions) == 2
    return [
        replace(tree, completions=(replace(c, label=c.label if c.label is not None else (i == 0 if pair else None)),))
        for i, c in enumerate(tree.completions)
    ]


TURNS: dict[str, Callable[[PromptTree], list[PromptTree]]] = {
    **dict.fromkeys(("pairs", "scored", "text"), _as_it_is),
    "prompts": _as_prompts,
    "sft": _as_sft,
    "unpaired": _as_unpaired,
}


# ---------------------------------------------------------------------------------------------------------------------
# rows as they are written


def prompt_json(prompt: Prompt) -> str | list[dict[str, str]]:
    """A prompt as JSON holds it: text, or messages."""
    return prompt if isinstance(prompt, str) else [{"role": m.role, "content": m.content} for m in prompt]


def rows_of(tree: PromptTree, kind: str) -> list[dict[str, Any]]:
    """The rows of a tree in the plain layout of its kind, which `penchant train` reads as they are."""
    return _WRITERS[kind](tree)


def _pair_row(tree: PromptTree) -> list[dict[str, Any]]:
    good, bad = tree.completions
    row: dict[str, Any] = {"prompt": prompt_json(tree.prompt), "chosen": good.text, "rejected": bad.text}
    if good.score is not None and bad.score is not None:
        row |= {"chosen_score": good.score, "rejected_score": bad.score}
    return [row]


def _answers(tree: PromptTree, more: Callable[[Completion], Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"prompt": prompt_json(tree.prompt), "completion": c.text, **more(c)} for c in tree.completions]


def _unpaired_rows(tree: PromptTree) -> list[dict[str, Any]]:
    return _answers(tree, lambda c: {"label": c.label} | ({} if c.score is None else {"score": c.score}))


_WRITERS: dict[str, Callable[[PromptTree], list[dict[str, Any]]]] = {
    "pairs": _pair_row,
    "unpaired": _unpaired_rows,
    "scored": lambda tree: _answers(tree, lambda c: {"score": c.score}),
    "sft": lambda tree: _answers(tree, lambda c: {}),
    "prompts": lambda tree: [{"prompt": prompt_json(tree.prompt)}],
    "text": lambda tree: [{"text": c.text} for c in tree.completions],
}


def prompts_of_transcript(values: Fields) -> Fields:
    """A red-team transcript as its first prompt, which is all that its publishers mean it to be used for here."""
    text = values.get("transcript")
    if not isinstance(text, str) or "\n\nHuman:" not in text:
        raise RowError('"transcript" is no "\\n\\nHuman:" transcript', "drop the row")
    said = text.split("\n\nHuman:", 1)[1].split("\n\nAssistant:", 1)[0].strip()
    if not said:
        raise RowError('"transcript" starts with an empty turn', "drop the row")
    return {"prompt": [{"role": "user", "content": said}]}


def is_labelled(trees: Sequence[PromptTree]) -> bool:
    """Whether every answer has a label."""
    return all(c.label is not None for t in trees for c in t.completions)
