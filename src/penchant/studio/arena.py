"""The arena: two anonymous answers side by side, and one key to say which is better."""

from __future__ import annotations

import json
import secrets
import shlex
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from markupsafe import Markup
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from penchant.base.files import file_sha256
from penchant.compare.humans import human_verdict
from penchant.errors import DataError
from penchant.judges.endpoint import connect
from penchant.judges.humans import PREFERENCES, Judgement, turns_of
from penchant.runfolder import COMPARISON_ROWS, MANIFEST, SAMPLES, checkpoints
from penchant.studio import pairs
from penchant.studio.app import Area, Studio, read_fields, read_form
from penchant.studio.launch import suggestions
from penchant.studio.pairs import Arena, Settings
from penchant.studio.queue import Item, item_of, next_item
from penchant.studio.results import results_body, results_page
from penchant.studio.shelf import find_folders
from penchant.studio.text import render_markdown, should_fold
from penchant.studio.writers import Writers, approve_endpoint

ASSIGNMENT_TIMEOUT = 900.0  # seconds for which a pair on one annotator's screen is kept from the others
ANNOTATOR_COOKIE = "penchant_annotator"
VERDICT_BUTTONS = {"left", "right", "tie", "both_bad", "skip"}
MAX_EDITED = 100_000  # maximum characters of an answer written by an annotator
# (verdict, label, key shown, keys accepted)
KEYS = (
    ("left", "Left", "←", "ArrowLeft 1"),
    ("tie", "Tie", "T", "t 0"),
    ("both_bad", "Both bad", "B", "b"),
    ("right", "Right", "→", "ArrowRight 2"),
)


@dataclass(frozen=True, slots=True)
class Assignment:
    """A pair on an annotator's screen: the annotator's record count at that time, and when it was shown."""

    pair: str
    order: int
    since: float


class Sessions:
    """The opened arenas of a folder, and which pair each annotator is looking at."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.opened: dict[str, tuple[tuple[int, int], Arena]] = {}  # by name, with (inode, mtime) to detect a new arena
        self.assignments: dict[tuple[str, str], Assignment] = {}  # by (arena, annotator)
        self.bodies: dict[str, tuple[Arena, int, Markup]] = {}  # by name: (arena, records, rendered results)
        self.writers = Writers()

    def arena_of(self, request: Request) -> Arena:
        """Return the arena that a request's URL names.

        Raises:
            HTTPException: there is no such arena (404).
        """
        name = str(request.path_params["name"])
        folder = self.studio.resolve(f"{pairs.ARENAS}/{name}")
        if not pairs.is_arena(folder, self.studio.folder):
            raise HTTPException(404, "there is no such arena")
        return self.open(Arena(folder))

    def open(self, arena: Arena) -> Arena:
        """Return the cached arena of this name, or `arena` if none is cached or it has been replaced on disk."""
        stat = (arena.folder / pairs.ARENA).stat()
        version = stat.st_ino, stat.st_mtime_ns
        cached = self.opened.get(arena.name)
        if cached is None or cached[0] != version:
            cached = self.opened[arena.name] = version, arena
        return cached[1]

    def next(self, arena: Arena, annotator: str) -> Item | None:
        """Return the pair an annotator is looking at until it gets a verdict, then the next one."""
        key, now = (arena.name, annotator), time.monotonic()
        with arena.lock:
            order = arena.preferences.refresh().records.get(annotator, 0)
            current = self.assignments.get(key)
            others = {
                assignment.pair
                for (name, other), assignment in list(self.assignments.items())
                if name == arena.name and other != annotator and now - assignment.since < ASSIGNMENT_TIMEOUT
            }
            item = (
                item_of(arena, annotator, current.pair, others)
                if current is not None and current.order == order
                else None
            )
            if item is None:
                item = next_item(arena, annotator, others)
                self.assign(arena, annotator, item)
            return item

    def results(self, arena: Arena) -> Markup:
        """Return an arena's rendered results, computed again only after new records."""
        records = sum(arena.preferences.refresh().records.values())
        cached = self.bodies.get(arena.name)
        if cached is None or cached[0] is not arena or cached[1] != records:
            body = Markup(str(results_body(human_verdict(arena.preferences))))
            cached = self.bodies[arena.name] = arena, records, body
        return cached[2]

    def assign(self, arena: Arena, annotator: str, item: Item | None) -> None:
        """Remember which pair an annotator is looking at."""
        key = arena.name, annotator
        if item is None:
            self.assignments.pop(key, None)
        else:
            self.assignments[key] = Assignment(item.pair.id, item.order, time.monotonic())


