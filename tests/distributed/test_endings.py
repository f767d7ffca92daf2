"""How multi-process runs end: one error message and exit code whichever rank fails; signals, crashes and restarts."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import polite_rows, tiny_model_folder, write_jsonl
from torch.distributed.distributed_c10d import _set_pg_timeout
from worlds import HANGS, in_world

import penchant
from penchant.cli.train import _train as train_command
from penchant.distributed import launch as launching
from penchant.distributed.launch import LAUNCHED, end_silent, launch, waited_too_long, watched
from penchant.distributed.world import (
    CRASH,
    ERROR_FILE,
    MACHINE,
    World,
    described,
    ended_on_purpose,
    error_of,
    join,
    lost_another,
    record,
)
from penchant.errors import DataError, DiskError, PenchantError, TrainingStopped


def test_what_one_rank_cannot_do_is_an_error_of_all(tmp_path: Path) -> None:
    def call(world: World) -> list[Any]:
        found: list[Any] = []
        try:
            with world.together():
                if world.rank == 1:
                    raise DataError("train.jsonl:3", "is odd", "mend it")
        except PenchantError as error:
            found.append((type(error).__name__, str(error), error.exit_code))
        try:
            with world.leading():
                if world.leads:
                    raise DiskError("out", "is full", "free some space")
        except PenchantError as error:
            found.append((type(error).__name__, str(error), error.exit_code))
        found.append(world.share("of rank 0" if world.leads else "of another"))
        found.append(world.sums({"a": 1.0 + world.rank} | ({"b": 0.5} if world.rank else {})))
        return found

    data, disk = ("DataError", "train.jsonl:3: is odd; mend it", 2), ("DiskError", "out: is full; free some space", 5)
    expected = [data, disk, "of rank 0", {"a": 3.0, "b": 0.5}]
    assert in_world(call, tmp_path) == [expected, expected]


def test_a_rank_that_does_not_answer_is_named_and_ended_and_rank_0_may_be_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MACHINE, "0")  # like torchrun

    def call(world: World) -> Any:
        _set_pg_timeout(timedelta(seconds=1), world.group)  # after the rendezvous
        if world.leads:
            time.sleep(1.5)
        assert world.share("read" if world.leads else "") == "read"
        done = tmp_path / "done"
        if world.rank == 1:
            while not done.exists():
                time.sleep(0.05)
            return os.getpid()
        try:
            world.agree(patient=True)
        except Exception as error:
            late, ended = waited_too_long(error, world, 1.0), []
            assert late is not None
            os.kill = lambda *what: ended.append(what)  # in this process only
            end_silent(world, late.silent)
            return str(late), ended
        finally:
            done.touch()
        return "nobody waited", []

    (said, ended), process = in_world(call, tmp_path)
    assert "rank 1 of 2 did not answer within 1 s" in said
    assert ended == [(process, signal.SIGKILL)]


@pytest.mark.parametrize(("found", "told"), [("TIMEOUT", "late"), ("COMM_ERROR", "lost another"), ("SUCCESS", None)])
def test_what_nccls_watchdog_has_found_is_told_before_it_aborts(
    found: str, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While waiting for the GPU nothing is raised. A stand-in replaces the NCCL group."""
    from torch._C._distributed_c10d import ErrorType

    def no_backend(device: torch.device) -> None:
        raise RuntimeError("No backend type associated with device type cuda")

    nccl = SimpleNamespace(get_error=lambda: getattr(ErrorType, found))
    backends = (no_backend, lambda device: {"cuda": nccl}[device.type])
    groups = [SimpleNamespace(_get_backend=backend) for backend in backends]
    monkeypatch.setattr("torch.distributed.distributed_c10d._world", SimpleNamespace(pg_map=groups))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(launching, "LOOK", 0.01)
    left: queue.Queue[RuntimeError] = queue.Queue()
    monkeypatch.setattr(launching, "leave", lambda error, *_: left.put(error))
    with watched(World(0, 2), 1.0):
        if told is None:
            assert launching.nccl_error() is None
            return
        error = left.get(timeout=HANGS)
    monkeypatch.setattr(launching, "store", None)  # there is no other process
    assert lost_another(error) and (waited_too_long(error, World(0, 2), 1.0) is not None) == (told == "late")


def test_processes_that_do_not_find_each_other_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nothing listens there
        meeting = {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(taken.getsockname()[1]),
        }
        for name, value in meeting.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(TrainingStopped, match="process 1 of 2 did not find the others"), join(0.1):
            pass


def test_a_signal_leaves_as_much_time_as_ranks_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finishing a step and writing a checkpoint may take longer than torch's 30 s."""
    from torch.distributed.launcher.api import LaunchConfig

    asked, given = [], []
    monkeypatch.setattr(
        "torch.distributed.launcher.api.elastic_launch", lambda config, _: asked.append(config) or (lambda *_: None)
    )
    monkeypatch.setattr(
        "torch.distributed.launcher.api.LaunchConfig", lambda **how: given.extend(how) or LaunchConfig(**how)
    )
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert launch(["train", "run.yaml"], 2, 0, 600.0) == 0
    assert asked[0].shutdown_timeout == 600 and "shutdown_timeout" not in given  # which older torch does not accept


