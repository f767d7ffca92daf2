"""A fake local OpenAI-compatible endpoint, well-behaved or not."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TEXTS = re.compile(r"<<prompt (\w+)>>\n(.*)\n<<answer A \1>>\n(.*)\n<<answer B \1>>\n(.*)\n<<end \1>>", re.DOTALL)


@dataclass
class Asked:
    """A received request."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def content(self) -> str:
        return str(self.body["messages"][0]["content"])

    @property
    def texts(self) -> tuple[str, str, str]:
        """Prompt, first and second answer."""
        found = TEXTS.search(self.content)
        assert found is not None, self.content
        return found.group(2), found.group(3), found.group(4)


# a reply: a text (200), a status, (status, headers) or (status, headers, body)
Reply = str | int | tuple[Any, ...]


@dataclass
class Server:
    """Requests so far, and the largest number of concurrent ones."""

    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    most: int = 0
    now: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def questions(self) -> list[Asked]:
        """The requests without the trial question."""
        return [a for a in self.asked if a.texts[0] != "Say hello."]


@contextmanager
def serve(decide: Callable[[Asked, int], Reply]) -> Iterator[Server]:
    """Run an endpoint that replies with `decide(request, its number)`."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = (
            True  # head and body are two packets, and without this the client's delayed ACK takes 40 ms
        )

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                asked = Asked(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
                state.asked.append(asked)
                number = len(state.asked)
                state.now += 1
                state.most = max(state.most, state.now)
            try:
                reply = decide(asked, number)
            finally:
                with state.lock:  # before the reply is sent, because the client may send the next request at once
                    state.now -= 1
            self._answer(reply)

        def do_GET(self) -> None:
            state.asked.append(Asked(self.path, {k.lower(): v for k, v in self.headers.items()}, {}))
            self._answer(404)

        def _answer(self, reply: Reply) -> None:
            if isinstance(reply, str):
                reply = (200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}))
            status, headers, text = (*((reply,) if isinstance(reply, int) else reply), {}, "")[:3]
            data = text.encode() if isinstance(text, str) else b""
            with suppress(ConnectionError):  # the client has gone
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def longer(asked: Asked, _: int) -> str:
    """A well-behaved judge that prefers the longer answer."""
    _prompt, a, b = asked.texts
    return "A" if len(a) > len(b) else "B" if len(b) > len(a) else "TIE"
