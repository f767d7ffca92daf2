"""Load a model, adapt it with LoRA, cast, hash, save; where things are in a transformers model."""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import json
import logging
import os
import re
import sys
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from penchant.base.files import check_model_folder, file_sha256
from penchant.base.machine import NAMES, accelerator, why_not
from penchant.distributed.shard import full
from penchant.errors import ConfigError, ModelError
from penchant.models.folder import (
    check_built,
    check_finite,
    check_folder,
    check_layers,
    check_template,
    config_of,
    first_line,
    headers,
    loading,
)
from penchant.models.options import LoraConfig, ModelConfig, check_model_path

# ---- Load a causal model and its tokenizer from a folder or hub id, as fp32 or bf16 parameters, with a LoRA adapter or without ----

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def resolve_device(device: str) -> torch.device:
    """``auto`` is the NVIDIA (AMD) GPU when there is one, else the CPU; ConfigError where torch cannot compute on another one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    why = why_not(torch.device(device).type)
    if why:
        raise ConfigError("model.device", why, "set model.device=cpu or auto")
    place = torch.device(device)
    if place.index is not None and place.index >= (count := accelerator(place.type).device_count()):
        there = ", ".join(f"{place.type}:{i}" for i in range(count))
        raise ConfigError("model.device", f"there is no {device} here, only {there}", "give one of those")
    return place


def resolve_place(key: str, wanted: str, policys: Any) -> torch.device:
    """Where a model beside the trained one is; ``auto`` is where the policy is.

    Raises:
        ConfigError: this machine has no such device; it names the `key`.
    """
    try:
        return resolve_device(wanted if wanted != "auto" else str(policys))
    except ConfigError as error:
        raise ConfigError(key, f"is {wanted}, but {error.what}", "set it to cpu or auto") from error


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 where matrix products in bf16 are native (GPU, AVX512-BF16, AMX), else fp32."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type in ("cuda", "xpu"):
        native = accelerator(device.type).is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    if device.type == "mps":
        return torch.float32
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def bitsandbytes(key: str, value: str) -> Any:
    """The library of 8-bit and 4-bit numbers, which is an extra.

    Args:
        key, value: of the config that asks for it.

    Raises:
        ConfigError: it is not installed.
    """
    # where the CPU has AVX512-BF16 it says that it lacks a kernel, which is not used here (`_settle_quantized`)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ConfigError(key, f"{value} needs bitsandbytes", "pip install 'penchant[bnb]'") from error


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies in bf16 natively, and torch was not told (ATEN_CPU_CAPABILITY) to do without its kernels for it."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check()) if callable(check) else False


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """A tokenizer; ModelError when there is none."""
    from transformers import AutoTokenizer

    given = check_model_path(path, "tokenizer_config.json")
    check_folder(Path(given))
    with loading(lambda: _odd_tokenizer_file(path), "no tokenizer could be loaded", "set model.tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(given, revision=revision, trust_remote_code=False)
        len(tokenizer), tokenizer("A", add_special_tokens=True)
    check_template(path, tokenizer)
    return tokenizer


def tokens_of(tokenizer: Any) -> int:
    """How many embeddings a model needs for a tokenizer: ids may have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def load_processor(cfg: ModelConfig) -> Any:
    """The processor of a vision-language model: its tokenizer, and what makes pictures into tokens.

    Raises:
        ConfigError: a library that it needs is not installed, or it has no such option. ModelError: there is none.
    """
    from transformers import AutoProcessor

    given = check_model_path(cfg.path)
    check_folder(Path(given))
    read: Any = partial(AutoProcessor.from_pretrained, given, revision=cfg.revision, trust_remote_code=False)
    with loading(
        cfg.path, "no processor of pictures could be loaded", "give a vision-language model, or set model.vision=off"
    ):
        try:
            processor: Any = read(**cfg.image_options)
        except (ImportError, AttributeError) as error:
            if importlib.util.find_spec("torchvision") is not None and importlib.util.find_spec("PIL") is not None:
                raise
            what = f"the model's processor needs Pillow and torchvision ({first_line(error)})"
            raise ConfigError("model.vision", what, "pip install 'penchant[vision]'") from error
        eyes, tokenizer = getattr(processor, "image_processor", None), getattr(processor, "tokenizer", None)
        if eyes is None or tokenizer is None:
            raise ModelError(cfg.path, "its processor reads no pictures", "set model.vision=off")
        further = sorted(
            set(cfg.image_options) - set(vars(eyes))
        )  # a name that changes another one, as max_pixels does
        unknown = [n for n in further if read(**{n: cfg.image_options[n]}).to_json_string() == read().to_json_string()]
        if unknown:
            how = f"it has {', '.join(sorted(n for n in vars(eyes) if not n.startswith('_')))}"
            raise ConfigError(f"model.image_options.{unknown[0]}", f"is not a setting of {type(eyes).__name__}", how)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = getattr(processor, "chat_template", None)
    check_template(cfg.path, tokenizer)
    return processor


