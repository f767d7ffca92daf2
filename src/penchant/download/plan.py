"""Check a `data get` request, and choose the files to read."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from penchant.base.files import file_sha256
from penchant.base.functions import own_sha256
from penchant.data.read import ENDINGS, ending, find_files
from penchant.download.catalogue import HUB, Files, Spec, chosen_subsets, find_spec, is_hub_id, unknown_name_error
from penchant.download.convert import labels_sha256
from penchant.download.hub import Hub, HubFile, Repository
from penchant.errors import ConfigError, DataError
from penchant.requests import GetRequest

READABLE = tuple(e for e in ENDINGS if e != ".txt")  # a published text file is a license or a readme


# ---- The request ----

AS = ("sft", "prompts", "unpaired")
REDACTED = ("keep", "only", "drop")


def identity(request: GetRequest) -> dict[str, Any]:
    """What determines the result, as JSON values: the options but output, redo, quiet and workers, and the user's own files."""
    options: dict[str, Any] = json.loads(
        json.dumps({k: v for k, v in asdict(request).items() if k not in ("output", "redo", "quiet", "workers")})
    )
    options["source"] = None if request.source is None else str(Path(request.source).expanduser().resolve())
    hashes = {"layout_sha256": own_sha256(request.layout or ""), "labels_sha256": labels_sha256(request)}
    return options | {name: value for name, value in hashes.items() if value is not None}


def check_request(request: GetRequest) -> None:
    """Check a request's options.

    Raises:
        ConfigError: an option is invalid; the error names it.
    """
    _check_split(request.split)
    if request.source is not None and request.revision is not None:
        raise ConfigError("--revision", "is given together with --from, a copy on this machine", "leave one out")
    for flag, value, allowed in (("--as", request.as_, (None, *AS)), ("--redacted", request.redacted, REDACTED)):
        if value not in allowed:
            raise ConfigError(flag, f"is {value!r}", f"choose one of {', '.join(filter(None, allowed))}")
    moderation = request.moderation
    if not (moderation in ("keep", "drop-flagged") or (isinstance(moderation, float) and 0 <= moderation <= 1)):
        raise ConfigError("--moderation", f"is {moderation!r}", "give keep, drop-flagged or a score from 0 to 1")
    _check_labels(request)


def _check_split(shares: Sequence[float]) -> None:
    if len(shares) != 3 or not all(math.isfinite(s) and s >= 0 for s in shares) or abs(sum(shares) - 1) > 1e-6:
        what = f"{','.join(f'{s:g}' for s in shares)} are not the shares of train, validation and test"
        raise ConfigError("--split", what, "give three numbers from 0 to 1 that add up to 1, such as 0.9,0.05,0.05")
    if shares[0] == 0:
        raise ConfigError("--split", "train has no share", "give it one above 0")


def _check_labels(request: GetRequest) -> None:
    if request.reward is not None and request.label_with is not None:
        how = "keep one: both say which answers are good"
        raise ConfigError("--reward", "is given together with --label-with", how)
    if request.labels and request.as_ != "unpaired":
        flag = "--reward" if request.reward is not None else "--label-with"
        raise ConfigError(flag, "labels answers, which only unpaired data have", "add --as unpaired")
    if request.reward is not None and request.threshold is None:
        raise ConfigError("--threshold", "is missing", "a reward at or above it makes an answer good; give both")
    if request.reward is None and request.threshold is not None:
        raise ConfigError("--threshold", "is given without --reward", "give --reward too")
    if request.threshold is not None and not math.isfinite(request.threshold):
        raise ConfigError("--threshold", f"is {request.threshold}", "give a finite number")


# ---- The files, on the hub or in a local copy: subset, published split and layout of each ----

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}


