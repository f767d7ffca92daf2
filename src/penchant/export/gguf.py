"""GGUF export: weights and vocabulary."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penchant.errors import ConfigError, ModelError
from penchant.export.subject import Subject, read_model

# ---- A tokenizer's vocabulary in GGUF's form. Pre-tokenizers that llama.cpp has no name for are refused ----

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # GGUF's token types
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>$")
SPACE = "▁"

# pre-tokenizers as `tokenizers` serializes them, and llama.cpp's names for them
_DIGITS = {"type": "Digits", "individual_digits": True}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Values of GGUF's ``tokenizer.ggml`` keys.

    Args:
        model: gpt2 (bytes as letters, merges) or llama (pieces with scores); pre: the pre-tokenizer; tokens, types, scores: by id.
        special: ids of bos, eos, unk and pad, as far as they exist; chat_template: one, or several with names; notes: remarks for the user.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    chat_template: str | list[dict[str, str]] | None
    notes: tuple[str, ...] = ()


def vocabulary_of(tokenizer: Any, rows: int, where: str) -> Vocabulary:
    """Convert a tokenizer's vocabulary.

    Args:
        rows: rows of the model's embedding, possibly more than the tokenizer has tokens; where: prefix of error messages.

    Raises:
        ModelError: it is not a BPE tokenizer, or its pre-tokenizer is not supported.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(where, "its tokenizer is not of the tokenizers library", "use --to safetensors")
    definition = json.loads(backend.to_str())
    model = definition["model"]
    if model["type"] != "BPE":
        raise ModelError(where, f"GGUF export supports BPE tokenizers, not {model['type']}", "use --to safetensors")
    kind, pre, adds_space, notes = _bpe_kind(definition, where)
    by_id = {int(i): str(t) for t, i in backend.get_vocab(with_added_tokens=True).items()}
    added = {int(t["id"]): bool(t["special"]) for t in definition["added_tokens"]}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(rows)]
    types = [_token_type(i, tokens[i], i in by_id, added, model.get("unk_token"), kind) for i in range(rows)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    ids = {k: getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "unk", "pad")}
    first = tokenizer("a")["input_ids"]
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = [{"name": name, "template": text} for name, text in template.items()]
    return Vocabulary(
        model=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=_scores(tokens, types, merges) if kind == "llama" else [],
        merges=[] if kind == "llama" else merges,
        special={k: int(v) for k, v in ids.items() if v is not None},
        adds_bos=bool(first) and first[0] == tokenizer.bos_token_id,
        adds_eos=bool(first) and first[-1] == tokenizer.eos_token_id,
        adds_space=adds_space,
        chat_template=template,
        notes=notes,
    )


def _bpe_kind(definition: Mapping[str, Any], where: str) -> tuple[str, str, bool, tuple[str, ...]]:
    """Return (model, pre-tokenizer, whether a space is put before a text, notes) of a BPE tokenizer."""
    pre_tokenizer, normalizer, model = definition["pre_tokenizer"], definition["normalizer"], definition["model"]
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("byte_fallback"):
        if not affixes and pre_tokenizer is None and _adds_leading_space(normalizer) is not None:
            return "llama", "default", bool(_adds_leading_space(normalizer)), ()
    else:
        name = _pre_tokenizer_name(pre_tokenizer)
        # of these, llama.cpp looks up whole words before merging for Llama 3 only
        if bool(model.get("ignore_merges")) != (name == "llama-bpe") or affixes:
            name = None
        if name is not None and (normalizer is None or normalizer == {"type": "NFC"}):
            note = "texts are not normalized (NFC) by llama.cpp before they are cut, as they are in transformers"
            return "gpt2", name, False, (note,) if normalizer else ()
    what = "its tokenizer cuts texts in a way that llama.cpp has no verified name for here"
    raise ModelError(where, what, "use --to safetensors; llama.cpp's own converter may know it")


