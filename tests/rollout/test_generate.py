"""Sampling: greedy equals transformers', log-probs equal the engine's, and the same seed gives the same text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model
from torch.overrides import TorchFunctionMode

from penchant.data.packing import pack
from penchant.logprobs import Scorer
from penchant.rollout import generate
from penchant.rollout.generate import sample
from penchant.types import TokenTree

PROMPTS = [[5, 6, 7], [9, 8], [11, 12, 13], [4]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_greedy_equals_transformers(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    rows = sample(model, PROMPTS, max_new_tokens=8, temperature=0)
    for prompt, (row,) in zip(PROMPTS, rows, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert row.ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # the pooled decoder, and transformers' own cache
@pytest.mark.parametrize("penalty", [1.7, 0.6])
def test_the_repetition_penalty_is_transformers(family: str, penalty: float) -> None:
    model = tiny_model(family, dtype=torch.float64)
    how = {"max_new_tokens": 12, "temperature": 0, "repetition_penalty": penalty}
    rows = sample(model, PROMPTS, **how)  # type: ignore[arg-type]
    for prompt, (row,) in zip(PROMPTS, rows, strict=True):
        asked = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "repetition_penalty": penalty}
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, **asked)
        assert row.ids == expected[0, len(prompt) :].tolist()
    assert [r[0].ids for r in rows] != [r[0].ids for r in sample(model, PROMPTS, max_new_tokens=12, temperature=0)]


def test_a_penalty_changes_what_is_drawn_and_log_probs_stay_the_models() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0]])
    changed = generate.penalized(logits, torch.tensor([[0, 1, 0]]), 2.0)
    assert changed.tolist() == [[1.0, -2.0, 0.5, 0.0]]
    uniforms = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    many = logits.expand(4000, 4), uniforms
    tokens, logps = generate.draw(*many, temperature=0.8, penalized=changed.expand(4000, 4))
    shares = torch.bincount(tokens, minlength=4) / 4000
    assert torch.allclose(shares, torch.softmax(changed[0] / 0.8, -1), atol=0.03)
    assert torch.allclose(logps, torch.log_softmax(logits[0] / 0.8, -1)[tokens])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_agree_with_the_engine(temperature: float) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    rows = sample(model, PROMPTS, n=3, max_new_tokens=6, temperature=temperature, seed=1)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.div_(temperature)
    for i, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True)):
        tree = TokenTree(i, np.array(prompt, np.int32), tuple(np.array(s.ids, np.int32) for s in row), (False,) * 3)
        with torch.no_grad():
            tokens = Scorer(model, "shared").logps(pack([tree])).tokens
        assert tokens.tolist() == pytest.approx([lp for s in row for lp in s.logps], abs=1e-5)


def test_seeds() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    one, same, other = (sample(model, PROMPTS, n=2, max_new_tokens=6, seed=s) for s in (0, 0, 1))
    assert one == same != other
    assert one[0][0].ids != one[0][1].ids


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_prompts_completions_have_a_bound_of_their_own(family: str) -> None:
    """Tokens up to the bound are the same as without it."""
    model, rooms = tiny_model(family), [1 + i % 6 for i in range(len(PROMPTS))]
    whole, bounded = (sample(model, PROMPTS, n=2, max_new_tokens=6, seed=1, rooms=r) for r in ((), rooms))
    for long, short, room in zip(whole, bounded, rooms, strict=True):
        assert [s.ids for s in short] == [s.ids[:room] for s in long]


def test_eos_ends_a_row_and_the_others_go_on() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    rows = [s for row in sample(model, PROMPTS, n=24, max_new_tokens=40, seed=0, eos_token_id=2) for s in row]
    ended = [s for s in rows if s.finished]
    assert ended and len(ended) < len(rows)
    assert all(s.ids[-1] == 2 and s.ids.count(2) == 1 for s in ended)
    assert all(2 not in s.ids and len(s.ids) == 40 for s in rows if not s.finished)


def test_top_p_keeps_to_the_likely_tokens() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    narrow = sample(model, [[5]], n=200, max_new_tokens=1, top_p=0.01)
    assert {s.ids[0] for s in narrow[0]} == {sample(model, [[5]], max_new_tokens=1, temperature=0)[0][0].ids[0]}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_progress_counts_up_to_the_end(family: str) -> None:
    seen: list[tuple[int, int]] = []
    sample(tiny_model(family), PROMPTS, max_new_tokens=3, rows_at_once=2, progress=lambda *at: seen.append(at))
    assert seen[-1] == (4, 4) and all(total == 4 for _, total in seen)
    assert [d for d, _ in seen] == sorted({d for d, _ in seen}) and seen[0][0] > 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_cache_that_is_right_is_used(family: str) -> None:
    """Decoding whole rows again, or only prompts of one length together, would also be correct, but slow."""
    assert generate.decoder_class(tiny_model(family, dtype=torch.float32)) is generate._Padded


# ---- transformers' own cache: any model on a GPU, and models without a fast path on the CPU ----

MIXED = [[5, 6, 7], [9, 8], [11, 12, 13, 14, 15, 16, 17], [4], [3, 1, 2], [8] * 12]


@pytest.fixture
def no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the pooled decoder, as on a GPU."""
    monkeypatch.setattr(generate, "can_decode_fast", lambda *_: False)


