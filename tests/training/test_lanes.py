"""Concurrent passes: bitwise equal on one, two and three threads, equal to autograd, and a clean end if a pass fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family_configs, some_pairs, tiny_model
from steps import small_loop

from penchant.algorithms.offline import Component, Offline
from penchant.algorithms.reward_model import RewardModelConfig, RewardTraining
from penchant.base.lanes import Turns, side_by_side, turn
from penchant.data import packing
from penchant.data.packing import max_concurrent_passes, pass_tokens, plan_passes
from penchant.logprobs import Scorer
from penchant.logprobs.reference import LiveReference, adapter_as_it_is, adapter_off, compute_logps
from penchant.losses import LOSSES
from penchant.models.load import cast_parameters
from penchant.models.lora import add_lora
from penchant.models.options import LoraConfig
from penchant.rewards.reward_model import CausalRewards
from penchant.training.loop import Loop
from penchant.training.optim import MasterAdamW


@pytest.fixture(autouse=True)
def small_passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make passes of two or three tiny pairs, and restore torch's number of threads afterwards."""
    monkeypatch.setattr(packing, "PASS_TOKENS", 40)
    monkeypatch.setattr(packing, "LEAST_TOKENS", 20)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made(folder: Path, kind: str, dtype: torch.dtype = torch.float32, kernels: str = "auto", **train: Any) -> Loop:
    """A loop of one kind whose budget allows several passes."""
    folder.mkdir(exist_ok=True)
    if kind == "reward":
        from transformers import LlamaForSequenceClassification

        torch.manual_seed(0)
        config = family_configs()["llama"]()
        config.num_labels = 1
        model: Any = LlamaForSequenceClassification(config)
    else:
        model = tiny_model("smollm-tied", dtype=torch.float32)
    if kind in ("lora", "dropout"):
        dropout = 0.3 if kind == "dropout" else 0.0
        model = add_lora(model, LoraConfig(r=4, target_modules="all-linear", dropout=dropout), 0)
    optimizer = MasterAdamW(model.named_parameters(), dtype=dtype)
    cast_parameters(model, dtype)
    if dtype == torch.float64:
        optimizer = MasterAdamW(model.named_parameters(), dtype=dtype)
    scorer = Scorer(model, "shared", kernels)
    algorithm: Any
    if kind == "reward":
        algorithm = RewardTraining(CausalRewards(scorer), RewardModelConfig(name="reward_model"))
    else:
        name = {"lora": "dpo", "dropout": "dpo", "divergence": "pmpo"}.get(kind, kind)
        frozen = cast_parameters_of(tiny_model("smollm-tied", dtype=torch.float32, seed=1), dtype)
        reference = (
            adapter_off(scorer) if kind in ("lora", "dropout") else LiveReference(Scorer(frozen, "shared", kernels))
        )
        pairs = {t.row: t for t in some_pairs(14, seed=3)}
        algorithm = Offline(
            scorer, [Component(LOSSES[name], LOSSES[name].params())], reference, mismatched=pairs, tokens_per_step=200
        )
    settings = dict(epochs=1.0, batch_size=14, tokens_per_step=200, max_grad_norm=0.1) | train
    trees = [replace(t, labels=(True, False)) for t in some_pairs(14)]
    return small_loop(algorithm, optimizer, trees, settings, folder)


def cast_parameters_of(model: Any, dtype: torch.dtype) -> Any:
    cast_parameters(model, dtype)
    return model


def steps_of(loop: Loop, threads: int, steps: int = 2) -> tuple[list[Any], dict[str, torch.Tensor]]:
    torch.set_num_threads(threads)
    lines = [loop.take_step(0, loop.schedule)[0] for _ in range(steps)]
    return lines, {n: t.clone() for n, t in loop.optimizer.state_tensors().items()}


OTHERS = ["kto", "sft", "lora", "reward"]


