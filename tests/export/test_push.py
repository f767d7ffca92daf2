"""A push to a fake hub on 127.0.0.1: the requests, the content, and that no token is ever shown."""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from processes import forked

from penchant.base.text import redact
from penchant.errors import ConfigError, PenchantError
from penchant.export.export import check_push, push

TOKEN = "hf_not_to_be_seen_anywhere"
GONE = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


class Hub(BaseHTTPRequestHandler):
    """The part of the hub that a push needs. Small files are sent in the commit."""

    asked: list[tuple[str, str, Any]]
    refuse: bool
    disable_nagle_algorithm = (
        True  # head and body are two packets, and without this the client's delayed ACK takes 40 ms
    )

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        type(self).asked.append((self.command, self.path, (self.headers.get("Authorization"), body)))
        if type(self).refuse:
            return self._send(403, {"error": f"no right with {self.headers.get('Authorization')}\x1b[2J"})
        if self.path == "/api/repos/create":
            return self._send(200, {"url": f"http://{self.headers['Host']}/me/tuned", "id": "me/tuned"})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self._send(200, {"files": [{**f, "shouldIgnore": False} for f in files]})
        if "/commit/" in self.path:
            url = f"http://{self.headers['Host']}/me/tuned/commit/{'0' * 40}"
            type(self).refuse = True
            return self._send(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url})
        return self._send(200, {"id": "me/tuned", "sha": "0" * 40, "siblings": [], "type": "user", "name": "me"})

    do_GET = do_POST = do_PUT = do_HEAD = _answer

    def _send(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[type[Hub]]:
    kind = type("OneHub", (Hub,), {"asked": [], "refuse": False})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    kind.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield kind
    server.shutdown()
    server.server_close()


def _push_twice(hub: Any, folder: Path) -> tuple[int | None, str, str]:
    """Push twice in a separate process, and return exit codes, output and errors. The hub refuses the second push.

    A process is needed because the hub's address is read when its library is imported.
    """

    def both() -> int:
        for name in [n for n in os.environ if n in GONE or "proxy" in n.lower()]:
            del os.environ[name]
        os.environ |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder.parent / "home"), "HF_TOKEN": TOKEN}
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        for name in [n for n in sys.modules if n.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[name]
        check_push("me/tuned")
        print(push(folder, "me/tuned", private=True, message="m"))
        try:
            push(folder, "me/tuned", private=True, message="m")
        except PenchantError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        return 0

    said = [folder.parent / name for name in ("out", "err")]
    with said[0].open("w") as out, said[1].open("w") as err:
        process = forked(both, (0, out.fileno(), err.fileno()))
    process.join(300)
    return process.exitcode, *(path.read_text() for path in said)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "exported"
    made.mkdir()
    (made / "README.md").write_text("---\ntags: [penchant]\n---\n# A model\n")
    (made / "config.json").write_text("{}")
    return made


def test_a_push_makes_the_repository_and_one_commit_and_a_refusal_is_one_paragraph(hub: Any, folder: Path) -> None:
    code, out, err = _push_twice(hub, folder)
    create = next(json.loads(body) for _, path, (_, body) in hub.asked if path == "/api/repos/create")
    assert create["name"] == "tuned" and create["organization"] == "me"
    assert create.get("private") is True or create.get("visibility") == "private"
    (commit,) = [body for _, path, (_, body) in hub.asked if "/commit/" in path]
    lines = [json.loads(text) for text in commit.splitlines()]
    files = {v["value"]["path"]: base64.b64decode(v["value"]["content"]) for v in lines if v["key"] == "file"}
    assert files["config.json"] == b"{}" and files["README.md"] == (folder / "README.md").read_bytes()
    assert {given for _, _, (given, _) in hub.asked} <= {None, f"Bearer {TOKEN}"}
    assert "/me/tuned/" in out and "Traceback" not in err
    # the hub's reply repeats the token and contains a terminal control sequence
    assert code == 2 and "the hub rejected it" in err and "is written and whole" in err
    assert TOKEN not in out + err and "\x1b" not in err


def test_without_a_token_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="there is no token of the hub; set HF_TOKEN") as error:
        check_push("me/tuned")
    assert error.value.exit_code == 2


def test_names_and_bases_are_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for bad in ("tuned", "a/b/c", "../x", "me/--"):
        with pytest.raises(ConfigError, match="not the name of a repository"):
            check_push(bad)
    with pytest.raises(ConfigError, match="push --to merged instead"):
        check_push("me/tuned", "/models/base")
    check_push("me/tuned", "owner/base")


def test_what_looks_like_a_secret_is_hidden() -> None:
    environment = {
        "WANDB_API_KEY": "0123456789abcdef",
        "SOME_PASSWORD": "open sesame",
        "HOME": "/nowhere",
        "SHORT_TOKEN": "a",
    }
    text = "key 0123456789abcdef, open sesame, https://me:pw@host/x?token=abc&y=1, Bearer abcdefghij, hf_abcdefghijk, a word"
    assert redact(text, environment) == (
        "key [hidden], [hidden], https://[hidden]@host/x?token=[hidden]&y=1, Bearer [hidden], [hidden], a word"
    )
