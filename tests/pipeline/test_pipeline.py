"""Pipelines: errors before training, and which stages are skipped, resumed or refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from encoders import encoder_folder
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.cli import main
from penchant.config import merge_settings
from penchant.errors import CheckpointError, ConfigError, DataError, ModelError, TrainingStopped
from penchant.models.load import load_tokenizer
from penchant.pipeline import Pipeline, Stage, _comparison, check_bare_names, load_pipeline
from penchant.rewards import load_reward
from penchant.rewards.reward_model import PolicyText, rows_by_source
from penchant.runfolder import RunLock
from penchant.runs import Run
from penchant.runs.state import State, changes, model_folder
from penchant.training.loop import Loop
from penchant.types import TokenTree

TEXT = """\
output: {output}
defaults:
  model: {{path: some/model, dtype: fp32}}
  data: {{path: train.jsonl, validation_fraction: 0.1}}
stages:
  sft: {{loss: sft}}
  dpo:
    model: {{path: stage:sft}}
    loss:
      name: dpo
      {key}: 0.3
  judge: {{model: {{path: stage:dpo}}, algorithm: reward_model}}
  ppo: {{model: {{path: stage:sft@last}}, algorithm: {{name: ppo}}, reward: {{stage:judge: 1.0, words: -0.01}}}}
compare:
  models: [sft, dpo, ppo]
