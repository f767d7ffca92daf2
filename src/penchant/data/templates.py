"""From a row to the text of its prompt and of its answers: the chat template, or plain text; and what ends an answer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from functools import cache
from string import ascii_letters
from typing import Any, NamedTuple

from penchant.data.layouts import RowError
from penchant.data.load import prompt_json
from penchant.errors import ModelError
from penchant.types import PromptTree

PLAIN_NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}


class Rendered(NamedTuple):
    """A row as text. `moved`: the chat template renders the prompt differently once an answer follows."""

    prompt: str
    completions: tuple[str, ...]
    moved: bool = False


def uses_chat(template: str, tokenizer: Any) -> bool:
    """Whether prompts go through the tokenizer's chat template: where there is one, unless `data.template` is ``plain``."""
    return template != "plain" and getattr(tokenizer, "chat_template", None) is not None


# what a template gets today's date from; in its options: the day that it is told instead
DATE = "strftime_now"


def writes_date(tokenizer: Any) -> bool:
    """Whether the chat template asks for today's date."""
    return DATE in str(getattr(tokenizer, "chat_template", None))


def dated(options: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Options for a chat template with the day that it is told, where it asks for one: by default today."""
    return {**({DATE: date.today().isoformat()} if writes_date(tokenizer) else {}), **options}


def apply_template(
    tokenizer: Any, turns: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None, *, generate: bool
) -> str:
    """Turns as the tokenizer's chat template writes them."""
    given = dict(options or {})
    if (day := given.pop(DATE, None)) is not None and writes_date(tokenizer):
        given["chat_template"] = _clock(day) + tokenizer.get_chat_template(tools=given.get("tools"))
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=generate, **given))


@cache
def _clock(day: str) -> str:
    """A macro in place of the template's own clock: transformers hands it no functions."""
    then = datetime.fromisoformat(day)
    codes = [f"%{flag}{letter}" for flag in ("", "-") for letter in ascii_letters]
    told = [("%%", "\0"), *((c, s) for c in codes if "%" not in (s := then.strftime(c))), ("\0", "%")]
    text = "".join(f" | replace({json.dumps(code)}, {json.dumps(said)})" for code, said in told)
    return f"{{% macro {DATE}(format) %}}{{{{ format{text} }}}}{{% endmacro %}}\n"  # a line of its own: see trim_blocks


def plain(tree: PromptTree) -> Rendered:
    """Text prompts as they are; chat prompts as a ``\\n\\nHuman: ...\\n\\nAssistant:`` transcript."""
    texts = tuple(c.text for c in tree.completions)
    if isinstance(tree.prompt, str):
        return Rendered(tree.prompt, texts)
    turns = "".join(f"\n\n{PLAIN_NAMES[m.role]}: {m.content}" for m in tree.prompt)
    return Rendered(f"{turns}\n\nAssistant:", tuple(f" {t.lstrip()}" for t in texts))