def area(studio: Studio) -> Area:
    """Return the arena's area."""
    sessions = Sessions(studio)

    async def index(request: Request) -> Response:
        arenas = pairs.arenas(studio.folder)
        counts = {}
        for arena in arenas:
            opened = sessions.open(arena)
            preferences = opened.preferences.refresh()
            pair_count = sum(p.gold is None for p in opened.pairs.values())
            counts[arena.name] = pair_count, len(preferences.judgements), len(preferences.records)
        return studio.page(request, "arenas.html", arenas=arenas, counts=counts)

    async def new(request: Request) -> Response:
        if request.method == "POST":
            return await _create_arena(studio, await read_fields(request))
        sources = await run_in_threadpool(_sources, studio)
        return studio.page(request, "arena_new.html", **sources, settings=Settings(), most=pairs.MAX_PAIRS)

    async def judge(request: Request) -> Response:
        arena, annotator = sessions.arena_of(request), _annotator(request)
        if annotator is None:
            return studio.page(request, "arena_who.html", arena=arena, names=list(arena.preferences.refresh().records))
        return studio.page(request, "arena.html", **await run_in_threadpool(_pair_values, sessions, arena, annotator))

    async def sign_in(request: Request) -> Response:
        arena = sessions.arena_of(request)
        name = " ".join((await read_form(request)).get("annotator", "").split())
        if not 0 < len(name) <= 60:
            raise HTTPException(400, "give a name of at most 60 letters")
        return _redirect(f"/arena/{quote(arena.name)}", name)

    async def leave(request: Request) -> Response:
        return _redirect(f"/arena/{quote(sessions.arena_of(request).name)}", "")

    async def pair_panel(
        request: Request, arena: Arena, annotator: str, note: str = "", undone_judgement: Judgement | None = None
    ) -> Response:
        values = await run_in_threadpool(_pair_values, sessions, arena, annotator, note, undone_judgement)
        return studio.page(request, "arena_pair.html", **values)

    async def item(request: Request) -> Response:
        return await pair_panel(request, sessions.arena_of(request), _require_annotator(request))

    async def submit(request: Request) -> Response:
        arena, annotator = sessions.arena_of(request), _require_annotator(request)
        form = await read_fields(request)
        note = await run_in_threadpool(_record_verdict, arena, annotator, form)
        return await pair_panel(request, arena, annotator, note)

    async def undo(request: Request) -> Response:
        arena, annotator = sessions.arena_of(request), _require_annotator(request)
        outcome = await run_in_threadpool(
            _undo_verdict, sessions, arena, annotator, (await read_form(request)).get("order", "")
        )
        return await pair_panel(request, arena, annotator, *outcome)

    async def live(request: Request) -> Response:
        arena, annotator = sessions.arena_of(request), _require_annotator(request)
        current_item = sessions.next(arena, annotator)
        if current_item is None or current_item.pair.answers is not None:
            return Response("event: done\ndata: {}\n\n", media_type="text/event-stream")
        return StreamingResponse(_stream_answers(sessions, arena, current_item), media_type="text/event-stream")

    async def results(request: Request) -> Response:
        arena = sessions.arena_of(request)
        body = await run_in_threadpool(sessions.results, arena)
        file = shlex.quote(studio.relative(arena.preferences.path))
        return studio.page(request, "arena_results.html", arena=arena, body=body, file=file)

    async def report(request: Request) -> Response:
        arena = sessions.arena_of(request)
        text = await run_in_threadpool(results_page, arena.name, arena.preferences)
        # the file contains its own policy, which allows its stylesheet
        headers = {"content-security-policy": "sandbox", "content-disposition": 'attachment; filename="arena.html"'}
        return HTMLResponse(text, headers=headers)

    async def file(request: Request) -> Response:
        path = sessions.arena_of(request).preferences.path
        if not path.is_file():
            raise HTTPException(404, "nothing was judged yet")
        return FileResponse(path, media_type="application/jsonl", filename=PREFERENCES)

    base = "/arena/{name}"
    routes = [
        Route("/arena", index),
        Route("/arena/new", new, methods=["GET", "POST"]),
        Route(base, judge),
        Route(f"{base}/who", sign_in, methods=["POST"]),
        Route(f"{base}/leave", leave, methods=["POST"]),
        Route(f"{base}/item", item),
        Route(f"{base}/judge", submit, methods=["POST"]),
        Route(f"{base}/undo", undo, methods=["POST"]),
        Route(f"{base}/live", live),
        Route(f"{base}/results", results),
        Route(f"{base}/report", report),
        Route(f"{base}/{PREFERENCES}", file),
    ]
    return Area("Arena", "/arena", routes, sessions.writers.close)


