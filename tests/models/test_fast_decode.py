"""The pooled decoder equals transformers' own cache on every family, for any neighboring rows and whenever rows leave."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from families import tiny_model
from parameters import by_default

from penchant.models.cpu import decode as fast_decode
from penchant.models.cpu.decode import FastDecoder, PackedLinear, can_decode_fast
from penchant.models.lora import add_lora
from penchant.models.options import LoraConfig
from penchant.rollout import generate
from penchant.rollout.generate import Sample, sample

FAMILIES = ["llama", "smollm-tied", "qwen2", "qwen3"]
PROMPTS = [[5, 6, 7], [9, 8], [11, 12, 13, 14, 15, 16, 17, 18], [4], [3, 3, 3, 3, 3], [20, 21]]


def _slowly(monkeypatch: pytest.MonkeyPatch, model: Any, prompts: Any = PROMPTS, **options: Any) -> list[list[Sample]]:
    with monkeypatch.context() as m:
        m.setattr(generate, "can_decode_fast", lambda *_: False)
        return sample(model, prompts, **options)


def _assert_equal(a: list[list[Sample]], b: list[list[Sample]], tolerance: float = 2e-5) -> None:
    for x, y in zip([s for r in a for s in r], [s for r in b for s in r], strict=True):
        assert x.ids == y.ids and x.finished == y.finished
        assert x.logps == pytest.approx(y.logps, abs=tolerance)


@pytest.mark.parametrize(
    "family,dtype",
    by_default(
        itertools.product(FAMILIES, (torch.float32, torch.float64)),
        [*((family, torch.float64) for family in FAMILIES), ("llama", torch.float32)],
    ),
)
def test_equals_transformers_cache(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, dtype=dtype)
    assert can_decode_fast(model, 28)
    options: dict[str, Any] = {
        "n": 5,
        "max_new_tokens": 20,
        "temperature": 0.9,
        "top_p": 0.99,
        "seed": 3,
        "eos_token_id": 2,
    }
    fast = sample(model, PROMPTS, **options)
    _assert_equal(fast, _slowly(monkeypatch, model, **options))
    assert len({len(s.ids) for r in fast for s in r}) > 2  # rows did end at different times


@pytest.mark.parametrize("rows", by_default([3, 4, 7, 9, 100], [7, 100]))
def test_a_completion_does_not_depend_on_what_runs_beside_it(rows: int) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    options: dict[str, Any] = {"n": 3, "max_new_tokens": 24, "seed": 1, "eos_token_id": 2}
    whole = sample(model, PROMPTS, **options)
    _assert_equal(sample(model, PROMPTS, rows_at_once=rows, **options), whole, 1e-12)
    for i, prompt in enumerate(PROMPTS):
        _assert_equal(sample(model, [prompt], prompt_seeds=[i], **options), [whole[i]], 1e-12)
    backwards = sample(model, PROMPTS[::-1], prompt_seeds=range(len(PROMPTS))[::-1], **options)
    _assert_equal(backwards[::-1], whole, 1e-12)


def test_prompts_come_in_as_places_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    sizes: list[int] = []
    step = FastDecoder.step
    monkeypatch.setattr(
        FastDecoder, "step", lambda self, tokens, *a: sizes.append(len(tokens)) or step(self, tokens, *a)
    )
    prompts = [[5 + i % 9, *range(3, 3 + i % 5)] for i in range(24)]
    options: dict[str, Any] = {"n": 2, "max_new_tokens": 100, "eos_token_id": 2, "seed": 0}
    pooled = sample(model, prompts, rows_at_once=8, **options)
    alone = 24 * 2 // 8 * 99  # steps of six full pools, one after the other
    assert max(sizes) == 8 and len(sizes) < 0.9 * alone
    assert sorted(set(sizes)) != [8]  # finished rows did leave
    _assert_equal(pooled, _slowly(monkeypatch, model, prompts, **options))


@pytest.mark.parametrize(("family", "dora"), [("llama", False), ("qwen2", True)])
def test_an_adapter_is_merged(family: str, dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = add_lora(tiny_model(family, dtype=torch.float32), LoraConfig(r=4, alpha=8, dora=dora), seed=0)
    before = sample(model, PROMPTS, n=2, max_new_tokens=10, seed=0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    assert can_decode_fast(model, 20)
    options: dict[str, Any] = {"n": 2, "max_new_tokens": 10, "seed": 0}
    after = sample(model, PROMPTS, **options)
    _assert_equal(after, _slowly(monkeypatch, model, **options))
    assert [s.ids for r in after for s in r] != [s.ids for r in before for s in r]
    with model.disable_adapter():
        _assert_equal(sample(model, PROMPTS, **options), before)


def test_bf16_is_near_fp32() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    exact = sample(model, PROMPTS, max_new_tokens=1, temperature=0)
    near = sample(tiny_model("llama", dtype=torch.bfloat16), PROMPTS, max_new_tokens=1, temperature=0)
    for a, b in zip(exact, near, strict=True):
        assert b[0].logps[0] == pytest.approx(a[0].logps[0], abs=0.1)


def test_other_models_are_left_to_transformers() -> None:
    assert not can_decode_fast(tiny_model("gpt2"), 10)
    assert not can_decode_fast(tiny_model("gemma3"), 10)
    window = tiny_model("mistral-window")
    window.config.sliding_window = 8
    assert can_decode_fast(window, 8) and not can_decode_fast(window, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_packed_products(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    w, x, b = (torch.randn(*s, generator=generator).to(dtype) for s in ((40, 24), (rows, 24), (40,)))
    near = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float64: 1e-12}[dtype]
    for bias in (b, None):
        expected = torch.nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())
        torch.testing.assert_close(PackedLinear(w, bias, 16)(x).double(), expected, atol=near, rtol=near)


def test_without_packed_products_it_still_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    packed = sample(model, PROMPTS, n=2, max_new_tokens=8)
    monkeypatch.setattr(fast_decode, "_can_pack", lambda _: False)
    _assert_equal(sample(model, PROMPTS, n=2, max_new_tokens=8), packed)
