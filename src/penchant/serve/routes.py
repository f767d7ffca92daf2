"""The Starlette application of `penchant serve`, and the model's thread, in which prompts take turns token by token."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from penchant.serve import openai
from penchant.serve.http import CLIENT_GONE, handle_request, names_this_machine, read_body
from penchant.serve.model import ChatModel, TemplateRefused
from penchant.serve.openai import ApiError, ChatRequest, Json, Prompt, Responses, TextRequest, as_json, invalid
from penchant.serve.stream import Completions, Piece

T = TypeVar("T")
log = logging.getLogger("penchant.serve")


# ---- the model's thread ----

# events of a prompt: its Completions once it has been read, then their Pieces, then None at the end; or the exception
Event = Completions | Piece | None | Exception


class Scheduler:
    """The model's thread. Prompts take turns token by token, and each gets exactly the completions it would get alone.

    Args:
        at_once: maximum number of prompts that take turns; waiting: maximum number in the queue.
    """

    def __init__(self, at_once: int = 4, waiting: int = 64) -> None:
        self._slots, self._capacity = asyncio.Semaphore(at_once), at_once + waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")  # first come, first served
        self._prompts: set[asyncio.Task[None]] = set()
        self._active = 0
        self.closing = False  # if True, every request ends with an error before its next token

    @property
    def load(self) -> tuple[int, int]:
        """(active prompts, waiting prompts)."""
        return self._active, len(self._prompts) - self._active

    def submit(
        self, starts: Sequence[Callable[[], Completions]], notify: Callable[[int, Event], None]
    ) -> list[asyncio.Task[None]]:
        """Queue all prompts of a request; cancelling a prompt's task ends it.

        Args:
            starts: one function per prompt that reads it, called in the model's thread; notify: called with (index of the prompt, event).

        Raises:
            ApiError: too many prompts are waiting, or there will never be room for so many.
        """
        if len(starts) > self._capacity:
            raise invalid("prompt", f"{len(starts)} prompts, and this server holds {self._capacity} at a time")
        if len(starts) > self._capacity - len(self._prompts):
            message = "too many requests are waiting; try again in a moment"
            raise ApiError(429, message, code="rate_limit_exceeded", kind="rate_limit_error")
        tasks = [asyncio.create_task(self._generate(start, partial(notify, i))) for i, start in enumerate(starts)]
        for task in tasks:
            self._prompts.add(task)
            task.add_done_callback(self._prompts.discard)
        return tasks

    async def _generate(self, start: Callable[[], Completions], notify: Callable[[Event], None]) -> None:
        try:
            async with self._slots:
                self._active += 1
                try:
                    completions = await self._call_in_thread(start)
                    notify(completions)
                    while not completions.done:
                        for piece in await self._call_in_thread(completions.step):
                            notify(piece)
                finally:
                    self._active -= 1
            notify(None)
        except Exception as error:  # a failure affects only its own request
            notify(error)

    async def _call_in_thread(self, call: Callable[[], T]) -> T:
        if self.closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down", kind="server_error")
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def close(self) -> None:
        """End every request, and the thread after its current step."""
        self.closing = True
        self._thread.shutdown(wait=False, cancel_futures=True)


# ---- HTTP ----


@dataclass(frozen=True)
class Limits:
    """Limits on a single request.

    Args:
        max_tokens: per completion; body: bytes; body_seconds: time for a body to arrive; seconds: time from the request to the last token.
    """

    max_tokens: int = 4096
    body: int = 4 << 20
    body_seconds: float = 30.0
    seconds: float = 600.0


@dataclass
class App:
    """A model served over HTTP.

    Args:
        name: name under which the model is served; key: API key that requests must send, None for no key.
        local: bound to loopback, so only requests with a Host header that names this machine are answered.
    """

    chat_model: ChatModel
    name: str
    scheduler: Scheduler
    key: str | None = field(default=None, repr=False)
    local: bool = True
    limits: Limits = field(default_factory=Limits)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        routes = [
            Route("/health", self._health),
            Route("/healthz", self._health),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._models),
            Route("/v1/chat/completions", partial(self._complete, ChatRequest), methods=["POST"]),
            Route("/v1/completions", partial(self._complete, TextRequest), methods=["POST"]),
        ]
        handlers: Any = {
            ApiError: _handle_api_error,
            HTTPException: _handle_http_error,
            ClientDisconnect: _handle_disconnect,
        }
        self._starlette = Starlette(routes=routes, exception_handlers=handlers)
        self._starlette.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the Host header and the key, then answer."""
        path = scope.get("path", "")
        logged_path = path if path in PATHS else "/v1/models" if path.startswith("/v1/models/") else "(unknown)"
        error_response = _error_response(ApiError(500, "something went wrong in the server", kind="server_error"))
        choose_app = partial(self._choose_app, scope)
        await handle_request(
            scope,
            receive,
            send,
            choose_app=choose_app,
            error_response=error_response,
            headers=_add_headers,
            log=log,
            path=logged_path,
        )

    def _choose_app(self, scope: Scope) -> ASGIApp:
        refusal = self._refusal(Headers(scope=scope), scope["path"])
        return self._starlette if refusal is None else _error_response(refusal)

    def _refusal(self, headers: Headers, path: str) -> ApiError | None:
        """Return the error if the request must not be answered, else None."""
        if self.local and not names_this_machine(headers.get("host", "")):
            return ApiError(403, "this server only answers to names of this machine", code="wrong_host")
        if self.key is None or path in ("/health", "/healthz"):
            return None
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), self.key.encode()):
            return None
        return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def stop(self) -> None:
        """End every request with an error before its next token."""
        self.scheduler.closing = True

    def close(self) -> None:
        """Shut down the model's thread."""
        self.scheduler.close()

    # ---- endpoints --------------------------------------------------------------------------------------------------

    async def _health(self, _: Request) -> Response:
        active, waiting = self.scheduler.load
        return JSONResponse({"status": "ok", "active": active, "waiting": waiting})

    async def _models(self, request: Request) -> Response:
        """List the models, or describe the one named in the path."""
        name = request.path_params.get("name", "")
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "penchant"}
        if name:
            self._check_name(name, None)
        return JSONResponse(model if name else {"object": "list", "data": [model]})

    def _check_name(self, name: str, param: str | None) -> None:
        if name != self.name:
            message = f"there is no model {name[:80]!r} here, only {self.name!r}"
            raise ApiError(404, message, param=param, code="model_not_found")

    async def _complete(self, kind: type[openai.Request], request: Request) -> Response:
        """Handle both endpoints that generate."""
        params = openai.read_request(kind, await _read_json_body(request, self.limits))
        self._check_name(params.model, "model")
        if params.max_new_tokens is not None and params.max_new_tokens > self.limits.max_tokens:
            raise invalid("max_tokens", f"this server writes {self.limits.max_tokens} tokens at most")
        responses = Responses(params, self.chat_model, self.name)
        running = _Running(self, params, request)
        if not params.stream:
            with closing(running):
                pieces: list[list[Piece]] = [[] for _ in range(params.n * len(params.prompts))]
                async for number, event in running.events:
                    if isinstance(event, Piece):
                        pieces[number * params.n + event.row].append(event)
            return Response(as_json(responses.full_response(pieces, running.usage)), media_type="application/json")
        try:
            first = await anext(running.events)  # before the status is sent, so that a refused prompt gives a 400
        except BaseException:
            running.close()
            raise
        return _EventStream(_stream(params, responses, running, first, request), running)

    def completions(self, params: openai.Request, prompt: Prompt) -> Completions:
        """Read one prompt and return its completions; called in the model's thread.

        Raises:
            ApiError: the prompt is invalid or leaves no room for an answer.
        """
        model = self.chat_model
        ids, continued = token_ids(model, prompt, params.template_variables)
        room = model.context - len(ids)
        if room < 1:
            message = f"the prompt has {len(ids)} tokens and the model's context is {model.context}"
            raise ApiError(400, message, param="prompt" if continued else "messages", code="context_length_exceeded")
        max_new_tokens = min(room, params.max_new_tokens or self.limits.max_tokens)
        stops = [*params.stop, *(() if continued else model.style.stops)]
        continued = continued or not model.style.keeps_history  # plain text is continued, not answered
        return Completions(model, ids, params.sampling(max_new_tokens), stops, continued=continued)


