"""The plain layouts: pairs, hh-rlhf, labeled and scored answers, demonstrations, messages, prompts, text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from penchant.data.layouts.fields import (
    RowError,
    answered,
    as_message,
    as_text,
    holds_list,
    items_field,
    label_field,
    messages_field,
    number_field,
    prompt_field,
    score_field,
    split_last_answer,
    text_alone,
    text_field,
    with_system,
)
from penchant.data.layouts.layout import Fields, Layout, Option
from penchant.types import Completion, Message, Prompt, PromptTree

_TURN = re.compile(r"\n\n(Human|Assistant):")
# a pair's two scores, as the published files name them
CHOSEN_SCORES = (
    "chosen_score",
    "score_chosen",
    "chosen_rating",
    "chosen-rating",
    "rating_chosen",
    "chosen_avg_rating",
)
REJECTED_SCORES = tuple(n.replace("chosen", "rejected") for n in CHOSEN_SCORES)


def from_pairs(row: Mapping[str, Any]) -> PromptTree:
    """prompt/chosen/rejected, each as text or as chat messages; messages may hold the whole conversation."""
    if isinstance(row.get("chosen"), str):
        return pair(prompt_field(row), text_field(row, "chosen"), text_field(row, "rejected"), row)
    if not isinstance(row.get("chosen"), list):
        text_field(row, "chosen")  # says what is wrong with it
    before_chosen, chosen = split_last_answer(messages_field(row, "chosen"), "chosen")
    before_rejected, rejected = split_last_answer(messages_field(row, "rejected"), "rejected")
    if before_chosen != before_rejected:
        raise RowError("the conversations before the two answers differ", "both must answer the same prompt")
    if before_chosen:  # the conversation is whole; a prompt column beside it repeats its question
        return pair(before_chosen, chosen, rejected, row)
    prompt = prompt_field(row)
    return pair((Message("user", prompt),) if isinstance(prompt, str) else prompt, chosen, rejected, row)


def from_implicit_pairs(row: Mapping[str, Any]) -> PromptTree:
    """chosen/rejected texts that start alike: what they share is the prompt, up to the last white space before they part."""
    chosen, rejected = text_field(row, "chosen"), text_field(row, "rejected")
    if chosen == rejected:
        raise RowError('"chosen" equals "rejected"', "drop the row")
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    end = min(len(chosen), len(rejected)) if shared is None else shared
    while end and not chosen[end - 1].isspace():  # a word is not cut in two
        end -= 1
    while end and chosen[end - 1].isspace():  # the space belongs to the answer
        end -= 1
    if not chosen[:end].strip():
        raise RowError('"chosen" and "rejected" share no start that could be the prompt', 'give a "prompt" column')
    return pair(
        chosen[:end], as_text(chosen[end:], "the chosen answer"), as_text(rejected[end:], "the rejected answer"), row
    )


def from_hh(row: Mapping[str, Any]) -> PromptTree:
    """hh-rlhf: two whole transcripts, split at the last assistant turn; what is before it must be the same in both."""
    before_chosen, chosen = _transcript(text_field(row, "chosen"), "chosen")
    before_rejected, rejected = _transcript(text_field(row, "rejected"), "rejected")
    if before_chosen != before_rejected:
        raise RowError(
            "the two transcripts differ before their last answer", "both must answer the same prompt; drop the row"
        )
    return pair(before_chosen, chosen, rejected, row)


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
    """instruction (+ input, system, history) with chosen/rejected, as text or as one message each."""
    return pair(instructed(row), answer_field(row, "chosen"), answer_field(row, "rejected"), row)


def answer_field(row: Mapping[str, Any], name: str) -> str:
    """An answer: text, or one assistant message."""
    if not isinstance(row.get(name), Mapping):
        return text_field(row, name)
    message = as_message(row[name], f'"{name}"')
    if message.role != "assistant":
        raise RowError(f'"{name}" is a turn of the {message.role}', "the answer must be an assistant turn")
    return message.content


def from_sft(row: Mapping[str, Any]) -> PromptTree:
    """prompt/completion, as text or as messages; or instruction (+ input) with output."""
    if "instruction" in row and "prompt" not in row:
        return from_alpaca(row)
    prompt = prompt_field(row)
    if isinstance(row.get("completion"), list):
        _, answer = split_last_answer(messages_field(row, "completion"), "completion")
        prompt = prompt if isinstance(prompt, tuple) else (Message("user", prompt),)
        return PromptTree(prompt, (Completion(answer),))
    return PromptTree(prompt, (Completion(text_field(row, "completion")),))


def from_alpaca(row: Mapping[str, Any]) -> PromptTree:
    """instruction (+ input, system, history) with output."""
    return PromptTree(instructed(row), (Completion(text_field(row, "output")),))


def from_messages(row: Mapping[str, Any]) -> PromptTree:
    """One conversation; its last assistant turn is the completion."""
    name = conversation_name(row)
    before, answer = answered(conversation(row), name)
    return PromptTree(before, (Completion(answer),))


def conversation_name(row: Mapping[str, Any]) -> str:
    """The column with the conversation."""
    return "messages" if "messages" in row else "conversations"


def conversation(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """All turns of a row's conversation, behind its system prompt."""
    text_alone(row)
    return with_system(row, messages_field(row, conversation_name(row)))


