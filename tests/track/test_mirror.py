"""Trackers that fail, hang, die or recover never affect a run, which only reports it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from run_folders import make_run
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.errors import ConfigError
from penchant.track import TRACKERS, Mirrors, TrackerSpec
from penchant.track.tracker import Line, Tail, to_line, unsent
from penchant.training.options import LoggingConfig


def _fake(name: str) -> TrackerSpec:
    return TrackerSpec("wandb", "Fake", "json", "wandb", f"fake_trackers:{name}")


def _mirrors(run: Path, fake: str, said: list[str], timeout: float = 120.0) -> Mirrors:
    settings = LoggingConfig(trackers=["wandb"], tracker_timeout=timeout)
    return Mirrors(run, settings, {"a": 1}, said.append, {"wandb": _fake(fake)})


def _calls(run: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (run / "trackers" / "calls.jsonl").read_text().splitlines()]


def _state(run: Path) -> dict[str, Any]:
    return json.loads((run / "trackers" / "wandb.json").read_text())


def test_names_are_those_of_the_field_and_an_interval_becomes_two_numbers() -> None:
    row = {
        "kind": "eval",
        "step": 3,
        "eval/loss": 0.5,
        "eval/loss/ci": [0.4, 0.6],
        "epoch": 1.0,
        "skipped": "no",
        "x": None,
    }
    expected = {"eval/loss": 0.5, "eval/loss/ci_low": 0.4, "eval/loss/ci_high": 0.6, "eval/epoch": 1.0}
    assert to_line(row) == Line("eval", 3, expected)
    assert to_line({"kind": "train", "step": 1, "rewards/margins": 2, "ok": True}).values == {
        "train/rewards/margins": 2.0,
        "train/ok": 1.0,
    }
    assert to_line({"step": 1, "seconds": 0.5}, "perf") == Line("perf", 1, {"perf/seconds": 0.5})


def test_half_a_line_waits_and_a_log_that_was_cut_back_is_read_again(tmp_path: Path) -> None:
    log, tail = tmp_path / "metrics.jsonl", Tail(tmp_path)
    assert tail.new() == []
    one, two = (json.dumps({"kind": "train", "step": step, "loss": 1.0}) + "\n" for step in (1, 2))
    log.write_text(one + two[:20])
    assert [line.step for line in tail.new()] == [1]
    log.write_text(one + two)
    assert [line.step for line in tail.new()] == [2]
    log.write_text(one)
    assert [line.step for line in tail.new()] == [1]
    lines = [Line("train", 1, {}), Line("train", 2, {}), Line("eval", 2, {}), Line("train", 2, {})]
    assert unsent(lines, {"train": 1}) == [Line("train", 2, {}), Line("eval", 2, {})]


def test_a_line_that_no_run_wrote_is_left_out(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 1.0}, {"kind": ["train"], "step": 1}, {"kind": "train", "step": True, "loss": 2.0}]
    rows += [{"kind": "train", "step": 2, "loss": 10**400, "lr": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Tail(tmp_path).new() == [Line("train", 2, {"train/lr": 0.5})]


def test_every_line_arrives_once_and_a_continued_run_is_the_same_run(tmp_path: Path) -> None:
    run, said = make_run(tmp_path / "run", done=3), list[str]()
    mirrors = _mirrors(run, "Records", said)
    mirrors.begin(anew=True)
    assert mirrors.finish("stopped", {"eval/loss": 0.25})
    make_run(run, done=5)  # lines 1 to 3 are repeated
    again = _mirrors(run, "Records", said)
    again.begin(anew=False)
    assert again.finish("finished", {"eval/loss": 0.125})
    calls = _calls(run)
    first, second = (c for c in calls if "start" in c)
    assert second["given"] == first["start"] and first["given"] is None and first["name"] == "run"
    assert [c["step"] for c in calls if c.get("kind") == "train"] == [1, 2, 3, 4, 5]
    assert [c["step"] for c in calls if c.get("kind") == "eval"] == [0, 3, 5]
    assert [(c["finish"], c["loss"]) for c in calls if "finish" in c] == [("stopped", 0.25), ("finished", 0.125)]
    assert said == ["Fake: https://[hidden]@example.org/run"] * 2 and "secret-word" not in json.dumps(_state(run))


def test_what_a_tracker_missed_is_sent_when_it_is_back(tmp_path: Path) -> None:
    run, said = make_run(tmp_path / "my run", done=2), list[str]()
    (run / "trackers").mkdir()
    (run / "trackers" / "down").write_text("")
    mirrors = _mirrors(run, "LastTwoOnly", said)
    mirrors.begin(anew=True)
    assert not mirrors.finish("finished")
    assert "6 lines were not sent" in said[-1] and f"penchant track '{run}' --to" in said[-1]
    (run / "trackers" / "down").unlink()
    again = _mirrors(run, "LastTwoOnly", said)
    again.begin(anew=False)
    assert again.finish("finished")
    assert len([c for c in _calls(run) if "kind" in c]) == 6 and _state(run)["unsent"] == 0


def test_a_tracker_that_recovered_has_missed_nothing(tmp_path: Path) -> None:
    run, said = make_run(tmp_path / "run", done=2), list[str]()
    mirrors = _mirrors(run, "FailsOnce", said)
    mirrors.begin(anew=True)
    assert mirrors.finish("finished")
    assert len([c for c in _calls(run) if "kind" in c]) == _state(run)["lines"] == 6
    assert (_state(run)["unsent"], _state(run)["error"]) == (0, None)
    assert not any("penchant track" in sentence for sentence in said)


@pytest.mark.parametrize(
    "fake, said_of", [("Hangs", "no answer in 1 s"), ("Dies", "ended"), ("Raises", "401 for [hidden]")]
)
def test_a_tracker_that_fails_costs_a_warning_and_its_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: str, said_of: str
) -> None:
    monkeypatch.setenv("FAKE_API_KEY", "abcdef-not-to-be-seen")
    run, said = make_run(tmp_path / "run", done=2), list[str]()
    # starting one takes a second on a slow machine
    mirrors = _mirrors(run, fake, said, timeout=1.0 if fake == "Hangs" else 120.0)
    started = time.monotonic()
    mirrors.begin(anew=True)
    process = mirrors.mirrors[0].process
    for _ in range(100):
        mirrors.poll()
    assert not mirrors.finish("finished")
    assert time.monotonic() - started < 110  # it does not wait for the timeout if the tracker dies or raises
    assert process is not None and process.poll() is not None
    whole = "\n".join(said)
    assert said_of in whole and "not-to-be-seen" not in whole and "\x1b" not in whole
    left = run / "trackers" / "wandb.json"
    assert not left.exists() or "not-to-be-seen" not in left.read_text()


@pytest.mark.parametrize("training", [True, False])
def test_only_a_run_that_is_training_goes_on_without_a_tracker(
    training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", fails)
    said: list[str] = []
    specs, settings = {"wandb": _fake("Dies")}, LoggingConfig(trackers=["wandb"])
    Mirrors(make_run(tmp_path / "run", done=2), settings, {}, said.append, specs, training=training).begin(anew=True)
    assert "Cannot allocate memory" in said[0] and ("goes on" in said[0]) == training


def test_every_tracker_is_closed_though_the_first_one_failed(tmp_path: Path) -> None:
    run, said = make_run(tmp_path / "run", done=2), list[str]()
    specs = {"wandb": _fake("Dies"), "mlflow": TrackerSpec("mlflow", "Other", "json", "mlflow", "fake_trackers:Raises")}
    settings = LoggingConfig(trackers=["wandb", "mlflow"], tracker_timeout=120.0)
    mirrors = Mirrors(run, settings, {}, said.append, specs)
    mirrors.begin(anew=True)
    processes = [mirror.process for mirror in mirrors.mirrors]
    assert not mirrors.finish("finished")
    assert all(process is not None and process.returncode is not None for process in processes)
    for label, name in (("Fake", "wandb"), ("Other", "mlflow")):
        assert any(text.startswith(label) and f"--to {name}" in text for text in said)


def test_a_record_that_cannot_be_removed_costs_a_warning(tmp_path: Path) -> None:
    run, said = make_run(tmp_path / "run", done=2), list[str]()
    (run / "trackers" / "wandb.json").mkdir(parents=True)
    mirrors = _mirrors(run, "Raises", said)
    mirrors.begin(anew=True)
    assert mirrors.mirrors[0].process is None and "could not be started" in said[0]
    assert not mirrors.finish("finished")


def test_training_is_the_same_whatever_trackers_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_API_KEY", "abcdef-not-to-be-seen")
    config = {
        "model": {"path": tiny_model_folder(tmp_path / "model"), "dtype": "fp32"},
        "data": {
            "path": write_jsonl(tmp_path / "pairs.jsonl", polite_rows(12)),
            "validation_rows": 4,
            "max_length": 128,
        },
        "train": {"max_steps": 2, "batch_size": 4, "lr": 3e-3},
        "evaluation": {"samples": 0, "kl_prompts": 0},
    }
    plain = api.train({**config, "output": str(tmp_path / "plain")}, quiet=True)
    for tracker, fake in (("wandb", "Raises"), ("tensorboard", "Hangs"), ("mlflow", "Dies")):
        monkeypatch.setitem(TRACKERS, tracker, TrackerSpec(tracker, fake, "json", tracker, f"fake_trackers:{fake}"))
    logging = {"trackers": ["wandb", "tensorboard", "mlflow"], "tracker_timeout": 1.0}
    bad = api.train({**config, "logging": logging, "output": str(tmp_path / "bad")}, quiet=True)
    for name in ("metrics.jsonl", "checkpoints/step-2/model/model.safetensors", "checkpoints/step-2/state.safetensors"):
        assert (plain.folder / name).read_bytes() == (bad.folder / name).read_bytes(), name
    assert json.loads((bad.folder / "manifest.json").read_text())["status"] == "finished"


def test_a_missing_package_is_met_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", TrackerSpec("wandb", "W&B", "not_there_at_all", "wandb", "x:y"))
    config = {"model": {"path": "nowhere"}, "data": {"path": "nowhere.jsonl"}, "output": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=r"wandb is not installed; pip install 'penchant\[wandb\]'"):
        api.train({**config, "logging": {"trackers": "wandb"}}, quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="not a tracker; there are wandb, tensorboard, mlflow, trackio"):
        api.track(make_run(tmp_path / "done"), "wandbb")


def test_a_run_that_is_killed_leaves_its_lines_in_its_trackers(tmp_path: Path) -> None:
    """After kill -9 of the run's process, its tracker reads the end of its input, sends the rest, and closes."""
    run = make_run(tmp_path / "run", done=4)
    script = (
        "import sys, time; from pathlib import Path; from penchant.track import Mirrors, TrackerSpec; "
        "from penchant.training.options import LoggingConfig; "
        "spec = TrackerSpec('wandb', 'Fake', 'json', 'wandb', 'fake_trackers:Records'); "
        "m = Mirrors(Path(sys.argv[1]), LoggingConfig(trackers=['wandb']), {}, print, {'wandb': spec}); "
        "m.begin(anew=True); print('up', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any("finish" in c for c in _calls_or_none(run)):
        time.sleep(0.05)
    calls = _calls(run)
    assert [c["step"] for c in calls if c.get("kind") == "train"] == [1, 2, 3, 4] and calls[-1]["finish"] == "killed"


def _calls_or_none(run: Path) -> list[dict[str, Any]]:
    try:
        return _calls(run)
    except (OSError, ValueError):
        return []
