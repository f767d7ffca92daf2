"""From a row to the text of its prompt and of its answers: the chat template, or plain text; and what ends an answer."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime
from functools import cache
from string import ascii_letters
from typing import Any, NamedTuple

from penchant.data.layouts import RowError
from penchant.data.load import answer_turn, message_json, prompt_json
from penchant.errors import ModelError
from penchant.types import Message, PromptTree

PLAIN_NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}


class Rendered(NamedTuple):
    """A row as text. `moved`: the chat template renders the prompt differently once an answer follows.

    `turns`: the one completion in parts that are trained and read in turn, the first and the last trained; empty: all of it is trained.
    """

    prompt: str
    completions: tuple[str, ...]
    moved: bool = False
    turns: tuple[str, ...] = ()


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
    given = _with_day(tokenizer, options)
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=generate, **given))


def _with_day(tokenizer: Any, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options for a chat template; one that asks for the date goes along, and is told the day."""
    given = dict(options or {})
    if (day := given.pop(DATE, None)) is not None and writes_date(tokenizer):
        given["chat_template"] = _clock(day) + tokenizer.get_chat_template(tools=given.get("tools"))
    return given


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
    if any(c.reasoning for c in tree.completions):
        how = "take a tokenizer with one, put the reasoning into the content, or take it out"
        raise RowError("the answer has reasoning apart, which only a chat template can write", how)
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
        wholes = [render((message_json(answer_turn(c)),), False) for c in tree.completions]
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
        if strict and not _holds(prompt, text, c.reasoning):
            raise RowError(
                f"the chat template leaves out the answer's reasoning: {excerpt(c.reasoning)} is not in {excerpt(text)}",
                "take a model whose template writes reasoning_content, put it into the content, or take it out",
            )
    return Rendered(prompt, texts, moved)


def conversation(
    tree: PromptTree, tokenizer: Any, options: Mapping[str, Any] | None, ends: Sequence[str], *, end: bool = True
) -> Rendered | None:
    """A conversation of which several answers are learned, written once by the tokenizer's chat template.

    What the model would write of it is what stands in the template's ``{% generation %}`` tags, where it has them for every answer; else what
    the conversation up to an answer has more than the prompt for that answer. The end of a turn belongs to it.

    Args:
        ends: texts that end an answer; end: whether there must be one behind each answer (the last one is given one).

    Returns:
        None where one text cannot serve for all of them: the template writes earlier turns differently when others follow (it takes their
        reasoning out, or ends them otherwise), or ends no turns. Then each answer is learned in a text of its own.
    """
    turns = turns_with_answer(tree)
    said = list(map(message_json, turns))
    learned = [i for i, m in enumerate(turns) if m.role == "assistant" and m.trained]
    try:
        whole, spans = _generated(tokenizer, said, options)
        if len(spans) != sum(m["role"] == "assistant" for m in said):
            whole, spans = apply_template(tokenizer, said, options, generate=False), {}
        for i in () if spans else learned:
            asked = apply_template(tokenizer, said[:i], options, generate=True)
            written = ended_once(apply_template(tokenizer, said[: i + 1], options, generate=False), ends)
            if not (whole.startswith(written) and written.startswith(asked)):
                return None
            spans[i] = len(asked), len(written)
    except ModelError:
        raise
    except Exception:  # a template's own jinja errors; `chat` reports them answer by answer
        return None
    cuts: list[int] = []
    for i in learned:
        start, stop = spans[i]
        stop = start + len(ended_once(whole[start:stop], ends))
        if not whole[:stop].endswith(tuple(ends)):
            behind = whole[stop:]
            closing = next((e for e in ends if behind.lstrip().startswith(e)), "")
            if end and not closing and i != learned[-1]:
                return None
            stop += len(behind) - len(behind.lstrip()) + len(closing) if closing else 0
        if not all(_holds(whole[:start], whole[start:stop], t) for t in (turns[i].content, turns[i].reasoning)):
            return None
        cuts += start, stop
    parts = tuple(whole[a:b] for a, b in itertools.pairwise(cuts))
    return Rendered(whole[: cuts[0]], ("".join(parts),), turns=parts)


def turns_with_answer(tree: PromptTree) -> list[Message]:
    """All turns of a conversation: the prompt (whose answers are not trained), the one answer, and what follows it."""
    asked = (Message("user", tree.prompt),) if isinstance(tree.prompt, str) else tree.prompt
    before = (replace(m, trained=False) for m in asked)
    (answer,) = tree.completions
    return [*before, answer_turn(answer), *answer.more]


def apart(tree: PromptTree) -> list[PromptTree]:
    """A conversation of which several answers are learned, as one tree for each of them; others as they are."""
    if not any(c.more for c in tree.completions):
        return [tree]
    said = turns_with_answer(tree)
    bare = tuple(replace(m, trained=True) for m in said)
    (answer,) = tree.completions
    return [
        replace(tree, prompt=bare[:i], completions=(replace(answer, text=m.content, reasoning=m.reasoning, more=()),))
        for i, m in enumerate(said)
        if m.role == "assistant" and m.trained
    ]


def _generated(
    tokenizer: Any, turns: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None
) -> tuple[str, dict[int, tuple[int, int]]]:
    """A conversation as text, and for each assistant turn where what the template's ``{% generation %}`` tags hold begins and ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    given = _with_day(tokenizer, options)
    template = given.pop("chat_template", None) or tokenizer.get_chat_template(tools=given.get("tools"))
    if not _GENERATION.search(template):
        return "", {}
    rendered: Any = render_jinja_template(
        [[dict(turn) for turn in turns]],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **given},
    )
    (text,), (places,) = rendered
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if len(places) != len(answers):
        return text, {}
    return text, {i: (start, stop) for i, (start, stop) in zip(answers, places, strict=True)}


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def ended_once(text: str, ends: Sequence[str]) -> str:
    """A text that ends where its first end of the last ones stands: white space and further ends behind it are none of it."""
    whole = text
    while (bare := text.rstrip()).endswith(tuple(ends)):
        end = next(e for e in ends if bare.endswith(e))
        whole, text = bare, bare[: -len(end)]
    return whole


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
