"""Render a row's prompt and answers as text, with the chat template or plainly, and find the tokens that end an answer."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date, datetime
from functools import cache
from string import ascii_letters
from typing import Any, NamedTuple

from penchant.base.text import any_of, closest
from penchant.data.layouts import RowError
from penchant.data.load import answer_turn, message_json, template_variables
from penchant.data.pictures import MARK
from penchant.errors import ModelError
from penchant.types import Completion, Message, Prompt, PromptTree

ASKING = ("system", "developer", "user")
PLAIN_NAMES = {"user": "Human", "assistant": "Assistant", "system": "System", "developer": "System"}


class Rendered(NamedTuple):
    """A row as text.

    `moved` is set if the chat template renders the prompt differently once an answer follows: ``shared`` if the prompt is cut to what
    both renderings share, ``forced`` if the answer is appended to the prompt.

    `turns`: each completion in parts that are alternately trained on and only read, starting and ending with one that is trained
    on; empty: everything is trained on.
    """

    prompt: str
    completions: tuple[str, ...]
    moved: str = ""
    turns: tuple[tuple[str, ...], ...] = ()


def uses_chat(template: str, tokenizer: Any) -> bool:
    """Whether prompts go through the tokenizer's chat template: if there is one, unless `data.template` is ``plain``."""
    return template != "plain" and getattr(tokenizer, "chat_template", None) is not None


# the function that a template gets today's date from; as an option: the date to use instead
DATE = "strftime_now"


def writes_date(tokenizer: Any) -> bool:
    """Whether the chat template uses today's date."""
    return DATE in str(getattr(tokenizer, "chat_template", None))


