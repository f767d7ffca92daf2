"""A conversation: its turns, what of it fits into a model's context, and the rows that it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from penchant.talk.voice import Voice
from penchant.types import Message


class TooLong(Exception):
    """A message that does not fit into the context by itself."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What was said and what was answered."""

    said: str
    answer: str


@dataclass
class Conversation:
    """Turns so far, and the system prompt before them ("" for none).

    Args:
        remembers: whether earlier turns stand before a new one; in plain text none do.
    """

    remembers: bool
    system: str = ""
    turns: list[Turn] = field(default_factory=list)

    def messages(self, said: str, dropped: int = 0) -> tuple[Message, ...]:
        """What a model gets before its answer to `said`, without the first `dropped` turns."""
        before = [Message("system", self.system)] if self.system and self.remembers else []
        for turn in self.turns[dropped:] if self.remembers else ():
            before += [Message("user", turn.said), Message("assistant", turn.answer)]
        return (*before, Message("user", said))

    def prompt_row(self, said: str, dropped: int = 0) -> Any:
        """The prompt of a row: messages, or the text that is continued."""
        return as_json(self.messages(said, dropped)) if self.remembers else said

    def rows(self) -> list[dict[str, Any]]:
        """Rows that penchant reads back: one conversation as messages, or one prompt with its completion each."""
        if not self.turns:
            return []
        if not self.remembers:
            return [{"prompt": t.said, "completion": t.answer} for t in self.turns]
        last = self.turns[-1]
        before = Conversation(True, self.system, self.turns[:-1]).messages(last.said)
        return [{"messages": [*as_json(before), {"role": "assistant", "content": last.answer}]}]


def as_json(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    """Messages as they stand in a row."""
    return [{"role": m.role, "content": m.content} for m in messages]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A prompt that fits.

    Args:
        ids: its tokens; room: tokens that its answer may have; dropped: oldest turns that were left out.
    """

    ids: list[int]
    room: int
    dropped: int


def fit(voice: Voice, conversation: Conversation, said: str, max_new_tokens: int, dropped: int = 0) -> Fitted:
    """The prompt of the next answer, without as many of the oldest turns as must go for prompt and answer to fit into the context.

    Half of the context is kept for the answer at most; an answer that has less room than `max_new_tokens` is simply shorter.

    Args:
        dropped: turns that are left out at least.

    Raises:
        TooLong: the message does not fit by itself. TemplateRefused: the chat template does not take it.
    """
    reserve = min(max_new_tokens, voice.context // 2)
    turns = len(conversation.turns) if conversation.remembers else 0
    for left_out in range(min(dropped, turns), turns + 1):
        ids = voice.prompt_of(conversation.messages(said, left_out))
        if len(ids) + reserve <= voice.context:
            break
    room = min(max_new_tokens, voice.context - len(ids))
    if room < 1:
        raise TooLong(f"it has {len(ids):,} tokens and the model's context is {voice.context:,}; nothing was sent")
    return Fitted(ids, room, left_out)
