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
    variables = dict(options or {})
    if (day := variables.pop(DATE, None)) is not None and writes_date(tokenizer):
        variables["chat_template"] = _date_macro(day) + tokenizer.get_chat_template(tools=variables.get("tools"))
    return variables


@cache
def _date_macro(day: str) -> str:
    """A macro that replaces the template's clock, since transformers passes no functions to templates."""
    moment = datetime.fromisoformat(day)
    codes = [f"%{flag}{letter}" for flag in ("", "-") for letter in ascii_letters]
    replacements = [("%%", "\0"), *((c, s) for c in codes if "%" not in (s := moment.strftime(c))), ("\0", "%")]
    filters = "".join(f" | replace({json.dumps(code)}, {json.dumps(value)})" for code, value in replacements)
    return f"{{% macro {DATE}(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n"  # on its own line because of trim_blocks


def unread_options(tokenizer: Any, options: Iterable[str]) -> str:
    """A note on options that the chat template does not read; empty if it reads all."""
    words = set(re.findall(r"\w+", str(getattr(tokenizer, "chat_template", None))))
    unread = sorted({*options} - words)
    notes = [f'{name} (did you mean "{word}"?)' if (word := closest(name, words, 0.8)) else name for name in unread]
    return f"the chat template does not read {' and '.join(notes)}" if notes else ""


# ---- Calling a chat template: its variables besides the turns, and the form in which it takes turns ----

# words found nowhere else
NAME, VALUE, RESULT, QUESTION, ANSWER = ("find_lynx", "Gnu1717", "Ibex4242", "Kudu0815", "Zebra4711.")


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
    turns = (Message("user", QUESTION), Message("assistant", ANSWER))
    for form in (Form(), Form(parts=True)):
        text = _try_write(tokenizer, form, turns)
        if QUESTION in text and ANSWER in text:
            return form
    return Form()


def _tool_form(tokenizer: Any, base_form: Form) -> Form:
    tool = {
        "name": NAME,
        "description": "?",
        "parameters": {"type": "object", "properties": {"eland": {"type": "string"}}},
    }
    variables = {"tools": [{"type": "function", "function": tool}]}
    call = {"id": "call12345", "type": "function", "function": {"name": NAME, "arguments": {"eland": VALUE}}}
    question = Message("user", QUESTION)
    tool_call = Message("assistant", "", tool_calls=json.dumps([call]))
    turns = (
        question,
        tool_call,
        Message("tool", RESULT, tool_call_id="call12345", name=NAME),
        Message("assistant", ANSWER),
    )
    forms = [base_form._replace(empty=empty, text=text) for empty in ("", None) for text in (False, True)]
    lacks: set[str] = set()
    offer_text = _try_write(tokenizer, base_form, (question,), variables)
    if offer_text and NAME not in offer_text:
        lacks.add("tools")
    working_form = None
    for form in forms:
        text = _try_write(tokenizer, form, turns, variables)
        if text and RESULT not in text:
            lacks.add("results")
        if VALUE in text and not any(wrong in text for wrong in ("'eland'", '\\"eland')):
            working_form = form
            break
        if text:
            lacks.add("calls")
    return (working_form or base_form)._replace(lacks=frozenset(lacks - {"calls"} if working_form else lacks))


def _try_write(tokenizer: Any, form: Form, turns: Sequence[Message], variables: Mapping[str, Any] | None = None) -> str:
    try:
        return _write(tokenizer, form, turns, dict(variables or {}))
    except ModelError:
        raise
    except Exception:  # a template's own jinja errors: it may refuse such turns
        return ""


