"""A published row to the rows that training reads: by its layout, then as what was asked for, then with labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from penchant.data.converters import Layout, RowError
from penchant.data.converting import IDENTICAL, is_identical, layout_named
from penchant.errors import ConfigError
from penchant.types import Completion, Prompt, PromptTree

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Way:
    """How the rows of a file are converted: their layout, its options, the kind of data that comes out."""

    layout: Layout
    options: Mapping[str, Any]
    kind: str

    def turning(self, before: Callable[[Fields], Fields]) -> Layout:
        """The layout, with what was asked for in place of what it gives by itself.

        Args:
            before: a row (or folded group) to what is converted; it raises `LeftOut` for one that a filter leaves out.
        """

        def turn(values: Fields, options: Fields) -> tuple[PromptTree, ...]:
            found = self.layout.convert(before(values), options)
            turned = tuple(t for tree in found for t in TURNS[self.kind](tree))
            if not turned:
                raise RowError(f"has nothing that can be {self.kind} data", "choose another --as")
            return turned

        return replace(self.layout, turn=turn)


# what a layout gives where a person asks for something else: options of the layout, tried in this order
_OPTIONS = {"sft": ("sft",), "prompts": ("prompts",), "unpaired": ()}
_TO_LABEL = ("sft",)


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
        fitting = [c for c in (_TO_LABEL if labelled else _OPTIONS[as_]) if c in use.choices]
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


def _as_it_is(tree: PromptTree) -> list[PromptTree]:
    return [tree]


def _as_pairs(tree: PromptTree) -> list[PromptTree]:
    if is_identical(tree):
        raise RowError(IDENTICAL, "there is nothing to prefer")
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
    if is_identical(tree):
        raise RowError(IDENTICAL, "it cannot be good and bad at once")
    return [
        replace(tree, completions=(replace(c, label=c.label if c.label is not None else (i == 0 if pair else None)),))
        for i, c in enumerate(tree.completions)
    ]


TURNS: dict[str, Callable[[PromptTree], list[PromptTree]]] = {
    **dict.fromkeys(("scored", "text"), _as_it_is),
    "pairs": _as_pairs,
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
