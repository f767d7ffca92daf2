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
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
AUTO_BYTES = 4 << 20  # smaller data is read and tokenised faster than a cache is looked after
META = "meta.json"


def cache_root() -> Path:
    """``$PENCHANT_CACHE/data`` or ``~/.cache/penchant/data``."""
    return Path(os.environ.get("PENCHANT_CACHE", "~/.cache/penchant")).expanduser() / "data"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
