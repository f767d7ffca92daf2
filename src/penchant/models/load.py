"""Load a model, adapt it with LoRA, cast, hash and save it, and find the parts of a transformers model."""

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
from penchant.base.machine import NAMES, accelerator, full_precision, why_not
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

# ---- Load a causal model and its tokenizer from a folder or hub id, in fp32 or bf16, with or without a LoRA adapter ----

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def resolve_device(device: str) -> torch.device:
    """The device to use; ``auto`` is an NVIDIA (AMD) GPU if there is one, else the CPU. ConfigError if torch cannot use the device here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = why_not(torch.device(device).type)
    if reason:
        raise ConfigError("model.device", reason, "set model.device=cpu or auto")
    place = torch.device(device)
    if place.index is not None and place.index >= (count := accelerator(place.type).device_count()):
        available = ", ".join(f"{place.type}:{i}" for i in range(count))
        raise ConfigError("model.device", f"there is no {device} here, only {available}", "give one of those")
    if place.type == "cuda":  # torch reads it at its first product on a GPU, and never again
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return place


def resolve_place(key: str, wanted: str, policys: Any) -> torch.device:
    """The device of a model beside the trained one; ``auto`` is the policy's device.

    Raises:
        ConfigError: this machine has no such device; the error names `key`.
    """
    try:
        return resolve_device(wanted if wanted != "auto" else str(policys))
    except ConfigError as error:
        raise ConfigError(key, f"is {wanted}, but {error.what}", "set it to cpu or auto") from error


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype to use; ``auto`` is bf16 if matrix products in bf16 are native (CUDA, XPU, AVX512-BF16, AMX), else fp32."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type in ("cuda", "xpu"):
        native = accelerator(device.type).is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    if device.type == "mps":
        return torch.float32
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def bitsandbytes(key: str, value: str) -> Any:
    """Import bitsandbytes (8-bit and 4-bit weights), an optional dependency.

    Args:
        key, value: the config setting that needs it, for the error message.

    Raises:
        ConfigError: it is not installed.
    """
    # on a CPU with AVX512-BF16 it warns that a kernel is missing, which is not used here (`_settle_quantized`)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ConfigError(key, f"{value} needs bitsandbytes", "pip install 'penchant[bnb]'") from error


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies in bf16 natively and ATEN_CPU_CAPABILITY does not disable torch's kernels for it."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check()) if callable(check) else False


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """Load and check a tokenizer; ModelError if there is none."""
    from transformers import AutoTokenizer

    source = check_model_path(path, "tokenizer_config.json")
    check_folder(Path(source))
    with loading(lambda: _odd_tokenizer_file(path), "no tokenizer could be loaded", "set model.tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        len(tokenizer), tokenizer("A", add_special_tokens=True)
    check_template(path, tokenizer)
    return tokenizer


def tokens_of(tokenizer: Any) -> int:
    """The number of embeddings a model needs for a tokenizer, whose ids may have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def load_processor(cfg: ModelConfig) -> Any:
    """Load the processor of a vision-language model: its tokenizer and its image processor.

    Raises:
        ConfigError: a required library is missing, or `image_options` has an unknown setting. ModelError: there is no such processor.
    """
    from transformers import AutoProcessor

    source = check_model_path(cfg.path)
    check_folder(Path(source))
    load: Any = partial(AutoProcessor.from_pretrained, source, revision=cfg.revision, trust_remote_code=False)
    with loading(
        cfg.path, "no image processor could be loaded", "give a vision-language model, or set model.vision=off"
    ):
        try:
            processor: Any = load(**cfg.image_options)
        except (ImportError, AttributeError) as error:
            if importlib.util.find_spec("torchvision") is not None and importlib.util.find_spec("PIL") is not None:
                raise
            what = f"the model's processor needs Pillow and torchvision ({first_line(error)})"
            raise ConfigError("model.vision", what, "pip install 'penchant[vision]'") from error
        image_processor, tokenizer = getattr(processor, "image_processor", None), getattr(processor, "tokenizer", None)
        if image_processor is None or tokenizer is None:
            raise ModelError(cfg.path, "its processor has no image processor", "set model.vision=off")
        # a name may be an alias that changes another setting, like max_pixels
        other_options = sorted(set(cfg.image_options) - set(vars(image_processor)))
        unknown = [
            n for n in other_options if load(**{n: cfg.image_options[n]}).to_json_string() == load().to_json_string()
        ]
        if unknown:
            how = f"it has {', '.join(sorted(n for n in vars(image_processor) if not n.startswith('_')))}"
            raise ConfigError(
                f"model.image_options.{unknown[0]}", f"is not a setting of {type(image_processor).__name__}", how
            )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = getattr(processor, "chat_template", None)
    check_template(cfg.path, tokenizer)
    return processor


