"""Print docs/templates.md: how Penchant handles each chat template of a folder.

    python docs/tools/templates.py FOLDER > docs/templates.md

FOLDER holds NAME.jinja files, such as `trl/chat_templates` in TRL's wheel. The tokenizer is built here, from bytes and the special
tokens in the template.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.data.load import Dataset, Stream
from penchant.data.read import Row
from penchant.data.templates import end_ids
from penchant.data.tokenize import TokenizedDataset, tokenize
from penchant.errors import DataError

SPECIAL = re.compile(
    r"<\|[\w .]+\|>|<\uff5c[^\uff5c\n]+\uff5c>|</?s>|<(?:start|end)_of_\w+>|<\|?turn\|?>|\[/?[A-Z_]{3,}\]"
)
TALK = [
    {"role": "user", "content": "Hi there?"},
    {"role": "assistant", "content": "Good morning."},
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "It is four."},
]
SYSTEM = {"role": "system", "content": "Be terse."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "forecast",
            "description": "The weather.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]
CALL = {"id": "call12345", "type": "function", "function": {"name": "forecast", "arguments": {"city": "Zurich"}}}
WITH_TOOLS = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "forecast", "tool_call_id": "call12345", "content": "Dry."},
    {"role": "assistant", "content": "It stays dry."},
]


def tokenizer_of(template: str) -> Any:
    """A byte-level tokenizer with the special tokens that occur in a template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_ = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(template)))})
    tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a template accepts, its rows tokenized with `turns: last` and `turns: all` (None: refused), and its end tokens."""

    takes: dict[str, str]  # feature -> "" if accepted, otherwise why the row is bad
    last: TokenizedDataset | None
    every: TokenizedDataset | None
    ends: tuple[str, ...]


def judge(template: str) -> Verdict:
    """Try a template on conversations with and without a system message, reasoning and tools."""
    tokenizer = tokenizer_of(template)
    last, why = _tokenized(tokenizer, {"messages": TALK}, "last")
    every, _ = _tokenized(tokenizer, {"messages": TALK}, "all")
    thought = [*TALK[:3], {**TALK[3], "reasoning_content": "Count the fingers."}]
    takes = {
        "answers": why,
        "system": _tokenized(tokenizer, {"messages": [SYSTEM, *TALK]}, "last")[1],
        "reasoning": _tokenized(tokenizer, {"messages": thought}, "last")[1],
        "tools": _tokenized(tokenizer, {"messages": WITH_TOOLS, "tools": TOOLS}, "last")[1],
    }
    ends = tokenizer.convert_ids_to_tokens(sorted(end_ids(tokenizer) - {tokenizer.eos_token_id}))
    return Verdict(takes, last, every, tuple(ends))


def _tokenized(tokenizer: Any, row: dict[str, Any], turns: str) -> tuple[TokenizedDataset | None, str]:
    try:
        rows: Dataset = Stream([Row("row", row)], "rows", layout_options={"turns": turns}).load("error")
        return tokenize(rows, tokenizer, max_length=1 << 20), ""
    except DataError as error:
        return None, error.what


def table(folder: Path) -> Iterator[str]:
    """Yield the table's lines, one for each template. Those named *_training are skipped."""
    yield "| template | answers | system | reasoning | tools | prompt | several answers | ends with |"
    yield "|---|---|---|---|---|---|---|---|"
    for path in sorted(folder.glob("*.jinja")):
        if path.stem.endswith("_training"):
            continue
        verdict = judge(path.read_text(encoding="utf-8"))
        takes = ["no" if why else "yes" for why in verdict.takes.values()]
        prompt = "-" if verdict.last is None else ("cut" if verdict.last.moved_prompts else "as asked")
        several = "-" if verdict.every is None else ("one by one" if verdict.every.apart else "in one pass")
        ends = " ".join(f"`{e}`" for e in verdict.ends).replace("|", "\\|") or "EOS, added"
        yield "| " + " | ".join([f"`{path.stem}`", *takes, prompt, several, ends]) + " |"


def main() -> None:
    """Print the page."""
    folder = Path(sys.argv[1])
    print(PAGE.format(table="\n".join(table(folder))))


PAGE = """# Chat templates

This table shows how Penchant handles each chat template that TRL 1.16 ships (`trl/chat_templates` in its wheel). `python docs/tools/templates.py
FOLDER` prints this page. The tokenizer behind it knows only bytes and the special tokens that occur in the template; a model's own tokenizer
may define more end tokens.

- **answers, system, reasoning, tools**: whether rows that have these can be trained on. `no` means that such a row is bad, because the template
  rejects it or leaves part of it out.
- **prompt**: with `as asked`, the prompt is what the template writes for generation; with `cut`, it stops where the finished conversation starts
  to differ from that ([the text](tokens.md#the-text)). Such rows are counted.
- **several answers** (`turns: all`): trained in one pass, or one by one if the template writes earlier turns differently.
- **ends with**: the token that ends an answer in training, and at which sampling stops. If there are two, one of them ends a tool call.

{table}
"""


if __name__ == "__main__":
    main()
