"""An HTTP server: the socket, the API key, signal handling, and uvicorn around an application."""

from __future__ import annotations

import errno
import logging
import re
import signal
import socket
import sys
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from penchant.errors import ConfigError
from penchant.judges.endpoint import is_loopback


class ServedApp(Protocol):
    """An ASGI application that can be stopped and closed with its server."""

    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]: ...

    def stop(self) -> None:
        """End the requests under way soon."""

    def close(self) -> None:
        """Release everything after serving has ended."""


KEY_ENV = "PENCHANT_API_KEY"  # the environment variable with the required API key
MAX_CONNECTIONS = 256  # maximum number at a time
SHUTDOWN_TIMEOUT = 5  # seconds for responses under way to finish at shutdown
HEAD_TIMEOUT = 20.0  # seconds for the head of a request to arrive
READ_TIMEOUT = 60.0  # seconds for a client to read what was written to it


def check_host(host: str, key: str | None) -> bool:
    """Return True if the address is a loopback address.

    Raises:
        ConfigError: it is not, and there is no key.
    """
    local = is_loopback(host)
    if not local and key is None:
        what = f"{host!r} can be reached from other machines, and there is no key"
        how = f"set the environment variable {KEY_ENV} to a long random text, or leave --host out"
        raise ConfigError("--host", what, how)
    return local


def require_server(command: str = "serve") -> None:
    """Check that the command's extra is installed, before anything is loaded.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        for name in ("starlette", "uvicorn", *(["markdown_it"] if command == "studio" else [])):
            import_module(name)
    except ImportError as error:
        what = f"needs {error.name or 'a web server'}"
        raise ConfigError(f"penchant {command}", what, f"pip install 'penchant[{command}]'") from error


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket.

    Args:
        port: 0 picks a free one.

    Raises:
        ConfigError: the address cannot be bound.
    """
    try:
        addresses = socket.getaddrinfo("127.0.0.1" if host == "localhost" else host, port, type=socket.SOCK_STREAM)
        family, *_, address = addresses[0]
        dual_stack = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # :: means every address of this machine
        return socket.create_server(address, family=family, backlog=128, dualstack_ipv6=dual_stack)
    except (OSError, UnicodeError, OverflowError) as error:
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "another program listens there already" if in_use else str(error)
        raise ConfigError(f"{host}:{port}", f"cannot be bound: {reason}", "choose another --port or --host") from error


def server_url(bound: socket.socket, path: str = "/v1") -> str:
    """Return ``http://HOST:PORT/v1``."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"


def served_name(model: str, name: str | None) -> str:
    """Return the name a model is served under: `name`, a hub id, or the last folder of a path (the run's, for one of its steps)."""
    if name is not None:
        return name
    path = Path(model).expanduser()
    if not path.exists():
        return model
    parts = [p for p in path.resolve().parts if not re.fullmatch(r"model|checkpoints|step-\d+", p)]
    return Path(parts[-1]).stem if path.is_file() else parts[-1]


def _http_protocol() -> Any:
    """Return uvicorn's HTTP protocol class with timeouts and without Nagle's algorithm; a new client may take an idle one's connection."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class TimeoutProtocol(H11Protocol):
        connections: set[Any]
        head_timer: Any = None  # timer that closes a connection whose request head does not arrive
        read_timer: Any = None  # timer that closes one whose client does not read

        @property
        def is_idle(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            # asyncio does so only for sockets that were made with a protocol number; without it, what follows a response's first packet,
            # such as the next token of a stream, waits up to 40 ms for the client to acknowledge that packet
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.since = self.loop.time()
            idle = [c for c in self.connections if c is not self and (c.is_idle or c.cycle.more_body)]
            for other in sorted(idle, key=lambda c: c.since)[: max(0, len(self.connections) - MAX_CONNECTIONS + 1)]:
                self.connections.discard(other)
                other.transport.abort()
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait_for_head()

        def _wait_for_head(self) -> None:
            if not self.is_idle:
                self.head_timer = self._cancel(self.head_timer)
            elif self.head_timer is None:
                self.head_timer = self.loop.call_later(HEAD_TIMEOUT, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self.read_timer = self.loop.call_later(READ_TIMEOUT, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self.read_timer = self._cancel(self.read_timer)

        def connection_lost(self, exc: Exception | None) -> None:
            self.head_timer, self.read_timer = self._cancel(self.head_timer), self._cancel(self.read_timer)
            super().connection_lost(exc)

        def _cancel(self, timer: Any) -> Any:
            if timer is not None:
                timer.cancel()
            return None

    return TimeoutProtocol


@dataclass
class Server:
    """uvicorn with an application.

    Args:
        sock: an already bound socket.
    """

    app: ServedApp
    sock: socket.socket

    def __post_init__(self) -> None:
        import uvicorn

        class Uvicorn(uvicorn.Server):
            """Installs no signal handlers: uvicorn's own would raise the signals again after shutdown."""

            @contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        config = uvicorn.Config(
            self.app,
            http=_http_protocol(),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
        )
        self.uvicorn: Any = Uvicorn(config)

    def run(self) -> None:
        """Serve until `stop` is called."""
        try:
            self.uvicorn.run(sockets=[self.sock])
        finally:
            self.sock.close()
            self.app.close()

    def stop(self) -> None:
        """Shut down: requests under way get an error, the socket is closed and `run` returns."""
        self.app.stop()
        self.uvicorn.should_exit = True

    def run_until_signal(self) -> None:
        """Call `run`, and `stop` at SIGINT or SIGTERM; a second signal forces an immediate exit."""

        def handle_signal(_: int, __: Any) -> None:
            if self.uvicorn.should_exit:
                self.uvicorn.force_exit = True
            self.stop()

        previous_handlers = {s: signal.signal(s, handle_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.run()
        finally:
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)


def set_up_logging(quiet: bool) -> None:
    """Log one line per request to stderr (method, path, status, seconds), never the text of prompts or answers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, level in (
        *((n, logging.ERROR if quiet else logging.INFO) for n in ("penchant.serve", "penchant.studio")),
        ("uvicorn.error", logging.ERROR),
    ):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
