"""Following growing files: each byte is read once, partial lines wait, and truncated or replaced logs are read again."""

from __future__ import annotations

import json
import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest

from penchant.runfolder import RunLock
from penchant.runfolder import read as follow
from penchant.runfolder.read import CachedFile, Tail, json_object, lock_state


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "a.jsonl")
    assert tail.read() == (False, [])
    tail.path.write_text('{"a": 1}\n{"a": ')
    assert tail.read() == (False, [{"a": 1}])
    assert tail.read() == (False, [])
    with tail.path.open("a") as out:
        out.write('2}\nno json\n[3]\n\n{"b": "')
    assert tail.read() == (False, [{"a": 2}]) and tail.unreadable == 2
    with tail.path.open("ab") as out:
        out.write(b'\xff\xc3\xa9 \xe2\x80\xa8"}\n')  # only \n ends a line, and one byte is not UTF-8
    assert tail.read() == (False, [{"b": "�é \u2028"}])


def test_no_byte_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "CHUNK", 64)
    path = tmp_path / "a.jsonl"
    read: list[int] = []
    real = Path.open

    def counting(self: Path, *args: Any, **kw: Any) -> Any:
        file = real(self, *args, **kw)

        class Counted:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *a: object) -> None:
                file.close()

            def read(self, n: int = -1) -> Any:
                data = file.read(n)
                read.append(len(data))
                return data

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return Counted() if args == ("rb",) else file

    tail = Tail(path)
    with path.open("w") as out:
        monkeypatch.setattr(Path, "open", counting)
        for i in range(50):
            out.write(json.dumps({"i": i, "text": "x" * 100}) + "\n")
            out.flush()
            assert [r["i"] for r in tail.read()[1]] == [i]
            tail.read()
    assert sum(read) <= path.stat().st_size + 50 * follow.MARK


def test_whatever_happens_to_the_file_the_rows_are_its_rows(tmp_path: Path) -> None:
    """Appended in pieces, truncated and continued with the same or other lines (between two reads), replaced, removed."""
    rng = random.Random(3)
    path, content, number = tmp_path / "a.jsonl", b"", 0
    tail, known = Tail(path), []
    for _ in range(600):
        for _ in range(rng.choice((1, 1, 3))):
            what = rng.random()
            if what < 0.6:
                number += 1
                content += (
                    json.dumps({"n": number if rng.random() < 0.8 else 0, "x": "y" * rng.randrange(400)}).encode()
                    + b"\n"
                )
                cut = rng.choice((0, 0, 7))
                path.open("ab").write(content[path.stat().st_size if path.exists() else 0 : len(content) - cut])
            elif what < 0.8:
                content = b"".join(content.splitlines(keepends=True)[: rng.randrange(12)])
                if rng.random() < 0.5 or not path.exists():
                    path.write_bytes(content)
                else:
                    os.truncate(path, min(len(content), path.stat().st_size))
            elif what < 0.9:
                aside = tmp_path / "aside"
                aside.write_bytes(content)
                os.replace(aside, path)
            else:
                path.unlink(missing_ok=True)
                content = b""
        anew, rows = tail.read()
        known = [*([] if anew else known), *rows]
        there = path.read_bytes() if path.exists() else b""
        assert known == [json.loads(x) for x in there.split(b"\n")[:-1]]


def test_a_small_file_is_parsed_when_it_changes_and_kept_while_it_is_broken(tmp_path: Path) -> None:
    calls: list[str] = []
    path = tmp_path / "a.json"
    whole = CachedFile(path, lambda text: (calls.append(text), json_object(text))[1], {})
    assert whole.read() == {}
    path.write_text('{"a": 1}')
    assert whole.read() == whole.read() == {"a": 1} and len(calls) == 1
    for broken in ('{"a": ', "[1]", "[" * 100_000):
        path.write_text(broken)
        assert whole.read() == {"a": 1}
    path.unlink()
    assert whole.read() == {}
    path.write_text('{"b": 2}')
    assert whole.read() == {"b": 2}


# ---- the lock -------------------------------------------------------------------------------------------------------


def test_a_lock_is_seen_without_being_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lock_state(tmp_path) == "free"
    with RunLock(tmp_path):
        stat = (tmp_path / ".lock").stat()
        monkeypatch.setattr("fcntl.flock", lambda *_: pytest.fail("a probe may turn a run away"))
        assert lock_state(tmp_path) == "held"
        assert lock_state(tmp_path, locks=tmp_path / "none") == "held"  # a system without /proc/locks
        monkeypatch.undo()
    assert (tmp_path / ".lock").stat() == stat
    # this process is alive and its id is still in the file, but it does not hold the lock
    if Path("/proc/locks").exists():
        assert lock_state(tmp_path) == "free"
    (tmp_path / ".lock").write_text(f"PID 999999999 on {socket.gethostname()}\n")
    assert lock_state(tmp_path, locks=tmp_path / "none") == "free"
    (tmp_path / ".lock").write_text("PID 1 on some-other-machine\n")
    assert lock_state(tmp_path) == "elsewhere"
    (tmp_path / ".lock").write_text("who knows")
    assert lock_state(tmp_path) == "free"