def processor_sha256(processor: Any) -> str:
    """SHA-256 of everything that affects how a processor encodes pictures: its settings and the library versions."""
    import transformers

    parts = [type(processor.image_processor).__name__, processor.to_json_string(), transformers.__version__]
    parts += [str(getattr(sys.modules.get(name), "__version__", None)) for name in ("PIL", "torchvision")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _odd_tokenizer_file(path: str) -> str:
    """The file that keeps a folder's tokenizer from loading; `path` itself if there is no tokenizer.json."""
    from tokenizers import Tokenizer

    file = Path(path).expanduser() / "tokenizer.json"
    if not file.exists():
        return path
    try:
        Tokenizer.from_file(str(file))
    except BaseException:  # its own errors, and Rust panics
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
    """Load a transformers causal model without dropout, by default in fp32; `cast_parameters` casts it once the fp32 masters are copied.

    Args:
        held: keep weights quantized (`model.quantize`) to train an adapter on them; otherwise they are dequantized to fp32.
        within: dtype to load the weights in, see `held_in`; mapped: weights may stay in the memory-mapped file, see `own_memory`.
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
    """The dtype for loading a model that will run in `dtype`: fp32, or bf16 if fp32 would gain nothing.

    Args:
        frozen: no weights are trained, or only an adapter; trained ones are loaded in fp32 for their masters, unless the file is bf16.
        shards: the model will be sharded and cast layer by layer; until then, weights in the file's own dtype take no memory.
    """
    if cfg.quantize != "none" or cfg.init == "random" or (dtype != torch.bfloat16 and not shards):
        return torch.float32
    folder = Path(check_model_path(cfg.path))
    stored_dtypes = (
        {kind for kind, *_ in headers(folder).values()} if folder.is_dir() and (shards or not frozen) else set()
    )
    if shards:
        return torch.bfloat16 if stored_dtypes == {"BF16"} else torch.float32
    return dtype if frozen or stored_dtypes == {"BF16"} else torch.float32


def _load(
    cfg: ModelConfig,
    path: str,
    device: torch.device,
    seed: int,
    within: torch.dtype = torch.float32,
    mapped: bool = False,
) -> Any:
    """Load and check a model; the tests cache this function by the bytes of the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    folder, how = Path(path), "give a folder or hub id of a causal model"
    auto: Any = AutoModelForImageTextToText if cfg.sees else AutoModelForCausalLM
    with loading(config_of(path), "the model could not be loaded", how):
        config = AutoConfig.from_pretrained(path, revision=cfg.revision, trust_remote_code=False)
        model_config = config if cfg.sees else text_config(config)
        if cfg.sees and type(config) not in AutoModelForImageTextToText._model_mapping:
            what = f"a model of type {config.model_type} takes no pictures"
            raise ConfigError("model.vision", what, "set model.vision=off, or take a vision-language model")
        if folder.is_dir():
            check_built(folder, on_meta(auto, model_config), whole=model_config is config)
        if within != torch.float32:
            outline = on_meta(auto, model_config, within)
            if any(b.is_floating_point() and b.dtype != torch.float32 for b in outline.buffers()):
                within = torch.float32  # else buffers would be cast too: rotary ones in bf16 turn far positions wrongly
    with loading(cfg.path, "the model could not be loaded", how):
        if cfg.init == "random":
            torch.manual_seed(seed)
            model = auto.from_config(model_config, dtype=torch.float32)
        else:
            options = {"revision": cfg.revision, "dtype": within, "trust_remote_code": False} | _quantization(
                cfg, device
            )
            text_options = {} if cfg.sees else _text_part(config)
            with without_report() if text_options else nullcontext():
                loaded: Any = auto.from_pretrained(path, output_loading_info=True, **options, **text_options)
            model, info = loaded
            if model_config is not config:  # else it would be saved under the multimodal model's weight names
                vars(model).pop("_weight_conversions", None)
            _check_complete(cfg.path, info)
            if config.get_text_config() is config:  # in a multimodal folder the vision tower has layers of its own
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


def quantized_bytes(model: nn.Module, bits: str) -> tuple[int, int, int]:
    """The effect of quantizing a plain model: (number of quantized weights, their bytes afterwards, weights in the largest layer).

    nf4: half a byte per weight, a byte per block of 64 and 4 bytes per 256 blocks; int8: a byte per weight and 4 bytes per row.
    """
    head, count, stored_bytes, largest = base_model_of(model).get_output_embeddings(), 0, 0, 0
    for name, layer in base_model_of(model).named_modules():
        if isinstance(layer, nn.Linear) and layer is not head and "lora_" not in name and bits != "none":
            n = layer.weight.numel()
            blocks = -(-n // 64)
            count, largest = count + n, max(largest, n)
            stored_bytes += n + 4 * layer.out_features if bits == "int8" else n // 2 + blocks + 4 * -(-blocks // 256)
    return count, stored_bytes, largest


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


def _settle_quantized(model: nn.Module) -> None:
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


def source_sha256(source: ModelConfig, model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """`weights_sha256` of a model loaded from `source`; if quantized, a hash of its weight files and the kind of quantization.

    Quantized bits may differ between a GPU and a CPU, but the files they are made from do not.
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
    parts = [source.quantize, *(f"{p.name}:{file_sha256(p)}" for p in files)]
    return hashlib.sha256(";".join(parts).encode()).hexdigest()


def on_meta(auto: Any, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Build a config's model on the meta device, without memory and without advancing torch's random state."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return auto.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)


def _check_complete(path: str, info: Mapping[str, Any]) -> None:
    """Refuse a folder without a complete language model: transformers would initialize missing weights at random and go on."""
    missing, unexpected = (sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys"))
    heads = [n for n in unexpected if n.split(".")[0] in ("score", "classifier")]
    if heads:
        what = f"this is a classifier or reward model (it has {heads[0]}), which writes nothing"
        raise ModelError(path, what, "give the language model")
    if missing:
        raise ModelError(path, f"weights are missing in the folder ({', '.join(missing[:3])})", "give a whole model")


def text_config(config: Any) -> Any:
    """The config of the language model in a multimodal model if transformers has it as a causal model, else `config` itself."""
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    if text is config or type(text) not in AutoModelForCausalLM._model_mapping:
        return config
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
    return text


def _text_part(config: Any) -> dict[str, Any]:
    """Arguments for `from_pretrained` to load only the language model of a multimodal folder; {} if there is none to separate."""
    text = text_config(config)
    if text is config:
        return {}
    key_mapping = {r"^(model\.)?language_model\.lm_head": "lm_head"}  # older and newer folders name weights differently
    key_mapping[r"^(model\.)?(language|text)_model\.(?!lm_head)(model\.)?"] = "model."
    return {"config": text, "key_mapping": key_mapping}


@contextmanager
def without_report() -> Iterator[None]:
    """Silence transformers' report of unused and newly initialized weights, for loads where both are intended."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_behavior(path: str, model: Any) -> None:
    """Refuse a model that cannot be a policy, by looking at its logits.

    Raises:
        ModelError: two passes in train mode, or train and eval mode, differ (dropout), an earlier token's logits depend on a later one
            (an encoder), logits are not finite, or the model does not run on text alone.
    """
    vocab, device = model.get_input_embeddings().weight.shape[0], next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def logits(ids: Tensor) -> Tensor:
        return cast(Tensor, model(input_ids=ids, **without_cache(model)).logits.float())

    def passes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # more rows if the model draws random numbers at all: some draws rarely matter
        for batch in (1, 16):
            ids, others = (torch.randint(0, vocab, (batch, 16), generator=generator).to(device) for _ in range(2))
            with quiet(model, training=True):
                state = _random_state(device)
                first, second = logits(ids), logits(ids)
                is_random = not torch.equal(state, _random_state(device))
                changed = logits(torch.cat((ids[:, :8], others[:, 8:]), dim=1))
            if not is_random:
                break
        with quiet(model):
            return first, second, logits(ids), (first - changed)[:, :8].abs().max()

    try:
        try:
            first, second, in_eval, leak = passes()
            unclear = not _in_fp32(model) and not float(leak) <= 1e-3 * float(first.std())
        except RuntimeError:
            unclear = not _in_fp32(model)  # `check_precision` reports models that do not run in 16 bits
            if not unclear:
                raise
        if unclear:
            with widened(model):
                first, second, in_eval, leak = passes()
    except Exception as error:  # a model that needs more than ids may raise anything
        how = "give a causal language model"
        raise ModelError(path, f"the model does not run on text alone ({first_line(error)})", how) from error
    if not bool(torch.isfinite(first).all()):
        raise ModelError(path, "the model's logits are NaN or infinite", "get its weights and its config.json again")
    size = float(first.std()) + 1e-12
    for other, comparison in ((second, "two passes over one row in train mode"), (in_eval, "train mode and eval mode")):
        if not float((first - other).abs().max()) <= 1e-4 * size:
            raise ModelError(
                path,
                f"{comparison} give different logits: the model has dropout (or other randomness) that cannot be turned off here",
                "set its dropout to 0 in config.json",
            )
    # quantized weights are multiplied in 16 bits
    quantized = not all(p.is_floating_point() for p in model.parameters())
    if not float(leak) <= (0.1 if quantized else 1e-3) * size:
        raise ModelError(
            path,
            "the logits of a token depend on later tokens: this is an encoder, or reads both ways",
            "give a causal (decoder-only) language model",
        )


def _in_fp32(model: nn.Module) -> bool:
    """Whether a model computes in fp32 (fp64), where equal computations give equal logits."""
    return all(p.dtype != torch.bfloat16 for p in model.parameters())


def _random_state(device: torch.device) -> Tensor:
    return (
        cast(Tensor, accelerator(device.type).get_rng_state(device)) if device.type in NAMES else torch.get_rng_state()
    )


@contextmanager
def quiet(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Context for probing a model: no gradient, eval mode (or train mode), random state restored afterwards."""
    was_training = model.training
    devices = [p.device for p in itertools.islice(model.parameters(), 1) if p.device.type in NAMES]
    kind = devices[0].type if devices else "cuda"
    model.train(training)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices, device_type=kind):
            yield
    finally:
        model.train(was_training)


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Context with a model's bf16 (fp16) parameters in fp32, lossless both ways; matrix products on a GPU use fp32, not TF32."""
    originals = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    for p, _ in originals:
        p.data = p.data.float()
    try:
        with full_precision(next(model.parameters()).device):
            yield
    finally:
        for p, dtype in originals:
            p.data = p.data.to(dtype)


def without_cache(part: Any) -> dict[str, Any]:
    """Arguments that keep a model's `forward` from making a KV cache; {} if it has no such option."""
    parameters = inspect.signature(part.forward).parameters
    supported = "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {"use_cache": False} if supported else {}


def own_memory(model: nn.Module) -> None:
    """Copy weights on the CPU out of the memory-mapped file.

    In the file their alignment depends on where its header ends, and products over unaligned rows differ from a copy's in the last
    bits: the same weights would train differently depending on the length of a header.
    """
    for p in model.parameters():
        if p.device.type == "cpu":
            p.data = p.data.clone()


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating-point parameters in place, those selected by `stays_wide` to at least fp32.

    Buffers (rotary frequencies) stay in fp32: in bf16 they would rotate far positions wrongly.
    """
    for name, p in model.named_parameters():
        target = torch.promote_types(dtype, torch.float32) if stays_wide(model, name) else dtype
        if p.is_floating_point() and p.dtype != target:
            p.data = p.data.to(target)
    for layer in model.modules():
        if type(getattr(layer, "weight", None)).__name__ == "Params4bit":
            layer.compute_dtype = layer.weight.quant_state.dtype = dtype  # type: ignore[union-attr, assignment]
    config = getattr(base_model_of(model), "config", None)
    if config is not None:
        config.dtype = dtype


def stays_wide(model: nn.Module, name: str) -> bool:
    """Whether a parameter stays in fp32 in a 16-bit model, as in transformers: in some families the router's."""
    fp32_modules = getattr(base_model_of(model), "_keep_in_fp32_modules_strict", None) or ()
    return "lora_" not in name and any(part in plain_name(name) for part in fp32_modules)


def add_lora(
    model: Any, cfg: LoraConfig, seed: int, *, task: str = "CAUSAL_LM", whole: Sequence[str] = (), within: str = ""
) -> Any:
    """Wrap a model with a trainable LoRA adapter (peft); everything else is frozen.

    Args:
        task: peft's task type; whole: modules that are trained and saved in full, without an adapter (a new head).
        within: name of the only module whose layers get adapters; "" for the whole model.

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
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated name of transformers
            warnings.simplefilter("ignore", UserWarning)  # about tied weights, which check_adapter refuses
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)  # of experts
            with _adapters_in_fp32():
                adapted = get_peft_model(model, peft_config, autocast_adapter_dtype=False)
    except ValueError as error:
        what, how = first_line(error), "name" if targets == "all-linear" else 'use "all-linear" or names of'
        if "not found in the base model" in what:
            what = f"{targets if isinstance(targets, str) else ', '.join(targets)}: this model has no such layers"
        if isinstance(targets, str) and "," in targets:
            how = f"a list is written [{', '.join(t.strip() for t in targets.split(','))}]; {how}"
        raise ConfigError("lora.target_modules", what, f"{how} linear layers of this model") from error
    check_adapter(adapted)
    return adapted


@contextmanager
def _adapters_in_fp32() -> Iterator[None]:
    """Create adapters in fp32 even on bf16 weights; peft would cast them to bf16."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    original = BaseTunerLayer._get_base_layer_device_and_dtype

    def wide(self: Any, layer: Any) -> tuple[Any, Any]:
        device, dtype = original(self, layer)
        return device, torch.float32 if dtype == torch.bfloat16 else dtype

    BaseTunerLayer._get_base_layer_device_and_dtype = wide  # type: ignore[method-assign]
    try:
        yield
    finally:
        BaseTunerLayer._get_base_layer_device_and_dtype = original  # type: ignore[method-assign]


def _below(modules: Sequence[str]) -> str:
    """A regular expression for the names of these modules and of everything in them."""
    return r"(.*\.)?(" + "|".join(re.escape(m) for m in modules) + r")(\..*)?"


def check_adapter(model: Any) -> None:
    """Check on the start model that adapters can be merged, with a nonzero update on one layer of each kind.

    Raises:
        ConfigError: an adapted weight is shared with another layer, a layer's product is not one that peft supports, or the merged
            weights give different logits from the adapter.
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
    if any(map(is_quantized, base.modules())):  # all are linear layers; merging dequantizes, and checks the logits then
        return
    updates = [p for _, m in kinds.values() for n, p in m.named_parameters() if _starts_at_zero(n)]
    initial = [p.detach().clone() for p in updates]
    others = [m for _, m in adapters_of(base) if all(m is not chosen for _, chosen in kinds.values())]
    ids = torch.arange(12, device=next(base.parameters()).device)[None] + 1

    def logits(disabled: Sequence[Any]) -> Tensor:
        for module in disabled:
            module._disable_adapters = True
        try:
            return cast(Tensor, base(input_ids=ids, **without_cache(base)).logits)
        finally:
            for module in disabled:
                module._disable_adapters = False

    # in bf16 a merged weight would be rounded, and the layers above amplify the error
    with widened(model), quiet(model):
        adapters = [m for _, m in adapters_of(base)]
        try:
            for p in updates:
                p.data.add_(torch.randn_like(p), alpha=0.1)
            with _names_where_it_fails(kinds.values()):
                adapter_logits = logits(others)
            merged_weights = {name: (_adapted(module), merged_weight(module)) for name, module in kinds.values()}
        finally:
            for p, own in zip(updates, initial, strict=True):
                p.data.copy_(own)
        base_logits = logits(adapters)
        originals = [(p, p.data) for p, _ in merged_weights.values()]
        try:
            for p, merged in merged_weights.values():
                p.data = merged.to(p.dtype)
            difference = float((logits(adapters) - adapter_logits).abs().max())
        finally:
            for p, data in originals:
                p.data = data
    if not difference <= 1e-3 * max(
        float((adapter_logits - base_logits).abs().max()), 1e-3 * float(base_logits.abs().max())
    ):
        raise ConfigError(
            "lora.target_modules",
            f"merging an adapter of this model changes its logits by {difference:.2g}",
            "name the attention's projections only, e.g. [q_proj, v_proj]",
        )


@contextmanager
def _names_where_it_fails(layers: Iterable[tuple[str, Any]]) -> Iterator[None]:
    """Turn a RuntimeError into a ConfigError naming the layer, e.g. a grouped linear layer with inputs wider than its weight."""
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
    """Whether a parameter is the half of an adapter that starts at zero: B, or A for an embedding."""
    return "lora_B" in name or "lora_embedding_A" in name


def is_b_matrix(name: str) -> bool:
    """Whether a parameter is an adapter's B matrix, whose learning rate LoRA+ raises."""
    return "lora_B" in name or "lora_embedding_B" in name


def adapters_of(base: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name of the weight in the plain model, LoRA layer) for every adapter; adapters on several weights of a module are nested."""
    for name, module in base.named_modules():
        if hasattr(module, "get_delta_weight"):
            yield f"{plain_name(name)}.{getattr(module, 'parameter_name', 'weight')}", module


def plain_name(name: str) -> str:
    """A module's or parameter's name without peft's `base_layer` parts."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _adapted(module: Any) -> Tensor:
    """The weight that a LoRA layer adapts: a linear layer's, or one of several in an expert layer."""
    inner = module.get_base_layer()
    return getattr(inner, getattr(module, "parameter_name", "weight"))  # type: ignore[no-any-return]


def merged_weight(module: Any) -> Tensor:
    """``W' = W + scale B A`` in fp32 (fp64); for DoRA ``m W' / |W'|`` with the norm of each output's weights."""
    weight = whole_weight(module.get_base_layer(), getattr(module, "parameter_name", "weight"))
    wide = torch.promote_types(weight.dtype, torch.float32)
    (name,) = module.active_adapters
    merged = weight.to(wide) + module.get_delta_weight(name).detach().to(wide)
    magnitude = getattr(module, "lora_magnitude_vector", {})
    if name in magnitude:
        dim, shape = (0, (1, -1)) if getattr(module, "fan_in_fan_out", False) else (1, (-1, 1))
        m = magnitude[name].weight.detach().to(wide).view(shape)
        merged *= m / torch.linalg.vector_norm(merged, dim=dim, keepdim=True)
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
    """SHA-256 over names, dtypes and bytes of all parameters (cast to `dtype`) except adapters, and of saved buffers: what a
    cached reference depends on.
    """
    base = base_model_of(model)
    named = ((n.replace(".base_layer", ""), full(p)) for n, p in base.named_parameters() if "lora_" not in n)
    cast_weights = (
        (n, p if dtype is None or not p.is_floating_point() or stays_wide(model, n) else p.to(dtype)) for n, p in named
    )
    saved = base.state_dict().keys()  # computed buffers, such as rotary frequencies, follow from the config
    return tensors_sha256(itertools.chain(cast_weights, (item for item in base.named_buffers() if item[0] in saved)))


# config entries that do not affect what the model computes
_BESIDE = "_name_or_path architectures bos_token_id dtype eos_token_id pad_token_id sep_token_id torch_dtype transformers_version use_cache"


def config_sha256(model: nn.Module) -> str:
    """SHA-256 over the config entries that affect what a model computes: another rope or window gives the same weights other logits."""
    config = base_model_of(model).config.get_text_config().to_dict()
    entries = {k: v for k, v in config.items() if k not in _BESIDE.split() and not k.startswith("_attn")}
    return hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode()).hexdigest()


def tensors_sha256(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, in the given order."""
    digest = hashlib.sha256()
    for name, p in named:
        digest.update(f"{name}:{p.dtype}:{tuple(p.shape)};".encode())
        digest.update(p.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(model: Any, tokenizer: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a folder that transformers (full model) or peft (adapter) loads, tokenizer included; `state`: weights to save instead."""
    os.makedirs(folder, exist_ok=True)
    is_full_model = base_model_of(model) is model
    if is_full_model:
        model = copy.copy(model)  # the original may still be training
        model.config = copy.deepcopy(model.config)
        model.config._attn_implementation = "sdpa"  # plain transformers does not know the tree attention
    model.save_pretrained(folder, safe_serialization=True, **({} if state is None else {"state_dict": dict(state)}))
    dtype = next((v.dtype for v in (state or {}).values() if v.is_floating_point()), None)
    if is_full_model and dtype not in (None, model.config.dtype):  # sharded parameters are held in a wider dtype
        model.config.dtype = dtype
        model.config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_state_dict(folder: Path) -> None:
    """Write ``state_dict.pt`` next to a model folder's safetensors: the same weights, for `torch.load(weights_only=True)`."""
    from safetensors.torch import load_file

    state = {name: value for p in sorted(folder.glob("*.safetensors")) for name, value in load_file(p).items()}
    torch.save(state, folder / "state_dict.pt")


# ---- Find the parts of a transformers or peft model ----

# layers that carry state along the row: a completion cannot restart at the end of its prompt
_RECURRENT_LAYERS = ("linear_attention", "mamba", "recurrent", "conv", "rwkv", "ssm", "chunked_attention")
_RECURRENT_MODELS = ("mamba", "rwkv", "recurrent_gemma", "jamba", "zamba", "bamba", "falcon_h1", "xlstm", "lfm2")


def base_model_of(model: nn.Module) -> Any:
    """The transformers causal model itself, without peft's wrapper."""
    get_base = getattr(model, "get_base_model", None)
    return get_base() if callable(get_base) else model


def size_of(model: nn.Module, name: str) -> int:
    """A size from the config of a model's text part: the largest if layers differ, 0 if there is none."""
    size = getattr(base_model_of(model).config.get_text_config(), name, None) or 0
    return int(max(size) if isinstance(size, list | tuple) else size)


def backbone_of(model: nn.Module) -> Any:
    """The transformer without its head: its output's `last_hidden_state` is what the head reads."""
    base = base_model_of(model)
    # Llama 4 has no attribute of the name in base_model_prefix
    return getattr(base, base.base_model_prefix, None) or base.model


def language_part(model: nn.Module) -> str:
    """The name of the language model's module in a vision-language model.

    Raises:
        ModelError: it is not found.
    """
    base = base_model_of(model)
    for name, module in base.named_modules():
        if name.split(".")[-1] in ("language_model", "text_model") and hasattr(module, "embed_tokens"):
            return name
    raise ModelError(type(base).__name__, "its language model is not found", "train a model of another architecture")


def freeze_eyes(model: nn.Module) -> None:
    """Freeze everything except the language model and the head."""
    base = base_model_of(model)
    trainable = {id(p) for p in base.get_submodule(language_part(model)).parameters()}
    trainable |= {id(p) for p in base.get_output_embeddings().parameters()}
    for p in base.parameters():
        p.requires_grad_(id(p) in trainable)


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
    """Why the model's layers cannot restart in the middle of a row, or None if they can."""
    kinds = {str(k) for k in (getattr(config, "layer_types", None) or ())}
    recurrent = sorted(k for k in kinds if any(r in k for r in _RECURRENT_LAYERS))
    if recurrent:
        return f"layers of type {', '.join(recurrent)}"
    model_type = str(getattr(config, "model_type", ""))
    if any(model_type.startswith(m) for m in _RECURRENT_MODELS):
        return f"{model_type} layers carry state"
    if getattr(config, "use_bidirectional_attention", False):
        return "bidirectional (prefix) attention"
    return None


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to zero: log-ratios of a noisy policy against a noise-free reference would be wrong."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():  # rates passed to F.dropout, and layer drop
            if type(value) is float and "drop" in name:
                setattr(module, name, 0.0)
