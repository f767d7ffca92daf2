"""`penchant data get`: download a published data set into a folder that `penchant train` reads."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from penchant.base.files import file_sha256
from penchant.base.processes import RAY, Workers, in_order, number_of
from penchant.base.text import counted, gigabytes, printable
from penchant.data.load import detect_layout, prompt_text
from penchant.data.read import BOUNDS, SHARD, BadRow, Bounds, Row, read_stream
from penchant.data.split import SPLITS, Assignment, Splitter
from penchant.download.catalogue import find_spec
from penchant.download.convert import (
    Conversion,
    Converter,
    Counts,
    Filters,
    Pace,
    Part,
    atomic_write,
    conversion_of,
    labeller_of,
    read_json,
    write_json,
)
from penchant.download.hub import BLOCK, Hub, RemoteFile
from penchant.download.plan import Plan, Source, check_request, identity, make_plan
from penchant.errors import CheckpointError, ConfigError, DataError, PenchantError
from penchant.requests import GetRequest
from penchant.runfolder import LOCK, RunLock, differences
from penchant.types import Message

WORK = ".get"
RESULT_FILES = (*(f"{s}.jsonl" for s in SPLITS), "quarantine.jsonl", "data.json")
TEXT_GROWTH = {".gz": 3.5, ".parquet": 2.5}  # approximate ratio of a file's text to its size
DETECT_ROWS = 100


@dataclass(frozen=True, slots=True)
class GetResult:
    """Result of `get_data`.

    Args:
        folder: where the files are; data: content of its data.json; fresh: False if the result already existed.
    """

    folder: Path
    data: Mapping[str, Any]
    fresh: bool

    @property
    def counts(self) -> Counts:
        return Counts.from_json(self.data["counts"])


def get_data(request: GetRequest, say: Callable[[str], None] = lambda line: None) -> GetResult:
    """Download a published data set as train.jsonl, validation.jsonl and test.jsonl.

    Args:
        request: what to get, and how; say: called with progress lines.

    Raises:
        ConfigError: the request is invalid, or the folder holds the result of another one.
        DataError: no access, no network, a damaged file, or a full disk. RewardError: a reward or labeling function failed.
    """
    check_request(request)
    folder = Path(request.output or default_output(request.name)).expanduser()
    work, locked = folder / WORK, False
    try:
        made_here = not folder.exists()
        wanted = identity(request)
        existing = _check_folder(folder, wanted, request.redo)
        if existing is not None and not work.exists():
            return GetResult(folder, existing, fresh=False)
        work.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            locked = True
            if existing is not None:
                result = GetResult(folder, existing, fresh=False)
            else:
                if request.redo or read_json(work / "request.json") != wanted:
                    _clear(work)
                result = _Job(request, wanted, folder, work, say, Hub(say)).run()
        shutil.rmtree(work)
        return result
    except PenchantError:
        if locked and request.source is not None and not any(work.glob("part-*")):  # nothing was read yet
            shutil.rmtree(work, ignore_errors=True)
            if made_here:
                with suppress(OSError):
                    folder.rmdir()
        raise
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        how = "free some space" if error.errno == 28 else "fix that, or choose another --output"
        raise DataError(str(folder), what, f"{how}; then the same command continues") from error


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder. Raises DataError if one is writing it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(RunLock(folder / WORK))
        except CheckpointError as error:
            what, how = "another `penchant data get` is writing there", "wait for it, or choose another --output"
            raise DataError(str(folder), what, how) from error
        yield


def _clear(work: Path) -> None:
    """Remove what an earlier request left, but not the lock."""
    for path in work.iterdir():
        if path.name != LOCK:
            path.unlink()


def default_output(name: str) -> str:
    """Default output folder: ``data/`` and the data set's name in the catalog, or the last part of its id."""
    spec = find_spec(name)
    return str(Path("data", spec.name if spec else name.rstrip("/").rpartition("/")[2]))


def print_progress(line: str) -> None:
    """Print a progress line to stderr, with control characters escaped."""
    print(f"penchant: {printable(line)}", file=sys.stderr, flush=True)


