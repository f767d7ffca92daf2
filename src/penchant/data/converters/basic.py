"""Rows of the plain layouts (prompt, chosen, rejected, completion, messages, text) to prompt trees."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from penchant.data.converters.fields import (
    RowError,
    label_field,
    messages_field,
    score_field,
    split_last_answer,
    text_field,
)
from penchant.types import Completion, Message, Prompt, PromptTree

_TURN = re.compile(r"\n\n(Human|Assistant):")


def from_pairs(row: Mapping[str, Any]) -> PromptTree:
    """prompt/chosen/rejected, each as text or as chat messages; messages may hold the whole conversation."""
    if isinstance(row.get("chosen"), str):
        prompt: Prompt = (
            messages_field(row, "prompt") if isinstance(row.get("prompt"), list) else text_field(row, "prompt")
        )
        return _pair(prompt, text_field(row, "chosen"), text_field(row, "rejected"), row)
    if not isinstance(row.get("chosen"), list):
        text_field(row, "chosen")  # says what is wrong with it
    before_chosen, chosen = split_last_answer(messages_field(row, "chosen"), "chosen")
    before_rejected, rejected = split_last_answer(messages_field(row, "rejected"), "rejected")
    if before_chosen != before_rejected:
        raise RowError("the conversations before the two answers differ", "both must answer the same prompt")
    given = row.get("prompt")
    if before_chosen:  # the conversation is whole; a prompt column beside it repeats its question
        return _pair(before_chosen, chosen, rejected, row)
    if isinstance(given, list):
        return _pair(messages_field(row, "prompt"), chosen, rejected, row)
    return _pair((Message("user", text_field(row, "prompt")),), chosen, rejected, row)


def from_hh(row: Mapping[str, Any]) -> PromptTree:
    """hh-rlhf: two whole transcripts, split at the last assistant turn; what is before it must be the same in both."""
    before_chosen, chosen = _transcript(text_field(row, "chosen"), "chosen")
    before_rejected, rejected = _transcript(text_field(row, "rejected"), "rejected")
    if before_chosen != before_rejected:
        raise RowError(
            "the two transcripts differ before their last answer", "both must answer the same prompt; drop the row"
        )
    return _pair(before_chosen, chosen, rejected, row)


def _transcript(text: str, name: str) -> tuple[tuple[Message, ...], str]:
    parts = _TURN.split(text)
    if parts[0].strip() or len(parts) < 5:
        raise RowError(
            f'"{name}" is not a transcript', 'it must start with "\\n\\nHuman:" and go on with "\\n\\nAssistant:"'
        )
    turns = [
        Message("user" if who == "Human" else "assistant", said.strip())
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    before, answer = split_last_answer(tuple(turns), name)
    if not answer:
        raise RowError(f'"{name}" ends with an empty answer', "drop the row")
    return before, answer


def from_alpaca_pairs(row: Mapping[str, Any]) -> PromptTree:
    """instruction (+ input) with chosen/rejected."""
    return _pair(_instruction(row), text_field(row, "chosen"), text_field(row, "rejected"), row)


def from_sft(row: Mapping[str, Any]) -> PromptTree:
    """prompt/completion, as text or as messages; or instruction (+ input) with output."""
    if "instruction" in row and "prompt" not in row:
        return PromptTree(_instruction(row), (Completion(text_field(row, "output")),))
    prompt: Prompt = messages_field(row, "prompt") if isinstance(row.get("prompt"), list) else text_field(row, "prompt")
    if isinstance(row.get("completion"), list):
        _, answer = split_last_answer(messages_field(row, "completion"), "completion")
        prompt = prompt if isinstance(prompt, tuple) else (Message("user", prompt),)
        return PromptTree(prompt, (Completion(answer),))
    return PromptTree(prompt, (Completion(text_field(row, "completion")),))


def from_messages(row: Mapping[str, Any]) -> PromptTree:
    """One conversation; its last assistant turn is the completion."""
    name = "messages" if "messages" in row else "conversations"
    before, answer = split_last_answer(messages_field(row, name), name)
    if not before:
        raise RowError(f'"{name}" has no turn before the answer', "give the prompt as a user turn")
    return PromptTree(before, (Completion(answer),))


def from_prompts(row: Mapping[str, Any]) -> PromptTree:
    """A prompt alone: what online methods write their own completions to."""
    prompt: Prompt = messages_field(row, "prompt") if isinstance(row.get("prompt"), list) else text_field(row, "prompt")
    return PromptTree(prompt, ())


def from_text(row: Mapping[str, Any]) -> PromptTree:
    """Plain text: an empty prompt, the document as completion."""
    return PromptTree("", (Completion(text_field(row, "text")),))


def _instruction(row: Mapping[str, Any]) -> str:
    instruction = text_field(row, "instruction")
    extra = row.get("input")
    return f"{instruction}\n\n{extra}" if isinstance(extra, str) and extra.strip() else instruction


def from_unpaired(row: Mapping[str, Any]) -> PromptTree:
    """prompt/completion with a label: one answer, good or bad."""
    tree = from_sft(row)
    return PromptTree(tree.prompt, (Completion(tree.completions[0].text, label=label_field(row, "label")),))


def from_scored(row: Mapping[str, Any]) -> PromptTree:
    """prompt/completion with a score: one answer and a number, higher is better."""
    score = score_field(row, "score")
    if score is None:
        raise RowError('"score" is missing', "give a number, higher is better")
    tree = from_sft(row)
    return PromptTree(tree.prompt, (Completion(tree.completions[0].text, score=score),))


def _pair(prompt: Prompt, chosen: str, rejected: str, row: Mapping[str, Any]) -> PromptTree:
    """A pair, with its scores where the row has both (chosen_score and rejected_score, or score_chosen and score_rejected)."""
    good, bad = score_field(row, "chosen_score", "score_chosen"), score_field(row, "rejected_score", "score_rejected")
    if good is None or bad is None:
        good = bad = None
    return PromptTree(prompt, (Completion(chosen, True, good), Completion(rejected, False, bad)))