def chat(
    tree: PromptTree, tokenizer: Any, options: Mapping[str, Any] | None = None, *, strict: bool = True
) -> Rendered:
    """The tokenizer's chat template; a text prompt is one user turn.

    The prompt is what the template writes for generation. Where that is not how the whole conversation begins (a template that
    opens a thought, or moves the system text), the prompt ends where both begin to differ, or the answer is put behind the
    prompt for generation; such rows are counted.

    Args:
        strict: False takes answers as the template changes them: what a model wrote is no bad row.

    Raises:
        RowError: the template refuses the turns or leaves out a part of an answer, or the prompt is answered already.
    """
    asked = prompt_json(tree.prompt)
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if strict and turns and turns[-1]["role"] == "assistant":
        raise RowError(
            f"the prompt ends with an assistant turn ({excerpt(turns[-1]['content'])}), so the answer would follow an answer",
            "let the prompt end with what is to be answered",
        )

    def render(more: Sequence[Mapping[str, Any]], generate: bool) -> str:
        return apply_template(tokenizer, [*turns, *more], options, generate=generate)

    try:
        prompt = render((), True)
        wholes = [render(({"role": "assistant", "content": c.text},), False) for c in tree.completions]
        moved = not all(whole.startswith(prompt) for whole in wholes)
        unanswered = render((), False) if moved else ""
    except ModelError:  # one that does not end would not do so with the other rows
        raise
    except Exception as error:  # templates raise jinja errors of their own, e.g. for a system turn they do not know
        raise RowError(f"the chat template refuses it ({error})", "fix the turns or set data.template=plain") from error
    if moved and all(whole.startswith(unanswered) for whole in wholes):
        shared = os.path.commonprefix([prompt, *wholes])  # noqa: RUF071 (characters, not paths)
        word_end = re.match(r"(?s).*[\s>\])}:]", shared)  # "<" of "<think>" and of "<b>" is no place to stop
        prompt = shared[: max(len(unanswered), word_end.end() if word_end else 0)]
    elif moved:
        answers = [c.text.strip() for c in tree.completions]
        wholes = [prompt + _behind(prompt, whole, answer) for whole, answer in zip(wholes, answers, strict=True)]
    texts = tuple(whole[len(prompt) :] for whole in wholes)
    for text, c in zip(texts, tree.completions, strict=True):
        if strict and not _holds(prompt, text, c.text):
            raise RowError(
                f"the chat template changes the answer: {excerpt(c.text)} becomes {excerpt(text)}",
                "take out of the answer what the template removes, set data.template_options, or use data.template=plain",
            )
    return Rendered(prompt, texts, moved)


def _holds(prompt: str, text: str, answer: str) -> bool:
    """Whether the answer is there, white space aside: in the text, or begun by the prompt (an opened thought)."""
    wanted, begun, written = ("".join(t.split()) for t in (answer, prompt[-len(answer) :] if answer else "", text))
    return not wanted or (begun + written).find(wanted, max(0, len(begun) - len(wanted) + 1)) >= 0


def _behind(prompt: str, whole: str, answer: str) -> str:
    """What follows the prompt's last words in a conversation that begins otherwise: a template that moves the system text."""
    at = whole.rfind(answer)
    for n in range(min(len(prompt), 32), 3, -1):
        found = whole.rfind(prompt[-n:], 0, max(at, 0))
        if found >= 0:
            return whole[found + n :]
    raise RowError(
        f"the chat template renders the prompt differently when an answer follows: {excerpt(prompt[-40:])} is not in {excerpt(whole)}",
        "set data.template_options to what makes both equal, or data.template=plain",
    )


def excerpt(text: str) -> str:
    """A text for a message: its start and its end."""
    return repr(text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}")


def end_ids(tokenizer: Any, model: Any = None) -> frozenset[int]:
    """The ids that end an answer: one definition for training, sampling, evaluation, chat and serving.

    The tokenizer's EOS; the special token that its chat template writes behind an answer; and those of the model's generation
    config that are special tokens (a model's end of turn).
    """
    found = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i: token.content for i, token in added.items() if token.special}
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, (list, tuple)) else [named]
    found |= {
        i for i in named if (isinstance(i, int) and i in special) or i in getattr(tokenizer, "all_special_ids", ())
    }
    behind = _behind_an_answer(tokenizer)
    return frozenset(found | {i for i, content in special.items() if behind.startswith(content)})


def name_ends(model: Any, tokenizer: Any) -> None:
    """Have the model's generation config say what ends an answer, so that whoever loads it stops there; the tokenizer's EOS first."""
    ends = sorted(end_ids(tokenizer, model), key=lambda i: (i != tokenizer.eos_token_id, i))
    config = getattr(model, "generation_config", None)
    if ends and config is not None:
        config.eos_token_id = ends[0] if len(ends) == 1 else ends


def _behind_an_answer(tokenizer: Any) -> str:
    """What the chat template writes behind an answer; nothing without a template, or with one that takes no such turns."""
    if not uses_chat("auto", tokenizer):
        return ""
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "Zebra4711."}]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("Zebra4711.")[2].lstrip()
    except Exception:  # a template's own jinja errors; `chat` reports them row by row
        return ""
