"""A model that can be talked to: weights, tokenizer, the way messages are written for it, and where its answers end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from penchant.data.tokenize import uses_bos
from penchant.errors import ConfigError
from penchant.evaluate.sources import Source, check_there, find_model, runs_in
from penchant.models.fast_decode import FastDecoder, can_decode_fast
from penchant.models.load import cast_parameters, load_tokenizer, resolve_device, resolve_dtype
from penchant.talk.styles import Style, style_of
from penchant.types import Message

UNKNOWN_CONTEXT = 2048  # tokens, where a model does not say how far it can look
ENDLESS = 10**6  # a tokenizer's way of saying that it does not know


@dataclass
class Voice:
    """A loaded model.

    Args:
        name: what it is called; style: how messages are written; ends: token ids that end an answer; context: tokens of prompt and answer.
    """

    name: str
    model: Any
    tokenizer: Any
    style: Style
    ends: frozenset[int]
    context: int

    @cached_property
    def decoder(self) -> FastDecoder | None:
        """The packed weights; None where the model is of no known family."""
        if not can_decode_fast(self.model, 1):
            return None
        with torch.inference_mode():
            return FastDecoder(self.model, rows=1, groups=1, prompt_tokens=1, new_tokens=1)

    @cached_property
    def _starts_with(self) -> int | None:
        return self.tokenizer.bos_token_id if uses_bos(self.tokenizer) else None

    def encode(self, text: str) -> list[int]:
        """Token ids as in training: BOS once where the tokenizer uses it; an empty text is BOS, or EOS as document separator."""
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        first = self._starts_with
        if first is not None and ids[:1] != [first]:
            ids = [first, *ids]
        if not ids:
            first = self.tokenizer.bos_token_id
            ids = [self.tokenizer.eos_token_id if first is None else first]
        return ids

    def prompt_of(self, messages: Sequence[Message]) -> list[int]:
        """Token ids before the answer to these messages.

        Raises:
            TemplateRefused: the chat template does not take them.
        """
        return self.encode(self.style.render(self.tokenizer, messages))


def load_voice(
    given: str,
    *,
    step: str = "last",
    base: str | None = None,
    template: str = "auto",
    otherwise: str = "plain",
    dtype: str | None = None,
    device: str | None = None,
) -> Voice:
    """Load what a person calls a model: a run, a config, a checkpoint, an adapter, a model's folder or a hub id.

    Args:
        step: of a run; base: of an adapter; template: auto, chat, transcript or plain; otherwise: the style without a chat template.
        dtype, device: as in `model.dtype` and `model.device`; by default as the run has them, else auto.

    Raises:
        CheckpointError, ConfigError, ModelError: there is no such model, or it writes nothing.
    """
    source = _find(given, step, base)
    settings = source.base if source.run is None else source.run.model
    where = resolve_device(device or settings.device)
    tokenizer = load_tokenizer(source.tokenizer, settings.revision if source.adapter is None else None)
    trained_on = "auto" if source.run is None else source.run.data.template
    style = style_of(template, tokenizer, trained_on=trained_on, otherwise=otherwise)
    model = source.load(where)
    cast_parameters(model, resolve_dtype(dtype or settings.dtype, where))
    model.eval()
    voice = Voice(given, model, tokenizer, style, ends_of(model, tokenizer), context_of(model, tokenizer))
    _ = voice.decoder  # weights are packed now rather than at the first question
    return voice


def _find(given: str, step: str, base: str | None) -> Source:
    runs = runs_in(given)
    if runs:
        check_there(given)
        raise ConfigError(given, "is no run but a folder of runs", f"give one of them: {', '.join(runs)}")
    return find_model(given, step=step, base=base)


def ends_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokenizer's EOS, and those of the model's generation config that the tokenizer holds for special (an end of turn)."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = [named] if isinstance(named, int) else list(named or ())
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return frozenset([*own, *(i for i in named if i in special)])


def context_of(model: Any, tokenizer: Any) -> int:
    """Tokens of prompt and answer together that the model was made for."""
    config = model.config
    found = getattr(config, "max_position_embeddings", None)
    if isinstance(found, int) and found > 0:
        return found
    length = int(getattr(tokenizer, "model_max_length", 0) or 0)
    return length if 0 < length < ENDLESS else UNKNOWN_CONTEXT
