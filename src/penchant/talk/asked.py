"""What a request asks for: every parameter is checked, and one that would change the answer and is not known is refused."""

from __future__ import annotations

import difflib
import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penchant.talk.stream import Sampling
from penchant.types import Message

MOST_ANSWERS = 32  # of a request, over all its prompts
MOST_STOPS = 16
MOST_LIKELIEST = 20
LEGACY_TOKENS = 16  # of /v1/completions, where nothing is said


class ApiError(Exception):
    """A refusal in OpenAI's shape.

    Args:
        param: the parameter that is wrong; code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = status, message, param, code, kind

    def to_json(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def wrong(param: str, what: str, code: str | None = None) -> ApiError:
    """A parameter that cannot be used as it is."""
    return ApiError(400, f"{param}: {what}", param=param, code=code or "invalid_value")


# what a prompt may be: messages, a text, or token ids
Prompt = tuple[Message, ...] | str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request.

    Args:
        prompts: one or several; most: tokens that were asked for, None where that was left open; stops: texts that end an answer.
        logprobs: likeliest tokens told beside each one, None: no log-probs.
    """

    model: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    most: int | None
    stops: tuple[str, ...]
    stream: bool
    usage: bool
    logprobs: int | None


def parse(data: bytes) -> Mapping[str, Any]:
    """The JSON object of a body.

    Raises:
        ApiError: it is none.
    """

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        body = json.loads(data, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error})", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    return body


# ---------------------------------------------------------------------------------------------------------------------
# values

Check = Callable[[str, Any], Any]


def _number(low: float, high: float) -> Check:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise wrong(name, f"must be a number within {low:g} and {high:g}")
        if not low <= value <= high:
            raise wrong(name, f"is {value:g}, and must be within {low:g} and {high:g}")
        return float(value)

    return check


def _whole(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong(name, f"must be a whole number within {low} and {high}")
        if not low <= value <= high:
            raise wrong(name, f"must be within {low} and {high}")
        return value

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, "must be true or false")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, "must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise wrong(name, "holds half a surrogate pair, which is no text") from error
    return value


