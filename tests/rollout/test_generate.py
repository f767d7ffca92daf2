"""Sampling: greedy is transformers' greedy, log-probs are the engine's, the same seed gives the same text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import tiny_model

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


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # the pool of rows, and transformers' own cache
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
    """What is written up to there is the same as without it."""
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
    """Decoding whole rows anew would be right too, and slow."""
    assert generate._keeps_a_cache(tiny_model(family, dtype=torch.float32))
