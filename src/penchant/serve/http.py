"""What every server of ours does with a request before it is answered: whose name it came by, and how much of it is read."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.requests import Request

from penchant.judges.endpoint import is_local


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
