"""LLaMA-Factory's two formats, alpaca and sharegpt: supervised, preference and KTO."""

from __future__ import annotations

from penchant.data.layouts.fields import RowError, answered, holds_list, label_field, score_field
from penchant.data.layouts.layout import Fields, Layout
from penchant.data.layouts.plain import (
    TURNS,
    answer_field,
    conversation,
    conversation_name,
    from_alpaca,
    from_alpaca_pairs,
    messages,
    one,
    pair,
)
from penchant.types import Completion, PromptTree

_QUESTION = {"from": "human", "value": "Name a prime number."}
_ANSWER, _OTHER = {"from": "gpt", "value": "Seven."}, {"from": "gpt", "value": "Eight."}
_SYSTEM = "Answer in one word."
_INSTRUCTION = {"instruction": "Name a prime number.", "input": "", "system": _SYSTEM, "history": []}


def sharegpt_pairs(row: Fields) -> PromptTree:
    """A conversation up to a user turn, with a better and a worse answer to it."""
    before = conversation(row)
    if before[-1].role != "user":
        raise RowError(
            f'"{conversation_name(row)}" does not end with a user turn', "the two answers must follow a question"
        )
    return pair(before, answer_field(row, "chosen"), answer_field(row, "rejected"), row)


def sharegpt_kto(row: Fields) -> PromptTree:
    """A conversation whose last answer is good or bad."""
    before, answer = answered(conversation(row), conversation_name(row))
    return PromptTree(before, (Completion(answer, label=label_field(row, _tag(row))),))


def alpaca_kto(row: Fields) -> PromptTree:
    """An instruction with an answer that is good or bad."""
    tree = from_alpaca(row)
    return PromptTree(tree.prompt, (Completion(tree.completions[0].text, label=label_field(row, _tag(row))),))


def alpaca_scored(row: Fields) -> PromptTree:
    """An instruction with an answer and its score."""
    tree, score = from_alpaca(row), score_field(row, "score")
    if score is None:
        raise RowError('"score" is missing', "give a number, higher is better")
    return PromptTree(tree.prompt, (Completion(tree.completions[0].text, score=score),))


def _tag(row: Fields) -> str:
    return "kto_tag" if "kto_tag" in row or "label" not in row else "label"


def _has_tag(row: Fields) -> bool:
    return "kto_tag" in row or "label" in row


def _conversation(row: Fields) -> bool:
    return "conversations" in row or "messages" in row


ALPACA_PAIRS = Layout(
    "alpaca_pairs",
    "pairs",
    ("instruction", "chosen", "rejected"),
    one(from_alpaca_pairs),
    "an instruction (and input, system, history) with a better and a worse answer",
    {**_INSTRUCTION, "chosen": "Seven.", "rejected": "Eight."},
    "LLaMA-Factory: alpaca format, preference",
    check=lambda row: "prompt" not in row,
)
ALPACA_KTO = Layout(
    "alpaca_kto",
    "unpaired",
    ("instruction", "output"),
    one(alpaca_kto),
    "an instruction with an answer and whether it is good",
    {**_INSTRUCTION, "output": "Seven.", "kto_tag": True},
    "LLaMA-Factory: alpaca format, KTO",
    check=_has_tag,
    shows='with a "kto_tag" (or "label")',
)
ALPACA_SCORED = Layout(
    "alpaca_scored",
    "scored",
    ("instruction", "output", "score"),
    one(alpaca_scored),
    "an instruction with an answer and its score, higher is better",
    {"instruction": "Name a prime number.", "input": "", "output": "Seven.", "score": 0.9},
    "penchant",
)
ALPACA = Layout(
    "alpaca",
    "sft",
    ("instruction", "output"),
    one(from_alpaca),
    "an instruction (and input, system, history) with its answer",
    {**_INSTRUCTION, "output": "Seven."},
    "Stanford Alpaca; LLaMA-Factory: alpaca format, supervised",
    check=lambda row: not {"kto_tag", "label", "score"} & row.keys(),
)
SHAREGPT_PAIRS = Layout(
    "sharegpt_pairs",
    "pairs",
    ("chosen", "rejected"),
    one(sharegpt_pairs),
    "a conversation up to a question, with a better and a worse answer",
    {"system": _SYSTEM, "conversations": [_QUESTION], "chosen": _ANSWER, "rejected": _OTHER},
    "LLaMA-Factory: sharegpt format, preference",
    check=lambda row: _conversation(row) and not isinstance(row["chosen"], list) and "prompt" not in row,
    shows='beside "conversations" (or "messages")',
)
SHAREGPT_KTO = Layout(
    "sharegpt_kto",
    "unpaired",
    (),
    one(sharegpt_kto),
    "a conversation and whether its last answer is good",
    {"conversations": [_QUESTION, _ANSWER], "kto_tag": True},
    "LLaMA-Factory: sharegpt format, KTO",
    check=lambda row: _conversation(row) and _has_tag(row),
    shows='conversations (or messages) with a "kto_tag" (or "label")',
)
SHAREGPT = Layout(
    "sharegpt",
    "sft",
    ("conversations",),
    messages,
    "one conversation of from and value, with a system column",
    {"system": _SYSTEM, "conversations": [_QUESTION, _ANSWER]},
    "ShareGPT; LLaMA-Factory: sharegpt format, supervised",
    options={"turns": TURNS},
    check=lambda row: (
        not {"chosen", "rejected", "kto_tag", "label"} & row.keys()
        and (holds_list(row, "conversations", "from") or holds_list(row, "conversations", "role"))
    ),
    shows="is a list of turns",
)
