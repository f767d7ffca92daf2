"""The ASGI application of `penchant serve`: who may ask, what they ask, and the answers as they are written."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from penchant.judges.http import is_local
from penchant.talk.answer import Answers, Piece
from penchant.talk.asked import ApiError, Asked, Prompt, chat_request, parse, text_request, wrong
from penchant.talk.replies import ChatShape, Choice, Reply, Shape, TextShape, usage_of
from penchant.talk.schedule import Busy, Ended, Event, Failed, Job, Scheduler, ShuttingDown, Started
from penchant.talk.styles import TemplateRefused
from penchant.talk.voice import Voice

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

log = logging.getLogger("penchant.serve")


@dataclass(frozen=True)
class Limits:
    """What one request may ask of the server.

    Args:
        max_tokens: of one answer; body: bytes; body_seconds: for a body to arrive; seconds: from the question to the last token.
    """

    max_tokens: int = 4096
    body: int = 4 << 20
    body_seconds: float = 30.0
    seconds: float = 600.0


@dataclass
class App:
    """A model over HTTP.

    Args:
        voice: the model; name: under which it is served; key: that every request must bring, None: none.
        local: bound to this machine alone, so that only its own names are answered to (a page of another site could otherwise have its
            name point here).
    """

    voice: Voice
    name: str
    scheduler: Scheduler
    key: str | None = field(default=None, repr=False)
    local: bool = True
    limits: Limits = field(default_factory=Limits)
    created: int = field(default_factory=lambda: int(time.time()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError("HTTP alone is served")
        exchange = Exchange(scope, receive, send)
        began = time.perf_counter()
        try:
            await self._answer(exchange)
        except ApiError as error:
            await exchange.fail(error)
        except Gone:
            exchange.status = 499  # nobody is there to be told
        except Exception:
            log.exception("a request failed")
            await exchange.fail(ApiError(500, "something went wrong in the server", kind="server_error"))
        log.info("%s %s %d %.1f s", exchange.method, exchange.known_path, exchange.status, time.perf_counter() - began)

    # ---- who and what -----------------------------------------------------------------------------------------------

    async def _answer(self, exchange: Exchange) -> None:
        self._check_host(exchange)
        path = exchange.path
        if path in ("/health", "/healthz"):
            exchange.known_path = path
            exchange.allow("GET")
            active, waiting = self.scheduler.load
            await exchange.reply(200, {"status": "ok", "active": active, "waiting": waiting})
            return
        self._check_key(exchange)
        if path == "/v1/models" or path.startswith("/v1/models/"):
            exchange.known_path = "/v1/models"
            exchange.allow("GET")
            await exchange.reply(200, self._models(path.removeprefix("/v1/models").removeprefix("/")))
            return
        endpoint = ENDPOINTS.get(path)
        if endpoint is None:
            raise ApiError(404, f"there is no {path[:80]}", code="not_found")
        exchange.known_path = path
        exchange.allow("POST")
        asked = endpoint.read(parse(await exchange.body(self.limits.body, self.limits.body_seconds)))
        self._check_model(asked.model, "model")
        if asked.most is not None and asked.most > self.limits.max_tokens:
            raise wrong("max_tokens", f"this server writes {self.limits.max_tokens} tokens at most")
        await self._write(exchange, asked, Reply(endpoint.shape(self.voice, asked.logprobs is not None), self.name))

    def _check_host(self, exchange: Exchange) -> None:
        try:
            known = not self.local or is_local("http://" + exchange.headers.get("host", ""))
        except ValueError:  # no host at all
            known = False
        if not known:
            raise ApiError(403, "this server answers to names of this machine alone", code="wrong_host")

    def _check_key(self, exchange: Exchange) -> None:
        if self.key is None:
            return
        kind, _, given = exchange.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def _check_model(self, name: str, param: str | None) -> None:
        if name != self.name:
            raise ApiError(
                404, f"there is no model {name[:80]!r} here, only {self.name!r}", param=param, code="model_not_found"
            )

    def _models(self, one: str) -> dict[str, Any]:
        own = {"id": self.name, "object": "model", "created": self.created, "owned_by": "penchant"}
        if not one:
            return {"object": "list", "data": [own]}
        self._check_model(one, None)
        return own

    # ---- writing ----------------------------------------------------------------------------------------------------

    async def _write(self, exchange: Exchange, asked: Asked, reply: Reply) -> None:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()

        def tell(number: int) -> Callable[[Event], None]:
            def told(event: Event) -> None:
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(queue.put_nowait, (number, event))

            return told

        jobs = [Job(_starter(self, asked, prompt), tell(i)) for i, prompt in enumerate(asked.prompts)]
        try:
            self.scheduler.submit(jobs)
        except (Busy, ShuttingDown) as error:
            raise _refusal(error) from error
        gone = asyncio.create_task(exchange.gone())
        try:
            events = _events(queue, len(jobs), gone, self.limits.seconds)
            await (_stream if asked.stream else _whole)(exchange, asked, reply, events)
        finally:
            gone.cancel()
            for job in jobs:
                job.cancel()


def _starter(app: App, asked: Asked, prompt: Prompt) -> Callable[[], Answers]:
    """What reads one prompt, in the model's thread."""

    def start() -> Answers:
        voice = app.voice
        ids, continued, stops = _read(voice, prompt)
        room = voice.context - len(ids)
        if room < 1:
            what = f"the prompt has {len(ids)} tokens and the model's context is {voice.context}"
            raise ApiError(400, what, param="prompt" if continued else "messages", code="context_length_exceeded")
        most = min(room, app.limits.max_tokens if asked.most is None else asked.most)
        sampling = replace(asked.sampling, max_new_tokens=most)
        return Answers(voice, ids, sampling, (*asked.stops, *stops), continued=continued)

    return start


