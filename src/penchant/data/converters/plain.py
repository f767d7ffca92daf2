"""The layouts of plain columns: what TRL, hh-rlhf and hand-written files have."""

from __future__ import annotations

from collections.abc import Callable

from penchant.data.converters import basic
from penchant.data.converters.layout import Fields, Layout
from penchant.types import PromptTree


def one(convert: Callable[[Fields], PromptTree]) -> Callable[[Fields, Fields], tuple[PromptTree, ...]]:
    """A converter of a row to one tree, which has no options."""
    return lambda row, options: (convert(row),)


def _transcript(row: Fields) -> bool:
    return isinstance(row["chosen"], str) and "prompt" not in row


def _without_label(row: Fields) -> bool:
    return not {"label", "score"} & row.keys()


_TURNS = [{"role": "user", "content": "Name a prime number."}, {"role": "assistant", "content": "Seven."}]

HH = Layout(
    "hh",
    "pairs",
    ("chosen", "rejected"),
    one(basic.from_hh),
    "two whole transcripts that differ in their last answer",
    {
        "chosen": "\n\nHuman: Name a prime number.\n\nAssistant: Seven.",
        "rejected": "\n\nHuman: Name a prime number.\n\nAssistant: Eight.",
    },
    "Anthropic/hh-rlhf",
    check=_transcript,
    shows='hold "\\n\\nHuman:" transcripts',
)
ALPACA_PAIRS = Layout(
    "alpaca_pairs",
    "pairs",
    ("instruction", "chosen", "rejected"),
    one(basic.from_alpaca_pairs),
    "an instruction (and input) with a better and a worse answer",
    {"instruction": "Name a prime number.", "input": "", "chosen": "Seven.", "rejected": "Eight."},
    "LLaMA-Factory, alpaca format with ranking",
    check=lambda row: "prompt" not in row,
)
PAIRS = Layout(
    "pairs",
    "pairs",
    ("chosen", "rejected"),
    one(basic.from_pairs),
    "prompt, chosen and rejected, as texts or as chat messages",
    {"prompt": "Name a prime number.", "chosen": "Seven.", "rejected": "Eight."},
    "TRL, preference",
)
UNPAIRED = Layout(
    "unpaired",
    "unpaired",
    ("label",),
    one(basic.from_unpaired),
    "prompt, completion and a label: good or bad",
    {"prompt": "Name a prime number.", "completion": "Seven.", "label": True},
    "TRL, unpaired preference",
    check=lambda row: {"prompt", "completion"} <= row.keys() or {"instruction", "output"} <= row.keys(),
)
SCORED = Layout(
    "scored",
    "scored",
    ("score",),
    one(basic.from_scored),
    "prompt, completion and a score, higher is better",
    {"prompt": "Name a prime number.", "completion": "Seven.", "score": 0.9},
    "penchant",
    check=lambda row: {"prompt", "completion"} <= row.keys() or {"instruction", "output"} <= row.keys(),
)
SFT = Layout(
    "sft",
    "sft",
    (),
    one(basic.from_sft),
    "prompt and completion, or instruction (and input) and output",
    {"prompt": "Name a prime number.", "completion": "Seven."},
    "TRL, prompt-completion",
    check=lambda row: {"prompt", "completion"} <= row.keys() or {"instruction", "output"} <= row.keys(),
)
MESSAGES = Layout(
    "messages",
    "sft",
    (),
    one(basic.from_messages),
    "one conversation, whose last assistant turn is learned",
    {"messages": _TURNS},
    "TRL, conversational language modelling",
    check=lambda row: "messages" in row or "conversations" in row,
)
PROMPTS = Layout(
    "prompts",
    "prompts",
    ("prompt",),
    one(basic.from_prompts),
    "a prompt alone, which online methods answer themselves",
    {"prompt": "Name a prime number."},
    "TRL, prompt-only",
)
TEXT = Layout(
    "text",
    "text",
    ("text",),
    one(basic.from_text),
    "plain text",
    {"text": "Seven is a prime number."},
    "TRL, language modelling",
)
