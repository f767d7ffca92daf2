"""A cleaned copy of a file, and a list of every row that was dropped or changed. The input is never written to."""

from __future__ import annotations

import gzip
import hashlib
import shlex
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from penchant.base.files import atomic_path
from penchant.base.processes import RAY, Workers, in_order, number_of
from penchant.base.text import counted
from penchant.data.audit import Leakage, is_empty, sensitive
from penchant.data.audit.counters import ExactDuplicates, NearDuplicates, RowView
from penchant.data.audit.findings import Places
from penchant.data.load import IDENTICAL, ConversionSettings, Converted, is_identical, json_line, stream_preferences
from penchant.data.read import BOUNDS, BadRow, Bounds, Row, Shard, read_shard, shards_of
from penchant.data.read.json_text import json_lines
from penchant.data.read.source import Source
from penchant.errors import DataError

RULES = {  # in order of precedence: the first that applies is the reason given
    "unreadable": "rows that cannot be read as a row at all",
    "bad_rows": "rows that do not fit the layout",
    "empty": "rows with an empty prompt or answer",
    "identical": "pairs whose chosen equals rejected",
    "secrets": "rows that hold something like a key or a password token",
    "pii": "rows that hold something like personal data",
    "leakage": "rows whose prompt is in a file given with --against, or nearly equal to one there",
    "contradictions": "both sides of pairs that also occur the other way round, or of an answer labeled good and bad",
    "near_contradictions": "the same for nearly equal pairs",
    "cycles": "rows of cycles: A over B, B over C, C over A",
    "duplicates": "exact copies of an earlier row",
    "near_duplicates": "near copies of an earlier row",
}
BIT = {rule: 1 << i for i, rule in enumerate(RULES)}
DEFAULT = ("unreadable", "bad_rows", "empty", "identical", "duplicates")
BY_HAND = "by_hand"
RULE_TITLES = RULES | {BY_HAND: "rows that a person dropped"}
ALWAYS = "unreadable"  # such rows cannot be written
JSONL = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True, slots=True)
class Fixed:
    """The result of a fix: ``rows == written + dropped``, and every dropped or changed row is in `touched`."""

    rows: int
    written: int
    dropped: Mapping[str, int]
    changed: int
    redacted: Mapping[str, int]
    output: Path
    touched: Path
    rules: Sequence[str]
    redact: Sequence[str]
    edited: int = 0
    notes: Sequence[str] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON-able mapping."""
        values = {n: getattr(self, n) for n in ("rows", "written", "changed", "edited")}
        values |= {n: dict(getattr(self, n)) for n in ("dropped", "redacted")}
        values |= {n: str(getattr(self, n)) for n in ("output", "touched")}
        return {**values, "drop": list(self.rules), "redact": list(self.redact)}

    def to_text(self) -> str:
        """The result for a terminal."""
        dropped = sum(self.dropped.values())
        lines = [*self.notes, f"dropping: {', '.join(self.rules)}; redacting: {', '.join(self.redact) or 'nothing'}"]
        written = f"{self.written:,} written ({self.changed + self.edited:,} of them changed)"
        lines.append(f"{counted(self.rows, 'row')} = {written} + {dropped:,} dropped")
        lines += [f"  {count:>9,}  {RULE_TITLES[rule]}" for rule, count in self.dropped.items() if count]
        lines += [f"  {self.edited:>9,}  rows that a person changed"] * bool(self.edited)
        lines += [f"  {count:>9,}  {sensitive.TITLES[kind]} masked" for kind, count in self.redacted.items()]
        lines += [f"written: {self.output}", f"every row that was touched: {self.touched}"]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Edit:
    """A person's edit of a row: its new values, or None to drop it; `was`: `content_sum` of the row they saw."""

    values: Mapping[str, Any] | None
    was: str


