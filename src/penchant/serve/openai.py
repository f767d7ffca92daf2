"""OpenAI's requests, responses and errors as pydantic models. Unsupported parameters that would change the answer are refused."""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, to_json

from penchant.base.text import closest
from penchant.data.layouts import RowError
from penchant.data.layouts import fields as row
from penchant.serve.model import ChatModel
from penchant.serve.stream import Piece, Sampling, ShownToken, token_bytes, token_text
from penchant.types import Message

MAX_COMPLETIONS = 32  # per request, over all its prompts
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
TEXT_MAX_TOKENS = 16  # the default of /v1/completions

Prompt = tuple[Message, ...] | str | tuple[int, ...]
Json = dict[str, Any]


class ApiError(Exception):
    """A refusal in OpenAI's error format.

    Args:
        param: the offending parameter; code: a machine-readable error code.
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
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(param: str, what: str, code: str | None = None) -> ApiError:
    """Return the error for a parameter with an invalid value."""
    return ApiError(400, f"{param}: {what}", param=param, code=code or "invalid_value")


# ---- requests ----


def _accept_only(*allowed: Any) -> AfterValidator:
    """Accept only those values of an unsupported parameter that have no effect."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(a) and value == a for a in allowed):
            raise PydanticCustomError("unsupported_parameter", "is not supported by this server")
        return value

    return AfterValidator(check)


class _Input(BaseModel):
    """Base of all inputs: JSON types are not coerced, and null means that the parameter is absent."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if v is not None or k not in cls.model_fields}


class StreamOptions(_Input):
    include_usage: bool = False
    include_obfuscation: Annotated[Any, _accept_only(False)] = False


class TextPart(_Input):
    type: Literal["text"]
    text: str


def _check_text_part(part: Any) -> Any:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise PydanticCustomError("part_type", "must have type text; this server accepts nothing else")
    return part


Objects = list[dict[str, Any]]


def _check_role(info: Any, role: str) -> None:
    if info.data.get("role", role) != role:
        raise PydanticCustomError("unsupported_parameter", "belongs to another role")


class ChatMessage(_Input):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[Annotated[TextPart, BeforeValidator(_check_text_part)]],
        BeforeValidator(lambda value: [{"type": "text", "text": value}] if isinstance(value, str) else value),
        Field(min_length=1),
    ]
    reasoning_content: str = ""
    tool_calls: Objects = []
    tool_call_id: str = ""
    name: str = ""

    @model_validator(mode="before")
    @classmethod
    def _without_empty_extras(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        fields = {k: v for k, v in value.items() if k == "content" or v not in (None, [], "")}
        if fields.get("tool_calls") and not fields.get("content"):
            fields["content"] = ""
        return fields

    @field_validator("tool_call_id")
    @classmethod
    def _check_tool_field(cls, value: str, info: ValidationInfo) -> str:
        _check_role(info, "tool")
        return value

    @field_validator("name")
    @classmethod
    def _keep_name_of_tool(cls, value: str, info: ValidationInfo) -> str:
        """Ignore the name of a person or an assistant, which training rows do not keep either."""
        return value if info.data.get("role") == "tool" else ""

    @field_validator("reasoning_content", "tool_calls")
    @classmethod
    def _check_assistant_field(cls, value: Any, info: ValidationInfo) -> Any:
        _check_role(info, "assistant")
        if info.field_name == "tool_calls":
            _read_value(lambda: _tool_calls_json(value))
        return value

    @property
    def message(self) -> Message:
        """The message in the form that training rows are read into."""
        return Message(
            self.role,
            row.join_texts(part.text for part in self.content),
            reasoning=self.reasoning_content,
            tool_calls=_tool_calls_json(self.tool_calls) if self.tool_calls else "",
            tool_call_id=self.tool_call_id,
            name=self.name,
        )


def _tool_calls_json(calls: Objects) -> str:
    return row.as_message({"role": "assistant", "tool_calls": calls}, "it").tool_calls


def _read_value(reader: Callable[[], Any]) -> Any:
    """Return `reader()`, with the `RowError` of a row reader turned into a validation error.

    Raises:
        PydanticCustomError: the value is invalid.
    """
    try:
        return reader()
    except RowError as error:
        message = f"cannot be read: {error.what}; {error.how}".replace("{", "{{").replace("}", "}}")
        raise PydanticCustomError("invalid_value", message) from error  # type: ignore[arg-type]


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Request(_Input):
    """The parameters that both endpoints share."""

    default_max_tokens: ClassVar[int | None] = None

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    n: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] = 1
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1, default_factory=lambda: secrets.randbits(63))]
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        Field(max_length=MAX_STOPS),
    ] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    max_tokens: Count | None = None
    logit_bias: Annotated[Any, _accept_only({})] = None
    store: Annotated[Any, _accept_only(False)] = None
    # identify the caller or control storage; they do not change the answer
    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise invalid("stream_options", "goes with stream: true only")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts to complete, `n` times each."""
        raise NotImplementedError

    @property
    def template_variables(self) -> Json:
        """Extra variables for the chat template besides the messages."""
        return {}

    @property
    def max_new_tokens(self) -> int | None:
        """Requested length limit of each completion, in tokens; None for as many as fit."""
        return self.max_tokens or self.default_max_tokens

    @property
    def logprob_count(self) -> int | None:
        """Number of most likely tokens to report at each position; None for no log-probs."""
        raise NotImplementedError

    def sampling(self, max_new_tokens: int) -> Sampling:
        """Return the sampling settings, the same for every prompt of the request."""
        return Sampling(
            max_new_tokens,
            self.n,
            self.temperature,
            self.top_p,
            self.top_k,
            self.seed % 2**64,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            top_logprobs=self.logprob_count,
        )