def at_a_time(model: Any, way: type, monkeypatch: pytest.MonkeyPatch, **how: Any) -> tuple[list[Any], int]:
    """Samples with one way of batching prompts, and how often prompts were prefilled."""
    waves = []
    first = way.first  # type: ignore[attr-defined]
    monkeypatch.setattr(way, "first", lambda row, ids, n, pads: waves.append(len(ids)) or first(row, ids, n, pads))
    monkeypatch.setattr(generate, "decoder_class", lambda _: way)
    return sample(model, MIXED, max_new_tokens=10, seed=3, **how), len(waves)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("how", [{"temperature": 0}, {"n": 3, "eos_token_id": [2, 7, 11]}])
def test_prompts_of_any_length_run_together_and_get_what_they_get_alone(
    family: str, how: dict[str, Any], no_pool: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, dtype=torch.float64)
    rows, together = at_a_time(model, generate._Padded, monkeypatch, **how)
    alone, by_length = at_a_time(model, generate._Cached, monkeypatch, **how)
    assert (together, by_length) == (1, 5)
    assert [[s.ids for s in r] for r in rows] == [[s.ids for s in r] for r in alone]
    for mine, theirs in zip(rows, alone, strict=True):
        assert mine[0].logps == pytest.approx(theirs[0].logps, abs=1e-6)  # log-probs are kept in fp32


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_padded_prompts_equal_transformers(family: str, no_pool: None) -> None:
    model = tiny_model(family, dtype=torch.float64)
    rows = sample(model, MIXED, max_new_tokens=10, temperature=0)
    for prompt, (row,) in zip(MIXED, rows, strict=True):
        asked = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=10, **asked)
        assert row.ids == expected[0, len(prompt) :].tolist()


def test_a_model_that_reads_padding_gets_prompts_of_one_length(no_pool: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2", dtype=torch.float64)
    expected = sample(model, MIXED, max_new_tokens=5, temperature=0)
    del model._penchant_way
    forward = model.forward
    blind = lambda attention_mask=None, position_ids=None, **more: forward(**more)  # noqa: E731
    monkeypatch.setattr(model, "forward", blind)
    assert generate.decoder_class(model) is generate._Cached
    assert sample(model, MIXED, max_new_tokens=5, temperature=0) == expected


def test_rows_at_once_are_what_memory_has_room_for(no_pool: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    expected = sample(model, MIXED, n=2, max_new_tokens=6, temperature=0)
    sizes: list[int] = []
    together = generate._decode_together
    monkeypatch.setattr(
        generate, "_decode_together", lambda row, ps, part, w: sizes.append(len(part)) or together(row, ps, part, w)
    )
    longest = generate.row_bytes(model, 4, 12, 2, 6)
    monkeypatch.setattr(generate, "cache_room", lambda _: int(4 * longest))
    rows = sample(model, MIXED, n=2, max_new_tokens=6, temperature=0)
    assert [[s.ids for s in r] for r in rows] == [[s.ids for s in r] for r in expected]
    assert sum(sizes) == len(MIXED) and len(sizes) > 1
    monkeypatch.setattr(generate, "cache_room", lambda _: 0)  # one prompt always runs
    sizes.clear()
    sample(model, MIXED, n=2, max_new_tokens=6, temperature=0)
    assert sizes == [1] * len(MIXED)


def test_a_gpus_room_is_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 7 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 5 << 30)
    assert generate.cache_room(torch.device("cuda")) == 6 << 30
    assert generate.cache_room(torch.device("cpu")) == generate.CACHE_BYTES
    assert [generate.rows_that_fit(1.0, n) for n in (0, 1, 7, 8, 300, 1000)] == [1, 1, 4, 8, 256, generate.MOST_ROWS]


def test_a_token_waits_for_the_device_once(no_pool: None) -> None:
    """For a token in the middle, where no row ends, and without padding, which transformers checks."""

    class Reads(TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += getattr(func, "__name__", "") in ("__int__", "__bool__", "item", "tolist", "nonzero")
            return func(*args, **(kwargs or {}))

    model = tiny_model("llama", dtype=torch.float32)
    counts = []
    for tokens in (4, 9, 14):
        with Reads() as reads:
            sample(model, [[5, 6, 7], [9, 8, 4]], max_new_tokens=tokens, temperature=1.0)
        counts.append(reads.seen)
    assert counts[2] - counts[1] == 5
