"""Frozen weights in 4 or 8 bits (bitsandbytes), below an adapter: QLoRA, arXiv 2305.14314."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import types
from typing import Any, cast

import torch
from torch import Tensor, nn

from penchant.errors import ConfigError
from penchant.models.options import ModelConfig


def bitsandbytes(key: str, value: str) -> Any:
    """Import bitsandbytes (8-bit and 4-bit weights), an optional dependency.

    Args:
        key, value: the config setting that needs it, for the error message.

    Raises:
        ConfigError: it is not installed.
    """
    # on a CPU with AVX512-BF16 it warns that a kernel is missing, which is not used here (`settle_quantized`)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ConfigError(key, f"{value} needs bitsandbytes", "pip install 'penchant[bnb]'") from error


def quantization(cfg: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Arguments for `from_pretrained` to quantize while loading: always from fp32, so the bits do not depend on the run's dtype."""
    if cfg.quantize == "none":
        return {}
    bitsandbytes("model.quantize", cfg.quantize)
    from transformers import BitsAndBytesConfig

    if cfg.quantize == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,  # `cast_parameters` changes it
        )
    return {"quantization_config": quantization, "device_map": {"": device}}


def is_quantized(layer: Any) -> bool:
    """Whether a layer's weight is held in 4 or 8 bits."""
    return type(getattr(layer, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def whole_weight(layer: Any, name: str = "weight") -> Tensor:
    """A layer's weight, dequantized to fp32 if it is quantized."""
    weight = getattr(layer, name)
    kind = type(weight).__name__
    if kind == "Params4bit":
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32
        fp32_weight: Tensor = importlib.import_module("bitsandbytes").functional.dequantize_4bit(weight.data, state)
        return fp32_weight
    if kind == "Int8Params":
        return weight.data.float() * (weight.SCB / 127.0)[:, None]  # type: ignore[no-any-return]
    return weight.detach()  # type: ignore[no-any-return]


class _WeightOnly(torch.autograd.Function):
    """``x W^T`` with W dequantized only during the product.

    bitsandbytes would also round activations to 8 bits: a token's log-prob would then jump depending on the rest of its row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return x @ whole_weight(layer).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ whole_weight(ctx.layer).to(grad.dtype), None


def _int8_forward(self: Any, x: Tensor) -> Tensor:
    out = cast(Tensor, _WeightOnly.apply(x, self))  # type: ignore[no-untyped-call]
    return out if self.bias is None else out + self.bias.to(out.dtype)


def settle_quantized(model: nn.Module) -> None:
    """Make quantized layers compute the same on every processor, regardless of earlier calls."""
    for layer in model.modules():
        if type(getattr(layer, "weight", None)).__name__ == "Int8Params":
            layer.forward = types.MethodType(_int8_forward, layer)
            layer.weight.CB = layer.weight.data  # type: ignore[union-attr]  # `own_memory` replaced the tensor
        elif is_quantized(layer):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # else eval mode repacks its bits
            layer.compute_type_is_set = True  # type: ignore[assignment]  # else the first input's dtype is kept


def dequantized(model: Any) -> Any:
    """Replace a model's quantized layers by plain linear layers with the same weights in fp32."""
    for name, layer in list(model.named_modules()):
        if is_quantized(layer):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight, linear.bias = nn.Parameter(whole_weight(layer)), layer.bias
            model.set_submodule(name, linear)
    model.hf_quantizer.remove_quantization_config(model)
    return model
