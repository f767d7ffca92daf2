"""The layouts as `penchant data formats` and docs/data_formats.md show them, and a file's first rows as `penchant data show` does."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.base.text import printable
from penchant.data.layouts import LAYOUTS, Detection, Layout, Option, layout_named
from penchant.data.load import FIRST_ROWS, Converted, convert_rows, detected
from penchant.data.read import BadRow, Row, read_rows
from penchant.types import PromptTree

NAMES = {None: "answer", True: "good answer", False: "bad answer"}
PAIR_NAMES = {None: "answer", True: "chosen", False: "rejected"}
LONGEST = 600  # characters of one turn that `show` prints


def kinds(layout: Layout) -> str:
    """The kinds of data that a layout gives, its own first."""
    more = (k for o in layout.options.values() for k in o.kinds.values())
    return ", ".join(dict.fromkeys((layout.kind, *more)))


def text() -> str:
    """Every layout in two lines."""
    wide = max(map(len, LAYOUTS))
    lines = []
    for name, layout in LAYOUTS.items():
        options = f"  options: {', '.join(layout.options)}" if layout.options else ""
        lines.append(f"{name:<{wide}}  {kinds(layout):<18}  {layout.summary}")
        lines.append(f"{'':<{wide}}  {'':<18}  {layout.source}{options}")
    return "\n".join(lines)


def describe(name: str) -> str:
    """One layout: what it is found by, its options, an example and what it becomes."""
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
    """A prompt tree as JSON; what is not known of a completion is left out."""
    prompt = tree.prompt
    answers: list[Mapping[str, Any]] = [
        {
            "text": c.text,
            **({} if c.label is None else {"label": c.label}),
            **({} if c.score is None else {"score": c.score}),
        }
        for c in tree.completions
    ]
    asked = prompt if isinstance(prompt, str) else [{"role": m.role, "content": m.content} for m in prompt]
    return {"prompt": asked, "completions": answers}


def tree_lines(tree: PromptTree, longest: int = LONGEST) -> list[str]:
    """A prompt tree for a terminal: a line for each turn and each completion, and further lines of their texts indented."""
    turns = [("prompt", tree.prompt)] if isinstance(tree.prompt, str) else [(m.role, m.content) for m in tree.prompt]
    lines = [line for name, said in turns for line in _named(name, said, longest)]
    names = PAIR_NAMES if len(tree.completions) == 2 else NAMES
    for answer in tree.completions:
        score = "" if answer.score is None else f" ({answer.score:g})"
        lines += _named(f"-> {names[answer.label]}{score}", answer.text, longest)
    return lines


def _named(name: str, said: str, longest: int) -> list[str]:
    cut = f" ... ({len(said):,} characters)" if len(said) > longest else ""
    first, *rest = [printable(line) for line in said[:longest].split("\n")]
    lines = [f"  {name}: {first}", *(f"      {line}" for line in rest)]
    return [*lines[:-1], lines[-1] + cut]


def rows_text(shown: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Places with their lines, one block each."""
    return "\n\n".join("\n".join([printable(where), *lines]) for where, lines in shown)


# ---------------------------------------------------------------------------------------------------------------------
# docs/data_formats.md

INTRODUCTION = """# Data formats

Written by `penchant data formats --markdown` from the registry; a test compares the two. `penchant data formats NAME` tells more of one.

```sh
cat > pairs.jsonl <<'END'
{"prompt": "Name a prime number.", "chosen": "Seven.", "rejected": "Eight."}
{"prompt": "Name an even number.", "chosen": "Eight.", "rejected": "Seven."}
END
penchant data show pairs.jsonl              # the layout that was found, why, what else fits, and the first rows as examples
penchant data audit pairs.jsonl             # the same line, and what is wrong or lopsided in the file
penchant data formats                       # every layout, its kind and where it is published
penchant data formats shp                   # one: columns, options, an example row and the example that it becomes
penchant data formats --json                # all of it for programs
```

Files are JSON, JSONL (plain or gzip), CSV, TSV, Parquet, text or a hub id. The layout is found from the columns and what stands in them, over the
first 100 rows; it is always shown, with the reason and what else fits:

```
pairs.jsonl: layout pairs (columns chosen, rejected with a "prompt", or of messages); override with data.shape=NAME
```

In a config:

```yaml
# run.yaml
model: {path: HuggingFaceTB/SmolLM2-135M-Instruct}
data:
  path: posts.jsonl
  shape: shp                            # or auto (default)
  layout_options: {min_score_ratio: 2}
  columns: {history: post}              # our field: your column
  on_bad_row: skip                      # keep bad rows aside and count them; default: stop at the first
loss: {name: dpo}
output: runs/posts
```

The same reading, before anything is trained:

```sh
cat > posts.jsonl <<'END'
{"post": "How long do eggs boil?", "human_ref_A": "An hour.", "human_ref_B": "Ten minutes.", "labels": 0, "score_A": 2, "score_B": 9, "score_ratio": 4.5}
{"post": "Is seven prime?", "human_ref_A": "Yes.", "human_ref_B": "No.", "labels": 1, "score_A": 5, "score_B": 4, "score_ratio": 1.25}
END
penchant data show posts.jsonl --shape shp --set min_score_ratio=2 --column history=post
```

The second pair is left out: its better comment has not twice the votes.

- **Rows and examples.** A row gives one example in most layouts. `ultrafeedback`, `distilabel` and `argilla_ratings` give one with all its answers and their
  scores, the best first (supervised training learns that one; `data.pairs_from_scores=best_worst` makes a pair of it, `data.score_threshold` labels). `oasst`,
  and `lmsys`, `sharegpt` and `messages` where every answer is asked for, give several. `accepted + quarantined == total` counts rows; examples are counted beside them.
- **Left out, not dropped.** A tie, or a pair below `min_score_ratio`, is no bad row: it stops nothing, is counted with its reason, and is kept in
  `quarantine.NAME.jsonl` with the bad rows.
- **Turns.** A system prompt stays a system turn. Several turns stay several turns. A row with a tool, a function call, a picture or a sound is kept aside with a
  sentence. TRL's stepwise supervision is refused: no method here learns from it.
- **A layout of message rows** (`oasst_flat`) needs rows that may stand anywhere: they are written to a temporary file first, and one message tree at a time is
  in memory. A tree with a broken message is kept aside whole.
- **Your own layout.** A class in a file of yours, named in `data.shape`, `--shape`, `--layout` and `penchant data formats`; the path is relative to the config's
  folder (else to the folder that you start from). `convert` gets a row and returns a row of the plain layout of its `kind` (`pairs`, `unpaired`, `scored`, `sft`,
  `prompts`, `text`), a `penchant.types.PromptTree`, a list of these, or None for a row to leave out. Its example is converted when it is loaded; a row that it
  cannot convert is a bad row like any other. The file's hash is part of the data cache's key.

```python
# my_layout.py
class MyLayout:
    "Support tickets with a good and a bad reply"

    kind = "pairs"
    columns = ("ticket", "replies")  # what every row has
    example = {"ticket": "How do I log in?", "replies": ["With your e-mail address.", "No idea."]}

    def convert(self, row):
        good, bad = row["replies"]
        return {"prompt": row["ticket"], "chosen": good, "rejected": bad}
```

```yaml
data: {path: tickets.jsonl, shape: my_layout.py:MyLayout}
```

- **What it does not do.** It filters nothing by language, model or topic, and converts no file on disk. Of LLaMA-Factory's `dataset_info.json`, `data.columns` says the
  same as `columns`; role names other than those of ShareGPT and OpenAI (its `tags`) are not read.
"""


