"""What must hold wherever a model runs: `make test-gpu` runs these with ``--device cuda``, the default suite on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import losses_by_default, some_pairs, some_trees, tiny_model

from penchant.algorithms.offline import Component, Offline
from penchant.data.packing import pack
from penchant.logprobs import Scorer
from penchant.logprobs.head import token_logps
from penchant.logprobs.reference import LiveReference
from penchant.losses import LOSSES
from penchant.models.load import cast_parameters
from penchant.rollout.generate import sample
from penchant.training.console import QuietConsole
from penchant.training.loop import Loop
from penchant.training.optim import MasterAdamW
from penchant.training.options import CheckpointConfig, EvalConfig, LoggingConfig, TrainConfig

pytestmark = pytest.mark.device


def loop_on(device: torch.device, folder: Path, dtype: torch.dtype, name: str = "dpo", steps: int = 4) -> Loop:
    policy, frozen = (tiny_model("smollm-tied", dtype=torch.float32).to(device) for _ in range(2))
    optimizer = MasterAdamW(policy.named_parameters(), dtype=dtype)
    for model in (policy, frozen):
        cast_parameters(model, dtype)
    losses = [Component(LOSSES[name], LOSSES[name].params())]
    folder.mkdir(exist_ok=True)
    return Loop(
        model=policy,
        algorithm=Offline(Scorer(policy, "shared"), losses, LiveReference(Scorer(frozen, "shared"))),
        optimizer=optimizer,
        trees=[replace(t, labels=(True, False), scores=(1.0, 0.5)) for t in some_pairs(8)],
        shared=True,
        folder=folder,
        train=TrainConfig(batch_size=4, tokens_per_step=40, epochs=2.0, max_steps=steps),
        peak_lr=1e-2,
        evaluation=EvalConfig(),
        checkpoint=CheckpointConfig(every=2),
        logging=LoggingConfig(),
        write_model=lambda f: policy.save_pretrained(f),
        console=QuietConsole(),
        start_tolerance=(0.0, 0.0),  # policy and reference are one model at step 0: equal to the last bit
    )


def state(loop: Loop) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in loop.optimizer.state_tensors().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(
    tmp_path: Path, device: torch.device, dtype: torch.dtype
) -> None:
    """And two uninterrupted ones end alike; policy and reference are equal to 0.0 nats at step 0."""
    whole, again = loop_on(device, tmp_path / "whole", dtype), loop_on(device, tmp_path / "again", dtype)
    part = loop_on(device, tmp_path / "part", dtype)
    part.pause_at = 2
    whole.run()
    again.run()
    with pytest.raises(Exception, match="paused"):
        part.run()
    resumed = loop_on(device, tmp_path / "part", dtype)
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