def read_edits(path: str | Path) -> dict[str, Edit]:
    """Read the edits made to a file's rows in `penchant studio`, by a row's place; the last line about each counts.

    Raises:
        DataError: the file cannot be read.
    """
    edits: dict[str, Edit] = {}
    try:
        with Path(path).expanduser().open("rb") as stream:
            lines = [*json_lines(Source(stream, str(path), Bounds()))]
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the path, or an unknown home folder
        raise DataError(str(path), "cannot be read", "give a file of .studio/edits in a studio's folder") from error
    for line in lines:
        row = line.values if isinstance(line, Row) else {}  # half a line, if the studio was killed
        where, action, values = str(row.get("where")), row.get("action"), row.get("row")
        if action in ("changed", "dropped"):
            new_values = (values if isinstance(values, Mapping) else {}) if action == "changed" else None
            edits[where] = Edit(new_values, str(row.get("was") or ""))
        else:
            edits.pop(where, None)
    return edits


def content_sum(values: Mapping[str, Any]) -> str:
    """SHA-256 of a row's values."""
    return hashlib.sha256(json_line(dict(values))).hexdigest()


def fix(
    source: str,
    output: str | Path,
    *,
    drop: Collection[str] = DEFAULT,
    redact: Collection[str] = (),
    against: Sequence[str] = (),
    shape: str = "auto",
    columns: Mapping[str, str] | None = None,
    overwrite: bool = False,
    edits: Mapping[str, Edit] | None = None,
    workers: Workers = None,
) -> Fixed:
    """Write a cleaned copy of `source` to `output`, and ``OUTPUT.touched.jsonl``; `source` is read twice.

    Args:
        drop: names of `RULES`; redact: ``pii``, ``secrets``: values are masked anywhere in rows that stay.
        against: files whose prompts must not be in the copy (rule ``leakage``).
        shape, columns: as for `load_preferences`; the copy keeps the columns' own names. overwrite: whether `output` may exist.
        edits: a person's edits by a row's place; rules do not apply to these rows.
        workers: processes that check parts of a large file; None: one per core.

    Raises:
        DataError: an edited row has changed or is gone; a rule is unknown; the output is an input, already exists or has another
            format's ending.
    """
    rules = _rules(drop, redact, against)
    target, notes = _target(source, Path(output).expanduser(), [source, *against], overwrite)
    touched = target.with_name(target.name + ".touched.jsonl")
    reading: dict[str, Any] = {"shape": shape, "columns": columns, "identical": "keep"}
    reasons_by_row = _decide(source, rules, against, reading, workers)
    dropped: Counter[str] = Counter(dict.fromkeys(rules, 0))
    redacted: Counter[str] = Counter()
    rows = written = changed = edited = 0
    pending = dict(edits or {})
    stream = stream_preferences(source, **reading)  # raises for an unreadable file before anything is written
    with ExitStack() as stack:
        schema_of = Path(source).expanduser() if target.suffix == ".parquet" else None
        write = stack.enter_context(_replacing_writer(target, schema_of))
        write_touched = stack.enter_context(_replacing_writer(touched))
        for converted, reasons in zip(stream, reasons_by_row, strict=True):
            (row,) = converted.source
            rows += 1
            edit = pending.pop(row.where, None)
            if edit is not None:
                if not isinstance(row, Row) or content_sum(row.values) != edit.was:
                    raise DataError(row.where, "was edited, and is another row now", EDIT_AGAIN)
                reasons = () if edit.values is not None else (BY_HAND,)
            if reasons:
                dropped[reasons[0]] += 1
                write_touched(_touched_row(row, "dropped", reasons))
                continue
            assert isinstance(row, Row)
            values: Any = row.values if edit is None or edit.values is None else edit.values
            counts: Counter[str] = Counter()
            if redact:
                values = masked(values, redact, counts)
            written += 1
            if edit is not None:
                edited += 1
                write_touched(_touched_row(row, "changed", (BY_HAND,)) | {"line": written})
            if counts:
                changed += 1
                redacted += counts
                write_touched({"where": row.where, "action": "changed", "masked": dict(counts), "line": written})
            write(values)
        if rows != written + dropped.total():
            raise AssertionError(f"{rows} rows != {written} written + {dropped.total()} dropped")
        if pending:
            raise DataError(min(pending), "was edited, and no longer exists", EDIT_AGAIN)
        if not written:
            raise DataError(source, "no row would be left", "drop less: --keep RULE")
    return Fixed(rows, written, dropped, changed, redacted, target, touched, rules, tuple(redact), edited, notes)


