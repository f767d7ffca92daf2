"""The CPU fast path against plain transformers: hidden states, log-probs and parameter gradients."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from penchant.data.packing import pack
from penchant.logprobs import Scorer
from penchant.models.cpu import attention as fast_attention
from penchant.models.cpu import head as fast_head
from penchant.models.cpu import layers, ops
from penchant.models.cpu.head import fast_token_logps
from penchant.models.cpu.layers import FastForward, fast_forward
from penchant.models.cpu.ops import rms_norm, rms_norm_backward, rotary, rotary_backward, swiglu, swiglu_backward
from penchant.models.load import widened
from penchant.types import PackedBatch, TokenTree

VOCAB = 61
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 3,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_untied_biased": ("Llama", {"tie_word_embeddings": False, "attention_bias": True, "pad_token_id": None}),
    "llama3_rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_windowed": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen2_windowed_above": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
}


def build(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    name, extra = FAMILIES[family]
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **extra})
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
    with torch.no_grad():  # norms start at one and biases at zero, which would hide errors
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.15))
    return model


def trees(
    seed: int = 0, sizes: tuple[tuple[int, tuple[int, ...]], ...] = ((3, (4, 6)), (14, (9, 1)), (1, (5, 2, 3)))
) -> list[TokenTree]:
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(0, VOCAB, n).astype(np.int32)  # noqa: E731
    return [TokenTree(i, draw(p), tuple(draw(c) for c in cs), (False,) * len(cs)) for i, (p, cs) in enumerate(sizes)]


def exact_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    """transformers' RMSNorm computes in fp32 even in an fp64 model; this is the same formula in the model's dtype."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.fixture
def plain_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", exact_norm)
    # and its eager attention computes the softmax in fp32
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))


def plain_logps(model: nn.Module, data: list[TokenTree]) -> torch.Tensor:
    """Log-probs per token by plain transformers, with one completion per sequence."""
    parts = []
    for tree in data:
        for completion in tree.completion_ids:
            ids = torch.from_numpy(np.concatenate([tree.prompt_ids, completion]).astype(np.int64))[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, len(tree.prompt_ids) - 1 : -1]
            parts.append(torch.log_softmax(logits, -1).gather(1, ids[0, len(tree.prompt_ids) :, None])[:, 0])
    return torch.cat(parts)


def fast_logps(model: Any, fast: FastForward, batch: PackedBatch) -> torch.Tensor:
    return fast_token_logps(fast.predicting(batch), model.lm_head.weight, batch.target_ids)[0]


