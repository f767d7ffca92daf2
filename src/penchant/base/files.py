"""File helpers: YAML, hashes, atomic writes, output files, disk errors, checkpoint hashes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from penchant.base.text import gigabytes
from penchant.errors import CheckpointError, ConfigError, DiskError, PenchantError

# Ten times as fast, but rejects some hand-written flow mappings that SafeLoader accepts, such as {a: {b: c}, d:}.
YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
YAML_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
YAML_BYTES, YAML_NODES, YAML_DEPTH = 1 << 20, 100_000, 50  # far more than any config has
YAML_TAGS = {
    None,
    "!",
    *(f"tag:yaml.org,2002:{t}" for t in ("str", "int", "float", "bool", "null", "seq", "map", "merge")),
}


def yaml_root(text: str, loader: Any) -> tuple[Any, yaml.Node | None]:
    """Parse a YAML text to (loader, root node) in bounded time and memory; aliased values are counted each time.

    Raises:
        ValueError, yaml.YAMLError: not YAML, too large or too deep, or with a recursive alias or an unsupported tag.
    """
    text.encode()  # UnicodeEncodeError is a ValueError
    if len(text) > YAML_BYTES:
        raise ValueError(f"more than {YAML_BYTES >> 20} MB")
    sizes: dict[str, int] = {}  # number of values behind each anchor
    open_: list[tuple[str | None, int]] = []  # open collections: (anchor, number of values before it)
    count = 0
    for event in yaml.parse(text, Loader=loader):
        anchor, problem, note = getattr(event, "anchor", None), "", "write out what is meant"
        if isinstance(event, yaml.AliasEvent):
            if anchor in (name for name, _ in open_):
                problem = f"*{anchor} refers to itself"
            count += sizes.get(anchor or "", 1)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.NodeEvent):
            if event.tag not in YAML_TAGS:  # type: ignore[attr-defined]
                problem, note = f"{event.tag} is an unsupported tag", "leave it out"  # type: ignore[attr-defined]
            if isinstance(event, yaml.CollectionStartEvent):
                open_.append((anchor, count))
                if event.tag not in (None, "!", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
                    problem, note = f"{event.tag} stands before a list or a mapping", "leave it out"
            elif anchor is not None:
                sizes[anchor] = 1
            count += 1
        if count > YAML_NODES:
            problem, note = f"more than {YAML_NODES:,} values", "give a smaller file"
        elif len(open_) > YAML_DEPTH:
            problem = f"nested deeper than {YAML_DEPTH}"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark, note=note)  # type: ignore[arg-type]
    parser = loader(text)
    return parser, parser.get_single_node()


def yaml_value(text: str, loader: Any = yaml.SafeLoader) -> Any:
    """The value of an untrusted YAML text; raises as `yaml_root` does."""
    parser, root = yaml_root(text, loader)
    try:
        return None if root is None else parser.construct_document(root)
    except KeyError as error:  # e.g. `!!bool maybe`
        raise ValueError(f"{error} is not what its tag says") from error


def packaged_yaml(package: str, name: str) -> Any:
    """Load a YAML table that is packaged with the code that reads it."""
    return yaml.load((resources.files(package) / name).read_text(encoding="utf-8"), Loader=YAML_LOADER)


def cache_folder(kind: str) -> Path:
    """The cache folder for one kind of reproducible data: ``$PENCHANT_CACHE/KIND`` or ``~/.cache/penchant/KIND``."""
    return Path(os.environ.get("PENCHANT_CACHE", "~/.cache/penchant")).expanduser() / kind


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- Atomic writes ----


def write_atomically(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    write_text_atomically(path, json.dumps(value, indent=1, ensure_ascii=False))


def write_text_atomically(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8), atomically."""
    with atomic_path(path) as temp:
        temp.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it is fsynced and renamed to `path`, else removed."""
    temp = temp_path(path)
    try:
        yield temp
        fsync(temp)
        os.replace(temp, path)
    except BaseException:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
        raise


def temp_path(path: Path) -> Path:
    """The temporary path of a file or folder until it is renamed; `sweep` finds it by this name."""
    return path.with_name(f".tmp-{path.name}-{os.getpid()}")


def sweep(folder: Path, name: str = "*") -> None:
    """Remove temporary files left by dead writers (the caller holds the folder's lock)."""
    for leftover in folder.glob(f".tmp-{name}"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with suppress(OSError):
                leftover.unlink()


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Hold an advisory lock, which the kernel releases if the process dies. No lock if the file system does not support it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:  # not if it is interrupted while it waits: the file is the holder's
            with suppress(OSError):
                path.unlink(missing_ok=True)  # a waiting process then finds the result or makes it too
    finally:
        os.close(handle)


def fsync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- Output files named by the user ----

# how the output files of commands begin, so that a command may overwrite its own
FIGURES, COMPLETIONS = r'\{\n "time": "', r'\{"source": .*"sample": \d+, "completion": '
ROWS = r'\{"source": .*"completion": .*"chosen": '
AUDITED, PAGE = r'\{\n "layout": ', r'[\s\S]{0,3000}<meta name="generator" content="penchant">'
HEAD = 1 << 16  # characters


def check_output(path: str | Path, ours: str = "", inputs: Sequence[Any] = (), flag: str = "") -> Path:
    """Check that a command may write to a file: a new or empty one, or one that the same command wrote. Return its path.

    Args:
        ours: regular expression for the start of such a file; inputs: files that the command reads (non-files are skipped).

    Raises:
        ConfigError: it is one of the inputs, under whatever name, or holds something else.
    """
    file = Path(path).expanduser()

    def refusal(what: str, how: str) -> ConfigError:
        return ConfigError(flag, f"{path} {what}", how) if flag else ConfigError(str(path), what, how)

    for source in inputs:
        name = source.rpartition(":")[0] if isinstance(source, str) and ".py:" in source else source
        with suppress(OSError, ValueError):
            if isinstance(name, (str, Path)) and name and Path(name).expanduser().samefile(file):
                raise refusal("is what this command reads", "give another name")
    try:
        if file.is_file() and file.stat().st_size:
            with file.open(encoding="utf-8", errors="replace") as existing:
                if not (ours and re.match(ours, existing.read(HEAD))):
                    what = "already exists, and this command did not write it"
                    raise refusal(what, "give another name, or move that file away")
    except (OSError, ValueError) as error:
        raise refusal(f"cannot be written ({error})", "give another place") from error
    return file


def write_output(path: str | Path, text: str) -> Path:
    """Write a text to a file named by the user, atomically.

    Raises:
        ConfigError: it cannot be written; DiskError: the disk is full or fails.
    """
    file = Path(path).expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not file.is_file():  # /dev/stdout
            file.write_text(text, encoding="utf-8")
        else:
            write_text_atomically(file.resolve(), text)  # keeps a symbolic link
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in FULL | {errno.EIO}:
            raise disk_error(file, error) from error
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(str(path), f"cannot be written ({reason})", "give another place") from error
    return file


# ---- Disk errors ----

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}
FAILING = {errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP}
ANYWHERE = (FULL | CLOSED | FAILING) - {errno.ENOENT}  # when not writing, a missing file may have any cause


def os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an exception: itself, its cause, or the one in a Rust or C++ library's message; None if there is none."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        match = re.search(r"\((?:os error|\[errno) (\d+)[)\]]|\[errno (\d+)\]", str(error), re.IGNORECASE)
        number = error.errno if isinstance(error, OSError) else None
        if number is None and match:
            number = int(match[1] or match[2])
        if number is not None:
            return OSError(number, os.strerror(number))
        error = error.__cause__ or error.__context__
    return None


def free_bytes(path: Path) -> int | None:
    """Free space on the disk of a path, which need not exist; None if unknown."""
    ancestor = path
    while not os.path.lexists(ancestor) and ancestor != ancestor.parent:
        ancestor = ancestor.parent
    try:
        return shutil.disk_usage(ancestor).free
    except OSError:
        return None


def disk_error(path: Path, error: OSError) -> DiskError:
    """The DiskError for a failed write, with free space and advice."""
    free = free_bytes(path)
    reason = error.strerror if free is None else f"{error.strerror}, {gigabytes(free)} free there"
    how = "check the disk"
    if error.errno in FULL:
        how = "free some space"
    elif error.errno in CLOSED:
        how = "make it writable, or choose another place"
    return DiskError(str(path), f"cannot be written ({reason})", f"{how}, then run the same command again")


def append_line(path: Path, row: Any) -> None:
    """Append one record to a JSONL file shared by several processes, atomically and fsynced.

    A partial line left by a killed writer is removed first (see `end_last_line`), and so is one that could not be written completely.

    Raises:
        DiskError: it cannot be written; no part of it remains in the file.
    """
    text = json.dumps(row, ensure_ascii=False)
    for end in "\x85\u2028\u2029":  # line breaks to some readers
        text = text.replace(end, f"\\u{ord(end):04x}")
    line = text.encode("utf-8", "backslashreplace") + b"\n"
    try:
        new = not path.exists()
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            size = end_last_line(handle)
            try:
                written = os.write(handle, line)
                if written < len(line):
                    written += os.write(handle, line[written:])
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)
        if new:
            fsync(path.parent)
    except OSError as error:
        raise disk_error(path, error) from error