def processor_sha256(processor: Any) -> str:
    """SHA-256 of what a processor does with pictures: its settings, and the versions that it runs on."""
    import transformers

    told = [type(processor.image_processor).__name__, processor.to_json_string(), transformers.__version__]
    told += [str(getattr(sys.modules.get(name), "__version__", None)) for name in ("PIL", "torchvision")]
    return hashlib.sha256("\0".join(told).encode()).hexdigest()


def _odd_tokenizer_file(path: str) -> str:
    """Which file of a folder it is that no tokenizer is made of."""
    from tokenizers import Tokenizer

    file = Path(path).expanduser() / "tokenizer.json"
    if not file.exists():
        return path
    try:
        Tokenizer.from_file(str(file))
    except BaseException:  # its own errors, and the panics of Rust
        return str(file)
    return str(file.with_name("tokenizer_config.json"))


def load_causal_model(
    cfg: ModelConfig,
    device: torch.device,
    seed: int = 0,
    *,
    held: bool = False,
    within: torch.dtype = torch.float32,
    mapped: bool = False,
) -> Any:
    """A transformers causal model, dropout off, in fp32 where nothing else is said; `cast_parameters` makes it bf16 once the masters are taken.

    Args:
        held: weights that `model.quantize` names stay quantized, for an adapter to be trained on them; else they are dequantized to fp32.
        within: what weights are held in from the start, see `held_in`; mapped: they may stay in the file, see `own_memory`.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = check_model_path(cfg.path)
    check_model_folder(Path(path))
    check_folder(Path(path))
    if cfg.quantize == "none":
        return _load(cfg, path, device, seed, within, mapped)
    model = _load(cfg, path, device, seed)
    return model if held else dequantized(model)


def held_in(cfg: ModelConfig, dtype: torch.dtype, frozen: bool, shards: bool = False) -> torch.dtype:
    """What the weights of a model that runs in `dtype` are held in from the start: that, where fp32 would hold nothing more.

    Args:
        frozen: nothing is trained, or only an adapter; what is trained has masters in fp32, which a file in bf16 makes no better.
        shards: it will be sharded, and is cast then, layer by layer: what is as in the file needs no memory until then.
    """
    if cfg.quantize != "none" or cfg.init == "random" or (dtype != torch.bfloat16 and not shards):
        return torch.float32
    folder = Path(check_model_path(cfg.path))
    stored = {kind for kind, *_ in headers(folder).values()} if folder.is_dir() and (shards or not frozen) else set()
    if shards:
        return torch.bfloat16 if stored == {"BF16"} else torch.float32
    return dtype if frozen or stored == {"BF16"} else torch.float32


def _load(
    cfg: ModelConfig,
    path: str,
    device: torch.device,
    seed: int,
    within: torch.dtype = torch.float32,
    mapped: bool = False,
) -> Any:
    """What is in a folder that holds a model; the tests keep it by the folder's bytes."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    folder, how_to = Path(path), "give a folder or hub id of a causal model"
    auto: Any = AutoModelForImageTextToText if cfg.sees else AutoModelForCausalLM
    with loading(config_of(path), "the model could not be loaded", how_to):
        config = AutoConfig.from_pretrained(path, revision=cfg.revision, trust_remote_code=False)
        text = config if cfg.sees else text_config(config)
        if cfg.sees and type(config) not in AutoModelForImageTextToText._model_mapping:
            what = f"a model of type {config.model_type} takes no pictures"
            raise ConfigError("model.vision", what, "set model.vision=off, or take a vision-language model")
        if folder.is_dir():
            check_built(folder, on_meta(auto, text), whole=text is config)
        if within != torch.float32:
            outline = on_meta(auto, text, within)
            if any(b.is_floating_point() and b.dtype != torch.float32 for b in outline.buffers()):
                within = torch.float32  # else buffers would be made in it: a rotary one turns far positions wrongly
    with loading(cfg.path, "the model could not be loaded", how_to):
        if cfg.init == "random":
            torch.manual_seed(seed)
            model = auto.from_config(text, dtype=torch.float32)
        else:
            how = {"revision": cfg.revision, "dtype": within, "trust_remote_code": False} | _quantization(cfg, device)
            part = {} if cfg.sees else _text_part(config)
            with without_report() if part else nullcontext():
                loaded: Any = auto.from_pretrained(path, output_loading_info=True, **how, **part)
            model, info = loaded
            if (
                text is not config
            ):  # the names of the folder that it was a part of are not those under which it is saved
                vars(model).pop("_weight_conversions", None)
            _check_complete(cfg.path, info)
            if config.get_text_config() is config:  # else a tower of images has layers of its own
                check_layers(cfg.path, info["unexpected_keys"], config)
    check_finite(cfg.path, model.named_parameters())
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(cfg.path, "this is an encoder-decoder model", "give a causal (decoder-only) language model")
    disable_dropout(model)
    if not mapped:
        own_memory(model)
    if cfg.quantize == "none":
        model = model.to(device)
    else:
        _settle_quantized(model)
    _check_behavior(cfg.path, model)
    return model