def recognized(model: nn.Module) -> FastForward:
    fast = fast_forward(model)
    assert fast is not None
    return fast


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def weights_for(batch: PackedBatch) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(batch.target_ids.shape[0], dtype=torch.float64)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_transformers(family: str, shared: bool, plain_norms: None) -> None:
    model = build(family).eval()
    model.set_attn_implementation("eager")
    data = trees()
    batch = pack(data, shared=shared)
    g = weights_for(batch)
    expected = plain_logps(model, data)
    (expected * g).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    got = fast_logps(model, recognized(model), batch)
    (got * g).sum().backward()
    assert close(got, expected, 1e-9)
    assert set(gradients) == {n for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        assert p.grad is not None and close(p.grad, gradients[name], 1e-9), name


def test_the_padding_token_learns_nothing_as_an_input(plain_norms: None) -> None:
    """Its row is also an output of a tied head, which does learn. Without padding in the config it is an ordinary token."""
    ids = lambda *n: np.array(n, np.int32)  # noqa: E731
    data = [TokenTree(0, ids(3, 5, 3), (ids(4, 3, 6), ids(7, 3)), (False, False))]
    rows = []
    for padding in (3, None):
        model = build("llama").eval()
        model.model.embed_tokens.padding_idx = padding
        model.set_attn_implementation("eager")
        batch = pack(data)
        (plain_logps(model, data) * weights_for(batch)).sum().backward()
        expected = model.model.embed_tokens.weight.grad.clone()
        model.zero_grad()
        (fast_logps(model, recognized(model), batch) * weights_for(batch)).sum().backward()
        assert close(model.model.embed_tokens.weight.grad, expected, 1e-9)
        rows.append(expected[3])
    assert not close(*rows, 1e-3)


def test_fp32_is_close(plain_norms: None) -> None:
    model = build("llama", torch.float32).eval()
    data = trees()
    got = fast_logps(model, recognized(model), pack(data))
    assert close(got, plain_logps(model, data), 1e-5)


def test_long_trees_take_tiles_and_equal_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build("llama"), trees(sizes=((3, (4, 6)), (20, (30, 25))))
    g = weights_for(pack(data))
    results = []
    for tile, most in ((256, 1), (16, 5)):
        monkeypatch.setattr(fast_attention, "_TILE", tile)
        batch = pack(data)  # a batch caches its layout
        logps = fast_logps(model, recognized(model), batch)
        (plan,) = (kept[0] for name, kept in batch.cache.items() if name.startswith("fast/"))  # type: ignore[index]
        assert max(len(group.tiles) for group in plan.groups) == most
        (logps * g).sum().backward()
        results.append([logps.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for short, tiled in zip(*results, strict=True):
        assert close(tiled, short, 1e-11)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, batch = build("qwen3"), pack(trees())
    g = weights_for(batch)
    results = []
    for on in (False, True):
        model.model.gradient_checkpointing = on
        (fast_logps(model, recognized(model), batch) * g).sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_main_grad_collects_micro_batches() -> None:
    model = build("qwen2")
    batches = [pack(trees(seed)) for seed in (0, 1)]
    for batch in batches:
        (fast_logps(model, recognized(model), batch) * weights_for(batch)).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    for p in model.parameters():
        p.main_grad = torch.zeros_like(p)
    for batch in batches:
        (fast_logps(model, recognized(model), batch) * weights_for(batch)).sum().backward()
    for p, e in zip(model.parameters(), expected, strict=True):
        assert p.grad is None
        assert close(p.main_grad, e, 1e-12)


def test_frozen_parameters_get_no_gradient_and_change_no_other() -> None:
    model, batch = build("llama"), pack(trees())
    g = weights_for(batch)
    (fast_logps(model, recognized(model), batch) * g).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    trained = ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.input_layernorm.weight")
    for n, p in model.named_parameters():
        p.requires_grad_(n in trained)
    (fast_logps(model, recognized(model), batch) * g).sum().backward()
    for n, p in model.named_parameters():
        assert (p.grad is not None) == (n in trained)
        assert n not in trained or close(p.grad, expected[n], 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_grad_pass_is_bit_equal(dtype: torch.dtype) -> None:
    model = build("llama", dtype)
    fast = recognized(model)
    data = trees()
    together = fast_logps(model, fast, pack(data)).detach()
    with torch.no_grad():
        assert torch.equal(fast_logps(model, fast, pack(data)), together)
    assert together.dtype == torch.float32


def test_module_keeps_its_weights(tmp_path: Path) -> None:
    model = build("qwen2", torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fast = recognized(model)
    assert set(model.state_dict()) == set(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in again.state_dict().items())
    # an in-place update takes effect at once, and so does a parameter with new storage
    batch = pack(trees())
    model.model.layers[0].self_attn.v_proj.weight.data.mul_(2.0)
    updated = fast.hidden(batch)
    model.model.layers[0].self_attn.k_proj.weight.data = model.model.layers[0].self_attn.k_proj.weight.data * 3.0
    replaced = fast.hidden(batch)
    fresh = recognized(copy.deepcopy(model))
    assert not torch.equal(updated, replaced)
    assert torch.equal(fresh.hidden(batch), replaced)


def test_unknown_models_are_refused() -> None:
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=VOCAB))
    assert fast_forward(gpt2) is None
    wrong = {"hidden_act": "gelu"}, {"mlp_bias": True}, {"attention_dropout": 0.1}
    for change in wrong:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **change}))
        assert fast_forward(model) is None, change
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, rope_parameters=dynamic))
    assert fast_forward(model) is None
    hooked = build("llama")
    hooked.model.layers[0].mlp.register_forward_hook(lambda *a: None)
    assert fast_forward(hooked) is None
    half = build("llama", torch.float16)
    assert fast_forward(half) is None

    class Custom(transformers.LlamaForCausalLM):
        pass

    assert fast_forward(Custom(transformers.LlamaConfig(**SMALL))) is None