def _check_folder(folder: Path, identity: Mapping[str, Any], redo: bool) -> Mapping[str, Any] | None:
    """Return the existing result's data.json, or None if the folder is empty or holds this request's unfinished work.

    Raises:
        ConfigError: the folder holds something else, or a file of the result was changed.
    """
    existing, current = read_json(folder / "data.json"), dict(identity)
    how = "choose another --output, or add --redo to start over in this one"
    has_parts = any((folder / WORK).glob("part-*[0-9].json"))  # a plan alone may be replaced
    started_request = read_json(folder / WORK / "request.json") if has_parts else None
    if existing is None and started_request is None:
        conflicts = [name for name in RESULT_FILES if (folder / name).exists()]
        if conflicts:
            what = f"has a {conflicts[0]} that `penchant data get` did not write"
            raise ConfigError(str(folder), what, "choose another --output")
    if redo or (existing is None and started_request is None):
        return None
    finished = None if existing is None else {**_recorded_labels(existing), **existing["request"]}
    if finished == current:
        assert existing is not None
        _check_files(folder, existing, how)
        return cast(Mapping[str, Any], existing)
    if started_request == current:
        return None
    state = "holds" if existing is not None else "holds the beginning of"
    changes = "".join(f"\n  {line}" for line in differences(finished or started_request, current))
    raise ConfigError(str(folder), f"{state} what other arguments gave; old -> new:{changes}\n", how)


def _recorded_labels(result: Mapping[str, Any]) -> dict[str, Any]:
    """The labels' hash of a result that was written by 0.1.0, whose request lacks it."""
    sha256 = result.get("labelled_with_sha256")
    return {} if sha256 is None else {"labels_sha256": sha256}


def _check_files(folder: Path, result: Mapping[str, Any], advice: str) -> None:
    for name, entry in result["files"].items():
        path = folder / name
        if not path.exists() or path.stat().st_size != entry["bytes"]:
            raise ConfigError(str(path), "was changed or removed since it was written", advice)


