"""A model to chat with or to serve: its weights, tokenizer, message format and end tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from penchant.data.layouts import RowError
from penchant.data.templates import ChatTemplate, end_ids, plain, uses_chat
from penchant.data.tokenize import uses_bos
from penchant.errors import ConfigError
from penchant.logprobs.packing import check_precision
from penchant.models.cpu.decode import FastDecoder, can_decode_fast
from penchant.models.load import cast_parameters, load_tokenizer, resolve_device, resolve_dtype
from penchant.models.options import check_exists, check_text_alone
from penchant.runs.find import Source, find_model, runs_in
from penchant.types import Message, PromptTree


class TemplateRefused(Exception):
    """The chat template refuses these messages, or the model has no embedding for a token of the result."""


@dataclass(frozen=True, slots=True)
class Style:
    """A way to turn messages into text.

    Args:
        render: maps (tokenizer, messages, extra template variables) to the text before the answer; stops: texts that end an answer.
        keeps_history: whether earlier turns come before a new one; note: a sentence to show the user.
    """

    name: str
    render: Callable[[Any, Sequence[Message], Mapping[str, Any]], str]
    stops: tuple[str, ...]
    keeps_history: bool
    note: str


def _render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    template_variables: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
) -> str:
    template = ChatTemplate(tokenizer, options, template_variables)
    try:
        text = template.render_prompt(messages)
        template.check_tools(messages, text)
    except RowError as error:
        raise TemplateRefused(f"{error.what}; {error.how}") from error
    except Exception as error:  # errors raised inside the template, e.g. for a system turn it does not support
        raise TemplateRefused(f"the model's chat template refuses these messages ({error})") from error
    return text


def _render_transcript(_: Any, messages: Sequence[Message], template_variables: Mapping[str, Any]) -> str:
    _refuse_template_variables(template_variables)
    try:
        return plain(PromptTree(tuple(messages), ()))[0]
    except RowError as error:
        raise TemplateRefused(f"{error.what}; {error.how}") from error


def _render_last(_: Any, messages: Sequence[Message], template_variables: Mapping[str, Any]) -> str:
    _refuse_template_variables(template_variables)
    return messages[-1].content


def _refuse_template_variables(template_variables: Mapping[str, Any]) -> None:
    if template_variables:
        raise TemplateRefused(f"{', '.join(template_variables)}: needs a chat template, and none is used")


_TRANSCRIPT_NOTE = 'no chat template: the conversation is written as "\\n\\nHuman: ...\\n\\nAssistant:"'
_PLAIN_NOTE = "plain text: the model continues what you write; it does not answer"
STYLES = {
    "chat": Style("chat", _render_chat, (), True, "the model's own chat template"),
    "transcript": Style("transcript", _render_transcript, ("\n\nHuman:",), True, _TRANSCRIPT_NOTE),
    "plain": Style("plain", _render_last, (), False, _PLAIN_NOTE),
}


def choose_style(
    requested: str,
    tokenizer: Any,
    *,
    run_template: str = "auto",
    fallback_style: str,
    options: Mapping[str, Any] | None = None,
) -> Style:
    """Return the style to use for a model.

    Args:
        requested: auto or a style's name; run_template: the `data.template` of its run; fallback_style: used if there is no chat template;
            options: the `data.template_options` of its run, passed to the chat template.

    Raises:
        ConfigError: `chat` was requested and the tokenizer has no chat template.
    """
    if requested == "chat" and not uses_chat(requested, tokenizer):
        how = "give transcript or plain, or leave it out"
        raise ConfigError("--template", "the tokenizer has no chat template", how)
    if requested == "auto":
        requested = "chat" if uses_chat(run_template, tokenizer) else fallback_style
    style = STYLES[requested]
    return replace(style, render=partial(_render_chat, options=options)) if style.name == "chat" and options else style


# ---- the model ----

UNKNOWN_CONTEXT = 2048  # tokens, if the model does not state its context length
ENDLESS = 10**6  # tokenizers without a known limit report a huge number instead


@dataclass
class ChatModel:
    """A loaded model.

    Args:
        name: display name; style: message format; eos_token_ids: tokens that end an answer; context: tokens of prompt plus answer.
    """

    name: str
    model: Any
    tokenizer: Any
    style: Style
    eos_token_ids: frozenset[int]
    context: int

    @cached_property
    def decoder(self) -> FastDecoder | None:
        """The packed CPU decoder, or None if `can_decode_fast` rules it out (unknown family, not on the CPU)."""
        if not can_decode_fast(self.model, 1):
            return None
        with torch.inference_mode():
            return FastDecoder(self.model, rows=1, groups=1, prompt_tokens=1, new_tokens=1)

    @cached_property
    def _leading_bos(self) -> int | None:
        return self.tokenizer.bos_token_id if uses_bos(self.tokenizer) else None

    def encode(self, text: str) -> list[int]:
        """Return token ids as in training: one BOS if the tokenizer uses it; an empty text becomes BOS, or EOS if there is no BOS.

        Raises:
            TemplateRefused: the text contains a token that the model has no embedding for.
        """
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        bos = self._leading_bos
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        if not ids:
            bos = self.tokenizer.bos_token_id
            ids = [self.tokenizer.eos_token_id if bos is None else bos]
        if max(ids) >= (embeddings := self.model.get_input_embeddings().weight.shape[0]):
            raise TemplateRefused(
                f"the text contains token {max(ids):,}, but the model has only {embeddings:,} embeddings"
            )
        return ids

    def encode_messages(
        self, messages: Sequence[Message], template_variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the token ids before the answer to these messages; `template_variables`: tools and options for the chat template.

        Raises:
            TemplateRefused: the chat template refuses them, or the model has no embedding for a token.
        """
        return self.encode(self.style.render(self.tokenizer, messages, template_variables or {}))


