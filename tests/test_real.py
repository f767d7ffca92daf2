"""Real data and a real (260k-parameter) model, in seconds. Skipped if the shared folder is absent."""

from __future__ import annotations

import json
from pathlib import Path

from penchant import api


def test_dpo_on_polite_is_learned_by_the_260k_model(shared_dir: Path, tmp_path: Path) -> None:
    config = {
        "model": {"path": str(shared_dir / "models/stories260k"), "dtype": "fp32"},
        "data": {
            "path": str(shared_dir / "data/polite-1000.json"),
            "limit": 140,
            "validation_rows": 60,
            "max_length": 256,
            "on_bad_row": "skip",
        },
        "train": {"epochs": 1, "batch_size": 8, "lr": 1e-3, "tokens_per_step": 2048},
        "evaluation": {"samples": 0, "kl_prompts": 4, "sample_tokens": 8, "at_start": False},
        "output": str(tmp_path / "run"),
    }
    result = api.train(config, quiet=True)
    assert result.after["eval/rewards/accuracies/ci"][0] > 0.5
    assert result.after["eval/rewards/margins"] > 0.1


def test_hh_harmless_runs_with_lora_and_counts_its_bad_rows(shared_dir: Path, tmp_path: Path) -> None:
    config = {
        "model": {"path": str(shared_dir / "models/stories260k"), "dtype": "fp32"},
        "lora": {"r": 8},
        "data": {
            "path": str(shared_dir / "data/hh-harmless-1700.jsonl"),
            "limit": 100,
            "validation_rows": 20,
            "max_length": 96,
            "on_bad_row": "skip",
        },
        "train": {"batch_size": 16, "lr": 1e-3, "max_steps": 2},
        "evaluation": {"samples": 1, "sample_tokens": 8, "kl_prompts": 4},
        "output": str(tmp_path / "run"),
    }
    result = api.train(config, quiet=True)
    assert result.steps == 2
    assert json.loads((tmp_path / "run/manifest.json").read_text())["data"]["train split"]["rows"] == 79
    assert result.after["eval/rows"] == 20
    assert (tmp_path / "run/quarantine.train.jsonl").read_text().count("\n") == 1  # line 87 ends with an empty answer
