"""Read a row's fields as text, messages, numbers or labels; a `RowError` says what is wrong with one that does not fit."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from penchant.base.text import printable
from penchant.data.read.source import Missing, without_nulls
from penchant.types import Completion, Message, Prompt, PromptTree

CALLERS = frozenset({"function_call", "tool_call"})  # LLaMA-Factory's and ms-swift's turns whose content is a call
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", *CALLERS), "assistant"),
    **dict.fromkeys(("tool", "tool_response", "function", "observation", "ipython"), "tool"),
    "system": "system",
    "developer": "developer",
}
ANSWERERS = frozenset(name for name, role in ROLES.items() if role == "assistant")
INSTRUCTS = ("system", "developer")


class RowError(Exception):
    """A row that does not fit its layout: what is wrong, and how to fix it."""

    def __init__(self, what: str, how: str) -> None:
        super().__init__(what)
        self.what, self.how = what, how


NOTHING_WRONG = "nothing is wrong with it"  # start of the advice for a valid row that holds nothing to train on


class LeftOut(RowError):
    """A valid row that a layout option leaves out, e.g. a tie. It is counted and kept aside, and never stops loading."""


def shown(value: Any, length: int = 40) -> str:
    """Any value as a short text for an error message."""
    try:
        return str(value)[:length]
    except ValueError:  # an int with more digits than Python prints
        return "a number of very many digits"


def text(row: Mapping[str, Any], name: str) -> str:
    """A field as non-empty text."""
    if name not in row:
        columns = ", ".join(map(printable, sorted(map(str, row))))
        how = f"there are {columns}; map columns with --column {name}=YOURS, in a config data.columns"
        raise RowError(f'"{name}" is missing', how)
    return as_text(row[name], f'"{name}"')


def as_text(value: Any, what: str) -> str:
    """A value as non-empty text; `what` names it in error messages."""
    if value is None:
        raise RowError(f"{what} is null", "give it a text or drop the row")
    if isinstance(value, Missing):
        how = "give it a text or drop the row; if an answer is literally that, use JSONL"
        raise RowError(f"{what} is {value.strip()}, a table's marker for a missing value", how)
    if not isinstance(value, str):
        kind = {bool: "boolean", int: "number", float: "number"}.get(type(value), type(value).__name__)
        raise RowError(f"{what} is a {kind} ({shown(value)})", "make it a string")
    if not value.strip():
        raise RowError(f"{what} is empty", "give it a text or drop the row")
    return value


def messages(row: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    """A field as a list of chat messages (role/content, or from/value)."""
    value: Any = row.get(name)
    if not _is_list(value):
        raise RowError(f'"{name}" is not a list of messages', 'write [{"role": "user", "content": "..."}, ...]')
    turns = [as_message(turn, f'"{name}"[{i}]') for i, turn in enumerate(value)]
    repeated = _repeated_calls(value)
    merged: list[Message] = []
    for i, turn in enumerate(turns):
        if i in repeated:
            both_calls = json.loads(merged[-1].tool_calls) + json.loads(turn.tool_calls)
            merged[-1] = replace(merged[-1], tool_calls=as_json(both_calls))
        else:
            merged.append(turn)
        if turn.role == "tool" and (not i or turns[i - 1].role not in ("assistant", "tool")):
            raise RowError(f'"{name}"[{i}] is a tool turn that follows no assistant turn', "let it follow the call")
    return tuple(merged)


def _repeated_calls(turns: Sequence[Any]) -> set[int]:
    """The turns that call after a call: such files list parallel calls as consecutive turns."""
    is_call = [isinstance(t, Mapping) and t.get("role", t.get("from")) in CALLERS for t in turns]
    return {i for i in range(1, len(turns)) if is_call[i - 1] and is_call[i]}


def raw_turns(row: Mapping[str, Any], name: str) -> list[Any]:
    """The file's turn of each message of `messages`: the first one of parallel calls."""
    repeated = _repeated_calls(row[name])
    return [turn for i, turn in enumerate(row[name]) if i not in repeated]