# ---- annotators ----


def _annotator(request: Request) -> str | None:
    return unquote(request.cookies.get(ANNOTATOR_COOKIE, "")) or None


def _require_annotator(request: Request) -> str:
    name = _annotator(request)
    if name is None:
        raise HTTPException(400, "say who you are first: load this page again")
    return name


def _redirect(where: str, annotator: str | None = None) -> Response:
    response = Response(headers={"hx-redirect": where})
    if annotator:
        response.set_cookie(
            ANNOTATOR_COOKIE, quote(annotator, safe=""), max_age=30 * 24 * 3600, httponly=True, samesite="strict"
        )
    elif annotator is not None:
        response.delete_cookie(ANNOTATOR_COOKIE)
    return response


# ---- one pair ----


def _pair_values(
    sessions: Sessions, arena: Arena, annotator: str, note: str = "", undone_judgement: Judgement | None = None
) -> dict[str, Any]:
    """Return the template values of a pair's page; none of them reveals which model wrote which answer."""
    item = sessions.next(arena, annotator)
    own_judgements = arena.preferences.of(annotator)
    values: dict[str, Any] = {"arena": arena, "annotator": annotator, "item": item, "note": note, "keys": KEYS}
    values["reasons"], values["edited"] = (
        ((), "") if undone_judgement is None else (undone_judgement.reasons, undone_judgement.edited or "")
    )
    values["order"] = arena.preferences.records.get(annotator, 0)
    values["judged"] = len([j for j in own_judgements if j.repeat_of is None])
    values["can_undo"] = bool(own_judgements)
    if item is not None:
        values["turns"] = [(role, render_markdown(text)) for role, text in turns_of(item.pair.prompt)]
        values["writes"] = item.pair.answers is None
        texts = ("", "") if item.pair.answers is None else item.sides
        values["texts"] = texts
        values["answers"] = [render_markdown(t) for t in texts]
        values["folded"] = should_fold(*texts)
    return values


def _record_verdict(arena: Arena, annotator: str, form_fields: list[tuple[str, str]]) -> str:
    """Record a verdict and return a message to show, or "".

    A second verdict on one showing (a key pressed twice, a second window, a retry after a crash) has no effect.
    """
    with arena.locked():
        return _record_verdict_locked(arena, annotator, form_fields)