def _read(voice: Voice, prompt: Prompt) -> tuple[list[int], bool, tuple[str, ...]]:
    """(token ids, whether text is continued, stop texts of the model's own)."""
    if isinstance(prompt, str):
        return voice.encode(prompt), True, ()
    if not isinstance(prompt[0], int):
        try:
            return voice.prompt_of([m for m in prompt if not isinstance(m, int)]), False, voice.style.stops
        except TemplateRefused as error:
            raise wrong("messages", str(error)) from error
    ids = [i for i in prompt if isinstance(i, int)]
    vocabulary = voice.model.get_input_embeddings().weight.shape[0]
    if not all(0 <= i < vocabulary for i in ids):
        raise wrong("prompt", f"holds a token id that is not within 0 and {vocabulary - 1}")
    return ids, True, ()


class Gone(Exception):
    """The client went away."""


async def _events(
    queue: asyncio.Queue[tuple[int, Event]], jobs: int, gone: asyncio.Task[None], seconds: float
) -> AsyncIterator[tuple[int, Event]]:
    """What all jobs tell, until the last has ended.

    Raises:
        ApiError: one failed, or time is up. Gone: the client went away.
    """
    deadline = asyncio.get_running_loop().time() + seconds
    while jobs:
        waiting = asyncio.ensure_future(queue.get())
        left = deadline - asyncio.get_running_loop().time()
        await asyncio.wait({waiting, gone}, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
        if gone.done() or not waiting.done():
            waiting.cancel()
            if gone.done():
                raise Gone
            raise ApiError(503, f"the answer took longer than {seconds:g} seconds", code="timeout", kind="server_error")
        number, event = waiting.result()
        if isinstance(event, Failed):
            raise _refusal(event.error) from event.error
        yield number, event
        jobs -= isinstance(event, Ended)


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="rate_limit_exceeded", kind="rate_limit_error")
    if isinstance(error, ShuttingDown):
        return ApiError(503, str(error), code="shutting_down", kind="server_error")
    log.error("an answer failed", exc_info=error)
    return ApiError(500, "the model failed at this request", kind="server_error")


@dataclass
class _Count:
    """Tokens of all jobs."""

    prompt: int = 0
    completion: int = 0

    def add(self, event: Event) -> None:
        self.prompt += event.prompt_tokens if isinstance(event, Started) else 0
        self.completion += event.tokens if isinstance(event, Ended) else 0

    def usage(self) -> dict[str, int]:
        return usage_of(self.prompt, self.completion)


