"""A studio in a thread, a logged-in client, and folders for arenas."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from penchant.judges.humans import Preferences
from penchant.serve.server import Server, listen, server_url
from penchant.studio.app import Studio
from penchant.studio.pairs import Answers, Arena, Settings, gold_pairs, make_arena, make_pairs

SOURCE = {"source": "made here", "sha256": "0" * 64}


@contextmanager
def studio_of(folder: Path, port: int = 0, **how: Any) -> Iterator[Any]:
    """Run a studio. `address` ends with a slash, `open` includes the token, `studio` is the application."""
    studio = Studio(folder, **how)
    server: Any = Server(studio, listen("127.0.0.1", port))
    server.address = server_url(server.sock, "/")
    server.open = f"{server.address}?token={studio.token}"
    server.studio = studio
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.uvicorn.started and time.monotonic() < until:
        time.sleep(0.01)
    try:
        yield server
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


class Person:
    """A client like a browser, with the studio's cookie and CSRF token."""

    def __init__(self, server: Any, name: str = "") -> None:
        self.client = httpx.Client(base_url=server.address, follow_redirects=True, trust_env=False)
        page = self.client.get(f"/?token={server.studio.token}")
        assert page.status_code == 200, page.text
        self.csrf = page.text.split('"X-CSRF-Token": "')[1].split('"')[0]
        if name:
            self.client.cookies.set("penchant_annotator", name)

    def get(self, path: str) -> httpx.Response:
        return self.client.get(path)

    def post(self, path: str, data: Mapping[str, Any] | None = None, **headers: str) -> httpx.Response:
        return self.client.post(path, data=data or {"": ""}, headers={"x-csrf-token": self.csrf, **headers})

    def judge(self, arena: str, verdict: str, **more: Any) -> httpx.Response:
        """Judge the pair that is currently shown."""
        page = self.get(f"/arena/{arena}").text
        hidden = {n: page.split(f'name="{n}" value="')[1].split('"')[0] for n in ("order", "pair")}
        return self.post(f"/arena/{arena}/judge", {**hidden, "verdict": verdict, "seconds": "2.5", **more})


def answers_of(pairs: int, models: Sequence[str] = ("dpo", "start")) -> Answers:
    """Answers of models to numbered prompts."""
    rows = [(f"Prompt {i}?", {m: f"Answer {i} of {m}." for m in models}) for i in range(pairs)]
    return Answers(rows, dict.fromkeys(models, SOURCE))


def arena_of(
    folder: Path,
    name: str = "test",
    pairs: int = 12,
    models: Sequence[str] = ("dpo", "start"),
    gold: int = 0,
    answers: Answers | None = None,
    **settings: Any,
) -> Arena:
    """An arena with such answers, and with checks."""
    answers = answers or answers_of(pairs, models)
    made = make_pairs(answers, settings.get("seed", 0))
    golden = [(f"Is {i} one?", {"chosen": "Right.", "rejected": f"Wrong {i}."}) for i in range(gold)]
    made += gold_pairs(Answers(golden, dict.fromkeys(("chosen", "rejected"), SOURCE)))
    return make_arena(folder, name, Settings(models=answers.models, **settings), made)


def lines(arena: Arena) -> list[dict[str, Any]]:
    """The records in an arena's file."""
    return [json.loads(line) for line in arena.preferences.path.read_text().splitlines()]


def judgements(arena: Arena) -> list[Any]:
    """The current judgments, read from the file."""
    return list(Preferences(arena.preferences.path).refresh().judgements.values())
