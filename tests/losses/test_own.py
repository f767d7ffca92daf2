"""A user's own loss from a file, in config, training, resume, evaluation, plan and sweep, and errors."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import page_code, polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.cli import main
from penchant.config import load_config
from penchant.errors import CheckpointError, ConfigError
from penchant.losses import LOSSES
from penchant.losses.own import check, find_loss

HEAD = """
import torch
from penchant.losses import loss
from penchant.losses.helpers import pair_logratios, pair_output
from penchant.types import LossOutput

"""
MINE = (
    HEAD
    + '''
def mine(logps, *, beta=0.1, power=2.0):
    """beta (1 - h)^power."""
    chosen, rejected = pair_logratios(logps)
    losses = beta * (1 - chosen + rejected).abs() ** power
    return pair_output(losses, beta * chosen, beta * rejected)
'''
)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "my_losses.py").write_text(MINE)
    return {
        "model": {"path": tiny_model_folder(tmp_path / "model"), "dtype": "fp32"},
        "data": {
            "path": write_jsonl(tmp_path / "pairs.jsonl", polite_rows(18)),
            "validation_rows": 6,
            "max_length": 128,
        },
        "loss": {"name": "my_losses.py:mine", "power": 3},
        "train": {"max_steps": 2, "batch_size": 4, "tokens_per_step": 300, "lr": 3e-3},
        "evaluation": {"samples": 0, "kl_prompts": 0},
        "output": str(tmp_path / "run"),
    }


def written(config: dict[str, Any], folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_our_own_losses_pass_what_a_users_is_put_to(name: str) -> None:
    check(LOSSES[name])


@pytest.mark.usefixtures("live_reports")
def test_a_run_from_its_config_to_its_evaluation(config: dict[str, Any], tmp_path: Path) -> None:
    config["train"]["divergence_ceiling"] = 9.0  # it might log a divergence of its own
    path = written(config, tmp_path)  # the loss is beside the config, not in the working directory
    assert load_config(path).loss.name == f"{tmp_path.resolve()}/my_losses.py:mine"
    assert api.plan(path, probe=False).method == "mine"
    result = api.train(path, quiet=True)
    assert result.steps == 2 and (result.folder / "report.html").exists()
    assert result.before["eval/loss"] == pytest.approx(0.1)  # beta (1 - 0)^3
    again = api.evaluate(result.folder)
    assert again["eval/loss"] == pytest.approx(result.after["eval/loss"], rel=1e-5)
    identity = json.loads((result.folder / "identity.json").read_text())
    assert f"content of loss {tmp_path.resolve()}/my_losses.py:mine" in identity


def test_a_run_goes_on_with_the_same_file_and_not_with_another(config: dict[str, Any], tmp_path: Path) -> None:
    whole = api.train(written({**config, "output": str(tmp_path / "whole")}, tmp_path), quiet=True)
    config["checkpoint"] = {"every": 1, "keep_last": 9}
    path = written(config, tmp_path)
    result = api.train(path, quiet=True)
    shutil.rmtree(result.folder / "checkpoints" / "step-2")
    assert api.train(path, quiet=True).after["eval/loss"] == whole.after["eval/loss"]
    shutil.rmtree(result.folder / "checkpoints" / "step-2")
    (tmp_path / "my_losses.py").write_text(MINE.replace("1 - chosen", "2 - chosen"))
    with pytest.raises(CheckpointError, match=r"content of loss \S*my_losses\.py:mine"):
        api.train(path, quiet=True)


def test_what_it_raises_while_it_trains_is_a_sentence_about_its_line(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = MINE.count("\n", 0, MINE.index("    losses =")) + 1
    raises = '    assert len(chosen) == 6, "odd"\n'  # the number of rows in the trial call
    (tmp_path / "my_losses.py").write_text(MINE.replace("    losses =", f"{raises}    losses ="))
    assert main(["train", str(written(config, tmp_path)), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert f"my_losses.py:{line}: AssertionError: odd" in said and "Traceback" not in said


def test_several_are_an_axis_of_a_sweep(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(MINE.replace("1 - chosen", "2 - chosen"))  # another loss of the same name
    sweep = {"base": {**config, "loss": "dpo"}, "output": str(tmp_path / "sweep")}
    sweep["base"].pop("output")
    sweep["grid"] = {"loss.name": ["dpo", "my_losses.py:mine", "other.py:mine"]}
    sweep["metric"] = "eval/loss"
    found = api.sweep(written(sweep, tmp_path), quiet=True)
    runs = json.loads((tmp_path / "sweep/sweep.json").read_text())["runs"]
    assert sorted(runs) == ["dpo", "my_losses.py_mine", "other.py_mine"], found
    starts = {n: json.loads((tmp_path / "sweep" / n / "metrics.jsonl").read_text().splitlines()[0]) for n in runs}
    assert [round(starts[n]["eval/loss"], 3) for n in sorted(runs)] == [0.693, 0.1, 0.4]  # beta (2 - 0)^2
    (tmp_path / "other.py").write_text(MINE.replace("1 - chosen", "3 - chosen"))
    with pytest.raises(CheckpointError, match=r"run other\.py_mine .*the file of \S*other\.py:mine has changed"):
        api.sweep(tmp_path / "config.yaml", quiet=True)


def test_it_is_mixed_with_another(config: dict[str, Any], tmp_path: Path) -> None:
    config["loss"] = {"mix": [{"name": "dpo", "weight": 0.5}, {"name": "my_losses.py:mine", "weight": 0.5}]}
    result = api.train(written(config, tmp_path), quiet=True)
    assert result.before["eval/mine/rewards/accuracies"] == result.before["eval/rewards/accuracies"]


def test_the_example_of_the_page(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_losses.py").write_text(page_code("own_losses.md"))
    config["loss"] = {"name": "my_losses.py:capped_dpo", "beta": 0.2}
    exec(page_code("own_losses.md"), {"__name__": "my_losses"})  # like a program that imports it
    registered = LOSSES.pop("capped_dpo")
    monkeypatch.setitem(LOSSES, "capped_dpo", registered)
    assert api.train(written(config, tmp_path), quiet=True).before["eval/loss"] == pytest.approx(0.6931, abs=1e-4)
    assert LOSSES["capped_dpo"] is registered  # the file's loss is registered by its path
    assert main(["losses", f"{tmp_path}/my_losses.py:capped_dpo"]) == 0
    assert "loss.cap = 3: the scaled margin at which a pair is done [> 0]" in capsys.readouterr().out
    config["loss"]["cap"] = -1
    with pytest.raises(ConfigError, match=r"config\.yaml:\d+: .*cap"):
        load_config(written(config, tmp_path))


BAD = {
    "not finite": "losses = (chosen - rejected).exp()\n    return pair_output(losses, chosen, rejected)",
    "not finite where policy and reference are equal": "losses = (chosen - rejected).abs().log()\n    return LossOutput(losses)",
    "of shape [] for 6 rows": "return LossOutput((chosen - rejected).mean())",
    "returns Tensor": "return chosen - rejected",
    "no gradient reaches": "return LossOutput((chosen - rejected).detach())",
    "with a gradient; detach": "return LossOutput(chosen - rejected, metrics={'margin': (chosen - rejected, None)})",
    "gives margin as Tensor; write 'margin': (values, None)": "return LossOutput(chosen - rejected, metrics={'margin': chosen.detach()})",
    "gives dict as weights": "return LossOutput(chosen - rejected, {'margin': (chosen.detach(), None)})",
    "gradient that is not finite": "return LossOutput((chosen - rejected).abs().sqrt())",
    "raises AttributeError": "return LossOutput(chosen.nonsense)",
}


@pytest.mark.parametrize("what", BAD)
def test_a_loss_that_breaks_a_rule_is_refused_by_name(tmp_path: Path, what: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"{HEAD}\ndef f(logps):\n    chosen, rejected = pair_logratios(logps)\n    {BAD[what]}\n")
    with pytest.raises(ConfigError) as refused:
        find_loss(f"{file}:f")
    assert f"{file}:f" in refused.value.what and what in refused.value.what


def test_the_declared_value_is_held_against_the_loss(tmp_path: Path) -> None:
    spec = replace(LOSSES["dpo"], equal_policy_loss=lambda **_: 0.5)
    with pytest.raises(ValueError, match=r"gives 0\.693147 where policy and reference are equal, and declares 0\.5"):
        check(spec)


@pytest.mark.parametrize(
    "text, name, what",
    [
        ("def f(logps): ...", "g", "has no function 'g'"),
        ("def f(logps, *, beta): ...", "f", "beta"),
        ("def margin(logps): ...", "magrin", 'did you mean "margin"?'),
        ("def f(logps, *, beta=(1, 2)): ...", "f", "beta is neither"),
        ("def dpo(logps): ...", "dpo", "a loss called dpo already"),
        (HEAD + "@loss('dpo', '0')\ndef f(logps): ...", "f", "a loss called dpo already"),
        ("raise SystemExit", "f", "cannot be imported"),
    ],
)
def test_a_file_without_such_a_loss_is_refused(tmp_path: Path, text: str, name: str, what: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(what)):
        find_loss(f"{file}:{name}")
    assert LOSSES["dpo"].fn.__module__ == "penchant.losses.pairwise"


def test_a_file_that_is_not_there_is_named_with_the_configs_line(config: dict[str, Any], tmp_path: Path) -> None:
    config["loss"] = {"name": "nowhere.py:f"}
    with pytest.raises(ConfigError, match=r"config\.yaml:\d+: loss\.name nowhere\.py: no such file"):
        load_config(written(config, tmp_path))
    (tmp_path / "fixed.py").write_text(MINE.replace("*, beta", "beta"))  # works as it is, without settings
    config["loss"] = {"name": "fixed.py:mine", "beta": 0.3}
    with pytest.raises(ConfigError, match=r"config\.yaml:\d+: loss\.beta .*write def mine\(logps, \*, beta=\.\.\.\)"):
        load_config(written(config, tmp_path))
    assert find_loss(f"{tmp_path}/fixed.py:mine").name == "mine"
    config["loss"] = "nowhere.py"
    with pytest.raises(ConfigError, match=r"nowhere\.py names no function; write nowhere\.py:NAME"):
        load_config(written(config, tmp_path))


def test_one_put_into_the_registry_from_outside_is_evaluated_too(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOSSES, "Mine-2", replace(LOSSES["hinge"], name="Mine-2"))
    result = api.train({**config, "loss": {"name": "Mine-2", "beta": 0.3}}, quiet=True)
    assert api.evaluate(result.folder)["eval/loss"] == pytest.approx(result.after["eval/loss"], rel=1e-5)