def _write(tokenizer: Any, form: Form, turns: Sequence[Message], variables: Mapping[str, Any], **how: bool) -> str:
    template_turns = [_as_template_turn(m, form, tokenizer) for m in turns]
    return str(tokenizer.apply_chat_template(template_turns, tokenize=False, **how, **variables))


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
        options: `data.template_options`; variables: the row's own variables (tools, options), which take precedence.
    """

    def __init__(
        self, tokenizer: Any, options: Mapping[str, Any] | None = None, variables: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._variables = _fix_date(tokenizer, {**(options or {}), **(variables or {})})

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        return self._variables.get("tools") or ()

    def _form_for(self, turns: Sequence[Message]) -> Form:
        return _form(self.tokenizer, bool(self.tools) or any(m.tool_calls or m.role == "tool" for m in turns))

    def write(self, turns: Sequence[Message], *, generate: bool = False) -> str:
        """The turns as text; `generate`: with the generation prompt for the next answer."""
        form = self._form_for(turns)
        return _write(self.tokenizer, form, turns, self._variables, add_generation_prompt=generate)

    def render_prompt(self, turns: Sequence[Message]) -> str:
        """The text before an answer; if the last turn is an assistant's, the answer continues it (`continue_final_message`)."""
        if not continues(turns):
            return self.write(turns, generate=True)
        return _write(self.tokenizer, self._form_for(turns), turns, self._variables, continue_final_message=True)

    def answer_spans(self, turns: Sequence[Message]) -> tuple[str, dict[int, tuple[int, int]]]:
        """The turns as text, and the (start, end) of each assistant turn's ``{% generation %}`` span; empty without such tags."""
        from transformers.utils.chat_template_utils import render_jinja_template

        variables = dict(self._variables)
        template = variables.pop("chat_template", None) or self.tokenizer.get_chat_template(
            tools=variables.get("tools")
        )
        if not _GENERATION.search(template):
            return "", {}
        form = self._form_for(turns)
        rendered: Any = render_jinja_template(
            [[_as_template_turn(m, form, self.tokenizer) for m in turns]],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **variables},
        )
        (text,), (spans,) = rendered
        answers = [i for i, m in enumerate(turns) if m.role == "assistant"]
        if len(spans) != len(answers):
            return text, {}
        return text, {i: (start, stop) for i, (start, stop) in zip(answers, spans, strict=True)}

    def check_turns(self, turns: Sequence[Message], text: str) -> None:
        """Check that the text contains all system, developer and user turns, ignoring white space.

        Raises:
            RowError: the template leaves something out, e.g. because it does not support system turns.
        """
        flat = ""
        for m in turns:
            if m.role in ASKING and m.content.strip() not in text:
                flat = flat or "".join(text.split())
                if any("".join(part.split()) not in flat for part in MARK.split(m.content)[::2]):  # around pictures
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
        unsupported = next(
            (
                description
                for name, present, description in (
                    ("tools", tools, "the tools"),
                    ("calls", calls, "tool calls"),
                    ("results", results, "what tools answer"),
                )
                if present and name in lacks
            ),
            "",
        )
        if missing := unsupported or _first_missing(turns, tools, text):
            how = "take a model whose chat template writes tools (see `Conversations and tools` in the docs), or drop the row"
            raise RowError(f"the chat template leaves out {missing}", how)


def _first_missing(turns: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: str) -> str:
    """The first tool, call or result missing from a text, ignoring white space and JSON escapes; empty if none is."""
    flat, position = "".join(text.split()), 0

    def end_of(value: Any) -> int:  # the position after it; -1 if it is missing
        written = value if isinstance(value, str) else json.dumps(value)
        spellings = {
            "".join(spelling.split())
            for spelling in (written, json.dumps(written, ensure_ascii=False)[1:-1], json.dumps(written)[1:-1])
        }
        spellings |= {str(value)} if not isinstance(value, str) else set()
        return max(
            (start + len(spelling) for spelling in spellings if (start := flat.find(spelling, position)) >= 0),
            default=-1,
        )

    for tool in tools:
        name = tool.get("function", tool).get("name", "")
        if end_of(name) < 0:
            return f"the tool {name}"
    for m in turns:
        end = end_of(m.content) if m.role not in ("system", "developer") else -1
        if end < 0 and m.role == "tool":
            return f"what a tool answered ({excerpt(m.content)})"
        for call in json.loads(m.tool_calls or "[]"):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if any(end_of(leaf) < 0 for leaf in (name, *_leaves(arguments))):
                return f"a call of {name} ({excerpt(json.dumps(arguments, ensure_ascii=False))})"
        position = max(position, end)
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
    last = turns[-1]
    return [*turns[:-1], replace(last, content=last.content + answer.content, tool_calls=answer.tool_calls)]


