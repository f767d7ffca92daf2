"""Damaged files, full disks, kills and exits: a run resumes bit for bit, or names the file and how to fix it."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.base.files import FULL
from penchant.cli import main
from penchant.compare.models import write_files
from penchant.errors import CheckpointError, DiskError, RewardError
from penchant.report import LiveReport
from penchant.runfolder import damaged_files
from penchant.runfolder.read import read_folder
from penchant.runs.find import find_model
from penchant.training.checkpoint import checkpoints

LAST = "checkpoints/step-4"
WRITE_REPORT = LiveReport._write
WRITES = ("fsync", "replace", "rename", "mkdir")  # every file and folder of a run goes through one of them


class World:
    """A saved copy of a finished tiny run. `fresh` restores it, stopped after step 2 or complete."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.folder, self.run, self.kept = folder, folder / "run", folder / "kept"
        self.config: dict[str, Any] = {
            "model": {"path": tiny_model_folder(folder / "model"), "dtype": "fp32"},
            "data": {
                "path": write_jsonl(folder / "pairs.jsonl", polite_rows(12)),
                "validation_rows": 3,
                "max_length": 128,
            },
            "reference": {"kind": "cached", "cache_dir": str(folder / "cache")},
            "train": {"max_steps": 4, "batch_size": 4, "epochs": 9, "lr": 3e-3, "tokens_per_step": 600},
            "checkpoint": {"every": 2, "keep_last": 2},
            "evaluation": {"samples": 1, "sample_tokens": 3, "every": 2, "kl_prompts": 2, "reward": "words"},
            "output": str(self.run),
        }
        for key, value in more.items():
            self.config[key] = self.config[key] | value if isinstance(self.config.get(key), dict) else value
        api.train(self.config, quiet=True)
        shutil.copytree(self.run, self.kept)

    def fresh(self, *, whole: bool = False) -> Path:
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.kept, self.run)
        if not whole:
            shutil.rmtree(self.run / LAST)
        return self.run

    def train(self) -> None:
        api.train(self.config, quiet=True)

    def check(self) -> None:
        """Check that the run equals the undisturbed one."""
        weights = next((self.kept / LAST / "model").glob("*model.safetensors")).relative_to(self.kept)
        for name in ("metrics.jsonl", "samples.jsonl", weights):
            if (self.kept / name).exists():
                assert (self.run / name).read_bytes() == (self.kept / name).read_bytes(), name
        ours, theirs = (load_file(f / LAST / "state.safetensors") for f in (self.run, self.kept))
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
        assert json.loads((self.run / "manifest.json").read_text())["status"] == "finished"
        assert not damaged_files(self.run)
        assert not list(self.run.rglob(".tmp-*"))


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """No reports at evaluations, which would take most of these tests' time."""
    monkeypatch.setattr("penchant.report.LiveReport._write", lambda *_: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("damage"))


def flip(path: Path, at: float = 0.5, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1 << bit
    path.write_bytes(content)


# ---- Damage ----

REFUSED = ("metrics.jsonl",)
FILES = (
    "metrics.jsonl",
    "manifest.json",
    "identity.json",
    "samples.before.jsonl",
    "start.completions.json",
    "sums.json",
)


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_a_run_ends_healed_or_refused_by_name(world: World, name: str) -> None:
    flip(world.fresh() / name)
    if name in REFUSED:
        with pytest.raises(CheckpointError, match=f"{name}: its first .* restore the file"):
            world.train()
        return
    world.train()
    if name != "start.completions.json":  # sampled again from the start, which gives the same
        world.check()


@pytest.mark.slow
def test_any_bit_of_any_file(world: World) -> None:
    names = [p.relative_to(world.kept) for p in sorted(world.kept.rglob("*")) if p.is_file() and p.stat().st_size]
    for name in names:
        if name.parts[:2] == ("checkpoints", "step-4"):
            continue  # only for the run that stopped after step 2
        for at in (0.0, 0.1, 0.37, 0.5, 0.8, 0.999):
            flip(world.fresh() / name, at, bit=int(at * 7))
            try:
                world.train()
            except CheckpointError as error:
                assert name.name in str(error) or "step-2" in str(error), (name, at, error)
                assert name.name in REFUSED or "checkpoints" in name.parts, (name, at, error)
            else:
                if name.name not in ("start.completions.json", "perf.jsonl"):
                    world.check()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["manifest.json", "identity.json"])