# --------------------------------------------------------------------------------------------------------------------
# the pieces


def test_head_gradcheck_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    h = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    t = torch.randint(0, 11, (7,))
    assert torch.autograd.gradcheck(lambda a, b: fast_token_logps(a, b, t)[0], (h, w))
    kept = torch.autograd.grad(fast_token_logps(h, w, t)[0].cos().sum(), (h, w))
    monkeypatch.setattr(fast_head, "KEEP_BYTES", 0)
    monkeypatch.setattr(fast_head, "_MATMUL_ROWS", 3)
    monkeypatch.setattr(fast_head, "_SOFTMAX_ELEMENTS", 22)
    monkeypatch.setattr(fast_head, "VOCAB_TILE", 4)
    assert torch.autograd.gradcheck(lambda a, b: fast_token_logps(a, b, t)[0], (h, w))
    again = torch.autograd.grad(fast_token_logps(h, w, t)[0].cos().sum(), (h, w))
    assert all(close(a, b, 1e-12) for a, b in zip(again, kept, strict=True))


def test_head_is_exact_where_the_probability_underflows() -> None:
    h = torch.tensor([[1.0], [1.0]])
    w = torch.tensor([[0.0], [300.0], [-500.0]])
    logps, _ = fast_token_logps(h, w, torch.tensor([1, 2]))
    assert logps.tolist() == [0.0, -800.0]


@pytest.mark.parametrize("wide", [True, False], ids=["oneDNN", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_products_of_views(dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_fp32_by_onednn", lambda: wide)
    torch.manual_seed(0)
    whole = torch.randn(40, 60).to(dtype)
    a, b = whole[:7, 3:20], whole[20:37, 10:33]  # slices of larger matrices
    bias, x = whole[39, :23], whole[8:15, 20:43]

    def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
        return torch.allclose(found.double(), wanted, atol=20 * torch.finfo(dtype).eps)

    product = a.double() @ b.double()
    assert near(ops.mm(a, b), product) and near(ops.mm(a, b, bias), product + bias.double())
    assert near(ops.mm(a.t(), x), a.double().t() @ x.double()) and near(ops.mm(x, b.t()), x.double() @ b.double().t())
    assert near(ops.addmm(x, a, b), x.double() + product)
    total = x.clone()
    assert ops.addmm_(total, a, b) is total and near(total, x.double() + product)
    assert ops.mm(a[:0], b).shape == (0, 23) and ops.mm(a[:, :0], b[:0]).abs().max() == 0


def test_pieces_have_the_right_gradients() -> None:
    torch.manual_seed(1)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 6, dtype=torch.float64)
    out = w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    dx, dw = torch.autograd.grad(out, (x, w), g)
    fast_out, rstd = rms_norm(x.detach(), w.detach(), 1e-5)
    fast_dx, fast_dw = rms_norm_backward(g, x.detach(), rstd, w, residual=g)
    assert close(fast_out, out.detach(), 1e-12) and close(fast_dx, dx + g, 1e-12) and close(fast_dw, dw, 1e-12)

    a, d = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, dtype=torch.float64)
    out = torch.nn.functional.silu(a[:, :3]) * a[:, 3:]
    (expected,) = torch.autograd.grad(out, a, d)
    gate, up = (part.contiguous() for part in a.detach().chunk(2, dim=1))
    assert close(swiglu(gate, up), out.detach(), 1e-12)
    d_gate, d_up, recomputed = swiglu_backward(d.clone(), gate, up)
    assert close(recomputed, out.detach(), 1e-12)
    assert close(torch.cat([d_gate, d_up], dim=1), expected, 1e-12)


def test_rotary_backward_is_its_transpose() -> None:
    torch.manual_seed(2)
    cos, sin, x, g = (torch.randn(3, 2, n, dtype=torch.float64) for n in (2, 2, 4, 4))
    forward, backward = x.clone(), g.clone()
    rotary(forward, cos, sin)
    rotary_backward(backward, cos, sin)
    assert torch.allclose((forward * g).sum(), (backward * x).sum(), rtol=1e-12)


# ---- LoRA, compared with peft's own modules ----

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(family: str, dtype: torch.dtype = torch.float64, rank: int = 3, **options: Any) -> Any:
    """A model with an adapter whose update is not zero, without peft's casts."""
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": ALL, "lora_alpha": 7, **options}
    model = get_peft_model(build(family, dtype), LoraConfig(r=rank, **options), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p) * 0.2)
            if "lora_magnitude" in name:
                p.mul_(1 + 0.3 * torch.rand_like(p))
    return model