RATING_COLUMNS = (
    "feedback",
    "user_feedback",
    "human_feedback",
    "rating",
    "thumbs",
    "thumb",
    "vote",
    "liked",
    "reaction",
)


def reject_rated(row: Mapping[str, Any], where: str = "") -> None:
    """Reject an answer that a column (or a key of its turn) rates, since it would be trained on regardless of the rating.

    Raises:
        RowError: there is such a rating.
    """
    for name in RATING_COLUMNS:
        value = row.get(name)
        if value is None:
            continue
        if finite(value) is not None or isinstance(value, bool) or shown(value).strip().lower() in LABELS:
            what = f'"{name}"{where} rates the answer ({shown(value)}), but it would be trained on regardless'
            how = f"use it as a label (--column label={name}; data.columns in a config) or a score (score={name})"
            raise RowError(what, f"{how}, or set it aside with --column ignored={name}")


def is_trained(turn: Any) -> bool:
    """Whether to train on an assistant turn, by its "weight" (0 or 1, OpenAI and Mistral), "train" or "training" (Axolotl).

    Raises:
        RowError: the weight is neither 0 nor 1.
    """
    for name in ("weight", "train", "training"):
        value = turn.get(name) if isinstance(turn, Mapping) else None
        if value is None:
            continue
        if finite(float(value) if isinstance(value, bool) else value) not in (0.0, 1.0):
            raise RowError(f'the "{name}" of a turn is {shown(value)!r}', "it must be 0 or 1 (false or true)")
        if not float(value):
            return False
    return True


def leave_out_untrained(row: Mapping[str, Any]) -> None:
    """Leave out a row whose last answer has weight 0.

    Raises:
        LeftOut: its weight is 0. RowError: the answer is rated, or its weight is neither 0 nor 1.
    """
    for name in ("messages", "conversations", "conversation", "completion"):
        if isinstance(row.get(name), (list, tuple)) and row[name] and isinstance(row[name][-1], Mapping):
            reject_rated(row[name][-1], f' of the last turn of "{name}"')
            if not is_trained(row[name][-1]):
                reason = f'the last turn of "{name}" has weight 0: it is not to be learned'
                raise LeftOut(reason, f"{NOTHING_WRONG}; learn the others with data.layout_options.turns=all")


# start of a message, or a list of messages, that a spreadsheet or pandas wrote into a cell as text
_WRITTEN = re.compile(r"""\s*(\[\s*)?\{\s*['"](role|from|content|value)['"]\s*:""")
_MESSAGES = frozenset(
    [
        "prompt",
        "chosen",
        "rejected",
        "completion",
        "messages",
        "conversations",
        "conversation",
        "context",
        "conversation_a",
        "conversation_b",
    ]
)


def parse_messages(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with messages in text cells parsed (JSON or a Python literal); other text stays as it is."""
    cells = {n: v for n, v in row.items() if n in _MESSAGES and isinstance(v, str) and _WRITTEN.match(v)}
    parsed = {name: _parse_messages_text(value) for name, value in cells.items()}
    return {**row, **{n: v for n, v in parsed.items() if v is not None}} if parsed else row


def _parse_messages_text(text: str) -> Any:
    """Parse a text as JSON or a Python literal; None if the result is not messages."""
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            value = parse(text)
            turns = value if isinstance(value, list) else [value]
            if turns and all(
                isinstance(t, dict) and ({"role", "content"} <= t.keys() or {"from", "value"} <= t.keys())
                for t in turns
            ):
                return value
    return None


def reject_unparsed_messages(row: Mapping[str, Any]) -> None:
    """Reject messages in text cells that could not be parsed.

    Raises:
        RowError: there are such messages.
    """
    for name, value in row.items():
        if isinstance(value, str) and _WRITTEN.match(value) and _ROLE.search(value) and _CONTENT.search(value):
            what = f'"{name}" holds messages as text that cannot be read'
            raise RowError(what, 'write them as JSON, [{"role": "user", "content": "..."}, ...], or drop the row')


_ROLE, _CONTENT = (re.compile(rf"""['"]({names})['"]\s*:""") for names in ("role|from", "content|value"))


