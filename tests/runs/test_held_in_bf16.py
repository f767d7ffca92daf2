"""A bf16 run is bitwise the same whether its weights are loaded in bf16 or in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.models.cpu.layers import FastForward
from penchant.runs import parts

CASES: dict[str, dict[str, Any]] = {
    "an adapter": {"lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]}},
    "everything, and a frozen copy": {"reference": {"kind": "frozen"}},
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = Path(tiny_model_folder(tmp_path / "model"))
    weights = {n: t.bfloat16() for n, t in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    held, real = [], parts.held_in

    def ends(tag: str) -> tuple[str, dict[str, torch.Tensor]]:
        result = api.train(
            {
                "model": {"path": str(model), "dtype": "bf16"},
                "data": {"path": write_jsonl(tmp_path / "pairs.jsonl", polite_rows(12)), "template": "plain"},
                "loss": {"name": "dpo"},
                "train": {"max_steps": 2, "batch_size": 4, "tokens_per_step": 220, "lr": 1e-2},
                "evaluation": {"kl_prompts": 0, "samples": 0},
                "output": str(tmp_path / tag),
                **CASES[name],
            },
            quiet=True,
        )
        state = load_file(result.folder / "checkpoints/step-2/state.safetensors")
        return (result.folder / "metrics.jsonl").read_text(), state

    def spied(*asked: Any) -> torch.dtype:
        held.append(real(*asked))
        return held[-1]

    monkeypatch.setattr(parts, "held_in", spied)
    log, state = ends("bf16")
    assert held and set(held) == {torch.bfloat16}
    monkeypatch.setattr(parts, "held_in", lambda *_: torch.float32)
    right_log, right = ends("fp32")
    assert log == right_log
    assert state.keys() == right.keys() and all(torch.equal(state[n], right[n]) for n in right)


def test_a_reference_in_fp32_whose_layers_are_held_in_bf16_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    model = Path(tiny_model_folder(tmp_path / "model"))
    weights = {n: t.bfloat16() for n, t in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    narrowed, real = [], FastForward.narrow

    def log(tag: str) -> str:
        rows = write_jsonl(tmp_path / "pairs.jsonl", polite_rows(16))
        config = {
            "model": {"path": str(model), "dtype": "fp32"},
            "data": {"path": rows, "template": "plain", "validation_rows": 4},
            "loss": {"name": "dpo"},
            "reference": {"kind": "frozen"},
            "train": {"max_steps": 2, "batch_size": 4, "tokens_per_step": 220, "lr": 1e-2},
            "evaluation": {"kl_prompts": 2, "samples": 0, "sample_tokens": 4, "reward": {"words": 1.0}},
            "output": str(tmp_path / tag),
        }
        return (api.train(config, quiet=True).folder / "metrics.jsonl").read_text()

    def spied(self: FastForward) -> None:
        real(self)
        narrowed.append(self.narrowed)

    monkeypatch.setattr(FastForward, "narrow", spied)
    found = log("bf16")
    assert narrowed == [True] and "reward" in found
    monkeypatch.setattr(FastForward, "narrow", lambda self: None)
    assert found == log("fp32")
