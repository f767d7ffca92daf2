"""The pages of runs: the list, live curves, samples, the report, and starting, stopping and resuming."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from itertools import islice
from pathlib import Path
from time import time
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from penchant.base.text import gigabytes
from penchant.errors import ConfigError, PenchantError
from penchant.metrics.names import metric
from penchant.report.data import read_report
from penchant.report.page import render, says_running
from penchant.report.svg import duration, number
from penchant.runfolder import CONFIG, REPORT, SAMPLES, SAMPLES_BEFORE
from penchant.runfolder.read import lock_state, read_folder, read_text
from penchant.runfolder.values import mapping, mappings, number_of, sequence, text
from penchant.studio.app import Area, Studio, is_linkable, read_fields, read_form
from penchant.studio.launch import Processes, draft, first_keys, form_parts, settings_of, suggestions
from penchant.studio.shelf import Feed, Shelf, facts_of, titles
from penchant.watch.views import OPEN_STATES, is_run

EVERY = 1.0  # seconds between two updates of a page
BEAT = 15  # updates without news before a keep-alive is sent
MAX_RUNS = 24  # maximum in one overlay
SHOWN = 12  # samples per page
REPORT_BYTES = 64 << 20
# policy of a report: it runs its own script in a sandboxed frame and may not make requests
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
STOPPING_TEXT = "stopping; it writes a checkpoint first"
STARTING_TEXT = "starting; it is loading the model and the data"
ENDED_EARLY = ("stopped", "interrupted", "paused")
STATES = {"running": "good", "preparing": "good", "stopped": "bad", "interrupted": "warn", "paused": "warn"}


class Runs:
    """The pages of runs."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.shelf = studio, Shelf(studio.folder)
        self.processes, self._planning = Processes(studio.folder), asyncio.Lock()
        studio.templates.globals |= {"ago": ago, "bytes": gigabytes, "duration": duration, "tone": STATES.get}
        studio.templates.filters["json"] = json.dumps
        studio.templates.filters["short_sum"] = short_sum
        studio.templates.filters["figure"] = lambda value: number(number_of(value))

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/runs", self.list),
            Route("/runs/view", self.view),
            Route("/runs/actions", self.actions),
            Route("/runs/group", self.group),
            Route("/runs/feed", self.feed),
            Route("/runs/samples", self.samples),
            Route("/runs/report", self.report),
            Route("/runs/new", self.new),
            Route("/runs/own", self.own_keys),
            Route("/runs/plan", self.plan, methods=["POST"]),
            Route("/runs/start", self.start, methods=["POST"]),
            Route("/runs/stop", self.stop, methods=["POST"]),
            Route("/runs/resume", self.resume, methods=["POST"]),
        ]

    def run_path(self, name: str) -> str:
        """Return a run's path as it is linked.

        Raises:
            HTTPException: there is no such run (404).
        """
        folder = self.studio.resolve(name)
        if not is_run(folder):
            raise HTTPException(404, "there is no run in this folder")
        return self.studio.relative(folder)

    async def list(self, request: Request) -> Response:
        lines, cut_short = await run_in_threadpool(self.shelf.lines)
        word = request.query_params.get("q", "").strip().lower()
        matching = [line for line in lines if word in f"{line.path} {line.kind} {line.state} {line.method}".lower()]
        is_fragment = "hx-request" in request.headers
        template = "run_lines.html" if is_fragment else "runs.html"
        return self.studio.page(
            request, template, lines=matching, word=word, all=len(lines), more=cut_short, now=time()
        )

    async def view(self, request: Request) -> Response:
        """Show one run, or several overlaid."""
        names = list(dict.fromkeys(request.query_params.getlist("run")))
        if not names:
            raise HTTPException(404, "no run is named: choose some in the list")
        folder = self.studio.resolve(names[0])
        if len(names) == 1 and not is_run(folder) and self.studio.relative(folder) in self.processes.started:
            return self._starting_page(request, self.studio.relative(folder))
        if "hx-request" in request.headers:  # from the page that waits for a run to start
            return Response(headers={"hx-refresh": "true"})
        paths = [self.run_path(name) for name in names[:MAX_RUNS]]
        facts = {}
        for path in paths:
            view = await run_in_threadpool(self.shelf.follow, path)
            facts[path] = {**facts_of(view, path), "method": view.method}
        values: dict[str, Any] = {
            "paths": paths,
            "facts": facts,
            "titles": titles(),
            "left_out": len(names) - len(paths),
        }
        if len(paths) == 1:
            values |= {"config": read_text(self.studio.resolve(f"{paths[0]}/{CONFIG}"))[:100_000]}
            values |= self._allowed_actions(paths[0], facts[paths[0]]["state"])
            quarantine_files = self.studio.resolve(paths[0]).glob("quarantine.*.jsonl")
            values["aside"] = sorted(f.name for f in quarantine_files if is_linkable(f.name))
        return self.studio.page(request, "run.html" if len(paths) == 1 else "overlay.html", **values)

    def _allowed_actions(self, path: str, state: str) -> dict[str, Any]:
        """Return which actions a run allows, and why its process failed if it did."""
        folder = self.studio.resolve(path)
        locked, stop_requested = lock_state(folder) == "held", self.processes.stop_requested(path)
        in_use = locked or self.processes.is_running(path)
        ended_or_stopping = not in_use or stop_requested
        starting = in_use and not stop_requested and state not in OPEN_STATES
        return {
            "failure": "" if state in OPEN_STATES else self.processes.failure(path),
            "can_stop": in_use and not ended_or_stopping,
            "doing": STOPPING_TEXT if locked and stop_requested else STARTING_TEXT if starting else "",
            "can_resume": ended_or_stopping and state in ENDED_EARLY and (folder / CONFIG).is_file(),
        }

    async def actions(self, request: Request) -> Response:
        """Return the buttons of a run's page, requested when the allowed actions change."""
        path = self.run_path(request.query_params.get("run", ""))
        view = await run_in_threadpool(self.shelf.follow, path)
        return self.studio.page(request, "run_actions.html", run=path, **self._allowed_actions(path, view.state))

    async def group(self, request: Request) -> Response:
        """Show a sweep, a pipeline or a comparison."""
        path = self.studio.relative(self.studio.resolve(request.query_params.get("path", ".")))
        lines, _ = await run_in_threadpool(self.shelf.lines)
        kind = request.query_params.get("kind", "")
        line = next((entry for entry in lines if entry.path == path and entry.kind == kind), None)
        if line is None or kind == "run":
            raise HTTPException(404, "there is no such sweep, pipeline or comparison")
        prefix = "" if path == "." else f"{path}/"
        members = [entry for entry in lines if entry is not line and entry.path.startswith(prefix)]
        table = mapping(read_folder(self.studio.resolve(path)).sweep.get("table"))
        settings = [{**row, "seeds": sequence(row.get("seeds"))} for row in mappings(table.get("settings"))]
        return self.studio.page(
            request, "group.html", line=line, lines=members, settings=settings,
            metric=metric(text(table.get("metric")).removeprefix("eval/")).title, best=sequence(table.get("best")), now=time(),
        )  # fmt: skip

    async def feed(self, request: Request) -> Response:
        """Stream updates of several runs as server-sent events."""
        paths = [self.run_path(name) for name in request.query_params.getlist("run")[:MAX_RUNS]]
        if not paths:
            raise HTTPException(404, "no run is named")
        return StreamingResponse(self._events(Feed(self.shelf, paths)), media_type="text/event-stream")

    async def _events(self, feed: Feed) -> AsyncIterator[str]:
        idle_updates = 0
        start: Mapping[str, Any] = {"start": True}
        while not self.studio.closing:
            updates = await run_in_threadpool(feed.updates)
            idle_updates = 0 if updates or start else idle_updates + 1
            if updates or start:
                yield f"data: {json.dumps({**start, 'runs': updates}, separators=(',', ':'))}\n\n"
                start = {}
            elif idle_updates % BEAT == 0:
                yield ": still here\n\n"
            await asyncio.sleep(EVERY)

    async def samples(self, request: Request) -> Response:
        """Show the latest samples of a run."""
        path = self.run_path(request.query_params.get("run", ""))
        for name in (SAMPLES, SAMPLES_BEFORE):
            self.studio.resolve(f"{path}/{name}")
        view = await run_in_threadpool(self.shelf.follow, path)
        samples = [sample_of(row) for row in islice(view.samples, SHOWN)]
        return self.studio.page(request, "samples.html", samples=samples, of=len(view.samples))

    async def report(self, request: Request) -> Response:
        """Return a folder's report: the existing one if what it says of the state still holds, or one rendered from its current files."""
        folder = self.studio.resolve(request.query_params.get("path", "."))
        page = await run_in_threadpool(self._report, folder)
        return HTMLResponse(page, headers={"content-security-policy": REPORT_POLICY})

    def _report(self, folder: Path) -> str:
        file = folder / REPORT
        if file.is_file() and file.resolve().is_relative_to(self.studio.folder) and file.stat().st_size < REPORT_BYTES:
            page = file.read_text(encoding="utf-8", errors="replace")
            # the process of a killed run cannot write that it has ended
            if not says_running(page) or read_report([folder], time()).is_running:
                return page
        return render(read_report([folder], time()))

    # ---- start, stop, resume -----------------------------------------------------------------------------------------

    def _starting_page(self, request: Request, path: str) -> Response:
        """Show a run that was started but has not written anything yet."""
        running = self.processes.is_running(path)
        output = (
            self.processes.output_of(path)
            if running
            else self.processes.failure(path) or self.processes.output_of(path)
        )
        return self.studio.page(request, "starting.html", run=path, going=running, said=output)

    async def new(self, request: Request) -> Response:
        """Show the form, empty or filled in with the settings of a run."""
        settings: dict[str, str] = {}
        if (source_run := request.query_params.get("like")) is not None:
            folder = self.studio.resolve(self.run_path(source_run))
            settings = settings_of(read_folder(folder).config)
            settings["output"] = _unused_name(self.studio.folder, self.run_path(source_run))
        suggested = await run_in_threadpool(suggestions, self.studio.folder)
        first = first_keys()
        top = {key.path for key in first}
        method = settings.get("loss.name", ""), settings.get("algorithm.name", "")
        sections = [*form_parts(*method)]
        form_paths = top.union(*({key.path for key in part.keys} for part in sections))
        extra_lines = "\n".join(f"{key}={value}" for key, value in settings.items() if key not in form_paths)
        return self.studio.page(
            request, "new.html", first=first, parts=sections, top=top, given=settings, more=extra_lines, offered=suggested
        )  # fmt: skip

    async def own_keys(self, request: Request) -> Response:
        """Return the form fields of the selected loss or algorithm."""
        query = request.query_params
        sections = form_parts(query.get("loss.name", ""), query.get("algorithm.name", ""))
        method_parts = [part for part in sections if part.title in ("loss", "algorithm")]
        top = {key.path for key in first_keys()}
        return self.studio.page(request, "new_parts.html", parts=method_parts, top=top, given={}, offered={})

    async def plan(self, request: Request) -> Response:
        """Show the form's YAML, the plan of the run, and the start button."""
        fields = await read_fields(request)
        values: dict[str, Any] = {"made": None, "error": "", "plan": None}
        try:
            new_run = values["made"] = await run_in_threadpool(draft, self.studio.folder, fields)
            if self._planning.locked():
                raise ConfigError("plan", "another one is being made", "wait for it")
            async with self._planning:
                probe = ("probe", "on") in fields
                values["plan"] = await run_in_threadpool(self.processes.plan, new_run.text, probe)
        except PenchantError as error:
            values["error"] = str(error)
        return self.studio.page(request, "outcome.html", **values)

    async def start(self, request: Request) -> Response:
        new_run = await run_in_threadpool(draft, self.studio.folder, await read_fields(request))
        await run_in_threadpool(self.processes.start, new_run)
        return _redirect_to_run(new_run.folder)

    async def stop(self, request: Request) -> Response:
        path = self._requested_run(await read_form(request))
        self.processes.stop(path)
        return Response(STOPPING_TEXT, media_type="text/plain")

    async def resume(self, request: Request) -> Response:
        path = self._requested_run(await read_form(request))
        await run_in_threadpool(self.processes.resume, path)
        return _redirect_to_run(path)

    def _requested_run(self, params: Mapping[str, str]) -> str:
        path = self.studio.relative(self.studio.resolve(params.get("run", "")))
        return path if path in self.processes.started else self.run_path(path)


