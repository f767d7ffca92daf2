"""Answers in OpenAI's shapes: whole or in chunks, of a chat or of a text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from penchant.talk.answer import Piece, Told
from penchant.talk.text import token_bytes, token_text
from penchant.talk.voice import Voice


class Shape(Protocol):
    """What one endpoint's answers look like."""

    prefix: str
    whole_object: str
    chunk_object: str

    def first(self, index: int) -> dict[str, Any] | None:
        """The choice of a stream's first chunk, where it has one before any text."""
        ...

    def whole(self, index: int, text: str, tokens: Sequence[Told], finish: str | None) -> dict[str, Any]:
        """A whole choice."""
        ...

    def chunk(self, piece: Piece, index: int) -> dict[str, Any]:
        """A choice of a chunk."""
        ...


@dataclass
class ChatShape:
    """/v1/chat/completions."""

    voice: Voice
    logprobs: bool
    prefix: str = "chatcmpl-"
    whole_object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"

    def first(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self, index: int, text: str, tokens: Sequence[Told], finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def chunk(self, piece: Piece, index: int) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text or piece.tokens else {}
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.finish,
        }

    def _logprobs(self, tokens: Sequence[Told]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            self._token(t.drawn.token, t.drawn.logp) | {"top_logprobs": [self._token(*t) for t in t.drawn.likeliest]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logp: float) -> dict[str, Any]:
        tokenizer = self.voice.tokenizer
        return {"token": token_text(tokenizer, token), "logprob": logp, "bytes": token_bytes(tokenizer, token)}


@dataclass
class TextShape:
    """/v1/completions."""

    voice: Voice
    logprobs: bool
    prefix: str = "cmpl-"
    whole_object: str = "text_completion"
    chunk_object: str = "text_completion"

    def first(self, index: int) -> None:
        return None

    def whole(self, index: int, text: str, tokens: Sequence[Told], finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def chunk(self, piece: Piece, index: int) -> dict[str, Any]:
        return self.whole(index, piece.text, piece.tokens, piece.finish)

    def _logprobs(self, tokens: Sequence[Told]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        texts = [token_text(self.voice.tokenizer, t.drawn.token) for t in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [t.drawn.logp for t in tokens],
            "top_logprobs": [self._likeliest(t) for t in tokens],
            "text_offset": [t.start for t in tokens],
        }

    def _likeliest(self, told: Told) -> dict[str, float]:
        made: dict[str, float] = {}
        for token, logp in told.drawn.likeliest:
            made.setdefault(token_text(self.voice.tokenizer, token), logp)  # half characters look alike
        return made


@dataclass
class Choice:
    """One answer, collected."""

    text: str = ""
    tokens: list[Told] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish or self.finish


@dataclass
class Reply:
    """One request's answers: what every body and chunk of them has in common.

    Args:
        model: the name under which the model is served.
    """

    shape: Shape
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], usage: dict[str, int]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        made = [self.shape.whole(i, c.text, c.tokens, c.finish) for i, c in enumerate(choices)]
        return self._body(self.shape.whole_object, made) | {"usage": usage}

    def chunk(self, choice: dict[str, Any], with_usage: bool) -> dict[str, Any]:
        """One chunk of a stream."""
        return self._body(self.shape.chunk_object, [choice]) | ({"usage": None} if with_usage else {})

    def last(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk that tells the usage."""
        return self._body(self.shape.chunk_object, []) | {"usage": usage}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.shape.prefix + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "choices": choices,
        }


def usage_of(prompt: int, completion: int) -> dict[str, int]:
    """Tokens of all prompts and of all answers, end tokens included."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
