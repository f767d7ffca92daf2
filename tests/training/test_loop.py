"""The training loop: accumulation by global counts, exact resume, step-0 check, NaN, signals, fp32 masters."""

from __future__ import annotations

import io
import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import evaluate_heldout, some_pairs, tiny_model
from steps import small_loop

from penchant.algorithms.offline import Component, Offline
from penchant.base.machine import peak_memory
from penchant.data.packing import pack
from penchant.errors import TrainingStopped
from penchant.logprobs import Scorer
from penchant.logprobs.reference import LiveReference
from penchant.losses import LOSSES
from penchant.models.load import cast_parameters
from penchant.training.console import PlainConsole, QuietConsole, figures
from penchant.training.loop import Interrupted, Loop
from penchant.training.optim import MasterAdamW, learning_rate
from penchant.training.options import CheckpointConfig, EvalConfig, LoggingConfig
from penchant.types import FURTHER


class Killed(BaseException):
    """Simulates kill -9: an exception that the loop's cleanup does not handle."""


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
    return small_loop(
        algorithm,
        optimizer,
        pairs[:10],
        settings,
        folder,
        evaluation=EvalConfig(every=2),
        checkpoint=CheckpointConfig(every=2, keep_last=2),
        console=console or QuietConsole(),
        evaluate=lambda _step: evaluate_heldout(algorithm, pairs[10:], 64),
        start_tolerance=(0.0, 0.0) if name == "dpo" else None,
    )


def final_state(loop: Loop) -> dict[str, torch.Tensor]:
    weights = {f"model/{n}": p.detach().clone() for n, p in loop.model.named_parameters()}
    return weights | {k: v.clone() for k, v in loop.optimizer.state_tensors().items()}


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[torch.dtype], tuple[dict[str, torch.Tensor], bytes]]:
    """Final state and metrics of an uninterrupted loop, run once per dtype."""

    @cache
    def run(dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], bytes]:
        folder = tmp_path_factory.mktemp("whole") / "run"
        loop = make_loop(folder, dtype=dtype)
        loop.run()
        return final_state(loop), (folder / "metrics.jsonl").read_bytes()

    return run