def _adds_leading_space(normalizer: Any) -> bool | None:
    """Return whether a SentencePiece-like normalizer puts a space before a text; None for any other normalizer."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    parts = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, Mapping) else []
    prepend = {"type": "Prepend", "prepend": SPACE}
    known: dict[str, bool] = {json.dumps([prepend, replace]): True, json.dumps([replace]): False}
    return known.get(json.dumps(parts))


def _pre_tokenizer_name(pre_tokenizer: Any) -> str | None:
    """Return llama.cpp's name of a pre-tokenizer, or None."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, Mapping) else []
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    others, regex = parts[:-1], bool(parts[-1].get("use_regex", True))
    if not others and regex:
        return "gpt-2"
    if others == [_DIGITS] and regex:
        return "smollm"
    if len(others) == 1 and not regex and others[0].get("type") == "Split" and others[0].get("behavior") == "Isolated":
        pattern = others[0].get("pattern", {}).get("Regex")
        return {_QWEN2: "qwen2", _LLAMA3: "llama-bpe"}.get(pattern)
    return None


def _token_type(
    i: int, token: str, in_vocabulary: bool, added: Mapping[int, bool], unknown: str | None, kind: str
) -> int:
    if not in_vocabulary:
        return UNUSED
    if kind == "llama" and BYTE_TOKEN.match(token):
        return BYTE
    if token == unknown:
        return UNKNOWN
    if i in added:
        return CONTROL if added[i] else USER_DEFINED
    return NORMAL


