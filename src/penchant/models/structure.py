"""Where things are inside a transformers or peft model, and how its packing is chosen."""

from __future__ import annotations

from typing import Any

from torch import nn

# layers that carry state along the row: a completion could not restart at the prompt's end
_RECURRENT_LAYERS = ("linear_attention", "mamba", "recurrent", "conv", "rwkv", "ssm", "chunked_attention")
_RECURRENT_MODELS = ("mamba", "rwkv", "recurrent_gemma", "jamba", "zamba", "bamba", "falcon_h1", "xlstm", "lfm2")


def base_model_of(model: nn.Module) -> Any:
    """The transformers causal model itself, without peft's wrapping."""
    get_base = getattr(model, "get_base_model", None)
    return get_base() if callable(get_base) else model


def backbone_of(model: nn.Module) -> Any:
    """The transformer without its head: its output's `last_hidden_state` is what the head reads."""
    base = base_model_of(model)
    return getattr(base, base.base_model_prefix)


def head_scaling(config: Any) -> tuple[float, float | None]:
    """(scale, softcap) that the model applies to its logits: Cohere multiplies, Granite divides, Gemma 2 caps."""
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale = float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:
        scale = 1.0 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)
    return scale, (float(softcap) if softcap is not None else None)


def carries_state(config: Any) -> str | None:
    """Why the model's layers cannot restart in the middle of a row, or None when they can."""
    kinds = {str(k) for k in (getattr(config, "layer_types", None) or ())}
    found = sorted(k for k in kinds if any(r in k for r in _RECURRENT_LAYERS))
    if found:
        return f"layers of type {', '.join(found)}"
    model_type = str(getattr(config, "model_type", ""))
    if any(model_type.startswith(m) for m in _RECURRENT_MODELS):
        return f"{model_type} layers carry state"
    if getattr(config, "use_bidirectional_attention", False):
        return "bidirectional (prefix) attention"
    return None


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to zero: preference log-ratios of a noisy policy against a quiet reference are wrong."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
