"""preferences.jsonl: records are complete and on disk, partial lines are ignored, and two processes lose nothing."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from processes import forked
from studio_people import word

from penchant.errors import DataError, DiskError
from penchant.judges.humans import Preferences, read_preferences, turns_of


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "preferences.jsonl"
    words = [word(0), word(1, verdict="tie", reasons=("clear",)), word(2, edited="Since.", gold="b", repeat_of="ada-0")]
    for w in words:
        Preferences(file).append(w.to_json())
    found = read_preferences(file)
    assert list(found.judgements.values()) == words and found.damaged == 0
    assert [w.side for w in words] == ["right", None, "right"]
    assert [w.counts for w in words] == [True, True, False]


def test_undo_is_a_record_and_takes_back_one(tmp_path: Path) -> None:
    file = Preferences(tmp_path / "preferences.jsonl")
    for i in range(3):
        file.append(word(i).to_json())
    file.undo(word(1))
    for found in (file, read_preferences(file.path)):
        assert list(found.judgements) == ["ada-0", "ada-2"]
        assert (found.undone, found.records) == (1, {"ada": 4})
    assert len(file.path.read_text().splitlines()) == 4, "nothing that was said is removed"


def test_half_a_line_of_a_killed_writer_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "preferences.jsonl"
    file = Preferences(path)
    file.append(word(0).to_json())
    with path.open("ab") as torn:
        torn.write(b'{"id": "ada-1", "pair": "p')
    assert list(file.refresh().judgements) == ["ada-0"], "half a line may still be under way"
    file.append(word(2).to_json())
    assert list(read_preferences(path).judgements) == ["ada-0", "ada-2"]
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["ada-0", "ada-2"]


def test_a_last_line_that_lacks_only_its_line_break_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "preferences.jsonl"
    path.write_text(json.dumps(word(0).to_json()))  # as some editors leave it
    Preferences(path).append(word(1).to_json())
    assert list(read_preferences(path).judgements) == ["ada-0", "ada-1"]
    assert len(path.read_text().splitlines()) == 2


def test_a_reader_follows_what_another_process_writes_and_a_file_that_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "preferences.jsonl"
    reader = Preferences(path)
    assert reader.refresh().judgements == {}
    Preferences(path).append(word(0).to_json())
    Preferences(path).append(word(1, "ben").to_json())
    assert list(reader.refresh().judgements) == ["ada-0", "ben-1"]
    other = tmp_path / "other.jsonl"
    Preferences(other).append(word(5).to_json())
    other.replace(path)
    assert list(reader.refresh().judgements) == ["ada-5"]


def test_several_processes_and_threads_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "preferences.jsonl"

    def write(who: str) -> None:
        file = Preferences(path)
        for i in range(15):
            file.append(word(i, who, answers=("x" * 3000, who)).to_json())

    processes = [forked(lambda who=who: write(who)) for who in ("ada", "ben")]  # type: ignore[misc]
    threads = [threading.Thread(target=write, args=(who,)) for who in ("cleo", "dan")]
    for thread in threads:
        thread.start()
    for worker in [*processes, *threads]:
        worker.join()
    found = read_preferences(path)
    assert len(found.judgements) == 60 and found.damaged == 0
    for who in ("ada", "ben", "cleo", "dan"):
        assert [j.order for j in found.of(who)] == list(range(15))


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    path, told = tmp_path / "preferences.jsonl", tmp_path / "told"

    def write() -> None:
        file = Preferences(path)
        for i in range(10_000):
            file.append(word(i, answers=("x" * 20_000, "y")).to_json())
            with told.open("a") as out:
                out.write(f"{i}\n")

    process = forked(write)
    while not told.exists() or told.stat().st_size < 12:
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    acknowledged = len(told.read_text().split())
    Preferences(path).append(word(99_999).to_json())
    found = read_preferences(path)
    assert found.damaged == 0 and [j.order for j in found.of("ada")][:acknowledged] == list(range(acknowledged))


def test_a_disk_that_takes_half_a_line_keeps_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Preferences(tmp_path / "preferences.jsonl")
    file.append(word(0).to_json())
    real, calls = os.write, []

    def write(handle: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(handle, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(DiskError):
        file.append(word(1).to_json())
    monkeypatch.undo()
    assert path_ends_with_a_line(file.path)
    file.append(word(2).to_json())
    assert list(read_preferences(file.path).judgements) == ["ada-0", "ada-2"]


def path_ends_with_a_line(path: Path) -> bool:
    return path.read_bytes().endswith(b"\n")


def test_lines_of_others_are_counted_and_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "preferences.jsonl"
    row = word(0).to_json()
    odd = [{}, [1], {**row, "verdict": "maybe"}, {**row, "left": "c"}, {**row, "answer_a": None}, {**row, "order": "x"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in odd) + "nonsense\n" + json.dumps(row) + "\n")
    found = read_preferences(path)
    assert list(found.judgements) == ["ada-0"] and found.damaged == 7


def test_no_file_and_an_empty_one_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_preferences(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="holds no judgment"):
        read_preferences(tmp_path / "empty.jsonl")


def test_a_prompt_is_shown_turn_by_turn() -> None:
    assert list(turns_of("Why?")) == [("user", "Why?")]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    shown = list(turns_of([{"role": "system", "content": "Be kind."}, call, {"role": "tool", "content": "42"}]))
    assert shown == [("system", "Be kind."), ("assistant", '[{"name": "look"}]'), ("tool", "42")]