def as_message(turn: Any, what: str) -> Message:
    """A role/content or from/value mapping as a message; `what` names it in error messages."""
    if not isinstance(turn, Mapping):
        raise RowError(f"{what} is not a message", 'write {"role": "user", "content": "..."}')
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        problem = "no role" if role is None else f"the role {shown(role)!r}"
        raise RowError(f"{what} has {problem}", f"roles are {', '.join(sorted(set(ROLES.values())))}")
    if role in CALLERS:
        return Message(
            "assistant", "", reasoning=_reasoning(turn, what), tool_calls=as_json(_tool_calls(content, what))
        )
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        content = _join_parts(content, what)
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
    if is_nonempty(calls):
        if ROLES[role] != "assistant":
            raise RowError(f"{what} is a turn of the {role} with tool calls", "only an assistant calls tools")
        tool_calls, reasoning = as_json(_tool_calls(calls, what)), _reasoning(turn, what)
        if content is not None and not isinstance(content, str):
            raise RowError(f"{what} has a content that is not text", "give it a text, or null")
        return Message("assistant", content or "", reasoning=reasoning, tool_calls=tool_calls)
    if ROLES[role] == "tool":
        if isinstance(content, (Mapping, int, float)):
            content = as_json(content)
        if not isinstance(content, str):
            raise RowError(f"{what} has no content", "give it the tool's result as text")
        call_id, name = (v if isinstance(v := turn.get(n), str) else "" for n in ("tool_call_id", "name"))
        return Message("tool", content, tool_call_id=call_id, name=name)
    if not isinstance(content, str) or not content.strip():
        raise RowError(f"{what} has no content", "give it a text or drop the row")
    return Message(ROLES[role], content, reasoning=_reasoning(turn, what))


def as_json(value: Any) -> str:
    """A value as JSON, with keys in their original order."""
    return json.dumps(value, ensure_ascii=False)


MAX_DEPTH = 100  # levels of nested JSON in a cell


def read_json(value: Any, what: str, how: str) -> Any:
    """The value of a cell, parsed if it is JSON text.

    Raises:
        RowError: the text is not JSON, or is nested more than `MAX_DEPTH` levels deep.
    """
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is not JSON ({shown(value)})", how) from error
    level = [parsed]
    for _ in range(MAX_DEPTH):
        level = [i for v in level if isinstance(v, (dict, list)) for i in (v.values() if isinstance(v, dict) else v)]
    if level:
        raise RowError(f"{what} is nested more than {MAX_DEPTH} deep", how)
    return parsed


_CALL = 'write {"type": "function", "function": {"name": "...", "arguments": {...}}}'


def _tool_calls(value: Any, what: str) -> list[dict[str, Any]]:
    """Tool calls in the form that every chat template knows, with arguments as objects."""
    parsed = read_json(value, f"{what}: its call", _CALL)
    if not parsed:
        raise RowError(f"{what} has an empty tool call", _CALL)
    return [_tool_call(c, what) for c in (parsed if isinstance(parsed, (list, tuple)) else [parsed])]