@pytest.mark.parametrize(
    "dtype,killed_at",  # before, at and between the checkpoints of steps 2 and 4; with bf16 weights they also hold masters
    [*((torch.float32, step) for step in (1, 2, 3, 4, 5)), (torch.bfloat16, 3), (torch.bfloat16, 5)],
)
def test_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path,
    uninterrupted: Callable[[torch.dtype], tuple[dict[str, torch.Tensor], bytes]],
    dtype: torch.dtype,
    killed_at: int,
) -> None:
    with pytest.raises(Killed):
        make_loop(tmp_path / "killed", dtype=dtype, console=KillAt(killed_at)).run()
    resumed = make_loop(tmp_path / "killed", dtype=dtype)
    resumed.run()
    (a, metrics), b = uninterrupted(dtype), final_state(resumed)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert metrics == (tmp_path / "killed/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["dpo", "sft", "aot", "aot_unpaired"])
def test_1x10_equals_10x1(tmp_path: Path, name: str) -> None:
    """Gradient accumulation scales by global counts for any micro-batches. Compares the gradient before AdamW."""
    grads: list[torch.Tensor] = []
    for budget in (10_000, 16):
        loop = make_loop(
            tmp_path / f"{budget}",
            dtype=torch.float64,
            name=name,
            reference_seed=1,  # if they were equal, a loss that sorts its batch would give the same gradient for every order
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
    values = [evaluate_heldout(loop.algorithm, some_pairs(13), budget) for budget in (16, 50, 10_000)]
    for other in values[1:]:
        assert other["eval/logps/chosen"] == pytest.approx(values[0]["eval/logps/chosen"], rel=1e-6)
        assert other["eval/rows"] == 13


@pytest.mark.parametrize("name", ["dpo", "sft", "aot"])
def test_no_figure_is_a_mean_of_batches(tmp_path: Path, name: str) -> None:
    """Held-out and training metrics do not depend on how rows are split into passes."""
    held_out, steps = [], []
    for budget in (16, 50, 10_000):
        loop = make_loop(
            tmp_path / f"{budget}",
            dtype=torch.float64,
            name=name,
            reference_seed=1,
            batch_size=10,
            tokens_per_step=budget,
        )
        loop.start_tolerance = None
        held_out.append(evaluate_heldout(loop.algorithm, some_pairs(13), budget))
        steps.append(loop.take_step(0, loop.schedule)[0])
    for first, *others in (held_out, steps):
        figures = {k: v for k, v in first.items() if isinstance(v, float)}
        assert len(figures) > 5
        for other in others:
            assert {k: other[k] for k in figures} == pytest.approx(figures, rel=1e-9)


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


def test_a_row_that_was_written_twice_is_listed_as_the_datas(tmp_path: Path) -> None:
    loop = make_loop(tmp_path / "run")
    tree = loop.trees[1]
    batch = pack([tree, replace(tree, row=tree.row + FURTHER)])
    with pytest.raises(TrainingStopped):
        loop._dump_and_stop(0, "the loss is NaN or infinite", [batch])
    dumped = json.loads((tmp_path / "run/stopped-batch-step-0.json").read_text())
    assert dumped["rows"] == [{"row": tree.row, "source": tree.source}] * 2


def test_a_signal_writes_a_checkpoint_and_the_same_command_continues(
    tmp_path: Path, uninterrupted: Callable[[torch.dtype], tuple[dict[str, torch.Tensor], bytes]]
) -> None:
    class SignalAt(QuietConsole):
        def step(self, step: int, total: int, metrics: Any) -> None:
            if step == 3:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM at step 3"):
        make_loop(tmp_path / "stopped", console=SignalAt()).run()
    assert (tmp_path / "stopped/checkpoints/step-3/manifest.json").exists()
    resumed = make_loop(tmp_path / "stopped")
    resumed.run()
    found = final_state(resumed)
    assert all(torch.equal(v, found[k]) for k, v in uninterrupted(torch.float32)[0].items())
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
    for scale in (1.0, *[2.0**-9] * 4):  # each small gradient vanishes when added to 1 in bf16
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


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_adamw_by_hand(decay: float) -> None:
    """Two steps of arXiv 1711.05101 with no option at its default. Matrices decay, vectors do not."""
    gradients, lr, (b1, b2), eps = ([3.0, -0.5], [-1.0, 2.0]), 0.1, (0.8, 0.9), 0.05
    matrix, vector = torch.nn.Parameter(torch.tensor([[1.0, -2.0]])), torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = MasterAdamW(
        [("m", matrix), ("v", vector)], dtype=torch.float32, betas=(b1, b2), eps=eps, weight_decay=decay
    )
    for g in gradients:
        matrix.grad, vector.grad = torch.tensor([g]), torch.tensor(g)
        optimizer.step(lr)
    for p, of in ((matrix, decay), (vector, 0.0)):
        for i, x in enumerate((1.0, -2.0)):
            mean = square = 0.0
            for t, g in enumerate((gradients[0][i], gradients[1][i]), 1):
                mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g**2
                x = x * (1 - lr * of) - lr * (mean / (1 - b1**t)) / ((square / (1 - b2**t)) ** 0.5 + eps)
            assert p.flatten()[i].item() == pytest.approx(x, rel=1e-5)


def test_bf16_gradients_are_of_one_step_only() -> None:
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = MasterAdamW([("p", p)], dtype=torch.bfloat16)
    for _ in range(2):
        (3.0 * p).sum().backward()
        assert p.main_grad.item() == 3.0  # type: ignore[attr-defined]
        optimizer.step(1e-3)


def test_rates_and_clipping_reach_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps, half of them warm-up: 1/4, 2/4, 3/4 of the peak, then the peak; gradients of norm max_grad_norm."""
    loop = make_loop(tmp_path / "run", warmup_fraction=0.5, schedule="constant", max_grad_norm=0.125)
    rates, norms = [], []
    step = loop.optimizer.step

    def spied(lr: float) -> None:
        rates.append(lr)
        norms.append(float(torch.cat([p.grad.flatten() for p in loop.model.parameters() if p.grad is not None]).norm()))
        step(lr)

    monkeypatch.setattr(loop.optimizer, "step", spied)
    loop.run()
    assert rates == pytest.approx([1e-2 * share for share in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    said = [line["grad_norm"] for line in lines if line["kind"] == "train"]
    assert max(said) > 0.125
    assert norms == pytest.approx([min(0.125, n) for n in said], rel=1e-5)


def _draws(folder: Path, monkeypatch: pytest.MonkeyPatch, before: int = 0, **train: Any) -> list[tuple[float, float]]:
    """A random number drawn in each of six steps, like dropout's, and each step's progress. `before` draws others first."""
    begin, seen = Offline.begin_step, []

    def spied(self: Offline, step: int, progress: float, trees: Any) -> Any:
        if self.scorer.model.training:  # not during an evaluation
            seen.append((float(torch.rand(())), progress))
        return begin(self, step, progress, trees)

    with monkeypatch.context() as patch:
        patch.setattr(Offline, "begin_step", spied)
        loop = make_loop(folder, **train)
        torch.manual_seed(before)
        for step in range(6):
            loop.take_step(step, loop.schedule)
    return seen


def test_every_step_draws_its_own_dropout_and_trains_in_training_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's random draws depend only on the step; progress goes from 0 to 1."""
    one = _draws(tmp_path / "one", monkeypatch)
    assert _draws(tmp_path / "two", monkeypatch, before=99) == one
    assert len({value for value, _ in one}) == 6
    assert [progress for _, progress in one] == pytest.approx([i / 5 for i in range(6)])


def test_another_seed_draws_other_dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (_draws(tmp_path / str(seed), monkeypatch, seed=seed) for seed in (0, 1))
    assert not {value for value, _ in one} & {value for value, _ in other}


def test_a_coupled_loss_draws_the_same_dropout_in_both_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make_loop(tmp_path / "run", name="aot", batch_size=10, tokens_per_step=16)
    score, draws = Offline.score, []
    monkeypatch.setattr(
        Offline, "score", lambda self, batch: (draws.append(float(torch.rand(()))), score(self, batch))[1]
    )
    loop.take_step(0, loop.schedule)
    half = len(draws) // 2
    assert half > 4 and draws[:half] == draws[half:] and len(set(draws)) == half


def test_lines_are_written_at_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    loop = make_loop(tmp_path / "run")
    loop.logging = LoggingConfig(every=4)
    loop.run()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [4, 6]


def test_speeds_times_seconds_are_what_was_done(tmp_path: Path) -> None:
    loop = make_loop(tmp_path / "run")
    loop.run()
    perf = [json.loads(line) for line in (tmp_path / "run/perf.jsonl").read_text().splitlines()]
    assert sum(p["tokens_per_second"] * p["seconds"] for p in perf) == pytest.approx(loop.state.tokens)
    assert sum(p["trees_per_second"] * p["seconds"] for p in perf) == pytest.approx(20)  # two epochs of ten rows


@pytest.mark.parametrize(("mode", "every", "best"), [("min", 2, 4), ("max", 2, 2), ("min", 3, 6)])
@pytest.mark.parametrize("killed_at", [None, 5])
def test_the_best_step_is_that_of_the_best_value(
    tmp_path: Path, mode: Any, every: int, best: int, killed_at: int | None
) -> None:
    """Steps without a checkpoint, such as the start, are not candidates; a resumed run remembers the earlier best."""
    values = {0: -9.0 if mode == "min" else 9.0, 2: 3.0, 4: 1.0, 6: 2.0}

    def loop_with(console: Any) -> Loop:
        loop = make_loop(tmp_path / "run", console=console)
        loop.checkpoint = CheckpointConfig(every=every, keep_last=1, mode=mode)
        loop.evaluate = lambda step: {"eval/loss": values[step]}
        return loop

    if killed_at is not None:
        with pytest.raises(Killed):
            loop_with(KillAt(killed_at)).run()
    loop = loop_with(QuietConsole())
    loop.run()
    assert (loop.state.best_step, loop.state.best_value) == (best, values[best])
    assert {p.name for p in (tmp_path / "run/checkpoints").glob("step-*")} == {f"step-{best}", "step-6"}


def test_a_held_out_figure_that_is_nan_is_not_the_best(tmp_path: Path) -> None:
    loop = make_loop(tmp_path / "run")
    loop.evaluate = lambda step: {"eval/loss": math.nan if step == 2 else float(step)}
    loop.run()
    assert (loop.state.best_step, loop.state.best_value) == (4, 4.0)


def test_a_refused_step_changes_nothing_and_leaves_no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make_loop(tmp_path / "run")
    monkeypatch.setattr(Offline, "accepts", lambda self, means: False)
    before = final_state(loop)
    line, _, _ = loop.take_step(0, loop.schedule)
    assert "skipped" in line and all(torch.equal(v, final_state(loop)[k]) for k, v in before.items())
    assert all(p.grad is None for p in loop.model.parameters())


def test_floor_and_ceiling_stop_beyond_them_only(tmp_path: Path) -> None:
    loop = make_loop(tmp_path / "run", logp_floor=-5.0, divergence_ceiling=2.0)
    for means in ({}, {"logps/per_token": -4.9, "divergence": 1.9, "loss/divergence": 9.0, "js_divergence": 9.0}):
        loop._check_limits(3, means, [])
    for means, said in (
        ({"logps/per_token": -5.1}, "below train.logp_floor=-5"),
        ({"divergence": 2.1}, "above train.div"),
        ({"pmpo/divergence": 2.1, "loss/pmpo/divergence": 1.0}, "above train.div"),  # not the first loss of a mix
    ):
        with pytest.raises(TrainingStopped, match=said):
            loop._check_limits(3, means, [])


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    """It trains nothing, so it reports no resume, but says how to continue."""
    make_loop(tmp_path).run()
    again, said = make_loop(tmp_path), io.StringIO()
    again.console = PlainConsole(said)
    again.run()
    assert "already finished" in said.getvalue() and f"model.path={tmp_path}" in said.getvalue()
    assert "resumed" not in said.getvalue()


def test_an_accuracy_of_a_row_or_two_is_not_shown() -> None:
    line = {"loss": 0.7, "rewards/accuracies": 0.0}
    assert "acc" in figures({**line, "rows": 4}) and "acc" in figures(line)
    assert figures({**line, "rows": 1}) == "loss 0.7000"
