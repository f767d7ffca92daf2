"""Text of `penchant data formats`, docs/data_formats.md and `penchant data show`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import islice
from typing import Any

from penchant.base.text import printable
from penchant.data.layouts import LAYOUTS, Layout, Option, layout_named
from penchant.data.load import (
    Converted,
    Stream,
    answer_turn,
    layout_line,
    prompt_json,
    shown_path,
    stream_preferences,
    template_variables,
)
from penchant.types import PromptTree

NAMES = {None: "answer", True: "good answer", False: "bad answer"}
PAIR_NAMES = {None: "answer", True: "chosen", False: "rejected"}
LONGEST = 600  # characters of one turn that `show` prints


def kinds(layout: Layout) -> str:
    """The kinds of data that a layout can yield, its default first."""
    more = (k for o in layout.options.values() for k in o.kinds.values())
    return ", ".join(dict.fromkeys((layout.kind, *more)))


def text() -> str:
    """Every layout in two lines."""
    width = max(map(len, LAYOUTS))
    lines = []
    for name, layout in LAYOUTS.items():
        options = f"  options: {', '.join(layout.options)}" if layout.options else ""
        lines.append(f"{name:<{width}}  {kinds(layout):<18}  {layout.summary}")
        lines.append(f"{'':<{width}}  {'':<18}  {layout.source}{options}")
    return "\n".join(lines)


def describe(name: str) -> str:
    """Describe one layout: how it is detected, its options, an example and the converted example."""
    layout = layout_named(name, "data formats")
    lines = [f"{layout.name}: {layout.summary}", f"published as: {layout.source}", f"kind: {kinds(layout)}"]
    lines += [f"found by: {layout.why}", ""]
    lines += [f"data.layout_options.{n} = {_value(o.default)}: {meaning(o)}" for n, o in layout.options.items()]
    lines += [""] if layout.options else []
    lines += [json.dumps(row, ensure_ascii=False) for row in (layout.example, *layout.rest)]
    lines += ["becomes", *(line for tree in layout.example_trees for line in tree_lines(tree))]
    return "\n".join(lines)


def meaning(option: Option) -> str:
    """An option's meaning with its allowed values."""
    return f"{option.summary} [{option.allowed()}]"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_json(layout: Layout) -> dict[str, Any]:
    """A layout as JSON."""
    options = {
        n: {"default": o.default, "allowed": list(o.choices) or o.allowed(), "meaning": o.summary}
        for n, o in layout.options.items()
    }
    return {
        "name": layout.name,
        "kinds": kinds(layout).split(", "),
        "columns": list(layout.columns),
        "found_by": layout.why,
        "summary": layout.summary,
        "source": layout.source,
        "options": options,
        "example": [layout.example, *layout.rest],
        "becomes": [tree_json(t) for t in layout.example_trees],
    }


def tree_json(tree: PromptTree) -> dict[str, Any]:
    """A prompt tree as JSON; unset fields of a completion are left out."""
    answers = [
        {k: v for k, v in asdict(c).items() if v is not None and v != () and (v != "" or k == "text")}
        for c in tree.completions
    ]
    for answer in answers:
        if "tool_calls" in answer:
            answer["tool_calls"] = json.loads(answer["tool_calls"])
    return {"prompt": prompt_json(tree.prompt), "completions": answers, **template_variables(tree)}


def tree_lines(tree: PromptTree, longest: int = LONGEST) -> list[str]:
    """A prompt tree for a terminal: one line per turn and completion, with further lines of their texts indented."""
    turns = (
        [("prompt", tree.prompt)]
        if isinstance(tree.prompt, str)
        else [(m.role, _reasoning_note(m.reasoning) + m.said) for m in tree.prompt]
    )
    turns = [*template_variables(tree).items(), *turns]
    lines = [line for name, content in turns for line in _labeled_lines(name, content, longest)]
    names = PAIR_NAMES if len(tree.completions) == 2 else NAMES
    for answer in tree.completions:
        score = "" if answer.score is None else f" ({answer.score:g})"
        lines += _labeled_lines(
            f"-> {names[answer.label]}{score}", _reasoning_note(answer.reasoning) + answer_turn(answer).said, longest
        )
        for turn in answer.more:
            if turn.role == "assistant":
                name = "-> answer" if turn.trained else "assistant (not learned)"
                lines += _labeled_lines(name, _reasoning_note(turn.reasoning) + turn.said, longest)
            else:
                lines += _labeled_lines(turn.role, turn.said, longest)
    return lines


