"""GGUF export of every supported architecture, read back with the gguf package and with transformers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from parameters import by_default
from tiny import tiny_tokenizer

from penchant.errors import ModelError
from penchant.export.gguf import (
    BYTE,
    CONTROL,
    NORMAL,
    UNUSED,
    check_config,
    dequantized,
    read_gguf,
    vocabulary_of,
    write_gguf,
)
from penchant.export.subject import outputs, round_weights

pytest.importorskip("gguf")
ROWS = [[3, 50, 41, 96, 7, 200], [1, 9]]
SIZES = dict(
    vocab_size=264,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    max_position_embeddings=128,
    bos_token_id=0,
    eos_token_id=1,
)


def _configs() -> dict[str, Any]:
    import transformers as t

    rope = {"rope_type": "default", "rope_theta": 50000.0}
    return {
        "llama": t.LlamaConfig(**SIZES, rope_parameters=rope),
        "llama-tied": t.LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=8),
        "mistral": t.MistralConfig(**SIZES, sliding_window=None),
        "qwen2": t.Qwen2Config(**SIZES, tie_word_embeddings=True),
        "qwen3": t.Qwen3Config(**SIZES, head_dim=128),
    }


@pytest.mark.parametrize(
    "family,dtype",
    by_default(
        itertools.product(_configs(), ("fp32", "bf16", "fp16", "q8_0")),
        [*((family, "q8_0") for family in _configs()), *(("qwen2", dtype) for dtype in ("fp32", "bf16", "fp16"))],
    ),
)
def test_what_is_read_back_computes_what_was_written(tmp_path: Path, family: str, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_configs()[family], dtype=torch.float32).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(p, 1.0, 0.3)  # initial ones and zeros would hide errors
    before = outputs(model, ROWS)
    round_weights(model, lambda _name, value: dequantized(value, dtype))
    write_gguf(tmp_path / "m.gguf", model, tiny_tokenizer(), dtype, f"a-{family}")
    read = outputs(read_gguf(tmp_path), ROWS)
    torch.testing.assert_close(read, outputs(model, ROWS), rtol=0, atol=1e-5)
    assert torch.equal(outputs(model, ROWS), before) == (dtype == "fp32")
    torch.testing.assert_close(read, before, rtol=0, atol={"fp32": 1e-5}.get(dtype, 0.1 * float(before.abs().max())))


def test_the_file_says_what_the_config_says(tmp_path: Path) -> None:
    from gguf import GGUFReader
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(_configs()["llama"])
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "with tools"}
    write_gguf(tmp_path / "m.gguf", model, tokenizer, "q8_0", "name")
    reader = GGUFReader(tmp_path / "m.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "llama" and said["llama.rope.freq_base"] == 50000.0
    assert said["llama.attention.head_count_kv"] == 2 and said["llama.block_count"] == 2
    assert said["tokenizer.ggml.tokens"][:3] == ["<s>", "</s>", "<unk>"] and len(said["tokenizer.ggml.tokens"]) == 264
    assert said["tokenizer.ggml.token_type"][0] == CONTROL and said["tokenizer.ggml.token_type"][263] == UNUSED
    assert said["tokenizer.ggml.pre"] == "gpt-2" and "assistant" in said["tokenizer.chat_template"]
    assert said["tokenizer.chat_template.tool_use"] == "with tools"
    assert said["tokenizer.ggml.bos_token_id"] == 0 and said["tokenizer.ggml.add_bos_token"] is False
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q8_0" and kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["output.weight"] == "Q8_0"


def test_what_was_not_verified_is_refused_by_name() -> None:
    import transformers as t

    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for config, why in (
        (t.GPT2Config(), "not gpt2"),
        (t.LlamaConfig(**SIZES, rope_parameters=scaled), "rope_type=linear"),
        (t.LlamaConfig(**SIZES, attention_bias=True), "attention_bias=True"),
        (t.LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act=gelu"),
        (t.MistralConfig(**SIZES, sliding_window=16), "sliding_window=16"),
        (t.Qwen3Config(**SIZES, head_dim=16), "head_dim=16"),
    ):
        with pytest.raises(ModelError, match=why):
            check_config(config, "run")


def _cut_by(*parts: Any, regex: bool) -> Any:
    from tokenizers import pre_tokenizers

    tokenizer = tiny_tokenizer()
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, last]) if parts else last
    return tokenizer


def _whole_words(tokenizer: Any) -> Any:
    tokenizer.backend_tokenizer.model.ignore_merges = True
    return tokenizer


def test_the_way_texts_are_cut_has_a_name_or_is_refused() -> None:
    from tokenizers import Regex, pre_tokenizers

    from penchant.export.gguf import _LLAMA3, _QWEN2

    def split(pattern: str) -> Any:
        return pre_tokenizers.Split(Regex(pattern), "isolated")

    digits = pre_tokenizers.Digits(individual_digits=True)
    for tokenizer, name in (
        (_cut_by(regex=True), "gpt-2"),
        (_cut_by(digits, regex=True), "smollm"),
        (_cut_by(split(_QWEN2), regex=False), "qwen2"),
        (_whole_words(_cut_by(split(_LLAMA3), regex=False)), "llama-bpe"),
    ):
        assert vocabulary_of(tokenizer, 264, "run").pre == name
    others = (_cut_by(split(r"\d"), regex=False), _cut_by(digits, regex=False), _cut_by(split(_LLAMA3), regex=False))
    for unknown in (*others, _whole_words(_cut_by(regex=True))):
        with pytest.raises(ModelError, match="no verified name"):
            vocabulary_of(unknown, 264, "run")


def test_pieces_of_sentencepiece_keep_their_order_of_merging() -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "\u2581t",
        "he",
        "\u2581the",
        "\u2581",
        "t",
        "h",
        "e",
    ]
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he")]
    backend = Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    found = vocabulary_of(tokenizer, len(pieces), "run")
    assert found.model == "llama" and found.adds_space and found.types[3] == BYTE and found.types[259] == NORMAL
    score = dict(zip(found.tokens, found.scores, strict=True))
    assert score["\u2581t"] > score["he"] > score["\u2581the"] > max(score[p] for p in ("\u2581", "t", "h", "e"))
