"""Properties that must hold on every device: `make test-gpu` runs these with ``--device cuda``, the default suite on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family_configs, losses_by_default, make_tree, some_pairs, some_trees, tiny_model
from steps import small_loop

from penchant.algorithms.offline import Component, Offline
from penchant.data.packing import pack
from penchant.logprobs import Scorer
from penchant.logprobs.head import token_logps
from penchant.logprobs.reference import LiveReference
from penchant.losses import LOSSES
from penchant.models.load import cast_parameters
from penchant.models.tree_attention import tree_attention, tree_layout, tree_mask
from penchant.models.tree_kernels import flex_plan, flex_tree_attention, varlen_attention, varlen_plan
from penchant.rollout.generate import sample
from penchant.training.loop import Loop
from penchant.training.optim import MasterAdamW
from penchant.training.options import CheckpointConfig

pytestmark = pytest.mark.device


def loop_on(
    device: torch.device, folder: Path, dtype: torch.dtype, name: str = "dpo", steps: int = 4, attention: str = "groups"
) -> Loop:
    policy, frozen = (tiny_model("smollm-tied", dtype=torch.float32).to(device) for _ in range(2))
    optimizer = MasterAdamW(policy.named_parameters(), dtype=dtype)
    for model in (policy, frozen):
        cast_parameters(model, dtype)
    losses = [Component(LOSSES[name], LOSSES[name].params())]
    folder.mkdir(exist_ok=True)
    algorithm = Offline(
        Scorer(policy, "shared", attention=attention),
        losses,
        LiveReference(Scorer(frozen, "shared", attention=attention)),
    )
    trees = [replace(t, labels=(True, False), scores=(1.0, 0.5)) for t in some_pairs(8)]
    train = {"batch_size": 4, "tokens_per_step": 40, "epochs": 2.0, "max_steps": steps}
    # policy and reference are the same model at step 0, so bitwise equal
    same = {"start_tolerance": (0.0, 0.0), "checkpoint": CheckpointConfig(every=2)}
    return small_loop(algorithm, optimizer, trees, train, folder, **same)


def state(loop: Loop) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in loop.optimizer.state_tensors().items()}


@pytest.mark.parametrize(
    "dtype,attention",
    [(torch.float32, "groups"), (torch.bfloat16, "groups"), (torch.bfloat16, "varlen")],
    ids=["fp32", "bf16", "bf16-varlen"],
)
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(
    tmp_path: Path, device: torch.device, dtype: torch.dtype, attention: str
) -> None:
    """Two uninterrupted runs end alike too, and policy and reference differ by 0.0 nats at step 0."""
    how: Any = {"dtype": dtype, "attention": attention}
    whole, again = loop_on(device, tmp_path / "whole", **how), loop_on(device, tmp_path / "again", **how)
    part = loop_on(device, tmp_path / "part", **how)
    part.pause_at = 2
    whole.run()
    again.run()
    with pytest.raises(Exception, match="paused"):
        part.run()
    resumed = loop_on(device, tmp_path / "part", **how)
    resumed.run()
    expected = state(whole)
    for other in (state(again), state(resumed)):
        assert other.keys() == expected.keys() and all(torch.equal(other[k], expected[k]) for k in expected)
        assert {v.device.type for v in other.values()} == {device.type}


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2-window", "gpt2"])
def test_packings_agree(device: torch.device, family: str) -> None:
    found: list[Any] = []
    for packing in ("shared", "separate", "padded"):
        scorer = Scorer(tiny_model(family).to(device), packing)  # type: ignore[arg-type]
        logps = scorer.logps(pack(some_trees(), shared=scorer.shared).to(device)).sums
        logps.sum().backward()
        grads = [p.grad.flatten() for p in scorer.model.parameters() if p.grad is not None]
        found.append((logps.detach(), torch.cat(grads)))
    for logps, grad in found[1:]:
        assert torch.allclose(logps, found[0][0], rtol=1e-9)
        assert (grad - found[0][1]).norm() <= 1e-9 * grad.norm()


# ---- attention without a mask: flash kernels in two passes (on a CPU plain matmuls in the same dtype), and FlexAttention ----


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral-window"])
def test_attention_in_bf16_is_the_groups_in_fp32(device: torch.device, family: str) -> None:
    """Within bf16 precision: log-probs to 0.03 nats per token, gradients with a cosine of at least 0.999."""
    from transformers import AutoModelForCausalLM

    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    config = family_configs()[family]()
    config.head_dim = 16  # the minimum for FlexAttention
    for dtype, attention in (
        (torch.float32, "groups"),
        (torch.bfloat16, "varlen+flex" if on_gpu(device) else "varlen"),
    ):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(device)
        cast_parameters(model, torch.bfloat16)  # both have the rounded weights
        cast_parameters(model, dtype)
        logps = Scorer(model, "shared", attention=attention).logps(pack(some_trees()).to(device)).tokens
        logps.sum().backward()
        grads = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
        found.append((logps.detach().float(), torch.cat(grads)))
    (expected, grad), (logps, other) = found
    assert (logps - expected).abs().mean() <= 0.03
    assert torch.cosine_similarity(grad, other, dim=0) >= 0.999


@pytest.mark.parametrize("softcap,window,sinks", [(None, None, False), (20.0, None, False), (None, 200, True)])
def test_flex_attention_and_its_gradients_are_the_groups(
    device: torch.device, softcap: float | None, window: int | None, sinks: bool
) -> None:
    if not on_gpu(device):
        pytest.skip("FlexAttention has no gradient on a CPU")
    batch = pack([make_tree(0, 300, (100, 60, 5)), make_tree(1, 17, (40,))]).to(device)
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(batch.tokens, h, 32, generator=g).to(device).requires_grad_() for h in (4, 2, 2)]
    sink = torch.randn(4, generator=g).to(device).requires_grad_() if sinks else None
    given = [*parts, *([sink] if sink is not None else [])]
    upstream = torch.randn(batch.tokens, 4, 32, generator=g).to(device)
    flex = flex_tree_attention(*parts, flex_plan(batch, window), 0.2, softcap, sink)
    groups = tree_attention(*parts, tree_layout(batch, window), 0.2, softcap, sink)
    assert torch.allclose(flex, groups, atol=1e-4)
    pairs = zip(torch.autograd.grad(flex, given, upstream), torch.autograd.grad(groups, given, upstream), strict=True)
    for a, b in pairs:
        assert (a - b).norm() <= 1e-3 * b.norm()


@pytest.mark.parametrize("tree", [512, 2048, 8192])
def test_two_passes_are_nearly_as_fast_as_one_causal_pass(device: torch.device, tree: int) -> None:
    """Forward and backward over 16k tokens reach at least 0.9 of plain causal attention's pairs per second at the same lengths."""
    if not on_gpu(device):
        pytest.skip("a rate of a GPU")
    prompt = tree // 2
    trees = [make_tree(i, prompt, (prompt // 2, prompt // 2)) for i in range(16384 // tree)]
    shared = pack(trees).to(device)
    single = pack([make_tree(i, prompt, (prompt,)) for i in range(len(trees))]).to(device)
    rates = []
    for batch in (shared, single):
        q, k, v = (
            torch.randn(batch.tokens, h, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
            for h in (32, 8, 8)
        )
        plan, upstream = varlen_plan(batch), torch.randn_like(q)
        pairs = sum(float(tree_mask(s, s.length, None).sum()) for s in batch.segments)
        for _ in range(3):
            varlen_attention(q, k, v, plan, 0.1).backward(upstream)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(20):
            varlen_attention(q, k, v, plan, 0.1).backward(upstream)
        end.record()
        torch.cuda.synchronize()
        rates.append(pairs / begin.elapsed_time(end))
    print(f"trees of {tree}: {rates[0] / rates[1]:.2f} of causal attention's rate")
    assert rates[0] >= 0.9 * rates[1]


def test_the_head_equals_a_plain_softmax(device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, 16, generator=g, dtype=torch.float64).to(device).requires_grad_() for n in (50, 97)
    )
    targets = torch.randint(0, 97, (50,), generator=g).to(device)
    expected = torch.log_softmax(hidden @ weight.t(), -1).gather(1, targets[:, None]).squeeze(1)
    grads = torch.autograd.grad(expected.square().sum(), (hidden, weight))
    for chunk in (None, 7):
        logps, _ = token_logps(hidden, weight, targets, chunk=chunk)
        assert torch.allclose(logps, expected, rtol=1e-12)
        for a, b in zip(torch.autograd.grad(logps.square().sum(), (hidden, weight)), grads, strict=True):
            assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("name", losses_by_default())
def test_a_step_on_the_device_is_the_cpus(tmp_path: Path, device: torch.device, name: str) -> None:
    lines = []
    for where in (torch.device("cpu"), device):
        loop = loop_on(where, tmp_path / where.type, torch.float32, name)
        loop.start_tolerance = None
        lines.append([loop.take_step(step, loop.schedule)[0] for step in range(2)])
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        assert a.pop("kind") == b.pop("kind") == "train"
        assert b == pytest.approx(a, rel=1e-3, abs=1e-4)


def test_completions_are_sampled_beside_deterministic_steps(tmp_path: Path, device: torch.device) -> None:
    loop = loop_on(device, tmp_path, torch.float32)
    loop.take_step(0, loop.schedule)
    how = dict(n=2, max_new_tokens=5, temperature=0.7, top_p=0.9, seed=0, eos_token_id=2)
    first, again = (sample(loop.model, [[1, 5, 9], [1, 7]], **how) for _ in range(2))  # type: ignore[arg-type]
    assert [[s.ids for s in row] for row in first] == [[s.ids for s in row] for row in again]
