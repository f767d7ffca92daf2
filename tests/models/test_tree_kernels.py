"""Attention without a mask: two varlen passes and FlexAttention, compared with the dense tree mask, and which one a model gets."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import family_configs, make_tree, noted_attention, some_trees, tiny_model
from torch.autograd import Function, gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from penchant.data.packing import pack
from penchant.errors import ConfigError
from penchant.logprobs import Scorer, packing
from penchant.logprobs.packing import attention_calls, choose_packing
from penchant.models import tree_attention as module
from penchant.models import tree_kernels as kernels
from penchant.models.tree_attention import Call, select_attention, tree_attention, tree_layout, tree_mask
from penchant.models.tree_kernels import (
    BLOCK,
    Sequences,
    VarlenPlan,
    eager_backward,
    eager_forward,
    flex_plan,
    flex_tree_attention,
    mask_mod,
    tokens_of,
    varlen_attention,
    varlen_plan,
    visible_blocks,
)
from penchant.training.steps import repeatable
from penchant.types import PackedBatch, Segment

META = torch.device("meta")
BF16, FP32 = torch.bfloat16, torch.float32


def numbers(batch: PackedBatch, heads: int = 6, kv: int = 2, width: int = 8, dtype: Any = torch.float64) -> list[Any]:
    """Queries, keys and values of a row, and a gradient for the output."""
    g = torch.Generator().manual_seed(0)
    sizes = (heads, kv, kv, heads)
    return [torch.randn(batch.tokens, h, width, generator=g, dtype=dtype).requires_grad_() for h in sizes]


# ---- two varlen passes: output and gradients equal the dense mask's ----


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("heads,kv", [(6, 2), (4, 4), (4, 1)])
def test_two_passes_are_the_tree_mask(k: int, heads: int, kv: int) -> None:
    """Several trees with different numbers of completions, including prompts and completions of one token."""
    lengths = [tuple(1 + (3 * i + j) % 7 for j in range(k)) for i in range(3)]
    trees = [make_tree(i, p, c) for i, (p, c) in enumerate(zip((5, 1, 9), lengths, strict=True))]
    batch = pack([*trees, *some_trees(), make_tree(9, 1, (1,)), make_tree(10, 1, (1,) * k)])
    *parts, upstream = numbers(batch, heads, kv)
    sinks = torch.linspace(-1, 2, heads, dtype=torch.float64).requires_grad_()
    for sink in (None, sinks):
        given = [*parts, *([sink] if sink is not None else [])]
        expected = tree_attention(*parts, tree_layout(batch), 0.3, None, sink)
        found = varlen_attention(*parts, varlen_plan(batch), 0.3, sink)
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
        pairs = (torch.autograd.grad(out, given, upstream) for out in (found, expected))
        for a, b in zip(*pairs, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-10)


def test_completions_without_tokens_and_values_of_another_width() -> None:
    """A reward model scores empty answers, and some models' values are narrower than their keys."""
    shapes = [(4, (0, 3, 0)), (3, (0,)), (2, (2, 0, 5))]
    starts = itertools.accumulate((p + sum(c) for p, c in shapes), initial=0)
    segments = tuple(Segment(at, p, c) for at, (p, c) in zip(starts, shapes, strict=False))
    batch = replace(pack(some_trees()), input_ids=torch.zeros(19, dtype=torch.int64), segments=segments, cache={})
    q, k, v, _ = numbers(batch)
    expected = tree_attention(q, k, v[..., :5], tree_layout(batch), 0.3)
    assert torch.allclose(varlen_attention(q, k, v[..., :5], varlen_plan(batch), 0.3), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", sorted(family_configs()))
def test_a_model_says_the_same_by_either_attention(family: str) -> None:
    """Compares log-probs and weight gradients. Layers with a cap or a short window stay with the groups."""
    found = []
    for attention in ("groups", "varlen"):
        model = tiny_model(family)
        tokens = Scorer(model, "shared", attention=attention).logps(pack(some_trees())).tokens
        tokens.sum().backward()
        found.append((tokens.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (expected, grad), (tokens, other) = found
    assert torch.allclose(tokens, expected, rtol=0, atol=1e-12)
    assert (grad - other).norm() <= 1e-10 * grad.norm()


@pytest.mark.parametrize("window,varlen", [(31, False), (32, True), (None, True)])
def test_a_window_that_hides_nothing_is_none(monkeypatch: pytest.MonkeyPatch, window: int | None, varlen: bool) -> None:
    """The longest prompt plus completion has 32 tokens, in a tree of 36."""
    model = tiny_model("mistral-window")
    for part in (model.config, *model.modules()):
        if hasattr(part, "sliding_window"):
            part.sliding_window = window
    ran: list[int] = []
    monkeypatch.setattr(module, "varlen_attention", lambda *a: ran.append(1) or varlen_attention(*a))
    batch = pack(some_trees())
    tokens = Scorer(model, "shared", attention="varlen").logps(batch).tokens
    assert bool(ran) is varlen
    assert torch.allclose(tokens, Scorer(model, "shared").logps(batch).tokens, rtol=0, atol=1e-12)


def test_the_gradient_is_the_function_s() -> None:
    batch = pack([make_tree(0, 2, (1, 2)), make_tree(1, 1, (1,))])
    parts = numbers(batch, 2, 1, 2)[:3]
    sinks = torch.tensor([0.3, -0.5], dtype=torch.float64, requires_grad=True)
    plan = varlen_plan(batch)
    assert gradcheck(lambda q, k, v, s: varlen_attention(q, k, v, plan, 0.7, s), (*parts, sinks))


class _Kernel(Function):
    """A kernel like torch's `varlen_attn`: it returns its log-sum-exp, but drops the gradient of that output."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, s: Sequences, causal: bool) -> Any:
        out, lse = eager_forward(q, k, v, s, causal, 0.3)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = s, causal, 0.3
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Any, of_lse: Any) -> Any:
        return *eager_backward(grad, *ctx.saved_tensors, *ctx.how), None, None


def test_autograd_through_the_merge_would_be_wrong() -> None:
    """Right outputs but wrong gradients, which `varlen_attention` avoids and these comparisons detect."""
    batch = pack(some_trees())
    *parts, upstream = numbers(batch)
    (q, k, v), plan = parts, varlen_plan(batch)
    assert plan.second is not None
    out, lse = _Kernel.apply(q, k, v, plan.first, True)
    other, seen = _Kernel.apply(q[plan.rows], k[plan.keys], v[plan.keys], plan.second, False)
    total = torch.logaddexp(lse[:, plan.rows], seen)
    merged = (torch.exp(x - total).t()[..., None] * o for x, o in ((lse[:, plan.rows], out[plan.rows]), (seen, other)))
    naive = out.index_copy(0, plan.rows, sum(merged))
    expected = tree_attention(q, k, v, tree_layout(batch), 0.3)
    assert torch.allclose(naive, expected, rtol=0, atol=1e-12)
    wrong, right = (torch.autograd.grad(o, parts, upstream, retain_graph=True) for o in (naive, expected))
    for a, b in list(zip(wrong, right, strict=True))[:2]:
        assert (a - b).norm() > 0.05 * b.norm()


# ---- flash kernels on the meta device: their arguments, and operation counts ----


class Ops(TorchDispatchMode):
    """Counts operations by name, and records for attention's backward kernels whether deterministic mode only warns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.warned: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen[name] += 1
        if "attention_backward" in name:
            self.warned.append(torch.is_deterministic_algorithms_warn_only_enabled())
        return func(*args, **(kwargs or {}))


# ops that are nondeterministic on a GPU, synchronize with it, or copy heads
UNWANTED = {"index_add", "index_add_", "scatter_add", "_local_scalar_dense", "nonzero", "repeat_interleave"}


def test_flash_kernels_take_the_plan_on_the_device() -> None:
    """By shapes: odd head sizes are padded and restored, nothing synchronizes, and any row's plan takes one copy."""
    copies = []
    for trees in (some_trees(), [make_tree(i, 3 + i % 5, (2, 4, 1)) for i in range(40)]):
        batch = pack(trees).to(META)
        with Ops() as ops:
            plan = varlen_plan(batch)
        assert varlen_plan(batch) is plan and plan.first.cu_q.dtype == torch.int32 and plan.rows.device == META
        copies.append((ops.seen["_to_copy"], sum(ops.seen.values())))
        q, k, v, upstream = (x.detach().to(META, BF16).requires_grad_() for x in numbers(batch, width=20))
        with Ops() as ops:
            out = varlen_attention(q, k, v[..., :12], plan, 0.3)
            grads = torch.autograd.grad(out, (q, k, v), upstream[..., :12])
        assert out.shape == (batch.tokens, 6, 12) and out.dtype == BF16
        assert [g.shape for g in grads] == [x.shape for x in (q, k, v)]
        assert ops.seen["_flash_attention_forward"] == ops.seen["_flash_attention_backward"] == 2
        assert not UNWANTED & ops.seen.keys()
    assert copies[0] == copies[1] and copies[0][0] <= 3  # one to the device, two casts of indices from int32 to int64


def test_backward_kernels_take_their_deterministic_way_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash and memory-efficient kernels stay nondeterministic if the mode only warns, as it does in a step."""
    batch, warns = pack(some_trees()), torch.is_deterministic_algorithms_warn_only_enabled
    seen: list[bool] = []
    noted = noted_attention(seen)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", lambda q, k, v, **_: noted(q, k, v))
    monkeypatch.setattr(module, "_EAGER_MAX_LENGTH", 0)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    parts = numbers(batch, 2, 2)[:3]
    there, on_meta = batch.to(META), [x.detach().to(META, BF16).requires_grad_() for x in parts]
    with repeatable(torch.device("cuda"), True):
        # through other operations, as in a model, since a leaf's hook would run first
        tree_attention(*(x * 2 for x in parts), tree_layout(batch), 0.3).sum().backward()
        assert len(seen) >= 2 and warns()
        for warn_only in (True, False):
            torch.use_deterministic_algorithms(True, warn_only=warn_only)
            with Ops() as ops:
                varlen_attention(*on_meta, varlen_plan(there), 0.3).sum().backward()
            assert len(ops.warned) == 2 and not any(ops.warned) and warns() is warn_only
    assert not any(seen)


def test_rows_without_a_second_pass_have_none() -> None:
    batch = pack(some_trees(), shared=False)
    plan = varlen_plan(batch)
    assert plan.second is None and len(plan.rows) == 0
    assert plan.first.cu_q.tolist() == [*itertools.accumulate((s.length for s in batch.segments), initial=0)]


# ---- FlexAttention: its mask is the tree mask; the compiled kernel and its gradient need a GPU ----


def dense(batch: PackedBatch, length: int, window: int | None) -> np.ndarray:
    """The mask of a whole row, assembled from its trees' masks."""
    found = np.zeros((length, length), dtype=np.bool_)
    for s in batch.segments:
        found[s.start : s.start + s.length, s.start : s.start + s.length] = tree_mask(s, s.length, window)
    return found


@pytest.mark.parametrize("window", [None, 1, 4, 150])
def test_flex_has_the_tree_mask_and_its_blocks(window: int | None) -> None:
    batch = pack([*some_trees(), make_tree(9, 300, (140, 7, 200)), make_tree(10, 1, (130, 1))])
    length = -(-batch.tokens // BLOCK) * BLOCK
    row = torch.arange(length)
    columns = [torch.from_numpy(x) for x in tokens_of(batch.segments, length, window)]
    at = torch.tensor(0)
    found = mask_mod(*columns)(at, at, row[:, None], row[None]).numpy()
    n = batch.tokens
    expected = dense(batch, length, window)
    assert np.array_equal(found[:n, :n], expected[:n, :n])
    assert not found[:n, n:].any() and not found[n:, :n].any() and found.any(1).all()  # padding attends only to padding
    blocks = found.reshape(length // BLOCK, BLOCK, -1, BLOCK).any((1, 3))
    assert np.array_equal(visible_blocks(batch.segments, length, window), blocks)


@pytest.mark.parametrize("softcap,window,sinks", [(5.0, 6, False), (None, 6, True)])
def test_flex_is_the_groups(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, window: int | None, sinks: bool
) -> None:
    """Uncompiled on a CPU, where it has no gradient."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    batch = pack([*some_trees(), make_tree(9, 60, (40, 7))])
    q, k, v = (x.detach() for x in numbers(batch, 4, 2, 16, FP32)[:3])
    sink = torch.linspace(-1, 2, 4) if sinks else None
    found = flex_tree_attention(q, k, v, flex_plan(batch, window), 0.3, softcap, sink)
    assert torch.allclose(found, tree_attention(q, k, v, tree_layout(batch, window), 0.3, softcap, sink), atol=1e-5)


# ---- which one a model gets ----

PLAIN, CAPPED, SHORT = Call(BF16, 128, False, None), Call(BF16, 128, True, None), Call(BF16, 128, False, 512)
WIDE = Call(BF16, 512, False, None)


@pytest.mark.parametrize(
    "asked,calls,device,triton,kinds",
    [
        ("auto", {PLAIN}, "cuda", True, ["varlen", "groups"]),
        ("auto", {PLAIN, SHORT}, "cuda", True, ["varlen+flex", "varlen", "groups"]),
        ("auto", {PLAIN, SHORT}, "cuda", False, ["varlen", "groups"]),
        ("auto", {CAPPED}, "cuda", True, ["flex", "groups"]),
        ("auto", {CAPPED}, "cuda", False, ["groups"]),
        ("auto", {PLAIN, CAPPED}, "cuda", True, ["varlen+flex", "varlen", "groups"]),
        ("auto", {PLAIN, WIDE}, "cuda", True, ["varlen+flex", "varlen", "groups"]),
        ("auto", {PLAIN._replace(dtype=FP32)}, "cuda", True, ["groups"]),
        ("auto", {PLAIN}, "cpu", False, ["groups"]),
        ("auto", {PLAIN}, "mps", False, ["groups"]),
        ("groups", {PLAIN}, "cuda", True, ["groups"]),
        ("varlen", {PLAIN}, "cuda", True, ["varlen"]),
        ("varlen", {PLAIN, SHORT}, "cuda", True, ["varlen+flex", "varlen"]),
        ("varlen", {PLAIN._replace(dtype=FP32)}, "cpu", False, ["varlen"]),
        ("flex", {PLAIN, CAPPED, SHORT}, "cuda", True, ["flex"]),
        ("varlen", {PLAIN, CAPPED}, "cuda", True, []),
        ("varlen", {WIDE}, "cuda", True, []),
        ("varlen", {PLAIN._replace(dtype=FP32)}, "cuda", True, []),
        ("varlen", {PLAIN}, "mps", True, []),
        ("flex", {PLAIN}, "cpu", True, []),
        ("flex", {PLAIN}, "cuda", False, []),
        ("flex", {Call(BF16, 8, False, None)}, "cuda", True, []),
    ],
)
def test_attention_by_what_a_model_asks_of_it(
    asked: str, calls: set[Call], device: str, triton: bool, kinds: list[str]
) -> None:
    found, why = select_attention(asked, calls, device, triton)
    assert found == kinds and (why or kinds)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "gemma3"])
def test_what_a_model_asks_is_seen_on_the_model(family: str) -> None:
    """Also on the meta device, which plans use."""
    model = tiny_model(family, dtype=FP32)
    calls = attention_calls(model)
    assert attention_calls(model.to(META)) == calls
    assert {c.window for c in calls} == {"llama": {None}, "gemma2": {None, 6}}.get(family, {6})
    assert {c.capped for c in calls} == {family == "gemma2"} and {(c.dtype, c.head_dim) for c in calls} == {(FP32, 8)}


def test_an_attention_that_was_asked_for_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", dtype=FP32)
    scorer, note = choose_packing(model, "auto", "auto", "varlen")
    assert (scorer.attention, scorer.fast) == ("varlen", False) and "attention: varlen" in note
    assert scorer.on(model).attention == "varlen"
    by_default, note = choose_packing(model, "auto", "auto")
    assert (by_default.attention, by_default.fast) == ("groups", True) and "attention" not in note
    for family, asked, why in (("gemma2", "varlen", "caps the scores"), ("llama", "flex", "no gradient on cpu")):
        with pytest.raises(ConfigError, match=why):
            choose_packing(tiny_model(family, dtype=FP32), "auto", "auto", asked)
    with pytest.raises(ConfigError, match="padded"):
        choose_packing(model, "padded", "auto", "varlen")


def test_a_kernel_with_wrong_gradients_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of a merge through autograd. They are not checked if nothing is trained."""
    model = tiny_model("llama", dtype=FP32)
    backward = kernels._backward

    def of_each_pass(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, s: Any, causal: bool, scale: float) -> Any:
        return backward(grad, q, k, v, *eager_forward(q, k, v, s, causal, scale), s, causal, scale)

    monkeypatch.setattr(kernels, "_backward", of_each_pass)
    with pytest.raises(ConfigError, match=r"model\.attention.*gradients differ"):
        choose_packing(model, "auto", "off", "varlen")
    assert choose_packing(model.requires_grad_(False), "auto", "off", "varlen")[0].attention == "varlen"


def test_a_kernel_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `auto` on a GPU without such a kernel. The log says so."""
    model = tiny_model("llama", dtype=FP32)

    def fails(*_: Any) -> Any:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    monkeypatch.setattr(module, "varlen_attention", fails)
    monkeypatch.setattr(packing, "select_attention", lambda *_: (["varlen", "groups"], ""))
    assert packing.choose_attention(model, "varlen") == (
        "groups",
        "varlen: FlashAttention only supports Ampere GPUs or newer.",
    )


def test_the_kind_is_chosen_for_the_device_that_the_model_will_be_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before sharding the model is on the CPU in fp32. Kernels are probed on the GPU, and the plan is made on the CPU."""
    model, asked, tried = tiny_model("llama", dtype=FP32), [], []
    runs_as = torch.device("cuda"), torch.bfloat16

    def select(requested: str, calls: Any, device: str, triton: bool) -> Any:
        asked.append((device, {call.dtype for call in calls}))
        return ["varlen", "groups"], ""

    def away(_: Any, kind: str, call: Any, device: torch.device) -> float:
        tried.append((kind, call.dtype, device.type))
        return apart

    monkeypatch.setattr(packing, "select_attention", select)
    monkeypatch.setattr(packing, "_gradients_away", away)
    apart = 0.01
    assert choose_packing(model, "auto", "off", "auto", runs_as)[0].attention == "varlen"
    assert asked == [("cuda", {torch.bfloat16})] and tried == [("varlen", torch.bfloat16, "cuda")]
    apart = 0.5
    assert choose_packing(model, "auto", "off", "auto", runs_as)[0].attention == "groups"
    assert choose_packing(model, "auto", "off", "auto")[0].attention == "groups"  # since it stays on the CPU


def test_a_kernel_that_computes_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """This kernel leaves out the second pass."""
    model = tiny_model("llama", dtype=FP32)
    monkeypatch.setattr(
        module, "varlen_plan", lambda batch: VarlenPlan(varlen_plan(batch).first, None, *varlen_plan(batch)[2:])
    )
    with pytest.raises(ConfigError, match=r"model\.attention.*differ"):
        choose_packing(model, "auto", "off", "varlen")
