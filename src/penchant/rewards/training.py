"""What a reward model's training run is composed of, beside what every run has: its tokens, its model, its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penchant.data.load import Dataset
from penchant.data.options import DataConfig
from penchant.data.tokenize import TokenisedDataset, tokenise, tokenise_text_pairs
from penchant.models.load import add_lora
from penchant.models.options import LoraConfig, ModelConfig
from penchant.models.reward import (
    HEADS,
    choose_padding,
    context_of,
    is_encoder,
    load_model_config,
    load_reward_model,
    save_reward_model,
    set_padding,
)

SMALL_ENCODER = 50_000_000  # parameters


@dataclass(slots=False)
class RewardModelParts:
    """One reward model: from a causal model, an encoder, or a reward model.

    Args:
        model_config, data, lora: the run's sections; tokenizer: the model's own.
    """

    model_config: ModelConfig
    data: DataConfig
    lora: LoraConfig | None
    tokenizer: Any

    def __post_init__(self) -> None:
        if not self.encoder:
            choose_padding(self.tokenizer)

    @cached_property
    def encoder(self) -> bool:
        path = self.model_config.path
        return is_encoder(load_model_config(path, self.model_config.revision), path)

    @cached_property
    def max_length(self) -> int:
        """Tokens of a row; an encoder's own limit where that is lower, so that the default needs no thought."""
        if not self.encoder:
            return self.data.max_length
        config = load_model_config(self.model_config.path, self.model_config.revision)
        return min(self.data.max_length, context_of(config, self.tokenizer) or self.data.max_length)

    def tokenise(self, dataset: Dataset, on_bad_row: str) -> TokenisedDataset:
        d = self.data
        if self.encoder:
            return tokenise_text_pairs(
                dataset,
                self.tokenizer,
                max_length=self.max_length,
                truncation=d.truncation,
                on_bad_row=on_bad_row,
                identical=d.identical,
            )
        return tokenise(
            dataset,
            self.tokenizer,
            template=d.template,
            max_length=d.max_length,
            truncation=d.truncation,
            on_bad_row=on_bad_row,
            identical=d.identical,
            add_eos=d.add_eos,
        )

    def load(self, device: torch.device, seed: int) -> Any:
        """The trainable model in fp32: whole, or an adapter with a head (and whatever else is new) that is trained with it."""
        loaded = load_reward_model(self.model_config, device, seed)
        if not self.encoder:
            set_padding(loaded.model, self.tokenizer)
        if self.lora is None:
            return loaded.model
        heads = [name for name in HEADS if hasattr(loaded.model, name)]
        return add_lora(loaded.model, self.lora, seed, task="SEQ_CLS", whole=sorted({*loaded.fresh, *heads}))

    def save(self, model: Any, masters: Mapping[str, Tensor], folder: Path) -> None:
        settings = {
            "template": self.data.template,
            "max_length": self.max_length,
            "add_eos": self.data.add_eos and self.tokenizer.eos_token_id is not None,
        }
        save_reward_model(model, self.tokenizer, folder, masters, settings)

    def default_lr(self, parameters: int) -> float:
        """Peak learning rate where the config says auto: LoRA 1e-4, causal 1e-5, encoders 2e-5 (small ones 5e-5)."""
        if self.lora is not None:
            return 1e-4
        if not self.encoder:
            return 1e-5
        return 5e-5 if parameters < SMALL_ENCODER else 2e-5
