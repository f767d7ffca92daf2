"""Real trackers, offline, read back in their own formats: each holds metrics.jsonl and perf.jsonl exactly once."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import polite_rows, tiny_model_folder, write_jsonl
from wandb_file import history, run_of

from penchant import api
from penchant.errors import ConfigError
from penchant.track import TRACKERS, TrackerSpec
from penchant.track.backends import mlflow_name
from penchant.track.tracker import STEP, to_line

FLOAT32 = 1e-6  # the precision of TensorBoard's scalars


class Crash(Exception):
    pass


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """(run, the same without trackers): killed after step 5, two steps after its checkpoint, and resumed."""
    tmp = tmp_path_factory.mktemp("tracked")
    config = {
        "model": {"path": tiny_model_folder(tmp / "model"), "dtype": "fp32"},
        "data": {"path": write_jsonl(tmp / "pairs.jsonl", polite_rows()), "validation_rows": 6, "max_length": 128},
        "train": {"epochs": 2, "batch_size": 6, "tokens_per_step": 600, "lr": 3e-3},
        "evaluation": {"samples": 2, "sample_tokens": 4},
    }
    logging = {"trackers": ["wandb", "tensorboard"], "project": "p", "tags": ["one"], "tracker_timeout": 300.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp / "cache"))
        patch.setenv("WANDB_MODE", "offline")
        for name in ("wandb", "tensorboard"):
            pytest.importorskip(name)
        plain = api.train({**config, "output": str(tmp / "plain")}, quiet=True).folder
        tracked = {**config, "logging": logging, "output": str(tmp / "sweep" / "run")}
        (tmp / "sweep").mkdir()
        (tmp / "sweep" / "sweep.json").write_text("{}")

        def crash(_self: Any, step: int, *_: Any) -> None:
            if step == 5:
                raise Crash

        with patch.context() as once:
            once.setattr("penchant.training.console.PlainConsole.step", crash)
            with pytest.raises(Crash):
                api.train(tracked, quiet=True)
        yield api.train(tracked, quiet=True).folder, plain


def _rows(run: Path) -> list[Any]:
    """Every line as trackers should have it. A step that ran twice keeps the speed of its first run."""
    metrics = [to_line(json.loads(t)) for t in (run / "metrics.jsonl").read_text().splitlines()]
    perf = [to_line(json.loads(t), "perf") for t in (run / "perf.jsonl").read_text().splitlines()]
    first = {line.step: line for line in reversed(perf)}
    return [*metrics, *first.values()]


def test_what_is_trained_is_the_same_with_trackers_and_without(crashed: tuple[Path, Path]) -> None:
    run, plain = crashed
    assert (run / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()
    for name in ("model/model.safetensors", "state.safetensors"):
        assert (run / "checkpoints/step-6" / name).read_bytes() == (plain / "checkpoints/step-6" / name).read_bytes()
    for name in ("wandb", "tensorboard"):
        state = json.loads((run / "trackers" / f"{name}.json").read_text())
        assert (state["unsent"], state["error"], state["lines"]) == (0, None, len(_rows(run))), name


def test_wandb_holds_every_line_once_over_both_parts_of_the_run(crashed: tuple[Path, Path]) -> None:
    run, _ = crashed
    files = sorted(run.glob("trackers/wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and files[0].name == files[1].name  # the same id, so W&B's sync merges them
    found = [row for path in files for row in history(path)]
    (table,) = [row for row in found if "samples" in "".join(row)]
    expected = [{**line.values, STEP: line.step} for line in _rows(run)]
    key = lambda row: (row[STEP], sorted(row))  # noqa: E731
    assert sorted((r for r in found if r is not table), key=key) == sorted(expected, key=key)
    about = run_of(files[0])
    assert (about.project, about.display_name, about.run_group, list(about.tags)) == ("p", "run", "sweep", ["one"])


def test_tensorboard_holds_every_line_once(crashed: tuple[Path, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = crashed
    events = EventAccumulator(str(run / "trackers/tensorboard/run"), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()
    found = {(t, e.step): e.value for t in tags["scalars"] for e in events.Scalars(t)}
    assert sum(len(events.Scalars(t)) for t in tags["scalars"]) == len(found)
    expected = {(name, line.step): value for line in _rows(run) for name, value in line.values.items()}
    assert found.keys() == expected.keys()
    assert all(found[k] == pytest.approx(v, rel=FLOAT32) for k, v in expected.items())
    assert any("status" in tag for tag in tags["tensors"])


@pytest.mark.parametrize(
    "reward", [r"matches:^\d+%$", "format:<think>.*</think>", "a//b", "../mine.py:right", "x" * 300]
)
def test_mlflow_accepts_every_name(reward: str) -> None:
    name = mlflow_name(f"rewards/{reward}/mean")
    assert re.fullmatch(r"[/\w.\- :]{1,250}", name) and posixpath.normpath(name) == name


@pytest.mark.parametrize("name", ["train.lr", "eval/kl/k3", "rewards/words:20-60/mean", "reward./my.py:right"])
def test_usual_names_stay_as_they_are_in_mlflow(name: str) -> None:
    assert mlflow_name(name) == name


@pytest.mark.slow  # MLflow takes seconds to create its database
def test_mlflow_holds_every_line_once(
    crashed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    _, run = crashed
    log = run / "metrics.jsonl"
    whole = log.read_text()
    log.write_text("".join(whole.splitlines(keepends=True)[:3]))
    for text in (log.read_text(), whole, whole):  # up to a crash, to the end, and once more
        log.write_text(text)
        assert api.track(run, "mlflow", project="p", group="g", dir=str(tmp_path))
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (one,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    expected = {(name, line.step): value for line in _rows(run) for name, value in line.values.items()}
    names = {name for name, _ in expected}
    found = [((name, m.step), m.value) for name in names for m in client.get_metric_history(one.info.run_id, name)]
    assert sorted(found) == sorted(expected.items())
    assert one.info.status == "FINISHED" and one.data.tags["group"] == "g" and one.data.params["train.epochs"] == "2.0"


def test_a_finished_run_is_sent_afterwards_and_only_what_is_missing(crashed: tuple[Path, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, run = crashed
    said: list[str] = []
    assert api.track(run, "tensorboard", name="later", say=said.append)
    events = EventAccumulator(str(run / "trackers/tensorboard/later")).Reload()
    expected = {name for line in _rows(run) for name in line.values}
    assert set(events.Tags()["scalars"]) == expected
    steps = [e.step for e in events.Scalars("train/loss")]
    assert steps == [1, 2, 3, 4, 5, 6] and said == [f"TensorBoard: {run / 'trackers/tensorboard/later'}"]
    assert api.track(run, "tensorboard", name="later")  # a second call adds nothing
    again = EventAccumulator(str(run / "trackers/tensorboard/later")).Reload()
    assert [e.step for e in again.Scalars("train/loss")] == steps
    assert api.track(run, "tensorboard", name="later", anew=True)
    assert (run / "trackers/tensorboard/later-2").is_dir()
    assert api.track(run, "tensorboard", name="a/b", anew=True)
    assert api.track(run, "tensorboard")
    assert len([*(run / "trackers/tensorboard/a/b").iterdir()]) == 2 and not (run / "trackers/tensorboard/b").exists()


def test_a_tracker_that_fails_afterwards_has_no_run_that_goes_on(
    crashed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_API_KEY", "abcdef")
    monkeypatch.setitem(TRACKERS, "mlflow", TrackerSpec("mlflow", "Fake", "json", "mlflow", "fake_trackers:Raises"))
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"track: logging\.project is ''"):
        api.track(crashed[1], "mlflow", project="")
    assert not api.track(crashed[1], "mlflow", say=said.append)
    assert "401" in said[1] and not any("the run goes on" in line for line in said)


def test_trackio_holds_every_line_once(crashed: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("gradio_client")
    pytest.importorskip("trackio")
    import sqlite3

    _, run = crashed
    assert api.track(run, "trackio", project="p", dir=str(tmp_path))
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics").fetchall()
    found = sorted(((step, json.loads(metrics)) for step, metrics in rows), key=lambda r: (r[0], sorted(r[1])))
    expected = sorted(((line.step, dict(line.values)) for line in _rows(run)), key=lambda r: (r[0], sorted(r[1])))
    assert found == expected