EDIT_AGAIN = "the file has changed since: take the edits back and make them again"


def _rules(drop: Collection[str], redact: Collection[str], against: Sequence[str]) -> tuple[str, ...]:
    _check_rules(drop, "--drop")
    for name in redact:
        if name not in sensitive.GROUPS:
            raise DataError("--redact", f"{name!r} cannot be redacted", f"there are {', '.join(sensitive.GROUPS)}")
        if name in drop:
            raise DataError("--redact", f"rows with {name} are dropped already", "drop or redact, not both")
    if "leakage" in drop and not against:
        raise DataError("--drop leakage", "needs the other splits", "give --against test.jsonl")
    if against and "leakage" not in drop:
        raise DataError("--against", "is for the rule leakage", "add --drop leakage")
    return tuple(rule for rule in RULES if rule in drop or rule == ALWAYS)


def _check_rules(names: Collection[str], where: str) -> None:
    for name in names:
        if name not in RULES:
            raise DataError(where, f"{name!r} is not a rule", f"there are {', '.join(RULES)}")


def _target(source: str, target: Path, inputs: Sequence[str], overwrite: bool) -> tuple[Path, tuple[str, ...]]:
    files = [Path(i).expanduser() for i in inputs]
    if not target.name:
        raise DataError("output", f"{str(target)!r} is not the name of a file", "give one")
    touched = target.with_name(target.name + ".touched.jsonl")
    for file in files:
        for path in (target, touched):
            if path.resolve() == file.resolve() or (path.exists() and file.exists() and path.samefile(file)):
                raise DataError(str(target), "is an input", "give another name; the input is never written to")
    for path in (target, touched):
        if path.exists() and not overwrite:
            raise DataError(str(path), "already exists", "give another name, or --overwrite")
    parquet = source.lower().endswith(".parquet")
    endings = (".parquet",) if parquet else JSONL
    if not target.name.lower().endswith(endings):
        kind = "Parquet" if parquet else "JSONL"
        raise DataError(str(target), f"the copy is {kind}", f"name it {target.stem}{endings[0]}")
    if not target.parent.is_dir():
        raise DataError(str(target), "its folder does not exist", f"mkdir -p {target.parent}")
    same_format = parquet or source.lower().endswith((*JSONL, ".ndjson", ".ndjson.gz"))
    return target, () if same_format else (f"{source} becomes JSONL",)


# ---- Which rows are dropped ----


def _prepare_advice(source: str, shape: str, columns: Mapping[str, str]) -> str:
    """Advice on how to make a file that can be fixed, with one example per row."""
    column_options = "".join(f" --column {shlex.quote(f'{ours}={yours}')}" for ours, yours in columns.items())
    command = f"penchant data get mine --from {shlex.quote(source)} --layout {shape}{column_options} --split 1,0,0"
    return f"write one example per row first: {command}"