def every_answer(messages: tuple[Message, ...]) -> tuple[PromptTree, ...]:
    """One tree for each assistant turn that follows a user turn."""
    return tuple(
        PromptTree(messages[:i], (Completion(turn.content),))
        for i, turn in enumerate(messages)
        if i and turn.role == "assistant" and messages[i - 1].role == "user"
    )


def from_prompts(row: Mapping[str, Any]) -> PromptTree:
    """A prompt alone: what online methods write their own completions to."""
    return PromptTree(prompt_field(row), ())


def from_text(row: Mapping[str, Any]) -> PromptTree:
    """Plain text: an empty prompt, the document as completion."""
    return PromptTree("", (Completion(text_field(row, "text")),))


def instructed(row: Mapping[str, Any]) -> Prompt:
    """instruction (+ input) as text; as messages where there is a system prompt or a history of [question, answer] pairs."""
    text_alone(row)
    instruction = text_field(row, "instruction")
    extra = row.get("input")
    question = f"{instruction}\n\n{extra}" if isinstance(extra, str) and extra.strip() else instruction
    turns = with_system(row, _history(row))
    return (*turns, Message("user", question)) if turns else question


def _history(row: Mapping[str, Any]) -> tuple[Message, ...]:
    if not row.get("history"):
        return ()
    turns: list[Message] = []
    for i, exchange in enumerate(items_field(row, "history")):
        if not isinstance(exchange, (list, tuple)) or len(exchange) != 2:
            raise RowError(f'"history"[{i}] is not a question with its answer', 'write [["question", "answer"], ...]')
        turns.append(Message("user", as_text(exchange[0], f'the question of "history"[{i}]')))
        turns.append(Message("assistant", as_text(exchange[1], f'the answer of "history"[{i}]')))
    return tuple(turns)


def from_unpaired(row: Mapping[str, Any]) -> PromptTree:
    """prompt/completion with a label: one answer, good or bad."""
    tree = from_sft(row)
    return PromptTree(tree.prompt, (Completion(tree.completions[0].text, label=label_field(row, "label")),))


def from_scored(row: Mapping[str, Any]) -> PromptTree:
    """prompt/completion with a score: one answer and a number, higher is better."""
    if row.get("score") is None:
        raise RowError('"score" is missing', "give a number, higher is better")
    score, tree = number_field(row, "score"), from_sft(row)
    return PromptTree(tree.prompt, (Completion(tree.completions[0].text, score=score),))


def pair(prompt: Prompt, chosen: str, rejected: str, row: Mapping[str, Any]) -> PromptTree:
    """A pair, with its scores where the row has both (chosen_score and rejected_score, or one of the other known names)."""
    good, bad = score_field(row, *CHOSEN_SCORES), score_field(row, *REJECTED_SCORES)
    return scored_pair(prompt, chosen, rejected, good, bad)


def scored_pair(prompt: Prompt, chosen: str, rejected: str, good: float | None, bad: float | None) -> PromptTree:
    """A pair with both scores, or with none where one is missing."""
    if good is None or bad is None:
        good = bad = None
    return PromptTree(prompt, (Completion(chosen, True, good), Completion(rejected, False, bad)))


# ---------------------------------------------------------------------------------------------------------------------
# the layouts


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
    last = from_messages(row)  # also checks that the conversation ends with an answer
    return every_answer(conversation(row)) if options["turns"] == "every" else (last,)


def _transcript_text(row: Fields) -> bool:
    chosen = row["chosen"]
    return "prompt" not in row and isinstance(chosen, str) and chosen.lstrip().startswith("Human:")


def _shares_start(row: Fields) -> bool:
    asked = {"prompt", "instruction", "question", "input", "conversations", "messages"}
    return not asked & row.keys() and isinstance(row["chosen"], str) and not _transcript_text(row)


def _is_pair(row: Fields) -> bool:
    return "prompt" in row or holds_list(row, "chosen", "role")


def _question() -> dict[str, str]:
    return {"role": "user", "content": "Name a prime number."}


HH = Layout(
    "hh",
    "pairs",
    ("chosen", "rejected"),
    one(from_hh),
    "two whole transcripts that differ in their last answer",
    {
        "chosen": "\n\nHuman: Name a prime number.\n\nAssistant: Seven.",
        "rejected": "\n\nHuman: Name a prime number.\n\nAssistant: Eight.",
    },
    "Anthropic/hh-rlhf",
    check=_transcript_text,
    shows='hold "\\n\\nHuman:" transcripts',
)
PAIRS = Layout(
    "pairs",
    "pairs",
    ("chosen", "rejected"),
    one(from_pairs),
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
    one(from_implicit_pairs),
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
    one(from_unpaired),
    "prompt, completion and a label: good or bad",
    {"prompt": "Name a prime number.", "completion": "Seven.", "label": True},
    "TRL: unpaired preference",
)
SCORED = Layout(
    "scored",
    "scored",
    ("prompt", "completion", "score"),
    one(from_scored),
    "prompt, completion and a score, higher is better",
    {"prompt": "Name a prime number.", "completion": "Seven.", "score": 0.9},
    "penchant",
)
SFT = Layout(
    "sft",
    "sft",
    ("prompt", "completion"),
    one(from_sft),
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
    one(from_prompts),
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
    one(from_text),
    "plain text",
    {"text": "Seven is a prime number."},
    "TRL: language modelling",
    check=lambda row: not (ANSWERS | {"prompt", "instruction", "message_id"}) & row.keys(),
    shows="and neither prompts nor answers",
)