@dataclass(frozen=True, slots=True)
class Source(HubFile):
    """One file to read.

    Args:
        split: its published split; subset: its subset, empty if there are none; local: its path in a local copy, else None.
        layout: of its rows, None to detect it; prompts_only: the rows may only be used as prompts.
    """

    split: str
    subset: str
    local: str | None = None
    layout: str | None = None
    prompts_only: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The files that a request reads.

    Args:
        origin: the hub page or the local path; hub_id, commit: of a data set on the hub, empty for a local copy.
        sources: in reading order; terms: its license, if it is in the catalog.
        left_out: a note on missing or unread subsets and files.
    """

    origin: str
    hub_id: str
    commit: str
    sources: tuple[Source, ...]
    terms: str = ""
    left_out: str = ""

    @property
    def repository(self) -> Repository:
        return Repository(self.hub_id, self.commit, ())

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Plan:
        field_names = {f.name for f in fields(Source)}  # plans written by 0.1.0 have more fields
        sources = tuple(Source(**{k: v for k, v in s.items() if k in field_names}) for s in record["sources"])
        return Plan(**{**record, "sources": sources})


def make_plan(request: GetRequest, hub: Hub) -> Plan:
    """Choose the files that a request reads.

    Raises:
        ConfigError: no such name or subset. DataError: no such path, no access, no network, or no readable file.
    """
    spec = find_spec(request.name)
    if spec is None and request.subsets and request.source is not None:
        what = f"{request.name} has none that are known here"
        raise ConfigError("--subset", what, "give the folder of one with --from")
    if request.source is not None:
        return local_plan(Path(request.source).expanduser(), request, spec)
    if spec is None and not is_hub_id(request.name):
        raise unknown_name_error(request.name)
    if spec is not None:
        chosen_subsets(spec, request.subsets)  # raises for an unknown subset before any network access
    repository = hub.list_repository(
        spec.hub if spec else request.name, request.revision or (spec.revision if spec else "main")
    )
    sources, left_out = hub_sources(repository.files, repository.configs, request, spec)
    if not sources:
        what = "holds no file that can be read here" if spec is None else "its files are not where they were published"
        how = (
            f"files are read that end with {', '.join(READABLE)}; name another --revision, or fetch it and give --from"
        )
        raise DataError(HUB + repository.hub_id, what, how)
    plan = Plan(
        HUB + repository.hub_id, repository.hub_id, repository.commit, sources, spec.terms if spec else "", left_out
    )
    hub.check_access(repository, sources[0])
    return plan


# ---- On the hub ----


def hub_sources(
    files: Sequence[HubFile], configs: Sequence[Mapping[str, Any]], request: GetRequest, spec: Spec | None
) -> tuple[tuple[Source, ...], str]:
    """(files of a repository that a request reads, note on what is left out)."""
    if spec is not None:
        paths = {f.path: f for f in files}
        sources = tuple(
            Source(**asdict(paths[p]), split=split, subset=name, layout=layout, prompts_only=prompts_only)
            for name, split, p, (layout, prompts_only) in _catalog_files(
                spec, chosen_subsets(spec, request.subsets), list(paths)
            )
        )
        return sources, _missing_note(spec, chosen_subsets(spec, request.subsets), sources)
    data_files = [f for f in files if ending(f.path) in READABLE and not f.path.startswith(".")]
    chosen, left_out = (
        _card_files(data_files, configs, request.subsets) if configs else _files_by_name(data_files, request.subsets)
    )
    return tuple(Source(**asdict(f), split=split, subset=subset) for f, split, subset in chosen), left_out


def _missing_note(spec: Spec, subsets: Iterable[str], sources: Sequence[Source]) -> str:
    present = {(s.subset, s.split) for s in sources}
    missing = [f"{n} ({split})" for n in subsets for split in spec.subsets[n].splits if (n, split) not in present]
    return f"not there: {', '.join(missing)}" if sources and missing else ""


def _catalog_files(
    spec: Spec, subsets: Iterable[str], paths: Sequence[str]
) -> Iterable[tuple[str, str, str, tuple[str, bool]]]:
    """(subset, split, path, (layout, prompts only)) of the paths that a catalog entry names."""
    for name in subsets:
        files = spec.subsets[name]
        for split, pattern in files.splits.items():
            for path in sorted(p for p in paths if fnmatchcase(p, pattern)):
                yield name, split, path, _row_layout(spec, files)


def _row_layout(spec: Spec, files: Files) -> tuple[str, bool]:
    return files.layout or spec.layout, files.prompts_only


Chosen = list[tuple[HubFile, str, str]]


def _card_files(
    files: Sequence[HubFile], configs: Sequence[Mapping[str, Any]], requested: tuple[str, ...]
) -> tuple[Chosen, str]:
    """(files, note on unread subsets) by the subsets and splits in a data set's card."""
    configs_by_name = {str(c.get("config_name", "default")): c for c in configs}
    default = next((n for n, c in configs_by_name.items() if c.get("default")), None)
    default = default or ("default" if "default" in configs_by_name else next(iter(configs_by_name)))
    selected = tuple(configs_by_name) if requested == ("all",) else requested or (default,)
    for name in selected:
        if name not in configs_by_name:
            raise ConfigError("--subset", f"it has no subset {name!r}", f"it has {', '.join(configs_by_name)}")
    chosen = [
        (f, split, "" if name == "default" else name)
        for name in selected
        for f, split in _config_files(configs_by_name[name], files)
    ]
    unread = [n for n in configs_by_name if n not in selected]
    if not chosen:
        return _files_by_name(files, ())
    return chosen, f"subsets not read: {', '.join(unread)} (--subset)" if unread else ""


