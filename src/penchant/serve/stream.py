"""Streams the completions of one prompt: sampled tokens, then their text. The tokens equal those of `rollout.generate.sample`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penchant.base.machine import place_of
from penchant.models.cpu.decode import FastDecoder, can_decode_fast
from penchant.rollout.generate import check_logps, decoder_class, draw, row_uniforms
from penchant.serve.model import ChatModel


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings.

    Args:
        max_new_tokens: per answer; n: number of answers; temperature 0: the most likely token; top_k 0: all tokens.
        seed, turn, attempt: the draws depend only on these three and the answer's index.
        presence, frequency: subtracted from the logit of a token already in the answer: once, and once per occurrence.
        top_logprobs: number of most likely tokens to report beside each sampled one; None: no log-probs at all.
    """

    max_new_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    turn: int = 0
    attempt: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One token of one answer.

    Args:
        row: index of the answer; logp: under the model's own softmax, before temperature, penalties, top-k and top-p.
        likeliest: (token, log-prob), most likely first; ended: this is an end token; last: this is the answer's last token.
    """

    row: int
    token: int
    logp: float
    likeliest: tuple[tuple[int, float], ...]
    ended: bool
    last: bool


# A model with the caches of one prompt has three methods:
#   first() -> logits after the prompt (rows, V)
#   next(tokens) -> feed each row its last token; return the logits (rows, V) of the next one
#   keep_rows(active) -> drop the other rows; return the previous index of each remaining row


class _PackedDecoder:
    """The packed decoder of models/cpu/decode.py."""

    def __init__(self, decoder: FastDecoder, prompt: Sequence[int], rows: int, new_tokens: int) -> None:
        self._decoder = decoder.with_room(rows=rows, groups=1, prompt_tokens=len(prompt), new_tokens=new_tokens)
        self._prompt, self._rows, self._generated = list(prompt), rows, 0
        self._lengths = torch.tensor([len(prompt)])

    def first(self) -> Tensor:
        return self._decoder.prefill([self._prompt], 0).repeat_interleave(self._rows, dim=0)

    def next(self, tokens: Tensor) -> Tensor:
        count = len(tokens)
        ages = torch.full((count,), self._generated, dtype=torch.int64)
        self._generated += 1
        return self._decoder.step(tokens, torch.zeros(count, dtype=torch.int64), ages, self._lengths)

    def keep_rows(self, active: Tensor) -> Tensor:
        count = int(active.sum())
        order = torch.arange(count)
        holes = (~active[:count]).nonzero().squeeze(1)
        order[holes] = active[count:].nonzero().squeeze(1) + count
        if self._generated:
            self._decoder.move_rows(order[holes].tolist(), holes.tolist(), self._generated)
        return order


class _TransformersDecoder:
    """Any transformers model, decoded as `sample` decodes it: with its own cache if that gives what whole rows give."""

    def __init__(self, model: Any, prompt: Sequence[int], rows: int) -> None:
        self._decoder = decoder_class(model)(model)
        self._prompt, self._rows, self._device = list(prompt), rows, place_of(model)

    def first(self) -> Tensor:
        return self._decoder.first(torch.tensor([self._prompt], device=self._device), self._rows, [0])

    def next(self, tokens: Tensor) -> Tensor:
        return self._decoder.step(tokens.to(self._device))

    def keep_rows(self, active: Tensor) -> Tensor:
        order = active.nonzero().squeeze(1)
        self._decoder.keep(order.to(self._device))
        return order


class Stream:
    """The answers to one prompt.

    Args:
        prompt: at least one token id; its length plus `sampling.max_new_tokens` is at most `chat_model.context`.
    """

    def __init__(self, chat_model: ChatModel, prompt: Sequence[int], sampling: Sampling) -> None:
        self._eos_ids, self._sampling = torch.tensor(sorted(chat_model.eos_token_ids), dtype=torch.int64), sampling
        n, new_tokens = sampling.n, sampling.max_new_tokens
        fast = chat_model.decoder if can_decode_fast(chat_model.model, len(prompt) + new_tokens) else None
        self._backend: _PackedDecoder | _TransformersDecoder
        if fast is not None:
            self._backend = _PackedDecoder(fast, prompt, n, new_tokens)
        else:
            with torch.inference_mode():  # a model's first prompt tries ways of decoding
                self._backend = _TransformersDecoder(chat_model.model, prompt, n)
        self._rows = torch.arange(n)  # the answer that each active row belongs to
        self._stopped: set[int] = set()
        self._tokens: Tensor | None = None
        self._counts: Tensor | None = None
        self._step = 0
        uniforms = [row_uniforms(sampling.seed, sampling.turn, sampling.attempt + i, new_tokens) for i in range(n)]
        self._uniforms = torch.from_numpy(np.stack(uniforms))

    @property
    def done(self) -> bool:
        return len(self._rows) == 0

    def stop(self, row: int) -> None:
        """Sample no further tokens of an answer; every answer has at least one."""
        self._stopped.add(row)

    def step(self) -> list[SampledToken]:
        """Return the next token of every unfinished answer."""
        with torch.inference_mode():
            if self._tokens is not None:
                self._keep_rows(torch.tensor([int(r) not in self._stopped for r in self._rows], dtype=torch.bool))
            if self.done:
                return []
            logits = (self._backend.first() if self._tokens is None else self._backend.next(self._tokens)).cpu()
            tokens = self._draw(logits)
            ended = torch.isin(tokens, self._eos_ids)
            self._step += 1
            last = ended | (self._step >= self._sampling.max_new_tokens)
            logps, likeliest = self._log_probs(logits, tokens)
            rows, token_ids = self._rows.tolist(), tokens.tolist()
            columns = (rows, token_ids, logps, likeliest, ended.tolist(), last.tolist())
            sampled_tokens = [SampledToken(*values) for values in zip(*columns, strict=True)]
            self._tokens = tokens
            self._keep_rows(~last)
        return sampled_tokens

    def _draw(self, logits: Tensor) -> Tensor:
        s = self._sampling
        if s.presence_penalty or s.frequency_penalty:
            logits = logits.float()
            if self._counts is None:
                self._counts = torch.zeros(s.n, logits.shape[1])
            counts = self._counts[self._rows]
            logits = logits - s.frequency_penalty * counts - s.presence_penalty * (counts > 0)
        uniforms = self._uniforms[self._rows, self._step]
        tokens, logps = draw(logits, uniforms, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k)
        check_logps(logps)
        if self._counts is not None:
            self._counts[self._rows, tokens] += 1
        return tokens

    def _log_probs(self, logits: Tensor, tokens: Tensor) -> tuple[list[float], list[tuple[tuple[int, float], ...]]]:
        count = self._sampling.top_logprobs
        if count is None:
            return [0.0] * len(tokens), [()] * len(tokens)
        logps = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        values, ids = logps.topk(min(count, logps.shape[1]), dim=-1)
        likeliest = [tuple(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
        return logps.gather(1, tokens[:, None]).squeeze(1).tolist(), likeliest

    def _keep_rows(self, active: Tensor) -> None:
        if bool(active.all()):
            return
        assert self._tokens is not None
        order = self._backend.keep_rows(active) if bool(active.any()) else active.nonzero().squeeze(1)
        self._rows, self._tokens = self._rows[order], self._tokens[order]


# ---- tokens to text ----

BROKEN = "\ufffd"  # replacement character: the bytes of an incomplete character decode to it
SPACE = "▁"  # a space in a SentencePiece token
CONTEXT = 8  # prompt tokens to decode along with a continuation


class Detokenizer:
    """Decodes a growing list of tokens; the joined pieces equal the text of decoding all tokens at once.

    Args:
        before: the prompt's tokens if its text is continued, since some tokenizers drop the space of a first token.
        freeze: number of tokens after which their text is final and only the last few are decoded again with new ones.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = (), freeze: int = 64) -> None:
        self._tokenizer, self._freeze = tokenizer, freeze
        self._context: list[int] = []
        self._skip = ""
        self._ids: list[int] = []
        self._returned = ""  # text already returned for the tokens in _ids
        self._settle(list(before))

    def _decode(self, ids: Sequence[int]) -> str:
        # clean-up could remove spaces that an earlier piece has already shown
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _settle(self, ids: list[int]) -> None:
        """Treat the text of these tokens as final."""
        for count in range(
            CONTEXT, CONTEXT + 4
        ):  # a character has up to four tokens, and the tail must not begin within one
            tail = ids[-count:]
            skip = self._decode(tail) if tail else ""
            if BROKEN not in skip:  # otherwise the last character may still change
                self._context, self._skip, self._ids, self._returned = tail, skip, [], ""
                return

    def _text(self) -> str:
        """Return the text of the tokens in _ids, with partial characters as U+FFFD."""
        return self._decode([*self._context, *self._ids])[len(self._skip) :]

    def add(self, token: int) -> str:
        """Return the characters that one more token completes; may be empty."""
        self._ids.append(token)
        text = self._text()
        piece = self._new_text(text.rstrip(BROKEN))
        if len(self._ids) >= self._freeze and self._returned == text:
            self._settle([*self._context, *self._ids])
        return piece

    def flush(self) -> str:
        """Return the rest, partial characters included, if no token follows."""
        return self._new_text(self._text())

    def _new_text(self, text: str) -> str:
        if not text.startswith(self._returned):
            return ""
        new = text[len(self._returned) :]
        self._returned = text
        return new