@pytest.mark.parametrize(
    "kind,dtype",
    [
        *[(kind, torch.float32) for kind in ("dpo", "aot", "dropout")],
        *[pytest.param(kind, torch.float32, marks=pytest.mark.slow) for kind in OTHERS],
        pytest.param("dpo", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_the_bits_do_not_depend_on_the_threads(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    lines, state = steps_of(made(tmp_path, kind, dtype), 1)
    for threads in (2, 3) if kind == "dpo" and dtype == torch.float32 else (3,):
        loop = made(tmp_path, kind, dtype)
        assert loop.algorithm.side_by_side and len(loop._micro_batches(loop.trees)) >= 4
        other_lines, other = steps_of(loop, threads)
        assert other_lines == lines
        assert all(torch.equal(other[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("kind", ["dpo", "aot", "lora", "reward"])
def test_gradients_are_those_of_autograd(tmp_path: Path, kind: str) -> None:
    """In fp64, compared with the model's own layers, which do not run concurrently."""
    found = []
    for kernels, threads in (("off", 1), ("auto", 3)):
        loop = made(tmp_path, kind, torch.float64, kernels, max_grad_norm=None)
        with torch.no_grad():
            for name, p in loop.model.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.linspace(-0.1, 0.1, p.numel(), dtype=p.dtype).view_as(p))
        torch.set_num_threads(threads)
        params = dict(loop.optimizer.params)
        grads: dict[str, torch.Tensor] = {}
        loop.optimizer.step = lambda _, to=grads, of=params: to.update({n: p.grad for n, p in of.items()})  # type: ignore
        loop.take_step(0, loop.schedule)
        found.append(grads)
    plain, side = found
    assert plain.keys() == side.keys() and len(plain) > 8
    for name, grad in plain.items():  # transformers' norms compute in fp32
        assert torch.allclose(side[name], grad, atol=1e-4 * float(grad.abs().max()) + 1e-12), name


def test_a_cached_reference_and_held_out_rows_too(tmp_path: Path) -> None:
    from families import evaluate_heldout

    loop, found = made(tmp_path, "dpo"), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        sums = compute_logps(loop.algorithm.reference, loop.trees, tokens_per_step=200).sums  # type: ignore[attr-defined]
        found.append((sums.tolist(), evaluate_heldout(loop.algorithm, loop.trees, 200)))
    assert found[0] == found[1]


def test_the_adapter_as_it_was_at_the_start_is_the_reference_in_every_thread(tmp_path: Path) -> None:
    loop = made(tmp_path, "lora")
    adapter = {n: p for n, p in loop.model.named_parameters() if "lora_B" in n}
    for p in adapter.values():
        torch.nn.init.normal_(p, std=0.1)
    reference = adapter_as_it_is(loop.algorithm.scorer)  # type: ignore[attr-defined]
    before = compute_logps(reference, loop.trees, tokens_per_step=200).sums
    for p in adapter.values():
        torch.nn.init.normal_(p, std=0.1)
    torch.set_num_threads(3)
    assert torch.equal(compute_logps(reference, loop.trees, tokens_per_step=200).sums, before)
    loop.algorithm.reference = reference  # type: ignore[attr-defined]
    assert loop.algorithm.side_by_side


def test_a_run_goes_on_with_another_number_of_threads(tmp_path: Path) -> None:
    def stop(event: str) -> None:
        if event == "step" and killed.state.step == 3:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"batch_size": 7, "epochs": 2.0}
    torch.set_num_threads(1)
    whole = made(tmp_path / "whole", "dpo", **settings)
    whole.run()
    torch.set_num_threads(2)
    killed = made(tmp_path / "killed", "dpo", **settings)
    killed.on_progress = stop
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    torch.set_num_threads(3)
    resumed = made(tmp_path / "killed", "dpo", **settings)
    resumed.run()
    found = resumed.optimizer.state_tensors()
    assert all(torch.equal(found[name], t) for name, t in whole.optimizer.state_tensors().items())
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_pass_that_fails_ends_the_others(tmp_path: Path) -> None:
    loop = made(tmp_path, "dpo")
    score, seen = loop.algorithm.score, []

    def failing(batch: Any) -> Any:
        seen.append(batch)
        if len(seen) == 2:
            raise RuntimeError("of the second pass")
        return score(batch)

    loop.algorithm.score = failing  # type: ignore[method-assign]
    torch.set_num_threads(3)
    with pytest.raises(RuntimeError, match="of the second pass"):
        loop.take_step(0, loop.schedule)
    assert torch.get_num_threads() == 3


# ---- turns -----------------------------------------------------------------------------------------------------------


def test_what_is_added_is_added_in_order() -> None:
    """The first pass continues only when the others wait for their turn, so without turns it would add last."""
    turns, added, here = Turns(), [], threading.Barrier(3, timeout=30)

    def one(i: int) -> int:
        assert torch.get_num_threads() == 1
        here.wait()  # all three run concurrently
        if i == 0:
            while len(waiting) < 2:
                pass
        else:
            waiting.append(i)
        with turn("sum"):
            added.append(i)
        return i

    waiting: list[int] = []
    torch.set_num_threads(3)
    assert list(side_by_side(one, range(3), most=3, turns=turns)) == [0, 1, 2]
    assert added == [0, 1, 2]


def test_nobody_waits_for_a_pass_that_ended_without_adding() -> None:
    turns, added = Turns(), []

    def one(i: int) -> None:
        if i % 2:
            with turn("sum"):
                added.append(i)

    torch.set_num_threads(2)
    list(side_by_side(one, range(6), most=2, turns=turns))
    assert added == [1, 3, 5]


def test_passes_of_different_strands_do_not_wait_for_each_other() -> None:
    turns, added, other = Turns(["a", "a", "b", "b"]), [], threading.Event()

    def one(i: int) -> None:
        if i == 0:
            assert other.wait(timeout=30)  # pass 2, of the other strand, adds first
        with turn(i // 2):
            added.append(i)
        if i == 2:
            other.set()

    torch.set_num_threads(3)
    list(side_by_side(one, range(4), most=3, turns=turns))
    assert added.index(0) < added.index(1) and added.index(2) < added.index(3)


def test_gradient_mode_is_the_callers() -> None:
    torch.set_num_threads(2)
    with torch.no_grad():
        assert list(side_by_side(lambda _: torch.is_grad_enabled(), range(4), most=2)) == [False] * 4
    assert list(side_by_side(lambda _: torch.is_grad_enabled(), range(4), most=2)) == [True] * 4


# ---- the plan of passes ----------------------------------------------------------------------------------------------


def test_passes_share_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [pass_tokens(b) for b in (16, 256, 1024, 2048, 4096, 16384)] == [16, 128, 512, 512, 512, 2048]
    sizes = [230, 180, 400, 120, 260, 310, 90, 220] * 2
    plan = plan_passes(sizes, 2048, True)
    assert sorted(i for members in plan for i in members) == list(range(16))
    loads = [sum(sizes[i] for i in members) for members in plan]
    assert max(loads) <= 512 and len(plan) % 4 == 0 and loads == sorted(loads, reverse=True)
    assert max_concurrent_passes(loads, 2048, 16) == 4 and max_concurrent_passes(loads, 2048, 2) == 2
    # LEAST_TOKENS would give three passes, which two threads cannot split evenly
    assert len(plan_passes([100] * 4, 4096, True)) == 2
    assert len(plan_passes([100] * 4, 4096, True, 2)) == 1 and len(plan_passes(sizes, 2048, True, 2)) == 8
    # a tree that fills the budget gets all threads
    assert max_concurrent_passes([2000], 2048, 16) == 1
    assert plan_passes([], 2048, True) == [] and plan_passes([3000, 10], 2048, True) == [[0], [1]]