def whole_lines(handle: int) -> int:
    """Cut a partial line off the end of a file; return the remaining bytes."""
    size, end = os.fstat(handle).st_size, _end_of_lines(handle)
    if end < size:
        os.ftruncate(handle, end)
    return end


def end_last_line(handle: int) -> int:
    """End a JSONL file's last line, or cut it off if it is no whole record; return the file's bytes.

    An editor may leave a record without a line break at its end, a killed writer half a record.
    """
    size, end = os.fstat(handle).st_size, _end_of_lines(handle)
    if end == size:
        return size
    try:
        json.loads(os.pread(handle, size - end, end))
    except ValueError:
        os.ftruncate(handle, end)
        return end
    return size + os.write(handle, b"\n")


def _end_of_lines(handle: int) -> int:
    """The position after the last line break of a file."""
    end = os.fstat(handle).st_size
    while end:
        start = max(0, end - (1 << 16))
        block = os.pread(handle, end - start, start)
        if (newline := block.rfind(b"\n")) >= 0:
            return start + newline + 1
        end = start
    return end


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn disk errors in the block into a DiskError about `path`, whichever library was writing.

    Raises:
        DiskError: the disk is full, fails, is read-only or closed to this user.
    """
    try:
        yield
    except PenchantError:
        raise
    except Exception as error:
        cause = os_error(error)
        if cause is None or cause.errno not in ANYWHERE | FAILING:
            raise
        raise disk_error(path, cause) from error


@contextmanager
def optional_write(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Note disk errors in the block instead of raising them, for files that a run can do without."""
    try:
        with writing(path):
            yield
    except DiskError as error:
        say(f"{path}: {error.what}; the run goes on without it")