def with_date(options: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Options for a chat template, with the date (default: today) if it uses one."""
    return {**({DATE: date.today().isoformat()} if writes_date(tokenizer) else {}), **options}


def _fix_date(tokenizer: Any, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options for a chat template; if it uses the date and one is given, they include the template with that date fixed."""
    given = dict(options or {})
    if (day := given.pop(DATE, None)) is not None and writes_date(tokenizer):
        given["chat_template"] = _date_macro(day) + tokenizer.get_chat_template(tools=given.get("tools"))
    return given


@cache
def _date_macro(day: str) -> str:
    """A macro that replaces the template's clock, since transformers passes no functions to templates."""
    then = datetime.fromisoformat(day)
    codes = [f"%{flag}{letter}" for flag in ("", "-") for letter in ascii_letters]
    told = [("%%", "\0"), *((c, s) for c in codes if "%" not in (s := then.strftime(c))), ("\0", "%")]
    text = "".join(f" | replace({json.dumps(code)}, {json.dumps(said)})" for code, said in told)
    return f"{{% macro {DATE}(format) %}}{{{{ format{text} }}}}{{% endmacro %}}\n"  # on its own line because of trim_blocks


def unread_options(tokenizer: Any, options: Iterable[str]) -> str:
    """A note on options that the chat template does not read; empty if it reads all."""
    words = set(re.findall(r"\w+", str(getattr(tokenizer, "chat_template", None))))
    unread = sorted({*options} - words)
    near = [f'{name} (did you mean "{word}"?)' if (word := closest(name, words, 0.8)) else name for name in unread]
    return f"the chat template does not read {' and '.join(near)}" if near else ""


# ---- Calling a chat template: its variables besides the turns, and the form in which it takes turns ----

NAME, VALUE, RESULT, QUESTION, ANSWER = (
    "find_lynx",
    "Gnu1717",
    "Ibex4242",
    "Kudu0815",
    "Zebra4711.",
)  # words found nowhere else


class Form(NamedTuple):
    """The form in which turns are passed to a template: the first in which it writes all of them.

    Args:
        parts: contents are lists of parts, as templates of vision-language models read them.
        empty: the content of a turn that only calls tools, None for no content; text: call arguments are JSON texts, not objects.
        lacks: which of ``tools``, ``calls`` and ``results`` the template leaves out in every form.
    """

    parts: bool = False
    empty: str | None = ""
    text: bool = False
    lacks: frozenset[str] = frozenset()


_FORMS: dict[tuple[str, bool], Form] = {}  # by template, and with or without tools


def _form(tokenizer: Any, with_tools: bool) -> Form:
    """The form that a tokenizer's template takes, found by trying."""
    template = tokenizer.chat_template
    key = template if isinstance(template, str) else repr(template), with_tools
    if key not in _FORMS:
        if len(_FORMS) > 100:  # tests make many
            _FORMS.clear()
        _FORMS[key] = _tool_form(tokenizer, _form(tokenizer, False)) if with_tools else _plain_form(tokenizer)
    return _FORMS[key]


def _plain_form(tokenizer: Any) -> Form:
    asked = (Message("user", QUESTION), Message("assistant", ANSWER))
    for form in (Form(), Form(parts=True)):
        text = _try_write(tokenizer, form, asked)
        if QUESTION in text and ANSWER in text:
            return form
    return Form()


def _tool_form(tokenizer: Any, plain: Form) -> Form:
    tool = {
        "name": NAME,
        "description": "?",
        "parameters": {"type": "object", "properties": {"eland": {"type": "string"}}},
    }
    told = {"tools": [{"type": "function", "function": tool}]}
    call = {"id": "call12345", "type": "function", "function": {"name": NAME, "arguments": {"eland": VALUE}}}
    asked = Message("user", QUESTION)
    calls = Message("assistant", "", tool_calls=json.dumps([call]))
    turns = (asked, calls, Message("tool", RESULT, tool_call_id="call12345", name=NAME), Message("assistant", ANSWER))
    forms = [plain._replace(empty=empty, text=text) for empty in ("", None) for text in (False, True)]
    lacks: set[str] = set()
    offered = _try_write(tokenizer, plain, (asked,), told)
    if offered and NAME not in offered:
        lacks.add("tools")
    found = None
    for form in forms:
        text = _try_write(tokenizer, form, turns, told)
        if text and RESULT not in text:
            lacks.add("results")
        if VALUE in text and not any(wrong in text for wrong in ("'eland'", '\\"eland')):
            found = form
            break
        if text:
            lacks.add("calls")
    return (found or plain)._replace(lacks=frozenset(lacks - {"calls"} if found else lacks))


def _try_write(tokenizer: Any, form: Form, turns: Sequence[Message], told: Mapping[str, Any] | None = None) -> str:
    try:
        return _write(tokenizer, form, turns, dict(told or {}))
    except ModelError:
        raise
    except Exception:  # a template's own jinja errors: it may refuse such turns
        return ""


def _write(tokenizer: Any, form: Form, turns: Sequence[Message], given: Mapping[str, Any], **how: bool) -> str:
    shown = [_as_template_turn(m, form, tokenizer) for m in turns]
    return str(tokenizer.apply_chat_template(shown, tokenize=False, **how, **given))


def _as_template_turn(message: Message, form: Form, tokenizer: Any) -> dict[str, Any]:
    """A turn in the form that the template takes."""
    turn = message_json(message)
    if message.role == "developer" and "developer" not in str(tokenizer.chat_template):
        turn["role"] = "system"
    if message.tool_calls and not message.content:
        turn |= {"content": form.empty}
        turn = {k: v for k, v in turn.items() if v is not None}
    elif form.parts:
        turn["content"] = [{"type": "text", "text": message.content}]
    if form.text:
        for call in turn.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return turn


class ChatTemplate:
    """A tokenizer's chat template with its variables besides the turns.

    Args:
        options: `data.template_options`; told: the row's own variables (tools, options), which take precedence.
    """

    def __init__(
        self, tokenizer: Any, options: Mapping[str, Any] | None = None, told: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._given = _fix_date(tokenizer, {**(options or {}), **(told or {})})

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        return self._given.get("tools") or ()

    def _form_for(self, turns: Sequence[Message]) -> Form:
        return _form(self.tokenizer, bool(self.tools) or any(m.tool_calls or m.role == "tool" for m in turns))

    def write(self, turns: Sequence[Message], *, generate: bool = False) -> str:
        """The turns as text; `generate`: with the generation prompt for the next answer."""
        form = self._form_for(turns)
        return _write(self.tokenizer, form, turns, self._given, add_generation_prompt=generate)

    def render_prompt(self, turns: Sequence[Message]) -> str:
        """The text before an answer; if the last turn is an assistant's, the answer continues it (`continue_final_message`)."""
        if not continues(turns):
            return self.write(turns, generate=True)
        return _write(self.tokenizer, self._form_for(turns), turns, self._given, continue_final_message=True)

    def answer_spans(self, turns: Sequence[Message]) -> tuple[str, dict[int, tuple[int, int]]]:
        """The turns as text, and the (start, end) of each assistant turn's ``{% generation %}`` span; empty without such tags."""
        from transformers.utils.chat_template_utils import render_jinja_template

        given = dict(self._given)
        template = given.pop("chat_template", None) or self.tokenizer.get_chat_template(tools=given.get("tools"))
        if not _GENERATION.search(template):
            return "", {}
        form = self._form_for(turns)
        rendered: Any = render_jinja_template(
            [[_as_template_turn(m, form, self.tokenizer) for m in turns]],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **given},
        )
        (text,), (places,) = rendered
        answers = [i for i, m in enumerate(turns) if m.role == "assistant"]
        if len(places) != len(answers):
            return text, {}
        return text, {i: (start, stop) for i, (start, stop) in zip(answers, places, strict=True)}

    def check_turns(self, turns: Sequence[Message], text: str) -> None:
        """Check that the text contains all system, developer and user turns, ignoring white space.

        Raises:
            RowError: the template leaves something out, e.g. because it does not support system turns.
        """
        flat = ""
        for m in turns:
            if m.role in ASKING and m.content.strip() not in text:
                flat = flat or "".join(text.split())
                if any("".join(said.split()) not in flat for said in MARK.split(m.content)[::2]):  # around pictures
                    how = (
                        "fix the turn or take it out, take a model whose template writes it, or set data.template=plain"
                    )
                    raise RowError(f"the chat template leaves out a turn of the {m.role} ({excerpt(m.content)})", how)

    def check_tools(self, turns: Sequence[Message], text: str, *, offered: bool = True) -> None:
        """Check that the text contains the tools (if `offered` in it), all calls and all results.

        Raises:
            RowError: the template leaves something out.
        """
        tools = self.tools if offered else ()
        calls, results = any(m.tool_calls for m in turns), any(m.role == "tool" for m in turns)
        if not (tools or calls or results):
            return
        lacks = self._form_for(turns).lacks
        found = next(
            (
                what
                for name, there, what in (
                    ("tools", tools, "the tools"),
                    ("calls", calls, "tool calls"),
                    ("results", results, "what tools answer"),
                )
                if there and name in lacks
            ),
            "",
        )
        if left := found or _first_missing(turns, tools, text):
            how = "take a model whose chat template writes tools (see `Conversations and tools` in the docs), or drop the row"
            raise RowError(f"the chat template leaves out {left}", how)


def _first_missing(turns: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: str) -> str:
    """The first tool, call or result missing from a text, ignoring white space and JSON escapes; empty if none is."""
    flat, at = "".join(text.split()), 0

    def behind(value: Any) -> int:  # the position after it; -1 if it is missing
        said = value if isinstance(value, str) else json.dumps(value)
        ways = {
            "".join(way.split()) for way in (said, json.dumps(said, ensure_ascii=False)[1:-1], json.dumps(said)[1:-1])
        }
        ways |= {str(value)} if not isinstance(value, str) else set()
        return max((place + len(way) for way in ways if (place := flat.find(way, at)) >= 0), default=-1)

    for tool in tools:
        name = tool.get("function", tool).get("name", "")
        if behind(name) < 0:
            return f"the tool {name}"
    for m in turns:
        place = behind(m.content) if m.role not in ("system", "developer") else -1
        if place < 0 and m.role == "tool":
            return f"what a tool answered ({excerpt(m.content)})"
        for call in json.loads(m.tool_calls or "[]"):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if any(behind(leaf) < 0 for leaf in (name, *_leaves(arguments))):
                return f"a call of {name} ({excerpt(json.dumps(arguments, ensure_ascii=False))})"
        at = max(at, place)
    return ""


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the keys, texts and numbers in a JSON value."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield name
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif value is not None:
        yield value


def continues(turns: Sequence[Message]) -> bool:
    """Whether an answer to these turns continues the last one.

    Raises:
        RowError: the last one calls a tool and the result is missing.
    """
    if not turns or turns[-1].role != "assistant":
        return False
    if turns[-1].tool_calls:
        raise RowError("the prompt ends with a tool call", "let the tool's result follow it")
    return True


def with_answer(turns: Sequence[Message], answer: Message) -> list[Message]:
    """The turns with an answer to them, as another turn or as the rest of the last one.

    Raises:
        RowError: the answer continues a turn and has reasoning, which would have to precede that turn.
    """
    if not continues(turns):
        return [*turns, answer]
    if answer.reasoning:
        what = "the answer continues the prompt's last turn and has separate reasoning"
        raise RowError(what, "put it into that turn")
    begun = turns[-1]
    return [*turns[:-1], replace(begun, content=begun.content + answer.content, tool_calls=answer.tool_calls)]


def turns_of_prompt(prompt: Prompt) -> tuple[Message, ...]:
    """A prompt as turns; a text becomes a user turn."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def plain(tree: PromptTree) -> Rendered:
    """Text prompts as they are; chat prompts as a ``\\n\\nHuman: ...\\n\\nAssistant:`` transcript."""
    turns = () if isinstance(tree.prompt, str) else tree.prompt
    held = (
        ("separate reasoning", any(c.reasoning for c in tree.completions)),
        ("tools", tree.tools or any(m.role == "tool" or m.tool_calls for m in turns)),
        ("tool calls", any(c.tool_calls for c in tree.completions)),
        ("chat_template_kwargs", tree.template_options),
    )
    for what, there in held:
        if there:
            how = "take a tokenizer with a chat template, put it into the content, or take it out"
            raise RowError(f"it has {what}, which only a chat template can write", how)
    texts = tuple(c.text for c in tree.completions)
    if isinstance(tree.prompt, str):
        return Rendered(tree.prompt, texts)
    said = "".join(f"\n\n{PLAIN_NAMES[m.role]}: {m.content}" for m in turns)
    if continues(turns):
        return Rendered(said, texts)
    return Rendered(f"{said}\n\nAssistant:", tuple(f" {t.lstrip()}" for t in texts))


def chat(
    tree: PromptTree, tokenizer: Any, options: Mapping[str, Any] | None = None, *, strict: bool = True
) -> Rendered:
    """Render a row with the chat template; a text prompt becomes a user turn, and a final assistant turn is continued.

    The prompt is what the template writes for generation. If the whole conversation does not start with that (the template
    opens a thought, or moves the system text), the prompt is cut to what both share, or the answer is appended to the prompt
    for generation; such rows are counted.

    Args:
        strict: False accepts answers that the template changes, since a model's own completion is never a bad row.

    Raises:
        RowError: the template refuses the turns or leaves out a part of them.
    """
    template = ChatTemplate(tokenizer, options, template_variables(tree))
    turns = turns_of_prompt(tree.prompt)
    answered = [with_answer(turns, answer_turn(c)) for c in tree.completions]
    try:
        prompt = template.render_prompt(turns)
        wholes = list(map(template.write, answered))
        moved = not all(whole.startswith(prompt) for whole in wholes)
        unanswered = template.write(turns[: len(turns) - continues(turns)]) if moved else ""
    except (ModelError, RowError):  # a template that does not terminate would not do so for other rows either
        raise
    except Exception as error:  # templates raise jinja errors of their own, e.g. for an unsupported system turn
        raise RowError(f"the chat template refuses it ({error})", "fix the turns or set data.template=plain") from error
    how = ""
    if moved and all(whole.startswith(unanswered) for whole in wholes):
        prompt, how = prompt[: _common_prefix_length([prompt, *wholes], len(unanswered))], "shared"
    elif moved:
        answers = [c.text.strip() for c in tree.completions]
        said = [t.strip() for m in turns for t in MARK.split(m.content)[::2] if t.strip()]
        wholes = [
            prompt + _continuation(prompt, whole, answer, said) for whole, answer in zip(wholes, answers, strict=True)
        ]
        how = "forced"
    texts = tuple(whole[len(prompt) :] for whole in wholes)
    for text, c in zip(texts, tree.completions, strict=True):
        if strict and not _contains(prompt, text, c.text):
            raise RowError(
                f"the chat template changes the answer: {excerpt(c.text)} becomes {excerpt(text)}",
                "take out of the answer what the template removes, set data.template_options, or use data.template=plain",
            )
        if strict and not _contains(prompt, text, c.reasoning):
            raise RowError(
                f"the chat template leaves out the answer's reasoning: {excerpt(c.reasoning)} is not in {excerpt(text)}",
                "take a model whose template writes reasoning_content, put it into the content, or take it out",
            )
        if strict:
            template.check_tools([answer_turn(c)], text, offered=False)
    if strict:
        for whole, messages in zip(wholes or [prompt], answered or [list(turns)], strict=True):
            template.check_turns(turns, whole)
            template.check_tools(messages, whole)
    return Rendered(prompt, texts, how)


def _common_prefix_length(texts: Sequence[str], least: int) -> int:
    """The length of the texts' common prefix without a word that it cuts, but at least `least`."""
    shared = os.path.commonprefix(texts)  # noqa: RUF071 (characters, not paths)
    word_end = re.match(r"(?s).*[\s>\])}:]", shared)  # never cut after the "<" that "<think>" and "<b>" share
    return max(least, word_end.end() if word_end else 0)


def conversation(
    tree: PromptTree, tokenizer: Any, options: Mapping[str, Any] | None, ends: Sequence[str], *, end: bool = True
) -> Rendered | None:
    """Render conversations with several answers to train on, each once with the chat template.

    The model's part is what the template's ``{% generation %}`` tags hold, if it has them for every answer, without what the prompt for
    that answer already contains (an opened thought). Otherwise it is what the conversation up to an answer adds to the prompt for that
    answer. The end of a turn belongs to it.

    Args:
        ends: texts that end an answer; end: whether one must follow each answer (the last one is given one).

    Returns:
        None if one text cannot serve all answers: the template writes earlier turns differently when others follow (it removes their
        reasoning, or ends them differently), or does not end turns. Each answer is then trained on in a separate text.
    """
    template = ChatTemplate(tokenizer, options, template_variables(tree))
    made = [_render_in_one(template, turns_with_answer(tree, c), ends, end) for c in tree.completions]
    whole = [m for m in made if m is not None]
    if len(whole) < len(made) or len({text for text, *_ in whole}) > 1:
        return None
    # an opened thought may be shared with one of them only
    begun = [begins for _, begins, *_ in whole]
    prompt = min(begun, key=len)
    if not all(b.startswith(prompt) for b in begun):
        return None
    parts = tuple((b[len(prompt) :] + first, *more) for _, b, (first, *more), _ in whole)
    moved = "shared" if any(m for *_, m in whole) else ""
    return Rendered(prompt, tuple(map("".join, parts)), moved, turns=parts)


def _render_in_one(
    template: ChatTemplate, turns: Sequence[Message], ends: Sequence[str], end: bool
) -> tuple[str, str, tuple[str, ...], bool] | None:
    """Render one conversation for `conversation`, or return None as it does.

    Returns:
        The text before the tags of the first answer to train on, the prompt for that answer, the parts after it, and whether the
        conversation contains only a part of some answer's prompt.
    """
    learned = [i for i, m in enumerate(turns) if m.role == "assistant" and m.trained]
    try:
        whole, spans = template.answer_spans(turns)
        if len(spans) != sum(m.role == "assistant" for m in turns):
            whole, spans = template.write(turns), {}
        tagged, moved, before = bool(spans), False, 0
        for i in learned:
            asked = template.write(turns[:i], generate=True)
            if tagged:
                start, stop = spans[i]
                before = before or start
                begun = len(asked) if whole.startswith(asked) else _common_prefix_length([asked, whole], start)
                moved |= start < begun < len(asked)
                spans[i] = (begun if start < begun < stop else start), stop
                continue
            written = cut_after_end(template.write(turns[: i + 1]), ends)
            if not (whole.startswith(written) and written.startswith(asked)):
                return None
            spans[i] = len(asked), len(written)
    except ModelError:
        raise
    except Exception:  # a template's own jinja errors; `chat` reports them answer by answer
        return None
    template.check_turns(turns, whole)
    template.check_tools(turns, whole)
    cuts: list[int] = []
    for i in learned:
        start, stop = spans[i]
        stop = start + len(cut_after_end(whole[start:stop], ends))
        if not whole[:stop].endswith(tuple(ends)):
            behind = whole[stop:]
            closing = next((e for e in ends if behind.lstrip().startswith(e)), "")
            if end and not closing and i != learned[-1]:
                return None
            stop += len(behind) - len(behind.lstrip()) + len(closing) if closing else 0
        if not all(_contains(whole[:start], whole[start:stop], t) for t in (turns[i].content, turns[i].reasoning)):
            return None
        template.check_tools([turns[i]], whole[start:stop], offered=False)
        cuts += start, stop
    parts = tuple(whole[a:b] for a, b in itertools.pairwise(cuts))
    return whole[: before or cuts[0]], whole[: cuts[0]], parts, moved


def turns_with_answer(tree: PromptTree, answer: Completion | None = None) -> list[Message]:
    """All turns of a conversation: the prompt (none of it to train on), an answer (default: the only one), and what follows it."""
    before = (replace(m, trained=False) for m in turns_of_prompt(tree.prompt))
    if answer is None:
        (answer,) = tree.completions
    return [*before, answer_turn(answer), *answer.more]


def split_answers(tree: PromptTree) -> list[PromptTree]:
    """Split a conversation with several answers to train on into one tree per answer; others stay as they are."""
    if not any(c.more for c in tree.completions):
        return [tree]
    said = turns_with_answer(tree)
    bare = tuple(replace(m, trained=True) for m in said)
    (answer,) = tree.completions
    return [
        replace(tree, prompt=bare[:i], completions=(_as_answer(answer, m),))
        for i, m in enumerate(said)
        if m.role == "assistant" and m.trained
    ]


def _as_answer(answer: Completion, turn: Message) -> Completion:
    return replace(answer, text=turn.content, reasoning=turn.reasoning, tool_calls=turn.tool_calls, more=())


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def cut_after_end(text: str, ends: Sequence[str]) -> str:
    """A text cut after the first of its trailing ends, without the white space and further ends after it."""
    whole = text
    while (bare := text.rstrip()).endswith(tuple(ends)):
        end = next(e for e in ends if bare.endswith(e))
        whole, text = bare, bare[: -len(end)]
    return whole


def _contains(prompt: str, text: str, answer: str) -> bool:
    """Whether the text contains the answer, ignoring white space; the prompt may hold its start (an opened thought)."""
    wanted, begun, written = ("".join(t.split()) for t in (answer, prompt[-len(answer) :] if answer else "", text))
    return not wanted or (begun + written).find(wanted, max(0, len(begun) - len(wanted) + 1)) >= 0


def _continuation(prompt: str, whole: str, answer: str, said: Sequence[str]) -> str:
    """What follows the prompt's last words in a conversation that starts differently because the system text was moved.

    No text in `said` may stand between them and the answer: it would be trained on, and read twice.
    """
    at = max(whole.rfind(answer), 0)
    for n in range(min(len(prompt), 32), 3, -1):
        found = whole.rfind(prompt[-n:], 0, at)
        if found >= 0 and not any(text in whole[found + n : at] for text in said):
            return whole[found + n :]
    raise RowError(
        f"the chat template renders the prompt differently when an answer follows: {excerpt(prompt[-40:])} is not in {excerpt(whole)}",
        "set data.template_options to what makes both equal, or data.template=plain",
    )


def excerpt(text: str) -> str:
    """The start and the end of a text, for error messages."""
    return repr(text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}")


def end_ids(tokenizer: Any, model: Any = None) -> frozenset[int]:
    """The ids that end an answer, in training, sampling, evaluation, chat and serving alike.

    They are the tokenizer's EOS, the special token that its chat template writes after an answer, and those EOS ids of the
    model's generation config that are special tokens (a model's end of turn).
    """
    found = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i: token.content for i, token in added.items() if token.special}
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, (list, tuple)) else [named]
    found |= {
        i for i in named if (isinstance(i, int) and i in special) or i in getattr(tokenizer, "all_special_ids", ())
    }
    return frozenset(found | _template_ends(tokenizer, special))


