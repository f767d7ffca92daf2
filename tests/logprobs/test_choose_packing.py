"""The packing chosen for a model: the best one whose results equal plain padding's, checked on the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import tiny_model

from penchant.errors import ConfigError
from penchant.logprobs.packing import choose_packing
from penchant.models import tree_attention
from penchant.models.lora import add_lora
from penchant.models.options import LoraConfig


def _causal(segment: object, length: int, window: int | None) -> np.ndarray:
    """A causal mask without branches, as in a model whose attention does not support trees."""
    return np.tri(length, dtype=bool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_that_is_ignored_is_noticed(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    assert choose_packing(model, "auto", "off")[0].packing == "shared"
    monkeypatch.setattr(tree_attention, "tree_mask", _causal)
    scorer, note = choose_packing(model, "auto", "off")
    assert scorer.packing == "separate" and "does not take the tree mask" in note
    with pytest.raises(ConfigError, match="shared packing gives wrong log-probs"):
        choose_packing(model, "shared", "off")


def test_dropout_does_not_disturb_the_check() -> None:
    model = add_lora(tiny_model("llama", dtype=torch.float32), LoraConfig(r=4, dropout=0.5), seed=0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    model.train()
    scorer, _ = choose_packing(model, "auto", "off")
    assert scorer.packing == "shared" and model.training


def test_layers_that_carry_state_are_padded() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    model.config.layer_types = ["full_attention", "linear_attention"]
    scorer, note = choose_packing(model, "auto", "off")
    assert scorer.packing == "padded" and "linear_attention" in note