@dataclass(slots=True)
class _Job:
    request: GetRequest
    identity: Mapping[str, Any]
    folder: Path
    work: Path
    say: Callable[[str], None]
    hub: Hub

    def run(self) -> GetResult:
        labeller = labeller_of(self.request)
        plan = self._plan()
        self._check_disk(plan)
        conversions: dict[str | None, Conversion] = {}
        total = Counts()
        source_records: list[dict[str, Any]] = []
        remaining: dict[str, int] = {}
        filters, columns = Filters(self.request), self.request.columns
        self._convert_in_processes(plan, filters)
        for number, source in enumerate(plan.sources):
            part = Part(self.work, number)
            limited_split = source.split if self.request.published_splits else ""
            limit = remaining.get(limited_split, self.request.first) if self.request.first else None
            if limit == 0:
                break
            counts = part.counts()
            if counts is None:
                with self._open_rows(plan, source) as rows:
                    limited_rows: Iterator[Row | BadRow] = islice(rows, limit)
                    if source.layout is None and None not in conversions:
                        first_rows = list(islice(limited_rows, DETECT_ROWS))
                        conversions[None], columns = self._detect_conversion(source.path, first_rows)
                        limited_rows = chain(first_rows, limited_rows)
                    if source.layout and source.layout not in conversions:
                        conversions[source.layout] = self._conversion(source)
                    conversion, transcripts = conversions[source.layout], self._reads_transcripts(source)
                    # every finished part has this file
                    write_json(part.layout, [conversion.layout.name, conversion.kind, dict(conversion.options)])
                    converter = Converter(conversion, dict(columns), filters, labeller, transcripts)
                    counts = converter.convert(limited_rows, source.path, part, Pace(self.say, source.path))
                self.say(f"{source.path}: {counted(counts.rows, 'row')}, {counts.accepted:,} accepted")
            if limit is not None:
                remaining[limited_split] = limit - counts.rows
            total.add(counts)
            source_records.append(_source_json(source, counts, whole=not self.request.first))
        self._check_accepted(plan, total, filters.languages)
        parts = [Part(self.work, n) for n in range(len(source_records))]
        layouts = [read_json(part.layout) for part in parts]
        kinds = sorted({kind for _, kind, _ in layouts})
        if len(kinds) > 1:
            what = f"the files give different kinds of data ({', '.join(kinds)})"
            raise ConfigError("--subset", what, "choose subsets of one kind, or say what they become with --as")
        return self._write(plan, parts, source_records, layouts, total, labeller.sha256 if labeller else None)

    def _plan(self) -> Plan:
        """Make the plan, or read the saved one, so that a resumed `get` reads the same commit and files."""
        saved = read_json(self.work / "plan.json")
        if saved is not None:
            plan = Plan.from_json(saved)
            _check_unchanged(plan)
            self.say("continuing what was begun")
            return plan
        plan = make_plan(self.request, self.hub)
        if self.request.layout is not None:
            plan = replace(plan, sources=tuple(replace(s, layout=self.request.layout) for s in plan.sources))
        for source in plan.sources:
            if source.layout is not None:
                self._conversion(source)  # raises now if it cannot be converted
        write_json(self.work / "plan.json", asdict(plan))
        write_json(self.work / "request.json", self.identity)
        if plan.left_out:
            self.say(plan.left_out)
        return plan

    def _reads_transcripts(self, source: Source) -> bool:
        return source.prompts_only and self.request.layout is None

    def _conversion(self, source: Source) -> Conversion:
        if self._reads_transcripts(source) and self.request.as_ != "prompts":
            what = "its publishers mean it for neither tuning nor preferences"
            raise ConfigError(f"--subset {source.subset}", what, "add --as prompts")
        assert source.layout is not None
        return conversion_of(source.layout, self.request)

    def _detect_conversion(self, name: str, rows: list[Row | BadRow]) -> tuple[Conversion, Mapping[str, str]]:
        """(conversion, column names) detected from the first rows."""
        layout, detection, columns = detect_layout(rows, name, self.request.columns, {})
        self.say(detection.sentence(name, "--layout"))
        return conversion_of(layout, self.request), columns

    def _check_disk(self, plan: Plan) -> None:
        if self.request.first:
            scope = " of each published split" if self.request.published_splits else ""
            self.say(f"reading the first {counted(self.request.first, 'row')}{scope}")
            return
        text_bytes = sum(
            s.size * next((g for e, g in TEXT_GROWTH.items() if s.path.endswith(e)), 1.0) for s in plan.sources
        )
        free = shutil.disk_usage(self.folder).free
        if plan.hub_id:
            cache = self.hub.cache_folder()
            cached_bytes = self.hub.cached_bytes(plan.repository, plan.sources)
            disk = next(p for p in (cache, *cache.absolute().parents) if p.exists())
            fetch_bytes, disk_free = sum(s.size for s in plan.sources) - cached_bytes, shutil.disk_usage(disk).free
            if fetch_bytes > disk_free:
                what = f"has {gigabytes(disk_free)} free, and {gigabytes(fetch_bytes)} are to be fetched"
                how = "free some space, set HF_HOME to another disk, or look at --first 500"
                raise DataError(str(cache), what, how)
            where = f"kept in {cache} ({gigabytes(disk_free)} free)"
            self.say(f"to fetch: {gigabytes(fetch_bytes)} in {len(plan.sources)} files, {where}")
        warning = "; that may not be enough" if free < 2 * text_bytes else ""
        self.say(f"to write: about {gigabytes(text_bytes)} (twice that temporarily; {gigabytes(free)} free{warning})")

    @contextmanager
    def _open_rows(self, plan: Plan, source: Source) -> Iterator[Iterator[Row | BadRow]]:
        if plan.hub_id and self.request.first:
            remote_file = RemoteFile(self.hub, plan.repository, source)
            with io.BufferedReader(remote_file, BLOCK) as stream:
                yield read_stream(cast(BinaryIO, stream), source.path)
            progress = f"{gigabytes(remote_file.fetched)} of {gigabytes(source.size)} read"
            self.say(f"{source.path}: {progress}; its hash is not checked")
            return
        with self._file(plan, source).open("rb") as stream:
            yield read_stream(stream, source.path)

    def _convert_in_processes(self, plan: Plan, filters: Filters) -> None:
        """Convert the unfinished files in parallel, if they are large and can be converted independently."""
        unfinished = [(n, s) for n, s in enumerate(plan.sources) if Part(self.work, n).counts() is None]
        worker_count = number_of(self.request.workers, len(unfinished))
        if worker_count < 2 or self.request.first or self.request.labels or sum(s.size for _, s in unfinished) < SHARD:
            return
        columns = self.request.columns
        detected_layout: str | None = None  # of the first file without a given layout, used for all such files

        def tasks() -> Iterator[_Task]:
            nonlocal columns, detected_layout
            for number, source in unfinished:
                if source.layout is None and detected_layout is None:
                    with self._open_rows(plan, source) as rows:
                        conversion, columns = self._detect_conversion(source.path, list(islice(rows, DETECT_ROWS)))
                    detected_layout = conversion.layout.name
                elif source.layout is not None:
                    self._conversion(source)  # raises if it cannot be converted
                layout, bounds = source.layout or str(detected_layout), BOUNDS.get() or Bounds()
                path = str(self._file(plan, source))
                arguments = dict(columns), self._reads_transcripts(source), path, source.path, bounds
                yield _Task(self.request, self.work, number, layout, *arguments)

        results = in_order(_Task.convert, tasks(), RAY if self.request.workers == RAY else worker_count)
        for (_, source), (counts, languages) in zip(unfinished, results, strict=True):
            filters.languages += languages
            self.say(f"{source.path}: {counted(counts.rows, 'row')}, {counts.accepted:,} accepted")

    def _file(self, plan: Plan, source: Source) -> Path:
        return self.hub.fetch(plan.repository, source) if plan.hub_id else Path(source.local or "")

    def _check_accepted(self, plan: Plan, total: Counts, languages: Mapping[str, int]) -> None:
        """Raise DataError if no row was accepted, and discard the request, since there is nothing to continue."""
        if total.accepted:
            return
        (self.work / "request.json").unlink()
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in total.filtered.most_common()) or "none filtered"
        what = f"none of {counted(total.rows, 'row')} is left ({reasons}, {total.quarantined:,} kept aside)"
        common = sorted(languages.items(), key=lambda item: (-item[1], item[0]))[:10]
        if common and total.filtered["language"]:
            language_list = ", ".join(f"{name} ({n:,})" for name, n in common)
            raise DataError("--language", what, f"the languages are {language_list}")
        quarantine_files = (Part(self.work, n).aside for n in range(len(plan.sources)))
        quarantine_file = next((p for p in quarantine_files if p.exists() and p.stat().st_size), None)
        if quarantine_file is None:
            raise DataError(self.request.name, what, "choose other options")
        with quarantine_file.open("rb") as stream:
            q = json.loads(stream.readline())
        raise DataError(q["where"], f"{q['what']}; {what}", q["how"])

    def _write(
        self,
        plan: Plan,
        parts: list[Part],
        read: list[dict[str, Any]],
        layouts: list[list[Any]],
        total: Counts,
        label_sha256: str | None,
    ) -> GetResult:
        # drop the old data.json that --redo replaces, so that the result does not count as complete until the new one is written
        (self.folder / "data.json").unlink(missing_ok=True)
        assignment = self._assign(parts, [r["split"] for r in read])
        rows, examples = self._write_splits(parts, assignment)
        with atomic_write(self.folder / "quarantine.jsonl") as out:
            for part in parts:
                with part.aside.open("rb") as stream:
                    shutil.copyfileobj(stream, out)
        _, kind, options = layouts[0]
        files = {
            n: {"bytes": (p := self.folder / n).stat().st_size, "sha256": file_sha256(p)} for n in RESULT_FILES[:-1]
        }
        data = {
            "name": self.request.name,
            "origin": plan.origin,
            "commit": plan.commit or None,
            "terms": plan.terms or None,
            "kind": kind,
            "layouts": list(dict.fromkeys(layout[0] for layout in layouts)),
            "layout_options": options,
            "counts": total.to_json(),
            "splits": {s: {"rows": rows[i], "examples": examples[i]} for i, s in enumerate(SPLITS)},
            "prompt_groups": {"prompts": assignment.prompts, "groups": assignment.groups},
            "straddling": dict(zip(("groups", "rows"), assignment.straddling, strict=True)),
            "labelled_with_sha256": label_sha256,
            "sources": read,
            "files": files,
            "request": self.identity,
        }
        write_json(self.folder / "data.json", data)
        return GetResult(self.folder, read_json(self.folder / "data.json"), fresh=True)

    def _assign(self, parts: list[Part], published: list[str]) -> Assignment:
        splitter = Splitter()
        large = sum(part.rows.stat().st_size for part in parts) >= SHARD
        worker_count = number_of(self.request.workers if large else 1, len(parts))
        workers: Workers = RAY if worker_count > 1 and self.request.workers == RAY else worker_count
        for part_splitter in in_order(_prompts_of, zip(parts, published, strict=True), workers):
            splitter.merge(part_splitter)
            if large:
                self.say(f"grouping prompts: {counted(len(splitter), 'row')}")
        return splitter.assign(self.request.split, self.request.seed, keep_published=self.request.published_splits)

    def _write_splits(self, parts: list[Part], assignment: Assignment) -> tuple[list[int], list[int]]:
        rows, examples = [0, 0, 0], [0, 0, 0]
        split_numbers = iter(assignment.split.tolist())
        pace = Pace(self.say, "writing")
        with ExitStack() as stack:
            outputs = [stack.enter_context(atomic_write(self.folder / name)) for name in RESULT_FILES[:3]]
            for part in parts:
                for group in part.lines():
                    split = next(split_numbers)
                    for row in group:
                        outputs[split].write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                    rows[split] += 1
                    examples[split] += len(group)
                    pace.step()
        return rows, examples


