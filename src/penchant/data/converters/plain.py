"""The layouts of plain columns: what TRL, hh-rlhf and hand-written files have."""

from __future__ import annotations

from collections.abc import Callable

from penchant.data.converters import basic
from penchant.data.converters.fields import holds_list
from penchant.data.converters.layout import Fields, Layout, Option
from penchant.types import PromptTree

ANSWERS = frozenset(
    [
        "chosen",
        "rejected",
        "completion",
        "completions",
        "response",
        "output",
        "answer",
        "messages",
        "conversations",
        "response_0",
        "response_1",
        "response_2",
        "response_a",
        "response_b",
        "response1",
        "chosen_response",
        "generations",
    ]
)
TURNS = Option("last", "learn the last answer of a conversation, or every answer of it", ("last", "every"))


def one(convert: Callable[[Fields], PromptTree]) -> Callable[[Fields, Fields], tuple[PromptTree, ...]]:
    """A converter of a row to one tree, which has no options."""
    return lambda row, options: (convert(row),)


def messages(row: Fields, options: Fields) -> tuple[PromptTree, ...]:
    """A conversation's last answer, or each of its answers."""
    last = basic.from_messages(row)  # also checks that the conversation ends with an answer
    return basic.every_answer(basic.conversation(row)) if options["turns"] == "every" else (last,)


def _answered(row: Fields) -> bool:
    return {"prompt", "completion"} <= row.keys()


def _transcript(row: Fields) -> bool:
    chosen = row["chosen"]
    return "prompt" not in row and isinstance(chosen, str) and chosen.lstrip().startswith("Human:")


def _shares_start(row: Fields) -> bool:
    asked = {"prompt", "instruction", "question", "input", "conversations", "messages"}
    return not asked & row.keys() and isinstance(row["chosen"], str) and not _transcript(row)


def _is_pair(row: Fields) -> bool:
    return "prompt" in row or holds_list(row, "chosen", "role")


def _question() -> dict[str, str]:
    return {"role": "user", "content": "Name a prime number."}


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
PAIRS = Layout(
    "pairs",
    "pairs",
    ("chosen", "rejected"),
    one(basic.from_pairs),
    "prompt, chosen and rejected, as texts or as chat messages; messages may hold the whole conversation",
    {"prompt": "Name a prime number.", "chosen": "Seven.", "rejected": "Eight."},
    "TRL: preference, with an explicit prompt or of messages",
    check=_is_pair,
    shows='with a "prompt", or of messages',
)
IMPLICIT_PAIRS = Layout(
    "implicit_pairs",
    "pairs",
    ("chosen", "rejected"),
    one(basic.from_implicit_pairs),
    "two texts that start alike: the shared words are the prompt",
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    "TRL: preference with an implicit prompt, as text",
    check=_shares_start,
    shows="are texts, and there is no prompt",
)
UNPAIRED = Layout(
    "unpaired",
    "unpaired",
    ("prompt", "completion", "label"),
    one(basic.from_unpaired),
    "prompt, completion and a label: good or bad",
    {"prompt": "Name a prime number.", "completion": "Seven.", "label": True},
    "TRL: unpaired preference",
)
SCORED = Layout(
    "scored",
    "scored",
    ("prompt", "completion", "score"),
    one(basic.from_scored),
    "prompt, completion and a score, higher is better",
    {"prompt": "Name a prime number.", "completion": "Seven.", "score": 0.9},
    "penchant",
)
SFT = Layout(
    "sft",
    "sft",
    ("prompt", "completion"),
    one(basic.from_sft),
    "prompt and completion, as texts or as messages",
    {"prompt": "Name a prime number.", "completion": "Seven."},
    "TRL: prompt-completion",
    check=lambda row: not {"label", "score"} & row.keys(),
)
MESSAGES = Layout(
    "messages",
    "sft",
    ("messages",),
    messages,
    "one conversation of role and content",
    {"messages": [_question(), {"role": "assistant", "content": "Seven."}]},
    "TRL: conversational language modelling; OpenAI; LLaMA-Factory, openai format",
    options={"turns": TURNS},
    check=lambda row: not {"chosen", "rejected", "kto_tag", "label"} & row.keys(),
)
PROMPTS = Layout(
    "prompts",
    "prompts",
    ("prompt",),
    one(basic.from_prompts),
    "a prompt alone, as text or as messages: online methods answer it themselves",
    {"prompt": [_question()]},
    "TRL: prompt-only",
    check=lambda row: not ANSWERS & row.keys() and isinstance(row["prompt"], (str, list)),
    shows="and no answers",
)
TEXT = Layout(
    "text",
    "text",
    ("text",),
    one(basic.from_text),
    "plain text",
    {"text": "Seven is a prime number."},
    "TRL: language modelling",
    check=lambda row: not (ANSWERS | {"prompt", "instruction", "message_id"}) & row.keys(),
    shows="and neither prompts nor answers",
)
