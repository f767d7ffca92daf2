"""The pages of runs: the list, curves as they grow, samples, the report."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from itertools import islice
from pathlib import Path
from time import time
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from penchant.report.data import read_report
from penchant.report.page import render
from penchant.report.svg import number
from penchant.runfolder import CONFIG, REPORT
from penchant.runfolder.read import read, read_text
from penchant.runfolder.values import mapping, mappings, number_of, sequence, text
from penchant.studio.app import Area, Studio
from penchant.studio.shelf import Feed, Shelf, facts_of, titles
from penchant.watch.views import OPEN_STATES, is_run

EVERY = 1.0  # seconds between two looks at the runs of a page
BEAT = 15  # looks without news after which a connection is told that it is still there
MOST_RUNS = 24  # drawn over each other
SAMPLES = 12  # that a page shows
REPORT_BYTES = 64 << 20
# of a report: it runs its own script, in a frame that is no page of the studio and may ask for nothing
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
STATES = {"running": "good", "preparing": "good", "stopped": "bad", "interrupted": "warn", "paused": "warn"}


class Runs:
    """The area of runs."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.shelf = studio, Shelf(studio.folder)
        studio.templates.globals |= {"ago": ago, "tone": STATES.get}
        studio.templates.filters["figure"] = lambda value: number(number_of(value))

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/runs", self.list),
            Route("/runs/view", self.view),
            Route("/runs/group", self.group),
            Route("/runs/feed", self.feed),
            Route("/runs/samples", self.samples),
            Route("/runs/report", self.report),
        ]

    def run_of(self, name: str) -> str:
        """A run's path as it is linked.

        Raises:
            HTTPException: there is no run (404).
        """
        folder = self.studio.inside(name)
        if not is_run(folder):
            raise HTTPException(404, "there is no run in this folder")
        return self.studio.relative(folder)

    async def list(self, request: Request) -> Response:
        lines, more = await run_in_threadpool(self.shelf.lines)
        word = request.query_params.get("q", "").strip().lower()
        some = [line for line in lines if word in f"{line.path} {line.kind} {line.state} {line.method}".lower()]
        part = "hx-request" in request.headers
        template = "run_lines.html" if part else "runs.html"
        return self.studio.page(request, template, lines=some, word=word, all=len(lines), more=more, now=time())

    async def view(self, request: Request) -> Response:
        """One run, or several over each other."""
        asked = list(dict.fromkeys(request.query_params.getlist("run")))
        if not asked:
            raise HTTPException(404, "no run is named: choose some in the list")
        paths = [self.run_of(name) for name in asked[:MOST_RUNS]]
        facts = {}
        for path in paths:
            view = await run_in_threadpool(self.shelf.followed, path)
            facts[path] = {**facts_of(view, path), "method": view.method, "open": view.state in OPEN_STATES}
        values: dict[str, Any] = {
            "paths": paths,
            "facts": facts,
            "titles": titles(),
            "left_out": len(asked) - len(paths),
        }
        if len(paths) == 1:
            folder = self.studio.inside(paths[0])
            values |= {"config": read_text(folder / CONFIG)[:100_000]}
        return self.studio.page(request, "run.html" if len(paths) == 1 else "overlay.html", **values)

    async def group(self, request: Request) -> Response:
        """A sweep, a pipeline or a comparison."""
        path = self.studio.relative(self.studio.inside(request.query_params.get("path", ".")))
        lines, _ = await run_in_threadpool(self.shelf.lines)
        kind = request.query_params.get("kind", "")
        line = next((e for e in lines if e.path == path and e.kind == kind), None)
        if line is None or kind == "run":
            raise HTTPException(404, "there is no such sweep, pipeline or comparison")
        prefix = "" if path == "." else f"{path}/"
        inside = [e for e in lines if e is not line and e.path.startswith(prefix)]
        table = mapping(read(self.studio.inside(path)).sweep.get("table"))
        return self.studio.page(
            request, "group.html", line=line, lines=inside, table=table, settings=mappings(table.get("settings")),
            best=sequence(table.get("best")), now=time(),
        )  # fmt: skip

    async def feed(self, request: Request) -> Response:
        """What is new of some runs, as it comes (server-sent events)."""
        paths = [self.run_of(name) for name in request.query_params.getlist("run")[:MOST_RUNS]]
        if not paths:
            raise HTTPException(404, "no run is named")
        return StreamingResponse(self._events(Feed(self.shelf, paths)), media_type="text/event-stream")

    async def _events(self, feed: Feed) -> AsyncIterator[str]:
        silent = 0
        start: Mapping[str, Any] = {"start": True}
        while not self.studio.closing:
            news = await run_in_threadpool(feed.news)
            silent = 0 if news or start else silent + 1
            if news or start:
                yield f"data: {json.dumps({**start, 'runs': news}, separators=(',', ':'))}\n\n"
                start = {}
            elif silent % BEAT == 0:
                yield ": still here\n\n"
            await asyncio.sleep(EVERY)

    async def samples(self, request: Request) -> Response:
        """The last samples of a run."""
        path = self.run_of(request.query_params.get("run", ""))
        view = await run_in_threadpool(self.shelf.followed, path)
        some = [sample_of(row) for row in islice(view.samples, SAMPLES)]
        return self.studio.page(request, "samples.html", samples=some, of=len(view.samples))

    async def report(self, request: Request) -> Response:
        """A folder's report: the one that lies there, or one made of its files as they are."""
        folder = self.studio.inside(request.query_params.get("path", "."))
        page = await run_in_threadpool(self._report, folder)
        return HTMLResponse(page, headers={"content-security-policy": REPORT_POLICY})

    def _report(self, folder: Path) -> str:
        file = folder / REPORT
        if file.is_file() and file.resolve().is_relative_to(self.studio.folder) and file.stat().st_size < REPORT_BYTES:
            return file.read_text(encoding="utf-8", errors="replace")
        return render(read_report([folder], time()))


def ago(seconds: float) -> str:
    """How long something is gone, in its largest unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "now"


def sample_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of samples.jsonl as its turns and the answers to them."""
    turns = [(text(m.get("role")), text(m.get("content"))) for m in mappings(row.get("messages"))]
    answers = {"before training": row.get("before"), "after training": row.get("after", row.get("completion"))}
    rewards = {
        "before training": row.get("reward_before"),
        "after training": row.get("reward_after", row.get("reward")),
    }
    return {
        "turns": turns or [("prompt", text(row.get("prompt")))],
        "answers": [(name, text(said), rewards[name]) for name, said in answers.items() if said is not None],
    }


def area(studio: Studio) -> Area:
    """Runs, as they are and as they go on."""
    return Area("Runs", "/runs", Runs(studio).routes)