PATHS = ("/health", "/healthz", "/v1/models", "/v1/chat/completions", "/v1/completions")


def token_ids(model: ChatModel, prompt: Prompt, template_variables: Json) -> tuple[list[int], bool]:
    """Return (token ids, whether a text is continued rather than messages answered)."""
    if isinstance(prompt, str):
        try:
            return model.encode(prompt), True
        except TemplateRefused as error:
            raise invalid("prompt", str(error)) from error
    ids = [i for i in prompt if isinstance(i, int)]
    if not ids:
        try:
            return model.encode_messages([m for m in prompt if not isinstance(m, int)], template_variables), False
        except TemplateRefused as error:
            raise invalid("tools" if "tools" in template_variables else "messages", str(error)) from error
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    if not all(0 <= i < vocabulary for i in ids):
        raise invalid("prompt", f"holds a token id that is not within 0 and {vocabulary - 1}")
    return ids, True


async def _read_json_body(request: Request, limits: Limits) -> bytes:
    """Read the whole body.

    Raises:
        ApiError: its content type is not JSON, or it is too large or too slow. ClientDisconnect: the client disconnected.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # pages of other sites may send other content types without a preflight request
        raise ApiError(415, "send content-type: application/json", code="unsupported_media_type")
    try:
        return await read_body(request, limits.body, limits.body_seconds)
    except HTTPException as error:
        code = "request_too_large" if error.status_code == 413 else "timeout"
        raise ApiError(error.status_code, error.detail, code=code) from error


# ---- completions under way ----


class _Running:
    """The prompts of one request and their events, until the last prompt has ended.

    Raises:
        ApiError: too many requests are waiting.
    """

    def __init__(self, app: App, params: openai.Request, request: Request) -> None:
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._seconds = app.limits.seconds
        self._started: list[Completions] = []
        starts = [partial(app.completions, params, prompt) for prompt in params.prompts]
        self._tasks = app.scheduler.submit(starts, lambda number, event: self._queue.put_nowait((number, event)))
        self._tasks.append(asyncio.create_task(self._wait_for_disconnect(request)))
        self.events = self._read_events(len(starts))

    async def _wait_for_disconnect(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait((0, ClientDisconnect()))

    def close(self) -> None:
        """Cancel the remaining prompts."""
        for task in self._tasks:
            task.cancel()

    @property
    def usage(self) -> Json:
        """Token counts of the prompts read and the completions generated so far."""
        prompt, completion = sum(len(c.prompt) for c in self._started), sum(c.tokens for c in self._started)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def _read_events(self, remaining: int) -> AsyncIterator[tuple[int, Event]]:
        """Yield (index of the prompt, event).

        Raises:
            ApiError: a prompt failed or timed out. ClientDisconnect: the client disconnected.
        """
        deadline = asyncio.get_running_loop().time() + self._seconds
        while remaining:
            try:
                async with asyncio.timeout_at(deadline):
                    number, event = await self._queue.get()
            except TimeoutError as error:
                message = f"the answer took longer than {self._seconds:g} seconds"
                raise ApiError(503, message, code="timeout", kind="server_error") from error
            if isinstance(event, (ApiError, ClientDisconnect)):
                raise event
            if isinstance(event, Exception):
                log.error("a completion failed", exc_info=event)
                raise ApiError(500, "the model failed at this request", kind="server_error") from event
            if isinstance(event, Completions):
                self._started.append(event)
            remaining -= event is None
            yield number, event


async def _stream(
    params: openai.Request, responses: Responses, running: _Running, first: tuple[int, Event], request: Request
) -> AsyncIterator[str]:
    """Yield server-sent events; an error after the first one becomes the last event."""

    def chunks(number: int, event: Event) -> list[str]:
        offset = number * params.n
        if isinstance(event, Completions):
            return [_sse_event(as_json(chunk)) for chunk in responses.opening_chunks(range(offset, offset + params.n))]
        return [_sse_event(as_json(responses.chunk(offset + event.row, event)))] if isinstance(event, Piece) else []

    try:
        for chunk in chunks(*first):
            yield chunk
        async for number, event in running.events:
            for chunk in chunks(number, event):
                yield chunk
        if params.stream_options.include_usage:
            yield _sse_event(as_json(responses.usage_chunk(running.usage)))
        yield _sse_event("[DONE]")
    except ClientDisconnect:
        request.state.status = CLIENT_GONE
    except ApiError as error:
        request.state.status = error.status
        yield _sse_event(json.dumps(error.body))


def _sse_event(text: str) -> str:
    return f"data: {text}\n\n"


class _EventStream(StreamingResponse):
    """Server-sent events that end the request's prompts no matter how the connection ends."""

    def __init__(self, events: AsyncIterator[str], running: _Running) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with closing(self._running):
            await super().__call__(scope, receive, send)


# ---- errors ----


def _add_headers(status: int, headers: MutableHeaders) -> None:
    headers.update({"cache-control": "no-store", "x-content-type-options": "nosniff"})
    if status >= 400:
        headers["connection"] = "close"


def _error_response(error: ApiError) -> Response:
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(error.body, error.status, headers)


async def _handle_api_error(_: Request, error: ApiError) -> Response:
    return _error_response(error)


async def _handle_http_error(request: Request, error: HTTPException) -> Response:
    if error.status_code == 405:
        message = f"{request.method[:20]} is not allowed for this path"
        return _error_response(ApiError(405, message, code="method_not_allowed"))
    return _error_response(ApiError(404, f"there is no {request.url.path[:80]}", code="not_found"))


async def _handle_disconnect(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=CLIENT_GONE)  # no client reads this, but the log shows it
