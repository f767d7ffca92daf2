"""LLaMA-Factory's two formats, alpaca and sharegpt: supervised, preference and KTO; and ms-swift's pairs."""

from __future__ import annotations

from penchant.data.layouts import fields, plain
from penchant.data.layouts.fields import RowError
from penchant.data.layouts.layout import Fields, layout
from penchant.types import PromptTree


def _has_tag(row: Fields) -> bool:
    return "kto_tag" in row or "label" in row


def _tag_label(row: Fields) -> bool:
    return fields.label(row, "kto_tag" if "kto_tag" in row or "label" not in row else "label")


def _is_conversation(row: Fields) -> bool:
    return "conversations" in row or "messages" in row


def _is_open_pair(row: Fields) -> bool:
    return _is_conversation(row) and not isinstance(row["chosen"], list) and "prompt" not in row


@layout("sharegpt_pairs", check=_is_open_pair)
def sharegpt_pairs(row: Fields) -> PromptTree:
    """A conversation up to a user turn, with a better and a worse answer to it."""
    before = plain.conversation(row)
    if before[-1].role not in ("user", "tool"):
        what = f'"{plain.conversation_name(row)}" does not end with a user turn'
        raise RowError(what, "the two answers must follow a question")
    return plain.pair(before, plain.answer_field(row, "chosen"), plain.answer_field(row, "rejected"), row)


@layout("swift_pairs", check=lambda row: "messages" in row or {"query", "response"} <= row.keys())
def swift_pairs(row: Fields) -> PromptTree:
    """A conversation whose last answer is better than `rejected_response`; or query and response, with a history."""
    if "messages" in row:
        tree = fields.last_answer_tree(plain.conversation(row), "messages")
        before, chosen = tree.prompt, fields.split_last_answer(plain.conversation(row), "messages")[1]
        return plain.pair(before, chosen, fields.text(row, "rejected_response"), row)
    alpaca_row = {**row, "instruction": fields.text(row, "query"), "input": None}
    return plain.pair(
        plain.instruction_prompt(alpaca_row), fields.text(row, "response"), fields.text(row, "rejected_response"), row
    )


@layout("sharegpt_kto", check=lambda row: _is_conversation(row) and _has_tag(row))
def sharegpt_kto(row: Fields) -> PromptTree:
    """A conversation whose last answer is good or bad."""
    return plain.with_feedback(
        fields.last_answer_tree(plain.conversation(row), plain.conversation_name(row)), label=_tag_label(row)
    )


def _is_plain_conversation(row: Fields) -> bool:
    return not {"chosen", "rejected", "kto_tag", "label"} & row.keys() and (
        fields.holds_list(row, "conversations", "from") or fields.holds_list(row, "conversations", "role")
    )


layout("sharegpt", check=_is_plain_conversation)(plain.messages)


@layout("alpaca_pairs", check=lambda row: "prompt" not in row)
def alpaca_pairs(row: Fields) -> PromptTree:
    """instruction (+ input, system, history) with chosen/rejected, as text or as one message each."""
    prompt = plain.instruction_prompt(row)
    return plain.pair(prompt, plain.answer_field(row, "chosen"), plain.answer_field(row, "rejected"), row)


@layout("alpaca_kto", check=_has_tag)
def alpaca_kto(row: Fields) -> PromptTree:
    """An instruction with an answer that is good or bad."""
    return plain.with_feedback(plain.from_alpaca(row), label=_tag_label(row))


@layout("alpaca_scored")
def alpaca_scored(row: Fields) -> PromptTree:
    """An instruction with an answer and its score."""
    tree, score = plain.from_alpaca(row), fields.score(row, "score")
    if score is None:
        raise RowError('"score" is missing', "give a number, higher is better")
    return plain.with_feedback(tree, score=score)


layout("alpaca", check=lambda row: not {"kto_tag", "label", "score"} & row.keys())(plain.from_alpaca)