def turns_of_prompt(prompt: Prompt) -> tuple[Message, ...]:
    """A prompt as turns; a text becomes a user turn."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def plain(tree: PromptTree) -> Rendered:
    """Text prompts as they are; chat prompts as a ``\\n\\nHuman: ...\\n\\nAssistant:`` transcript."""
    turns = () if isinstance(tree.prompt, str) else tree.prompt
    features = (
        ("separate reasoning", any(c.reasoning for c in tree.completions)),
        ("tools", tree.tools or any(m.role == "tool" or m.tool_calls for m in turns)),
        ("tool calls", any(c.tool_calls for c in tree.completions)),
        ("chat_template_kwargs", tree.template_options),
    )
    for feature, present in features:
        if present:
            how = "take a tokenizer with a chat template, put it into the content, or take it out"
            raise RowError(f"it has {feature}, which only a chat template can write", how)
    texts = tuple(c.text for c in tree.completions)
    if isinstance(tree.prompt, str):
        return Rendered(tree.prompt, texts)
    transcript = "".join(f"\n\n{PLAIN_NAMES[m.role]}: {m.content}" for m in turns)
    if continues(turns):
        return Rendered(transcript, texts)
    return Rendered(f"{transcript}\n\nAssistant:", tuple(f" {t.lstrip()}" for t in texts))


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
    conversations = [with_answer(turns, answer_turn(c)) for c in tree.completions]
    try:
        prompt = template.render_prompt(turns)
        full_texts = list(map(template.write, conversations))
        moved = not all(full_text.startswith(prompt) for full_text in full_texts)
        unanswered = template.write(turns[: len(turns) - continues(turns)]) if moved else ""
    except (ModelError, RowError):  # a template that does not terminate would not do so for other rows either
        raise
    except Exception as error:  # templates raise jinja errors of their own, e.g. for an unsupported system turn
        raise RowError(f"the chat template refuses it ({error})", "fix the turns or set data.template=plain") from error
    change = ""
    if moved and all(full_text.startswith(unanswered) for full_text in full_texts):
        prompt, change = prompt[: _common_prefix_length([prompt, *full_texts], len(unanswered))], "shared"
    elif moved:
        answers = [c.text.strip() for c in tree.completions]
        prompt_parts = [t.strip() for m in turns for t in MARK.split(m.content)[::2] if t.strip()]
        full_texts = [
            prompt + _continuation(prompt, full_text, answer, prompt_parts)
            for full_text, answer in zip(full_texts, answers, strict=True)
        ]
        change = "forced"
    texts = tuple(full_text[len(prompt) :] for full_text in full_texts)
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
        for full_text, messages in zip(full_texts or [prompt], conversations or [list(turns)], strict=True):
            template.check_turns(turns, full_text)
            template.check_tools(messages, full_text)
    return Rendered(prompt, texts, change)


def _common_prefix_length(texts: Sequence[str], min_length: int) -> int:
    """The length of the texts' common prefix without a word that it cuts, but at least `min_length`."""
    shared = os.path.commonprefix(texts)  # noqa: RUF071 (characters, not paths)
    word_end = re.match(r"(?s).*[\s>\])}:]", shared)  # never cut after the "<" that "<think>" and "<b>" share
    return max(min_length, word_end.end() if word_end else 0)


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
    rendered = [_render_in_one(template, turns_with_answer(tree, c), ends, end) for c in tree.completions]
    complete = [m for m in rendered if m is not None]
    if len(complete) < len(rendered) or len({text for text, *_ in complete}) > 1:
        return None
    # an opened thought may be shared with one of them only
    prompts = [p for _, p, *_ in complete]
    prompt = min(prompts, key=len)
    if not all(p.startswith(prompt) for p in prompts):
        return None
    parts = tuple((p[len(prompt) :] + first, *more) for _, p, (first, *more), _ in complete)
    moved = "shared" if any(m for *_, m in complete) else ""
    return Rendered(prompt, tuple(map("".join, parts)), moved, turns=parts)