# ---- Frozen weights in 4 or 8 bits (bitsandbytes), below an adapter ----


def _quantization(cfg: ModelConfig, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` needs to quantize while it loads: always from fp32, so that the bits do not depend on the run's dtype."""
    if cfg.quantize == "none":
        return {}
    bitsandbytes("model.quantize", cfg.quantize)
    from transformers import BitsAndBytesConfig

    if cfg.quantize == "int8":
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,  # until `cast_parameters`
        )
    return {"quantization_config": how, "device_map": {"": device}}


def is_quantized(layer: Any) -> bool:
    """Whether a layer's weight is held in 4 or 8 bits."""
    return type(getattr(layer, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def quantized_bytes(model: nn.Module, bits: str) -> tuple[int, int, int]:
    """What quantizing makes of a plain model: (weights that it is done to, bytes of them afterwards, weights of the largest).

    nf4: half a byte, a byte a block of 64 and 4 bytes 256 blocks; int8: a byte, and 4 bytes a row.
    """
    head, count, held, largest = base_model_of(model).get_output_embeddings(), 0, 0, 0
    for name, layer in base_model_of(model).named_modules():
        if isinstance(layer, nn.Linear) and layer is not head and "lora_" not in name and bits != "none":
            n = layer.weight.numel()
            blocks = -(-n // 64)
            count, largest = count + n, max(largest, n)
            held += n + 4 * layer.out_features if bits == "int8" else n // 2 + blocks + 4 * -(-blocks // 256)
    return count, held, largest


def whole_weight(layer: Any, name: str = "weight") -> Tensor:
    """A layer's weight, dequantized to fp32 where it is quantized."""
    weight = getattr(layer, name)
    kind = type(weight).__name__
    if kind == "Params4bit":
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32
        whole: Tensor = importlib.import_module("bitsandbytes").functional.dequantize_4bit(weight.data, state)
        return whole
    if kind == "Int8Params":
        return weight.data.float() * (weight.SCB / 127.0)[:, None]  # type: ignore[no-any-return]
    return weight.detach()  # type: ignore[no-any-return]


class _WeightOnly(torch.autograd.Function):
    """``x W^T`` with W dequantized for as long as the product takes.

    bitsandbytes would round activations to 8 bits too: a token's log-prob would then jump with what else is in its row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return x @ whole_weight(layer).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ whole_weight(ctx.layer).to(grad.dtype), None


def _int8_forward(self: Any, x: Tensor) -> Tensor:
    found = cast(Tensor, _WeightOnly.apply(x, self))  # type: ignore[no-untyped-call]
    return found if self.bias is None else found + self.bias.to(found.dtype)


def _settle_quantized(model: nn.Module) -> None:
    """Quantized layers compute the same whatever the processor and whatever was computed before."""
    for layer in model.modules():
        if type(getattr(layer, "weight", None)).__name__ == "Int8Params":
            layer.forward = types.MethodType(_int8_forward, layer)
            layer.weight.CB = layer.weight.data  # type: ignore[union-attr]  # `own_memory` made it another one
        elif is_quantized(layer):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # it would pack its bits anew in eval mode
            layer.compute_type_is_set = True  # type: ignore[assignment]  # else the first input's dtype stays


def dequantized(model: Any) -> Any:
    """The model with its quantized layers in fp32: the same weights, in plain linear layers."""
    for name, layer in list(model.named_modules()):
        if is_quantized(layer):
            whole = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            whole.weight, whole.bias = nn.Parameter(whole_weight(layer)), layer.bias
            model.set_submodule(name, whole)
    model.hf_quantizer.remove_quantization_config(model)
    return model


def source_sha256(source: ModelConfig, model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """`weights_sha256` of a model that was loaded from `source`; of a quantized one over its files and how it was quantized.

    Bits may differ between a GPU and a CPU, and what they are made of does not.
    """
    if source.quantize == "none":
        return weights_sha256(model, dtype)
    from transformers.utils import cached_file

    path = check_model_path(source.path)
    folder = (
        Path(path)
        if Path(path).is_dir()
        else Path(str(cached_file(path, "config.json", revision=source.revision))).parent
    )
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    named = [source.quantize, *(f"{p.name}:{file_sha256(p)}" for p in files)]
    return hashlib.sha256(";".join(named).encode()).hexdigest()


def on_meta(auto: Any, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model that a config makes, without memory; torch's random numbers are left alone."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return auto.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)


def _check_complete(path: str, info: Mapping[str, Any]) -> None:
    """Refuse a folder that is not a whole language model: transformers would draw what is missing at random and go on."""
    missing, left = (sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys"))
    heads = [n for n in left if n.split(".")[0] in ("score", "classifier")]
    if heads:
        what = f"this is a classifier or reward model (it has {heads[0]}), which writes nothing"
        raise ModelError(path, what, "give the language model")
    if missing:
        raise ModelError(path, f"weights are missing in the folder ({', '.join(missing[:3])})", "give a whole model")


def text_config(config: Any) -> Any:
    """The config of the language model in a model of text and images (sound), where transformers has it by itself; else the config."""
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    if text is config or type(text) not in AutoModelForCausalLM._model_mapping:
        return config
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
    return text


def _text_part(config: Any) -> dict[str, Any]:
    """What `from_pretrained` needs to read only the language model out of a folder that holds more."""
    text = text_config(config)
    if text is config:
        return {}
    weights = {r"^(model\.)?language_model\.lm_head": "lm_head"}  # where they are, by age of the folder
    weights[r"^(model\.)?(language|text)_model\.(?!lm_head)(model\.)?"] = "model."
    return {"config": text, "key_mapping": weights}


@contextmanager
def without_report() -> Iterator[None]:
    """transformers reports weights that it leaves out or draws anew; around here that is meant to happen."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_behavior(path: str, model: Any) -> None:
    """Refuse what no policy may do, by looking at what the model says.

    Raises:
        ModelError: two passes in train mode differ (dropout), an earlier token's logits depend on a later one (an encoder), or the
            model takes no text alone.
    """
    rows, device = model.get_input_embeddings().weight.shape[0], next(model.parameters()).device
    numbers = torch.Generator().manual_seed(0)

    def logits(ids: Tensor) -> Tensor:
        return cast(Tensor, model(input_ids=ids, **without_cache(model)).logits.float())

    def passes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # more rows where the model draws numbers at all: some draws matter seldom
        for batch in (1, 16):
            ids, others = (torch.randint(0, rows, (batch, 16), generator=numbers).to(device) for _ in range(2))
            with quiet(model, training=True):
                before = _random_state(device)
                first, again = logits(ids), logits(ids)
                drew = not torch.equal(before, _random_state(device))
                later = logits(torch.cat((ids[:, :8], others[:, 8:]), dim=1))
            if not drew:
                break
        with quiet(model):
            return first, again, logits(ids), (first - later)[:, :8].abs().max()

    try:
        try:
            first, again, evaluated, later = passes()
            unclear = not _in_fp32(model) and not float(later) <= 1e-3 * float(first.std())
        except RuntimeError:
            unclear = not _in_fp32(model)  # what does not run in 16 bits is said by `check_precision`
            if not unclear:
                raise
        if unclear:
            with widened(model):
                first, again, evaluated, later = passes()
    except Exception as error:  # whatever a model raises that wants more than ids
        how = "give a causal language model"
        raise ModelError(path, f"the model does not run on text alone ({first_line(error)})", how) from error
    if not bool(torch.isfinite(first).all()):
        raise ModelError(path, "the model's logits are NaN or infinite", "get its weights and its config.json again")
    size = float(first.std()) + 1e-12
    for other, what in ((again, "two passes over one row in train mode"), (evaluated, "train mode and eval mode")):
        if not float((first - other).abs().max()) <= 1e-4 * size:
            raise ModelError(
                path,
                f"{what} give different logits: the model has dropout (or other randomness) that cannot be turned off here",
                "set its dropout to 0 in config.json",
            )
    coarse = not all(p.is_floating_point() for p in model.parameters())  # quantized weights are multiplied in 16 bits
    if not float(later) <= (0.1 if coarse else 1e-3) * size:
        raise ModelError(
            path,
            "the logits of a token depend on later tokens: this is an encoder, or reads both ways",
            "give a causal (decoder-only) language model",
        )


def _in_fp32(model: nn.Module) -> bool:
    """Whether a model computes in fp32 (fp64), so that what should be equal is."""
    return all(p.dtype != torch.bfloat16 for p in model.parameters())


def _random_state(device: torch.device) -> Tensor:
    return cast(Tensor, accelerator(device.type).get_rng_state()) if device.type in NAMES else torch.get_rng_state()


@contextmanager
def quiet(model: nn.Module, training: bool = False) -> Iterator[None]:
    """A look at what a model says: no gradient, eval mode (or train mode), no random number used up."""
    before = model.training
    devices = [p.device for p in itertools.islice(model.parameters(), 1) if p.device.type in NAMES]
    kind = devices[0].type if devices else "cuda"
    model.train(training)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices, device_type=kind):
            yield
    finally:
        model.train(before)


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """A model's bf16 (fp16) parameters in fp32 for a while, where there and back loses nothing; a GPU's products are in fp32 then, not in TF32."""
    low = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    matmul = torch.backends.cuda.matmul
    tf32 = next(model.parameters()).device.type == "cuda" and matmul.allow_tf32
    for p, _ in low:
        p.data = p.data.float()
    if tf32:
        matmul.allow_tf32 = False
    try:
        yield
    finally:
        if tf32:
            matmul.allow_tf32 = True
        for p, dtype in low:
            p.data = p.data.to(dtype)


def without_cache(part: Any) -> dict[str, Any]:
    """What keeps a model's `forward` from making a cache, where it makes one."""
    parameters = inspect.signature(part.forward).parameters
    takes = "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {"use_cache": False} if takes else {}


def own_memory(model: nn.Module) -> None:
    """Move weights out of the mapped file.

    There they stand wherever its header happens to end, and products over unaligned rows differ in their last bits from those of a
    copy: the same weights would train differently by the length of a file's header.
    """
    for p in model.parameters():
        if p.device.type == "cpu":
            p.data = p.data.clone()


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating-point parameters in place; those that `stays_wide` names to fp32 where `dtype` has 16 bits.

    Buffers (rotary frequencies) stay in fp32: in bf16 they would rotate far positions wrongly.
    """
    for name, p in model.named_parameters():
        wanted = torch.promote_types(dtype, torch.float32) if stays_wide(model, name) else dtype
        if p.is_floating_point() and p.dtype != wanted:
            p.data = p.data.to(wanted)
    for layer in model.modules():
        if type(getattr(layer, "weight", None)).__name__ == "Params4bit":
            layer.compute_dtype = layer.weight.quant_state.dtype = dtype  # type: ignore[union-attr, assignment]
    config = getattr(base_model_of(model), "config", None)
    if config is not None:
        config.dtype = dtype


def stays_wide(model: nn.Module, name: str) -> bool:
    """Whether a parameter of this name is in fp32 in a model of 16 bits, as in transformers: in some families a router's."""
    kept = getattr(base_model_of(model), "_keep_in_fp32_modules_strict", None) or ()
    return "lora_" not in name and any(part in plain_name(name) for part in kept)


def add_lora(
    model: Any, cfg: LoraConfig, seed: int, *, task: str = "CAUSAL_LM", whole: Sequence[str] = (), within: str = ""
) -> Any:
    """Wrap a model with a trainable LoRA adapter (peft); everything else is frozen.

    Args:
        task: peft's task type; whole: modules that are trained and saved as they are, without an adapter (a new head).
        within: the name of the module whose layers alone get adapters.

    Papers: arXiv 2106.09685; rsLoRA 2312.03732; DoRA 2402.09353.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    torch.manual_seed(seed)
    targets = cfg.target_modules
    peft_config = PeftLoraConfig(
        r=cfg.r,
        lora_alpha=cfg.alpha,  # type: ignore[arg-type]
        lora_dropout=cfg.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type=task,
        modules_to_save=list(whole) or None,
        exclude_modules=_below(whole) if whole else rf"(?!{re.escape(within)}\.).*" if within else None,
        use_rslora=cfg.rslora,
        use_dora=cfg.dora,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
            warnings.simplefilter("ignore", UserWarning)  # of tied weights, which check_adapter refuses
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)  # of experts
            with _adapters_in_fp32():
                adapted = get_peft_model(model, peft_config, autocast_adapter_dtype=False)
    except ValueError as error:
        what, other = first_line(error), "name" if targets == "all-linear" else 'use "all-linear" or names of'
        if "not found in the base model" in what:
            what = f"{targets if isinstance(targets, str) else ', '.join(targets)}: this model has no such layers"
        if isinstance(targets, str) and "," in targets:
            other = f"a list is written [{', '.join(t.strip() for t in targets.split(','))}]; {other}"
        raise ConfigError("lora.target_modules", what, f"{other} linear layers of this model") from error
    check_adapter(adapted)
    return adapted


@contextmanager
def _adapters_in_fp32() -> Iterator[None]:
    """A new adapter keeps its bits on weights in bf16, which peft would cast it to."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = BaseTunerLayer._get_base_layer_device_and_dtype

    def wide(self: Any, layer: Any) -> tuple[Any, Any]:
        device, dtype = found(self, layer)
        return device, torch.float32 if dtype == torch.bfloat16 else dtype

    BaseTunerLayer._get_base_layer_device_and_dtype = wide  # type: ignore[method-assign]
    try:
        yield
    finally:
        BaseTunerLayer._get_base_layer_device_and_dtype = found  # type: ignore[method-assign]


def _below(modules: Sequence[str]) -> str:
    """A pattern for the names of these modules and of everything in them."""
    return r"(.*\.)?(" + "|".join(re.escape(m) for m in modules) + r")(\..*)?"


def check_adapter(model: Any) -> None:
    """Prove on the start model that its adapters can be merged: one layer of each kind, with an update that changes something.

    Raises:
        ConfigError: an adapter's weight belongs to another layer too, a layer multiplies in a way of its own that peft does not know, or the
            merged weights give other logits than the adapter.
    """
    base = base_model_of(model)
    holders: dict[int, list[str]] = {}
    for name, module in base.named_modules(remove_duplicate=False):
        for own, p in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(p), []).append(plain_name(f"{name}.{own}"))
    kinds: dict[tuple[str, str], tuple[str, Any]] = {}
    for name, module in adapters_of(base):
        tied = [n for n in holders[id(_adapted(module))] if n != name]
        if tied:
            raise ConfigError(
                "lora.target_modules",
                f"{name} is the same weight as {tied[0]} in this model: an adapter on one of them could not be merged",
                f"leave {name.split('.')[-2]} out of it",
            )
        kinds.setdefault((type(module).__name__, ".".join(re.sub(r"\d+", "", name).split(".")[-3:])), (name, module))
    if next(base.parameters()).device.type == "meta" or base.get_output_embeddings() is None:
        return
    if any(map(is_quantized, base.modules())):  # linear layers all; merging dequantizes, and looks then
        return
    updates = [p for _, m in kinds.values() for n, p in m.named_parameters() if _starts_at_zero(n)]
    before = [p.detach().clone() for p in updates]
    others = [m for _, m in adapters_of(base) if all(m is not chosen for _, chosen in kinds.values())]
    ids = torch.arange(12, device=next(base.parameters()).device)[None] + 1

    def logits(without: Sequence[Any]) -> Tensor:
        for module in without:
            module._disable_adapters = True
        try:
            return cast(Tensor, base(input_ids=ids, **without_cache(base)).logits)
        finally:
            for module in without:
                module._disable_adapters = False

    # in bf16 a merged weight is rounded, which the layers above make more of
    with widened(model), quiet(model):
        every = [m for _, m in adapters_of(base)]
        try:
            for p in updates:
                p.data.add_(torch.randn_like(p), alpha=0.1)
            with _names_where_it_fails(kinds.values()):
                adapter = logits(others)
            whole = {name: (_adapted(module), merged_weight(module)) for name, module in kinds.values()}
        finally:
            for p, own in zip(updates, before, strict=True):
                p.data.copy_(own)
        start = logits(every)
        kept = [(p, p.data) for p, _ in whole.values()]
        try:
            for p, merged in whole.values():
                p.data = merged.to(p.dtype)
            away = float((logits(every) - adapter).abs().max())
        finally:
            for p, data in kept:
                p.data = data
    if not away <= 1e-3 * max(float((adapter - start).abs().max()), 1e-3 * float(start.abs().max())):
        raise ConfigError(
            "lora.target_modules",
            f"merging an adapter of this model changes its logits by {away:.2g}",
            "name the attention's projections only, e.g. [q_proj, v_proj]",
        )


@contextmanager
def _names_where_it_fails(layers: Iterable[tuple[str, Any]]) -> Iterator[None]:
    """A pass that an adapter does not fit (a linear layer in groups, whose inputs are wider than its weight) is a sentence with the layer's name."""
    entered: list[str] = []
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: entered.append(name)) for name, m in layers]
    try:
        yield
    except RuntimeError as error:
        if not entered:
            raise
        kind = entered[-1].split(".")[-2]
        what = f"peft's adapter does not fit {entered[-1]} ({first_line(error)})"
        raise ConfigError(
            "lora.target_modules", what, f"name this model's other linear layers, without {kind}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _starts_at_zero(name: str) -> bool:
    """Whether it is the half of an adapter that is zero in a new one: B, of an embedding A."""
    return "lora_B" in name or "lora_embedding_A" in name


def is_b_matrix(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's B, whose learning rate LoRA+ raises."""
    return "lora_B" in name or "lora_embedding_B" in name


def adapters_of(base: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name of the weight in the plain model, LoRA layer) of every adapter; one that adapts several weights is nested."""
    for name, module in base.named_modules():
        if hasattr(module, "get_delta_weight"):
            yield f"{plain_name(name)}.{getattr(module, 'parameter_name', 'weight')}", module


def plain_name(name: str) -> str:
    """A module's or parameter's name without peft's layers around it."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _adapted(module: Any) -> Tensor:
    """The weight that a LoRA layer adapts: a linear layer's, or one of several of a layer of experts."""
    inner = module.get_base_layer()
    return getattr(inner, getattr(module, "parameter_name", "weight"))  # type: ignore[no-any-return]


def merged_weight(module: Any) -> Tensor:
    """``W' = W + scale B A`` in fp32 (fp64); of DoRA ``m W' / |W'|`` with the norm of each output's weights."""
    weight = whole_weight(module.get_base_layer(), getattr(module, "parameter_name", "weight"))
    wide = torch.promote_types(weight.dtype, torch.float32)
    (name,) = module.active_adapters
    merged = weight.to(wide) + module.get_delta_weight(name).detach().to(wide)
    magnitude = getattr(module, "lora_magnitude_vector", {})
    if name in magnitude:
        inputs, shape = (0, (1, -1)) if getattr(module, "fan_in_fan_out", False) else (1, (-1, 1))
        m = magnitude[name].weight.detach().to(wide).view(shape)
        merged *= m / torch.linalg.vector_norm(merged, dim=inputs, keepdim=True)
    return merged


def effective_weights(model: Any, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained weights in fp32 (fp64) under the base model's names, adapters merged in: ``W + scale B A``.

    Args:
        model: a causal model, or a peft model around one; masters: the optimizer's fp32 copies by parameter name.
    """
    base = base_model_of(model)
    if base is model:
        return {name: master.detach() for name, master in masters.items()}
    return {name: merged_weight(module) for name, module in adapters_of(base)}


def weights_sha256(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """SHA-256 over the names, dtypes and bytes of all parameters (as they are in `dtype`), adapters left out: what a cached reference depends on."""
    named = (
        (n.replace(".base_layer", ""), full(p)) for n, p in base_model_of(model).named_parameters() if "lora_" not in n
    )
    return tensors_sha256(
        (n, p if dtype is None or not p.is_floating_point() or stays_wide(model, n) else p.to(dtype)) for n, p in named
    )


# what a config says beside how its model computes
_BESIDE = "_name_or_path architectures bos_token_id dtype eos_token_id pad_token_id sep_token_id torch_dtype transformers_version use_cache"


def config_sha256(model: nn.Module) -> str:
    """SHA-256 over what a model's config says of how it computes: the same weights say something else with another rope or window."""
    given = base_model_of(model).config.get_text_config().to_dict()
    told = {k: v for k, v in given.items() if k not in _BESIDE.split() and not k.startswith("_attn")}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def tensors_sha256(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, in their order."""
    digest = hashlib.sha256()
    for name, p in named:
        digest.update(f"{name}:{p.dtype}:{tuple(p.shape)};".encode())
        digest.update(p.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(model: Any, tokenizer: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """A folder that transformers (full model) or peft (adapter) loads as it is, tokenizer included; `state`: other weights."""
    os.makedirs(folder, exist_ok=True)
    whole = base_model_of(model) is model
    if whole:
        model = copy.copy(model)  # which may be training meanwhile
        model.config = copy.deepcopy(model.config)
        model.config._attn_implementation = "sdpa"  # a stranger's transformers does not know the tree attention
    model.save_pretrained(folder, safe_serialization=True, **({} if state is None else {"state_dict": dict(state)}))
    held = next((v.dtype for v in (state or {}).values() if v.is_floating_point()), None)
    if whole and held not in (None, model.config.dtype):  # shards are kept in a wider one
        model.config.dtype = held
        model.config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_state_dict(folder: Path) -> None:
    """``state_dict.pt`` beside the safetensors of a model folder, with the same weights: what `torch.load(weights_only=True)` reads."""
    from safetensors.torch import load_file

    state = {name: value for p in sorted(folder.glob("*.safetensors")) for name, value in load_file(p).items()}
    torch.save(state, folder / "state_dict.pt")


# ---- Where things are inside a transformers or peft model, and how its packing is chosen ----

# layers that carry state along the row: a completion could not restart at the prompt's end
_RECURRENT_LAYERS = ("linear_attention", "mamba", "recurrent", "conv", "rwkv", "ssm", "chunked_attention")
_RECURRENT_MODELS = ("mamba", "rwkv", "recurrent_gemma", "jamba", "zamba", "bamba", "falcon_h1", "xlstm", "lfm2")


def base_model_of(model: nn.Module) -> Any:
    """The transformers causal model itself, without peft's wrapping."""
    get_base = getattr(model, "get_base_model", None)
    return get_base() if callable(get_base) else model


def size_of(model: nn.Module, name: str) -> int:
    """A size out of the config of a model's text part, the largest where layers differ; 0 where it has none."""
    found = getattr(base_model_of(model).config.get_text_config(), name, None) or 0
    return int(max(found) if isinstance(found, list | tuple) else found)


def backbone_of(model: nn.Module) -> Any:
    """The transformer without its head: its output's `last_hidden_state` is what the head reads."""
    base = base_model_of(model)
    return getattr(base, base.base_model_prefix, None) or base.model  # Llama 4's has not the name that it says


def language_part(model: nn.Module) -> str:
    """The name of the language model within a vision-language model.

    Raises:
        ModelError: it is not found.
    """
    base = base_model_of(model)
    for name, module in base.named_modules():
        if name.split(".")[-1] in ("language_model", "text_model") and hasattr(module, "embed_tokens"):
            return name
    raise ModelError(type(base).__name__, "its language model is not found", "train a model of another architecture")


def freeze_eyes(model: nn.Module) -> None:
    """Train the language model and the head alone."""
    base = base_model_of(model)
    held = {id(p) for p in base.get_submodule(language_part(model)).parameters()}
    held |= {id(p) for p in base.get_output_embeddings().parameters()}
    for p in base.parameters():
        p.requires_grad_(id(p) in held)


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
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():  # what F.dropout is given, and layers that are left out at random
            if type(value) is float and "drop" in name:
                setattr(module, name, 0.0)
