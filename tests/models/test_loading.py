"""Loading a model: dropout off, whatever its config says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from penchant.models.load import load_causal_model
from penchant.models.options import ModelConfig

CONFIGS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=31, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
    ),
    "llama": lambda: transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=31,
        attention_dropout=0.5,
    ),
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_loaded_model_has_no_dropout_of_its_own(tmp_path: Path, name: str) -> None:
    """A noisy policy against a quiet reference would have log-ratios that nothing has earned."""
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).train()
    with torch.no_grad():
        assert not torch.equal(made(ids).logits, made(ids).logits)
        made.save_pretrained(tmp_path)
        model = load_causal_model(ModelConfig(path=str(tmp_path)), torch.device("cpu")).train()
        assert torch.equal(model(ids).logits, model(ids).logits)
