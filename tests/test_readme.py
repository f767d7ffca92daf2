"""The longer examples of the README and pages, run small and inspected (tests/docs/test_code_blocks.py covers every page)."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.config import load_config
from penchant.init import propose, write_config
from penchant.init.look import look_at_data, look_at_model
from penchant.pipeline import load_pipeline
from penchant.sweep import load_sweep

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def _blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.S)


def _block(language: str) -> str:
    return _blocks(language)[0]


def test_the_yaml_is_a_config(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(_block("yaml"))
    config = load_config(tmp_path / "run.yaml", ["train.lr=1e-4", "loss.beta=0.3", "output=runs/second"])
    assert config.model.path == MODEL
    assert config.lora is not None
    assert config.loss.params.beta == 0.3


@pytest.mark.parametrize("page", ["docs/ppo.md"])
def test_the_online_example_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Write about {i}"} for i in range(60)])
    for code in (b for b in _blocks("python", page) if b.startswith("# rewards.py")):
        (tmp_path / "rewards.py").write_text(code)
    (block,) = [s for s in _blocks("yaml", page) if "name: rloo, samples" in s]
    (tmp_path / "run.yaml").write_text(block.replace(MODEL, tiny_model_folder(tmp_path / "model")))
    overrides = ["train.max_steps=1", "algorithm.max_new_tokens=4", "data.max_length=64", "evaluation.samples=0"]
    result = api.train(tmp_path / "run.yaml", *overrides, quiet=True)
    assert "eval/reward/ci" in result.after


def test_grpo_on_arithmetic_with_a_checked_answer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's file and reward, with the config that init writes and with the recipe."""
    monkeypatch.chdir(tmp_path)
    (code,) = [b for b in _blocks("python", "docs/rewards.md") if b.startswith("# arithmetic.py")]
    (tmp_path / "arithmetic.py").write_text(code)
    runpy.run_path("arithmetic.py", run_name="__main__")
    model = tiny_model_folder(tmp_path / "model")
    data = look_at_data("arithmetic.jsonl", model)
    assert propose(data, look_at_model(model), "grpo").sections["reward"].keys() == {"accuracy"}
    start = propose(data, look_at_model(model), "grpo", reward="arithmetic.py:right")
    few = [
        "train.max_steps=1",
        "algorithm.max_new_tokens=4",
        "data.limit=12",
        "data.validation_rows=2",
        "evaluation.samples=0",
    ]
    result = api.train(write_config(start, "arithmetic.yaml"), *few, quiet=True)
    assert "eval/rewards/right/mean" in result.after
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    recipe = api.train("recipes/grpo_arithmetic.yaml", f"model.path={model}", *few, quiet=True)
    assert "eval/rewards/right/mean" in recipe.after


def test_the_reward_model_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", polite_rows(40))
    (block,) = _blocks("yaml", "docs/methods/reward_models.md")
    (tmp_path / "run.yaml").write_text(block.replace(MODEL, tiny_model_folder(tmp_path / "model")))
    result = api.train(tmp_path / "run.yaml", "train.max_steps=1", "data.max_length=128", quiet=True)
    assert "eval/calibration/ece" in result.after


def test_the_pipeline_shown_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs/pipeline.md").read_text()
    (block,) = [b for b in re.findall(r"```yaml\n(.*?)```", text, flags=re.S) if "stages:" in b]
    (tmp_path / "pipeline.yaml").write_text(block)
    given = re.findall(r"pipeline\.yaml (stages\.\S+=\S+)", text)
    assert given
    pipeline = load_pipeline(tmp_path / "pipeline.yaml", given[:1])
    assert list(pipeline.stages) == ["sft", "reward", "ppo", "dpo"]
    assert pipeline.compare is not None and pipeline.compare.upstream == ("sft", "ppo", "dpo", "reward")


def test_the_pipeline_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", polite_rows(120))
    (block,) = [s for s in _blocks("yaml", "docs/pipeline.md") if "stages:" in s]
    (tmp_path / "pipeline.yaml").write_text(block.replace(MODEL, tiny_model_folder(tmp_path / "model")))
    small = ["defaults.train.max_steps=1", "defaults.data.max_length=128", "defaults.evaluation.samples=0"]
    small += ["stages.ppo.algorithm.max_new_tokens=4", "compare.max_new_tokens=4", "defaults.evaluation.kl_prompts=0"]
    result = api.pipeline(tmp_path / "pipeline.yaml", *small, quiet=True)
    assert result.outcome is not None and "reward, by sentiment" in result.outcome.to_text()


@pytest.mark.parametrize("page,runs", [("docs/sweep.md", [9, 0, 3, 20])])
def test_every_sweep_shown_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str, runs: list[int]) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    Path("run.yaml").write_text(_block("yaml"))
    blocks = [b for b in re.findall(r"```yaml\n(.*?)```", text, flags=re.S) if "base:" in b]
    for block, count in zip(blocks, runs, strict=True):
        Path("sweep.yaml").write_text(block)
        assert len(load_sweep("sweep.yaml").runs) == count
    (line,) = re.findall(r"penchant sweep run\.yaml ([^#\n]*)", text)
    assert len(load_sweep("run.yaml", line.split()).runs) in (4, 6)


def test_every_recipe_is_a_config() -> None:
    recipes = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        kind = path.stem.rpartition("_")[2]  # pipeline.yaml, ..._sweep.yaml, or a run
        {"pipeline": load_pipeline, "sweep": load_sweep}.get(kind, load_config)(path)


def test_nothing_is_left_to_fill_in() -> None:
    for page in (README, *(p.read_text() for p in (ROOT / "docs").glob("*.md"))):
        assert "@@" not in page
