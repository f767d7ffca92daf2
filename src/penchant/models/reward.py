"""Reward models and value heads: load, score, save."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penchant.base.files import check_model_folder
from penchant.distributed.shard import gathered
from penchant.distributed.world import current
from penchant.errors import ModelError
from penchant.models.folder import check_built, check_finite, check_folder, check_layers, config_of, loading
from penchant.models.load import (
    base_model_of,
    disable_dropout,
    on_meta,
    plain_name,
    save_model,
    stays_wide,
    without_report,
)
from penchant.models.lora import effective_weights
from penchant.models.options import ModelConfig, check_model_path

# ---- Reward models: a transformers model for sequence classification with one output, its head, its padding, and saving ----

HEADS = ("score", "classifier")  # what transformers calls a classification head
SETTINGS = "reward_settings.json"  # in the model folder: how its texts were rendered and truncated
# RoBERTa-like models number positions from after the padding id: two of 514 are never used
FROM_BEHIND_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet", "data2vec-text")
ADAPTER = "adapter"  # subfolder of a LoRA run's model folder: the adapter alone, as saved by peft


@dataclass(frozen=True, slots=True)
class LoadedRewardModel:
    """A reward model in fp32, dropout off.

    Args:
        fresh: modules with weights missing from the folder (the head, a pooler), which must be trained.
    """

    model: Any
    encoder: bool
    fresh: tuple[str, ...]


def load_model_config(path: str, revision: str | None = None) -> Any:
    """Load a model's config; ModelError if there is none."""
    from transformers import AutoConfig

    source = check_model_path(path)
    check_folder(Path(source))
    with loading(config_of(path), "its config could not be loaded", "give a model folder"):
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)


def is_encoder(config: Any, path: str = "model") -> bool:
    """Whether the config is of a bidirectional (BERT-type) encoder rather than a causal model.

    Raises:
        ModelError: neither: transformers has no sequence classification for it, or it is an encoder-decoder model.
    """
    from transformers.models.auto import modeling_auto as auto

    kind = str(getattr(config, "model_type", ""))
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(path, "this is an encoder-decoder model", "give a causal model or a BERT-type encoder")
    if kind not in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        what = f"transformers has no sequence classification for {kind}"
        raise ModelError(path, what, "give a causal model or an encoder")
    # BERT-like models are also listed as causal models (decoders): one with a masked-LM head is bidirectional
    reads_both_ways = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return reads_both_ways or kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def context_of(config: Any, tokenizer: Any) -> int | None:
    """Maximum number of tokens of a model, from its config and tokenizer; None if neither sets a limit."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and str(config.model_type) in FROM_BEHIND_PADDING:
        limit -= int(config.pad_token_id or 0) + 1
    limits = [n for n in (limit, getattr(tokenizer, "model_max_length", None)) if n is not None and n < 10**9]
    return int(min(limits)) if limits else None


def architectures_of(config: Any) -> list[str]:
    """The architectures that a config names; none if the file holds something else there."""
    names = getattr(config, "architectures", None)
    return [str(n) for n in names] if isinstance(names, (list, tuple)) else []


def is_reward_model(config: Any) -> bool:
    """Whether a config is for sequence classification with one label."""
    named = any("SequenceClassification" in n for n in architectures_of(config))
    return named and int(getattr(config, "num_labels", 2)) == 1


def load_reward_model(cfg: ModelConfig, device: torch.device, seed: int = 0) -> LoadedRewardModel:
    """Load a model with one output per text from a causal model, an encoder, or a reward model.

    A head missing from the folder is drawn from a normal distribution with standard deviation 1 / sqrt(d + 1) (arXiv 2009.01325):
    for hidden states whose d coordinates are of size 1, the first rewards are also of size 1, for any d. Its bias, if the family has
    one, is 0: it cancels in every comparison.

    Raises:
        ModelError: no such folder, or no model for sequence classification.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    check_model_folder(Path(cfg.path).expanduser())
    config = load_model_config(cfg.path, cfg.revision)
    encoder = is_encoder(config, cfg.path)
    had_head = is_reward_model(config) and cfg.init == "pretrained"
    config.num_labels, config.problem_type = 1, "regression"
    logging.disable_progress_bar()
    folder, fresh = Path(cfg.path).expanduser(), set()
    how = "give a causal model or an encoder"
    with without_report():  # the head may be new, and a language model's head is unused
        with loading(config_of(cfg.path), "the model could not be loaded", how):
            if folder.is_dir():
                check_built(folder, on_meta(AutoModelForSequenceClassification, config), whole=False)
        with loading(cfg.path, "the model could not be loaded", how):
            torch.manual_seed(seed)
            if cfg.init == "random":
                model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
                fresh = {name.split(".")[0] for name, _ in model.named_parameters()}
            else:
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    check_model_path(cfg.path),
                    revision=cfg.revision,
                    config=config,
                    trust_remote_code=False,
                    dtype=torch.float32,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # a classifier with several labels provides its body only
                )
                fresh = set(_missing(info))
                check_layers(cfg.path, info["unexpected_keys"], config)
    missing = sorted(n for n in fresh if not _may_be_new(n)) if cfg.init == "pretrained" else []
    if missing:
        raise ModelError(
            cfg.path, f"weights are missing in the folder ({', '.join(missing[:3])})", "give a whole model"
        )
    check_finite(cfg.path, model.named_parameters())
    if not had_head:
        _draw_head(head_of(model))
    disable_dropout(model)
    if not encoder:
        # the padding id may also be a real token (BOS), whose embedding must be trained
        model.get_input_embeddings().padding_idx = None
    return LoadedRewardModel(model.to(device), encoder, tuple(sorted({_module(n) for n in fresh})))


