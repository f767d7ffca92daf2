"""Streamed tokens equal those of `sample`, and log-probs those of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model
from serving import model_of, random_folder
from tiny import tiny_tokenizer

from penchant.rollout.generate import sample
from penchant.serve.model import STYLES, ChatModel
from penchant.serve.stream import Sampling, Stream

PROMPT = [5, 17, 40, 8, 33]


def _model(family: str, ends: tuple[int, ...] = (2,)) -> ChatModel:
    model = tiny_model(family, dtype=torch.float32)
    return ChatModel(family, model, tiny_tokenizer(), STYLES["plain"], frozenset(ends), 128)


def _drawn(chat_model: ChatModel, sampling: Sampling) -> list[list[int]]:
    stream = Stream(chat_model, PROMPT, sampling)
    rows: list[list[int]] = [[] for _ in range(sampling.n)]
    while not stream.done:
        for d in stream.step():
            rows[d.row].append(d.token)
    return rows


@pytest.mark.parametrize(
    "family,temperature,top_p,top_k",
    [
        *(("llama", 1.0, 1.0, 0), ("llama", 0.0, 1.0, 0)),
        *((family, 1.5, 0.8, 20) for family in ("llama", "qwen3", "gpt2", "mistral-window", "gemma2")),
    ],
)
def test_a_stream_draws_what_sample_draws(family: str, temperature: float, top_p: float, top_k: int) -> None:
    chat_model = _model(family, ends=(7,))
    settings = dict(n=5, max_new_tokens=40, temperature=temperature, top_p=top_p, top_k=top_k, seed=3)
    whole = sample(chat_model.model, [PROMPT], eos_token_id=7, **settings)[0]  # type: ignore[arg-type]
    rows = _drawn(chat_model, Sampling(**settings))  # type: ignore[arg-type]
    assert rows == [s.ids for s in whole]
    if temperature:
        assert len({len(r) for r in rows}) > 1  # some ended early, so rows moved


def test_a_model_without_a_usable_cache_streams_too() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = MambaForCausalLM(MambaConfig(**sizes)).eval()  # type: ignore[arg-type]
    chat_model = ChatModel("mamba", model, tiny_tokenizer(), STYLES["plain"], frozenset({7}), 128)
    expected = sample(model, [PROMPT], n=3, max_new_tokens=12, seed=3, eos_token_id=7)[0]
    assert _drawn(chat_model, Sampling(12, n=3, seed=3)) == [s.ids for s in expected]


def test_fast_and_slow_are_told_apart() -> None:
    assert _model("llama").decoder is not None and _model("gpt2").decoder is None


def test_log_probs_are_the_models_own(tmp_path: Path) -> None:
    chat_model = model_of(random_folder(tmp_path))
    stream = Stream(chat_model, PROMPT, Sampling(12, n=2, temperature=1.7, top_k=9, top_logprobs=3, seed=1))
    ids: list[list[int]] = [list(PROMPT), list(PROMPT)]
    while not stream.done:
        for d in stream.step():
            with torch.no_grad():
                logps = chat_model.model(torch.tensor([ids[d.row]])).logits[0, -1].log_softmax(-1)
            assert d.logp == pytest.approx(float(logps[d.token]), abs=1e-4)
            values, tokens = logps.topk(3)
            assert [t for t, _ in d.likeliest] == tokens.tolist()
            assert [p for _, p in d.likeliest] == pytest.approx(values.tolist(), abs=1e-4)
            ids[d.row].append(d.token)
    assert len(ids[0]) > len(PROMPT) + 1


def test_every_end_token_ends() -> None:
    chat_model = _model("llama")
    free = _drawn(chat_model, Sampling(30, seed=5))[0]
    chat_model.eos_token_ids = frozenset({free[4], free[9], 96})
    first = next(i for i, t in enumerate(free) if t in chat_model.eos_token_ids)
    assert _drawn(chat_model, Sampling(30, seed=5))[0] == free[: first + 1]


@pytest.mark.parametrize("presence_penalty,frequency_penalty", [(2.0, 0.0), (0.0, 1.0)])
def test_penalties_are_taken_off_the_logits(presence_penalty: float, frequency_penalty: float) -> None:
    chat_model = _model("llama", ends=())
    got = _drawn(
        chat_model,
        Sampling(25, temperature=0.0, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty),
    )[0]
    ids, own = list(PROMPT), []
    for _ in range(25):
        with torch.no_grad():
            logits = chat_model.model(torch.tensor([ids])).logits[0, -1]
        counts = torch.bincount(torch.tensor(own, dtype=torch.int64), minlength=len(logits))
        token = int((logits - frequency_penalty * counts - presence_penalty * (counts > 0)).argmax())
        ids.append(token)
        own.append(token)
    assert got == own
    assert got != _drawn(chat_model, Sampling(25, temperature=0.0))[0]


def test_a_stopped_answer_leaves_and_the_others_are_what_they_were() -> None:
    chat_model = _model("llama", ends=())
    whole = _drawn(chat_model, Sampling(20, n=4, seed=2))
    stream = Stream(chat_model, PROMPT, Sampling(20, n=4, seed=2))
    rows: list[list[int]] = [[] for _ in range(4)]
    for step in range(20):
        for d in stream.step():
            rows[d.row].append(d.token)
        if step in (0, 6):
            stream.stop(1 if step else 0)
    assert [len(r) for r in rows] == [1, 7, 20, 20] and stream.done
    assert rows == [w[: len(r)] for w, r in zip(whole, rows, strict=True)]


def test_draws_differ_by_turn_and_attempt() -> None:
    chat_model = _model("llama", ends=())
    made = {
        (turn, attempt): tuple(_drawn(chat_model, Sampling(8, seed=1, turn=turn, attempt=attempt))[0])
        for turn in (0, 1)
        for attempt in (0, 1)
    }
    assert len(set(made.values())) == 4
