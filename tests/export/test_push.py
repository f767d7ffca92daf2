"""A push to a hub of our own on 127.0.0.1: what is asked of it, what is sent, and that no token is ever shown."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from penchant.base.text import redact
from penchant.errors import ConfigError
from penchant.export.export import check_push

TOKEN = "hf_not_to_be_seen_anywhere"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one push needs; small files come inside the commit."""

    asked: list[tuple[str, str, Any]]
    refuse: bool

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


def _push_twice(hub: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's address is read when its library is imported. The hub refuses the second one."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom penchant.errors import PenchantError\n"
        "from penchant.export.export import check_push, push\n"
        "check_push('me/tuned')\n"
        "print(push(Path(sys.argv[1]), 'me/tuned', private=True, message='m'))\n"
        "try:\n    push(Path(sys.argv[1]), 'me/tuned', private=True, message='m')\n"
        "except PenchantError as error:\n    print(error, file=sys.stderr)\n    sys.exit(error.exit_code)"
    )
    gone = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    environment = {k: v for k, v in os.environ.items() if k not in gone and "proxy" not in k.lower()}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder.parent / "home"), "HF_TOKEN": TOKEN}
    environment |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "exported"
    made.mkdir()
    (made / "README.md").write_text("---\ntags: [penchant]\n---\n# A model\n")
    (made / "config.json").write_text("{}")
    return made


def test_a_push_makes_the_repository_and_one_commit_and_a_refusal_is_one_paragraph(hub: Any, folder: Path) -> None:
    done = _push_twice(hub, folder)
    create = next(json.loads(body) for _, path, (_, body) in hub.asked if path == "/api/repos/create")
    assert create["name"] == "tuned" and create["organization"] == "me"
    assert create.get("private") is True or create.get("visibility") == "private"
    (commit,) = [body for _, path, (_, body) in hub.asked if "/commit/" in path]
    lines = [json.loads(text) for text in commit.splitlines()]
    files = {v["value"]["path"]: base64.b64decode(v["value"]["content"]) for v in lines if v["key"] == "file"}
    assert files["config.json"] == b"{}" and files["README.md"] == (folder / "README.md").read_bytes()
    assert {given for _, _, (given, _) in hub.asked} <= {None, f"Bearer {TOKEN}"}
    assert "/me/tuned/" in done.stdout and "Traceback" not in done.stderr
    # the hub repeats the token and a terminal's control sequence in what it says
    assert done.returncode == 2 and "the hub did not take it" in done.stderr and "is written and whole" in done.stderr
    assert TOKEN not in done.stdout + done.stderr and "\x1b" not in done.stderr


def test_without_a_token_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="there is no token of the hub; set HF_TOKEN") as error:
        check_push("me/tuned")
    assert error.value.exit_code == 2


def test_names_and_bases_are_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for bad in ("tuned", "a/b/c", "../x", "me/--"):
        with pytest.raises(ConfigError, match="no name of a repository"):
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
