"""Compiled layers: the numbers, names and gradients of plain ones, one compilation for all lengths, and whole runs that end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import VOCAB, some_pairs, tiny_model
from safetensors.torch import load_file
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.data.packing import pack
from penchant.errors import CheckpointError, ConfigError
from penchant.logprobs import Scorer
from penchant.logprobs.packing import choose_packing
from penchant.models import compiled
from penchant.models.lora import add_lora
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
    ("family", "attention", "backend"),
    [
        ("llama", "varlen", "eager"),
        *(
            pytest.param(*case, "aot_eager", marks=pytest.mark.slow)
            for case in (("llama", "varlen"), ("llama", "groups"), ("gemma3", "varlen"))
        ),
    ],
)
def test_numbers_names_and_gradients_are_those_of_plain_layers(
    family: str, attention: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", backend)
    model = tiny_model(family, dtype=torch.float64)
    plain = trained(Scorer(model, "shared", attention=attention))
    names = list(model.state_dict())
    scorer = Scorer(model, "shared", "compile", attention=attention)
    fused, once = trained(scorer), graphs()
    assert once > 0 and list(model.state_dict()) == names
    scorer.logps(pack(some_pairs(4, seed=9)))
    assert graphs() == once  # no batch is compiled for anew
    for (sums, gradients), (wanted, wanted_gradients) in zip(fused, plain, strict=True):
        assert torch.allclose(sums, wanted, rtol=0, atol=1e-11)
        assert gradients.keys() == wanted_gradients.keys()
        for name, value in wanted_gradients.items():
            assert torch.allclose(gradients[name], value, rtol=0, atol=1e-11), name


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_choice_is_checked_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, note = choose_packing(tiny_model("llama", dtype=torch.float32), "auto", "compile")
    assert scorer.compiled and scorer.on(tiny_model("llama", dtype=torch.float32, seed=1)).compiled
    assert "compiled" in note

    def hidden(x: Any) -> bool:
        return isinstance(x, torch.Tensor) and x.is_floating_point()  # what else a graph gives are sizes

    def wrong(graph: Any, _: Any) -> Any:
        return lambda *inputs: tuple(x * 1.5 if hidden(x) else x for x in graph(*inputs))

    def wrong_backward(graph: Any, _: Any) -> Any:
        return lambda *inputs: tuple(x * 1.5 - x.detach() * 0.5 if hidden(x) else x for x in graph(*inputs))

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    for backend, what in ((wrong, "log-probs"), (wrong_backward, "gradients"), (broken, "no compiler")):
        torch._dynamo.reset()
        monkeypatch.setattr(compiled, "BACKEND", backend)
        with pytest.raises(ConfigError, match=rf"model\.kernels.*{what}"):
            choose_packing(tiny_model("llama", dtype=torch.float32), "auto", "compile")


def test_a_model_that_takes_padded_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.kernels"):
        choose_packing(tiny_model("llama", dtype=torch.float32), "padded", "compile")


@pytest.mark.slow
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


# ---- whole runs ----


def run_in(folder: Path, **more: Any) -> dict[str, Any]:
    """A run's config; its rows have many lengths."""
    rows = [r | {"chosen": r["chosen"] + " Enjoy!" * (i % 5)} for i, r in enumerate(polite_rows())]
    return {
        "model": {"path": tiny_model_folder(folder / "model"), "dtype": "fp32", "kernels": "compile"},
        "data": {"path": write_jsonl(folder / "pairs.jsonl", rows), "validation_rows": 6, "max_length": 128},
        "loss": {"name": "dpo", "beta": 0.5},
        "train": {"epochs": 2, "batch_size": 6, "tokens_per_step": 600, "lr": 3e-3},
        "evaluation": {"samples": 2, "sample_tokens": 4},
        "output": str(folder / "run"),
    } | more


def written(run: api.TrainResult) -> dict[str, torch.Tensor]:
    (path,) = (run.folder / "checkpoints" / f"step-{run.steps}" / "model").glob("*.safetensors")
    return load_file(path)


ONLINE = {
    "algorithm": {"name": "rloo", "max_new_tokens": 8},
    "reward": "words",
    "train": {"max_steps": 3, "batch_size": 4, "tokens_per_step": 600},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"loss": "sft"},
        {"reference": {"kind": "frozen"}},
        {"lora": {"r": 2, "dropout": 0.1}, "reference": {"kind": "adapter"}},
        {"algorithm": "reward_model", "loss": None},
        {**ONLINE, "loss": None},
    ],
    ids=["sft", "frozen", "lora", "reward-model", "rloo"],
)
def test_a_whole_run_is_that_of_plain_layers(more: dict[str, Any], tmp_path: Path) -> None:
    config = {k: v for k, v in run_in(tmp_path, **more).items() if v is not None}
    fused = api.train(config, quiet=True)
    assert graphs() > 0
    plain = api.train(config, "model.kernels=off", f"output={tmp_path / 'plain'}", quiet=True)
    figures = {name: value for name, value in plain.after.items() if isinstance(value, float)}
    assert figures and {name: fused.after[name] for name in figures} == pytest.approx(figures, rel=1e-3, abs=1e-4)
    found, wanted = written(fused), written(plain)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[n], w, rtol=0, atol=1e-3) for n, w in wanted.items())


@pytest.mark.slow
def test_resumed_is_uninterrupted_and_other_kernels_are_another_run(tmp_path: Path) -> None:
    config = run_in(tmp_path)
    whole = api.train(config, f"output={tmp_path / 'whole'}", quiet=True)
    stopped = api.train(config, quiet=True, callbacks=[lambda step, _: "stop" if step == 3 else None])
    assert stopped.stopped and stopped.steps == 3
    torch._dynamo.reset()
    with pytest.raises(CheckpointError, match="kernels"):
        api.train(config, "model.kernels=auto", quiet=True)
    resumed = api.train(config, quiet=True)
    for name, value in written(whole).items():
        assert torch.equal(written(resumed)[name], value), name


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"train": {"gradient_checkpointing": "layers", "max_steps": 1}}, "gradient_checkpointing"),
        ({"train": {"packing": "padded", "max_steps": 1}}, "padded"),
    ],
)
def test_what_cannot_be_compiled_is_said(more: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"model\.kernels.*{what}"):
        api.train(run_in(tmp_path, **more), quiet=True)
