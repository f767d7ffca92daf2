"""A tiny model folder with a byte-level tokenizer, and small preference files, for end-to-end tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def tiny_tokenizer(*, chat: bool = False, bos: bool = True, eos: bool = True, pad: bool = False) -> Any:
    """A byte-level tokenizer without merges: one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>" if bos else None,
        eos_token="</s>" if eos else None,
        pad_token="</s>" if pad else None,
    )
    if chat:
        fast.chat_template = (
            "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
            "{% if add_generation_prompt %}<s>assistant: {% endif %}"
        )
    return fast


def page_code(name: str) -> str:
    """The first Python file shown on a page of the docs."""
    found = re.search(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / name).read_text(), re.S)
    assert found is not None
    return found[1]


MADE: dict[Any, tuple[dict[str, bytes], Any]] = {}  # the files of a tiny model, and torch's random state after it


def tiny_model_folder(folder: Path, *, seed: int = 0, **tokenizer: Any) -> str:
    """Save a tiny random Llama and its tokenizer, and return the folder as a string. Built once per process, then copied."""
    import torch

    key = (seed, *sorted(tokenizer.items()))
    if key not in MADE:
        with TemporaryDirectory() as made:
            _make_tiny_model(Path(made), seed, tokenizer)
            MADE[key] = {p.name: p.read_bytes() for p in Path(made).iterdir()}, torch.get_rng_state()
    files, random_state = MADE[key]
    torch.set_rng_state(random_state)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return str(folder)


def _make_tiny_model(folder: Path, seed: int, tokenizer: dict[str, Any]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer(**tokenizer).save_pretrained(folder)


def polite_rows(n: int = 24) -> list[dict[str, str]]:
    """Pairs that a tiny model learns in a few steps: the chosen answer is polite, the rejected one is not."""
    things = ["tea", "bread", "a map", "the time", "a pen", "help", "a seat", "salt"]
    return [
        {
            "prompt": f"Ask {i}: may I have {things[i % len(things)]}?",
            "chosen": f" Of course, here is {things[i % len(things)]}.",
            "rejected": f" No way, get {things[i % len(things)]} yourself!",
        }
        for i in range(n)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as JSONL, and return the path as a string."""
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)
