"""Prompt trees to text: the tokenizer's chat template where there is one, plain text otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penchant.data.converters import RowError
from penchant.errors import ConfigError
from penchant.types import Message, PromptTree

PLAIN_NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}

Rendered = tuple[str, tuple[str, ...]]


def renderer(template: str, tokenizer: Any, kind: str) -> tuple[Callable[[PromptTree], Rendered], str]:
    """The function that turns a tree into (prompt text, completion texts), and its name.

    ``auto`` is the chat template where the tokenizer has one; plain documents (kind ``text``) never get a template.

    Raises:
        ConfigError: ``chat`` was asked for and the tokenizer has no chat template.
    """
    has_chat = getattr(tokenizer, "chat_template", None) is not None
    if template == "chat" and not has_chat:
        raise ConfigError("data.template", "the tokenizer has no chat template", "set data.template=plain or auto")
    if kind == "text" or template == "plain" or not has_chat:
        return plain, "plain"
    return lambda tree: chat(tree, tokenizer), "chat"


def plain(tree: PromptTree) -> Rendered:
    """Text prompts as they are; chat prompts as a ``\\n\\nHuman: ...\\n\\nAssistant:`` transcript."""
    texts = tuple(c.text for c in tree.completions)
    if isinstance(tree.prompt, str):
        return tree.prompt, texts
    turns = "".join(f"\n\n{PLAIN_NAMES[m.role]}: {m.content}" for m in tree.prompt)
    return f"{turns}\n\nAssistant:", tuple(f" {t.lstrip()}" for t in texts)


def chat(tree: PromptTree, tokenizer: Any) -> Rendered:
    """The tokenizer's chat template; a text prompt is one user turn. The prompt's text must be a prefix of the whole."""
    messages = tree.prompt if isinstance(tree.prompt, tuple) else (Message("user", tree.prompt),)
    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        wholes = [
            tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": c.text}], tokenize=False)
            for c in tree.completions
        ]
    except Exception as error:  # templates raise jinja errors of their own, e.g. for a system turn they do not know
        raise RowError(
            f"the chat template refuses it ({error})", "mend the turns or set data.template=plain"
        ) from error
    for whole in wholes:
        if not whole.startswith(prompt):
            raise RowError("the chat template changes the prompt when an answer follows", "set data.template=plain")
    return prompt, tuple(whole[len(prompt) :] for whole in wholes)
