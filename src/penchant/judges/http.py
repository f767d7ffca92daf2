"""JSON over HTTP with the standard library: time-outs, retries with back-off, no redirects, and a key that is never shown."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from penchant.errors import ConfigError
from penchant.judges.text import shown

LARGEST = 4 << 20  # bytes of a reply
LONGEST = 60.0  # seconds between two attempts
RETRIED = (408, 409, 425, 429)  # and every 5xx
HOPELESS = (401, 403, 404, 405)  # the same for every question
DEFAULT_KEY = "OPENAI_API_KEY"


class NoReply(Exception):
    """A question that got no reply.

    Args:
        final: no other one would get one either; silent: nobody was there, or was willing for now.
    """

    def __init__(self, what: str, *, final: bool = False, silent: bool = False) -> None:
        super().__init__(what)
        self.final, self.silent = final, silent


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


@dataclass(frozen=True)
class Connection:
    """An endpoint.

    Args:
        url: ``http(s)://HOST/v1``; key: sent as a bearer token, never shown; timeout: seconds without a byte.
        attempts: of one question; pause: seconds before the second attempt, twice as many before each further one.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    attempts: int = 6
    pause: float = 1.0

    def post(self, path: str, body: Mapping[str, Any], stop: threading.Event) -> Any:
        """The JSON that the endpoint answers; None where it answers something else.

        Args:
            stop: set when nobody waits any more.

        Raises:
            NoReply: none after all attempts, or refused.
        """
        data = json.dumps(body).encode()
        if stop.is_set():
            raise NoReply("was not asked: an earlier question was refused")
        for attempt in range(1, self.attempts + 1):
            failure, wait = self._once(path, data)
            if not isinstance(failure, str):
                return failure[0]
            if attempt == self.attempts or stop.wait(min(LONGEST, max(wait, self._back_off(attempt)))):
                raise NoReply(f"{failure} ({attempt} attempts)" if attempt > 1 else failure, silent=True)
        raise AssertionError("at least one attempt")

    def _back_off(self, attempt: int) -> float:
        """So that many waiting questions do not come back together."""
        return self.pause * 2.0 ** (attempt - 1) * random.uniform(0.75, 1.25)

    def _once(self, path: str, data: bytes) -> tuple[tuple[Any] | str, float]:
        """One attempt: the reply in a tuple, or what went wrong and the seconds that the endpoint wants to be left alone."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method="POST")
        try:
            with self._opener().open(request, timeout=self.timeout) as reply:
                return (_json(reply.read(LARGEST + 1)),), 0.0
        except urllib.error.HTTPError as error:
            return self._failed(error)
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            return f"cannot be reached ({shown(self._without_key(str(reason)) or type(error).__name__)})", 0.0

    def _opener(self) -> urllib.request.OpenerDirector:
        proxies: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})] if is_local(self.url) else []
        return urllib.request.build_opener(_NoRedirects, *proxies)

    def _failed(self, error: urllib.error.HTTPError) -> tuple[str, float]:
        with error:
            try:
                said = _message(error.read(LARGEST))
            except (OSError, http.client.HTTPException):
                said = ""
        what = f"answered {error.code} {shown(error.reason or '')}".rstrip()
        what += f": {shown(self._without_key(said)[:300])}" if said else ""
        if error.code in RETRIED or error.code >= 500:
            return what, _seconds(error.headers.get("Retry-After"))
        raise NoReply(what, final=error.code in HOPELESS or error.code < 400)

    def _without_key(self, text: str) -> str:
        """Some endpoints repeat the key that they refuse."""
        return text.replace(self.key, "[key]") if self.key else text


def connect(url: str, key_env: str | None, where: str = "--judge") -> Connection:
    """An endpoint from its address, with the key of an environment variable.

    Args:
        key_env: the variable, which must be set; None: `OPENAI_API_KEY` where it is set, and where it goes over https or stays on this machine.

    Raises:
        ConfigError: no such address, or no key.
    """
    parts = urlsplit(url)
    try:
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(where, "is no address", "write http://HOST:PORT/v1") from error
    if not host or parts.scheme not in ("http", "https"):
        raise ConfigError(where, f"{shown(url)} is no address", "write http://HOST:PORT/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(
            where, "holds more than an address", "leave user, password and query out; a key comes by --judge-key-env"
        )
    address = url.rstrip("/").removesuffix("/chat/completions")
    key = os.environ.get(key_env if key_env is not None else DEFAULT_KEY, "").strip()
    if key_env is not None and not key:
        raise ConfigError("--judge-key-env", f"{key_env} is not set", "set that environment variable to the key")
    if key_env is None and parts.scheme == "http" and not is_local(url):
        key = ""
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(key_env or DEFAULT_KEY, "holds characters that no key has", "set it to the key alone")
    return Connection(address, key or None)


def is_local(url: str) -> bool:
    """Whether the address is this machine's own."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _json(data: bytes) -> Any:
    if len(data) > LARGEST:
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _message(data: bytes) -> str:
    """What a refusal says: the message in its JSON, or its text."""
    found = _json(data)
    error = found.get("error", found) if isinstance(found, dict) else found
    said = error.get("message") if isinstance(error, dict) else error
    return said if isinstance(said, str) else data[:600].decode("utf-8", "replace")


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0.0))
    except ValueError:
        return 0.0