def _tool_call(call: Any, what: str) -> dict[str, Any]:
    call = read_json(call, f"{what}: its call", _CALL)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if isinstance(function, str):  # {"function": "name", "arguments": ...}
        function = {**call, "name": function}
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise RowError(f"{what}: a tool call names no function", _CALL)
    raw_arguments: Any = next((function[n] for n in ("arguments", "parameters") if function.get(n) is not None), {})
    arguments = read_json(
        raw_arguments or {}, f"{what}: what {name} is called with", 'write an object, {"city": "Paris"}'
    )
    if not isinstance(arguments, Mapping):
        raise RowError(f"{what}: the arguments of {name} are not an object", 'write an object, {"city": "Paris"}')
    call_id = {"id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else {}
    return {**call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


_TOOL = 'write [{"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}, ...]'


def tools(row: Mapping[str, Any]) -> str:
    """A row's "tools" (or OpenAI's older "functions") as JSON; empty if it has none.

    Raises:
        RowError: they are not a list of function descriptions.
    """
    for column in ("tools", "functions"):
        value = row.get(column)
        if not is_nonempty(value):
            continue
        parsed = read_json(value, f'"{column}"', _TOOL)
        entries = [parsed] if isinstance(parsed, Mapping) else parsed
        if not isinstance(entries, (list, tuple)):
            raise RowError(f'"{column}" is not a list of tools', _TOOL)
        normalized = []
        for i, tool in enumerate(entries):
            place = f'"{column}"[{i}]'
            tool = read_json(tool, place, _TOOL)
            function = tool.get("function", tool) if isinstance(tool, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
                raise RowError(f"{place} is not a description of a function", _TOOL)
            is_bare = function is tool
            wrapped = (
                {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} if is_bare else tool
            )
            normalized.append(wrapped if isinstance(value, str) else without_nulls(wrapped))
        if normalized:
            return as_json(normalized)
    return ""


def template_options(row: Mapping[str, Any]) -> str:
    """A row's "chat_template_kwargs" as JSON; empty if there are none.

    Raises:
        RowError: it is not an object, or sets an argument that a row may not set.
    """
    name = "chat_template_kwargs"
    value = row.get(name)
    if not is_nonempty(value):
        return ""
    parsed = read_json(value, f'"{name}"', 'write {"enable_thinking": false}')
    if not isinstance(parsed, Mapping):
        raise RowError(f'"{name}" is not an object', 'write {"enable_thinking": false}')
    options = {str(k): v for k, v in parsed.items() if v is not None}
    if forbidden := sorted(options.keys() & NOT_OPTIONS):
        raise RowError(f'"{name}" holds {forbidden[0]}, which a row may not set', "take it out")
    return as_json(options) if options else ""


# arguments of `apply_chat_template` that are not variables of the template
NOT_OPTIONS = frozenset(
    ["conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding",
     "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"]
)  # fmt: skip


def _reasoning(turn: Mapping[str, Any], what: str) -> str:
    """The reasoning of an assistant turn, under any of the names in use."""
    values = {n: v for n in ("reasoning_content", "reasoning", "thinking") if (v := turn.get(n)) not in (None, "")}
    for name, value in values.items():
        if not isinstance(value, str) or turn.get("role", turn.get("from")) not in ANSWERERS:
            raise RowError(f'{what} has a "{name}" that is not text of an assistant', "take it out, or drop the row")
    if len(set(values.values())) > 1:
        raise RowError(f"{what} has {' and '.join(values)}, which differ", "keep one of them")
    return next(iter(values.values()), "")


Answer = str | Message


def completion(answer: Answer, label: bool | None = None, score: float | None = None) -> Completion:
    """An answer (text or a turn) as a `Completion` with its label and score."""
    if isinstance(answer, str):
        return Completion(answer, label, score)
    return Completion(answer.content, label, score, reasoning=answer.reasoning, tool_calls=answer.tool_calls)


def _join_parts(parts: Sequence[Any], what: str) -> str:
    """The text of a content given as a list of parts, concatenated as chat templates do."""
    texts = []
    for part in parts:
        part_text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
        if not isinstance(part_text, str):
            kind = part.get("type") if isinstance(part, Mapping) else None
            description = (
                f"a part of type {shown(kind)}" if isinstance(kind, str) and kind != "text" else "something else"
            )
            raise RowError(
                f"{what} holds {description}, not text", PICTURES if str(kind).startswith("image") else OTHER_MEDIA
            )
        texts.append(part_text)
    return join_texts(texts)


def join_texts(texts: Iterable[str]) -> str:
    """Concatenate the texts of content parts with nothing between them. Used for both files and requests."""
    return "".join(texts)


def last_answer_tree(messages: tuple[Message, ...], name: str) -> PromptTree:
    """A conversation as a tree: its last answer as the completion, the turns before it (at least one) as the prompt."""
    before, answer = split_last_answer(messages, name)
    if not before:
        raise RowError(f'"{name}" has no turn before the answer', "give the prompt as a user turn")
    reject_consecutive_answers(before, name)
    return PromptTree(before, (completion(answer),))


def reject_consecutive_answers(before: Sequence[Message], name: str) -> None:
    """Reject an answer right after another assistant turn; only a separate prompt may end with a prefix to continue.

    Raises:
        RowError: the turns before the answer end with an assistant turn.
    """
    if before and before[-1].role == "assistant":
        raise RowError(f'"{name}" ends with two assistant turns', "make them one, or put a user turn between them")


def split_last_answer(messages: tuple[Message, ...], name: str) -> tuple[tuple[Message, ...], Message]:
    """The turns before the last one, and the last one, which must be an assistant turn."""
    if messages[-1].role != "assistant":
        raise RowError(f'"{name}" does not end with an assistant turn', "the last turn must be the answer")
    return messages[:-1], messages[-1]


def system_turn(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The system prompt of a row's column as a message; empty if the column is missing, null or blank."""
    for name in ("system", "system_prompt"):
        value = row.get(name)
        if not is_missing(value):
            return (Message("system", as_text(value, f'"{name}"')),)
    return ()


def with_system(row: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Messages with the row's system prompt in front. Their own, if any, takes precedence, as in LLaMA-Factory."""
    return messages if messages and messages[0].role in INSTRUCTS else system_turn(row) + messages


def prompt_with_system(row: Mapping[str, Any], prompt: Prompt) -> Prompt:
    """A prompt preceded by the row's system prompt (a text becomes a user turn); unchanged if there is none."""
    if isinstance(prompt, tuple):
        return with_system(row, prompt)
    system = system_turn(row)
    return (*system, Message("user", prompt)) if system else prompt


def as_user_turn(question: str) -> tuple[Message, ...]:
    """A question as a user turn."""
    return (Message("user", question),)


def join_prompt(row: Mapping[str, Any], before: tuple[Message, ...]) -> tuple[Message, ...]:
    """All turns before an answer: those of the prompt, then those before it in its own column, without repetition.

    Raises:
        RowError: the prompt and the turns before the answer belong to different conversations.
    """
    if "prompt" not in row and before:
        return before
    row_prompt = prompt(row) if not before or row["prompt"] else ()
    if isinstance(row_prompt, str):
        return (Message("user", row_prompt), *before) if not before or before[0].role == "assistant" else before
    prompt_turns = row_prompt[1:] if row_prompt and row_prompt[0].role in INSTRUCTS else row_prompt
    turns_before = before[1:] if before and before[0].role in INSTRUCTS else before
    if not before or before[0].role == "assistant":
        return (*row_prompt, *before)
    if turns_before[: len(prompt_turns)] != prompt_turns and turns_before[-len(prompt_turns) :] != prompt_turns:
        what = "the messages before the answer do not go on from those of the prompt"
        raise RowError(what, "the answer's column must repeat the prompt, or hold the answer alone")
    return before if before[0].role in INSTRUCTS else (*row_prompt[: len(row_prompt) - len(prompt_turns)], *before)


def prompt(row: Mapping[str, Any], name: str = "prompt") -> Prompt:
    """A prompt as text, or as chat messages."""
    return messages(row, name) if isinstance(row.get(name), list) else text(row, name)


def reject_media(row: Mapping[str, Any]) -> None:
    """Reject rows with images, audio or video.

    Raises:
        RowError: such a column is not empty.
    """
    for name in ("images", "videos", "audios", "image", "video", "audio"):
        if is_nonempty(row.get(name)):
            raise RowError(f'"{name}" is not empty', PICTURES if name.startswith("image") else OTHER_MEDIA)


PICTURES = (
    "to train a vision-language model on pictures, set model.vision=frozen (docs/vision.md); otherwise drop the row"
)
OTHER_MEDIA = "penchant reads text, and pictures beside it; drop the row"


def is_missing(value: Any) -> bool:
    """Whether a cell is null, NaN, white space, or a table's marker for a missing value."""
    return (
        value is None or value != value or isinstance(value, Missing) or (isinstance(value, str) and not value.strip())
    )


def is_nonempty(value: Any) -> bool:
    """Whether a cell is not empty; texts such as "[]" and "null" count as empty."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null", "None", "nan") and not isinstance(value, Missing)
    return bool(value) and bool(value == value)


def finite(value: Any) -> float | None:
    """A value as a finite number; None if it is not one (booleans do not count)."""
    try:
        converted = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        return None
    return converted if math.isfinite(converted) else None


def score(row: Mapping[str, Any], *names: str) -> float | None:
    """The first of the named fields that is not null, as a finite number; None if all are."""
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        parsed = finite(value)
        if parsed is None:
            raise RowError(f'"{name}" is {shown(value)!r}', "make it a finite number")
        return parsed
    return None


def number(row: Mapping[str, Any], name: str) -> float:
    """A required field as a finite number."""
    value = score(row, name)
    if value is None:
        raise RowError(f'"{name}" is missing', "give a finite number")
    return value


def index(row: Mapping[str, Any], name: str) -> int:
    """A field that must be 0 or 1."""
    value = number(row, name)
    if value not in (0.0, 1.0):
        raise RowError(f'"{name}" is {shown(row[name])!r}', "it must be 0 or 1")
    return int(value)


LABELS = {
    **dict.fromkeys(("true", "1", "1.0", "yes", "good", "chosen", "desirable"), True),
    **dict.fromkeys(("thumbs_up", "thumbs up", "thumbsup", "up", "like", "positive", "\U0001f44d"), True),
    **dict.fromkeys(("false", "0", "0.0", "-1", "-1.0", "no", "bad", "rejected", "undesirable"), False),
    **dict.fromkeys(("thumbs_down", "thumbs down", "thumbsdown", "down", "dislike", "negative", "\U0001f44e"), False),
}


def label(row: Mapping[str, Any], name: str) -> bool:
    """A field as good (True) or bad (False)."""
    if row.get(name) is None:
        raise RowError(f'"{name}" is missing', "give true (a good answer) or false (a bad one)")
    is_good = LABELS.get(shown(row[name]).strip().lower())
    if is_good is None:
        raise RowError(f'"{name}" is {shown(row[name])!r}', "give true or false (or 1 or 0, good or bad)")
    return is_good


def holds_list(row: Mapping[str, Any], name: str, *keys: str) -> bool:
    """Whether a field is a list whose first item is a mapping with these keys."""
    value: Any = row.get(name)
    return _is_list(value) and isinstance(value[0], Mapping) and all(k in value[0] for k in keys)


def _is_list(value: Any) -> bool:
    """Whether a value is a non-empty list."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) > 0


def items(row: Mapping[str, Any], name: str) -> Sequence[Any]:
    """A field as a non-empty list."""
    value: Any = row.get(name)
    if not _is_list(value):
        raise RowError(f'"{name}" is not a list', "give a list with something in it")
    return value


def mapping(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A field as a mapping."""
    value = row.get(name)
    if not isinstance(value, Mapping):
        raise RowError(f'"{name}" is not an object', 'write {"...": ...}')
    return value