def _record_verdict_locked(arena: Arena, annotator: str, form_fields: list[tuple[str, str]]) -> str:
    values = dict(form_fields)
    button = values.get("verdict", "")
    if button not in VERDICT_BUTTONS:
        raise HTTPException(400, "that is not a verdict")
    item = item_of(arena, annotator, values.get("pair", ""))
    if item is None or values.get("order") != str(item.order):
        return "That pair was judged already; here is the next one."
    if item.pair.answers is None and button != "skip":
        raise HTTPException(409, "the answers are still being written")
    try:
        seconds = min(max(float(values.get("seconds", "")), 0.0), 86_400.0)
    except ValueError:
        seconds = 0.0
    other = "b" if item.left == "a" else "a"
    verdict = {"left": item.left, "right": other}.get(button, button)
    edited = values.get("edited", "").replace("\r\n", "\n")
    sources = arena.settings.models
    hashes = [str(sources.get(m, {}).get("sha256", "")) for m in item.pair.models]
    allowed = set(arena.settings.reasons)
    judgement = Judgement(
        id=secrets.token_hex(8),
        pair=item.pair.id,
        annotator=annotator,
        order=item.order,
        prompt=item.pair.prompt,
        answers=item.pair.answers or ("", ""),
        models=item.pair.models,
        hashes=(hashes[0], hashes[1]),
        verdict=verdict,
        left=item.left,
        seconds=seconds if seconds == seconds else 0.0,
        gold=item.pair.gold,
        repeat_of=item.repeat_of,
        reasons=tuple(v for k, v in form_fields if k == "reason" and v in allowed),
        edited=edited[:MAX_EDITED] if edited.strip() else None,
    )
    arena.preferences.append(judgement.to_json())
    trained = judgement.edited is None or verdict in ("a", "b")
    return "" if trained else "Your answer is kept but not trained on, since you chose neither answer as better."


def _undo_verdict(sessions: Sessions, arena: Arena, annotator: str, order: str) -> tuple[str, Judgement | None]:
    """Undo the annotator's last verdict, once; return a message and that verdict, whose reasons and answer fill the form again."""
    with arena.locked():
        own_judgements = arena.preferences.refresh().of(annotator)
        if not own_judgements or order != str(arena.preferences.records.get(annotator, 0)):
            return "There is nothing to take back.", None
        arena.preferences.undo(own_judgements[-1])
        sessions.assign(arena, annotator, item_of(arena, annotator, own_judgements[-1].pair))
    return "Your last verdict was taken back; judge this pair again.", own_judgements[-1]


async def _stream_answers(sessions: Sessions, arena: Arena, item: Item) -> AsyncIterator[str]:
    """Yield both answers as events while they are generated, then a final event."""

    def event(kind: str, **data: Any) -> str:
        return f"event: {kind}\ndata: {json.dumps(data)}\n\n"

    left = 0 if item.left == "a" else 1
    texts = ["", ""]
    writers = [arena.settings.writers.get(m, {}) for m in item.pair.models]
    try:
        async for index, piece in sessions.writers.write(sessions.studio, writers, item.pair.prompt):
            texts[index] += piece
            yield event("left" if index == left else "right", text=piece)
    except Exception as error:
        from penchant.base.text import told

        yield event("failed", text=str(error) if isinstance(error, DataError) else told(error))
        return
    await run_in_threadpool(arena.save_answers, item.pair, (texts[0], texts[1]))
    yield event("done")


# ---- a new arena ----


def _sources(studio: Studio) -> dict[str, Any]:
    """List the sources of answers in this folder."""
    folders, suggested = find_folders(studio.folder)[0], suggestions(studio.folder)

    def folders_with(kind: str, file: str) -> list[str]:
        return [f.path for f in folders if f.kind == kind and (studio.folder / f.path / file).is_file()]

    return {
        "runs": folders_with("run", SAMPLES),
        "comparisons": folders_with("comparison", COMPARISON_ROWS),
        "files": [name for name in suggested["data.path"] if not name.startswith(f"{pairs.ARENAS}/")],
        "models": suggested["model.path"],
    }


async def _create_arena(studio: Studio, form_fields: list[tuple[str, str]]) -> Response:
    arena = await run_in_threadpool(_build_arena, studio, form_fields)
    return _redirect(f"/arena/{quote(arena.name)}")


