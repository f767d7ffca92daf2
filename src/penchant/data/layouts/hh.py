"""hh-rlhf: two whole transcripts, ``\\n\\nHuman: ...\\n\\nAssistant: ...``, that differ in the last answer."""

from __future__ import annotations

import re

from penchant.data.layouts import fields
from penchant.data.layouts.fields import RowError
from penchant.data.layouts.layout import Fields, layout
from penchant.data.layouts.plain import are_transcripts, pair
from penchant.types import Message, PromptTree

_TURN = re.compile(r"\n\n(Human|Assistant):")


@layout("hh", check=are_transcripts)
def from_hh(row: Fields) -> PromptTree:
    """hh-rlhf: two whole transcripts, split at the last assistant turn; the turns before it must be equal in both."""
    before_chosen, chosen = _transcript(fields.text(row, "chosen"), "chosen")
    before_rejected, rejected = _transcript(fields.text(row, "rejected"), "rejected")
    if before_chosen != before_rejected:
        how = "both must answer the same prompt; drop the row"
        raise RowError("the two transcripts differ before their last answer", how)
    return pair(before_chosen, chosen, rejected, row)


def _transcript(text: str, name: str) -> tuple[tuple[Message, ...], str]:
    parts = _TURN.split(text)
    if parts[0].strip() or len(parts) < 5:
        how = 'it must start with "\\n\\nHuman:" and go on with "\\n\\nAssistant:"'
        raise RowError(f'"{name}" is not a transcript', how)
    turns = [
        Message("user" if speaker == "Human" else "assistant", content.strip())
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
    before, answer = fields.split_last_answer(tuple(turns), name)
    fields.reject_consecutive_answers(before, name)
    if not answer.content:
        raise RowError(f'"{name}" ends with an empty answer', "drop the row")
    return before, answer.content
