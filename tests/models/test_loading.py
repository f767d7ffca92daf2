"""Loading a model: dropout is off for any config, dtypes are kept, and memory is bounded."""

from __future__ import annotations

import logging
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import family_configs

from penchant.errors import ModelError
from penchant.models.load import cast_parameters, held_in, load_causal_model, save_model, stays_wide, weights_sha256
from penchant.models.options import ModelConfig
from penchant.runs.parts import gathered_state
from penchant.training.optim import MasterAdamW

CONFIGS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=31, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
    ),
    "llama": lambda: transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=31,
        attention_dropout=0.5,
    ),
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_loaded_model_has_no_dropout_of_its_own(tmp_path: Path, name: str) -> None:
    """A policy with dropout against a reference without it would have spurious log-ratios."""
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).train()
    with torch.no_grad():
        assert not torch.equal(made(ids).logits, made(ids).logits)
        made.save_pretrained(tmp_path)
        model = load_causal_model(ModelConfig(path=str(tmp_path)), torch.device("cpu")).train()
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_functional_dropout_is_off_too(tmp_path: Path) -> None:
    """OPT passes rates to F.dropout, so there is no dropout module to find."""
    config = transformers.OPTConfig(
        hidden_size=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=31,
        dropout=0.5,
        layerdrop=0.5,
    )
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with torch.no_grad():
        model = load_causal_model(ModelConfig(path=str(tmp_path)), torch.device("cpu")).train()
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_dropout_that_stays_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()).save_pretrained(tmp_path)
    monkeypatch.setattr("penchant.models.load.disable_dropout", lambda model: None)
    with pytest.raises(ModelError, match="has dropout"):
        load_causal_model(ModelConfig(path=str(tmp_path)), torch.device("cpu"))


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    transformers.AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()).save_pretrained(tmp_path)
    torch.manual_seed(3)
    load_causal_model(ModelConfig(path=str(tmp_path)), torch.device("cpu"))
    found = torch.rand(1)
    assert torch.equal(found, torch.manual_seed(3) and torch.rand(1))


def test_of_a_model_of_text_and_images_the_text_part_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.Gemma3Config(
        text_config={**sizes, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 31},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        image_token_index=29,
    )
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    said: list[str] = []
    monkeypatch.setattr(transformers.modeling_utils.logger, "handle", lambda record: said.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.WARNING)
    model = load_causal_model(ModelConfig(path=str(tmp_path)), torch.device("cpu")).eval()
    assert not said  # transformers would list the weights of the vision tower
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        assert type(model).__name__ == "Gemma3ForCausalLM"
        assert torch.equal(model(ids).logits, whole(ids).logits)

    save_model(model, None, tmp_path / "saved")
    again = load_causal_model(ModelConfig(path=str(tmp_path / "saved")), torch.device("cpu")).eval()
    stranger = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, whole(ids).logits)
        assert torch.equal(stranger(ids).logits, whole(ids).logits)


CPU = torch.device("cpu")


@pytest.mark.parametrize("name", sorted(family_configs()))
def test_weights_read_in_bf16_are_those_that_are_cast_to_it(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(family_configs()[name](), dtype=torch.float32)
    made.save_pretrained(tmp_path)
    source = ModelConfig(path=str(tmp_path))
    right, found = load_causal_model(source, CPU), load_causal_model(source, CPU, within=torch.bfloat16)
    # Gemma has a scale that would be rounded to the weights' dtype
    assert all(p.dtype == torch.bfloat16 for p in found.parameters()) == (not name.startswith("gemma"))
    for model in (right, found):
        cast_parameters(model, torch.bfloat16)
    for of in ("named_parameters", "named_buffers"):
        theirs, ours = dict(getattr(right, of)()), dict(getattr(found, of)())
        assert theirs.keys() == ours.keys()
        assert all(t.dtype == ours[n].dtype and torch.equal(t, ours[n]) for n, t in theirs.items())


def test_buffers_that_would_be_in_bf16_are_made_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).save_pretrained(tmp_path)
    whole = transformers.LlamaModel.__init__

    def init(self: Any, *args: Any) -> None:
        whole(self, *args)
        self.register_buffer("angles", torch.arange(3) / 7, persistent=False)

    monkeypatch.setattr(transformers.LlamaModel, "__init__", init)
    model = load_causal_model(ModelConfig(path=str(tmp_path)), CPU, within=torch.bfloat16)
    assert model.model.angles.dtype == torch.float32