@dataclass(frozen=True, slots=True)
class _Task:
    """A worker's task: convert one file into its part."""

    request: GetRequest
    work: Path
    number: int
    layout: str
    columns: dict[str, str]
    transcripts: bool
    file: str
    name: str
    bounds: Bounds

    def convert(self) -> tuple[Counts, Counter[str]]:
        """Convert the file. Returns the counts, and how often each language occurred."""
        conversion, filters, part = (
            conversion_of(self.layout, self.request),
            Filters(self.request),
            Part(self.work, self.number),
        )
        write_json(part.layout, [conversion.layout.name, conversion.kind, dict(conversion.options)])
        converter = Converter(conversion, self.columns, filters, None, self.transcripts)
        with Path(self.file).open("rb") as stream:
            rows = read_stream(stream, self.name, self.bounds)
            counts = converter.convert(rows, self.name, part, Pace(lambda line: None, self.name))
        return counts, filters.languages


def _prompts_of(task: tuple[Part, str]) -> Splitter:
    """A splitter with the prompts of one part, given (part, published split)."""
    part, split = task
    splitter = Splitter()
    splitter.add((key_text(rows[0]), split) for rows in part.lines())
    return splitter


def key_text(row: Mapping[str, Any]) -> str:
    """The text by which a written row is grouped: its prompt, or else its text or completion."""
    prompt = row.get("prompt") or row.get("text") or row.get("completion") or ""
    return prompt if isinstance(prompt, str) else prompt_text(tuple(Message(m["role"], m["content"]) for m in prompt))