def _render_in_one(
    template: ChatTemplate, turns: Sequence[Message], ends: Sequence[str], end: bool
) -> tuple[str, str, tuple[str, ...], bool] | None:
    """Render one conversation for `conversation`, or return None as it does.

    Returns:
        The text before the tags of the first answer to train on, the prompt for that answer, the parts after it, and whether the
        conversation contains only a part of some answer's prompt.
    """
    trained = [i for i, m in enumerate(turns) if m.role == "assistant" and m.trained]
    try:
        text, spans = template.answer_spans(turns)
        if len(spans) != sum(m.role == "assistant" for m in turns):
            text, spans = template.write(turns), {}
        tagged, moved, first_start = bool(spans), False, 0
        for i in trained:
            prompt = template.write(turns[:i], generate=True)
            if tagged:
                start, stop = spans[i]
                first_start = first_start or start
                prompt_end = len(prompt) if text.startswith(prompt) else _common_prefix_length([prompt, text], start)
                moved |= start < prompt_end < len(prompt)
                spans[i] = (prompt_end if start < prompt_end < stop else start), stop
                continue
            written = cut_after_end(template.write(turns[: i + 1]), ends)
            if not (text.startswith(written) and written.startswith(prompt)):
                return None
            spans[i] = len(prompt), len(written)
    except ModelError:
        raise
    except Exception:  # a template's own jinja errors; `chat` reports them answer by answer
        return None
    template.check_turns(turns, text)
    template.check_tools(turns, text)
    cuts: list[int] = []
    for i in trained:
        start, stop = spans[i]
        stop = start + len(cut_after_end(text[start:stop], ends))
        if not text[:stop].endswith(tuple(ends)):
            rest = text[stop:]
            closing = next((e for e in ends if rest.lstrip().startswith(e)), "")
            if end and not closing and i != trained[-1]:
                return None
            stop += len(rest) - len(rest.lstrip()) + len(closing) if closing else 0
        if not all(_contains(text[:start], text[start:stop], t) for t in (turns[i].content, turns[i].reasoning)):
            return None
        template.check_tools([turns[i]], text[start:stop], offered=False)
        cuts += start, stop
    parts = tuple(text[a:b] for a, b in itertools.pairwise(cuts))
    return text[: first_start or cuts[0]], text[: cuts[0]], parts, moved


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
    turns = turns_with_answer(tree)
    context = tuple(replace(m, trained=True) for m in turns)
    (answer,) = tree.completions
    return [
        replace(tree, prompt=context[:i], completions=(_as_answer(answer, m),))
        for i, m in enumerate(turns)
        if m.role == "assistant" and m.trained
    ]


def _as_answer(answer: Completion, turn: Message) -> Completion:
    return replace(answer, text=turn.content, reasoning=turn.reasoning, tool_calls=turn.tool_calls, more=())


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def cut_after_end(text: str, ends: Sequence[str]) -> str:
    """A text cut after the first of its trailing ends, without the white space and further ends after it."""
    cut = text
    while (stripped := text.rstrip()).endswith(tuple(ends)):
        end = next(e for e in ends if stripped.endswith(e))
        cut, text = stripped, stripped[: -len(end)]
    return cut


def _contains(prompt: str, text: str, answer: str) -> bool:
    """Whether the text contains the answer, ignoring white space; the prompt may hold its start (an opened thought)."""
    wanted, tail, written = ("".join(t.split()) for t in (answer, prompt[-len(answer) :] if answer else "", text))
    return not wanted or (tail + written).find(wanted, max(0, len(tail) - len(wanted) + 1)) >= 0