def _validated_by(name: str, reader: Callable[[Json], str]) -> AfterValidator:
    """Validate a parameter with the reader of the row column of the same name."""

    def check(value: Any) -> Any:
        _read_value(lambda: reader({name: value}))
        return value

    return AfterValidator(check)


class ChatRequest(Request):
    """/v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    tools: Annotated[Objects, _validated_by("tools", row.tools)] = []
    chat_template_kwargs: Annotated[dict[str, Any], _validated_by("chat_template_kwargs", row.template_options)] = {}
    tool_choice: Annotated[Any, _accept_only("none", "auto")] = None
    functions: Annotated[Objects, _validated_by("functions", row.tools)] = []
    function_call: Annotated[Any, _accept_only("none", "auto")] = None
    parallel_tool_calls: Any = None
    response_format: Annotated[Any, _accept_only({"type": "text"})] = None
    modalities: Annotated[Any, _accept_only(["text"])] = None
    service_tier: Annotated[Any, _accept_only("auto", "default")] = None
    reasoning_effort: Annotated[Any, _accept_only("none")] = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if "top_logprobs" in self.model_fields_set and not self.logprobs:
            raise invalid("top_logprobs", "goes with logprobs: true only")
        if self.max_tokens and self.max_completion_tokens:
            raise invalid("max_tokens", "is given together with max_completion_tokens; keep one")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        return [tuple(m.message for m in self.messages)]

    @property
    def template_variables(self) -> Json:
        tools_json = row.tools({"tools": self.tools, "functions": self.functions})
        variables = {k: v for k, v in self.chat_template_kwargs.items() if v is not None}
        return {**variables, **({"tools": json.loads(tools_json)} if tools_json and self.tool_choice != "none" else {})}

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


TokenIds = Annotated[list[int], Field(min_length=1)]


class TextRequest(Request):
    """/v1/completions."""

    default_max_tokens = TEXT_MAX_TOKENS

    prompt: str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: Annotated[Any, _accept_only(False)] = None
    best_of: Annotated[Any, _accept_only(1)] = None
    suffix: Annotated[Any, _accept_only("")] = None

    @model_validator(mode="after")
    def _check_completion_count(self) -> Self:
        if len(self.prompts) * self.n > MAX_COMPLETIONS:
            raise invalid("prompt", f"asks for more than {MAX_COMPLETIONS} answers in one request")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        prompt: Any = self.prompt
        prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        return [p if isinstance(p, str) else tuple(p) for p in prompts]

    @property
    def logprob_count(self) -> int | None:
        return self.logprobs


CODES = {
    "json_invalid": "invalid_json",
    "missing": "missing_required_parameter",
    "too_short": "missing_required_parameter",
    "extra_forbidden": "unsupported_parameter",
    "unsupported_parameter": "unsupported_parameter",
}
SHAPES = {  # pydantic's message would describe only one of several accepted types
    "prompt": "must be a string, token ids, or a list of either, and not empty",
    "stop": f"must be a string or a list of at most {MAX_STOPS} strings, none of them empty",
}


def read_request(kind: type[Request], body: bytes) -> Request:
    """Parse a request body.

    Raises:
        ApiError: the body is not JSON, or a parameter is invalid (the first one is named).
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    location, what, code = first["loc"], first["msg"], CODES.get(first["type"], "invalid_value")
    if not location:
        raise ApiError(400, f"the body is not a JSON object ({what})", code="invalid_json")
    name = str(location[0])
    if name in ("messages", "stream_options"):  # for other parameters the rest is an index or a branch of a union
        name += "".join(f"[{p}]" if isinstance(p, int) else f".{p[:80]}" for p in location[1:])
    elif name in SHAPES:
        what = SHAPES[name]
    elif code == "unsupported_parameter" and name not in kind.model_fields:
        suggestion = closest(name, kind.model_fields)
        what = "is not known to this server" + (f'; did you mean "{suggestion}"?' if suggestion else "")
    raise invalid(name[:160], what, code)


