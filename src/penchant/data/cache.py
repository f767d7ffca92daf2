"""A cache on disk by content: rows, splits, tokens and audits of large files are made once.

An entry is a folder whose name is the SHA-256 of everything that it depends on: the bytes of the data files, the settings, the
tokenizer's definition, this package's own data code. So it can be missing or right, never stale. It is written aside and
renamed; every file's size and CRC-32 stand in its ``meta.json`` and are checked when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from penchant.files import file_sha256

T = TypeVar("T")
AUTO_BYTES = 4 << 20  # smaller data is read and tokenised faster than a cache is looked after
META = "meta.json"
RACY_NS = 2_000_000_000  # the coarsest clock of a file system (FAT) ticks every two seconds
FILES_KEPT = 1000  # in the table of hashes


def cache_root() -> Path:
    """``$PENCHANT_CACHE/data`` or ``~/.cache/penchant/data``."""
    return Path(os.environ.get("PENCHANT_CACHE", "~/.cache/penchant")).expanduser() / "data"


class FileHashes:
    """SHA-256 of files, read once: a table beside the cache says which file, as the file system describes it, had which.

    Size, times of content and of inode, and the inode's number must be the same, as in git's index. And as there, an entry is not
    trusted where the file was changed less than two seconds before it was read: a later change may have the same time.
    """

    def __init__(self) -> None:
        self.path = cache_root() / "files.json"

    def of(self, files: Sequence[Path]) -> list[str]:
        """SHA-256 of each file's bytes."""
        table = self._table()
        new: dict[str, list[Any]] = {}
        found = []
        for file in files:
            name, told = str(file.resolve()), _described(file)
            known = table.get(name)
            if isinstance(known, list) and len(known) == 3 and known[0] == told and _settled(told, known[1]):
                found.append(str(known[2]))
                continue
            began = now_ns()
            digest = file_sha256(file)
            found.append(digest)
            if _described(file) == told and _settled(told, began):
                new[name] = [told, began, digest]
        if new:
            self._keep({**{k: v for k, v in table.items() if k not in new}, **new})
        return found

    def _table(self) -> dict[str, Any]:
        try:
            table = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return table if isinstance(table, dict) else {}

    def _keep(self, table: Mapping[str, Any]) -> None:
        """Written aside and renamed; of two processes that write at once one loses, and a file is read once more."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(prefix=".files-", dir=self.path.parent)
        except OSError:
            return
        try:
            with os.fdopen(handle, "w") as out:
                json.dump(dict(list(table.items())[-FILES_KEPT:]), out)
            os.replace(aside, self.path)
        except OSError:
            Path(aside).unlink(missing_ok=True)


def now_ns() -> int:
    """The time, ns since 1970."""
    return time.time_ns()


def _described(file: Path) -> list[int]:
    """What a change of a file changes: size, time of content, time of inode (nobody can put that back), inode, device."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def _settled(told: Sequence[int], read_at: Any) -> bool:
    """Whether the last change was long enough before it was read that a later one has another time."""
    return isinstance(read_at, int) and read_at - max(told[1], told[2]) > RACY_NS


@cache
def code_sha256() -> str:
    """SHA-256 over the sources of this package: rows that other code made are not taken for this code's."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.*")):
        if path.suffix in (".py", ".txt"):
            digest.update(str(path.relative_to(Path(__file__).parent)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def key_of(kind: str, depends_on: Mapping[str, Any]) -> str:
    """The name of an entry."""
    content = {"kind": kind, "code": code_sha256(), **depends_on}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tokenizer_key(tokenizer: Any) -> str | None:
    """Everything of a tokenizer that its ids and texts depend on, hashed; None where that cannot be told (a slow tokenizer)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template", "add_bos_token", "add_eos_token")
    parts = [type(tokenizer).__name__, backend.to_str(), *(repr(getattr(tokenizer, n, None)) for n in names)]
    parts += [metadata.version(package) for package in ("tokenizers", "transformers")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Entry:
    """One folder of the cache."""

    def __init__(self, kind: str, key: str) -> None:
        self.folder = cache_root() / kind / key[:40]

    def get(self, read: Callable[[Path, Mapping[str, Any]], T]) -> T | None:
        """What `read` makes of the folder and its meta; None where there is none, or a damaged one, which is removed."""
        try:
            meta = json.loads((self.folder / META).read_text())
            for name, (size, crc) in meta["files"].items():
                path = self.folder / name
                if path.stat().st_size != size or crc32(path) != crc:
                    raise ValueError(f"{path} is damaged")
            return read(self.folder, meta["content"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError):
            shutil.rmtree(self.folder, ignore_errors=True)
            return None

    def put(self, write: Callable[[Path], Mapping[str, Any]]) -> bool:
        """Make the entry: `write` fills a folder and returns the meta. False where the disk does not take it.

        What `write` raises by itself, a `DataError` say, is passed on.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=".making-", dir=self.folder.parent))
        except OSError:
            return False
        try:
            content = write(aside)
            files = {p.name: (p.stat().st_size, crc32(p)) for p in sorted(aside.iterdir())}
            with (aside / META).open("w") as out:
                json.dump({"content": content, "files": files}, out)
                out.flush()
                os.fsync(out.fileno())
            os.rename(aside, self.folder)
        except OSError:
            return (self.folder / META).exists()  # another process was faster, or the disk is full
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return True


def crc32(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
