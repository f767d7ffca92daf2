"""What every server of ours does with a request: whose name it came by, how much of it is read, its headers, and its line in the log."""

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


async def answer(
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    by: Callable[[], ASGIApp],
    failed: Response,
    headers: Callable[[int, MutableHeaders], None],
    log: logging.Logger,
    path: str,
) -> None:
    """Answer a request, and write a line to the log that holds no text of anybody's.

    Args:
        by: says what answers it; failed: is sent where that raises; headers: adds to those of a status.
        path: as the log has it. A handler may put another status there: `scope["state"]["status"]`.
    """
    if scope["type"] != "http":
        raise RuntimeError("only HTTP is served")
    began, status = time.perf_counter(), 0

    async def send_with_headers(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            headers(status, MutableHeaders(scope=message))
        await send(message)

    state = scope.setdefault("state", {})
    try:
        await by()(scope, receive, send_with_headers)
    except LocalProtocolError:  # the body was no HTTP, and what reads it has refused it already
        state["status"] = 400
    except Exception as error:
        log.error("a request failed: %s", told(error), exc_info=error)
        if not status:
            await failed(scope, receive, send_with_headers)
    log.info("%s %s %d %.2f s", scope["method"], path, state.get("status", status), time.perf_counter() - began)


def names_this_machine(host: str) -> bool:
    """Whether a Host header names this machine (a page of another site could otherwise have its name point here)."""
    try:
        return is_local("http://" + host)
    except ValueError:  # not a host at all
        return False


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The whole body.

    Args:
        most: bytes; seconds: for it to arrive.

    Raises:
        HTTPException: it is too large or too slow. ClientDisconnect: the client went away.
    """
    too_large = HTTPException(413, f"the body is larger than {most} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                data += chunk
                if len(data) > most:
                    raise too_large
    except TimeoutError as error:
        raise HTTPException(408, f"the body took longer than {seconds:g} seconds") from error
    return bytes(data)