class _RowMarks:
    """Per row, the rules that drop it by itself, and what is needed to compare it with other rows.

    Args:
        first: advice for a layout that cannot be fixed, see `_prepare_advice`.
    """

    def __init__(self, settings: ConversionSettings, kind: str, rules: Sequence[str], first: str) -> None:
        self.how, self.rules, self.first = settings, rules, first
        self.flags = array("H")  # a bit per rule, by its index in RULES
        self.accepted = array("q")  # indices of the rows that gave a tree
        places = Places()
        self.copies = ExactDuplicates(kind, places)
        near_rules = {"near_duplicates", "near_contradictions", "cycles"} & set(rules)
        self.near = NearDuplicates(kind, places, self.copies) if near_rules else None
        self.leakage = Leakage(["others", "this"]) if "leakage" in rules else None

    def take(self, rows: Iterable[Converted]) -> None:
        """Check more rows."""
        groups = tuple(g for g in sensitive.GROUPS if g in self.rules)
        for converted in rows:
            (row,) = converted.source
            if len(converted.trees) > 1:
                raise DataError(row.where, f"a row of the layout {self.how.shape} gives several examples", self.first)
            mark = 0
            if converted.trees:
                (tree,) = converted.trees
                view = RowView(len(self.accepted), tree)
                if is_identical(tree):
                    mark |= BIT["identical"]
                self.copies.update(view)
                if self.near is not None:
                    self.near.update(view)
                if self.leakage is not None:
                    self.leakage.update(1, tree)
                self.accepted.append(len(self.flags))
            elif not converted.left_out:  # a row that an option leaves out of training is valid
                bad_row = converted.aside[0]
                rule = (
                    "identical" if bad_row.what.startswith(IDENTICAL) else "empty" if is_empty(bad_row) else "bad_rows"
                )
                mark |= BIT[rule if isinstance(row, Row) else "unreadable"]
            if groups and isinstance(row, Row):
                counts: Counter[str] = Counter()
                masked(row.values, groups, counts)
                mark |= sum(BIT[g] for g in groups if counts.keys() & set(sensitive.GROUPS[g]))
            self.flags.append(mark)

    def merge(self, other: _RowMarks) -> None:
        """Append the rows of another one."""
        self.accepted.frombytes((np.array(other.accepted, np.int64) + len(self.flags)).tobytes())
        self.flags.extend(other.flags)
        self.copies.merge(other.copies)
        for counter, other_counter in ((self.near, other.near), (self.leakage, other.leakage)):
            if counter is not None:
                counter.merge(other_counter)  # type: ignore[arg-type]

    def by_row(self) -> Iterator[tuple[str, ...]]:
        """Yield the rules that drop each row, in order of precedence."""
        marks = np.array(self.flags, dtype=np.uint16)
        accepted = np.array(self.accepted, dtype=np.int64)
        for rule, dropped in _by_rule(self.copies, self.near, self.leakage, self.rules).items():
            marks[accepted[dropped]] |= BIT[rule]
        active = sum(BIT[r] for r in self.rules)
        for mark in (marks & active).tolist():
            yield tuple(rule for rule in self.rules if mark & BIT[rule]) if mark else ()


@dataclass(frozen=True, slots=True)
class _ShardTask:
    """A worker's task: check a part of a file."""

    shard: Shard
    bounds: Bounds
    marks: _RowMarks  # empty at first

    def run(self) -> _RowMarks:
        self.marks.take(self.marks.how.convert(read_shard(self.shard, self.bounds)))
        return self.marks


def _decide(
    source: str, rules: Sequence[str], against: Sequence[str], reading: dict[str, Any], workers: Workers
) -> Iterator[tuple[str, ...]]:
    """For each row of the file, in order, the rules that drop it; one pass over the file."""
    stream = stream_preferences(source, **reading)
    advice = _prepare_advice(source, stream.shape, reading.get("columns") or {})
    if stream.grouped:
        raise DataError(source, f"rows of the layout {stream.shape} make examples together", advice)

    def empty_marks() -> _RowMarks:
        return _RowMarks(stream.how, stream.kind, rules, advice)

    marks, bounds = empty_marks(), BOUNDS.get() or Bounds()
    if marks.leakage is not None:
        for converted in stream_preferences(list(against), **reading):
            for tree in converted.trees:
                marks.leakage.update(0, tree)
    shards = shards_of(source, bounds) if stream.splittable else []
    processes = number_of(workers, len(shards))
    if processes > 1:
        tasks = (_ShardTask(shard, bounds, empty_marks()) for shard in shards)
        for part in in_order(_ShardTask.run, tasks, RAY if workers == RAY else processes):
            marks.merge(part)
    else:
        marks.take(stream)
    return marks.by_row()


