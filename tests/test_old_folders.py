"""Files written by Penchant 0.1.0 keep working: configs, runs, checkpoints, caches, sweeps, pipelines, comparisons.

The files are in tests/fixtures/v0_1; make_v0_1.py beside them shows how they were made. Only the command line and `penchant.api` are used here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from penchant import api
from penchant.cli import main

OLD = Path(__file__).parent / "fixtures/v0_1"
TEXT = (".json", ".jsonl", ".yaml", ".txt")
QUESTION = ("--reward", "words", "--prompts", "4", "--max-new-tokens", "4")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old files as the working folder, with `@FOLDER@` replaced by its path."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    filled: list[Path] = []
    for path in folder.rglob("*"):
        if path.suffix in TEXT and "@FOLDER@" in (text := path.read_text()):
            path.write_text(text.replace("@FOLDER@", str(folder)))
            filled.append(path)
    for path in filled:  # an adapter names its base model, so its checksum changes; peft's README was not kept
        if path.name == "adapter_config.json":
            manifest = path.parents[1] / "manifest.json"
            said = json.loads(manifest.read_text())
            said["sha256"].pop("model/README.md")
            said["sha256"]["model/adapter_config.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
            manifest.write_text(json.dumps(said))
    monkeypatch.setenv("PENCHANT_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def has_all_of(new: Any, old: Any) -> bool:
    """Whether every old key has its old value. New keys are allowed."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(key in new and has_all_of(new[key], value) for key, value in old.items())
    return new == old


RESOLVED = json.loads((OLD / "configs/resolved.json").read_text())


@pytest.mark.parametrize("name", RESOLVED)
def test_configs_mean_what_they_meant(name: str, old: Path) -> None:
    assert has_all_of(api.as_config(old / "configs" / name).model_dump(mode="json"), RESOLVED[name])


def test_an_interrupted_run_is_finished(old: Path) -> None:
    before = (old / "mid/metrics.jsonl").read_bytes()
    assert before.count(b"\n") > 10
    assert main(["train", "mid.yaml", "train.epochs=20", "--quiet"]) == 0
    assert (old / "mid/metrics.jsonl").read_bytes().startswith(before[: before.rindex(b"\n", 0, -1) + 1])
    unwatched = ["evaluation={samples: 0, kl_prompts: 0, every: null, at_start: false}", "checkpoint.every=null"]
    assert main(["train", "mid.yaml", "train.epochs=20", "output=whole", *unwatched, "--quiet"]) == 0
    resumed, whole = (
        load_file(old / name / "checkpoints/step-60/model/model.safetensors") for name in ("mid", "whole")
    )
    assert resumed.keys() == whole.keys()
    for name, tensor in whole.items():  # the first steps may have run on another processor
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=5e-3)
    start = load_file(old / "model/model.safetensors")
    assert any((tensor - start[name]).abs().max() > 0.02 for name, tensor in whole.items() if name in start)


@pytest.mark.parametrize("run", ["finished", "lora", "reward"])
def test_a_finished_run_is_left_as_it_is_evaluated_and_reported(
    run: str, old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics, weights = (old / run / "metrics.jsonl").read_bytes(), (old / run / "checkpoints/step-6/state.safetensors")
    kept = weights.read_bytes()
    assert main(["train", f"{run}.yaml", "--quiet"]) == 0
    assert (old / run / "metrics.jsonl").read_bytes() == metrics and weights.read_bytes() == kept
    capsys.readouterr()
    assert main(["eval", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    last = [line for line in lines(old / run / "metrics.jsonl") if line["kind"] == "eval"][-1]
    shared = [k for k in last if k in found and isinstance(last[k], float)]
    assert "eval/rewards/accuracies" in shared or "rewards/accuracies" in shared, sorted(found)
    for key in shared:
        assert found[key] == pytest.approx(last[key], rel=1e-3, abs=1e-3)
    assert main(["flags", run]) == 0
    assert main(["report", run]) == 0
    assert f"{last['step']}" in (old / run / "report.html").read_text()
    assert main(["watch", run, "--once"]) == 0
    assert "finished" in capsys.readouterr().out


def test_a_reward_head_that_another_processor_drew_is_no_other_start(old: Path) -> None:
    path = old / "reward/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert main(["train", "reward.yaml", "--quiet"]) == 0
    assert main(["eval", "reward", "--json"]) == 0


def test_old_cached_references_do_no_harm(old: Path) -> None:
    """They have no checksum, and their key covers the weights but not the model's config, so they are computed again once."""
    before = {p: p.read_bytes() for p in (old / "cache/reference").iterdir()}
    assert main(["train", "finished.yaml", "output=again", "--quiet"]) == 0
    after = set((old / "cache/reference").iterdir())
    assert after > before.keys() and all(p.read_bytes() == data for p, data in before.items())
    assert main(["train", "finished.yaml", "output=once_more", "--quiet"]) == 0
    assert set((old / "cache/reference").iterdir()) == after


def test_an_old_data_cache_is_read_or_made_again(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.data.cached.AUTO_BYTES", 0)
    assert main(["train", "finished.yaml", "output=again", "--quiet"]) == 0
    first, second = (lines(old / run / "metrics.jsonl") for run in ("finished", "again"))
    assert [line["kind"] for line in first] == [line["kind"] for line in second]


def test_runs_are_compared(old: Path) -> None:
    assert main(["compare", "finished", "lora", *QUESTION, "--output", "again", "--quiet"]) == 0
    before, after = (json.loads((old / f / "comparison.json").read_text()) for f in ("comparison", "again"))
    assert before.keys() <= after.keys()
    assert main(["report", "comparison"]) == 0 and main(["flags", "comparison"]) == 0


@pytest.mark.parametrize("what", ["sweep", "pipeline"])
def test_a_sweep_and_a_pipeline_have_nothing_left_to_do(what: str, old: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (old / what).rglob("*.safetensors")}
    assert before
    assert main([what, f"{what}.yaml", "--quiet"]) == 0
    assert {p: p.stat().st_mtime_ns for p in (old / what).rglob("*.safetensors")} == before
    assert main(["report", what]) == 0