def _template_ends(tokenizer: Any, special: Mapping[int, str]) -> set[int]:
    """The special token with which the chat template ends an answer, and the one with which it ends a turn that calls tools.

    Of several in a row, it is the last one that also follows an answer in mid-conversation: some templates end the answer
    and then the turn, others write a final token only at the end of the conversation.
    """
    if not uses_chat("auto", tokenizer):
        return set()
    ids = {content: i for i, content in special.items() if content}
    known = any_of(ids)
    asked, answer = Message("user", "Which?"), Message("assistant", ANSWER)

    def run(turns: Sequence[Message]) -> list[str]:
        found: list[str] = []
        behind = _try_write(tokenizer, form, turns).rpartition(ANSWER)[2].lstrip()
        while (match := known.match(behind)) is not None:
            found.append(match[0])
            behind = behind[match.end() :]
        return found

    form = _form(tokenizer, False)
    last, within = run((asked, answer)), run((asked, answer, Message("user", "Why?")))
    both = [a for a, b in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(last, within, strict=False))]
    ends = {*(both[-1:] or last[:1])}
    tools = _form(tokenizer, True)
    if "calls" not in tools.lacks:
        call = {"id": "call12345", "type": "function", "function": {"name": NAME, "arguments": {"eland": VALUE}}}
        once, twice = (
            _try_write(tokenizer, tools, (asked, Message("assistant", "", tool_calls=json.dumps([call] * n)))).rstrip()
            for n in (1, 2)
        )
        closing = next((c for c in sorted(ids, key=len, reverse=True) if VALUE in once and once.endswith(c)), "")
        opened = _write_tail(tokenizer, form, asked)
        if closing and closing not in opened and (not twice or once.count(closing) == twice.count(closing)):
            ends.add(closing)
    return {ids[e] for e in ends}


def _write_tail(tokenizer: Any, form: Form, asked: Message) -> str:
    """The generation prompt that the template appends."""
    bare, given = _try_write(tokenizer, form, (asked,)), ""
    with suppress(Exception):  # the template's own jinja errors
        given = _write(tokenizer, form, (asked,), {}, add_generation_prompt=True)
    return given[len(bare) :] if given.startswith(bare) else ""


def set_eos_token_ids(model: Any, tokenizer: Any) -> None:
    """Set the generation config's EOS ids to those that end an answer, the tokenizer's first, so that any loader stops there."""
    ends = sorted(end_ids(tokenizer, model), key=lambda i: (i != tokenizer.eos_token_id, i))
    config = getattr(model, "generation_config", None)
    if ends and config is not None:
        config.eos_token_id = ends[0] if len(ends) == 1 else ends