def _source_json(source: Source, counts: Counts, whole: bool) -> dict[str, Any]:
    record = asdict(source)
    kept_fields = {k: record[k] for k in ("path", "split", "subset", "size", "sha256", "git_sha1")}
    return {k: v for k, v in kept_fields.items() if v not in (None, "")} | {"rows_read": counts.rows, "whole": whole}


def _check_unchanged(plan: Plan) -> None:
    for source in plan.sources:
        if source.local is None:
            continue
        path = Path(source.local)
        if not path.exists() or path.stat().st_size != source.size or file_sha256(path) != source.sha256:
            raise DataError(source.local, "was changed or removed since this was begun", "add --redo to start over")


# ---- The summary ----


def summary(result: GetResult) -> str:
    """Format what was read, how many rows were accepted, filtered and kept aside, and what to do next."""
    data, counts = result.data, result.counts
    reasons = "; ".join(f"{n:,} {reason}" for reason, n in counts.filtered.most_common())
    filtered = f"{sum(counts.filtered.values()):,} filtered" + (f" ({reasons})" if reasons else "")
    keeps_published = data["request"]["published_splits"]
    grouping = "published splits are kept as they are" if keeps_published else "nearly equal ones stay on one side"
    groups = data["prompt_groups"]
    splits = [
        f"{name} {split['rows']:,}"
        + (f" ({split['examples']:,} examples)" if split["examples"] != split["rows"] else "")
        for name, split in data["splits"].items()
    ]
    lines = [
        f"{data['name']}: {counted(counts.rows, 'row')} = {counts.accepted:,} accepted + {filtered} + {counts.quarantined:,} kept aside",
        f"  {', '.join(splits)} ({data['kind']})",
        f"  {groups['prompts']:,} prompts in {groups['groups']:,} groups: {grouping}",
    ]
    if counts.unlabelled:
        lines.append(f"  {counted(counts.unlabelled, 'answer')} without a label left out")
    if data["straddling"]["groups"]:
        straddling = data["straddling"]
        text = f"{straddling['groups']:,} groups of prompts ({straddling['rows']:,} rows)"
        lines.append(f"  {text} occur in several published splits")
    published = sorted({s["split"] for s in data["sources"]})
    if len(published) > 1 and not keeps_published:
        note = f"the published splits ({', '.join(published)}) were put together"
        lines.append(f"  {note}; --published-splits keeps them")
    if counts.quarantined:
        lines.append(f"  rows kept aside, with reasons: {result.folder / 'quarantine.jsonl'}")
    return "\n".join([*lines, *_next_steps(result)])


def _next_steps(result: GetResult) -> list[str]:
    train_file = result.folder / "train.jsonl"
    validation_file = result.folder / "validation.jsonl"
    eval_option = (
        f" --eval-data {shlex.quote(str(validation_file))}" if result.data["splits"]["validation"]["rows"] else ""
    )
    train_path = shlex.quote(str(train_file))
    return [
        "next:",
        f"  penchant data audit {train_path}",
        f"  penchant init --data {train_path}{eval_option}  # asks for model and goal, writes run.yaml",
    ]