def gradients_of(model: Any, logps: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
    (logps * g).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in ("llama_untied_biased", "mistral_windowed", "qwen2", "qwen3")),
        ("llama", {"target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"layers_to_transform": [1]}),
        ("llama", {"use_rslora": True}),
        ("llama_untied_biased", {"use_dora": True}),
        ("qwen3", {"use_dora": True, "target_modules": ["k_proj", "up_proj"]}),
    ],
)
def test_an_adapter_equals_pefts_own_modules(family: str, options: dict[str, Any], plain_norms: None) -> None:
    model = adapted(family, **options).eval()
    base = model.get_base_model()
    base.set_attn_implementation("eager")
    data = trees()
    batch = pack(data)
    g = weights_for(batch)
    expected = plain_logps(model, data)
    wanted = gradients_of(model, expected, g)
    with model.disable_adapter(), torch.no_grad():
        start = plain_logps(model, data)
    assert not close(start, expected, 1e-2)
    fast = fast_forward(model)
    assert fast is not None
    got = fast_logps(base, fast, batch)
    assert close(got, expected, 1e-9)
    found = gradients_of(model, got, g)
    assert found.keys() == wanted.keys() and all("lora_" in name for name in found)
    for name, grad in wanted.items():
        assert close(found[name], grad, 1e-9), name
    with model.disable_adapter(), torch.no_grad():
        assert close(fast_logps(base, fast, batch), start, 1e-9)
    assert torch.equal(fast_logps(base, fast, batch), got)  # the adapter is on again


def test_an_adapter_that_adds_nothing_changes_no_bit() -> None:
    """At the first step of a LoRA run, policy and reference are bitwise equal."""
    for dtype in (torch.float32, torch.bfloat16):
        model, batch = adapted("qwen3", dtype), pack(trees())
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.zero_()
            fast, base = fast_forward(model), model.get_base_model()
            assert fast is not None
            on = fast_logps(base, fast, batch)
            with model.disable_adapter():
                assert torch.equal(fast_logps(base, fast, batch), on)


