"""The arena: two answers side by side, and one key for which is better."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from penchant.studio.app import Area, Studio


def area(studio: Studio) -> Area:
    """The arena's pages."""

    async def index(request: Request) -> Response:
        return studio.page(request, "arenas.html")

    return Area("Arena", "/arena", [Route("/arena", index)])
