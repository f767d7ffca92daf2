"""LoRA on layers other than plain, untied Linear layers works to the end, or is refused before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import load_tool
from families import tiny_model

from penchant.errors import ConfigError, ModelError
from penchant.models import load, lora
from penchant.models.load import base_model_of, load_causal_model
from penchant.models.lora import add_lora, effective_weights, is_b_matrix, lora_section, trained_on
from penchant.models.merge import merged_model
from penchant.models.options import LoraConfig, ModelConfig
from penchant.models.reward import whole_state_dict
from penchant.training.optim import MasterAdamW

tool = load_tool()
CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_weight_is_refused(target: str) -> None:
    """Merging it would change the tied layer too. With an untied head it is allowed."""
    with pytest.raises(ConfigError, match="is the same weight as"):
        add_lora(tiny_model("smollm-tied", dtype=torch.float32), LoraConfig(r=2, target_modules=["q_proj", target]), 0)
    add_lora(tiny_model("llama", dtype=torch.float32), LoraConfig(r=2, target_modules=["q_proj", target]), 0)


class _InGroups(torch.nn.Linear):
    """Like DeepSeek-V4's attention output projection, where groups of inputs use one grouped weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.unflatten(-1, (2, -1))).sum(-2)


def test_a_layer_that_peft_does_not_know_is_named() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    attention = model.model.layers[0].self_attn
    attention.o_proj = _InGroups(attention.o_proj.in_features // 2, attention.o_proj.out_features, bias=False)
    with pytest.raises(
        ConfigError, match=r"does not fit model\.layers\.0\.self_attn\.o_proj\.weight .* without o_proj"
    ):
        add_lora(model, LoraConfig(r=2, target_modules="all-linear"), 0)


def _with_an_update(model: Any) -> None:
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
        if "lora_magnitude" in name:
            p.data.mul_(1 + 0.2 * torch.randn_like(p))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("qwen3_moe", {}),
        ("gpt_oss", {}),
        pytest.param("gpt2", {}, marks=pytest.mark.slow),
        ("gpt2", {"dora": True}),  # its weights are transposed
        ("llama", {"dora": True, "rslora": True}),
    ],
)
def test_experts_and_other_layers_are_merged(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Effective weights, a reward model's full state and the merged model agree with the adapter."""
    with tool.silent():
        tool.tiny_model(kind).save_pretrained(tmp_path / "base")
    config = ModelConfig(path=str(tmp_path / "base"))
    start = {n: p.clone() for n, p in load_causal_model(config, CPU).named_parameters()}
    rank = 3  # twice that for experts, which is no dimension of a weight
    model = add_lora(load_causal_model(config, CPU), LoraConfig(r=rank, **more), seed=0).eval()
    assert all(not p.any() for n, p in model.named_parameters() if "lora_B" in n)
    _with_an_update(model)
    with torch.no_grad():
        want = model(IDS).logits
        for weights in (effective_weights(model, {}), whole_state_dict(model, {})):
            plain = load_causal_model(config, CPU).eval()
            assert set(weights) <= set(plain.state_dict()) and any(
                not torch.equal(w, start[n]) for n, w in weights.items() if n in start
            )
            plain.load_state_dict(weights, strict=False)
            assert torch.allclose(plain(IDS).logits, want, atol=1e-4)
        model.save_pretrained(tmp_path / "adapter")
        merged = merged_model(config, tmp_path / "adapter", CPU).eval()
        assert torch.allclose(merged(IDS).logits, want, atol=1e-4)
        if kind in ("gpt2", "llama"):
            again = trained_on(
                load_causal_model(config, CPU), tmp_path / "adapter", lora_section(tmp_path / "adapter"), 0
            )
            assert torch.equal(again.eval()(IDS).logits, want)
            assert any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_merges_wrongly_is_refused_and_leaves_the_start_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in bf16, where rounding of the merged weight would hide the error, so it is checked in fp32."""
    model = tiny_model("llama", dtype=dtype)
    before = {n: p.clone() for n, p in model.named_parameters()}
    merged = lora.merged_weight
    monkeypatch.setattr(lora, "merged_weight", lambda module: merged(module) * 1.01)
    with pytest.raises(ConfigError, match="merging an adapter of this model changes its logits"):
        add_lora(model, LoraConfig(r=2), seed=0)
    monkeypatch.undo()
    model = add_lora(tiny_model("llama", dtype=dtype), LoraConfig(r=2), seed=0)
    for name, p in base_model_of(model).named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, before[load.plain_name(name)])


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], r".*layers\.1\..*[qv]_proj"])
def test_layers_and_scale_are_pefts(targets: Any) -> None:
    """A list, a regular expression or all-linear mean the same as in peft; rsLoRA divides by the root of the rank."""
    from peft import LoraConfig as Theirs
    from peft import get_peft_model

    theirs = Theirs(r=4, lora_alpha=6, target_modules=targets, use_rslora=True, task_type="CAUSAL_LM")
    expected = get_peft_model(tiny_model("llama", dtype=torch.float32), theirs)
    ours = LoraConfig(r=4, alpha=6.0, target_modules=targets, rslora=True)
    model = add_lora(tiny_model("llama", dtype=torch.float32), ours, 0)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in expected.named_parameters()}
    scales = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert scales == {6 / 2}


def test_lora_plus_is_pefts() -> None:
    """The B matrices use a multiple of the learning rate (arXiv 2402.12354)."""
    from peft.optimizers import create_loraplus_optimizer

    ours, theirs = (add_lora(tiny_model("llama", dtype=torch.float32), LoraConfig(r=2), 0) for _ in range(2))
    reference = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    optimizer = MasterAdamW(
        ours.named_parameters(),
        dtype=torch.float32,
        weight_decay=0.1,
        lr_scale=lambda name: 8.0 if is_b_matrix(name) else 1.0,
    )
    for _ in range(3):
        for model in (ours, theirs):
            model(IDS, labels=IDS).loss.backward()
        optimizer.step(0.01)
        reference.step()
        reference.zero_grad()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4), name


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 2 on the attention's q and v."""
    folder = tmp_path_factory.mktemp("adapter")
    lora = LoraConfig(r=2, alpha=4.0, target_modules=["v_proj", "q_proj"])
    model = add_lora(tiny_model("llama", dtype=torch.float32), lora, 0)
    _with_an_update(model)
    model.save_pretrained(folder)
    return folder


def test_a_section_beside_an_adapter_says_how_it_is_trained(adapter: Path) -> None:
    assert lora_section(adapter) == LoraConfig(r=2, alpha=4.0, target_modules=["q_proj", "v_proj"])
    given = LoraConfig(r=2, dropout=0.1, lr_ratio=4.0, target_modules=["v_proj", "q_proj"])
    made = lora_section(adapter, given)
    assert (made.alpha, made.dropout, made.lr_ratio) == (4.0, 0.1, 4.0)
    assert lora_section(adapter, made) == made


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"r": 4}, "lora.r"),
        ({"alpha": 8.0}, "lora.alpha"),
        ({"dora": True}, "lora.dora"),
        ({"target_modules": ["q_proj"]}, "lora.target_modules"),
        ({"target_modules": "all-linear"}, "lora.target_modules"),
    ],
)
def test_another_adapter_than_the_one_that_is_named_is_refused(
    adapter: Path, given: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError) as error:
        trained_on(tiny_model("llama", dtype=torch.float32), adapter, lora_section(adapter, LoraConfig(**given)), 0)
    assert error.value.where == match and "leave it out" in error.value.how


def test_the_same_layers_may_be_named_in_another_way(adapter: Path) -> None:
    given = LoraConfig(target_modules=r".*\.(q|v)_proj")
    trained_on(tiny_model("llama", dtype=torch.float32), adapter, lora_section(adapter, given), 0)


@pytest.mark.parametrize(
    "more",
    [{"modules_to_save": ["embed_tokens"]}, {"bias": "all"}, {"peft_type": "IA3"}, {"init_lora_weights": "pissa"}],
)
def test_what_is_more_than_a_low_rank_update_is_not_trained_on(
    adapter: Path, more: dict[str, Any], tmp_path: Path
) -> None:
    values = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | more))
    with pytest.raises(ModelError, match=str(next(iter(more.values() if "peft_type" in more else more)))):
        lora_section(tmp_path)
