"""The Starlette application of `penchant studio`: access control, what all pages share, and the areas."""

from __future__ import annotations

import errno
import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import jinja2
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from penchant import __version__
from penchant.base.files import ANYWHERE, disk_error
from penchant.errors import PenchantError
from penchant.report.html import escape_hidden, text_html
from penchant.serve.http import CLIENT_GONE, handle_request, names_this_machine, read_body

log = logging.getLogger("penchant.studio")
HERE = Path(__file__).parent
SHARED_CSS = HERE.parent / "report" / "shared.css"  # the stylesheet of the report and the studio
BODY, BODY_SECONDS = 1 << 20, 30.0  # limits on a form
CHANGES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
WEEK = 7 * 24 * 3600

# modules of this package that each define an area, in navigation order
AREAS = ("arena", "runs", "data")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; frame-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with no-referrer, browsers would send forms with Origin: null
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Area:
    """One entry of the navigation and its pages.

    Args:
        title: text in the navigation; path: its first page (``/arena``); routes: with full paths; close: called when the server ends.
        preload: called in its own thread when the server starts, to load in advance what the first page needs.
    """

    title: str
    path: str
    routes: Sequence[BaseRoute]
    close: Callable[[], None] = lambda: None
    preload: Callable[[], Any] = lambda: None


