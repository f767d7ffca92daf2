"""The `model`, `lora` and `reference` sections of a config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from penchant.schema import Section


class ModelConfig(Section):
    """Which model is trained, and how it is held."""

    path: str = Field(description="folder or hub id (owner/name)")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: weights from scratch, by the config in `path`"
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where it is native, else fp32")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU when there is one")
    kernels: Literal["auto", "off"] = Field("auto", description="model-family fast paths")
    tokenizer: str | None = Field(None, description="folder or hub id; default: model.path")


class LoraConfig(Section):
    """A low-rank adapter; present = trained instead of the full model."""

    r: int = Field(16, ge=1, description="rank")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: str | list[str] = Field("all-linear", description="layers that get an adapter")


class ReferenceConfig(Section):
    """Where the reference's log-probs come from."""

    kind: Literal["auto", "frozen", "adapter", "cached"] = Field(
        "auto", description="auto: adapter off with LoRA, else computed once and cached on disk"
    )
    path: str | None = Field(
        None, description="another model as reference; default: the model that training starts from"
    )
    cache_dir: str | None = Field(None, description="default: $PENCHANT_CACHE or ~/.cache/penchant")