class StopFilter:
    """Cuts text before the first of several stop texts.

    Args:
        texts: the stop texts, none of them empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._pending = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """Return (text that is safe to show, whether a stop text was found)."""
        text = self._pending + piece
        starts = [start for start in (text.find(t) for t in self._texts) if start >= 0]
        if starts:
            self._pending = ""
            return text[: min(starts)], True
        held = max((_overlap(text, t) for t in self._texts), default=0)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """Return the text held back as a possible beginning of a stop text."""
        held, self._pending = self._pending, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of a text that is a proper prefix of a stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


# ---- single tokens ----


def token_text(tokenizer: Any, token: int) -> str:
    """Decode a single token, special tokens included; U+FFFD if it holds a partial character."""
    text = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    spaces = len(piece) - len(piece.lstrip(SPACE))  # SentencePiece decoders drop the space that a text begins with
    return text if text.startswith(SPACE) else " " * spaces + text.lstrip(" ") if spaces else text


def token_bytes(tokenizer: Any, token: int) -> list[int] | None:
    """Return the bytes of a token, even of a partial character; None if they cannot be derived from the vocabulary."""
    text = token_text(tokenizer, token)
    if BROKEN not in text:
        return list(text.encode())
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return [int(piece[3:5], 16)]
    table = _byte_decoder()
    return [table[c] for c in piece] if all(c in table for c in piece) else None


@lru_cache
def _byte_decoder() -> dict[str, int]:
    """Map each character of a byte-level vocabulary to its byte: printable bytes to themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