def markdown() -> str:
    """docs/data_formats.md."""
    lines = [INTRODUCTION, "| `data.shape` | kind | what | found by | published as |", "|---|---|---|---|---|"]
    for layout in LAYOUTS.values():
        cells = (f"[`{layout.name}`](#{layout.name})", kinds(layout), layout.summary, layout.why, layout.source)
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    for layout in LAYOUTS.values():
        lines += ["", f"## {layout.name}", "", f"{_sentence(layout.summary)} Published as: {layout.source}.", ""]
        if layout.options:
            lines += ["| `data.layout_options` | default | meaning |", "|---|---|---|"]
            lines += [f"| `{n}` | `{_value(o.default)}` | {meaning(o)} |" for n, o in layout.options.items()]
            lines.append("")
        lines += ["```json", *(json.dumps(r, ensure_ascii=False) for r in (layout.example, *layout.rest)), "```", ""]
        lines += ["becomes", "", "```json"]
        lines += [json.dumps(tree_json(t), ensure_ascii=False) for t in layout.example_trees]
        lines.append("```")
    return "\n".join(lines) + "\n"


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


# ---------------------------------------------------------------------------------------------------------------------
# the first rows of a file: `penchant data show`


MOST_ROWS = 2000  # read for a layout whose rows make groups


@dataclass(frozen=True, slots=True)
class Preview:
    """A file's layout and its first rows as examples.

    Args:
        name: of the file; layout: its name; detection: None where a person named the layout; shown: rows, or groups of rows.
    """

    name: str
    layout: str
    detection: Detection | None
    shown: tuple[Converted, ...]

    @property
    def headline(self) -> str:
        """The layout, why, and how to choose another."""
        if self.detection is None:
            return f"{self.name}: layout {self.layout}, as --shape says"
        return self.detection.sentence(self.name, "--shape NAME, or data.shape=NAME in a config")

    def to_text(self) -> str:
        """For a terminal."""
        blocks = [(t.source, tree_lines(t)) for made in self.shown for t in made.trees]
        aside = [
            (q.where, ["  " + printable(f"{'left out' if made.left_out else 'kept aside'}: {q.what}; {q.how}")])
            for made in self.shown
            for q in made.aside[:1]
        ]
        return "\n\n".join(filter(None, (printable(self.headline), rows_text(blocks), rows_text(aside))))

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        found = self.detection
        return {
            "file": self.name,
            "layout": self.layout,
            "why": None if found is None else found.why,
            "others": [] if found is None else list(found.others),
            "examples": [{"where": t.source, **tree_json(t)} for made in self.shown for t in made.trees],
            "aside": [
                {"where": q.where, "what": q.what, "how": q.how, "left_out": made.left_out}
                for made in self.shown
                for q in made.aside
            ],
        }


def preview(
    path: str,
    rows: int = 3,
    *,
    shape: str = "auto",
    columns: Mapping[str, str] | None = None,
    layout_options: Mapping[str, Any] | None = None,
) -> Preview:
    """The layout of a file or hub id and its first `rows` rows (or groups of rows) as examples.

    Raises:
        DataError: it cannot be read, or is of no known layout. ConfigError: an unknown layout or option.
    """
    stream: Iterator[Row | BadRow] = itertools.islice(read_rows(path), MOST_ROWS)
    detection = None
    if shape == "auto":
        first = list(itertools.islice(stream, FIRST_ROWS))
        shape, detection = detected(first, path, columns or {})
        stream = itertools.chain(first, stream)
    layout = layout_named(shape)
    options = layout.settings(layout_options or {})
    shown = tuple(itertools.islice(convert_rows(stream, layout, options, columns), rows))
    return Preview(Path(path).name if Path(path).exists() else path, shape, detection, shown)
