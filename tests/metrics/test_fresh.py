"""Completions generated at evaluations: metrics by hand, the win rate against the start, and equal logs after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.cli import main
from penchant.errors import CheckpointError, ConfigError
from penchant.metrics.completions import (
    START_FILE,
    Completions,
    completion_figures,
    gain_figures,
    load_start_rewards,
    save_start,
)
from penchant.training.loop import Loop
from penchant.types import TokenTree


def test_a_win_is_against_the_start_s_completion_of_the_same_prompt() -> None:
    got = gain_figures([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 5.0, -1.0])
    assert got["reward"] == 1.5
    assert got["win_rate"] == (1 + 0.5 + 0 + 1) / 4
    assert got["win_rate/ties"] == 0.25
    tied = gain_figures([1.0, 1.0], [1.0, 1.0])
    low, high = tied["win_rate/ci"]
    assert tied["win_rate/ties"] == 1.0 and low < 0.3 and high > 0.7 and "reward/ci" not in tied
    with pytest.raises(ValueError, match="same prompts"):
        gain_figures([1.0], [1.0, 2.0])


def test_length_ends_and_variety_by_hand() -> None:
    trees = [
        TokenTree(0, np.array([9]), (np.array([1, 2, 1, 2]),), (True,)),
        TokenTree(1, np.array([9]), (np.array([3, 4]),), (False,)),
    ]
    got = completion_figures(Completions(trees, ["a", "b"], None))
    assert got["completions/length"] == 3.0 and got["completions/length/ci"] == [2.0, 4.0]
    assert got["completions/ended"] == 0.5
    assert got["completions/distinct_2"] == 3 / 4


def test_what_was_kept_is_read_only_where_the_same_was_asked(tmp_path: Path) -> None:
    path, asked = tmp_path / START_FILE, {"seed": 0, "judge": ["words"]}
    assert load_start_rewards(path, asked) is None
    save_start(path, asked, [{"reward": 1.5}, {"reward": -2.0}])
    found = load_start_rewards(path, asked)
    assert found is not None and found.tolist() == [1.5, -2.0]
    assert load_start_rewards(path, {"seed": 1, "judge": ["words"]}) is None
    path.write_text("{half")
    assert load_start_rewards(path, asked) is None


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "cache"))
    reward = tmp_path / "judge.py"
    reward.write_text("def letters(prompts, completions):\n    return [len(set(c)) for c in completions]\n")
    return {
        "model": {"path": tiny_model_folder(tmp_path / "model"), "dtype": "fp32"},
        "data": {"path": write_jsonl(tmp_path / "pairs.jsonl", polite_rows()), "validation_rows": 6, "max_length": 128},
        "train": {
            "max_steps": 4,
            "epochs": 2,
            "batch_size": 6,
            "tokens_per_step": 400,
            "lr": 3e-3,
            "warmup_fraction": 0.0,
        },
        "evaluation": {
            "samples": 0,
            "kl_prompts": 5,
            "sample_tokens": 6,
            "every": 2,
            "reward": f"{reward}:letters",
        },
        "checkpoint": {"every": 2},
        "output": str(tmp_path / "run"),
    }


def evals(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if x["kind"] == "eval"]


def test_every_evaluation_has_completions_and_a_win_rate_that_starts_at_one_half(base: dict[str, Any]) -> None:
    result = api.train(base, quiet=True)
    found = evals(result.folder)
    assert [e["step"] for e in found] == [0, 2, 4]
    for line in found:
        for name in ("completions/ended", "win_rate", *(["kl/policy_ref", "kl/k3"] if line["step"] else [])):
            assert f"eval/{name}/ci" in line, name
        assert line["eval/kl/k3"] >= 0
        assert all(ci[0] < ci[1] for name, ci in line.items() if name.endswith("/ci"))
        assert 0 <= line["eval/completions/distinct_2"] <= 1
        assert line["eval/perplexity_ratio/chosen"] > 0 and "eval/length/agreement" in line
    assert found[0]["eval/win_rate"] == 0.5 and found[0]["eval/perplexity_ratio/chosen"] == pytest.approx(1.0)
    kept = json.loads((result.folder / START_FILE).read_text())["completions"]
    assert len(kept) == 5 and np.mean([c["reward"] for c in kept]) == found[0]["eval/reward"]
    again = api.evaluate(result.folder, quiet=True)
    assert again["eval/win_rate"] == found[-1]["eval/win_rate"] and again["eval/reward"] == found[-1]["eval/reward"]


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "more",
    [
        {"lora": {"r": 2}, "train.lr": 1e-2},
        pytest.param({"loss": "sft"}, marks=pytest.mark.slow),
        {"evaluation.at_start": False},
    ],
    ids=["lora", "sft", "no-start"],
)
def test_a_killed_run_writes_the_lines_of_an_uninterrupted_one(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    overrides = [f"{k}={v}" for k, v in more.items() if not isinstance(v, dict)]
    base |= {k: v for k, v in more.items() if isinstance(v, dict)}
    whole = api.train(base, *overrides, quiet=True)
    base["output"] = str(tmp_path / "killed")
    real = Loop._after_step

    def killed(self: Loop, *args: Any) -> None:
        if self.state.step == 3:
            raise Killed
        real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_after_step", killed)
        with pytest.raises(Killed):
            api.train(base, *overrides, quiet=True)
    resumed = api.train(base, *overrides, quiet=True)
    assert (whole.folder / "metrics.jsonl").read_bytes() == (resumed.folder / "metrics.jsonl").read_bytes()
    assert (whole.folder / START_FILE).read_bytes() == (resumed.folder / START_FILE).read_bytes()
    assert "eval/win_rate" in evals(whole.folder)[-1]


def test_what_another_start_wrote_is_thrown_away(base: dict[str, Any]) -> None:
    folder = Path(base["output"])
    whole = evals(api.train(base, quiet=True).folder)
    import shutil

    shutil.rmtree(folder / "checkpoints")
    kept = json.loads((folder / START_FILE).read_text())
    for row in kept["completions"]:
        row["reward"] += 100.0
    (folder / START_FILE).write_text(json.dumps(kept))
    assert (
        evals(api.train(base, "evaluation.at_start=false", quiet=True).folder)[-1]["eval/win_rate"]
        == whole[-1]["eval/win_rate"]
    )


def test_a_judge_that_changed_is_refused(base: dict[str, Any], tmp_path: Path) -> None:
    api.train(base, quiet=True)
    (tmp_path / "judge.py").write_text("def letters(prompts, completions):\n    return [0.0 for c in completions]\n")
    with pytest.raises(CheckpointError, match=r"content of reward .*judge\.py:letters"):
        api.train(base, quiet=True)


@pytest.mark.parametrize(
    "overrides,what",
    [
        (["evaluation.kl_prompts=0"], "kl_prompts is 0; raise it"),
        (["evaluation.reward=sentimint"], "is not a reward"),
        (["data.validation_rows=null"], r"evaluation\.reward.*held-out"),
        (["algorithm=reward_model"], "a reward model writes nothing"),
        (["evaluation.rewrad=words"], 'did you mean "reward"'),
    ],
)
def test_mistakes_are_met_with_a_sentence(base: dict[str, Any], overrides: list[str], what: str) -> None:
    if "rewrad" in overrides[0]:
        base["evaluation"].pop("reward")
    with pytest.raises(ConfigError, match=what):
        api.train(base, *overrides, quiet=True)
    assert not (Path(base["output"]) / "metrics.jsonl").exists()


def test_an_online_run_is_compared_with_its_start_too(base: dict[str, Any], tmp_path: Path) -> None:
    reward = base["evaluation"].pop("reward")
    base["data"] = {
        "path": write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Say {i}"} for i in range(16)]),
        "validation_rows": 4,
        "max_length": 64,
    }
    base |= {"algorithm": {"name": "rloo", "samples": 2, "max_new_tokens": 4}, "reward": reward}
    base["train"]["max_steps"] = 2
    result = api.train(base, quiet=True)
    assert result.before["eval/win_rate"] == 0.5
    assert 0 <= result.after["eval/win_rate"] <= 1
    assert api.evaluate(result.folder, quiet=True)["eval/win_rate"] == result.after["eval/win_rate"]


# ---- flags at the end -----------------------------------------------------------------------------------------------


def test_train_writes_and_prints_its_flags(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base["train"] |= {"max_steps": 12, "epochs": 9, "lr": 3e-2}
    base["trust"] = {"kl": [5000.0, 6000.0]}
    base["evaluation"]["every"] = 6
    base["checkpoint"] = {"every": None}
    (tmp_path / "run.yaml").write_text(json.dumps(base))
    assert main(["train", str(tmp_path / "run.yaml"), "--quiet"]) == 0
    shown = capsys.readouterr().out
    found = json.loads((Path(base["output"]) / "flags.json").read_text())
    assert {"kl_band", "few_prompts"} <= {f["name"] for f in found}
    for flag in found:
        assert f"{flag['sentence']} ({flag['name']})" in shown
    assert f"penchant flags {base['output']}" in shown
    # thresholds do not affect the computation: the finished run is only read again
    again = api.train(base, "trust.kl=[0, 5000]", quiet=True)
    assert "kl_band" not in {f.name for f in again.flags}


def test_a_run_that_does_nothing_has_no_warning(base: dict[str, Any]) -> None:
    result = api.train(base, "train.lr=1e-12", quiet=True)
    assert {f.name: f.level for f in result.flags} == {"few_prompts": "note", "tied": "note"}


def test_a_run_that_stopped_has_its_flags_too(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Loop, *args: Any) -> None:
        raise Killed

    monkeypatch.setattr(Loop, "_after_step", killed)
    with pytest.raises(Killed):
        api.train(base, quiet=True)
    assert [f["name"] for f in json.loads((Path(base["output"]) / "flags.json").read_text())] == ["few_prompts"]


@pytest.mark.parametrize("trust,what", [("{kl: [5, 1]}", "0 <= low < high"), ("{kll: [0, 1]}", 'did you mean "kl"')])
def test_mistaken_thresholds(base: dict[str, Any], trust: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        api.train(base, f"trust={trust}", quiet=True)