def test_an_emptied_file_beside_good_checkpoints_stops_nothing(world: World, name: str, content: bytes) -> None:
    (world.fresh() / name).write_bytes(content)
    if name == "manifest.json" and content == b"":
        world.train()
        world.check()
        return
    with pytest.raises(StopHere):
        stopped_early(world)


def test_a_damaged_manifest_is_told_once(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.fresh() / "manifest.json").write_bytes(b"{")
    with pytest.raises(StopHere):
        stopped_early(world, quiet=False)
    told = capsys.readouterr()
    assert (told.out + told.err).count("manifest.json: was changed after it was written") == 1


class StopHere(Exception):
    pass


def stopped_early(world: World, *, quiet: bool = True) -> None:
    """Run up to the first step, by which point the folder has been accepted."""

    def stop(*_: Any) -> None:
        raise StopHere

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penchant.training.loop.Loop.take_step", stop)
        api.train(world.config, quiet=quiet)


def test_without_sums_a_folder_goes_on_as_before(world: World) -> None:
    (world.fresh() / "sums.json").unlink()
    assert not damaged_files(world.run)
    with pytest.raises(StopHere):
        stopped_early(world)


def test_a_config_that_was_changed_is_refused_by_those_that_read_it(world: World) -> None:
    path = world.fresh(whole=True) / "config.resolved.yaml"
    path.write_text(path.read_text().replace("beta: 0.1", "beta: 0.9"))
    for command in (
        api.evaluate,
        lambda run, **_: api.compare(run, quiet=True),
        lambda run, **_: api.export(run, to="safetensors"),
    ):
        with pytest.raises(
            CheckpointError, match=r"config.resolved.yaml: was changed .*beta: 0.1 -> 0.9.*command line"
        ):
            command(world.run, quiet=True)
    assert damaged_files(world.run) == ["config.resolved.yaml"]
    api.report(world.run)
    assert "config.resolved.yaml" in (world.run / "report.html").read_text().split("Changed after the run wrote it")[1]