def _stops(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MOST_STOPS:
        raise wrong(name, f"must be a string or a list of at most {MOST_STOPS} strings")
    for text in texts:
        if not _text(name, text):
            raise wrong(name, "holds an empty string")
    return tuple(texts)


def _stream_options(name: str, value: Any) -> bool:
    if not isinstance(value, dict) or set(value) - {"include_usage", "include_obfuscation"}:
        raise wrong(name, 'must be {"include_usage": true or false}')
    if value.get("include_obfuscation"):
        raise wrong(f"{name}.include_obfuscation", "is not supported")
    return _flag(f"{name}.include_usage", value.get("include_usage", False))


def _neutral(*allowed: Any) -> Check:
    """A parameter that this server does not have: only values that change nothing are taken."""

    def check(name: str, value: Any) -> None:
        if not any(type(value) is type(a) and value == a for a in allowed):
            raise wrong(name, "is not supported by this server", "unsupported_parameter")

    return check


def _ignored(_: str, value: Any) -> Any:
    return value


_SEED = _whole(-(2**63), 2**63 - 1)

COMMON: dict[str, Check] = {
    "model": _text,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _whole(0, 1_000_000),
    "n": _whole(1, MOST_ANSWERS),
    "seed": _SEED,
    "stop": _stops,
    "stream": _flag,
    "stream_options": _stream_options,
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "max_tokens": _whole(1, 2**31 - 1),
    "logit_bias": _neutral({}),
    # these say who asks or how an answer is kept, and change no answer
    "user": _ignored,
    "metadata": _ignored,
    "safety_identifier": _ignored,
    "prompt_cache_key": _ignored,
    "store": _neutral(False),
}
CHAT: dict[str, Check] = {
    **COMMON,
    "messages": _ignored,  # `_messages` reads them
    "max_completion_tokens": _whole(1, 2**31 - 1),
    "logprobs": _flag,
    "top_logprobs": _whole(0, MOST_LIKELIEST),
    "tools": _neutral([]),
    "tool_choice": _neutral("none", "auto"),
    "functions": _neutral([]),
    "function_call": _neutral("none", "auto"),
    "parallel_tool_calls": _ignored,
    "response_format": _neutral({"type": "text"}),
    "modalities": _neutral(["text"]),
    "service_tier": _neutral("auto", "default"),
    "reasoning_effort": _neutral("none"),
}
TEXT: dict[str, Check] = {
    **COMMON,
    "prompt": _ignored,  # `_prompts` reads it
    "logprobs": _whole(0, MOST_LIKELIEST),
    "echo": _neutral(False),
    "best_of": _neutral(1),
    "suffix": _neutral(""),
}


def _checked(body: Mapping[str, Any], known: Mapping[str, Check]) -> dict[str, Any]:
    found = {}
    for name, value in body.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise ApiError(
                400, f"{name[:80]} is not known to this server{hint}", param=name[:80], code="unsupported_parameter"
            )
        if value is not None:
            found[name] = known[name](name, value)
    if "stream_options" in found and not found.get("stream"):
        raise wrong("stream_options", "goes with stream: true only")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# the two endpoints


def chat_request(body: Mapping[str, Any]) -> Asked:
    """A request of /v1/chat/completions.

    Raises:
        ApiError: something in it cannot be used.
    """
    found = _checked(body, CHAT)
    if "top_logprobs" in found and not found.get("logprobs"):
        raise wrong("top_logprobs", "goes with logprobs: true only")
    if "max_tokens" in found and "max_completion_tokens" in found:
        raise wrong("max_tokens", "is given together with max_completion_tokens; keep one")
    logprobs = found.get("top_logprobs", 0) if found.get("logprobs") else None
    most = found.get("max_completion_tokens", found.get("max_tokens"))
    return _asked(found, (_messages(found.get("messages")),), most, logprobs)


def text_request(body: Mapping[str, Any]) -> Asked:
    """A request of /v1/completions.

    Raises:
        ApiError: something in it cannot be used.
    """
    found = _checked(body, TEXT)
    prompts = _prompts(found.get("prompt"))
    if len(prompts) * found.get("n", 1) > MOST_ANSWERS:
        raise wrong("prompt", f"asks for more than {MOST_ANSWERS} answers in one request")
    return _asked(found, prompts, found.get("max_tokens", LEGACY_TOKENS), found.get("logprobs"))


def _asked(found: Mapping[str, Any], prompts: tuple[Prompt, ...], most: int | None, logprobs: int | None) -> Asked:
    if "model" not in found:
        raise wrong("model", "is missing", "missing_required_parameter")
    seed = found.get("seed")
    sampling = Sampling(
        max_new_tokens=0,  # known when the prompt has been read
        n=found.get("n", 1),
        temperature=found.get("temperature", 1.0),
        top_p=found.get("top_p", 1.0),
        top_k=found.get("top_k", 0),
        seed=secrets.randbits(63) if seed is None else seed % 2**64,
        presence=found.get("presence_penalty", 0.0),
        frequency=found.get("frequency_penalty", 0.0),
        top_logprobs=logprobs,
    )
    return Asked(
        found["model"],
        prompts,
        sampling,
        most,
        found.get("stop", ()),
        found.get("stream", False),
        found.get("stream_options", False),
        logprobs,
    )


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise wrong("messages", "must be a list of at least one message", "missing_required_parameter")
    return tuple(_message(f"messages[{i}]", m) for i, m in enumerate(value))


def _message(where: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise wrong(where, "must be an object with role and content")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{where}.role", f"must be one of {', '.join(ROLES)}")
    extra = sorted(str(k) for k, v in value.items() if k not in ("role", "content") and v not in (None, [], ""))
    if extra:
        raise wrong(f"{where}.{extra[0][:80]}", "is not supported by this server", "unsupported_parameter")
    return Message(ROLES[role], _content(f"{where}.content", value.get("content")))


def _content(where: str, value: Any) -> str:
    if isinstance(value, list) and value:
        parts = []
        for i, part in enumerate(value):
            if not isinstance(part, dict) or part.get("type") != "text":
                raise wrong(f"{where}[{i}]", "must be of type text: this server reads nothing else")
            parts.append(_text(f"{where}[{i}].text", part.get("text")))
        return "".join(parts)
    return _text(where, value)


def _prompts(value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (_text("prompt", value),)
    if isinstance(value, list) and value:
        if all(isinstance(v, str) for v in value):
            return tuple(_text("prompt", v) for v in value)
        if _are_ids(value):
            return (tuple(value),)
        if all(isinstance(v, list) and _are_ids(v) for v in value):
            return tuple(tuple(v) for v in value)
    raise wrong(
        "prompt", "must be a string, token ids, or a list of either, and not empty", "missing_required_parameter"
    )


def _are_ids(value: Sequence[Any]) -> bool:
    return bool(value) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
