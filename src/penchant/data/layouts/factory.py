"""LLaMA-Factory's two formats, alpaca and sharegpt: supervised, preference and KTO."""

from __future__ import annotations

from penchant.data.layouts.fields import RowError, answered, holds_list, label_field, score_field
from penchant.data.layouts.layout import Fields, layout
from penchant.data.layouts.plain import (
    answer_field,
    conversation,
    conversation_name,
    from_alpaca,
    instructed,
    judged,
    messages,
    pair,
)
from penchant.types import PromptTree


def _has_tag(row: Fields) -> bool:
    return "kto_tag" in row or "label" in row


def _tag(row: Fields) -> bool:
    return label_field(row, "kto_tag" if "kto_tag" in row or "label" not in row else "label")


def _conversation(row: Fields) -> bool:
    return "conversations" in row or "messages" in row


def _open_pair(row: Fields) -> bool:
    return _conversation(row) and not isinstance(row["chosen"], list) and "prompt" not in row


@layout("sharegpt_pairs", check=_open_pair)
def sharegpt_pairs(row: Fields) -> PromptTree:
    """A conversation up to a user turn, with a better and a worse answer to it."""
    before = conversation(row)
    if before[-1].role != "user":
        raise RowError(
            f'"{conversation_name(row)}" does not end with a user turn', "the two answers must follow a question"
        )
    return pair(before, answer_field(row, "chosen"), answer_field(row, "rejected"), row)


@layout("sharegpt_kto", check=lambda row: _conversation(row) and _has_tag(row))
def sharegpt_kto(row: Fields) -> PromptTree:
    """A conversation whose last answer is good or bad."""
    return judged(answered(conversation(row), conversation_name(row)), label=_tag(row))


def _plain_conversation(row: Fields) -> bool:
    return not {"chosen", "rejected", "kto_tag", "label"} & row.keys() and (
        holds_list(row, "conversations", "from") or holds_list(row, "conversations", "role")
    )


layout("sharegpt", check=_plain_conversation)(messages)


@layout("alpaca_pairs", check=lambda row: "prompt" not in row)
def alpaca_pairs(row: Fields) -> PromptTree:
    """instruction (+ input, system, history) with chosen/rejected, as text or as one message each."""
    return pair(instructed(row), answer_field(row, "chosen"), answer_field(row, "rejected"), row)


@layout("alpaca_kto", check=_has_tag)
def alpaca_kto(row: Fields) -> PromptTree:
    """An instruction with an answer that is good or bad."""
    return judged(from_alpaca(row), label=_tag(row))


@layout("alpaca_scored")
def alpaca_scored(row: Fields) -> PromptTree:
    """An instruction with an answer and its score."""
    tree, score = from_alpaca(row), score_field(row, "score")
    if score is None:
        raise RowError('"score" is missing', "give a number, higher is better")
    return judged(tree, score=score)


layout("alpaca", check=lambda row: not {"kto_tag", "label", "score"} & row.keys())(from_alpaca)
