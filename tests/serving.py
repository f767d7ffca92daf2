"""Models that generate a given text, and a server for one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model_folder, tiny_tokenizer

from penchant.serve.model import ChatModel, load_chat_model


def random_folder(folder: Path, *, seed: int = 0, context: int = 4096, chat: bool = True) -> str:
    """A tiny random model with a context long enough for a conversation."""
    import json

    path = tiny_model_folder(folder, seed=seed, chat=chat)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))
    return path


def writer_folder(
    folder: Path, text: str, *, after: str = " ", context: int = 4096, chat: bool = True, endless: bool = False
) -> str:
    """A model that generates `text` and ends, if its prompt ends in `after`. The next token depends only on the last one.

    Args:
        text: without repeated bytes, and without `after`; endless: repeat the text forever.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(chat=chat)
    chain = [*tokenizer(after + text, add_special_tokens=False)["input_ids"], 1]
    assert len(set(chain)) == len(chain)
    chain[-1] = chain[1] if endless else chain[-1]
    size = 264
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=size,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=8,
            max_position_embeddings=context,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            tie_word_embeddings=False,
        )
    )
    next_of = torch.zeros(size, size)
    next_of[1, :] = 1.0  # all other tokens are followed by the end
    for a, b in pairwise(chain):
        next_of[:, a] = 0.0
        next_of[b, a] = 2.0
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(next_of)
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def model_of(folder: str, **options: Any) -> ChatModel:
    """Load a model in fp32."""
    return load_chat_model(folder, dtype="fp32", device="cpu", **options)


@contextmanager
def serving(chat_model: ChatModel, name: str = "tiny", **options: Any) -> Iterator[Any]:
    """Run a server in a thread. `server.url` is its address."""
    from penchant.serve.routes import App, Limits, Scheduler
    from penchant.serve.server import Server, listen, server_url

    scheduler = Scheduler(options.pop("at_once", 4), options.pop("waiting", 64))
    key, local = options.pop("key", None), options.pop("local", True)
    server: Any = Server(App(chat_model, name, scheduler, key, local, Limits(**options)), listen("127.0.0.1", 0))
    server.url = server_url(server.sock)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.uvicorn.started and time.monotonic() < until:
        time.sleep(0.01)
    try:
        yield server
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()