def test_what_prints_a_runs_figures_says_which_file_was_changed(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    path = world.fresh(whole=True) / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss": 0.', '"loss": 1.', 1))
    for command in (["watch", "--once"], ["flags"]):
        assert main([*command, str(world.run)]) == 0
        assert "metrics.jsonl was changed after it was written" in capsys.readouterr().err
    exported = api.export(world.run, to="safetensors")
    assert "the run's metrics.jsonl was changed after it was written" in exported.notes
    assert exported.notes[-1] in (exported.folder / "README.md").read_text()
    path.unlink()
    compared = api.compare(world.run, prompts=2, max_new_tokens=2, quiet=True)
    assert f"{path} is missing." in compared.figures["notes"]


@pytest.mark.parametrize("name", ["samples.before.jsonl", "samples.jsonl"])
def test_a_report_says_that_a_sampled_answer_was_changed(
    world: World, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(world.fresh(whole=True) / name, 0.9)
    assert main(["report", str(world.run)]) == 0
    assert f"{name} was changed after it was written" in capsys.readouterr().err
    page = (world.run / "report.html").read_text()
    assert name in page.split("Changed after the run wrote it")[1][:300]


def test_a_comment_in_a_config_or_what_only_watches_changes_no_figure(world: World) -> None:
    path = world.fresh(whole=True) / "config.resolved.yaml"
    path.write_text("# mine\n" + path.read_text())
    assert api.evaluate(world.run, quiet=True)["checkpoint"] == "step-4"
    path.write_text(path.read_text() + "\nloss: [\n")
    with pytest.raises(CheckpointError, match="cannot be read"):
        api.evaluate(world.run, quiet=True)


def test_states_of_several_runs_are_refused_where_a_bit_was_flipped(tmp_path: Path) -> None:
    from penchant.runs.state import State as Pipeline
    from penchant.sweep.conduct import State as Sweep

    for made in (Pipeline(tmp_path / "pipeline.json", {"a": {"seconds": 1.5}}), Sweep(tmp_path / "sweep.json")):
        made.save()
        made.save()
        assert type(made).read(tmp_path) == made
        flip(made.path, 0.3, bit=0)
        with pytest.raises(CheckpointError, match=rf"{made.path.name}: was changed after it was written"):
            type(made).read(tmp_path)
        assert not getattr(read_folder(tmp_path), made.path.stem)
        made.save()
        assert type(made).read(tmp_path) == made


def test_a_comparison_with_a_flipped_bit_is_not_read(tmp_path: Path) -> None:
    write_files(tmp_path, {"models": [], "sentences": []}, [{"prompt": "a"}, {"prompt": "b"}])
    assert read_folder(tmp_path).comparison and len(read_folder(tmp_path).comparison_rows) == 2
    for name in ("comparison.json", "comparison.jsonl"):
        path = tmp_path / name
        path.write_text(path.read_text().replace("m", "n"))
    assert not read_folder(tmp_path).comparison and not read_folder(tmp_path).comparison_rows
    with pytest.raises(CheckpointError, match=r"comparison.json: was changed after it was written; compare again"):
        api.flags(tmp_path)
    api.report(tmp_path)
    changed = (tmp_path / "report.html").read_text().split("Changed after the run wrote")[1]
    assert "comparison.json" in changed and "comparison.jsonl" in changed


def test_a_line_of_evaluations_with_a_flipped_bit_is_left_out(world: World) -> None:
    run = world.fresh(whole=True)
    api.evaluate(run, quiet=True)
    api.evaluate(run, quiet=True)
    path = run / "evaluations.jsonl"
    first, second = path.read_text().splitlines()
    old = {k: v for k, v in json.loads(first).items() if k != "sha256"}
    path.write_text(f"{first.replace('eval/loss', 'eval/lost', 1)}\n{second}\n{json.dumps(old)}\n")
    found = read_folder(run)
    assert [line["step"] for line in found.evaluations] == [4, 4] and found.unreadable["evaluations.jsonl"] == 1
    assert found.evaluations[1] == old


def test_an_export_with_a_flipped_bit_is_used_by_nobody(world: World) -> None:
    folder = api.export(world.fresh(whole=True), to="safetensors").folder
    assert find_model(str(folder)).load(torch.device("cpu")) is not None
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        flip(folder / name, 0.9)
        with pytest.raises(CheckpointError, match=rf"{name}: differs from what was exported; export it again"):
            find_model(str(folder)).load(torch.device("cpu"))
        flip(folder / name, 0.9)
    (folder / "export.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"export.json: cannot be read"):
        api.evaluate(folder, quiet=True, data=str(world.folder / "pairs.jsonl"))


READERS: dict[str, Callable[[World], Any]] = {
    "train": lambda w: w.train(),
    "eval": lambda w: api.evaluate(w.run, quiet=True),
    "eval of the model": lambda w: api.evaluate(w.run / LAST / "model", quiet=True, data=str(w.folder / "pairs.jsonl")),
    "compare": lambda w: api.compare(w.run, quiet=True, data=str(w.folder / "pairs.jsonl")),
    "chat": lambda w: find_model(str(w.run)).load(torch.device("cpu")),
    "the next run": lambda w: find_model(str(w.run / LAST / "model")).load(torch.device("cpu")),
    "export": lambda w: api.export(w.run, to="safetensors", output=str(w.folder / "exported")),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_checkpoint_with_a_flipped_bit_is_used_by_nobody(world: World, reader: str) -> None:
    flip(world.fresh(whole=True) / LAST / "model/model.safetensors", 0.9)
    with pytest.raises(CheckpointError, match=r"model.safetensors: differs from what was written; delete .*step-4"):
        READERS[reader](world)


def test_a_flipped_bit_in_the_reference_cache_changes_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    cache = next((world.folder / "cache").glob("*.safetensors"))
    before = cache.read_bytes()
    flip(cache, 0.99, bit=4)
    shutil.rmtree(world.fresh() / "checkpoints")
    api.train(world.config)
    assert "recomputing" in capsys.readouterr().err
    world.check()
    assert cache.read_bytes() == before


# ---- Disks ----


@contextmanager
def failing(at: int, number: int, *, kill: bool = False) -> Iterator[list[int]]:
    """Make the `at`-th disk write and all later ones fail, or end the process there."""
    count = [0]

    def hooked(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] >= at:
                if kill:
                    os.kill(os.getpid(), 9)
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in WRITES:
            patch.setattr(os, name, hooked(getattr(os, name)))
        yield count


def writes_of(world: World) -> int:
    world.fresh()
    with failing(10**9, 0) as count:
        world.train()
    return count[0]


def check_full(world: World, at: int, number: int) -> None:
    world.fresh()
    with failing(at, number):
        try:
            world.train()
        except DiskError as error:
            assert os.strerror(number) in str(error) and str(world.run) in str(error) and error.exit_code == 5
    world.train()
    world.check()


@pytest.mark.parametrize(("at", "number"), [(1, errno.EROFS), (9, errno.EIO), (30, errno.ENOSPC)])
def test_a_disk_that_fails_is_a_sentence_and_the_run_goes_on(world: World, at: int, number: int) -> None:
    check_full(world, at, number)


def without(folder: Path, name: str, patch: pytest.MonkeyPatch) -> None:
    """Never write a file of this name."""
    real = os.replace

    def refused(source: Any, to: Any, **more: Any) -> None:
        if Path(to) == folder / name:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        real(source, to, **more)

    patch.setattr(os, "replace", refused)


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_what_the_start_was_worth_is_in_every_evaluation_though_a_disk_does_not_keep_it(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"loss": "sft"} if method == "sft" else {"algorithm": {"name": "grpo", **ROLLOUTS}, **ONLINE}
    world = World(
        tmp_path, reference={"kind": "auto", "cache_dir": None}, **{k: v for k, v in how.items() if k != "reference"}
    )
    kept = (world.kept / "metrics.jsonl").read_bytes()
    name, figure = ("start.losses.json", b"loss_change") if method == "sft" else ("start.completions.json", b"win_rate")
    assert kept.count(figure + b'":') == 2 + (method == "grpo")
    shutil.rmtree(world.fresh() / "checkpoints")
    with monkeypatch.context() as patch:
        without(world.run, name, patch)
        world.train()
    assert not (world.run / name).exists()
    world.check()


@pytest.mark.slow
def test_wherever_a_disk_fails_it_is_a_sentence_and_the_run_goes_on(world: World) -> None:
    for at in range(1, writes_of(world) + 1):
        check_full(world, at, (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS)[at % 5])


ONLINE = {"reward": "words", "reference": {"kind": "auto"}, "evaluation": {"reward": None}}
ROLLOUTS = {"samples": 2, "max_new_tokens": 3}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"r": 2}, "reference": {"kind": "auto"}},
    "simpo": {"loss": "simpo"},
    "kto": {"loss": "kto"},
    "reward_model": {"algorithm": "reward_model", "evaluation": {"reward": None}},
    "moving reference": {"reference": {"kind": "auto", "cache_dir": None, "ema": 0.5}},
    "rloo": {"algorithm": {"name": "rloo", **ROLLOUTS}, **ONLINE},
    "grpo, two updates": {"algorithm": {"name": "grpo", "epochs": 2, **ROLLOUTS}, **ONLINE},
    "dapo": {"algorithm": {"name": "dapo", "dynamic_sampling": 2, **ROLLOUTS}, **ONLINE},
    "online_dpo": {"algorithm": {"name": "online_dpo", "max_new_tokens": 3}, **ONLINE},
    "ppo": {"algorithm": {"name": "ppo", "max_new_tokens": 3}, **ONLINE},
}


def ended(call: Callable[[], int | None]) -> int:
    """Run this in a child process, and return its exit code, or minus the signal."""
    child = os.fork()
    if not child:
        status = 99  # a child that raises must not continue as a second test process
        try:
            status = call() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_child_that_raises_ends() -> None:
    assert ended(lambda: sys.exit(0)) == 99 and ended(lambda: None) == 0


def check_killed(world: World, at: int) -> None:
    world.fresh()

    def killed() -> None:
        with failing(at, 0, kill=True):
            world.train()

    assert ended(killed) in (0, -9)
    world.train()
    world.check()


@pytest.mark.parametrize("at", [4, 17])
def test_a_kill_in_a_write_leaves_nothing_half(world: World, at: int) -> None:
    check_killed(world, at)


@pytest.mark.slow
def test_wherever_it_is_killed_it_goes_on_bit_for_bit(world: World) -> None:
    for at in range(1, writes_of(world) + 1):
        check_killed(world, at)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_killed_in_a_write_go_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    """At some of the writes, chosen by PENCHANT_SEED."""
    world = World(tmp_path, **METHODS[method])
    seed = int(os.environ.get("PENCHANT_SEED", "0"))
    writes = writes_of(world)
    for at in random.Random(f"{seed} {method}").sample(range(1, writes + 1), min(6, writes)):
        check_killed(world, at)


@contextmanager
def largest(size: int) -> Iterator[None]:
    """Limit file sizes, so that writes of Rust and C++ libraries fail too."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.slow
def test_however_large_a_file_may_grow_it_is_a_sentence_and_the_run_goes_on(world: World) -> None:
    for size in (1, 50, 150, 400, 700, 1000, 1500, 2000, 3000, 5000, 8000, 20_000, 80_000, 150_000, 300_000):
        world.fresh()
        with largest(size), suppress(DiskError):
            world.train()
        world.train()
        world.check()


@pytest.mark.parametrize("size", [4000, 40_000])
def test_a_library_that_cannot_write_is_the_same_sentence(world: World, size: int) -> None:
    assert errno.EFBIG in FULL
    shutil.rmtree(world.fresh() / "checkpoints")
    with largest(size), pytest.raises(DiskError, match=r"File too large.* free there.*; free some space"):
        world.train()
    assert not list((world.run / "checkpoints").glob(".tmp-*"))
    world.train()
    world.check()


def test_what_only_people_read_stops_no_run(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penchant.report.LiveReport._write", WRITE_REPORT)
    run = world.fresh()
    for name in ("perf.jsonl", "samples.jsonl", "audit.json", "flags.json", "report.html"):
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()
    api.train(world.config)
    told = capsys.readouterr().err
    for name in ("perf.jsonl", "samples.jsonl", "audit.json", "flags.json"):
        assert f"{name}: " in told, name
    assert "the report could not be written" in told


# the next checkpoint is written before one too many is deleted
@pytest.mark.parametrize("kept", [(), ("checkpoint.keep_last=1", "checkpoint.keep_best=false")])
def test_no_room_for_a_checkpoint_is_said_before_the_first_step(
    world: World, monkeypatch: pytest.MonkeyPatch, kept: Sequence[str]
) -> None:
    (world.fresh() / "checkpoints/step-1").mkdir(exist_ok=True)
    monkeypatch.setattr("penchant.runs.free_bytes", lambda _: 1000)
    with pytest.raises(DiskError, match=r"a checkpoint takes about .* and its disk has 1 kB free"):
        api.train(world.config, *kept, quiet=True)


def test_a_little_room_is_said_and_tried(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.fresh()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penchant.runs.free_bytes", lambda _: 600_000)
        patch.setattr("penchant.training.loop.Loop.run", lambda _: (_ for _ in ()).throw(StopHere))
        with pytest.raises(StopHere):
            api.train(world.config)
    assert "up to 3 more are kept at a time" in capsys.readouterr().err


# ---- Locks ----


def test_a_second_command_changes_nothing_in_a_folder_that_is_held(world: World) -> None:
    from penchant.runfolder import RunLock

    run = world.fresh()
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    with RunLock(run), pytest.raises(CheckpointError, match="another run holds this folder"):
        api.train(world.config, "train.lr=0.5", quiet=True)
    after = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    assert {**after, ".lock": b""} == {**before, ".lock": b""}


# ---- Process exits ----


@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(0)"])
def test_an_exit_in_a_reward_ends_no_run_unsaid(
    world: World, tmp_path: Path, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"import os, sys\ndef reward(prompts, completions):\n    {end}\n")
    world.fresh()
    own = {**world.config, "evaluation": {**world.config["evaluation"], "reward": f"{file}:reward"}}
    own["output"] = str(tmp_path / "run")
    with pytest.raises(RewardError, match=r"mine.py:reward: SystemExit: 0"):
        api.train(own, quiet=True)


def test_an_exit_elsewhere_is_not_taken_for_the_end(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def handler(*_: Any, **__: Any) -> None:
        os._exit(0)

    monkeypatch.setattr("penchant.api.flags", handler)
    assert main(["flags", "somewhere"]) == 2
    assert "called exit(" in capsys.readouterr().err


def test_a_full_disk_under_any_command_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def handler(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("penchant.api.flags", handler)
    assert main(["flags", "somewhere"]) == 5
    assert "No space left on device" in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_no_run(world: World, tmp_path: Path) -> None:
    run = world.fresh()
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(world.config))  # JSON is YAML

    def unread() -> int:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        return main(["train", str(config)])

    assert ended(unread) == 0
    assert checkpoints(run)[-1].name == "step-4"
    world.check()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here, which is a disk that is always full")
def test_a_file_that_a_person_asked_for_on_a_full_disk_ends_with_the_disks_exit_code(world: World) -> None:
    assert main(["report", str(world.kept), "--output", "/dev/full"]) == DiskError.exit_code
