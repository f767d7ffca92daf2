"""Request handling that all of our servers share: Host check, body limits, response headers and the access log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from h11 import LocalProtocolError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penchant.base.text import told
from penchant.judges.endpoint import is_local

CLIENT_GONE = 499  # as nginx logs it


async def handle_request(
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    choose_app: Callable[[], ASGIApp],
    error_response: Response,
    headers: Callable[[int, MutableHeaders], None],
    log: logging.Logger,
    path: str,
) -> None:
    """Answer a request and log one line that contains none of the text sent or returned.

    Args:
        choose_app: returns the app that answers; error_response: sent if that raises; headers: adds headers, given the status.
        path: path to log. A handler may set the status to log in `scope["state"]["status"]`.
    """
    if scope["type"] != "http":
        raise RuntimeError("only HTTP is served")
    started, status = time.perf_counter(), 0

    async def send_with_headers(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            headers(status, MutableHeaders(scope=message))
        await send(message)

    state = scope.setdefault("state", {})
    try:
        await choose_app()(scope, receive, send_with_headers)
    except LocalProtocolError:  # the body was not valid HTTP, and its reader has already refused it
        state["status"] = 400
    except Exception as error:
        log.error("a request failed: %s", told(error), exc_info=error)
        if not status:
            await error_response(scope, receive, send_with_headers)
    log.info("%s %s %d %.2f s", scope["method"], path, state.get("status", status), time.perf_counter() - started)


def names_this_machine(host: str) -> bool:
    """Return True if a Host header names this machine. Guards against DNS rebinding: a foreign name that resolves to this server."""
    try:
        return is_local("http://" + host)
    except ValueError:  # not a host name
        return False


async def read_body(request: Request, max_bytes: int, seconds: float) -> bytes:
    """Read the whole body.

    Args:
        max_bytes: size limit; seconds: time limit for it to arrive.

    Raises:
        HTTPException: it is too large or too slow. ClientDisconnect: the client disconnected.
    """
    too_large = HTTPException(413, f"the body is larger than {max_bytes} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                data += chunk
                if len(data) > max_bytes:
                    raise too_large
    except TimeoutError as error:
        raise HTTPException(408, f"the body took longer than {seconds:g} seconds") from error
    return bytes(data)