def _missing(info: Mapping[str, Any]) -> list[str]:
    mismatched = [m[0] if isinstance(m, tuple) else m for m in info["mismatched_keys"]]
    return [*info["missing_keys"], *mismatched]


def _may_be_new(name: str) -> bool:
    return any(part in (*HEADS, "pooler", "pre_classifier", "head") for part in name.split("."))


def _module(name: str) -> str:
    """The module of a parameter that is small enough to be trained in full beside an adapter."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if _may_be_new(part)), 0)
    return ".".join(parts[: index + 1])


def _draw_head(head: nn.Linear) -> None:
    with torch.no_grad():
        head.weight.normal_(0.0, 1.0 / math.sqrt(head.in_features + 1))
        if head.bias is not None:
            head.bias.zero_()


def head_of(model: Any) -> nn.Linear:
    """The linear layer whose single output is the reward; with LoRA, its trained copy.

    Raises:
        ModelError: the model has none.
    """
    base = base_model_of(model)
    for name in HEADS:
        part = getattr(base, name, None)
        copies = getattr(part, "modules_to_save", None)
        part = copies["default"] if copies is not None else part
        linear = [m for m in part.modules() if isinstance(m, nn.Linear) and m.out_features == 1] if part else []
        if linear:
            return linear[-1]
    raise ModelError(type(base).__name__, "has no head with one output", "give a model for sequence classification")


def head_scores(head: nn.Linear, features: Tensor) -> Tensor:
    """``w h + b`` of features (n, d) as (n,), in fp32 (fp64): rewards of two answers differ in digits that bf16 lacks."""
    wide = torch.promote_types(features.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.to(wide)
    return nn.functional.linear(features.to(wide), head.weight.to(wide), bias).squeeze(1)


# ---- padding and saving ----


def choose_padding(tokenizer: Any) -> None:
    """Give a tokenizer a padding token that never ends a text, and pad on the right.

    transformers reads a causal model's score at the last token that is not padding. With padding == EOS that is the token before EOS,
    so other tools would get a different score from the one trained. The first of these is used: a special token with "pad" in its name,
    BOS, UNK, a new token.
    """
    tokenizer.padding_side = "right"
    eos = tokenizer.eos_token
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    added = sorted((i, str(t.content)) for i, t in tokenizer.added_tokens_decoder.items() if t.special)
    pad_tokens = [t for _, t in added if "pad" in t.lower()]
    candidates = [t for t in (*pad_tokens, tokenizer.bos_token, tokenizer.unk_token) if t is not None and t != eos]
    if candidates:
        tokenizer.pad_token = candidates[0]
    else:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})


def set_padding(model: Any, tokenizer: Any) -> None:
    """Set the padding token in a causal model's config, and add a row to its embedding if the token is new."""
    base = base_model_of(model)
    if tokenizer.pad_token_id >= base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        base.get_input_embeddings().padding_idx = None
    for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
        config.pad_token_id = tokenizer.pad_token_id


def whole_state_dict(model: Any, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every weight under the plain model's names, with the adapter merged (``W + scale B A`` in fp32), in the model's dtype."""
    base = base_model_of(model)
    if base is model:
        return {name: value.detach().clone() for name, value in model.state_dict().items()}
    merged = effective_weights(model, masters)
    state = {}
    for name, value in base.state_dict().items():
        if "lora_" in name or ".original_module." in name:
            continue
        plain = plain_name(name.replace(".modules_to_save.default.", "."))
        state[plain] = merged[plain].to(value.dtype) if plain in merged else value.detach().clone()
    return state


def save_reward_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    settings: Mapping[str, Any],
    whole: Mapping[str, Tensor] | None,
    sharded: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a folder that `AutoModelForSequenceClassification` loads, with the tokenizer.

    For a LoRA run it holds the merged model, and in ``adapter/`` the adapter for peft.

    Args:
        settings: template, max_length and add_eos, needed to score with the model; whole: see `whole_reward`.
        sharded: the gathered state of a sharded model.
    """
    base = base_model_of(model)
    save_model(base, tokenizer, folder, whole)
    if base is not model:
        options = {} if sharded is None else {"state_dict": dict(sharded)}
        model.save_pretrained(folder / ADAPTER, safe_serialization=True, **options)
    (folder / SETTINGS).write_text(json.dumps(dict(settings), indent=1))


def whole_reward(
    model: Any, masters: Mapping[str, Tensor], sharded: Mapping[str, Tensor] | None, dtype: torch.dtype
) -> Mapping[str, Tensor] | None:
    """The weights of a reward model with its adapter merged; None if the model's own weights can be saved directly.

    Args:
        masters: the optimizer's fp32 weights; sharded: the state of a sharded model on rank 0, empty on others; every rank must call.
        dtype: dtype to save a sharded model in.
    """
    if base_model_of(model) is model:
        return sharded
    state = whole_state_dict(model, masters)
    if sharded is None:
        return state
    return gathered(state.items(), current(), dtype, {name for name in state if stays_wide(model, name)})


# ---- A value for every token: a linear head on the hidden states of the policy or of a separate model ----


class ValueHead(nn.Module):
    """``V = w h + b``, initialized to zero: before training every value is 0, so the first advantages are the rewards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states (R, d) to values (R,), in fp32 (fp64)."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return torch.nn.functional.linear(hidden.to(wide), self.weight.to(wide), self.bias.to(wide)).squeeze(1)


class ValueModel(nn.Module):
    """A value head with the backbone it reads: the policy's (None here) or a separate causal model."""

    def __init__(self, width: int, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.head = ValueHead(width)
        self.backbone = backbone
        if backbone is not None:  # its LM head is never used
            backbone.get_output_embeddings().requires_grad_(False)  # type: ignore[operator]