# ---- responses: the same fields as OpenAI's, including which are null and which are absent ----


def as_json(response: Json) -> str:
    """Serialize a response to JSON."""
    return to_json(response, inf_nan_mode="null").decode()


class Responses:
    """Builds the responses to one request in the format of its endpoint.

    Args:
        name: name under which the model is served.
    """

    def __init__(self, request: Request, chat_model: ChatModel, name: str) -> None:
        self._chat = isinstance(request, ChatRequest)
        self._with_logprobs = request.logprob_count is not None
        self._with_usage = request.stream_options.include_usage
        self._tokenizer = chat_model.tokenizer
        self._name, self._created = name, int(time.time())
        self._id = ("chatcmpl-" if self._chat else "cmpl-") + uuid.uuid4().hex

    def full_response(self, completions: Sequence[Sequence[Piece]], usage: Json) -> Json:
        """Return the response without streaming; each completion is given as its pieces."""
        choices = []
        for index, pieces in enumerate(completions):
            text, tokens = "".join(p.text for p in pieces), [t for p in pieces for t in p.tokens]
            message = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message} if self._chat else {"text": text}
            choices.append(self._choice(index, content, tokens, pieces[-1].finish))
        return self._response(choices, "chat.completion", usage=usage)

    def opening_chunks(self, indices: Iterable[int]) -> list[Json]:
        """Return the chunks that open the completions of a stream; only the chat endpoint has them."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        opening = {"delta": delta, "logprobs": None, "finish_reason": None}
        return [self._chunk([{"index": i, **opening}]) for i in indices] if self._chat else []

    def chunk(self, index: int, piece: Piece) -> Json:
        """Return the chunk for a piece of one completion."""
        delta = {"content": piece.text} if piece.text or piece.tokens else {}
        content = {"delta": delta} if self._chat else {"text": piece.text}
        return self._chunk([self._choice(index, content, piece.tokens, piece.finish)])

    def usage_chunk(self, usage: Json) -> Json:
        """Return the final chunk, which holds the usage."""
        return self._response([], "chat.completion.chunk", usage=usage)

    def _chunk(self, choices: list[Json]) -> Json:
        return self._response(choices, "chat.completion.chunk", **({"usage": None} if self._with_usage else {}))

    def _response(self, choices: list[Json], chat_object: str, **usage: Any) -> Json:
        return {
            "id": self._id,
            "object": chat_object if self._chat else "text_completion",
            "created": self._created,
            "model": self._name,
            "system_fingerprint": None,
            "choices": choices,
            **usage,
        }

    def _choice(self, index: int, content: Json, tokens: Sequence[ShownToken], finish: str | None) -> Json:
        """Return one choice, whole or partial; `content` holds `message` or `delta` (chat) or `text` (text completion)."""
        logprobs = None
        if self._with_logprobs:
            logprobs = self._chat_logprobs(tokens) if self._chat else self._text_logprobs(tokens)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}

    def _chat_logprobs(self, tokens: Sequence[ShownToken]) -> Json:
        content = [
            {
                **self._logprob(t.sampled.token, t.sampled.logp),
                "top_logprobs": [self._logprob(*other) for other in t.sampled.likeliest],
            }
            for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _logprob(self, token: int, logp: float) -> Json:
        text = token_text(self._tokenizer, token)
        return {"token": text, "logprob": logp, "bytes": token_bytes(self._tokenizer, token)}

    def _text_logprobs(self, tokens: Sequence[ShownToken]) -> Json:
        top: list[dict[str, float]] = [{} for _ in tokens]
        for likeliest, t in zip(top, tokens, strict=True):
            # the sampled token is among them even if it is unlikely; partial characters share one text: keep the most likely
            for token, logp in (*t.sampled.likeliest, (t.sampled.token, t.sampled.logp)):
                likeliest.setdefault(token_text(self._tokenizer, token), logp)
        return {
            "tokens": [token_text(self._tokenizer, t.sampled.token) for t in tokens],
            "token_logprobs": [t.sampled.logp for t in tokens],
            "top_logprobs": top,
            "text_offset": [t.start for t in tokens],
        }