def _reasoning_note(reasoning: str) -> str:
    return f"[reasoning: {reasoning}] " if reasoning else ""


def _labeled_lines(name: str, value: Any, longest: int) -> list[str]:
    value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    suffix = f" ... ({len(value):,} characters)" if len(value) > longest else ""
    first, *rest = [printable(line) for line in value[:longest].split("\n")]
    lines = [f"  {name}: {first}", *(f"      {line}" for line in rest)]
    return [*lines[:-1], lines[-1] + suffix]


def rows_text(blocks: Sequence[tuple[str, Sequence[str]]]) -> str:
    """One block per place, with its lines below it."""
    return "\n\n".join("\n".join([printable(where), *lines]) for where, lines in blocks)


# ---- The page docs/data_formats.md ----


def markdown() -> str:
    """The text of docs/data_formats.md."""
    introduction = (resources.files(__package__) / "page.md").read_text(encoding="utf-8")
    lines = [introduction, "| `data.shape` | kind | what | found by | published as |", "|---|---|---|---|---|"]
    for layout in LAYOUTS.values():
        cells = (f"[`{layout.name}`](#{layout.name})", kinds(layout), layout.summary, layout.why, layout.source)
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    for layout in LAYOUTS.values():
        summary = layout.summary[0].upper() + layout.summary[1:] + "."
        lines += ["", f"## {layout.name}", "", f"{summary} Published as: {layout.source}.", ""]
        if layout.options:
            lines += ["| `data.layout_options` | default | meaning |", "|---|---|---|"]
            lines += [f"| `{n}` | `{_value(o.default)}` | {meaning(o)} |" for n, o in layout.options.items()]
            lines.append("")
        lines += ["```json", *(json.dumps(r, ensure_ascii=False) for r in (layout.example, *layout.rest)), "```", ""]
        lines += ["becomes", "", "```json"]
        lines += [json.dumps(tree_json(t), ensure_ascii=False) for t in layout.example_trees]
        lines.append("```")
    return "\n".join(lines) + "\n"


# ---- The first rows of a file: `penchant data show` ----


MOST_ROWS = 2000  # most rows read if the layout groups rows


@dataclass(frozen=True, slots=True)
class Preview:
    """A file's first rows, or groups of rows, as examples; `headline` is its layout, why, and how to choose another."""

    name: str
    headline: str
    stream: Stream
    shown: tuple[Converted, ...]

    def to_text(self) -> str:
        """The preview for a terminal."""
        blocks = [(t.source, tree_lines(t)) for converted in self.shown for t in converted.trees]
        aside_blocks = [
            (q.where, ["  " + printable(f"{'left out' if converted.left_out else 'kept aside'}: {q.what}; {q.how}")])
            for converted in self.shown
            for q in converted.aside[:1]
        ]
        return "\n\n".join(filter(None, (printable(self.headline), rows_text(blocks), rows_text(aside_blocks))))

    def to_json(self) -> dict[str, Any]:
        """The preview as JSON."""
        detection = self.stream.detection
        return {
            "file": self.name,
            "layout": self.stream.shape,
            "why": None if detection is None else detection.why,
            "others": [] if detection is None else list(detection.others),
            "unused": list(self.stream.columns.unused),
            "examples": [{"where": t.source, **tree_json(t)} for converted in self.shown for t in converted.trees],
            "aside": [
                {"where": q.where, "what": q.what, "how": q.how, "left_out": converted.left_out}
                for converted in self.shown
                for q in converted.aside
            ],
        }


def preview(path: str, rows: int = 3, **how: Any) -> Preview:
    """The layout of a file or hub id and its first `rows` rows (or groups of rows) as examples; for `how` see `Reading`.

    Raises:
        DataError: it cannot be read, or has no known layout. ConfigError: an unknown layout or option.
    """
    stream = stream_preferences(path, limit=MOST_ROWS, **how)
    headline = layout_line(stream, path)
    return Preview(shown_path(path), headline, stream, tuple(islice(stream, rows)))