"""


def written(tmp_path: Path, text: str = TEXT, key: str = "beta") -> Path:
    path = tmp_path / "pipeline.yaml"
    path.write_text(text.format(output=tmp_path / "hh", key=key))
    return path


def refused(tmp_path: Path, old: str, new: str, *overrides: str) -> str:
    assert old in TEXT
    with pytest.raises(ConfigError) as error:
        load_pipeline(written(tmp_path, TEXT.replace(old, new)), overrides)
    return str(error.value).replace(f"{tmp_path}/", "")


# ---- the config -----------------------------------------------------------------------------------------------------


def test_stages_start_from_the_defaults_and_refer_to_each_other(tmp_path: Path) -> None:
    pipeline = load_pipeline(written(tmp_path), ["stages.dpo.loss.beta=0.5", "defaults.train.seed=7"])
    assert list(pipeline.stages) == ["sft", "dpo", "judge", "ppo"]
    dpo = pipeline.stages["dpo"]
    assert dpo.config.loss.components[0].params.beta == 0.5
    assert dpo.config.model.dtype == "fp32" and dpo.config.train.seed == 7
    assert dpo.config.output == str(tmp_path / "hh/dpo")
    assert [(r.stage, r.which, r.needs_full_model) for r in dpo.refs] == [("sft", None, True)]
    ppo = pipeline.stages["ppo"].resolved(lambda ref: f"/models/{ref.stage}/{ref.which}")
    assert ppo.model.path == "/models/sft/last"
    assert ppo.reward is not None and ppo.reward.terms == {"/models/judge/None": 1.0, "words": -0.01}
    assert [r.needs_full_model for r in pipeline.stages["ppo"].refs] == [True, False]
    assert pipeline.downstream(["dpo"]) == ["dpo", "judge", "ppo"]
    assert pipeline.needed("ppo") == ["sft", "dpo", "judge"]


def test_what_a_stage_inherits() -> None:
    defaults = {
        "model": {"path": "a", "init": "random", "tokenizer": "t", "dtype": "fp32"},
        "data": {"path": "d", "validation_fraction": 0.1},
        "loss": {"name": "dpo", "beta": 0.1},
        "reward": "words",
        "lora": {"r": 4},
    }
    own = {"model": {"path": "b"}, "data": {"validation_rows": 5}, "loss": {"name": "ipo"}, "lora": None}
    assert merge_settings(defaults, own) == {
        "model": {"path": "b", "dtype": "fp32"},  # with init: random for another model it would train from scratch
        "data": {"path": "d", "validation_rows": 5},
        "loss": {"name": "ipo"},
        "lora": None,
    }
    online = merge_settings(defaults, {"algorithm": {"name": "rloo"}})
    assert "loss" not in online and online["reward"] == "words"
    assert merge_settings({"algorithm": "rloo", "reward": "words"}, {"loss": "sft"}) == {"loss": "sft"}


@pytest.mark.parametrize(
    "old,new,expected",
    [
        ("{key}", "btea", 'pipeline.yaml:11: stages.dpo: unknown key "btea" in loss; did you mean "beta"?'),
        ("{key}: 0.3", "beta: yes", "pipeline.yaml:11: stages.dpo: loss.beta is 'yes'; give a number"),
        (
            "path: stage:sft}}\n",
            "path: stage:sfd}}\n",
            "pipeline.yaml:8: stages.dpo: there is no stage 'sfd'; did you mean \"sft\"?",
        ),
        (
            "path: stage:sft}}\n",
            "path: stage:ppo}}\n",
            "pipeline.yaml:8: stages.dpo and stages.ppo need each other: a cycle",
        ),
        (
            "sft: {{loss: sft}}",
            "sft: {{loss: sft, model: {{path: stage:dpo}}}}",
            "pipeline.yaml:6: stages.sft and stages.dpo need each other: a cycle",
        ),
        (
            "sft: {{loss: sft}}",
            "sft: {{loss: sft, model: {{path: stage:sft}}}}",
            "pipeline.yaml:6: stages.sft: it refers to itself",
        ),
        (
            "sft: {{loss: sft}}",
            "a: {{loss: sft, model: {{path: stage:sft}}}}\n  sft: {{loss: sft}}",
            "pipeline.yaml:6: stages.a: it needs 'sft', which stands after it; write sft before a",
        ),
        (
            "stage:sft@last",
            "stage:sft@first",
            "pipeline.yaml:13: stages.ppo: model.path 'stage:sft@first' is not a reference to a stage",
        ),
        (
            "stage:judge: 1.0",
            "stage:jugde: 1.0",
            "pipeline.yaml:13: stages.ppo: there is no stage 'jugde'; did you mean \"judge\"?",
        ),
        (
            "  sft: {{loss: sft}}",
            "  sf.t: {{loss: sft}}",
            "pipeline.yaml:6: stages.sf.t: not a name; use letters, digits, _ and -",
        ),
        (
            "  sft: {{loss: sft}}",
            "  sft: {{loss: sft, output: x}}",
            "pipeline.yaml:6: stages.sft.output is set; leave it out",
        ),
        (
            "[sft, dpo, ppo]",
            "[sft, dpoo]",
            "pipeline.yaml:15: compare: there is no stage 'dpoo'; did you mean \"dpo\"?",
        ),
        ("[sft, dpo, ppo]", "[sft]", "pipeline.yaml:15: compare.models: name at least two stages"),
        ("[sft, dpo, ppo]", "[sft, sft]", "pipeline.yaml:15: compare.models: sft is listed twice"),
        (
            "  models: [sft, dpo, ppo]",
            "  modles: [sft, dpo]",
            'unknown key "modles" in compare; did you mean "models"?',
        ),
        (
            "stage:judge: 1.0",
            "stage:sft: 1.0",
            "pipeline.yaml:13: stages.ppo: reward is stage:sft, which trains no reward model; there is stage:judge",
        ),
        (
            "{{stage:judge: 1.0, words: -0.01}}",
            "stage:late}}\n  late: {{algorithm: reward_model",
            "pipeline.yaml:13: stages.ppo: it needs 'late', which stands after it; write late before ppo",
        ),
        (
            "stage:sft@last",
            "stage:judge",
            "pipeline.yaml:13: stages.ppo: model.path is stage:judge, a reward model, which writes nothing",
        ),
        (
            "[sft, dpo, ppo]",
            "[sft, judge]",
            "pipeline.yaml:15: compare.models: judge is a reward model, which writes nothing",
        ),
        (
            "[sft, dpo, ppo]",
            "[sft, dpo]\n  reward: stage:sft",
            "pipeline.yaml:16: compare.reward is stage:sft, which trains no reward model; there is stage:judge",
        ),
        (
            "[sft, dpo, ppo]",
            "[sft, dpo]\n  reward: words\n  also: [stage:jugde]",
            "pipeline.yaml:17: compare: there is no stage 'jugde'; did you mean \"judge\"?",
        ),
        (
            "{{stage:judge: 1.0, words: -0.01}}",
            "judge",
            "pipeline.yaml:13: stages.ppo: reward is 'judge', a stage's bare name; write stage:judge",
        ),
        (
            "[sft, dpo, ppo]",
            "[sft, dpo]\n  reward: {{stage:judge: 1.0, device: tpu}}",
            "pipeline.yaml:16: compare.reward: device: is 'tpu'; give auto, cpu, cuda",
        ),
        (
            "[sft, dpo, ppo]",
            "[sft, dpo]\n  reward: {{words: much}}",
            "pipeline.yaml:16: compare.reward: words is 'much'; give each reward a number",
        ),
        ("[sft, dpo, ppo]", "[sft, dpo]\n  also: [words]", "pipeline.yaml:16: compare: also is set without a reward"),
        (
            "[sft, dpo, ppo]",
            "[sft, dpo]\n  reward: words\n  also: [words]",
            "pipeline.yaml:17: compare: also names words twice, or as reward too",
        ),
        ("compare:", "comprae:", 'pipeline.yaml:14: unknown key "comprae" at the top level; did you mean "compare"?'),
        (
            "compare:",
            "train: {{lr: 1e-4}}\ncompare:",
            'pipeline.yaml:14: unknown key "train" at the top level; it goes into "defaults"',
        ),
        ("output: {output}\n", "", "pipeline.yaml: output is missing"),
        (
            "{{path: train.jsonl, validation_fraction: 0.1}}",
            "{{validation_fraction: 0.1}}",
            "stages.sft: data.path is missing",
        ),
        ("loss: sft}}", "loss: sft, train: {{learning_rate: 1}}}}", 'did you mean "train.lr"?'),
    ],
)
def test_mistakes_are_met_with_their_line(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert expected in refused(tmp_path, old, new)


@pytest.mark.parametrize(
    "override,expected",
    [
        ("stages.dop.loss.beta=1", "command line: there is no stage 'dop'; did you mean \"dpo\"?"),
        ("stages.dpo.loss.btea=1", 'command line: stages.dpo: unknown key "btea" in loss; did you mean "beta"?'),
        ("stages.dpo.train.lr=true", "command line: stages.dpo: train.lr is true (a boolean)"),
    ],
)
def test_mistaken_overrides(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in refused(tmp_path, "sft", "sft", override)


def test_another_loss_on_the_command_line_starts_from_its_own_defaults(tmp_path: Path) -> None:
    pipeline = load_pipeline(written(tmp_path), ["stages.dpo.loss.name=simpo"])
    assert pipeline.stages["dpo"].config.loss.components[0].params.beta != 0.3


def test_a_reward_model_is_not_compared() -> None:
    base: dict[str, Any] = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}}
    judge, sft = ({**base, "algorithm": {"name": "reward_model"}}, {**base, "loss": "sft"})
    stages = {n: Stage(n, v, {}, "p.yaml:3", Path(n)) for n, v in (("sft", sft), ("judge", judge))}
    with pytest.raises(ConfigError, match="judge is a reward model, which writes nothing"):
        _comparison({"compare": {"models": ["sft", "judge"]}}, stages, {}, "p.yaml")
    compared = {"models": ["sft", "sft@last"], "reward": {"stage:judge": 1.0}}
    made = _comparison({"compare": compared}, stages, {}, "p.yaml")
    assert made is not None and made.upstream == ("sft", "judge")
    assert made.reward(lambda ref: f"models/{ref.stage}") == {"models/judge": 1.0}


# ---- running --------------------------------------------------------------------------------------------------------


def base_in(folder: Path) -> dict[str, Any]:
    reward = folder / "rewards.py"
    reward.write_text(
        "def vowels(prompts, completions):\n    return [sum(c in 'aeiou' for c in t) for t in completions]\n"
    )
    return {
        "output": str(folder / "hh"),
        "defaults": {
            "model": {"path": tiny_model_folder(folder / "model"), "dtype": "fp32"},
            "data": {
                "path": write_jsonl(folder / "pairs.jsonl", polite_rows(36)),
                "validation_rows": 12,
                "max_length": 96,
            },
            "train": {"batch_size": 6, "lr": 3e-3, "tokens_per_step": 900, "warmup_fraction": 0.0},
            "evaluation": {"samples": 0, "kl_prompts": 0},
            "checkpoint": {"every": 1, "keep_last": 9},
        },
        "stages": {
            "sft": {"loss": "sft"},
            "dpo": {"model": {"path": "stage:sft"}, "loss": {"name": "dpo", "beta": 0.3}},
            "rloo": {
                "model": {"path": "stage:sft"},
                "algorithm": {"name": "rloo", "samples": 2, "max_new_tokens": 6, "epochs": 1},
                "reward": f"{reward}:vowels",
                "train": {"max_steps": 2},
            },
        },
        "compare": {"models": ["sft", "dpo"], "reward": f"{reward}:vowels", "prompts": 10, "max_new_tokens": 6},
    }


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    return base_in(tmp_path)


def run(base: dict[str, Any], *overrides: str, **options: Any) -> Any:
    return api.pipeline(base, *overrides, quiet=True, **options)


def plan(base: dict[str, Any], *overrides: str, **options: Any) -> dict[str, str]:
    lines = api.pipeline_plan(base, *overrides, **options).splitlines()
    return {line.split()[1]: " ".join(line.split()[2:]) for line in lines}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the names of the stages whose training loop is entered."""
    names: list[str] = []
    real = Loop.run
    monkeypatch.setattr(Loop, "run", lambda self: (names.append(self.folder.name), real(self))[1])
    return names


