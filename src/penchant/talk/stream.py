"""Tokens of one prompt's answers, a step at a time, with the draws of rollout/: a row's tokens are those that `sample` gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from penchant.models.fast_decode import FastDecoder, can_decode_fast
from penchant.rollout.draw import draw, row_uniforms
from penchant.talk.voice import Voice


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn.

    Args:
        max_new_tokens: of each answer; n: answers; temperature 0: the likeliest token; top_k 0: all tokens.
        seed, turn, attempt: the draws are a function of these three and of the answer's number, and of nothing else.
        presence, frequency: taken off the logit of a token that the answer holds already: once, and once for each time.
        top_logprobs: likeliest tokens that are told beside each drawn one; None: no log-probs at all.
    """

    max_new_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    turn: int = 0
    attempt: int = 0
    presence: float = 0.0
    frequency: float = 0.0
    top_logprobs: int | None = None

    @property
    def penalises(self) -> bool:
        return self.presence != 0.0 or self.frequency != 0.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token of one answer.

    Args:
        row: the answer's number; logp: of the token under the model's own softmax, before temperature, penalties, top-k and top-p.
        likeliest: (token, log-prob), the likeliest first; ended: an end token; last: the answer has no further token.
    """

    row: int
    token: int
    logp: float
    likeliest: tuple[tuple[int, float], ...]
    ended: bool
    last: bool


class _Feed(Protocol):
    """A model with the caches of one prompt."""

    def first(self) -> Tensor:
        """Logits after the prompt, (rows, V)."""
        ...

    def next(self, tokens: Tensor) -> Tensor:
        """Feed each row its last token; the logits (rows, V) of its next one."""
        ...

    def keep(self, going: Tensor) -> Tensor:
        """Let the other rows go; where each row that stays now stood before."""
        ...


class _Fast:
    """The packed decoder of models/fast_decode.py."""

    def __init__(self, decoder: FastDecoder, prompt: Sequence[int], rows: int, new_tokens: int) -> None:
        self._decoder = decoder.with_room(rows=rows, groups=1, prompt_tokens=len(prompt), new_tokens=new_tokens)
        self._prompt, self._rows, self._age = list(prompt), rows, 0
        self._lengths = torch.tensor([len(prompt)])

    def first(self) -> Tensor:
        return self._decoder.prefill([self._prompt], 0).repeat_interleave(self._rows, dim=0)

    def next(self, tokens: Tensor) -> Tensor:
        count = len(tokens)
        ages = torch.full((count,), self._age, dtype=torch.int64)
        self._age += 1
        return self._decoder.step(tokens, torch.zeros(count, dtype=torch.int64), ages, self._lengths)

    def keep(self, going: Tensor) -> Tensor:
        stay = int(going.sum())
        order = torch.arange(stay)
        holes = (~going[:stay]).nonzero().squeeze(1)
        order[holes] = going[stay:].nonzero().squeeze(1) + stay
        if self._age:
            self._decoder.move_rows(order[holes].tolist(), holes.tolist(), self._age)
        return order


class _Any:
    """Any model of transformers, with its own cache."""

    def __init__(self, model: Any, prompt: Sequence[int], rows: int) -> None:
        self._model, self._prompt, self._rows = model, list(prompt), rows
        self._device = next(model.parameters()).device
        self._cache: Any = None
        self._at = len(self._prompt)

    def first(self) -> Tensor:
        out = self._model(input_ids=torch.tensor([self._prompt], device=self._device), use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        if self._rows > 1:
            self._cache.batch_repeat_interleave(self._rows)
        logits: Tensor = out.logits[:, -1]
        return logits.repeat_interleave(self._rows, dim=0)

    def next(self, tokens: Tensor) -> Tensor:
        position = torch.full((len(tokens), 1), self._at, device=self._device)
        self._at += 1
        out = self._model(
            input_ids=tokens[:, None].to(self._device),
            past_key_values=self._cache,
            use_cache=True,
            position_ids=position,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def keep(self, going: Tensor) -> Tensor:
        order = going.nonzero().squeeze(1)
        self._cache.batch_select_indices(order.to(self._device))
        return order


class Stream:
    """The answers to one prompt.

    Args:
        prompt: token ids, at least one; with `sampling.max_new_tokens` at most `voice.context` of them.
    """

    def __init__(self, voice: Voice, prompt: Sequence[int], sampling: Sampling) -> None:
        self._ends, self._sampling = torch.tensor(sorted(voice.ends), dtype=torch.int64), sampling
        n, new_tokens = sampling.n, sampling.max_new_tokens
        fast = voice.decoder if can_decode_fast(voice.model, len(prompt) + new_tokens) else None
        self._feed: _Feed = _Any(voice.model, prompt, n) if fast is None else _Fast(fast, prompt, n, new_tokens)
        self._rows = torch.arange(n)  # the answer that each living row writes
        self._stopped: set[int] = set()
        self._tokens: Tensor | None = None
        self._counts: Tensor | None = None
        self._step = 0
        drawn = [row_uniforms(sampling.seed, sampling.turn, sampling.attempt + i, new_tokens) for i in range(n)]
        self._uniforms = torch.from_numpy(np.stack(drawn))

    @property
    def done(self) -> bool:
        return len(self._rows) == 0

    def stop(self, row: int) -> None:
        """Write no further token of an answer, once it has its first."""
        self._stopped.add(row)

    def step(self) -> list[Drawn]:
        """The next token of every answer that goes on."""
        with torch.inference_mode():
            if self._tokens is not None:
                self._drop(torch.tensor([int(r) not in self._stopped for r in self._rows], dtype=torch.bool))
            if self.done:
                return []
            logits = (self._feed.first() if self._tokens is None else self._feed.next(self._tokens)).cpu()
            tokens = self._draw(logits)
            ended = torch.isin(tokens, self._ends)
            self._step += 1
            last = ended | (self._step >= self._sampling.max_new_tokens)
            logps, likeliest = self._log_probs(logits, tokens)
            made = [
                Drawn(*values)
                for values in zip(
                    self._rows.tolist(), tokens.tolist(), logps, likeliest, ended.tolist(), last.tolist(), strict=True
                )
            ]
            self._tokens = tokens
            self._drop(~last)
        return made

    def _draw(self, logits: Tensor) -> Tensor:
        s = self._sampling
        if s.penalises:
            logits = logits.float()
            if self._counts is None:
                self._counts = torch.zeros(s.n, logits.shape[1])
            counts = self._counts[self._rows]
            logits = logits - s.frequency * counts - s.presence * (counts > 0)
        uniforms = self._uniforms[self._rows, self._step]
        tokens, _ = draw(logits, uniforms, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k)
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

    def _drop(self, going: Tensor) -> None:
        if bool(going.all()):
            return
        assert self._tokens is not None
        order = self._feed.keep(going) if bool(going.any()) else going.nonzero().squeeze(1)
        self._rows, self._tokens = self._rows[order], self._tokens[order]