@dataclass
class Studio:
    """The ASGI application and what every page shares: the folder, access control and templates.

    Args:
        folder: nothing outside it is shown or written.
        token: opens the studio and grants full access.
        local: bound to loopback, so only requests with a Host header that names this machine are answered.
    """

    folder: Path
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    local: bool = True
    closing: bool = False

    def __post_init__(self) -> None:
        self.folder = self.folder.expanduser().resolve()
        areas = [import_module(f"penchant.studio.{name}").area(self) for name in AREAS]
        self.areas: list[Area] = areas
        routes: list[BaseRoute] = [
            Route("/", self._home),
            Route("/login", self._login, methods=["GET", "POST"]),
            Route(f"/static/{SHARED_CSS.name}", _shared_css),
            Mount("/static", StaticFiles(directory=HERE / "static")),
            *(route for area in self.areas for route in area.routes),
        ]
        handlers: Any = {
            HTTPException: self._handle_http_error,
            PenchantError: self._handle_user_error,
            OSError: self._handle_os_error,
            ClientDisconnect: _handle_disconnect,
        }
        self._starlette = Starlette(routes=routes, exception_handlers=handlers)

    # ---- for areas -------------------------------------------------------------------------------------------------

    def resolve(self, name: str) -> Path:
        """Resolve a path inside the folder.

        Raises:
            HTTPException: it leads out of the folder, possibly through a link, or is not a valid path (404).
        """
        try:
            path = (self.folder / name).resolve()
            if "\0" in name or not path.is_relative_to(self.folder):
                raise ValueError
            path.exists()  # raises if the name is invalid
        except (ValueError, OSError, RuntimeError) as error:
            raise HTTPException(404, "there is no such file in this folder") from error
        return path

    def relative(self, path: Path) -> str:
        """Return a path relative to the folder, as it is shown and linked."""
        return path.relative_to(self.folder).as_posix()

    def page(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """Render a template. Text of models and files must go through the filter `inert` (content) or `plain` (attributes)."""
        shared = {
            "studio": self,
            "areas": self.areas,
            "path": request.url.path,
            "csrf": self._csrf,
            "version": __version__,
            "asset": self._asset,
        }
        text = self.templates.get_template(template).render({**shared, **values})
        return HTMLResponse(text.encode(errors="replace"), status)  # a model's JSON may contain lone surrogates

    @cached_property
    def templates(self) -> jinja2.Environment:
        """The template environment of all areas."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE / "templates"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        environment.filters["inert"] = lambda text: Markup(text_html(str(text)))
        environment.filters["plain"] = lambda text: escape_hidden(str(text))
        return environment

    @staticmethod
    def _asset(name: str) -> str:
        """Return the URL of a static file; it changes whenever the file does."""
        file = SHARED_CSS if name == SHARED_CSS.name else HERE / "static" / name
        return f"/static/{name}?{int(file.stat().st_mtime)}"

    # ---- access control --------------------------------------------------------------------------------------------

    def _derive_secret(self, what: str) -> str:
        return hmac.new(self.token.encode(), what.encode(), hashlib.sha256).hexdigest()

    @cached_property
    def cookie(self) -> str:
        """Name of the session cookie, specific to this studio because cookies are shared by all ports of a host."""
        return f"penchant_{self._derive_secret('name')[:8]}"

    @cached_property
    def _session(self) -> str:
        return self._derive_secret("session")

    @cached_property
    def _csrf(self) -> str:
        return self._derive_secret("csrf")

    def _token_matches(self, token: str) -> bool:
        return hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self.token.encode())

    def _login_response(self, where: str) -> Response:
        response = RedirectResponse(where, 303)
        response.set_cookie(self.cookie, self._session, max_age=WEEK, httponly=True, samesite="strict")
        return response

    async def _login(self, request: Request) -> Response:
        wrong = False
        if request.method == "POST":
            form = await read_form(request)
            if self._token_matches(form.get("token", "").strip()):
                return self._login_response("/")
            wrong = True
        return self.page(request, "login.html", 401 if wrong else 200, wrong=wrong)

    async def _home(self, request: Request) -> Response:
        return RedirectResponse(self.areas[0].path, 303)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check that the request is allowed, then answer."""
        path = scope.get("path", "")

        def headers(status: int, response_headers: MutableHeaders) -> None:
            if path.startswith("/static/"):
                response_headers["cache-control"] = "private, max-age=86400"
            for name, value in HEADERS.items():
                response_headers.setdefault(name, value)

        def choose_app() -> ASGIApp:
            return self._refusal(Request(scope, receive)) or self._starlette

        error_response = PlainTextResponse("something went wrong in the studio; its log says what", 500)
        safe_path = escape_hidden(path)[:80]
        await handle_request(
            scope,
            receive,
            send,
            choose_app=choose_app,
            error_response=error_response,
            headers=headers,
            log=log,
            path=safe_path,
        )

    def _refusal(self, request: Request) -> Response | None:
        """Return the response if the request is refused or redirected, else None."""
        headers = request.headers
        if self.local and not names_this_machine(headers.get("host", "")):
            return PlainTextResponse("this studio only answers to names of this machine", 403)
        path = request.url.path
        if path.startswith("/static/"):
            return None
        login_token = request.query_params.get("token")
        if login_token is not None and request.method == "GET":
            query = [(k, v) for k, v in request.query_params.multi_items() if k != "token"]
            target = path + (f"?{urlencode(query)}" if query else "")
            return (
                self._login_response("/" + target.lstrip("/"))
                if self._token_matches(login_token)
                else RedirectResponse("/login", 303)
            )
        if request.method in CHANGES and not _same_site(headers):
            return PlainTextResponse("this request came from a page of another site", 403)
        if path == "/login":
            return None
        cookie = request.cookies.get(self.cookie, "")
        if not hmac.compare_digest(cookie.encode("utf-8", "surrogatepass"), self._session.encode()):
            if request.method == "GET" and "hx-request" not in headers:
                return RedirectResponse("/login", 303)
            return PlainTextResponse("open the studio by the address that it printed when it started", 401)
        if request.method in CHANGES:
            token = headers.get("x-csrf-token", "")
            if not hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self._csrf.encode()):
                return PlainTextResponse("this page belongs to an earlier session of the studio; reload it", 403)
        return None

    # ---- errors ----------------------------------------------------------------------------------------------------

    async def _handle_http_error(self, request: Request, error: HTTPException) -> Response:
        message = error.detail if error.detail != "Not Found" else "there is no such page"
        return self._error_page(request, error.status_code, message)

    async def _handle_user_error(self, request: Request, error: PenchantError) -> Response:
        return self._error_page(request, 400, str(error))

    async def _handle_os_error(self, request: Request, error: OSError) -> Response:
        if error.errno not in ANYWHERE | {errno.ENAMETOOLONG}:
            raise error
        return self._error_page(request, 507, str(disk_error(Path(error.filename or self.folder), error)))

    def _error_page(self, request: Request, status: int, what: str) -> Response:
        if "hx-request" in request.headers or request.method in CHANGES:
            return PlainTextResponse(escape_hidden(what), status)
        return self.page(request, "error.html", status, what=what)

    def stop(self) -> None:
        """Set `closing`, which ends the event streams."""
        self.closing = True

    def close(self) -> None:
        """Release the resources of every area."""
        for area in self.areas:
            area.close()


def _same_site(headers: Headers) -> bool:
    """Return True unless the browser's headers show that a change comes from another site."""
    origin = headers.get("origin")
    try:
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return False
    except ValueError:  # not a valid URL
        return False
    return headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")


def is_linkable(name: str) -> bool:
    """Return True if a file name is valid text; names with other bytes cannot appear in a URL."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


async def _shared_css(_: Request) -> Response:
    return FileResponse(SHARED_CSS)


async def _handle_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)  # no client reads this, but the log shows it


async def read_form(request: Request, max_bytes: int = BODY) -> dict[str, str]:
    """Return the fields of a form; the last value wins if a name is repeated.

    Raises:
        HTTPException: it is too large or not a form.
    """
    return dict(await read_fields(request, max_bytes))


async def read_fields(request: Request, max_bytes: int = BODY) -> list[tuple[str, str]]:
    """Return every field of a form as (name, value), in order."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(415, "send a form")
    try:
        text = (await read_body(request, max_bytes, BODY_SECONDS)).decode("ascii")
        return parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=2000)
    except ValueError as error:
        raise HTTPException(400, "this form cannot be read") from error