def test_an_adapters_gradients_with_checkpointing_and_in_fp32_buffers() -> None:
    batch = pack(trees())
    g = weights_for(batch)
    results = []
    for checkpointing, buffers in ((False, False), (True, False), (False, True)):
        torch.manual_seed(0)
        model = adapted("llama", use_dora=True)
        base = model.get_base_model()
        base.model.gradient_checkpointing = checkpointing
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for p in trained.values() if buffers else ():
            p.main_grad = torch.zeros_like(p)
        fast = fast_forward(model)
        assert fast is not None
        (fast_logps(base, fast, batch) * g).sum().backward()
        results.append([p.main_grad if buffers else p.grad for p in trained.values()])
        assert all((p.grad is None) == buffers for p in trained.values())
    for other in results[1:]:
        assert all(close(a, b, 1e-12) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_pefts_with_the_same_inputs_dropped(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("qwen3", lora_dropout=0.4).train()
    batch = replace(pack(trees()), seed=5)
    g = weights_for(batch)
    kept: dict[int, dict[str, torch.Tensor]] = {}
    forward = layers._layer_forward

    def watched(x: torch.Tensor, row: Any, layer: Any, *rest: Any, **more: Any) -> Any:
        z, saved = forward(x, row, layer, *rest, **more)
        kept[layer.number] = saved.kept
        return z, saved

    monkeypatch.setattr(layers, "_layer_forward", watched)
    fast = Scorer(model, kernels="auto")
    assert fast.fast
    model.get_base_model().model.gradient_checkpointing = checkpointing
    got = fast.logps(batch).tokens
    found = gradients_of(model, got, g)
    every = torch.cat([k.flatten() for of_layer in kept.values() for k in of_layer.values()])
    assert every.unique().tolist() == [-1, 0] and 0.35 < (every == 0).double().mean() < 0.45
    assert not torch.equal(kept[0]["q"], kept[1]["q"]) and not torch.equal(kept[0]["q"], kept[0]["o"])

    model.get_base_model().model.gradient_checkpointing = False
    for number, layer in enumerate(model.get_base_model().model.layers):
        for first, roles in {"q": "qkv", "o": "o", "gate": ("gate", "up"), "down": ("down",)}.items():
            for role in roles:  # roles that share an input share its dropout mask
                part = layer.self_attn if role in "qkvo" else layer.mlp
                where = kept[number][first] == 0
                if len(where) < batch.tokens:  # in the last layer, which continues with the predicting tokens alone
                    some = batch.predict_index.unique()
                    where = torch.zeros(batch.tokens, where.shape[1], dtype=torch.bool).index_copy_(0, some, where)
                dropout = Dropped(where, 0.4)
                part.get_submodule(f"{role}_proj").lora_dropout["default"] = dropout
    expected = Scorer(model).logps(batch).tokens
    wanted = gradients_of(model, expected, g)
    assert close(got, expected, 1e-6)  # transformers' norms compute in fp32
    assert found.keys() == wanted.keys() and all(close(found[name], grad, 1e-5) for name, grad in wanted.items())


class Dropped(nn.Module):
    """Dropout with given masks."""

    def __init__(self, where: torch.Tensor, p: float) -> None:
        super().__init__()
        self.where, self.p = where, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(self.where, 0.0) / (1 - self.p)


@pytest.mark.parametrize("rows", [True, False], ids=["rows of zeros", "no more rows"])
@pytest.mark.parametrize("family", ["llama_untied_biased", "qwen3"])
def test_the_last_layer_of_predicting_tokens_alone(family: str, rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "more_rows", lambda n, dtype: -n % 32 if rows else 0)
    model, batch = build(family), pack(trees())
    found = []
    for of in (
        lambda fast: fast.predicting(batch),
        lambda fast: fast.hidden(batch).index_select(0, batch.predict_index),
    ):
        out = of(recognized(model))
        g = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        found.append((out, gradients_of(model, out, g)))
    (some, of_some), (every, of_every) = found
    assert len(batch.predict_index.unique()) < len(batch.predict_index) < batch.tokens
    assert close(some, every, 1e-12) and of_some.keys() == of_every.keys() and len(of_some) > 20
    assert all(close(of_some[name], grad, 1e-10) for name, grad in of_every.items())


def test_only_passes_of_training_drop_and_each_as_its_seed_says() -> None:
    model, plain = adapted("llama", lora_dropout=0.4).train(), pack(trees())
    fast, base = recognized(model), model.get_base_model()
    first, again, other = (fast_logps(base, fast, replace(plain, seed=s, cache={})) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    whole = fast_logps(base, fast, plain)
    with layers.adapters_as({p: p for n, p in model.named_parameters() if "lora_" in n}):  # as the reference does
        assert torch.equal(fast_logps(base, fast, replace(plain, seed=1)), whole)
    model.eval()
    assert torch.equal(fast_logps(base, fast, replace(plain, seed=1)), whole) and not torch.equal(first, whole)


@pytest.mark.parametrize(
    "options",
    [{"lora_dropout": 0.1, "use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["model.norm"]}],
)
def test_other_adapters_stay_with_peft(options: dict[str, Any]) -> None:
    assert fast_forward(adapted("llama", **options)) is None


def test_two_active_adapters_and_merged_ones_stay_with_peft() -> None:
    from peft import LoraConfig

    model = adapted("llama")
    model.merge_adapter()
    assert fast_forward(model) is None
    model.unmerge_adapter()
    assert fast_forward(model) is not None
    model.add_adapter("second", LoraConfig(r=2, target_modules=ALL))
    model.base_model.set_adapter(["default", "second"])
    assert fast_forward(model) is None


def test_nothing_is_kept_below_the_lowest_adapter() -> None:
    kept: list[Any] = []
    forward = layers._layer_forward
    batch = pack(trees())
    for model in (build("llama"), adapted("llama", layers_to_transform=[1])):
        fast = fast_forward(model)
        assert fast is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                layers, "_layer_forward", lambda *a, **k: kept.append((k["keep"], forward(*a, **k))) or kept[-1][1]
            )
            fast.hidden(batch)
    assert [keep for keep, _ in kept] == [True, True, False, True]  # nothing is saved below the lowest adapter


def test_layers_below_the_lowest_adapter_are_computed_once_for_policy_and_reference() -> None:
    model, passed = adapted("qwen3", torch.float32, layers_to_transform=[1]), []
    base, forward = model.get_base_model(), layers._layer_forward
    fast = fast_forward(model)
    assert fast is not None

    def counted(x: torch.Tensor, row: Any, layer: Any, *rest: Any, **more: Any) -> Any:
        passed.append(next(i for i, known in enumerate(fast._layers) if known is layer))
        return forward(x, row, layer, *rest, **more)

    def references(batch: PackedBatch) -> list[torch.Tensor]:
        policy = fast_logps(base, fast, batch)
        with torch.no_grad(), layers.adapters_as({}):
            reference = fast_logps(base, fast, batch)
        policy.sum().backward()
        return [policy, reference, *(p.grad for p in model.parameters() if p.requires_grad)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_layer_forward", counted)
        found = references(pack(trees()))
        assert passed == [0, 1, 1]
        model.zero_grad()
        patch.setattr(FastForward, "_lowest_trained", lambda _: 0)
        alone = references(pack(trees()))
        assert passed == [0, 1, 1, 0, 1, 0, 1]
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_model_with_values_of_bf16_is_held_in_it_and_computes_the_same_bits(family: str) -> None:
    model = build(family, torch.bfloat16).float().requires_grad_(False)
    scorer, batch = Scorer(model, kernels="auto"), pack(trees(), shared=True)
    matrices = [p for p in model.model.layers.parameters() if p.ndim > 1]
    before, bytes_before = scorer.logps(batch).tokens, sum(p.nbytes for p in matrices)
    scorer.narrow()
    assert scorer.narrowed and sum(p.nbytes for p in matrices) == bytes_before // 2
    assert torch.equal(scorer.logps(batch).tokens, before)
    with widened(model):  # as a decoder runs it
        assert torch.equal(scorer.logps(batch).tokens, before)
    assert scorer.narrowed and torch.equal(scorer.logps(batch).tokens, before)


def test_what_bf16_cannot_hold_stays_in_fp32() -> None:
    scorer = Scorer(build("llama", torch.float32).requires_grad_(False), kernels="auto")
    scorer.narrow()
    assert not scorer.narrowed