def _redirect_to_run(path: str) -> Response:
    """Redirect to a run's page."""
    return Response(headers={"hx-redirect": f"/runs/view?run={quote(path)}"})


def _unused_name(root: Path, path: str) -> str:
    """Return an unused name for a run derived from another."""
    number = 2
    while (root / f"{path}-{number}").exists() or (root / f"{path}-{number}.yaml").exists():
        number += 1
    return f"{path}-{number}"


def short_sum(path: str) -> str:
    """Hash a path into an element id: htmx finds preserved elements by a selector, where a slash is a syntax error."""
    return hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def ago(seconds: float) -> str:
    """Format an age in its largest unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "now"


def sample_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Split a line of samples.jsonl into its turns and answers."""
    turns = [(text(m.get("role")), text(m.get("content"))) for m in mappings(row.get("messages"))]
    # during a run only the samples from before training exist, with one completion each
    answers = {"before training": row.get("before", row.get("completion")), "after training": row.get("after")}
    rewards = {
        "before training": row.get("reward_before", row.get("reward")),
        "after training": row.get("reward_after"),
    }
    return {
        "turns": turns or [("prompt", text(row.get("prompt")))],
        "answers": [(name, text(answer), rewards[name]) for name, answer in answers.items() if answer is not None],
    }


def area(studio: Studio) -> Area:
    """Return the area of runs."""
    runs = Runs(studio)
    return Area("Runs", "/runs", runs.routes, runs.processes.close, runs.shelf.lines)
