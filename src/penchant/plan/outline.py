"""A run whose models are on the meta device, so that even a model too large for this machine can be planned for."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from penchant.errors import ModelError
from penchant.logprobs.packing import attention_calls, packing_by_config
from penchant.models.cpu.layers import fast_forward
from penchant.models.folder import loading
from penchant.models.load import (
    base_model_of,
    cast_parameters,
    disable_dropout,
    load_causal_model,
    on_meta,
    source_sha256,
    text_config,
)
from penchant.models.lora import add_lora
from penchant.models.options import ModelConfig, check_model_path
from penchant.models.reward import HEADS, load_model_config, set_padding
from penchant.models.tree_attention import select_attention
from penchant.runs import Run
from penchant.runs.parts import cache_paths, prepared, reference_source, set_threads, with_adapter_sha256

META = torch.device("meta")


class OutlinedRun(Run):
    """A run without its weights. It trains nothing and writes nothing."""

    merges = False

    @cached_property
    def model(self) -> Any:
        """The trained model on the meta device, with its adapter."""
        config, reward = self.config, self.rows.reward_parts
        model = outline(config.model, reward=reward is not None)
        if reward is not None and not reward.encoder:
            set_padding(model, self.rows.tokenizer)
        if reward is not None and config.lora is not None:
            heads = [name for name in HEADS if hasattr(model, name)]
            model = add_lora(model, config.lora, config.train.seed, task="SEQ_CLS", whole=heads)
        set_threads(config, model)
        return prepared(model, config, self.rows)

    @property
    def encoder(self) -> bool:
        """Whether the run trains an encoder as a reward model."""
        return self.rows.reward_parts is not None and self.rows.reward_parts.encoder

    @cached_property
    def layout(self) -> tuple[str, bool, str]:
        """(packing, whether a fast path runs, reason). The real run then checks this choice on the model itself."""
        if self.encoder:
            return "text pairs", False, "an encoder reads each text by itself, padded among texts of its length"
        if self.config.model.sees:
            return "padded", False, "pictures: each answer is a row of its own behind its prompt"
        packing, reason = packing_by_config(self.model)
        requested = self.config.train.packing
        if requested != "auto":
            packing, reason = requested, "as asked"
        fast = (
            packing != "padded"
            and self.config.model.kernels == "auto"
            and self.config.model.attention in ("auto", "groups")
            and self.config.model.quantize == "none"
            and self.device.type == "cpu"
            and fast_forward(self.model) is not None
        )
        return packing, fast, reason

    @cached_property
    def attention(self) -> tuple[str, str]:
        """(kind, reason) of attention within packed rows. The real run then checks this choice on the model itself."""
        requested, device = self.config.model.attention, self.device.type
        if self.layout[0] not in ("shared", "separate"):
            return "groups", "rows are not packed"
        if requested == "groups" or (requested == "auto" and device != "cuda"):
            return "groups", "trees of one length at a time"
        calls = {c._replace(dtype=self.dtype) for c in attention_calls(self.model)}
        kinds, reason = select_attention(requested, calls, device, triton=True)
        return (kinds or ["groups"])[0], reason or "flash kernels take the model as it is"

    @property
    def side_by_side(self) -> bool:
        """Whether a CPU runs several passes concurrently, one per thread."""
        return self.layout[1]

    def cache_files(self) -> dict[str, Path]:
        """``{name of the rows: file of their reference log-probs}``. Loads the weights temporarily to compute the names."""
        config = self.config
        model = load_causal_model(reference_source(config), torch.device("cpu"), config.train.seed)
        cast_parameters(model, self.dtype)
        sha256 = with_adapter_sha256(config, source_sha256(reference_source(config), model))
        return {name: path for name, (_, path) in cache_paths(config, self.rows, sha256, model).items()}

    @property
    def shared_prompts(self) -> bool:
        return self.layout[0] == "shared"


def outline(source: ModelConfig, reward: bool = False) -> Any:
    """Return a transformers model on the meta device, in fp32, with dropout disabled.

    Raises:
        ModelError: transformers has no such model, or the folder has no weights.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification

    config = load_model_config(source.path, source.revision)
    check_model_path(source.path)
    auto_class: Any = AutoModelForImageTextToText if source.sees else AutoModelForCausalLM
    auto_class = AutoModelForSequenceClassification if reward else auto_class
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(source.path, "this is an encoder-decoder model", "give a causal (decoder-only) language model")
    if reward:
        config.num_labels, config.problem_type = 1, "regression"
    with loading(source.path, "the model could not be outlined", "give a causal model or an encoder"):
        model = on_meta(auto_class, config if reward or source.sees else text_config(config))
    disable_dropout(model)
    return model


def parameter_counts(model: Any) -> tuple[int, int]:
    """(all, trainable) parameter counts. Tied parameters count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def weight_file_bytes(path: str, model: Any) -> int:
    """Bytes of a model folder's safetensors files. For a hub id without a local folder, the size of its weights in bf16."""
    folder = Path(path).expanduser()
    total = sum(p.stat().st_size for p in folder.glob("*.safetensors")) if folder.is_dir() else 0
    return total or 2 * parameter_counts(base_model_of(model))[0]
