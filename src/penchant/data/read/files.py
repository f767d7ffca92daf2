"""Resolve paths, folders and patterns to files, and recognize files that cannot be read."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from penchant.base.text import closest_file, printable, repeated
from penchant.errors import DataError

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
READABLE = f"{', '.join(ENDINGS)}, and all but .parquet also with .gz"

# by ending: what an unreadable file is, and how to convert it into a readable one
_SHEET = ("is a spreadsheet", "export it as CSV (UTF-8), and name that file")
_PICKLE = ("is a pickle, which is never read: it can run code", "write the rows as JSONL or Parquet")
_ARROW = (
    "is an Arrow file",
    'write it as Parquet, e.g. datasets.Dataset.from_file("NAME").to_parquet("NAME.parquet") in Python',
)
_OTHERS = {
    **dict.fromkeys((".xlsx", ".xlsm", ".xls", ".ods", ".numbers"), _SHEET),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".joblib"), _PICKLE),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), _ARROW),
    ".zip": ("is a zip archive", "unpack it (unzip) and name a file of it"),
    ".zst": ("is packed with zstd", "unpack it: zstd -d NAME"),
    ".bz2": ("is packed with bzip2", "unpack it: bunzip2 -k NAME"),
    ".xz": ("is packed with xz", "unpack it: unxz -k NAME"),
    ".7z": ("is a 7z archive", "unpack it and name a file of it"),
    **dict.fromkeys((".tar", ".tgz"), ("is a tar archive", "unpack it (tar -xf) and name a file of it")),
    ".lfs": ("is a Git LFS pointer and not the data", "fetch the data: git lfs pull"),
    ".html": ("is a web page and not the data", "fetch the file itself, e.g. by its raw or download link"),
    ".db": ("is an SQLite database", "export the table as CSV"),
    ".pq": ("is a Parquet file", "name it .parquet"),
    ".gz": ("is packed twice", "unpack it once: gunzip NAME"),
    ".pdf": ("is a PDF", "write its rows as JSONL or CSV"),
}
_MAGIC = (
    (b"PAR1", ".pq"),
    (b"PARE", ".pq"),
    (b"ARROW1", ".arrow"),
    (b"\xff\xff\xff\xff", ".arrow"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
    (b"\xfd7zXZ\0", ".xz"),
    (b"7z\xbc\xaf\x27\x1c", ".7z"),
    (b"\xd0\xcf\x11\xe0", ".xls"),
    (b"SQLite format 3\0", ".db"),
    (b"version https://git-lfs.github.com", ".lfs"),
    (b"%PDF-", ".pdf"),
    (b"\x1f\x8b", ".gz"),
    (b"\x80\x04\x95", ".pkl"),
)


def kind_of(head: bytes) -> str:
    """The ending of an unreadable format that a file's first bytes belong to; empty if it may be text."""
    if head.startswith(b"PK\x03\x04"):
        return ".xlsx" if b"xl/" in head or b"opendocument.spreadsheet" in head else ".zip"
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return ".bz2"
    if head[257:262] == b"ustar":
        return ".tar"
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return ".html"
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), "")


def unreadable_error(where: str, kind: str) -> DataError:
    what, how = _OTHERS[kind]
    return DataError(where, what, how.replace("NAME", Path(where).name))


def find_files(path: str) -> list[Path] | None:
    """The files that a path names, sorted: itself, those of a folder or of a pattern (``shards/*.parquet``); None for a hub id.

    Raises:
        DataError: the file does not exist, is empty, not a regular file or has an unknown ending; a folder holds different kinds.
    """
    file = Path(path).expanduser()
    try:
        info = os.stat(file)
        if stat.S_ISDIR(info.st_mode):
            return _in_folder(path, file)
        if not stat.S_ISREG(info.st_mode):
            raise DataError(path, "is a pipe or a device", "write the rows to a file: they are read more than once")
        if not ending(file.name):
            kind = file.suffix.lower()
            if kind in _OTHERS and kind != ".gz":
                raise unreadable_error(path, kind)
            what = f'the ending "{file.suffix}" is not known'
            raise DataError(path, what, f"rename it to what it holds: {READABLE}")
        if info.st_size == 0:
            raise DataError(path, "the file is empty", "give a file with at least one row")
        with file.open("rb"):
            return [file]
    except FileNotFoundError:
        return _pattern(path, file)
    except OSError as error:
        how = "check where the links lead" if error.errno == 40 else "check the path and its permissions"
        raise DataError(path, f"cannot be read ({error.strerror})", how) from error
    except ValueError as error:
        raise DataError(path, f"is not a path ({error})", "check the path") from error


