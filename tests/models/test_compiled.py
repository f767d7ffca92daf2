"""Compiled layers: the numbers, names and gradients of plain ones, and one compilation for all lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from families import VOCAB, some_pairs, tiny_model

from penchant.data.packing import pack
from penchant.errors import ConfigError
from penchant.logprobs import Scorer
from penchant.logprobs.packing import choose_packing
from penchant.models import compiled
from penchant.models.load import add_lora
from penchant.models.options import LoraConfig
from penchant.rollout.generate import sample

BATCHES = [pack(some_pairs(n, seed=n)) for n in (2, 5, 3)]


@pytest.fixture(autouse=True)
def _traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything but the generation of code, which takes a C++ compiler a minute; and mostly without the tracing of gradients."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def trained(scorer: Scorer) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Log-probs and gradients of several batches."""
    found = []
    for batch in BATCHES:
        scorer.model.zero_grad()
        sums = scorer.logps(batch).sums
        (sums * torch.linspace(-1, 1, len(sums), dtype=sums.dtype)).sum().backward()
        gradients = {n: p.grad.clone() for n, p in scorer.model.named_parameters() if p.grad is not None}
        found.append((sums.detach(), gradients))
    return found


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llama", "varlen"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", "groups"), ("gemma3", "varlen"))),
    ],
)
def test_numbers_names_and_gradients_are_those_of_plain_layers(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    model = tiny_model(family, dtype=torch.float64)
    plain = trained(Scorer(model, "shared", attention=attention))
    names = list(model.state_dict())
    fused = trained(Scorer(model, "shared", "compile", attention=attention))
    assert graphs() > 0 and list(model.state_dict()) == names
    for (sums, gradients), (wanted, wanted_gradients) in zip(fused, plain, strict=True):
        assert torch.allclose(sums, wanted, rtol=0, atol=1e-11)
        assert gradients.keys() == wanted_gradients.keys()
        for name, value in wanted_gradients.items():
            assert torch.allclose(gradients[name], value, rtol=0, atol=1e-11), name


def test_nothing_is_compiled_anew_for_other_lengths_nor_for_sampling() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    scorer = Scorer(model, "shared", "compile")
    scorer.logps(BATCHES[0]).sums.sum().backward()
    once = graphs()
    assert once > 0
    trained(scorer)
    sample(model, [[5, 6, 7], [4]], max_new_tokens=3)
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert graphs() == once


def test_an_adapter_is_trained_and_switched_off() -> None:
    model = add_lora(tiny_model("llama", dtype=torch.float64), LoraConfig(r=2), 0)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    plain = Scorer(model, "shared")
    wanted = trained(plain)
    with model.disable_adapter(), torch.no_grad():
        start = plain.logps(BATCHES[0]).sums
    fused = Scorer(model, "shared", "compile")
    for (sums, gradients), (expected, of_plain) in zip(trained(fused), wanted, strict=True):
        assert torch.allclose(sums, expected, rtol=0, atol=1e-11)
        assert all(torch.allclose(gradients[n], g, rtol=0, atol=1e-11) for n, g in of_plain.items())
    with model.disable_adapter(), torch.no_grad():
        assert torch.allclose(fused.logps(BATCHES[0]).sums, start, rtol=0, atol=1e-11)
    assert not torch.allclose(start, wanted[0][0])


def test_the_choice_is_checked_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, note = choose_packing(tiny_model("llama", dtype=torch.float32), "auto", "compile")
    assert scorer.compiled and scorer.on(tiny_model("llama", dtype=torch.float32, seed=1)).compiled
    assert "compiled" in note

    def wrong(graph: Any, _: Any) -> Any:
        return lambda *inputs: tuple(x * 1.5 for x in graph(*inputs))

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    for backend in (wrong, broken):
        torch._dynamo.reset()
        monkeypatch.setattr(compiled, "BACKEND", backend)
        with pytest.raises(ConfigError, match=r"model\.kernels"):
            choose_packing(tiny_model("llama", dtype=torch.float32), "auto", "compile")


def test_a_model_that_takes_padded_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.kernels"):
        choose_packing(tiny_model("llama", dtype=torch.float32), "padded", "compile")


def test_layers_share_what_is_compiled() -> None:
    found = []
    for layers in (2, 5):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        Scorer(transformers.LlamaForCausalLM(config), "shared", "compile").logps(BATCHES[0])
        found.append(graphs())
    assert found[0] == found[1] > 0