def _config_files(config: Mapping[str, Any], files: Sequence[HubFile]) -> Iterator[tuple[HubFile, str]]:
    """(file, split) of one entry of a card; its patterns start from its `data_dir`."""
    data_files, folder = config.get("data_files"), str(config.get("data_dir") or "").strip("/")
    prefix = f"{folder}/" if folder else ""
    inside = {f.path.removeprefix(prefix): f for f in files if f.path.startswith(prefix)}
    if data_files is None:
        yield from ((f, split_of(path)) for path, f in inside.items() if folder)
        return
    is_grouped = isinstance(data_files, list) and all(isinstance(g, Mapping) for g in data_files)
    for group in data_files if is_grouped else [{"path": data_files}]:
        for path, f in inside.items():
            if any(_fits(path, p) for p in _patterns(group.get("path"))):
                yield f, split_of(str(group.get("split", "train")))


def _fits(path: str, pattern: str) -> bool:
    """Whether a path is one of a pattern, or in the folder that it names; ``**/`` also stands for no folder."""
    patterns = {pattern, pattern.replace("**/", "")}
    return any(fnmatchcase(path, p) or path.startswith(p.rstrip("/") + "/") for p in patterns)


def _patterns(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _files_by_name(files: Sequence[HubFile], requested: tuple[str, ...]) -> tuple[Chosen, str]:
    """(files, note on unread files) without a card: the file type with the most bytes, splits by file name."""
    if requested:
        raise ConfigError("--subset", "this data set's page names no subsets", "leave it out")
    sizes: dict[str, int] = {}
    for f in files:
        sizes[_file_type(f.path)] = sizes.get(_file_type(f.path), 0) + f.size
    main_type = max(sizes, key=lambda k: sizes[k], default="")
    unread = [f.path for f in files if _file_type(f.path) != main_type]
    left_out = f"files not read: {', '.join(unread[:5])}{' ...' if len(unread) > 5 else ''}" if unread else ""
    return [(f, split_of(f.path), "") for f in files if _file_type(f.path) == main_type], left_out


def _file_type(path: str) -> str:
    return Path(path.removesuffix(".gz")).suffix


def split_of(path: str) -> str:
    """The published split of a path: the last word in it that names one, or else train."""
    splits = [_SPLIT_WORDS[w] for w in re.findall(r"[a-z]+", path.lower()) if w in _SPLIT_WORDS]
    return splits[-1] if splits else "train"


# ---- A local copy ----


def local_plan(root: Path, request: GetRequest, spec: Spec | None) -> Plan:
    """Plan for a local copy: its files at the published paths, or else any readable files."""
    if not os.path.lexists(root):
        raise DataError(str(root), "no such file or folder", "give a file or folder with --from")
    paths = _readable_files(root)
    if not paths:
        how = f"files are read that end with {', '.join(READABLE)}"
        raise DataError(str(root), "holds no file that can be read", how)
    subsets = chosen_subsets(spec, request.subsets) if spec else ()
    matches: Found = list(_catalog_files(spec, subsets, list(paths))) if spec else []
    matches = matches or _files_anywhere(spec, subsets, paths)
    if not matches:
        raise DataError(str(root), f"holds no file of {', '.join(subsets)}", "give another --subset or --from")
    sources = []
    for subset, split, name, row_layout in matches:
        path = paths[name]
        size, local_path = path.stat().st_size, str(path.resolve())
        sources.append(Source(name, size, file_sha256(path), None, split, subset, local_path, *row_layout))
    left_out = _missing_note(spec, subsets, sources) if spec and any(s.subset for s in sources) else ""
    return Plan(str(root.resolve()), "", "", tuple(sources), spec.terms if spec else "", left_out)


def _readable_files(root: Path) -> dict[str, Path]:
    if not root.is_dir():
        return {f.name: f for f in find_files(str(root)) or () if ending(f.name) in READABLE}
    files = sorted(p for p in root.rglob("*") if p.is_file() and ending(p.name) in READABLE)
    by_name = {p.relative_to(root).as_posix(): p for p in files}
    return {name: p for name, p in by_name.items() if not any(part.startswith(".") for part in name.split("/"))}


Found = list[tuple[str, str, str, tuple[Any, ...]]]


def _files_anywhere(spec: Spec | None, subsets: tuple[str, ...], paths: Mapping[str, Path]) -> Found:
    """Files that are not at the published paths: the subset is a path part that equals its name, the split a word in the path."""
    matches: Found = []
    for name in paths:
        if spec is None:
            matches.append(("", split_of(name), name, ()))
            continue
        parts = re.split(r"[/.]", name)
        subset = next((s for s in spec.subsets if s in parts), None)
        if subset is None or subset in subsets:
            files = spec.subsets[subset or subsets[0]]
            matches.append((subset or "", split_of(name), name, _row_layout(spec, files)))
    return matches
