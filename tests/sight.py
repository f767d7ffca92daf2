"""Tiny random vision-language models with processors, pictures, and rows with pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}
EYES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer(specials: Sequence[str], image: str, begin: str = "", **more: Any) -> Any:
    """A tokenizer with one token per byte, and special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<|im_start|>", "<|im_end|>", *specials]
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*words, *alphabet])}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(words)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<pad>", **more)
    fast.chat_template = begin + TURNS.replace("IMAGE", image)
    return fast


def _qwen() -> tuple[Any, Any]:
    import transformers as t

    words = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(words, "<|vision_start|><|image_pad|><|vision_end|>")
    size = {"shortest_edge": 64, "longest_edge": 1024}
    eyes = t.Qwen2VLImageProcessor(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
    how: dict[str, Any] = {"video_processor": t.Qwen2VLVideoProcessor(), "chat_template": tokenizer.chat_template}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
    }
    vision |= {"temporal_patch_size": 2, "window_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [1]}  # type: ignore[dict-item]
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = t.Qwen2_5_VLConfig(
        text_config={
            **SIZES,
            "vocab_size": len(tokenizer),
            "rope_parameters": rope,
            "bos_token_id": None,
            "eos_token_id": 2,
        },
        vision_config=vision,
        **{name: tokenizer.convert_tokens_to_ids(word) for name, word in zip(names, words, strict=True)},
    )
    return t.Qwen2_5_VLProcessor(
        image_processor=eyes, tokenizer=tokenizer, **how
    ), t.Qwen2_5_VLForConditionalGeneration(config)


def _idefics() -> tuple[Any, Any]:
    import transformers as t

    tiles = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    words = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles]
    tokenizer = _tokenizer(words, "<image>")
    eyes = t.Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = t.Idefics3Processor(eyes, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)
    config = t.Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
        text_config={**SIZES, "model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0},
        vision_config=EYES,
    )
    return processor, t.Idefics3ForConditionalGeneration(config)


def _gemma() -> tuple[Any, Any]:
    import torch
    import transformers as t

    words = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = _tokenizer(
        ["<bos>", *words.values()], "<start_of_image>", "{{ bos_token }}", bos_token="<bos>", extra_special_tokens=words
    )
    eyes = t.Gemma3ImageProcessor(size={"height": 16, "width": 16})
    processor = t.Gemma3Processor(eyes, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template)
    text = {**SIZES, "vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8}
    config = t.Gemma3Config(
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        text_config=text,
        vision_config=EYES,
    )
    model = t.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():  # zero in a new model, so that pictures would have no effect
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.2)
    return processor, model


MAKERS: dict[str, Callable[[], tuple[Any, Any]]] = {"idefics3": _idefics, "gemma3": _gemma, "qwen2.5-vl": _qwen}
KINDS = [name for name in MAKERS if name != "qwen2.5-vl" or find_spec("torchvision") is not None]


def seeing_model(folder: Path, kind: str = "idefics3") -> str:
    """Save a tiny vision-language model with its processor, and return the folder as a string."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        processor, model = MAKERS[kind]()
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def paint(path: Path, seed: int, width: int = 40, height: int = 24) -> Path:
    """A picture of noise."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def pictured_rows(folder: Path, n: int = 6) -> list[dict[str, Any]]:
    """Pairs with one question about different pictures, saved beside them. The first has two pictures, the last none."""
    rows: list[dict[str, Any]] = []
    for i in range(n):
        count = {0: 2, n - 1: 0}.get(i, 1)
        names = [f"pictures/{i}-{k}.png" for k in range(count)]
        for k, name in enumerate(names):
            paint(folder / name, 10 * i + k, 40 + 8 * k, 24 + 4 * i)
        asked: list[Mapping[str, str]] = [*({"type": "image"} for _ in names), {"type": "text", "text": "What is it?"}]
        row = {"prompt": [{"role": "user", "content": asked}]}
        for name, text in (("chosen", f"It is a {i}."), ("rejected", "I do not know what this is.")):
            row[name] = [{"role": "assistant", "content": text}]  # type: ignore[list-item]
        rows.append({**row, "images": names})
    return rows


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "pairs.jsonl") -> Path:
    """Write rows to a file."""
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own_logp(model: Any, processor: Any, folder: Path, row: Mapping[str, Any], answer: str) -> float:
    """The log-prob of an answer by the model's own forward, on one conversation rendered by transformers' processor."""
    import torch
    from transformers.image_utils import load_image

    images = [load_image(str(folder / name)) for name in row["images"]]
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    how = {"text": None, "images": [images] if images else None, "return_tensors": "pt", "add_special_tokens": False}
    asked = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
    whole = processor.apply_chat_template([*row["prompt"], said]).rstrip("\n")
    before, inputs = (processor(**{**how, "text": [text]}) for text in (asked, whole))
    start = before["input_ids"].shape[1]
    with torch.no_grad():
        logps = torch.log_softmax(model(**inputs).logits[0].double(), -1)
    ids = inputs["input_ids"][0, start:]
    return float(logps[start - 1 : -1].gather(1, ids[:, None]).sum())
