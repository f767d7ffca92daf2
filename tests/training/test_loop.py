"""The loop: accumulation by global counts, exact resume, step-0 check, NaN, signals, the optimizer's masters."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from families import some_pairs, tiny_model

from penchant.algorithms.offline import Component, Offline
from penchant.base.machine import peak_memory
from penchant.errors import TrainingStopped
from penchant.logprobs import Scorer
from penchant.logprobs.reference import LiveReference
from penchant.losses import LOSSES
from penchant.metrics.heldout import evaluate_heldout
from penchant.models.load import cast_parameters
from penchant.training.console import QuietConsole
from penchant.training.loop import Interrupted, Loop
from penchant.training.optim import MasterAdamW, learning_rate
from penchant.training.options import CheckpointConfig, EvalConfig, LoggingConfig, TrainConfig


class Killed(BaseException):
    """A kill -9: nothing of the loop's own clean-up knows about it."""


class KillAt(QuietConsole):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.at = step

    def step(self, step: int, total: int, metrics: Any) -> None:
        if step == self.at:
            raise Killed


def make_loop(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    name: str = "dpo",
    console: Any = None,
    reference_seed: int = 0,
    **train: Any,
) -> Loop:
    folder.mkdir(exist_ok=True)
    model = tiny_model("smollm-tied", dtype=torch.float32)
    frozen = tiny_model("smollm-tied", dtype=torch.float32, seed=reference_seed)
    optimizer = MasterAdamW(model.named_parameters(), dtype=dtype)
    for m in (model, frozen):
        cast_parameters(m, dtype)
    if dtype == torch.float64:
        optimizer = MasterAdamW(model.named_parameters(), dtype=dtype)
    scorer = Scorer(model, "shared")
    algorithm = Offline(
        scorer, [Component(LOSSES[name], LOSSES[name].params())], LiveReference(Scorer(frozen, "shared"))
    )
    pairs = some_pairs(14)
    settings = dict(epochs=2.0, batch_size=4, tokens_per_step=40, lr=1e-2) | train
    return Loop(
        model=model,
        algorithm=algorithm,
        optimizer=optimizer,
        trees=pairs[:10],
        shared=True,
        folder=folder,
        train=TrainConfig(**settings),
        peak_lr=1e-2,
        evaluation=EvalConfig(every=2),
        checkpoint=CheckpointConfig(every=2, keep_last=2),
        logging=LoggingConfig(),
        write_model=lambda f: model.save_pretrained(f),
        console=console or QuietConsole(),
        evaluate=lambda _step: evaluate_heldout(
            algorithm, pairs[10:], shared=True, tokens_per_step=64, device=torch.device("cpu")
        ),
        start_tolerance=(0.0, 0.0) if name == "dpo" else None,
    )


def final_state(loop: Loop) -> dict[str, torch.Tensor]:
    weights = {f"model/{n}": p.detach().clone() for n, p in loop.model.named_parameters()}
    return weights | {k: v.clone() for k, v in loop.optimizer.state_tensors().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("killed_at", [1, 2, 3, 4, 5])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, dtype: torch.dtype, killed_at: int) -> None:
    whole = make_loop(tmp_path / "whole", dtype=dtype)
    whole.run()
    with pytest.raises(Killed):
        make_loop(tmp_path / "killed", dtype=dtype, console=KillAt(killed_at)).run()
    resumed = make_loop(tmp_path / "killed", dtype=dtype)
    resumed.run()
    a, b = final_state(whole), final_state(resumed)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "killed/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["dpo", "sft", "aot", "aot_unpaired"])
def test_1x10_equals_10x1(tmp_path: Path, name: str) -> None:
    """Gradient accumulation scales by global counts, whatever the micro-batches are: the loop's own step, before AdamW."""
    grads: list[torch.Tensor] = []
    for budget in (10_000, 16):
        loop = make_loop(
            tmp_path / f"{budget}",
            dtype=torch.float64,
            name=name,
            reference_seed=1,  # at equality a loss that sorts its batch gives every order the same gradient
            batch_size=10,
            tokens_per_step=budget,
            max_grad_norm=None,
        )
        loop.start_tolerance = None
        assert (len(loop._micro_batches(loop.trees)) > 4) == (budget == 16)
        params = list(loop.model.parameters())
        loop.optimizer.step = lambda _lr, params=params: grads.append(torch.cat([p.grad.flatten() for p in params]))  # type: ignore[method-assign]
        loop.take_step(0, loop.schedule)
    one, many = grads
    assert (one - many).norm() <= 1e-6 * one.norm()


def test_evaluation_is_over_rows_not_over_batches(tmp_path: Path) -> None:
    loop = make_loop(tmp_path / "run")
    values = [
        evaluate_heldout(
            loop.algorithm, some_pairs(13), shared=True, tokens_per_step=budget, device=torch.device("cpu")
        )
        for budget in (16, 50, 10_000)
    ]
    for other in values[1:]:
        assert other["eval/logps/chosen"] == pytest.approx(values[0]["eval/logps/chosen"], rel=1e-6)
        assert other["eval/rows"] == 13