def _build_arena(studio: Studio, form_fields: list[tuple[str, str]]) -> Arena:
    values = dict(form_fields)
    settings, writers = _parse_settings(values), {}
    kind = values.get("source", "")
    if kind == "runs":
        runs = [studio.resolve(f"{v}/{SAMPLES}").parent for k, v in form_fields if k == "run"]
        if not runs:
            raise DataError("runs", "none is ticked", "tick one or more")
        answers = pairs.answers_from_runs(runs)
    elif kind == "comparison":
        answers = pairs.answers_from_comparison(
            studio.resolve(f"{values.get('comparison', '')}/{COMPARISON_ROWS}").parent
        )
    elif kind == "pairs":
        answers = pairs.answers_from_pairs(_data_file(studio, values.get("file", "")))
    elif kind == "prompts":
        writers = {letter: _parse_writer(studio, values, letter) for letter in ("one", "two")}
        names = [w.get("run") or w.get("model") or n for n, w in writers.items()]
        if names[0] == names[1]:
            names = [f"{names[0]} (1)", f"{names[1]} (2)"]
        writers = dict(zip(names, writers.values(), strict=True))
        answers = pairs.answers_to_generate(
            _read_prompts(studio, values), writers, {n: _checkpoint_hash(studio, w) for n, w in writers.items()}
        )
    else:
        raise DataError("source", "is not chosen", "choose where the answers come from")
    arena_pairs = pairs.make_pairs(answers, settings.seed)
    if values.get("checks_file"):
        check_answers = pairs.answers_from_pairs(_data_file(studio, values["checks_file"]))
        arena_pairs += pairs.gold_pairs(check_answers)
    settings = replace(settings, models=answers.models, writers=writers)
    return pairs.make_arena(studio.folder, values.get("name", "").strip(), settings, arena_pairs)


def _data_file(studio: Studio, name: str) -> Path:
    path = studio.resolve(name)
    if not name or not path.is_file():
        raise DataError(name or "file", "no such file in this folder", "choose one of the list")
    return path


def _read_prompts(studio: Studio, values: Mapping[str, str]) -> list[Any]:
    prompts = pairs.split_prompts(values.get("prompts", ""))
    if not prompts and not values.get("prompts_file"):
        raise DataError("prompts", "there is none", "type some, or choose a file that holds some")
    if not values.get("prompts_file"):
        return list(prompts)
    from penchant.data.load import load_preferences, prompt_json

    preferences = load_preferences(str(_data_file(studio, values["prompts_file"])), on_bad_row="skip")
    return [*prompts, *(prompt_json(t.prompt) for t in preferences.trees if t.prompt)]


def _parse_writer(studio: Studio, values: Mapping[str, str], slot: str) -> dict[str, str]:
    run, url = values.get(f"run_{slot}", ""), values.get(f"url_{slot}", "").strip()
    name = {"one": "first model", "two": "second model"}[slot]
    if url:
        model, key = values.get(f"model_{slot}", "").strip(), values.get(f"key_{slot}", "").strip()
        if not model:
            raise DataError(name, "the endpoint has no model", "name it as the endpoint calls it")
        connect(url, key or None, name, f"{name}, key")  # refuses an invalid address and a missing key
        approve_endpoint(url, key)
        return {"url": url, "model": model, "key_env": key}
    if not run:
        raise DataError(name, "is not chosen", "choose a run or a model, or give an endpoint's address")
    studio.resolve(run)
    return {"run": run}


def _checkpoint_hash(studio: Studio, writer: Mapping[str, str]) -> str:
    """Return the SHA-256 of the manifest of a run's newest checkpoint, or "" if there is none."""
    last = checkpoints(studio.resolve(writer["run"]))[-1:] if "run" in writer else []
    return next((file_sha256(c / MANIFEST) for c in last if (c / MANIFEST).is_file()), "")


def _parse_settings(values: Mapping[str, str]) -> Settings:
    default = Settings()

    def share(name: str) -> float:
        text = values.get(name, "")
        try:
            number = float(text) / 100 if text else float(getattr(default, name))
        except ValueError:
            number = -1.0
        if not 0 <= number <= 1:
            raise DataError(name, f"{text!r} is not a share", "give a number from 0 to 100")
        return number

    seed = values.get("seed", "0")
    if not seed.isdecimal() or len(seed) > 9:
        raise DataError("seed", f"{seed!r} is not a whole number", "give one, such as 0")
    reasons = tuple(dict.fromkeys(r.strip()[:40] for r in values.get("reasons", "").split(",") if r.strip()))[:20]
    return Settings(
        question=values.get("question", "").strip()[:300] or default.question,
        overlap=share("overlap"),
        checks=share("checks"),
        repeats=share("repeats"),
        first="widest" if values.get("first") == "widest" else "balanced",
        reasons=reasons,
        seed=int(seed),
    )
