"""LoRA on layers that are no plain Linear of their own: works to the end, or is refused before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import load_tool
from families import tiny_model

from penchant.errors import ConfigError
from penchant.models import load
from penchant.models.load import add_lora, base_model_of, effective_weights, load_causal_model
from penchant.models.merge import merged_model
from penchant.models.options import LoraConfig, ModelConfig
from penchant.models.reward import whole_state_dict

tool = load_tool()
CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_weight_is_refused(target: str) -> None:
    """Merged, it would change the other layer too; on a model whose head is its own it is fine."""
    with pytest.raises(ConfigError, match="is the same weight as"):
        add_lora(tiny_model("smollm-tied", dtype=torch.float32), LoraConfig(r=2, target_modules=["q_proj", target]), 0)
    add_lora(tiny_model("llama", dtype=torch.float32), LoraConfig(r=2, target_modules=["q_proj", target]), 0)


def _with_an_update(model: Any) -> None:
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "gpt2"])
def test_experts_and_other_layers_are_merged(kind: str, tmp_path: Path) -> None:
    """Effective weights, a reward model's whole state and the merged model say what the adapter says."""
    with tool.silent():
        tool.tiny_model(kind).save_pretrained(tmp_path / "base")
    config = ModelConfig(path=str(tmp_path / "base"))
    start = {n: p.clone() for n, p in load_causal_model(config, CPU).named_parameters()}
    model = add_lora(load_causal_model(config, CPU), LoraConfig(r=2), seed=0).eval()
    assert all(not p.any() for n, p in model.named_parameters() if "lora_B" in n)
    _with_an_update(model)
    with torch.no_grad():
        want = model(IDS).logits
        for weights in (effective_weights(model, {}), whole_state_dict(model, {})):
            plain = load_causal_model(config, CPU).eval()
            assert set(weights) <= set(plain.state_dict()) and any(
                not torch.equal(w, start[n]) for n, w in weights.items() if n in start
            )
            plain.load_state_dict(weights, strict=False)
            assert torch.allclose(plain(IDS).logits, want, atol=1e-4)
        model.save_pretrained(tmp_path / "adapter")
        merged = merged_model(config, tmp_path / "adapter", CPU).eval()
        assert torch.allclose(merged(IDS).logits, want, atol=1e-4)


def test_an_adapter_that_merges_wrongly_is_refused_and_leaves_the_start_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}
    merged = load._merged
    monkeypatch.setattr(load, "_merged", lambda module: merged(module) * 1.1)
    with pytest.raises(ConfigError, match="merging an adapter of this model changes its logits"):
        add_lora(model, LoraConfig(r=2), seed=0)
    monkeypatch.undo()
    model = add_lora(tiny_model("llama", dtype=torch.float32), LoraConfig(r=2), seed=0)
    for name, p in base_model_of(model).named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, before[load.plain_name(name)])
