"""Whole runs of two processes: the same results as with one, and run folders that all commands can read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import encoder_folder
from tiny import page_code, polite_rows, tiny_model_folder, write_jsonl
from worlds import in_world

from penchant import api
from penchant.config import config_from_mapping
from penchant.config.launching import check_launch
from penchant.distributed.world import World
from penchant.errors import ConfigError
from penchant.runs import parts
from penchant.runs.parts import check_offload

PLAIN: dict[str, Any] = {
    "loss": {"name": "dpo"},
    "train": {"max_steps": 3, "batch_size": 6, "tokens_per_step": 220, "lr": 1e-3, "epochs": 2.0},
    "evaluation": {"every": 2, "kl_prompts": 2, "samples": 1, "sample_tokens": 5},
    "checkpoint": {"every": 2, "keep_last": 3},
}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
ALGORITHM = {"loss": None, "algorithm": {"name": "reward_model"}}
ONLINE = {"loss": None, "reward": "words"}
RUNS: dict[str, dict[str, Any]] = {
    # its reference is computed and read by both; the reward of its completions is requested by one
    "dpo": {"evaluation": {**PLAIN["evaluation"], "reward": "ROOT/rewards.py:length"}},
    "lora": {"lora": {**LORA, "dora": True}, "reference": {"kind": "adapter"}},
    "frozen": {"reference": {"kind": "frozen", "ema": 0.5}, "model": {"dtype": "bf16"}},
    "ppo": {**ONLINE, "algorithm": {"name": "ppo", "value": "separate", "minibatches": 2, "max_new_tokens": 8}},
    "sft": {"loss": {"name": "sft"}, "train": {**PLAIN["train"], "gradient_checkpointing": True}},
    "rloo": {**ONLINE, "algorithm": {"name": "rloo", "samples": 3, "max_new_tokens": 8}},
    "online-dpo": {**ONLINE, "algorithm": {"name": "online_dpo", "samples": 3, "max_new_tokens": 8}},
    "grpo": {
        **ONLINE,
        "algorithm": {"name": "grpo", "samples": 3, "max_new_tokens": 8, "minibatches": 2},
        "lora": LORA,
    },
    "reward": ALGORITHM,
    "reward-lora": {**ALGORITHM, "lora": LORA},
    "encoder": {**ALGORITHM, "model": {"path": "ROOT/encoder"}},
    "own": {"loss": None, "algorithm": {"name": "ROOT/own.py:Fading", "push": 0.3}},
    "half-file": {"model": {"path": "ROOT/half"}, "lora": LORA},  # in bf16, for a run in fp32
    "begun": {"lora": LORA},
    "adapter": {"lora": LORA, "model": {"adapter": "ROOT/one-begun/checkpoints/step-3/model"}},
    "two-rewards": {
        "loss": None,
        "reward": {"words": 1.0, "ROOT/one-reward-lora": 0.5},
        "algorithm": {"name": "rloo", "samples": 2, "max_new_tokens": 8},
    },
}


TOLERANCE = {"frozen": 2e-2, "encoder": 1e-3}  # of weights, for bf16, and for Adam on nearly zero gradients
RESUMED = ("frozen", "grpo")  # bf16 compute with fp32 shards; rollouts used by two steps
BY_DEFAULT = ("dpo", "frozen", "reward", "ppo")
REWARD = """
import os
from pathlib import Path

def length(prompts, completions):
    with open(Path(__file__).with_name("asked"), "a") as file:
        print(os.environ.get("RANK", "alone"), len(completions), file=file)
    return [float(len(c)) for c in completions]
"""


def config(root: Path, name: str, tag: str) -> dict[str, Any]:
    values = {
        **PLAIN,
        "data": {"path": str(root / "pairs.jsonl"), "validation_rows": 6, "template": "plain"},
        **RUNS[name],
        "output": str(root / f"{tag}-{name}"),
    }
    values["model"] = {"path": str(root / "model"), "dtype": "fp32", "kernels": "off", **values.get("model", {})}
    told = json.dumps({key: value for key, value in values.items() if value is not None})
    made: dict[str, Any] = json.loads(told.replace("ROOT", str(root)))
    return made


def trained(root: Path, names: Sequence[str]) -> Path:
    """A folder with these runs, trained by one process and by two."""
    tiny_model_folder(root / "model")
    write_jsonl(root / "pairs.jsonl", polite_rows(18))
    (root / "rewards.py").write_text(REWARD)
    (root / "own.py").write_text(page_code("own_algorithms.md"))
    if "half-file" in names:
        from safetensors.torch import load_file, save_file

        shutil.copytree(root / "model", root / "half")
        weights = load_file(root / "half/model.safetensors")
        save_file({n: w.bfloat16() for n, w in weights.items()}, root / "half/model.safetensors", {"format": "pt"})
    if "encoder" in names:
        encoder_folder(root / "encoder")

    def two(world: World) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PENCHANT_CACHE", str(root / "cache of two"))
            for name in names:
                api.train(config(root, name, "two"), quiet=True)
                if name in RESUMED:
                    again = root / f"again-{name}"
                    if world.leads:
                        shutil.copytree(root / f"two-{name}", again)
                        shutil.rmtree(again / "checkpoints/step-3")
                    world.agree()
                    api.train(config(root, name, "again"), quiet=True)

    for name in names:
        api.train(config(root, name, "one"), quiet=True)
    in_world(two, root / "ranks")
    return root


@pytest.fixture(autouse=True)
def _known_metrics() -> None:
    """Replaces conftest's fixture, because a user's algorithm may log its own metrics."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs"), BY_DEFAULT)


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("more"), [name for name in RUNS if name not in BY_DEFAULT])