# ---- the completions of one prompt ----

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token with its log-prob and the offset of its text, in characters of the answer."""

    sampled: SampledToken
    start: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step adds to one answer: text, its tokens, and the finish reason (None if the answer continues)."""

    row: int
    text: str
    tokens: tuple[ShownToken, ...]
    finish: str | None


@dataclass
class _Row:
    """State of one answer: characters decoded, characters shown, and tokens whose text is not shown yet."""

    detokenizer: Detokenizer
    stops: StopFilter
    decoded: int = 0
    shown: int = 0
    count: int = 0
    waiting: list[ShownToken] = field(default_factory=list)
    finish: str | None = None


class Completions:
    """All answers to one prompt.

    Args:
        prompt: token ids; stops: all texts that end an answer.
        continued: whether the answer continues the prompt's text instead of starting a new turn.
    """

    def __init__(
        self,
        chat_model: ChatModel,
        prompt: Sequence[int],
        sampling: Sampling,
        stops: Sequence[str] = (),
        continued: bool = False,
    ) -> None:
        self.prompt, self.sampling = list(prompt), sampling
        self._stream = Stream(chat_model, prompt, sampling)
        before = prompt if continued else ()
        self._rows = [_Row(Detokenizer(chat_model.tokenizer, before), StopFilter(stops)) for _ in range(sampling.n)]

    @property
    def done(self) -> bool:
        return all(row.finish is not None for row in self._rows)

    @property
    def tokens(self) -> int:
        """Number of tokens generated so far over all answers, end tokens included."""
        return sum(row.count for row in self._rows)

    def step(self) -> list[Piece]:
        """Sample one more token of every unfinished answer and return the pieces this makes final, without empty ones."""
        pieces = [self._piece(sampled) for sampled in self._stream.step()]
        return [p for p in pieces if p.text or p.tokens or p.finish]

    def _piece(self, sampled: SampledToken) -> Piece:
        row = self._rows[sampled.row]
        row.count += 1
        if not sampled.ended:
            row.waiting.append(ShownToken(sampled, row.decoded))
        new_text = "" if sampled.ended else row.detokenizer.add(sampled.token)
        if sampled.last:
            new_text += row.detokenizer.flush()
        row.decoded += len(new_text)
        text, stopped = row.stops.add(new_text)
        if stopped:
            row.finish = STOP
            self._stream.stop(sampled.row)
        elif sampled.last:
            text += row.stops.flush()
            row.finish = STOP if sampled.ended else LENGTH
        row.shown += len(text)
        # a token is reported along with its text; one that lies entirely within a stop text is never reported
        ready = tuple(t for t in row.waiting if t.start < row.shown or (row.finish is not None and not stopped))
        row.waiting = [t for t in row.waiting if t not in ready]
        return Piece(sampled.row, text, ready, row.finish)