EXPORT = "export.json"  # in an exported folder: its origin, and the SHA-256 of every file
MANIFEST = "manifest.json"  # in a checkpoint: the SHA-256 of every file; in a run folder: how the run was made


def check_model_folder(folder: Path) -> None:
    """Check a model folder against the hashes of its checkpoint or export; other folders have none to check.

    Raises:
        CheckpointError: a file is missing or was changed after it was written.
    """
    checkpoint = folder.resolve().parent
    if (folder / EXPORT).is_file():
        _check_export(folder)
    if folder.resolve().name == "model" and checkpoint.name.startswith("step-") and (checkpoint / MANIFEST).exists():
        check_sums(checkpoint, "model/")


def _check_export(folder: Path) -> None:
    how = f"export it again (to take it as it is, delete {EXPORT} in it)"
    try:
        hashes = json.loads((folder / EXPORT).read_text(encoding="utf-8"))["sha256"]
        changed = [name for name, sha256 in hashes.items() if file_sha256(folder / name) != sha256]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"cannot be read, or names a file that cannot ({error})"
        raise CheckpointError(str(folder / EXPORT), what, how) from error
    if changed:
        raise CheckpointError(str(folder / changed[0]), "differs from what was exported", how)


def check_sums(checkpoint: Path, names: str = "") -> None:
    """Check the files of a checkpoint whose names start with `names` against its hashes.

    Raises:
        CheckpointError: a file is missing or was changed after it was written.
    """
    how = f"delete {checkpoint} to go on from an older checkpoint"
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if checkpoint.name.startswith("step-") and checkpoint.name != f"step-{manifest['step']}":
            raise CheckpointError(str(checkpoint / MANIFEST), "belongs to another step, or was modified", how)
        if not any(name.startswith(names) for name in manifest["sha256"]):
            raise CheckpointError(str(checkpoint / MANIFEST), f"has no sum of {names or 'any file'}", how)
        for name, expected in manifest["sha256"].items():
            if name.startswith(names) and file_sha256(checkpoint / name) != expected:
                raise CheckpointError(str(checkpoint / name), "differs from what was written", how)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(str(checkpoint), f"cannot be read ({error})", how) from error
