"""Checkpoints are atomic under kills at any point; a run folder has one lock and one identity."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import forked
from safetensors.torch import load_file, save_file

from penchant.distributed.world import World
from penchant.errors import CheckpointError
from penchant.plan.memory import LiveBytes
from penchant.runfolder import MetricsLog, RunLock, damaged_files, is_intact, latest_state, open_run, write_summed
from penchant.training import checkpoint as module
from penchant.training.checkpoint import (
    checkpoints,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    prune,
    save_checkpoint,
)

TENSORS = {"a": torch.arange(5), "b": torch.tensor([1 / 3], dtype=torch.bfloat16)}
STATE = {"step": 3, "loss": 0.1 + 0.2, "big": 2**60, "none": None}


def _save(folder: Path, step: int) -> Path:
    def write_model(target: Path) -> None:
        target.mkdir()
        (target / "weights").write_text(f"model {step}")

    return save_checkpoint(folder, step, write_model=write_model, tensors=TENSORS, state={**STATE, "step": step})


def test_round_trip_is_exact(tmp_path: Path) -> None:
    tensors, state = load_checkpoint(_save(tmp_path, 3))
    assert all(torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in TENSORS.items())
    assert state == STATE


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    path = _save(tmp_path, 3)
    (path / "model/weights").write_text("model 4")
    with pytest.raises(CheckpointError, match="model/weights: differs from what was written"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "model/weights"])
def test_a_file_whose_sum_is_not_listed_is_not_taken_for_whole(tmp_path: Path, name: str) -> None:
    """A flipped bit in a listed name would leave the file of that name unchecked."""
    path = _save(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"]["x" + name] = manifest["sha256"].pop(name)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert (latest_state(tmp_path) == {}) == (name == "state.json")


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    path = _save(tmp_path, 3)
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)


def test_latest_is_by_number_and_skips_what_is_not_whole(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        _save(tmp_path, step)
    assert latest_checkpoint(tmp_path)[0] == tmp_path / "checkpoints/step-100"
    (tmp_path / "checkpoints/step-100/manifest.json").unlink()
    path, warnings = latest_checkpoint(tmp_path)
    assert path is not None and path.name == "step-10"
    assert len(warnings) == 1


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        _save(tmp_path, step)
    prune(tmp_path, 2, best_step=3)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-3", "step-5", "step-6"]


def test_killed_while_writing_leaves_the_former_one_whole(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    reader, writer = os.pipe()

    def write_model(target: Path) -> None:
        target.mkdir()
        (target / "weights").write_text("half")
        os.write(writer, b"writing")
        time.sleep(600)

    process = forked(lambda: save_checkpoint(tmp_path, 2, write_model=write_model, tensors={}, state={}))
    assert os.read(reader, 9) == b"writing"
    process.kill()
    process.join()
    path, _ = latest_checkpoint(tmp_path)
    assert path is not None and path.name == "step-1"
    load_checkpoint(path)
    assert list((tmp_path / "checkpoints").glob(".tmp-*"))
    _save(tmp_path, 2)
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def full_disk(_target: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(tmp_path, 1, write_model=full_disk, tensors={}, state={})
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_second_run_is_told_the_pid_of_the_first(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(CheckpointError, match=f"another run holds this folder .PID {os.getpid()}"):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "folder", "pipe"])
def test_an_odd_lock_is_a_sentence_and_overwrites_nothing(tmp_path: Path, kind: str) -> None:
    lock, other = tmp_path / ".lock", tmp_path / "other"
    if kind != "dangling":
        other.write_text("precious")
    make = {"hard link": lambda: os.link(other, lock), "folder": lock.mkdir, "pipe": lambda: os.mkfifo(lock)}
    make.get(kind, lambda: lock.symlink_to(other))()
    with pytest.raises(CheckpointError, match=r"\.lock: is a link, a folder or a pipe"):
        RunLock(tmp_path).__enter__()
    assert kind == "dangling" or other.read_text() == "precious"
    assert kind != "dangling" or not other.exists()


def test_killed_in_pruning_leaves_no_half_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        _save(tmp_path, step)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed before anything was deleted
    prune(tmp_path, 1, None)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-2"]
    monkeypatch.undo()
    _save(tmp_path, 3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-3"]


def test_pruning_counts_whole_checkpoints_only(tmp_path: Path) -> None:
    for step in (1, 2, 9):
        _save(tmp_path, step)
    (tmp_path / "checkpoints/step-9/manifest.json").unlink()
    prune(tmp_path, 1, None)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-2"]


def test_a_log_with_other_lines_before_the_checkpoint_is_refused(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write({"a": 1})
    offset, known = log.offset(), log.sha256()
    log.write({"a": 2})
    log.truncate(offset, known)
    (tmp_path / "m.jsonl").write_text('{"a": 3}\n')
    with pytest.raises(CheckpointError, match=r"m\.jsonl: its first 9 bytes are not those"):
        MetricsLog(tmp_path / "m.jsonl").truncate(offset, known)


def test_half_a_line_of_a_killed_writer_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    MetricsLog(path).write({"a": 2})
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'


def test_a_sum_is_of_the_old_or_the_new_file_wherever_it_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "manifest.json", os.replace
    path.write_text("of an older version")
    for stop_at in (1, 2, 3):
        seen: list[Any] = []

        def cut(*args: Any, seen: list[Any] = seen, stop_at: int = stop_at) -> None:
            seen.append(args)
            if len(seen) >= stop_at:
                raise OSError(28, "No space left on device")
            real(*args)

        monkeypatch.setattr(os, "replace", cut)
        with suppress(OSError):
            write_summed(path, f"text {stop_at}")
        assert is_intact(path) and not damaged_files(tmp_path)
    monkeypatch.undo()
    path.write_text("changed")
    assert not is_intact(path) and damaged_files(tmp_path) == ["manifest.json"]
    write_summed(path, "written again")
    assert is_intact(path)


def test_a_lock_of_a_dead_process_is_no_obstacle(tmp_path: Path) -> None:
    reader, writer = os.pipe()

    def hold() -> None:
        with RunLock(tmp_path):
            os.write(writer, b"locked")
            time.sleep(600)

    process = forked(hold)
    assert os.read(reader, 9) == b"locked"
    with pytest.raises(CheckpointError, match=f"PID {process.pid}"):
        RunLock(tmp_path).__enter__()
    process.kill()
    process.join()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with RunLock(tmp_path):
                return
        except CheckpointError:
            time.sleep(0.05)
    raise AssertionError("the lock outlived its holder")


def test_another_runs_folder_is_refused_with_the_difference(tmp_path: Path) -> None:
    open_run(tmp_path / "run", "a: 1\n", {"config": {"train": {"lr": 1e-5}}, "data": ["x"]})
    open_run(tmp_path / "run", "a: 1\n", {"config": {"train": {"lr": 2e-5}}, "data": ["x"]})  # no checkpoint yet
    _save(tmp_path / "run", 1)
    with pytest.raises(CheckpointError, match=r"config\.train\.lr: 2e-05 -> 1e-05"):
        open_run(tmp_path / "run", "a: 1\n", {"config": {"train": {"lr": 1e-5}}, "data": ["x"]})


def test_checkpoints_of_an_unknown_run_are_refused(tmp_path: Path) -> None:
    _save(tmp_path / "run", 1)
    with pytest.raises(CheckpointError, match=r"no identity\.json"):
        open_run(tmp_path / "run", "", {})


def test_a_log_that_lost_lines_is_refused(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write({"a": 1})
    with pytest.raises(CheckpointError, match="has 9 bytes, but the checkpoint was written when it had 100"):
        log.truncate(100)


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="is a file, or lies below one"):
            open_run(path, "", {})
    if os.geteuid() != 0:  # root can write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(CheckpointError, match="cannot be written"):
            open_run(tmp_path / "closed" / "run", "", {})
    with pytest.raises(CheckpointError, match="cannot be written"):
        open_run(Path("/proc/penchant"), "", {})


def test_the_log_can_be_cut_back_and_has_no_nan(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write({"a": 1 / 3, "nan": float("nan"), "inner": [float("inf"), 1]})
    offset = log.offset()
    log.write({"a": 2})
    log.truncate(offset)
    log.write({"a": 3})
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert lines == [{"a": 1 / 3, "nan": None, "inner": [None, 1]}, {"a": 3}]


def test_a_checkpoint_is_found_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="train first"):
        find_checkpoint(tmp_path, "best")
    assert find_checkpoint(tmp_path, "last") is None and find_checkpoint(tmp_path, "0") is None
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, write_model=lambda p: p.mkdir(), tensors=TENSORS, state={"best_step": 2})
    found = {name: find_checkpoint(tmp_path, name) for name in ("last", "best", "1", "0")}
    assert {n: p and p.name for n, p in found.items()} == {"last": "step-3", "best": "step-2", "1": "step-1", "0": None}
    with pytest.raises(CheckpointError, match="there are step-1, step-2, step-3"):
        find_checkpoint(tmp_path, "4")


def test_others_wait_as_long_as_it_takes_for_what_rank_0_does_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 writes the whole model and hashes every file, which for a large model takes longer than the usual timeout."""
    waits, seen, together = [False], [], World.together

    @contextmanager
    def noted(world: World, *, patient: bool = False) -> Iterator[None]:
        waits.append(patient)
        with together(world, patient=patient):
            yield
        waits.pop()

    def model(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"")
        seen.append(("model", waits[-1]))

    monkeypatch.setattr(World, "together", noted)
    monkeypatch.setattr(module, "file_sha256", lambda _: seen.append(("sum", waits[-1])) or "")
    monkeypatch.setattr(module, "check_sums", lambda _: seen.append(("check", waits[-1])))
    tensors = {"master/w": torch.arange(6.0)}
    path = module.save_sharded(tmp_path, 1, write_model=model, tensors=tensors, state={}, world=World())
    found, _ = module.load_checkpoint(path)
    assert torch.equal(found["master/w"], tensors["master/w"])
    assert {name for name, _ in seen} == {"model", "sum", "check"} and all(patient for _, patient in seen)


def test_a_file_of_tensors_is_what_safetensors_writes_and_needs_one_tensor_at_a_time(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {
        "exp_avg/w": torch.randn(64, 32).t(),  # not contiguous, so it is copied, as from a GPU
        "master/w": torch.randn(64, 32).t(),
        "state1/w": torch.arange(7, dtype=torch.uint8),
        "step/w": torch.tensor(3.0),
        "none": torch.zeros(0, 5),
        **{f"algorithm/{dtype}": torch.arange(-2, 3).to(dtype) for dtype in module._SAFETENSORS_DTYPES},
    }
    with LiveBytes(tensors.values()) as live:
        module.write_tensors(tmp_path / "ours", tensors)
    assert live.peak == tensors["master/w"].nbytes
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value)
