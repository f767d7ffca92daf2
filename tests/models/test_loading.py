"""Loading a model: dropout off, whatever its config says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from penchant.errors import ModelError
from penchant.models.load import load_causal_model, save_model
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


def test_functional_dropout_is_off_too(tmp_path: Path) -> None:
    """OPT hands numbers to F.dropout: no module of dropout is there to be found."""
    config = transformers.OPTConfig(
        hidden_size=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=31,
        dropout=0.5,
        layerdrop=0.5,
    )
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with torch.no_grad():
        model = load_causal_model(ModelConfig(path=str(tmp_path)), torch.device("cpu")).train()
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_dropout_that_stays_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()).save_pretrained(tmp_path)
    monkeypatch.setattr("penchant.models.load.disable_dropout", lambda model: None)
    with pytest.raises(ModelError, match="has dropout"):
        load_causal_model(ModelConfig(path=str(tmp_path)), torch.device("cpu"))


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    transformers.AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()).save_pretrained(tmp_path)
    torch.manual_seed(3)
    load_causal_model(ModelConfig(path=str(tmp_path)), torch.device("cpu"))
    found = torch.rand(1)
    assert torch.equal(found, torch.manual_seed(3) and torch.rand(1))


def test_of_a_model_of_text_and_images_the_text_part_is_loaded(tmp_path: Path) -> None:
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.Gemma3Config(
        text_config={**sizes, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 31},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        image_token_index=29,
    )
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    model = load_causal_model(ModelConfig(path=str(tmp_path)), torch.device("cpu")).eval()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        assert type(model).__name__ == "Gemma3ForCausalLM"
        assert torch.equal(model(ids).logits, whole(ids).logits)

    save_model(model, None, tmp_path / "saved")
    again = load_causal_model(ModelConfig(path=str(tmp_path / "saved")), torch.device("cpu")).eval()
    stranger = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, whole(ids).logits)
        assert torch.equal(stranger(ids).logits, whole(ids).logits)