def _scores(tokens: list[str], types: list[int], merges: list[str]) -> list[float]:
    """Score pieces by the rank of their earliest merge: earlier merges score higher; pieces that no merge produces come last."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), i)
    last = len(merges)
    return [
        -float(rank.get(token, last + i)) if kind in (NORMAL, USER_DEFINED) else 0.0
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
    ]


# ---- A Llama-like model and its tokenizer in one file, by the `gguf` package's writer ----

Q8 = "q8_0"
BLOCK = 32  # weights per Q8_0 block: a row's length must be a multiple of it
QWEN3_HEAD = 128  # the only head size that transformers' GGUF reader supports for Qwen3
TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", Q8: "Q8_0"}
FILE_TYPES = {"fp32": "ALL_F32", "fp16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", Q8: "MOSTLY_Q8_0"}


# transformers model type -> GGUF architecture
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def check_supported(subject: Subject) -> None:
    """Refuse an unsupported run before anything is loaded.

    Raises:
        ConfigError: a reward model, or the package is not installed. ModelError: a model or a tokenizer that has not been verified.
    """
    if subject.reward:
        raise ConfigError("--to", "gguf is for language models, and this run is a reward model", "use safetensors")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("--to", "gguf is not installed", "pip install 'penchant[gguf]'")
    config = subject.model_config()
    check_config(config, str(subject.run))
    vocabulary_of(subject.tokenizer(), int(config.vocab_size), str(subject.run))


def check_config(config: Any, where: str) -> str:
    """Return GGUF's name for the architecture of a model's config.

    Raises:
        ModelError: its GGUF form has not been verified here; names the setting that is the reason.
    """
    kind = str(config.model_type)
    if kind not in ARCHITECTURES:
        raise ModelError(where, f"GGUF export knows {', '.join(ARCHITECTURES)}, not {kind}", "use --to safetensors")
    rope = dict(config.rope_parameters or {})
    unsupported = {
        "rope_type": rope.get("rope_type", "default") != "default",
        "partial_rotary_factor": float(rope.get("partial_rotary_factor", 1.0)) != 1.0,
        "hidden_act": config.hidden_act != "silu",
        "attention_bias": bool(getattr(config, "attention_bias", False)),
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "sliding_window": _uses_sliding_window(config),
        "head_dim": kind == "qwen3" and getattr(config, "head_dim", None) != QWEN3_HEAD,
    }
    for name, is_unsupported in unsupported.items():
        if is_unsupported:
            value = rope.get(name, getattr(config, name, None))
            what = f"GGUF export of {kind} with {name}={value} is not verified"
            raise ModelError(where, what, "use --to safetensors")
    return ARCHITECTURES[kind]


def _uses_sliding_window(config: Any) -> bool:
    """Return True if attention is limited to a window shorter than the context."""
    window: int | None = getattr(config, "sliding_window", None)
    enabled = getattr(config, "use_sliding_window", True)
    return window is not None and bool(enabled) and window < int(config.max_position_embeddings)


def write_gguf(path: Path, model: Any, tokenizer: Any, dtype: str, name: str) -> tuple[str, ...]:
    """Write a model as GGUF and return notes for the user.

    Args:
        model: in fp32; dtype: of matrices (vectors stay in fp32): fp32, fp16, bf16 or q8_0; name: the model's name in the file.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map

    config = model.config
    architecture = check_config(config, name)
    number = next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == architecture)
    names = get_tensor_name_map(number, config.num_hidden_layers)
    vocabulary = vocabulary_of(tokenizer, model.get_input_embeddings().weight.shape[0], name)
    writer = GGUFWriter(path, architecture)
    _add_settings(writer, config, name, dtype)
    _add_vocabulary(writer, vocabulary)
    fp16_fallbacks = 0
    for n, p in model.named_parameters():  # yields tied weights only once
        gguf_name = names.get_name(n, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ModelError(name, f"GGUF has no place for the weight {n}", "use --to safetensors")
        kind = _storage_type(p, dtype)
        fp16_fallbacks += kind == "F16" and dtype == Q8
        values = _quantize(_interleave_heads(n, _to_numpy(p), config, architecture), kind)
        writer.add_tensor(gguf_name, values, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    note = f"{fp16_fallbacks} matrices have rows whose length is not a multiple of {BLOCK}; they are stored in fp16"
    return (*vocabulary.notes, note) if fp16_fallbacks else vocabulary.notes


def dequantized(value: Tensor, dtype: str) -> Tensor:
    """Return the value that a weight has after it is stored in a file of this dtype."""
    from gguf import GGMLQuantizationType, quants

    kind = _storage_type(value, dtype)
    values = quants.dequantize(_quantize(_to_numpy(value), kind), GGMLQuantizationType[kind])
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _storage_type(p: Tensor, dtype: str) -> str:
    """Return the storage type: the requested one for matrices; vectors (norms, biases) are small and stay in fp32."""
    if p.dim() < 2:
        return "F32"
    kind = TYPES[dtype]
    return "F16" if kind == "Q8_0" and p.shape[-1] % BLOCK else kind


def _to_numpy(value: Tensor) -> np.ndarray:
    return value.detach().to(torch.float32).contiguous().numpy()


def _quantize(values: np.ndarray, kind: str) -> np.ndarray:
    from gguf import GGMLQuantizationType, quants

    return quants.quantize(values, GGMLQuantizationType[kind])


def _interleave_heads(name: str, values: np.ndarray, config: Any, architecture: str) -> np.ndarray:
    """Reorder rows for GGUF: in a Llama, the two coordinates rotated together are adjacent there and half a head apart here."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2]
    if architecture != "llama" or part not in heads:
        return values
    n = heads[part]
    halves = values.reshape(n, 2, values.shape[0] // n // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _add_settings(writer: Any, config: Any, name: str, dtype: str) -> None:
    from gguf import LlamaFileType

    head = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[FILE_TYPES[dtype]])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config.vocab_size)
    if dtype == Q8:
        from gguf import GGML_QUANT_VERSION

        writer.add_quantization_version(GGML_QUANT_VERSION)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for kind, number in vocabulary.special.items():
        getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def read_gguf(folder: Path) -> Any:
    """Load the one GGUF file of a folder as a transformers user would, in fp32."""
    (path,) = folder.glob("*.gguf")
    with contextlib.redirect_stderr(io.StringIO()):  # hides a progress bar that cannot be switched off
        return read_model(folder, gguf_file=path.name)