def test_learning_falls_and_every_row_is_seen(tmp_path: Path) -> None:
    loop = make_loop(tmp_path / "run", epochs=6.0)
    seen = [i for step in range(3) for i in loop.schedule.batch(step)]
    assert sorted(seen) == list(range(10))
    loop.run()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert train[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert train[-1]["loss"] < 0.5
    assert train[-1]["rewards/accuracies"] == 1.0
    assert len(train) == 18
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]


def test_peak_memory_is_in_gib_and_never_falls(tmp_path: Path) -> None:
    before = peak_memory()
    make_loop(tmp_path / "run", epochs=1.0).run()
    said = [json.loads(line)["peak_memory_gb"] for line in (tmp_path / "run/perf.jsonl").read_text().splitlines()]
    assert said == sorted(said)
    assert before / 1.01 <= said[0] * 2**30 and said[-1] * 2**30 <= peak_memory() * 1.01


def test_a_reference_that_is_not_the_start_stops_the_run(tmp_path: Path) -> None:
    loop = make_loop(tmp_path / "run")
    with torch.no_grad():
        next(loop.model.parameters()).add_(0.05)
    with pytest.raises(TrainingStopped, match="policy and reference should be equal"):
        loop.run()


def test_nan_takes_no_step_and_lists_the_rows(tmp_path: Path) -> None:
    loop = make_loop(tmp_path / "run")
    loop.start_tolerance = None
    before = final_state(loop)
    with torch.no_grad():
        loop.model.model.norm.weight[0] = float("nan")
    with pytest.raises(TrainingStopped, match="NaN"):
        loop.run()
    dumped = json.loads((tmp_path / "run/stopped-batch-step-0.json").read_text())
    assert [r["source"] for r in dumped["rows"]] and all(r["source"].startswith("made-up:") for r in dumped["rows"])
    after = final_state(loop)
    key = "model/model.layers.0.mlp.up_proj.weight"
    assert torch.equal(before[key], after[key])


def test_a_signal_writes_a_checkpoint_and_the_same_command_continues(tmp_path: Path) -> None:
    class SignalAt(QuietConsole):
        def step(self, step: int, total: int, metrics: Any) -> None:
            if step == 3:
                signal.raise_signal(signal.SIGTERM)

    whole = make_loop(tmp_path / "whole")
    whole.run()
    with pytest.raises(Interrupted, match="SIGTERM at step 3"):
        make_loop(tmp_path / "stopped", console=SignalAt()).run()
    assert (tmp_path / "stopped/checkpoints/step-3/manifest.json").exists()
    resumed = make_loop(tmp_path / "stopped")
    resumed.run()
    assert all(torch.equal(v, final_state(resumed)[k]) for k, v in final_state(whole).items())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_keeps_last_and_best(tmp_path: Path) -> None:
    loop = make_loop(tmp_path / "run", epochs=4.0)
    loop.run()
    kept = sorted(int(p.name[5:]) for p in (tmp_path / "run/checkpoints").glob("step-*"))
    assert set(kept) == {10, 12, loop.state.best_step}


def test_masters_keep_updates_that_bf16_would_lose() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = MasterAdamW([("p", p)], dtype=torch.bfloat16)
    for _ in range(64):  # each step is a quarter of bf16's spacing below 1
        p.main_grad.fill_(1.0)  # type: ignore[attr-defined]
        optimizer.step(1e-3)
    assert p.dtype == torch.bfloat16
    assert optimizer.masters["p"].tolist() == pytest.approx([1 - 64e-3] * 4, rel=1e-4)
    assert p.tolist() == pytest.approx([0.9375] * 4, abs=0.004)


def test_bf16_micro_batches_are_summed_in_fp32() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    MasterAdamW([("p", p)], dtype=torch.bfloat16)
    for scale in (1.0, *[2.0**-9] * 4):  # each small one vanishes when added to 1 in bf16
        (p * scale).sum().backward()
    assert p.grad is None
    assert p.main_grad.item() == 1.0 + 4 * 2.0**-9  # type: ignore[attr-defined]


@pytest.mark.parametrize("schedule,expected_end", [("constant", 1.0), ("linear", 0.1 + 0.9 / 90), ("cosine", 0.1)])
def test_learning_rate_shapes(schedule: str, expected_end: float) -> None:
    rates = [learning_rate(s, 100, 1.0, schedule, 0.1, 0.1) for s in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(expected_end, abs=1e-3)


def test_clip_returns_the_norm_before_and_scales() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = MasterAdamW([("p", p)], dtype=torch.float32)
    p.grad = torch.tensor([3.0, 4.0])
    assert optimizer.clip(1.0) == 5.0
    assert p.grad.tolist() == pytest.approx([0.6, 0.8])