@pytest.mark.parametrize("deterministic", [True, False])
def test_others_wait_for_rank_0s_report_as_long_as_it_takes(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also, NCCL is set to a deterministic reduction order before groups are created."""
    waits: list[bool] = []
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != "NCCL_ALGO"})
    world = SimpleNamespace(leads=False, agree=lambda patient=False: waits.append(patient))
    train = SimpleNamespace(deterministic=deterministic)
    config = SimpleNamespace(launch=SimpleNamespace(timeout=1.0, context=1), train=train)
    monkeypatch.setattr("penchant.cli.train.started_by_torchrun", lambda: True)
    monkeypatch.setattr("penchant.cli.train.join", lambda *_: nullcontext(world))
    monkeypatch.setattr("penchant.api.as_config", lambda *_: config)
    monkeypatch.setattr("penchant.api.train", lambda *_, **__: None)
    args = Namespace(config="run.yaml", overrides=[], gpus=None, processes=None, quiet=True)
    assert train_command(args) == 0 and waits == [True]
    assert os.environ.get("NCCL_ALGO") == ("^NVLS" if deterministic else None)


def test_rank_0_says_that_all_are_started_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    config = SimpleNamespace(launch=SimpleNamespace(timeout=1.0, context=1), train=SimpleNamespace(deterministic=False))
    monkeypatch.setattr("penchant.cli.train.started_by_torchrun", lambda: True)
    monkeypatch.setattr("penchant.api.as_config", lambda *_: config)
    monkeypatch.setattr("penchant.api.train", interrupted)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    args = Namespace(config="run.yaml", overrides=[], gpus=None, processes=None, quiet=True)
    said = []
    for count, rank in (("0", 0), ("2", 0), ("2", 1)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        monkeypatch.setattr("penchant.cli.train.join", lambda *_, rank=rank: nullcontext(World(rank, 2)))
        with pytest.raises(KeyboardInterrupt):
            train_command(args)
        said.append(capsys.readouterr().err)
    assert said[0] == said[2] == "" and "2 of 3" in said[1]


def test_one_process_is_a_world_of_its_own() -> None:
    world = World()
    assert world.gather(3) == [3] and world.share(3) == 3 and world.sums({"a": 1.0}) == {"a": 1.0}
    with pytest.raises(DataError), world.together():
        raise DataError("a", "b")


def test_last_words_are_read_by_the_next_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def at(attempt: int) -> None:
        file = tmp_path / f"attempt_{attempt}/0/error.json"
        file.parent.mkdir(parents=True)
        monkeypatch.setenv(ERROR_FILE, str(file))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))

    at(0)
    record(RuntimeError("a crash"))
    at(1)
    late = TrainingStopped("launch.timeout", "rank 1 did not answer")
    late.exit_code = CRASH
    record(late)
    assert ended_on_purpose() is None  # a crash is restarted
    record(DiskError("out", "is full"))
    at(2)
    assert ended_on_purpose() == 5
    told = described(DiskError("out", "is full", "free some"))
    assert (type(error_of(told)), str(error_of(told))) == (DiskError, "out: is full; free some")
    for error in (torch.OutOfMemoryError("CUDA out of memory"), OSError(28, "No space left on device")):
        assert described(error)["kind"] is not None and described(error)["exit_code"] != CRASH  # not restarted
    assert described(KeyError("x"))["kind"] is None
    assert lost_another(RuntimeError("[pair.cc:553] Connection closed by peer")) and not lost_another(
        DataError("gloo", "x")
    )


# ---- end to end, by the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model_folder(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", polite_rows(12))
    (tmp_path / "run.yaml").write_text(
        """
model: {path: ./model, dtype: fp32}
data: {path: pairs.jsonl, template: plain}
loss: {name: dpo}
train: {max_steps: 40, epochs: 40, batch_size: 4, tokens_per_step: 200, lr: 1e-4}
evaluation: {kl_prompts: 0, samples: 0}
checkpoint: {every: 2, keep_last: 2}
launch: {processes: 2}
output: out
"""
    )
    return tmp_path


def start(folder: Path, *overrides: str, by: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start `penchant train`. `by` is a launcher with its options that replaces Python."""
    source = str(Path(penchant.__file__).parents[1])
    environment = {k: v for k, v in os.environ.items() if k not in ("PENCHANT_REEXECUTED", LAUNCHED)}
    environment |= {"PYTHONPATH": f"{folder}{os.pathsep}{source}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *by, "-m", "penchant", "train", "run.yaml", *overrides]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ranks(launcher: subprocess.Popen[str]) -> list[int]:
    """The processes that it started, sorted by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == launcher.pid:
                said = dict(v.split("=", 1) for v in (entry / "environ").read_text().split("\0") if "=" in v)
                if "RANK" in said:
                    found[int(said["RANK"])] = int(entry.name)
        except (OSError, ValueError):
            pass
    return [found[r] for r in sorted(found)]


def wait_for_step(folder: Path, step: int, launcher: subprocess.Popen[str], seconds: float = HANGS) -> None:
    end, log = time.monotonic() + seconds, folder / "out/metrics.jsonl"
    while time.monotonic() < end and launcher.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    pytest.fail(
        f"no step {step}: {launcher.communicate(timeout=HANGS) if launcher.poll() is not None else 'still running'}"
    )


def sentences(stderr: str) -> list[str]:
    assert "Traceback" not in stderr, stderr
    return [line for line in stderr.splitlines() if line.startswith("penchant: ") and "loading torch" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_rank_writes_one_checkpoint(folder: Path, rank: int) -> None:
    running = start(folder)
    wait_for_step(folder, 3, running)
    os.kill(ranks(running)[rank], signal.SIGTERM)
    _, said = running.communicate(timeout=HANGS)
    assert running.returncode == 4, said
    (sentence,) = sentences(said)
    step = int(re.search(r"stopped by SIGTERM at step (\d+) of 40; a checkpoint was written", sentence)[1])  # type: ignore[index]
    assert max(int(p.name[5:]) for p in (folder / "out/checkpoints").iterdir()) == step
    assert json.loads((folder / "out/manifest.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_ctrl_c_is_answered_by_one_sentence_and_torch_is_silent(folder: Path) -> None:
    running = start(folder)
    wait_for_step(folder, 3, running)
    os.killpg(running.pid, signal.SIGINT)  # like a terminal, to all at once
    _, said = running.communicate(timeout=HANGS)
    (sentence,) = sentences(said)
    assert running.returncode == 4 and "SIGINT" in sentence and "torch/" not in said, said


@pytest.mark.slow
def test_what_one_rank_says_is_the_only_sentence_and_comes_soon(folder: Path) -> None:
    """If a rank cannot write its shard, the others do not wait for it, and nothing is restarted."""
    (folder / "sitecustomize.py").write_text(
        """
import os

def refused(file):
    raise OSError(28, "No space left on device")

if os.environ.get("RANK") == "1":
    os.fsync = refused
"""
    )
    running = start(folder, "launch.restarts=2", "train.max_steps=4")
    _, said = running.communicate(timeout=HANGS)
    (sentence,) = sentences(said)
    assert running.returncode == 5 and "No space left" in sentence, said


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_started_again_and_the_end_is_the_same(folder: Path, rank: int) -> None:
    whole = start(folder, "output=whole", "train.max_steps=8")
    assert whole.communicate(timeout=HANGS) and whole.returncode == 0
    running = start(folder, "launch.restarts=1", "train.max_steps=8")
    wait_for_step(folder, 3, running)
    os.kill(ranks(running)[rank], signal.SIGKILL)
    _, said = running.communicate(timeout=HANGS)
    assert running.returncode == 0, said
    assert len(sentences(said)) == 1 and "(1 of 1)" in said
    assert (folder / "out/metrics.jsonl").read_bytes() == (folder / "whole/metrics.jsonl").read_bytes()
    for name in ("shard-00001", "shard-00002"):
        # tensors, not bytes: the order of entries in a safetensors header differs between processes
        shards = (next((folder / run / "checkpoints/step-8/state").glob(f"{name}*")) for run in ("out", "whole"))
        mine, theirs = map(load_file, shards)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.slow
def test_two_machines_are_two_agents_that_meet(folder: Path) -> None:
    """Both agents run on one machine here, and train the same as one agent with two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    by = ["-m", "torch.distributed.run", *meeting, "--rdzv-id=1", "--local-addr=127.0.0.1"]
    agents = [start(folder, "launch.processes=auto", "train.max_steps=4", by=by) for _ in range(2)]
    for agent in agents:
        _, said = agent.communicate(timeout=HANGS)
        assert agent.returncode == 0, said
    assert json.loads((folder / "out/manifest.json").read_text())["processes"] == 2
    whole = start(folder, "output=whole", "train.max_steps=4")
    assert whole.communicate(timeout=HANGS) and whole.returncode == 0
    assert (folder / "out/metrics.jsonl").read_bytes() == (folder / "whole/metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_killed_rank_without_restarts_ends_all_soon(folder: Path) -> None:
    running = start(folder, f"launch.timeout={10 * HANGS}")  # a timeout that never expires here
    wait_for_step(folder, 3, running)
    os.kill(ranks(running)[1], signal.SIGKILL)
    _, said = running.communicate(timeout=HANGS)
    (sentence,) = sentences(said)
    assert running.returncode == 1 and "process 1 of 2" in sentence and "SIGKILL" in sentence
