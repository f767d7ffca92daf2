"""A fake local Hugging Face hub that serves data sets to the real client, with configurable faults."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Asked:
    """A request: method, path, headers in lower case, and which of the two servers received it."""

    method: str
    path: str
    headers: dict[str, str]
    server: str


@dataclass
class FakeHub:
    """Repositories and faults.

    Args:
        files: ``{hub id: {path: content}}``; lfs: path endings of files in large file storage (SHA-256 and a second host).
        gated: ids whose files need `token` and accepted terms; accepted: whether that token's account has accepted them.
        fail: statuses to return for requests to paths that contain the key, one per request, before they are served.
        cut: paths whose first download breaks off; wrong: how many downloads of a path have wrong content.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    configs: dict[str, list[dict]] = field(default_factory=dict)
    lfs: tuple[str, ...] = (".parquet", ".gz", ".jsonl")
    gated: set[str] = field(default_factory=set)
    token: str = "hf_right"
    accepted: bool = True
    fail: dict[str, list[int]] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    wrong: dict[str, int] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    url: str = ""
    cdn: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def paths(self, method: str = "GET", server: str = "cdn") -> list[str]:
        return [a.path for a in self.asked if a.method == method and a.server == server]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = (
        True  # head and body are two packets, and without this the client's delayed ACK takes 40 ms
    )
    hub: FakeHub
    name: str

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            headers = {k.lower(): v for k, v in self.headers.items()}
            self.hub.asked.append(Asked(self.command, path, headers, self.name))
            waiting = next((v for k, v in self.hub.fail.items() if k in path and v), None)
            status = waiting.pop(0) if waiting else None
        if status is not None:
            return self._answer(status, b"{}", {"X-Error-Message": "busy"})
        if self.name == "cdn":
            hub_id, _, file = path.removeprefix("/file/").partition("::")
            return self._file(hub_id, file, self.hub.files[hub_id][file])
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/revision/(.+)", path):
            return self._info(found[1], found[2])
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)", path):
            return self._tree(found[1])
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(found[1], found[3])
        self._answer(404, b"{}", {})

    def _authorised(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _bad_token(self) -> bool:
        given = self._authorised()
        if given and given != self.hub.token:
            self._answer(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
            return True
        return False

    def _missing(self, hub_id: str) -> bool:
        if hub_id in self.hub.files:
            return False
        status = 404 if self._authorised() else 401
        self._answer(status, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        return True

    def _info(self, hub_id: str, revision: str) -> None:
        if self._bad_token() or self._missing(hub_id):
            return
        if revision not in ("main", COMMIT, "refs/convert/parquet"):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        info = {
            "id": hub_id,
            "sha": COMMIT,
            "gated": hub_id in self.hub.gated and "auto",
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [],
            "cardData": {"configs": self.hub.configs.get(hub_id)} if hub_id in self.hub.configs else {},
        }
        self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _tree(self, hub_id: str) -> None:
        if self._bad_token() or self._missing(hub_id):
            return
        listed = [_entry(p, c, p.endswith(self.hub.lfs)) for p, c in self.hub.files[hub_id].items()]
        self._answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})

    def _resolve(self, hub_id: str, path: str) -> None:
        if self._bad_token() or self._missing(hub_id):
            return
        if hub_id in self.hub.gated and not (self._authorised() and self.hub.accepted):
            status = 403 if self._authorised() else 401
            what = f"Access to dataset {hub_id} is restricted."
            return self._answer(status, what.encode(), {"X-Error-Code": "GatedRepo", "X-Error-Message": what})
        content = self.hub.files[hub_id].get(path)
        if content is None:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        if path.endswith(self.hub.lfs):
            headers = {
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
                "Location": f"{self.hub.cdn}/file/{hub_id}::{path}?X-Amz-Signature=SIGNED",
            }
            return self._answer(302, b"", headers)
        self._file(hub_id, path, content)

    def _file(self, hub_id: str, path: str, content: bytes) -> None:
        with self.hub.lock:
            cut = self.command == "GET" and path in self.hub.cut
            self.hub.cut.discard(path) if cut else None
            wrong = self.command == "GET" and self.hub.wrong.get(path, 0) > 0
            if wrong:
                self.hub.wrong[path] -= 1
        headers = {"ETag": f'"{_git_sha1(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        body = bytes(reversed(content)) if wrong else content
        status = 200
        if (asked := self.headers.get("Range")) and (found := re.fullmatch(r"bytes=(\d+)-(\d*)", asked)):
            start, end = int(found[1]), int(found[2] or len(body) - 1)
            headers["Content-Range"] = f"bytes {start}-{min(end, len(body) - 1)}/{len(body)}"
            body, status = body[start : end + 1], 206
        self._answer(status, body, headers, cut)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        with suppress(ConnectionError):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Log nothing."""


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _entry(path: str, content: bytes, lfs: bool) -> dict:
    held = {"type": "file", "path": path, "size": len(content), "oid": _git_sha1(content)}
    if lfs:
        held["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return held


@contextmanager
def fake_hub(**settings: object) -> Iterator[FakeHub]:
    """Run a hub, and a second host with its large files."""
    hub = FakeHub(**settings)  # type: ignore[arg-type]
    servers = []
    for name in ("hub", "cdn"):
        handler = type("Handler", (_Handler,), {"hub": hub, "name": name})
        # another local address for the second host, because clients send a token to the first only
        server = ThreadingHTTPServer(("127.0.0.1" if name == "hub" else "127.0.0.2", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
    hub.url, hub.cdn = (f"http://{s.server_address[0]}:{s.server_port}" for s in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
