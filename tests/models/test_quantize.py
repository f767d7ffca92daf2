"""model.quantize: frozen 4- or 8-bit weights with an adapter; merged and compared models equal the trained one."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.errors import ConfigError
from penchant.models.load import cast_parameters, load_causal_model, source_sha256
from penchant.models.lora import add_lora, effective_weights
from penchant.models.merge import merged_model
from penchant.models.options import LoraConfig, ModelConfig
from penchant.models.quantize import is_quantized
from penchant.plan.memory import quantized_bytes

CPU = torch.device("cpu")
IDS = torch.arange(3, 27)[None]
BITS = ["nf4", "int8"]
HERE = importlib.util.find_spec("bitsandbytes") is not None
needs_library = pytest.mark.skipif(not HERE, reason="bitsandbytes is an extra")


def source(folder: Path, bits: str) -> ModelConfig:
    return ModelConfig.model_validate({"path": tiny_model_folder(folder / "model"), "quantize": bits})


@needs_library
@pytest.mark.parametrize("bits", BITS)
def test_weights_are_the_librarys_and_only_they_are_rounded(bits: str, tmp_path: Path) -> None:
    import bitsandbytes.functional as F

    config = source(tmp_path, bits)
    held, whole = load_causal_model(config, CPU, held=True), load_causal_model(config, CPU)
    assert sum(map(is_quantized, held.modules())) == 7 * held.config.num_hidden_layers
    assert not any(map(is_quantized, whole.modules()))
    (file,) = Path(config.path).glob("*.safetensors")
    found = whole.state_dict()
    for name, w in load_file(file).items():
        if w.ndim == 2 and ".layers." in name:
            if bits == "nf4":
                w = F.dequantize_4bit(*F.quantize_4bit(w.float(), compress_statistics=True, quant_type="nf4"))
            else:  # 127 steps up to a row's maximum, rounded to about the nearest (computed in fp16)
                step = w.float().abs().amax(1, keepdim=True) / 127
                assert bool(((found[name] - w.float()).abs() <= 0.6 * step).all())
                assert bool(((found[name] / step - (found[name] / step).round()).abs() < 0.1).all())
                continue
        torch.testing.assert_close(found[name], w.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(held(IDS).logits, whole(IDS).logits, rtol=1e-4, atol=1e-5)


@needs_library
@pytest.mark.parametrize("bits", BITS)
def test_gradients_of_an_adapter_are_those_over_the_dequantized_weights(bits: str, tmp_path: Path) -> None:
    config, grads = source(tmp_path, bits), []
    for held in (True, False):
        model = add_lora(load_causal_model(config, CPU, held=held), LoraConfig(r=2), seed=0)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.copy_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p))
        model(IDS).logits.log_softmax(-1)[..., 5].sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-5)


@needs_library
@pytest.mark.parametrize("bits", BITS)
def test_bf16_is_what_the_layers_compute_in(bits: str, tmp_path: Path) -> None:
    model = add_lora(load_causal_model(source(tmp_path, bits), CPU, held=True), LoraConfig(r=2), seed=0)
    want = model(IDS).logits
    cast_parameters(model, torch.bfloat16)
    seen = []
    layer = next(m for m in model.modules() if is_quantized(m))
    layer.register_forward_hook(lambda _, given, out: seen.append((given[0].dtype, out.dtype)))
    got = model(IDS).logits
    assert got.dtype == torch.bfloat16 and set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert bool(((got.float() - want).abs().max() < 0.1 * want.abs().max()).all())


@needs_library
@pytest.mark.parametrize("bits", BITS)
def test_a_plan_knows_what_the_bits_take(bits: str, tmp_path: Path) -> None:
    config = source(tmp_path, bits)
    layers = [m for m in load_causal_model(config, CPU, held=True).modules() if is_quantized(m)]
    plain = add_lora(load_causal_model(config, CPU), LoraConfig(r=2), seed=0)
    held = 0
    for layer in layers:
        weight = layer.weight
        held += weight.data.nbytes
        held += (
            weight.SCB.nbytes
            if bits == "int8"
            else weight.quant_state.absmax.nbytes + weight.quant_state.state2.absmax.nbytes
        )
    count, few, largest = quantized_bytes(plain, bits)
    assert (few, count) == (held, sum(m.in_features * m.out_features for m in layers))
    assert largest == max(m.in_features * m.out_features for m in layers)
    assert quantized_bytes(plain, "none") == (0, 0, 0)


def settings(folder: Path, bits: str) -> dict[str, Any]:
    return {
        "model": {"path": tiny_model_folder(folder / "model"), "dtype": "fp32", "quantize": bits},
        "lora": {"r": 2},
        "data": {"path": write_jsonl(folder / "pairs.jsonl", polite_rows()[:12]), "validation_rows": 4},
        "train": {"epochs": 2, "max_steps": 3, "batch_size": 4, "lr": 1e-2},
        "evaluation": {"samples": 1, "sample_tokens": 3, "kl_prompts": 2},
        "output": str(folder / f"run-{bits}"),
    }


@needs_library
@pytest.mark.parametrize("bits", BITS)
def test_a_run_keeps_an_adapter_that_merges_into_what_was_trained(bits: str, tmp_path: Path) -> None:
    config = settings(tmp_path, bits)
    result = api.train(config, quiet=True)
    (model,) = (tmp_path / f"run-{bits}/checkpoints").glob("step-3/model")
    assert [p.name for p in model.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert all("lora_" in name for name in load_file(model / "adapter_model.safetensors"))
    assert result.before["eval/loss"] == pytest.approx(0.693147, abs=1e-4)  # the reference is the policy's start
    known = json.loads((tmp_path / f"run-{bits}/manifest.json").read_text())
    own = ModelConfig.model_validate(config["model"])
    assert known["model"]["sha256"] == source_sha256(own, torch.nn.Linear(1, 1))
    assert known["model"]["sha256"] != source_sha256(
        own.model_copy(update={"quantize": "other"}), torch.nn.Linear(1, 1)
    )
    merged = merged_model(own, model, CPU)
    assert not any(map(is_quantized, merged.modules()))
    merged.save_pretrained(tmp_path / "merged")  # a plain model without quantization settings
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    from peft import PeftModel

    held = PeftModel.from_pretrained(load_causal_model(own, CPU, held=True), str(model))
    torch.testing.assert_close(merged(IDS).logits, held(IDS).logits, rtol=1e-3, atol=1e-4)
    weights = effective_weights(held, {})
    assert weights and all(torch.allclose(w, merged.state_dict()[n], atol=1e-6) for n, w in weights.items())


@needs_library
def test_a_resumed_run_and_a_moving_reference(tmp_path: Path) -> None:
    config = settings(tmp_path, "nf4") | {"reference": {"sync_every": 2}, "checkpoint": {"every": 1, "keep_last": 9}}
    whole = api.train(config, quiet=True)
    other = {**config, "output": str(tmp_path / "again")}
    api.train(other, quiet=True)
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"again/checkpoints/step-{step}")
    again = api.train(other, quiet=True)
    assert again.after == whole.after
    kept, found = (
        load_file(folder / "checkpoints/step-3/state.safetensors")
        for folder in (tmp_path / "run-nf4", tmp_path / "again")
    )
    assert kept.keys() == found.keys() and all(torch.equal(t, found[n]) for n, t in kept.items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lora": None}, "add a lora section"),
        ({"model": {"path": "m", "quantize": "nf4", "init": "random"}}, "init=random"),
        ({"algorithm": {"name": "reward_model"}}, "model.quantize=none"),
    ],
)
def test_what_cannot_be_quantized_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        api.train(settings(tmp_path, "nf4") | change, quiet=True)


@pytest.mark.skipif(HERE, reason="bitsandbytes is installed")
def test_a_missing_extra_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'penchant\[bnb\]'"):
        api.train(settings(tmp_path, "nf4"), quiet=True)