def _by_rule(
    copies: ExactDuplicates, near: NearDuplicates | None, leakage: Leakage | None, rules: Sequence[str]
) -> dict[str, np.ndarray]:
    """By rule, (n,) bool: the accepted rows that it drops."""
    first = copies.duplicates()
    masks = {"duplicates": first != np.arange(len(first)), "contradictions": copies.contradictory()}
    if near is not None:
        rows = near.rows()
        masks |= {name: rows[name] >= 0 for name in ("near_duplicates", "cycles") if name in rows}
        masks["near_contradictions"] = near.contradictory()
    if leakage is not None:
        masks["leakage"] = leakage.leaked_rows(1)[-len(first) :]
    return {rule: mask for rule, mask in masks.items() if rule in rules}


# ---- Masking ----


def masked(value: Any, groups: Collection[str], counts: Counter[str]) -> Any:
    """The value with personal data or secrets masked in all its texts; the number of each kind is added to `counts`."""
    if isinstance(value, str):
        text, kinds = sensitive.redact(value, groups)
        counts.update(kinds)
        return text
    if isinstance(value, Mapping):
        return {k: masked(v, groups, counts) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(v, groups, counts) for v in value]
    return value


def _touched_row(row: Row | BadRow, action: str, reasons: Sequence[str]) -> dict[str, Any]:
    raw = row.raw if isinstance(row, BadRow) else row.values
    masked_row = masked(raw, tuple(sensitive.GROUPS), Counter())
    entry = {"where": row.where, "action": action, "rule": reasons[0], "also": list(reasons[1:]), "row": masked_row}
    return entry | ({"what": row.what} if isinstance(row, BadRow) else {})


# ---- Writing ----


Write = Callable[[Mapping[str, Any]], object]


@contextmanager
def _replacing_writer(target: Path, schema_of: Path | None = None) -> Iterator[Write]:
    """Write rows to a file next to the target, which replaces it at the end if nothing went wrong.

    Args:
        schema_of: the Parquet file whose schema a Parquet copy gets; None: JSONL, gzipped if the target's name ends in .gz.
    """
    with atomic_path(target) as temporary:
        if schema_of is not None:
            with _parquet(temporary, schema_of) as write:
                yield write
        else:
            with (gzip.open if target.suffix == ".gz" else open)(temporary, "wb") as out:
                yield lambda values: out.write(json_line(values))


@contextmanager
def _parquet(path: Path, schema_of: Path) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(schema_of)
    batch: list[Mapping[str, Any]] = []
    with pq.ParquetWriter(path, schema) as out:

        def flush() -> None:
            if batch:
                out.write_table(pa.Table.from_pylist(batch, schema=schema))
                batch.clear()

        def write(values: Mapping[str, Any]) -> None:
            batch.append(values)
            if len(batch) >= 1024:
                flush()

        yield write
        flush()


def default_rules(drop: Sequence[str] = (), keep: Sequence[str] = ()) -> tuple[str, ...]:
    """The default rules, with those in `drop` and without those in `keep`.

    Raises:
        DataError: a rule is unknown, in both, or cannot be kept.
    """
    _check_rules([*drop, *keep], "data fix")
    conflicts = sorted(set(drop) & set(keep)) or sorted({ALWAYS} & set(keep))
    if conflicts:
        how = "such rows cannot be written" if ALWAYS in conflicts else "drop it or keep it"
        raise DataError("data fix", f"{conflicts[0]} cannot be kept", how)
    return tuple(rule for rule in RULES if (rule in DEFAULT or rule in drop) and rule not in keep)