def _pattern(path: str, file: Path) -> list[Path] | None:
    if glob.has_magic(path):
        names = sorted(n for n in glob.glob(str(file), recursive=True) if not os.path.isdir(n))
        if not names:
            raise DataError(path, "no file matches the pattern", "check the pattern, and where you start from")
        return [f for name in names for f in find_files(glob.escape(name) if name == path else name) or ()]
    looks_like_id = re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", path) is not None
    if looks_like_id and not path.startswith(".") and Path(path).suffix not in (*ENDINGS, *_OTHERS):  # a hub id
        return None
    raise DataError(path, "no such file", _sibling(file))


_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "data.json"}
_SPLITS = re.compile(r"(train|test|validation|valid|val|dev|eval|heldout|held_out)(?![a-z])", re.IGNORECASE)


def _in_folder(path: str, folder: Path) -> list[Path]:
    files = sorted(f for f in folder.iterdir() if ending(f.name) and f.name[0] != "." and f.name not in _ABOUT)
    if not files:
        how = f"give a file ({READABLE}), or a pattern: {path}/**/*.parquet"
        raise DataError(path, "is a folder without a file of rows", how)
    kinds = {ending(f.name) for f in files}
    splits = {m[0].lower() for f in files if (m := _SPLITS.match(f.name))}
    if len(kinds) > 1 or len(splits) > 1:
        examples = ", ".join(printable(f.name) for f in files[:4]) + (", ..." if len(files) > 4 else "")
        what = f"is a folder of different {'kinds' if len(kinds) > 1 else 'splits'} of files ({examples})"
        raise DataError(path, what, f'name one, or give a pattern: "{path}/{files[0].name.split("-")[0]}*"')
    return [file for f in files for file in find_files(str(f)) or ()]


def named_files(path: str | Sequence[str]) -> list[tuple[str, Path | None]]:
    """All files that paths name, each with its name for messages: without folders, or with as many as make it unique.
    A hub id has no file (None).

    Raises:
        DataError: as `find_files`, or a file is named twice.
    """
    entries: list[tuple[str, Path | None]] = []
    for item in [path] if isinstance(path, str) else path:
        files = find_files(str(item))
        entries += [(str(item), None)] if files is None else [(os.path.abspath(f), f) for f in files]
    full_names = [name for name, _ in entries]
    if repeats := repeated(full_names):
        raise DataError(repeats[0], "is named twice", "name each file once; train.epochs says how often rows are seen")
    depths, names = [1] * len(full_names), full_names
    while True:
        names = [n if f is None else "/".join(Path(n).parts[-k:]) for (n, f), k in zip(entries, depths, strict=True)]
        if len(set(names)) == len(names):
            return [(name, file) for name, (_, file) in zip(names, entries, strict=True)]
        ambiguous = set(repeated(names))
        depths = [k + (name in ambiguous) for name, k in zip(names, depths, strict=True)]


def ending(name: str) -> str:
    """The ending of a file's format, without ``.gz``; empty if it cannot be read."""
    lower = name.lower()
    suffix = Path(lower.removesuffix(".gz")).suffix
    return suffix if suffix in ENDINGS and not (suffix == ".parquet" and lower.endswith(".gz")) else ""


def _sibling(file: Path) -> str:
    try:
        suggestion = closest_file(file)
    except OSError:
        suggestion = ""
    return f"did you mean {suggestion}?" if suggestion else "check the path; a hub id is written owner/name"