def test_weights_are_held_in_bf16_where_fp32_would_hold_nothing_more(tmp_path: Path) -> None:
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=torch.float32)
    made.save_pretrained(tmp_path / "fp32")
    made.bfloat16().save_pretrained(tmp_path / "bf16")
    for stored, dtype, frozen, wanted in (
        ("fp32", torch.bfloat16, True, torch.bfloat16),
        ("fp32", torch.bfloat16, False, torch.float32),
        ("bf16", torch.bfloat16, False, torch.bfloat16),
        ("bf16", torch.float32, True, torch.float32),
        ("bf16", torch.float64, True, torch.float32),
    ):
        assert held_in(ModelConfig(path=str(tmp_path / stored)), dtype, frozen) == wanted
    drawn = ModelConfig(path=str(tmp_path / "bf16"), init="random")
    assert held_in(drawn, torch.bfloat16, True) == torch.float32
    for stored, kept in (("bf16", torch.bfloat16), ("fp32", torch.float32)):  # as stored, if it is sharded
        for dtype, frozen in ((torch.float32, False), (torch.bfloat16, True)):
            assert held_in(ModelConfig(path=str(tmp_path / stored)), dtype, frozen, shards=True) == kept


MEASURE = """
import ctypes, sys, torch
from pathlib import Path
from penchant.models import load
from penchant.models.options import ModelConfig

libc = ctypes.CDLL(None)
if hasattr(libc, "malloc_trim"):  # glibc: what is large has pages of its own, which are given back
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
load._check_behavior = lambda *_: None

def own():
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1])

seen = []
for name in ("own_memory", "check_finite", "disable_dropout"):
    real = getattr(load, name)
    setattr(load, name, lambda *a, real=real: (seen.append(own()), real(*a), seen.append(own())))
for within, mapped in (("bfloat16", False), ("bfloat16", True), ("float32", False)):
    cfg = ModelConfig(path=sys.argv[1])
    load.load_causal_model(cfg, torch.device("cpu"), within=getattr(torch, within), mapped=mapped)  # imports
    seen.clear()
    before = own()
    model = load.load_causal_model(cfg, torch.device("cpu"), within=getattr(torch, within), mapped=mapped)
    print((max(seen) - before) / sum(p.numel() for p in model.parameters()))
    del model
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_no_more_memory_than_what_is_held(tmp_path: Path) -> None:
    """Peak memory besides mapped files of a separate process that loads 8 million weights."""
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, vocab_size=15000
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    said = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "m")], capture_output=True, text=True)
    found = list(map(float, said.stdout.split()))
    assert len(found) == 3, said.stderr
    for bytes_a_weight, held in zip(found, (2.0, 0.0, 4.0), strict=True):
        assert held - 1.0 <= bytes_a_weight <= held + 1.0, found


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of a family whose router transformers keeps in fp32."""
    folder = tmp_path_factory.mktemp("routed")
    config = transformers.Ernie4_5_MoeConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        moe_num_experts=4,
        moe_k=2,
        moe_layer_start_index=1,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def test_parameters_that_transformers_keeps_in_fp32_stay_there(routed: Path) -> None:
    own = transformers.AutoModelForCausalLM.from_pretrained(routed, dtype=torch.bfloat16)
    model = load_causal_model(ModelConfig(path=str(routed)), torch.device("cpu"))
    before = weights_sha256(model, torch.bfloat16)
    cast_parameters(model, torch.bfloat16)
    wanted = {n: p.dtype for n, p in own.named_parameters()}
    assert set(wanted.values()) == {torch.float32, torch.bfloat16}
    assert {n: p.dtype for n, p in model.named_parameters()} == wanted
    assert weights_sha256(model) == before
    gathered = gathered_state(model, torch.bfloat16)  # what several processes save
    assert {n: gathered[n].dtype for n in wanted} == wanted
    cast_parameters(model, torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_what_stays_in_fp32_is_its_own_master(routed: Path) -> None:
    model = load_causal_model(ModelConfig(path=str(routed)), torch.device("cpu"))
    optimizer = MasterAdamW(model.named_parameters(), dtype=torch.bfloat16, stays_wide=partial(stays_wide, model))
    cast_parameters(model, torch.bfloat16)
    own = {n for n, p in model.named_parameters() if optimizer.masters[n] is p}
    assert own == {n for n, p in model.named_parameters() if p.dtype == torch.float32} != set()
    before = {n: optimizer.masters[n].clone() for n in own}
    model(torch.tensor([[1, 2, 3, 4]])).logits.float().square().sum().backward()
    optimizer.step(0.1)
    assert any(not torch.equal(optimizer.masters[n], value) for n, value in before.items())


def test_an_adapter_on_what_stays_in_fp32_is_cast(routed: Path) -> None:
    model = load_causal_model(ModelConfig(path=str(routed)), torch.device("cpu"))
    assert stays_wide(model, "base_model.model.model.layers.1.mlp.gate.base_layer.weight")
    assert not stays_wide(model, "base_model.model.model.layers.1.mlp.gate.weight.lora_A.default.weight")
    assert not stays_wide(model, "model.layers.1.mlp.experts.gate_up_proj")
