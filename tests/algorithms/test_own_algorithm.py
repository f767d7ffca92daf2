"""A user's own algorithm, from the page's file or registered by a program, has every feature of a built-in one."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import page_code, polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.algorithms import ALGORITHMS
from penchant.cli import main
from penchant.errors import CheckpointError, ConfigError
from penchant.runs.state import changes, run_inputs
from penchant.training.loop import Interrupted, Loop


@pytest.fixture(autouse=True)
def _known_metrics() -> None:
    """Replaces conftest's fixture, because a user's algorithm may log its own metrics."""


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "my_algorithms.py").write_text(page_code("own_algorithms.md"))
    return {
        "model": {"path": tiny_model_folder(tmp_path / "model"), "dtype": "fp32"},
        "data": {
            "path": write_jsonl(tmp_path / "pairs.jsonl", polite_rows(18)),
            "validation_rows": 6,
            "max_length": 128,
        },
        "algorithm": {"name": f"{tmp_path}/my_algorithms.py:Fading", "push": 0.3},
        "train": {"max_steps": 3, "batch_size": 4, "tokens_per_step": 300, "lr": 3e-3},
        "evaluation": {"samples": 1, "sample_tokens": 4, "kl_prompts": 2},
        "checkpoint": {"every": 1},
        "output": str(tmp_path / "run"),
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("registered", [False, True])
def test_it_trains_is_planned_evaluated_swept_and_reported(
    config: dict[str, Any], registered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if registered:  # as a user's program would
        spec: Any = importlib.util.spec_from_file_location("my_algorithms", tmp_path / "my_algorithms.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(ALGORITHMS, "fading", module.Fading)
        config["algorithm"]["name"] = "fading"
    plan = api.plan(config, probe=True)
    assert plan.work.steps == 3 and plan.duration is not None
    assert {s.key: s.value for s in plan.settings}["algorithm.fade"] == 0.9
    result = api.train(config, quiet=True)
    train = [line for line in lines(result.folder) if line["kind"] == "train"]
    assert [line["push"] for line in train] == pytest.approx([0.3, 0.27, 0.243])
    assert result.after["eval/nll"] < result.before["eval/nll"]
    path = result.folder / "config.resolved.yaml"
    again = api.evaluate(path, quiet=True)
    assert again["eval/loss"] == pytest.approx(result.after["eval/loss"], rel=1e-6)
    assert "eval/nll" in again and "eval/kl/policy_ref" in again
    page = api.report(result.folder, output=tmp_path / "report.html").read_text()
    assert config["algorithm"]["name"].rpartition(":")[2] in page
    base = {key: value for key, value in config.items() if key != "output"}
    sweep = {"base": base, "grid": {"push": [0.0, 0.6]}, "metric": "eval/loss", "output": str(tmp_path / "sweep")}
    if not registered:  # the keys are unknown until the file is read
        sweep["grid"] = {"algorithm.push": [0.0, 0.6]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--plan"]) == 0
    assert "push" in capsys.readouterr().out


def test_it_resumes_bit_for_bit_and_not_with_another_file(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = api.train(config, quiet=True)
    config["output"] = str(tmp_path / "stopped")
    step = Loop.take_step

    def stop(loop: Loop, at: int, *more: Any) -> Any:
        if at == 1:
            loop.interrupted = signal.SIGINT
        return step(loop, at, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "take_step", stop)
        with pytest.raises(Interrupted):
            api.train(config, quiet=True)
    resumed = api.train(config, quiet=True)
    assert lines(resumed.folder) == lines(whole.folder)
    ours, theirs = weights(resumed.model), weights(whole.model)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    with (tmp_path / "my_algorithms.py").open("a") as file:
        file.write("# another file\n")
    with pytest.raises(CheckpointError, match="content of algorithm"):
        api.train(config, quiet=True)


def test_a_stage_notices_that_its_file_changed(config: dict[str, Any], tmp_path: Path) -> None:
    before = run_inputs(api.as_config(config), (None, None), {})
    with (tmp_path / "my_algorithms.py").open("a") as file:
        file.write("# another file\n")
    found = changes(before, run_inputs(api.as_config(config), (None, None), {}))
    assert len(found) == 1 and "my_algorithms.py:Fading has changed" in found[0]


def test_a_relative_path_is_beside_the_config(config: dict[str, Any], tmp_path: Path) -> None:
    config["algorithm"]["name"] = "my_algorithms.py:Fading"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert api.plan(tmp_path / "run.yaml", probe=False).method == f"{tmp_path.resolve()}/my_algorithms.py:Fading"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("class FadingStep(Algorithm)", "class FadingStep", "not an Algorithm"),
        ("(-chosen.detach(), None)", "-chosen.detach()", "write 'nll': (values, None)"),
        (
            "LossOutput(-chosen + self.push * rejected,",
            "LossOutput((rejected - chosen).mean(),",
            "one for each example",
        ),
        ("def weights(self, batch)", "def weight(self, batch)", "has no method weights(batch)"),
        ('return {"main": batch.trees}', "return batch.trees", "returns int from weights"),
        ('{"main": batch.trees}', '{"pairs": batch.trees}', 'return {"main": batch.trees}'),
        ("torch.tensor(self.push, dtype=torch.float64)", "self.push", "write 'push': torch.tensor("),
        ('return {"push": torch.tensor(self.push, dtype=torch.float64)}', "return [1.0]", "return {name: tensor}"),
        ("def end_step(self, step, means)", "def end_step(self, step)", "cannot call as end_step(step, means)"),
    ],
)
@pytest.mark.parametrize("held_out", [False, True])
def test_a_step_that_breaks_a_rule_is_refused(
    config: dict[str, Any], tmp_path: Path, old: str, new: str, words: str, held_out: bool
) -> None:
    file = tmp_path / "my_algorithms.py"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    if not held_out:
        del config["data"]["validation_rows"]
    with pytest.raises(ConfigError, match=re.escape(words)):
        api.train(config, quiet=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "nowhere.py:Fading"}, "no such file"),
        ({"name": "my_algorithms.py:Nobody"}, "has no class 'Nobody'; there are"),
        ({"name": "my_algorithms.py:FadingStep"}, "is not an AlgorithmConfig"),
        ({"name": "my_algorithms.py"}, "names no class; write my_algorithms.py:NAME"),
        ({"push": -1}, "greater than or equal to 0"),
        ({"puhs": 1}, "puhs"),
        ({"name": "rlo"}, 'did you mean "rloo"'),
    ],
)
def test_what_is_wrong_is_said(config: dict[str, Any], tmp_path: Path, change: dict[str, Any], words: str) -> None:
    config["algorithm"] = {"name": "my_algorithms.py:Fading", **change}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        api.as_config(tmp_path / "run.yaml")
    assert "run.yaml" in str(error.value)