async def _whole(exchange: Exchange, asked: Asked, reply: Reply, events: AsyncIterator[tuple[int, Event]]) -> None:
    n = asked.sampling.n
    choices, count = [Choice() for _ in range(n * len(asked.prompts))], _Count()
    async for number, event in events:
        count.add(event)
        if isinstance(event, Piece):
            choices[number * n + event.row].add(event)
    await exchange.reply(200, reply.whole(choices, count.usage()))


async def _stream(exchange: Exchange, asked: Asked, reply: Reply, events: AsyncIterator[tuple[int, Event]]) -> None:
    n, count = asked.sampling.n, _Count()
    async for number, event in events:  # the first is there before the status goes out: a refused prompt is a 400
        count.add(event)
        if isinstance(event, Started):
            for row in range(n):
                first = reply.shape.first(number * n + row)
                if first is not None:
                    await exchange.event(reply.chunk(first, asked.usage))
        elif isinstance(event, Piece):
            await exchange.event(reply.chunk(reply.shape.chunk(event, number * n + event.row), asked.usage))
    if asked.usage:
        await exchange.event(reply.last(count.usage()))
    await exchange.finish()


@dataclass(frozen=True)
class Endpoint:
    """How a path's requests are read and answered."""

    read: Callable[[Mapping[str, Any]], Asked]
    shape: Callable[[Voice, bool], Shape]


ENDPOINTS = {
    "/v1/chat/completions": Endpoint(chat_request, ChatShape),
    "/v1/completions": Endpoint(text_request, TextShape),
}


# ---------------------------------------------------------------------------------------------------------------------
# HTTP


class Exchange:
    """One request and its reply."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.method, self.path = str(scope["method"]), str(scope["path"])
        self.known_path = "(unknown)"  # what stands in the log: never a text of the client's
        self.headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        self.status = 0
        self._streaming = False

    def allow(self, method: str) -> None:
        if self.method != method:
            raise ApiError(405, f"this path takes {method} alone", code="method_not_allowed")

    async def body(self, most: int, seconds: float) -> bytes:
        """The whole body.

        Raises:
            ApiError: it is no JSON by its header, too large or too slow. Gone: the client went away.
        """
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of another site may send anything else here without being asked
            raise ApiError(415, "send content-type: application/json", code="unsupported_media_type")
        data = bytearray()
        too_large = ApiError(413, f"the body is larger than {most} bytes", code="request_too_large")
        length = self.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_large
        try:
            async with asyncio.timeout(seconds):
                more = True
                while more:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    data += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(data) > most:
                        raise too_large
        except TimeoutError as error:
            raise ApiError(408, f"the body took longer than {seconds:g} seconds", code="timeout") from error
        return bytes(data)

    async def gone(self) -> None:
        """Return when the client has gone away."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def reply(self, status: int, body: Mapping[str, Any], close: bool = False) -> None:
        """A whole reply."""
        data = json.dumps(body).encode()
        await self._start(status, b"application/json", [(b"content-length", str(len(data)).encode())], close)
        await self._send({"type": "http.response.body", "body": data})

    async def _start(self, status: int, kind: bytes, more: list[tuple[bytes, bytes]], close: bool = False) -> None:
        self.status = status
        headers = [
            (b"content-type", kind),
            (b"cache-control", b"no-store"),
            (b"x-content-type-options", b"nosniff"),
            *more,
        ]
        headers += [(b"connection", b"close")] if close else []
        headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def event(self, body: Mapping[str, Any]) -> None:
        """One event of a stream."""
        if not self._streaming:
            self._streaming = True
            await self._start(200, b"text/event-stream; charset=utf-8", [])
        await self._data(json.dumps(body).encode())

    async def _data(self, data: bytes, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": more})

    async def finish(self) -> None:
        """The end of a stream."""
        await self._data(b"[DONE]", more=False)

    async def fail(self, error: ApiError) -> None:
        """An error: as the reply, or as the last event of a stream that has begun."""
        with suppress(OSError):
            if self._streaming:
                self.status = error.status
                await self._data(json.dumps(error.to_json()).encode(), more=False)
            else:
                await self.reply(error.status, error.to_json(), close=True)
