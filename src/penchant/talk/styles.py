"""A conversation as the text that a model goes on from: by its chat template, as a transcript, or as plain text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from penchant.data.tokenize import plain
from penchant.errors import ConfigError
from penchant.types import Message, PromptTree


class TemplateRefused(Exception):
    """The chat template does not take these messages."""


@dataclass(frozen=True, slots=True)
class Style:
    """How messages become text.

    Args:
        render: (tokenizer, messages) to the text before the answer; stops: texts at which an answer ends.
        remembers: whether earlier turns stand before a new one; note: a sentence for whoever talks to it.
    """

    name: str
    render: Callable[[Any, Sequence[Message]], str]
    stops: tuple[str, ...]
    remembers: bool
    note: str


def _chat(tokenizer: Any, messages: Sequence[Message]) -> str:
    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (
        Exception
    ) as error:  # templates raise jinja errors of their own, e.g. for a system turn that they do not know
        raise TemplateRefused(f"the model's chat template refuses these messages ({error})") from error
    return str(text)


def _transcript(_: Any, messages: Sequence[Message]) -> str:
    return plain(PromptTree(tuple(messages), ()))[0]


def _plain(_: Any, messages: Sequence[Message]) -> str:
    return messages[-1].content


STYLES = {
    style.name: style
    for style in (
        Style("chat", _chat, (), True, "the model's own chat template"),
        Style(
            "transcript",
            _transcript,
            ("\n\nHuman:",),
            True,
            'no chat template: the conversation is written as "\\n\\nHuman: ...\\n\\nAssistant:"',
        ),
        Style("plain", _plain, (), False, "plain text: the model continues what you write; it answers nothing"),
    )
}


def style_of(wanted: str, tokenizer: Any, *, trained_on: str = "auto", otherwise: str) -> Style:
    """The style of a model.

    Args:
        wanted: auto or a style's name; trained_on: the `data.template` of its run; otherwise: where there is no chat template.

    Raises:
        ConfigError: `chat` was asked for and the tokenizer has no chat template.
    """
    has_chat = getattr(tokenizer, "chat_template", None) is not None
    if wanted == "chat" and not has_chat:
        raise ConfigError(
            "--template", "the tokenizer has no chat template", "give transcript or plain, or leave it out"
        )
    if wanted != "auto":
        return STYLES[wanted]
    return STYLES["chat" if has_chat and trained_on != "plain" else otherwise]