def state(base: dict[str, Any]) -> State:
    return State.read(Path(base["output"]))


class First(NamedTuple):
    """A pipeline that was planned and run once, read-only: its output text, and a copy of its output folder."""

    folder: Path
    plan: dict[str, str]
    written_by_the_plan: list[Path]
    trained: list[str]
    result: Any
    output: Path


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> First:
    folder = tmp_path_factory.mktemp("pipeline")
    base, output = base_in(folder), folder / "hh"
    before = plan(base)
    written = list(output.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        names = trained(patch)
        result = run(base)
    return First(folder, before, written, names, result, output.rename(folder / "made"))


@pytest.fixture
def done(first: First) -> dict[str, Any]:
    """`base` after a complete run: the first pipeline's output, copied to its original path because runs store model paths."""
    base = base_in(first.folder)
    shutil.rmtree(base["output"], ignore_errors=True)
    shutil.copytree(first.output, base["output"])
    return base


def forget(base: dict[str, Any], name: str) -> None:
    """Reset a stage as if it had not been started."""
    shutil.rmtree(Path(base["output"]) / name)
    now = state(base)
    del now.stages[name]
    now.save()


def test_all_of_it_then_nothing_twice(first: First, done: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert first.plan == {
        "sft": "to run: not started",
        "dpo": "to run: after sft",
        "rloo": "to run: after sft",
        "compare": "to run",
    }
    assert first.written_by_the_plan == []
    assert first.trained == ["sft", "dpo", "rloo"]
    base, result, output = done, first.result, Path(done["output"])
    config = yaml.safe_load((output / "dpo/config.resolved.yaml").read_text())
    assert config["model"]["path"] == str(result.models["sft"])
    assert {s["state"] for s in state(base).stages.values()} == {"finished"}
    assert state(base).pipeline == {"stages": ["sft", "dpo", "rloo"]}
    assert result.outcome.done and list(result.outcome.models) == ["sft", "dpo"]
    rows = [json.loads(x) for x in (output / "comparison.jsonl").read_text().splitlines()]
    held = {r["prompt"] for r in rows}
    assert len(rows) == len(held) == 10 and all(set(r["completions"]) == {"sft", "dpo"} for r in rows)
    said = result.to_text()
    assert "held-out preference accuracy" in said and "KL(policy || sft)" in said

    assert plan(base) == {
        "sft": "unchanged: 4 steps",
        "dpo": "unchanged: 4 steps",
        "rloo": "unchanged: 2 steps",
        "compare": "unchanged",
    }
    names = trained(monkeypatch)
    again = run(base)
    assert names == []
    assert not again.outcome.done
    assert again.outcome.to_text() == result.outcome.to_text()
    # with other settings the comparison is repeated, and nothing is trained
    more = run(base, "compare.samples=2")
    assert more.outcome.done and names == []
    (output / "comparison.json").write_text("{}")
    assert run(base, "compare.samples=2").outcome.done


def test_the_best_checkpoint_is_what_a_reference_means(base: dict[str, Any], tmp_path: Path) -> None:
    base |= {"compare": None}
    del base["stages"]["rloo"]
    base["defaults"]["evaluation"]["every"] = 1
    base["stages"]["sft"]["checkpoint"] = {"mode": "max"}  # the loss falls, so its maximum is at the first step
    base["stages"]["dpo"]["train"] = {"max_steps": 1}
    run(base)
    sft = tmp_path / "hh/sft"
    best = json.loads((sft / "checkpoints/step-4/state.json").read_text())["best_step"]
    assert best == 1
    used = yaml.safe_load((tmp_path / "hh/dpo/config.resolved.yaml").read_text())["model"]["path"]
    assert used == str(sft / f"checkpoints/step-{best}/model") == str(model_folder(sft, "best"))
    assert model_folder(sft, "last").parent.name == "step-4"
    assert model_folder(sft, "2").parent.name == "step-2"
    with pytest.raises(CheckpointError, match=r"there are step-1, step-2"):
        model_folder(sft, "77")


@pytest.mark.parametrize("how", ["signal", "crash"])
def test_an_interrupted_stage_is_resumed_and_ends_bit_for_bit_the_same(
    first: First, done: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    base = done | {"compare": None}
    del base["stages"]["rloo"]
    forget(base, "dpo")
    real = Loop._after_step

    def interrupt(self: Loop, *args: Any) -> None:
        if self.folder.name == "dpo" and self.state.step == 2:
            if how == "crash":
                raise MemoryError  # nothing is saved after step 1
            os.kill(os.getpid(), signal.SIGINT)
        real(self, *args)

    path = tmp_path / "pipeline.json.yaml"
    path.write_text(json.dumps(base))
    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_after_step", interrupt)
        if how == "signal":
            assert main(["pipeline", str(path), "--quiet"]) == 4
        else:
            with pytest.raises(MemoryError):
                run(base)
    assert state(base).stages["dpo"]["state"] == "stopped"
    step = 2 if how == "signal" else 1
    assert plan(base) == {"sft": "unchanged: 4 steps", "dpo": f"to continue: interrupted at step {step}"}
    assert main(["pipeline", str(path), "--quiet"]) == 0
    one, other = Path(base["output"]) / "dpo", first.output / "dpo"
    assert weights(model_folder(one, "last")) == weights(model_folder(other, "last"))
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert first.result.models["dpo"].parent.name == model_folder(one, None).parent.name


def test_a_stage_that_was_killed_is_not_done(done: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between its last checkpoint and the end, which only its record shows."""
    base = done | {"compare": None}
    now = state(base)
    now.stages["sft"]["state"] = "running"  # what a kill -9 leaves
    now.save()
    assert plan(base)["sft"] == "to continue: interrupted at step 4"
    names = trained(monkeypatch)
    run(base, only="sft")
    assert names == ["sft"]
    assert plan(base)["sft"] == "unchanged: 4 steps"


def other_weights(base: dict[str, Any], tmp_path: Path) -> None:
    """Change the upstream model at the same path."""
    from safetensors.torch import load_file, save_file

    path = model_folder(tmp_path / "hh/sft", None) / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def other_start(base: dict[str, Any], tmp_path: Path) -> None:
    tiny_model_folder(tmp_path / "model", seed=1)


def other_rows(base: dict[str, Any], tmp_path: Path) -> None:
    rows = polite_rows(36)
    rows[0]["chosen"] += "!"
    write_jsonl(tmp_path / "pairs.jsonl", rows)


def other_reward(base: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    path.write_text(path.read_text().replace("aeiou", "aeiouy"))


@pytest.mark.parametrize(
    "change,stage,said",
    [
        (other_weights, "sft", r"its own model \(step-4\) was changed after training"),
        (other_start, "sft", r"the model of model.path has changed \(\w{12} -> \w{12}\)"),
        (other_rows, "sft", r"the (training|held-out) rows have changed"),
        (other_reward, "rloo", r"rewards.py has changed"),
    ],
)
def test_a_changed_input_is_refused_with_its_name_and_nothing_is_overwritten(
    first: First,
    done: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any], Path], None],
    stage: str,
    said: str,
) -> None:
    base, output = done | {"compare": None}, Path(done["output"])
    change(base, first.folder)
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file() and p.name != ".lock"}
    names = trained(monkeypatch)
    assert re.search(said, plan(base)[stage])
    with pytest.raises(CheckpointError, match=said) as error:
        run(base)
    assert f"--redo {stage}" in str(error.value) and names == []
    assert before == {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file() and p.name != ".lock"}


def test_redo_trains_a_stage_and_all_that_use_it_anew_and_keeps_the_old(
    done: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, output = done | {"compare": None}, Path(done["output"])
    base["stages"]["other"] = {"loss": "sft", "train": {"max_steps": 1}}
    del base["stages"]["rloo"]
    old = run(base)
    old_weights = {name: weights(folder) for name, folder in old.models.items()}
    changed = "stages.sft.train.lr=1e-3"
    assert plan(base, changed)["sft"] == "CHANGED: train.lr: 0.003 -> 0.001"
    assert plan(base, changed)["dpo"] == "to be checked again: after sft"
    assert "to redo" in plan(base, changed, redo="sft")["dpo"]
    names = trained(monkeypatch)
    new = run(base, changed, redo=["sft"])
    assert names == ["sft", "dpo"]
    for name in ("sft", "dpo"):
        assert weights(model_folder(output / f"{name}.1", None)) == old_weights[name] != weights(new.models[name])
    assert not (output / "other.1").exists()
    # the old run still evaluates with the old model it started from
    kept = yaml.safe_load((output / "dpo.1/config.resolved.yaml").read_text())
    assert kept["output"] == str(output / "dpo.1")
    assert kept["model"]["path"].startswith(f"{output}/sft.1/")
    start = api.evaluate(output / "dpo.1", quiet=True, step="0")
    assert start["eval/logps/chosen"] == pytest.approx(
        next(json.loads(x) for x in (output / "dpo.1/metrics.jsonl").open())["eval/logps/chosen"], rel=1e-5
    )
    assert plan(base, changed)["dpo"] == "unchanged: 4 steps"


def test_an_upstream_that_comes_out_differently_makes_a_finished_stage_stale(done: dict[str, Any]) -> None:
    base, output = done | {"compare": None}, Path(done["output"])
    del base["stages"]["rloo"]
    shutil.rmtree(output / "sft")
    assert plan(base) == {"sft": "to run: its checkpoints are gone", "dpo": "to be checked again: after sft"}
    run(base)  # training is deterministic, so dpo's input is unchanged
    assert plan(base)["dpo"] == "unchanged: 4 steps"
    shutil.rmtree(output / "sft")
    with pytest.raises(CheckpointError, match=r"stages.dpo .* the model of stage:sft has changed .*--redo dpo"):
        run(base, "stages.sft.train.lr=1e-3")


def test_only_one_stage(base: dict[str, Any], tmp_path: Path) -> None:
    base["defaults"]["train"]["max_steps"] = 1
    with pytest.raises(CheckpointError, match=r"stages.dpo needs sft, which is not finished; run --only sft first"):
        run(base, only="dpo")
    run(base, only="sft")
    result = run(base, only="dpo")
    assert list(result.done) == ["dpo"] and result.outcome is None
    assert not (tmp_path / "hh/rloo").exists()
    with pytest.raises(ConfigError, match=r"--only: there is no stage 'dop'; did you mean \"dpo\"\?"):
        run(base, only="dop")
    with pytest.raises(ConfigError, match=r"--redo: there is no stage 'dop'"):
        run(base, redo=["dop"])


@pytest.mark.parametrize("output", ["hh/sft", "hh"])
def test_a_plan_notices_a_folder_that_is_a_file(output: str, base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "hh").mkdir()
    (tmp_path / "hh/sft").write_text("")
    said = set[str]()
    for command in (plan, run):
        with pytest.raises(CheckpointError, match=r"hh/sft: output is a file") as refused:
            command(base, f"output={tmp_path / output}")
        said.add(str(refused.value))
    assert len(said) == 1


def test_a_folder_that_is_not_the_pipelines_is_left_alone(base: dict[str, Any], tmp_path: Path) -> None:
    api.train({**base["defaults"], "loss": "sft", "output": str(tmp_path / "hh/sft")}, "train.max_steps=1", quiet=True)
    with pytest.raises(CheckpointError, match="holds a run that this pipeline did not make"):
        run(base)
    with RunLock(tmp_path / "hh"), pytest.raises(CheckpointError, match="another run holds"):
        run(base)
    (tmp_path / "hh/pipeline.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(base)


@pytest.mark.parametrize(
    "override,kind,said",
    [
        ("stages.rloo.reward=nice", ConfigError, r"stages.rloo: reward 'nice' is not a reward"),
        ("compare.reward=nice", ConfigError, r"compare.reward: 'nice' is not a reward"),
        ("compare.also=[sentiment,nice]", ConfigError, r"compare.also: 'nice' is not a reward"),
        ("stages.dpo.data.path=missing.jsonl", DataError, r"stages.dpo: .*no such"),
        ("stages.sft.model.path=./missing", ModelError, r"stages.sft: no such folder"),
        ("defaults.data.validation_rows=null", ConfigError, r"compare: no stage holds out rows"),
    ],
)
def test_everything_is_checked_before_anything_trains(
    base: dict[str, Any], override: str, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        run(base, override)
    assert not Path(base["output"]).exists()


def test_an_error_while_training_names_stage_and_line(done: dict[str, Any], tmp_path: Path) -> None:
    base = done
    forget(base, "dpo")
    base["stages"]["dpo"]["data"] = {"max_length": 4096}
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(base, sort_keys=False))
    line = 1 + next(i for i, x in enumerate(path.read_text().splitlines()) if "4096" in x)
    with pytest.raises(ConfigError, match=rf"pipeline.yaml:{line}: stages.dpo: data.max_length .*context of 256"):
        api.pipeline(path, quiet=True)
    assert state(base).stages["sft"]["state"] == "finished" and state(base).stages["dpo"]["state"] == "stopped"


def test_a_stage_that_stops_itself_is_not_done(done: dict[str, Any]) -> None:
    forget(done, "dpo")
    with pytest.raises(TrainingStopped):
        run(done, "stages.dpo.train.logp_floor=-0.001", only=None)
    assert state(done).stages["dpo"]["state"] == "stopped"


def test_the_comparison_keeps_clear_of_prompts_that_a_stage_trained_on(base: dict[str, Any], tmp_path: Path) -> None:
    base["stages"] = {"sft": {"loss": "sft"}, "dpo": {"loss": "dpo", "train": {"max_steps": 1, "seed": 5}}}
    base["stages"]["sft"]["train"] = {"max_steps": 1}
    result = run(base)  # another seed holds out other prompts
    figures = json.loads((tmp_path / "hh/comparison.json").read_text())
    assert figures["left_out"] > 0 and figures["left_out"] + figures["prompts"] == 12
    compared = {json.loads(x)["prompt"] for x in (tmp_path / "hh/comparison.jsonl").open()}
    for stage in load_pipeline(base).stages.values():
        assert not compared & {t.prompt for t in Run(stage.config, quiet=True).rows.datasets[0].trees}
    assert result.outcome is not None


@pytest.mark.slow
def test_a_lora_stage_is_merged_once_for_the_stage_that_needs_a_whole_model(
    base: dict[str, Any], tmp_path: Path
) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    del base["stages"]["rloo"]
    base["stages"]["sft"] |= {"lora": {"r": 4, "alpha": 32}, "train": {"lr": 5e-2}}
    base["stages"]["dpo"]["train"] = {"max_steps": 1}
    result = run(base)
    made = tmp_path / "hh/sft/merged/step-4"
    used = yaml.safe_load((tmp_path / "hh/dpo/config.resolved.yaml").read_text())["model"]["path"]
    assert used == str(made)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        one = AutoPeftModelForCausalLM.from_pretrained(result.models["sft"])(input_ids=ids).logits
        other = AutoModelForCausalLM.from_pretrained(made)(input_ids=ids).logits
        start = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(input_ids=ids).logits
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert float((other - start).abs().max()) > 0.1
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert plan(base)["dpo"] == "unchanged: 1 steps"
    base["stages"]["ipo"] = {**base["stages"]["dpo"], "loss": "ipo"}
    run(base)
    assert (made / "model.safetensors").stat().st_mtime_ns == before
    (made / "model.safetensors").write_bytes(b"torn")  # rebuilt from the adapter, not trusted
    base["stages"]["slic"] = {**base["stages"]["dpo"], "loss": "slic"}
    run(base)
    assert (made / "model.safetensors").stat().st_size > 1000


def test_a_stage_trains_another_ones_adapter_on(base: dict[str, Any], tmp_path: Path) -> None:
    base |= {"compare": None}
    del base["stages"]["rloo"]
    base["defaults"]["train"]["max_steps"] = 1
    base["stages"]["dpo"]["model"] = {"path": str(tmp_path / "model"), "adapter": "stage:sft"}
    with pytest.raises(ConfigError, match="stage:sft, which trains no adapter"):
        run(base)
    base["stages"]["sft"]["lora"] = {"r": 2}
    result = run(base)
    assert (result.models["dpo"] / "adapter_config.json").exists() and not (tmp_path / "hh/sft/merged").exists()
    used = yaml.safe_load((tmp_path / "hh/dpo/config.resolved.yaml").read_text())
    assert used["model"]["adapter"] == str(result.models["sft"]) and used["lora"]["r"] == 2
    assert plan(base) == {"sft": "unchanged: 1 steps", "dpo": "unchanged: 1 steps"}


def test_a_last_adapter_needs_no_merging(base: dict[str, Any], tmp_path: Path) -> None:
    del base["stages"]["rloo"]
    base["stages"]["sft"]["train"] = {"max_steps": 1}
    base["stages"]["dpo"] |= {"lora": {"r": 4}, "train": {"max_steps": 1}}
    result = run(base)
    assert (result.models["dpo"] / "adapter_config.json").exists() and result.outcome.models["dpo"]["kl"] is not None
    assert not (tmp_path / "hh/dpo/merged").exists()


def test_a_setting_that_an_older_version_did_not_know_counts_as_its_default() -> None:
    new = {"config": {"train": {"lr": 0.1, "shuffle": True}}, "data": {}, "upstream": {}, "models": {}, "rewards": {}}
    old = {**new, "config": {"train": {"lr": 0.1}}}
    assert changes(old, new) == []
    assert changes(old, {**new, "config": {"train": {"lr": 0.1, "shuffle": False}}}) == ["train.shuffle: true -> false"]
    assert changes({**old, "rewards": {"r.py": "a" * 64}}, new) == ["r.py has changed (aaaaaaaaaaaa -> none)"]


def test_the_command_line(base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del base["stages"]["rloo"]
    base["defaults"]["train"]["max_steps"] = 1
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(base, sort_keys=False))
    assert main(["pipeline", str(path), "stages.dpo.loss.beta=0.2", "--plan"]) == 0
    assert "dpo      to run: after sft" in capsys.readouterr().out
    assert main(["pipeline", str(path), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "1 steps" in out and "win rate against sft" in out and "clear winner" in out
    assert main(["pipeline", str(path), "--quiet", "stages.dpo.loss.beta=0.2"]) == 2
    assert "loss.beta: 0.3 -> 0.2; --redo dpo" in capsys.readouterr().err
    assert main(["pipeline", str(path), "stages.dpo.loss.beta=0.2", "--redo", "dpo", "--quiet"]) == 0


def test_pipelines_are_checked_without_a_machine(tmp_path: Path) -> None:
    assert isinstance(load_pipeline(written(tmp_path)), Pipeline)


# ---- the classic pipeline, with a trained reward model ------------------------------------------------------------------


@pytest.fixture
def classical(base: dict[str, Any]) -> dict[str, Any]:
    """SFT -> reward model -> PPO, and SFT -> DPO, compared by the reward model and by the true reward."""
    vowels = base["compare"]["reward"]
    ppo = {"name": "ppo", "value": "separate", "value_init": "reward", "max_new_tokens": 6, "epochs": 1}
    base["defaults"]["train"] |= {"max_steps": 2}
    base["stages"] = {
        "sft": {"loss": "sft"},
        "reward": {"model": {"path": "stage:sft"}, "algorithm": {"name": "reward_model", "centring": 0.01}},
        "ppo": {"model": {"path": "stage:sft"}, "algorithm": ppo, "reward": {"stage:reward": 0.5, "words": 0.01}},
        "dpo": {"model": {"path": "stage:sft"}, "loss": "dpo"},
    }
    base["compare"] |= {"models": ["sft", "ppo", "dpo"], "reward": "stage:reward", "also": [vowels]}
    return base


@pytest.fixture
def written_by(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[TokenTree]]:
    """Collects the tokens that each compared model generates."""
    from penchant.compare import measured
    from penchant.compare import models as compare_models

    found: dict[str, list[TokenTree]] = {}
    real_write, real_measure = measured.sample_completions, measured.measure

    def measure(name: str, *args: Any) -> Any:
        def recording(*given: Any, **options: Any) -> Any:
            made = real_write(*given, **options)
            found[name] = made.trees
            return made

        with monkeypatch.context() as patched:
            patched.setattr(measured, "sample_completions", recording)
            return real_measure(name, *args)

    monkeypatch.setattr(compare_models, "measure", measure)
    return found


def said_of(base: dict[str, Any], name: str) -> list[float]:
    """The rewards of a model's completions in the comparison's file."""
    rows = [json.loads(x) for x in (Path(base["output"]) / "comparison.jsonl").read_text().splitlines()]
    return [r["completions"][name]["reward"] for r in rows]


def directly(base: dict[str, Any], reward: Path, trees: list[TokenTree]) -> list[float]:
    """Rewards from the reward model itself, one prompt and completion at a time."""
    held_out = Run(load_pipeline(base).stages["sft"].config, quiet=True).rows.datasets[1]
    assert held_out is not None
    tokenizer = load_tokenizer(str(base["defaults"]["model"]["path"]))
    prompts = {t.source: t.prompt for t in held_out.trees}
    judge = load_reward(str(reward), PolicyText(tokenizer, "auto", rows_by_source(held_out.trees)))
    texts = [tokenizer.decode(t.completion_ids[0].tolist(), skip_special_tokens=True) for t in trees]
    return [float(judge([str(prompts[t.source])], [s], [t])[0]) for t, s in zip(trees, texts, strict=True)]


def strangers(reward: Path, trees: list[TokenTree]) -> list[float]:
    """Rewards of the policy's own tokens, computed with transformers."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(reward).eval()
    rows = [torch.tensor([[*t.prompt_ids.tolist(), *t.completion_ids[0].tolist()]]) for t in trees]
    with torch.no_grad():
        return [float(model(input_ids=row).logits[0, 0]) for row in rows]


def test_the_classical_pipeline(
    classical: dict[str, Any], written_by: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = trained(monkeypatch)
    result = run(classical)
    assert names == ["sft", "reward", "ppo", "dpo"]
    used = yaml.safe_load((tmp_path / "hh/ppo/config.resolved.yaml").read_text())
    assert used["reward"] == {str(result.models["reward"]): 0.5, "words": 0.01}
    # PPO's value model started from the reward model: value_init=reward is refused if that is impossible
    figures = result.outcome.models
    assert all("reward/ci" in m and len(m["also"]) == 1 for m in figures.values())
    assert all(figures[n]["kl"] != 0 and "kl/ci" in figures[n] and "win_rate/ci" in figures[n] for n in ("ppo", "dpo"))
    rows = [json.loads(x) for x in (tmp_path / "hh/comparison.jsonl").read_text().splitlines()]
    for name in figures:
        said, reward = said_of(classical, name), result.models["reward"]
        assert len(said) == 10 and np.std(said) > 1e-3
        assert said == pytest.approx(directly(classical, reward, written_by[name]), abs=1e-5)
        assert said == pytest.approx(strangers(reward, written_by[name]), abs=1e-5)
        (truth,) = figures[name]["also"].values()
        vowels = [sum(c in "aeiou" for c in r["completions"][name]["text"]) for r in rows]
        assert truth["reward"] == pytest.approx(np.mean(vowels))
        assert [next(iter(r["completions"][name]["also"].values())) for r in rows] == vowels
    text = result.outcome.to_text()
    assert f"reward, by {classical['compare']['also'][0]}" in text and "By " in text

    assert set(plan(classical).values()) == {"unchanged: 2 steps", "unchanged"}
    assert not run(classical).outcome.done and len(names) == 4
    # with another reward model, only the stages that use it are stale
    changed = "stages.reward.algorithm.centring=0.5"
    assert plan(classical, changed)["reward"] == "CHANGED: algorithm.centring: 0.01 -> 0.5"
    with pytest.raises(CheckpointError, match=r"stages.reward was already run, .*with other inputs"):
        run(classical, changed)
    run(classical, changed, redo=["reward"])
    assert names[4:] == ["reward", "ppo"]
    # the same if the reward model was retrained outside the pipeline
    shutil.rmtree(tmp_path / "hh/reward")
    with pytest.raises(CheckpointError, match=r"stages.ppo .* the model of stage:reward has changed"):
        run(classical, "stages.reward.algorithm.centring=0.1")
    assert names[6:] == ["reward"]
    assert plan(classical, "stages.reward.algorithm.centring=0.1")["dpo"] == "unchanged: 2 steps"


def test_a_lora_reward_model_judges_as_it_was_merged_and_is_trained_further(
    classical: dict[str, Any], written_by: dict[str, Any], tmp_path: Path
) -> None:
    stages = classical["stages"]
    stages["reward"] |= {"lora": {"r": 4, "alpha": 32}, "train": {"lr": 5e-2}}
    further = {"model": {"path": "stage:reward"}, "algorithm": "reward_model", "train": {"max_steps": 1, "lr": 1e-9}}
    stages["ppo"] |= {"reward": "stage:more"}
    classical["stages"] = {"sft": stages["sft"], "reward": stages["reward"], "more": further, "ppo": stages["ppo"]}
    classical["compare"] |= {"models": ["sft", "ppo"]}
    result = run(classical)
    folder = result.models["reward"]
    assert (folder / "adapter").is_dir()
    used = yaml.safe_load((tmp_path / "hh/more/config.resolved.yaml").read_text())["model"]["path"]
    assert used == str(folder)  # no merging, since the folder holds the whole model
    said = said_of(classical, "ppo")
    assert said == pytest.approx(directly(classical, folder, written_by["ppo"]), abs=1e-5)
    assert said == pytest.approx(strangers(folder, written_by["ppo"]), abs=1e-4)
    # it continues from the trained reward model including its head, so it starts where the other ended
    before, after = ([json.loads(x) for x in (tmp_path / f"hh/{n}/metrics.jsonl").open()] for n in ("reward", "more"))
    end = [m for m in before if "eval/loss" in m][-1]  # the only one with a checkpoint, so the best too
    start = next(m for m in after if "eval/loss" in m)
    for metric in ("eval/rewards/margins", "eval/rewards/chosen", "eval/rewards/rejected"):
        assert start[metric] == pytest.approx(end[metric], abs=1e-5)


@pytest.mark.slow
def test_an_encoder_judges_an_online_stage(
    classical: dict[str, Any], written_by: dict[str, Any], tmp_path: Path
) -> None:
    encoder = encoder_folder(tmp_path / "encoder")
    stages = classical["stages"]
    judge = {"model": {"path": encoder}, "algorithm": "reward_model"}
    rloo = {"name": "rloo", "samples": 2, "max_new_tokens": 6}
    stages |= {"reward": judge, "rloo": {**stages["ppo"], "algorithm": rloo, "reward": "stage:reward"}}
    del stages["ppo"], stages["dpo"]
    classical["compare"] |= {"models": ["sft", "rloo"]}
    result = run(classical)
    said = said_of(classical, "rloo")
    assert np.std(said) > 1e-3
    assert said == pytest.approx(directly(classical, result.models["reward"], written_by["rloo"]), abs=1e-5)
    # an unsupported use of an encoder is reported with the stage's name, before the stage writes anything
    stages["ppo"] = {**stages["rloo"], "algorithm": {"name": "ppo", "value": "separate", "value_init": "reward"}}
    with pytest.raises(
        ConfigError, match=r"stages.ppo: algorithm.value_init is reward, but the reward model is an encoder"
    ):
        run(classical)


def test_a_folder_that_is_no_reward_model_is_met_before_anything_trains(base: dict[str, Any], tmp_path: Path) -> None:
    other = tiny_model_folder(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"stages.rloo: reward .*other is not a reward model \(LlamaForCausalLM\)"):
        run(base, f"stages.rloo.reward={other}")
    with pytest.raises(ConfigError, match=r"compare.reward: .*other is not a reward model"):
        run(base, f"compare.reward={other}")
    with pytest.raises(ConfigError, match=r"compare.also: 'nicer' is not a reward"):
        run(base, "compare.also=[nicer]")
    assert not Path(base["output"]).exists()


def test_a_stages_name_in_a_list_of_rewards() -> None:
    stages: Any = {"judge": None}
    check_bare_names(["words", {"overlong": {"max": 9}}], stages, "here", "reward")
    for reward in ("judge", ["words", "judge"], [{"judge": 2.0}], {"judge": 1.0}):
        with pytest.raises(ConfigError, match="write stage:judge"):
            check_bare_names(reward, stages, "here", "reward")