@pytest.fixture(params=[pytest.param(n, marks=[] if n in BY_DEFAULT else [pytest.mark.slow]) for n in RUNS])
def run(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A run's name, and the folder that contains it."""
    return request.param, request.getfixturevalue("root" if request.param in BY_DEFAULT else "more")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_log_what_one_logs(run: tuple[str, Path]) -> None:
    name, root = run
    mine, theirs = lines(root / f"one-{name}"), lines(root / f"two-{name}")
    assert [(r["kind"], r["step"]) for r in mine] == [(r["kind"], r["step"]) for r in theirs]
    tolerance = 2e-2 if name == "frozen" else 1e-4  # bf16
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in (
            "loss",
            "eval/loss",
            "grad_norm",
            "rewards/margins",
            "eval/rewards/margins",
            "logps/chosen",
            "reward",
            "eval/reward",
            "eval/win_rate",
            "value/error",
            "kl/policy_ref",
            "tokens",
            "eval/rows",
        ):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=tolerance, abs=tolerance / 10), key


def test_the_model_loads_as_it_is(run: tuple[str, Path]) -> None:
    """Its weights equal those of one process, in the same files."""
    from safetensors.torch import load_file

    name, root = run
    one, two = (root / f"{tag}-{name}/checkpoints/step-3/model" for tag in ("one", "two"))
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(two) for p in two.rglob("*") if p.is_file())
    for file in (f for f in files if f.suffix == ".safetensors"):
        a, b = load_file(one / file), load_file(two / file)
        assert a.keys() == b.keys() and {n: t.dtype for n, t in a.items()} == {n: t.dtype for n, t in b.items()}
        assert max(float((a[n].float() - b[n].float()).abs().max()) for n in a) < TOLERANCE.get(name, 2e-4)
    assert (one / "config.json").exists() == (two / "config.json").exists()
    if (one / "config.json").exists():
        assert json.loads((one / "config.json").read_text()) == json.loads((two / "config.json").read_text())


@pytest.mark.parametrize("name", [n if n in BY_DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in RESUMED])
def test_what_two_processes_resume_is_the_same_run(name: str, request: pytest.FixtureRequest) -> None:
    from safetensors.torch import load_file

    root: Path = request.getfixturevalue("root" if name in BY_DEFAULT else "more")
    whole, again = root / f"two-{name}", root / f"again-{name}"
    assert (whole / "metrics.jsonl").read_bytes() == (again / "metrics.jsonl").read_bytes()
    for shard in (whole / "checkpoints/step-3/state").iterdir():
        mine, theirs = load_file(shard), load_file(again / "checkpoints/step-3/state" / shard.name)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_one_process_asks_the_rewards(root: Path) -> None:
    asked = (root / "asked").read_text().splitlines()
    assert asked and {line.split()[0] for line in asked} == {"alone", "0"}
    assert {line.split()[1] for line in asked} == {"2"}  # kl_prompts are sampled by both


def test_one_process_reads_and_evaluates_what_two_have_trained(root: Path) -> None:
    found = api.evaluate(str(root / "two-dpo"), quiet=True)
    logged = lines(root / "two-dpo")[-1]
    assert found["eval/loss"] == pytest.approx(logged["eval/loss"], rel=1e-5)
    manifest = json.loads((root / "two-dpo/manifest.json").read_text())
    assert (manifest["status"], manifest["processes"]) == ("finished", 2)
    assert manifest["model"]["sha256"] == json.loads((root / "one-dpo/manifest.json").read_text())["model"]["sha256"]
    assert torch.__version__ == manifest["torch"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"optimizer": "adamw_8bit"}}, "blocks that go over the borders of shards"),
        ({"train": {"optimizer": "adafactor", "lr": 0.1}}, "columns in place"),
        ({"model": {"path": "m", "quantize": "int8"}, "lora": LORA}, "quantize"),
        ({"launch": {"replicas": 3}}, "replicas"),
    ],
)
def test_what_several_processes_cannot_train_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    values = {**PLAIN, "model": {"path": "m"}, "data": {"path": "d"}, "output": "o", **change}
    made = config_from_mapping({key: value for key, value in values.items() if value is not None})
    check_launch(made, 1)
    asked = made.model_copy(update={"launch": made.launch.model_copy(update={"processes": 4})})
    with pytest.raises(ConfigError, match="this is one process"):
        check_launch(asked, 1)
    with pytest.raises(ConfigError, match=words):
        check_launch(made, 2)


def test_shards_are_offloaded_from_several_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"loss": "dpo", "model": {"path": "m"}, "data": {"path": "d"}, "output": "o", "launch": {"offload": True}}
    made = config_from_mapping(values)
    check_launch(made, 2)
    with pytest.raises(ConfigError, match="this is one process"):
        check_launch(made, 1)
    monkeypatch.setattr(parts, "current", lambda: World(0, 2))
    check_offload(made, torch.device("cuda"))
    with pytest.raises(ConfigError, match="this run is on cpu"):
        check_offload(made, torch.device("cpu"))