def _continuation(prompt: str, full_text: str, answer: str, forbidden_texts: Sequence[str]) -> str:
    """What follows the prompt's last words in a conversation that starts differently because the system text was moved.

    No text in `forbidden_texts` may stand between them and the answer: it would be trained on, and read twice.
    """
    answer_start = max(full_text.rfind(answer), 0)
    for n in range(min(len(prompt), 32), 3, -1):
        start = full_text.rfind(prompt[-n:], 0, answer_start)
        if start >= 0 and not any(text in full_text[start + n : answer_start] for text in forbidden_texts):
            return full_text[start + n :]
    raise RowError(
        f"the chat template renders the prompt differently when an answer follows: {excerpt(prompt[-40:])} is not in {excerpt(full_text)}",
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
    ids = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i: token.content for i, token in added.items() if token.special}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, (list, tuple)) else [configured]
    ids |= {
        i for i in configured if (isinstance(i, int) and i in special) or i in getattr(tokenizer, "all_special_ids", ())
    }
    return frozenset(ids | _template_ends(tokenizer, special))


def _template_ends(tokenizer: Any, special_tokens: Mapping[int, str]) -> set[int]:
    """The special token with which the chat template ends an answer, and the one with which it ends a turn that calls tools.

    Of several in a row, it is the last one that also follows an answer in mid-conversation: some templates end the answer
    and then the turn, others write a final token only at the end of the conversation.
    """
    if not uses_chat("auto", tokenizer):
        return set()
    ids = {content: i for i, content in special_tokens.items() if content}
    pattern = any_of(ids)
    question, answer = Message("user", "Which?"), Message("assistant", ANSWER)

    def ends_after(turns: Sequence[Message]) -> list[str]:
        tokens: list[str] = []
        rest = _try_write(tokenizer, form, turns).rpartition(ANSWER)[2].lstrip()
        while (match := pattern.match(rest)) is not None:
            tokens.append(match[0])
            rest = rest[match.end() :]
        return tokens

    form = _form(tokenizer, False)
    last, within = ends_after((question, answer)), ends_after((question, answer, Message("user", "Why?")))
    common = [a for a, b in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(last, within, strict=False))]
    ends = {*(common[-1:] or last[:1])}
    tool_form = _form(tokenizer, True)
    if "calls" not in tool_form.lacks:
        call = {"id": "call12345", "type": "function", "function": {"name": NAME, "arguments": {"eland": VALUE}}}
        once, twice = (
            _try_write(
                tokenizer, tool_form, (question, Message("assistant", "", tool_calls=json.dumps([call] * n)))
            ).rstrip()
            for n in (1, 2)
        )
        closing = next((c for c in sorted(ids, key=len, reverse=True) if VALUE in once and once.endswith(c)), "")
        generation_prompt = _write_tail(tokenizer, form, question)
        if closing and closing not in generation_prompt and (not twice or once.count(closing) == twice.count(closing)):
            ends.add(closing)
    return {ids[e] for e in ends}


def _write_tail(tokenizer: Any, form: Form, question: Message) -> str:
    """The generation prompt that the template appends."""
    turns_text, prompted = _try_write(tokenizer, form, (question,)), ""
    with suppress(Exception):  # the template's own jinja errors
        prompted = _write(tokenizer, form, (question,), {}, add_generation_prompt=True)
    return prompted[len(turns_text) :] if prompted.startswith(turns_text) else ""


def set_eos_token_ids(model: Any, tokenizer: Any) -> None:
    """Set the generation config's EOS ids to those that end an answer, the tokenizer's first, so that any loader stops there."""
    ends = sorted(end_ids(tokenizer, model), key=lambda i: (i != tokenizer.eos_token_id, i))
    config = getattr(model, "generation_config", None)
    if ends and config is not None:
        config.eos_token_id = ends[0] if len(ends) == 1 else ends
