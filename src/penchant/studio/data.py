"""The pages of data: browsing a file's rows, search and filters, edits saved to a corrected copy, and tokens."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from markupsafe import Markup
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from penchant.base.text import gigabytes
from penchant.data.audit.fix import ALWAYS, DEFAULT
from penchant.data.layouts import LAYOUTS
from penchant.data.read import ending
from penchant.errors import ConfigError, DataError, PenchantError
from penchant.runfolder import CONFIG
from penchant.runfolder.read import json_object, read_folder
from penchant.runfolder.values import mapping, sequence, text
from penchant.studio.app import Area, Studio, read_form
from penchant.studio.launch import Children, command, environment, last_error_line, suggestions, working_folder
from penchant.studio.rows import (
    ROWS,
    Edits,
    File,
    Item,
    Page,
    answers_of,
    as_json,
    content_hash,
    is_quarantined,
    line_numbers,
    parse_edited_row,
    rows_of_places,
    stamp,
    tokens_of,
    turns_of,
)

MAX_OPEN_FILES = 8  # files kept open
COUNT_TIMEOUT = 0.05  # time limit for counting a file's rows when a page is shown; enough for most files
MAX_PLACES = 1000  # places of an audit's finding that a filter can show
ROW_BYTES = 4 << 20  # maximum size of an edited row
# keys of a run's data that affect tokens
TOKENIZATION_KEYS = ("template", "template_options", "max_length", "truncation", "add_eos")


class Audits:
    """Audits of files, each in its own process because a large file takes minutes."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="penchant-studio-")
        self._jobs: dict[tuple[Any, ...], tuple[subprocess.Popen[bytes], Path]] = {}
        self._lock = threading.Lock()

    def start(self, root: Path, path: str, shape: str) -> None:
        key = self._key(root / path, shape)
        with self._lock:
            if key in self._jobs:
                return
            out = Path(self._folder.name) / f"{len(self._jobs)}.json"
            arguments = command(
                "data", "audit", f"./{path}", "--json", str(out), "--places", str(MAX_PLACES), "--shape", shape
            )
            with out.with_suffix(".log").open("wb") as log:
                job = subprocess.Popen(
                    arguments, cwd=root, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            self._jobs[key] = (job, out)

    @staticmethod
    def _key(path: Path, shape: str) -> tuple[Any, ...]:
        return (path, shape, *stamp(path))

    def result(self, path: Path, shape: str) -> tuple[str, dict[str, Any]]:
        """Return (``none``, ``running``, ``done`` or an error message, the audit)."""
        entry = self._jobs.get(self._key(path, shape))
        if entry is None:
            return "none", {}
        job, out = entry
        if job.poll() is None:
            return "running", {}
        if job.returncode:
            log_text = out.with_suffix(".log").read_text(errors="replace").strip()
            return log_text.rpartition("\n")[2] or "the audit failed", {}
        return "done", json_object(out.read_text(encoding="utf-8"))

    def close(self) -> None:
        for job, _ in self._jobs.values():
            if job.poll() is None:
                job.kill()
                job.wait()
        self._folder.cleanup()


class Data:
    """The pages of data."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.audits, self.children = studio, Audits(), Children()
        self._files: OrderedDict[tuple[Path, str], File] = OrderedDict()
        self._edits: dict[str, Edits] = {}
        self._tokenizers: dict[str, Any] = {}
        template_globals = {"size": gigabytes, "answers_of": answers_of, "turns_of": turns_of, "hidden": _hidden_fields}
        studio.templates.globals |= template_globals
        studio.templates.filters["as_json"] = as_json

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/data", self.list),
            Route("/data/view", self.view),
            Route("/data/row", self.row),
            Route("/data/edit", self.edit, methods=["GET", "POST"]),
            Route("/data/undo", self.undo, methods=["POST"]),
            Route("/data/copy", self.copy, methods=["POST"]),
            Route("/data/audit", self.audit, methods=["GET", "POST"]),
            Route("/data/tokens", self.tokens),
        ]

    def close(self) -> None:
        self.children.close()
        self.audits.close()

    # ---- files -----------------------------------------------------------------------------------------------------

    def data_path(self, name: str) -> str:
        """Return the path of a data file as it is linked.

        Raises:
            HTTPException: there is no such file in the folder (404).
        """
        path = self.studio.resolve(name)
        if not path.is_file() or not ending(path.name):
            raise HTTPException(404, "there is no file of rows of this name in this folder")
        return self.studio.relative(path)

    def open_file(self, path: str, shape: str) -> File:
        """Return the opened file; it is opened again if it has changed."""
        if shape != "auto" and shape not in LAYOUTS:
            raise HTTPException(404, "there is no such layout")
        full_path = self.studio.folder / path
        file = self._files.get((full_path, shape))
        if file is None or file.seen != stamp(full_path):
            file = File(full_path, shape)
        self._files[full_path, shape] = file
        self._files.move_to_end((full_path, shape))
        while len(self._files) > MAX_OPEN_FILES:
            self._files.popitem(last=False)
        return file

    def edits_of(self, path: str) -> Edits:
        return self._edits.setdefault(path, Edits(self.studio.folder, path))

    async def list(self, request: Request) -> Response:
        """List the data files in the folder."""
        suggested = await run_in_threadpool(suggestions, self.studio.folder)
        files = [(path, (self.studio.folder / path).stat().st_size) for path in suggested["data.path"]]
        return self.studio.page(request, "data_files.html", files=files)

    async def view(self, request: Request) -> Response:
        query = request.query_params
        path, shape = self.data_path(query.get("file", "")), query.get("shape", "auto")
        word, only, start = query.get("q", "").strip()[:500], query.get("only", ""), _parse_number(query.get("line"), 1)
        file = await run_in_threadpool(self.open_file, path, shape)
        if file.lines is not None:
            await run_in_threadpool(file.lines.scan, None, COUNT_TIMEOUT)
        state, audit = self.audits.result(file.path, shape)
        findings = {name: f for name, f in mapping(audit.get("findings")).items() if sequence(mapping(f).get("where"))}
        edits = await run_in_threadpool(self.edits_of(path).latest)
        load_page = partial(self._page, file, start, word, only, findings, edits)
        page = await run_in_threadpool(load_page)
        suggested = await run_in_threadpool(suggestions, self.studio.folder)
        items = [_with_edit(file, item, edits) for item in page.items]
        location = {"file": path, **({"shape": shape} if shape != "auto" else {})}
        filters = {k: v for k, v in (("q", word), ("only", only), ("show", query.get("show", ""))) if v}
        return self.studio.page(
            request, "data_rows.html", file=file, name=path, shape=shape, items=items, page=page, start=start, word=word,
            only=only, show=query.get("show", ""), layouts=[*LAYOUTS], here=urlencode(location),
            link=lambda **more: "/data/view?" + urlencode({**location, **filters, **{k: v for k, v in more.items() if v}}),
            findings=findings, audit=state, edits=edits, models=suggested["model.path"],
            tokenizer=query.get("tokenizer", ""), back=max(1, start - ROWS), copy_name=_copy_name(path), anew=False,
        )  # fmt: skip

    def _page(
        self, file: File, start: int, word: str, filter_name: str, findings: Mapping[str, Any], edits: Mapping[str, Any]
    ) -> Page:
        if filter_name == "aside":
            return file.page(start, wanted=is_quarantined, needle=word)
        if filter_name == "edited":
            return self._page_of_places(file, start, [*edits], word)
        if filter_name in findings:
            return self._page_of_places(file, start, rows_of_places(sequence(findings[filter_name].get("where"))), word)
        return file.page(start, needle=word)

    def _page_of_places(self, file: File, start: int, where: Sequence[str], word: str) -> Page:
        """Return the rows at the given places."""
        places: set[str] = set(where)
        if file.lines is None or file.grouped:
            return file.page(start, wanted=lambda item: item.where in places, needle=word)
        items: list[Item] = []
        numbers = sorted({number for number in line_numbers(where) if number >= start})
        for i, number in enumerate(numbers):
            if len(items) == ROWS:
                return Page(tuple(items), number, numbers[i - 1])
            items += [item for item in file.page(number, 1).items if item.number == number]
        return Page(tuple(items), None, numbers[-1] if numbers else start)

    async def _row_of(self, given: Mapping[str, str]) -> tuple[str, str, File, Item]:
        """Return the path, the layout, the file and the row that a request is about."""
        path, shape = self.data_path(given.get("file", "")), given.get("shape", "auto")
        file = await run_in_threadpool(self.open_file, path, shape)
        page = await run_in_threadpool(file.page, _parse_number(given.get("line"), 1), 1)
        item = next((item for item in page.items if item.where == given.get("where", "")), None)
        if item is None:
            raise HTTPException(404, "this row is not there any more: load the page again")
        return path, shape, file, item

    # ---- edits -----------------------------------------------------------------------------------------------------

    async def edit(self, request: Request) -> Response:
        """Show a row as JSON for editing, or record an edit."""
        form = dict(request.query_params) if request.method == "GET" else await read_form(request, ROW_BYTES)
        path, shape, file, item = await self._row_of(form)
        where, edits = item.where, self.edits_of(path)
        values: dict[str, Any] = {"name": path, "shape": shape, "error": "", "aside": False}
        if request.method == "GET":
            latest = edits.latest().get(where)
            row_json = as_json(item.values if latest is None or latest.values is None else latest.values)
            return self.studio.page(request, "data_edit.html", item=item, said=row_json, **values)
        if not file.editable(item):
            raise HTTPException(
                400, "this row cannot be edited: several rows make an example together, or one makes several"
            )
        if form.get("action") == "drop":
            await run_in_threadpool(edits.add, where, "dropped", content_hash(item))
        else:
            row_json = form.get("row", "")
            try:
                row = parse_edited_row(row_json)
                converted = file.convert(row, where)
            except PenchantError as error:
                return self.studio.page(
                    request, "data_edit.html", item=item, said=row_json, **{**values, "error": str(error)}
                )
            if converted.aside is not None and form.get("anyway") != "on":
                reason = f"it would be kept aside: {converted.aside[0]}; {converted.aside[1]}"
                values |= {"error": reason, "aside": True}
                return self.studio.page(request, "data_edit.html", item=item, said=row_json, **values)
            await run_in_threadpool(edits.add, where, "changed", content_hash(item), row)
        return await self._row_page(request, file, path, shape, item)

    async def row(self, request: Request) -> Response:
        """Show a row."""
        path, shape, file, item = await self._row_of(request.query_params)
        return await self._row_page(request, file, path, shape, item)

    async def undo(self, request: Request) -> Response:
        """Undo an edit."""
        path, shape, file, item = await self._row_of(await read_form(request))
        await run_in_threadpool(self.edits_of(path).add, item.where, "undone")
        return await self._row_page(request, file, path, shape, item)

    async def _row_page(self, request: Request, file: File, path: str, shape: str, item: Item) -> Response:
        edits = self.edits_of(path).latest()
        return self.studio.page(
            request,
            "data_row.html",
            item=_with_edit(file, item, edits),
            file=file,
            name=path,
            shape=shape,
            show="",
            edits=edits,
            tokenizer="",
            copy_name=_copy_name(path),
            anew=True,
        )

    async def copy(self, request: Request) -> Response:
        """Write the corrected copy."""
        form = await read_form(request)
        path, shape = self.data_path(form.get("file", "")), form.get("shape", "auto")
        output = self.studio.resolve(form.get("output", "").strip() or ".")
        target = self.studio.relative(output)
        keep = [] if form.get("also") == "on" else ["--keep", ",".join(name for name in DEFAULT if name != ALWAYS)]
        edits = str(self.edits_of(path).file)
        fix = command("data", "fix", f"./{path}", f"./{target}", "--edits", edits, "--shape", shape, *keep)
        completed = await run_in_threadpool(self.children.run, fix, self.studio.folder)
        if completed.returncode:
            raise DataError("the copy", last_error_line(completed))
        touched_file = f"{target}.touched.jsonl"
        return self.studio.page(
            request, "data_copied.html", said=completed.stdout.decode(), copied=target, touched=touched_file
        )

    # ---- audit and tokens ------------------------------------------------------------------------------------------

    async def audit(self, request: Request) -> Response:
        form = dict(request.query_params) if request.method == "GET" else await read_form(request)
        path, shape = self.data_path(form.get("file", "")), form.get("shape", "auto")
        if request.method == "POST":
            await run_in_threadpool(self.audits.start, self.studio.folder, path, shape)
        state, _ = self.audits.result(self.studio.folder / path, shape)
        if state == "done":
            return Response(headers={"hx-refresh": "true"})
        return self.studio.page(request, "data_audit.html", name=path, shape=shape, audit=state)

    async def tokens(self, request: Request) -> Response:
        """Show a row as tokens, with the tokenizer of a run or a model folder."""
        query = request.query_params
        _, _, file, item = await self._row_of(query)
        folder = self.studio.resolve(query.get("tokenizer", ""))
        values: dict[str, Any] = {"error": "", "parts": [], "of": self.studio.relative(folder), "length": None}
        try:
            tokenizer, options = await run_in_threadpool(self._tokenizer, folder)
            if length := _parse_number(query.get("max_length"), 0):
                options["max_length"] = max(8, length)
            values["length"] = options.get("max_length", 1024)
            for tree in item.trees:
                values["parts"] += await run_in_threadpool(tokens_of, tree, file.kind, tokenizer, options)
        except PenchantError as error:
            values["error"] = str(error)
        return self.studio.page(request, "data_tokens.html", **values)

    def _tokenizer(self, folder: Path) -> tuple[Any, dict[str, Any]]:
        """Return (tokenizer, tokenization options) of a run's or a model's folder."""
        from penchant.models.load import load_tokenizer

        options: dict[str, Any] = {}
        path = str(folder)
        if (folder / CONFIG).is_file():
            config = read_folder(folder).config
            options = {k: v for k, v in mapping(config.get("data")).items() if k in TOKENIZATION_KEYS}
            model = mapping(config.get("model"))
            saved_tokenizers = sorted(folder.glob("checkpoints/step-*/model/tokenizer_config.json"))
            source = working_folder(self.studio.folder, config) / text(model.get("tokenizer") or model.get("path"))
            path = str(saved_tokenizers[-1].parent if saved_tokenizers else source)
        if not Path(path).is_dir():
            raise ConfigError(path, "has no tokenizer here", "choose a folder that holds one")
        if path not in self._tokenizers:
            self._tokenizers[path] = load_tokenizer(path)
        return self._tokenizers[path], options


def _with_edit(file: File, item: Item, edits: Mapping[str, Any]) -> Item:
    """Return a row with its edit applied, as it will be in the copy."""
    edit = edits.get(item.where)
    if edit is None:
        return item
    if edit.values is None or file.grouped:
        return replace(item, edited="dropped" if edit.values is None else "changed")
    converted = file.convert(edit.values, item.where)
    return replace(item, edited="changed", raw=edit.values, trees=converted.trees, aside=converted.aside)


def _hidden_fields(name: str, shape: str, item: Item) -> Markup:
    """Return the hidden form fields that identify a row."""
    fields = {"file": name, "shape": shape, "where": item.where, "line": item.number}
    return Markup("").join(Markup('<input type="hidden" name="{}" value="{}">').format(*f) for f in fields.items())


def _copy_name(path: str) -> str:
    """Return the suggested path of a file's corrected copy."""
    name = Path(path).name.removesuffix(".gz")
    kind = ".parquet" if name.lower().endswith(".parquet") else ".jsonl"
    return Path(path).with_name(f"{Path(name).stem}.fixed{kind}").as_posix()


def _parse_number(raw: str | None, default: int) -> int:
    try:
        return min(max(0, int(raw or "")), 2**40) or default
    except ValueError:
        return default


def area(studio: Studio) -> Area:
    """Return the area of data."""
    data = Data(studio)
    return Area("Data", "/data", data.routes, data.close)