def load_chat_model(
    path: str,
    *,
    step: str = "last",
    base: str | None = None,
    template: str = "auto",
    fallback_style: str = "plain",
    dtype: str | None = None,
    device: str | None = None,
) -> ChatModel:
    """Load a model from a run, a config, a checkpoint, an adapter, a model folder or a hub id.

    Args:
        step: step of a run; base: base model of an adapter; template: auto, chat, transcript or plain;
            fallback_style: used if there is no chat template.
        dtype, device: as in `model.dtype` and `model.device`; the default is the run's setting, else auto.

    Raises:
        CheckpointError, ConfigError, ModelError: there is no such model, or it cannot generate text.
    """
    source = _find_source(path, step, base)
    settings = source.base if source.run is None else source.run.model
    check_text_alone(settings, path, "talking to a model")
    torch_device = resolve_device(device or settings.device)
    tokenizer = load_tokenizer(source.tokenizer, settings.revision_of(source.tokenizer))
    run_template, options = (
        ("auto", None) if source.run is None else (source.run.data.template, source.run.data.template_options)
    )
    style = choose_style(template, tokenizer, run_template=run_template, fallback_style=fallback_style, options=options)
    model = source.load(torch_device)
    cast_parameters(model, resolve_dtype(dtype or settings.dtype, torch_device))
    check_precision(model)
    model.eval()
    eos_ids = end_ids(tokenizer, model)
    chat_model = ChatModel(path, model, tokenizer, style, eos_ids, context_length(model, tokenizer))
    _ = chat_model.decoder  # pack the weights now rather than at the first question
    return chat_model


def _find_source(path: str, step: str, base: str | None) -> Source:
    runs = runs_in(path)
    if runs:
        check_exists(path)
        raise ConfigError(path, "is not a run but a folder of runs", f"give one of them: {', '.join(runs)}")
    return find_model(path, step=step, base=base)


def context_length(model: Any, tokenizer: Any) -> int:
    """Return the model's context length: prompt and answer together, in tokens."""
    config = model.config
    max_positions = getattr(config, "max_position_embeddings", None)
    if isinstance(max_positions, int) and max_positions > 0:
        return max_positions
    length = int(getattr(tokenizer, "model_max_length", 0) or 0)
    return length if 0 < length < ENDLESS else UNKNOWN_CONTEXT
