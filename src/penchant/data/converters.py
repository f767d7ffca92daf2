"""Rows of every published layout to prompt trees: small pure functions, chosen by the columns that are there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from penchant.types import Completion, Message, Prompt, PromptTree

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "system": "system",
}
_TURN = re.compile(r"\n\n(Human|Assistant):")


class RowError(Exception):
    """A row that does not fit its shape: what is wrong, and how to mend it."""

    def __init__(self, what: str, how: str) -> None:
        super().__init__(what)
        self.what, self.how = what, how


# ---------------------------------------------------------------------------------------------------------------------
# fields


def text_field(row: Mapping[str, Any], name: str) -> str:
    """A field as non-empty text."""
    if name not in row:
        raise RowError(
            f'"{name}" is missing', f"there are {', '.join(sorted(map(str, row)))}; map columns with data.columns"
        )
    value = row[name]
    if value is None:
        raise RowError(f'"{name}" is null', "give it a text or drop the row")
    if not isinstance(value, str):
        kind = (
            "boolean"
            if isinstance(value, bool)
            else "number"
            if isinstance(value, (int, float))
            else type(value).__name__
        )
        raise RowError(f'"{name}" is a {kind} ({str(value)[:40]})', "make it a string")
    if not value.strip():
        raise RowError(f'"{name}" is empty', "give it a text or drop the row")
    return value


def messages_field(row: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    """A field as a list of chat messages (role/content, or from/value)."""
    value = row.get(name)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowError(f'"{name}" is not a list of messages', 'write [{"role": "user", "content": "..."}, ...]')
    messages = []
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            raise RowError(f'"{name}"[{i}] is not a message', 'write {"role": "user", "content": "..."}')
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in ROLES:
            raise RowError(
                f'"{name}"[{i}] has the role {role!r}', f"roles are {', '.join(sorted(set(ROLES.values())))}"
            )
        if not isinstance(content, str) or not content.strip():
            raise RowError(f'"{name}"[{i}] has no content', "give it a text or drop the row")
        messages.append(Message(ROLES[role], content))
    return tuple(messages)


def _split_last_answer(messages: tuple[Message, ...], name: str) -> tuple[tuple[Message, ...], str]:
    """Everything before the last assistant turn, and that turn's text."""
    if messages[-1].role != "assistant":
        raise RowError(f'"{name}" does not end with an assistant turn', "the last turn must be the answer")
    return messages[:-1], messages[-1].content


def score_field(row: Mapping[str, Any], *names: str) -> float | None:
    """The first of the named fields that is there, as a finite number; None where there is none of them."""
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RowError(f'"{name}" is {str(value)[:40]!r}', "make it a finite number")
        return number
    return None


LABELS = {
    **dict.fromkeys(("true", "1", "1.0", "yes", "good", "chosen", "desirable"), True),
    **dict.fromkeys(("false", "0", "0.0", "-1", "-1.0", "no", "bad", "rejected", "undesirable"), False),
}


def label_field(row: Mapping[str, Any], name: str) -> bool:
    """A field as good (True) or bad (False)."""
    if row.get(name) is None:
        raise RowError(f'"{name}" is missing', "give true (a good answer) or false (a bad one)")
    label = LABELS.get(str(row[name]).strip().lower())
    if label is None:
        raise RowError(f'"{name}" is {str(row[name])[:40]!r}', "give true or false (or 1 or 0, good or bad)")
    return label


# ---------------------------------------------------------------------------------------------------------------------
# shapes


def from_pairs(row: Mapping[str, Any]) -> PromptTree:
    """prompt/chosen/rejected, each as text or as chat messages; messages may hold the whole conversation."""
    if isinstance(row.get("chosen"), str):
        prompt: Prompt = (
            messages_field(row, "prompt") if isinstance(row.get("prompt"), list) else text_field(row, "prompt")
        )
        return _pair(prompt, text_field(row, "chosen"), text_field(row, "rejected"), row)
    if not isinstance(row.get("chosen"), list):
        text_field(row, "chosen")  # says what is wrong with it
    before_chosen, chosen = _split_last_answer(messages_field(row, "chosen"), "chosen")
    before_rejected, rejected = _split_last_answer(messages_field(row, "rejected"), "rejected")
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
    before, answer = _split_last_answer(tuple(turns), name)
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
        _, answer = _split_last_answer(messages_field(row, "completion"), "completion")
        prompt = prompt if isinstance(prompt, tuple) else (Message("user", prompt),)
        return PromptTree(prompt, (Completion(answer),))
    return PromptTree(prompt, (Completion(text_field(row, "completion")),))


def from_messages(row: Mapping[str, Any]) -> PromptTree:
    """One conversation; its last assistant turn is the completion."""
    name = "messages" if "messages" in row else "conversations"
    before, answer = _split_last_answer(messages_field(row, name), name)
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


SHAPES: dict[str, Callable[[Mapping[str, Any]], PromptTree]] = {
    "pairs": from_pairs,
    "hh": from_hh,
    "alpaca_pairs": from_alpaca_pairs,
    "unpaired": from_unpaired,
    "scored": from_scored,
    "sft": from_sft,
    "messages": from_messages,
    "prompts": from_prompts,
    "text": from_text,
}
KINDS = {
    "pairs": "pairs",
    "hh": "pairs",
    "alpaca_pairs": "pairs",
    "unpaired": "unpaired",
    "scored": "scored",
    "sft": "sft",
    "messages": "sft",
    "prompts": "prompts",
    "text": "text",
}


def detect_shape(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """The shape that most of the first rows have, by their columns; None when none fits."""
    votes: dict[str, int] = {}
    for row in rows:
        shape = _shape_of(row)
        if shape is not None:
            votes[shape] = votes.get(shape, 0) + 1
    return max(votes, key=lambda s: votes[s]) if votes else None


def _shape_of(row: Mapping[str, Any]) -> str | None:
    has = row.keys()
    if {"chosen", "rejected"} <= has:
        if "instruction" in has and "prompt" not in has:
            return "alpaca_pairs"
        if "prompt" not in has and isinstance(row["chosen"], str):
            return "hh"
        return "pairs"
    if {"prompt", "completion"} <= has or {"instruction", "output"} <= has:
        if "label" in has:
            return "unpaired"
        return "scored" if "score" in has else "sft"
    if "messages" in has or "conversations" in has:
        return "messages"
    if "prompt" in has:
        return "prompts"
    return "text" if "text" in has else None
