"""Estimate how long a run takes by timing a few of its steps in a temporary copy.

The copy is an ordinary run on the real run's first batches, with a temporary folder as its output and no cache, so the real run's folder
and cache stay untouched.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from penchant.base.machine import peak_memory
from penchant.config import RunConfig
from penchant.data.packing import tree_tokens
from penchant.plan.outline import OutlinedRun
from penchant.plan.work import Work
from penchant.runs import Run
from penchant.runs.evaluating import writes_completions
from penchant.training.loop import Loop

HELD_OUT_ROWS = 12  # rows of the probe's evaluation
WRITE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Probe:
    """Measurements of a probe, in seconds unless stated.

    Args:
        steps: time of each step after the first, which warms up; tokens: tokens of each of them; reference, evaluation: time of a whole
            pass, scaled from a few rows; checkpoint: time of writing one; load: time to load the model; peak: peak bytes of this process.
        packing: packing that the real model uses; fast: whether a fast path runs.
    """

    steps: tuple[float, ...]
    tokens: tuple[int, ...]
    reference: float
    evaluation: float
    checkpoint: float
    load: float
    peak: int
    packing: str
    fast: bool


@dataclass(frozen=True, slots=True)
class Duration:
    """Estimated seconds of the whole run: lower bound, likely value, upper bound, and the likely value by part."""

    low: float
    likely: float
    high: float
    parts: dict[str, float]


def probe(run: OutlinedRun, checkpoint_bytes: int, cached: bool | None, *, steps: int = 3) -> Probe:
    """Time `steps` optimizer steps of the run, of which the first warms up, and a small evaluation.

    Raises:
        ConfigError, DataError, ModelError, RewardError: the run itself would fail with this.
    """
    with tempfile.TemporaryDirectory(prefix="penchant-plan-") as folder:
        copy = _short_copy(run, Path(folder) / "run", steps)
        started = time.perf_counter()
        loop = copy.make_loop()
        load = time.perf_counter() - started - copy.built.reference_seconds
        seconds, tokens = _timed_steps(loop)
        evaluation = _timed_evaluation(copy, run, loop)
        seconds_per_byte = _write_speed(Path(folder))
    reference = 0.0
    engine, built = copy.built.parts.engine, copy.built
    if cached is False and built.reference_tokens:
        all_trees = [*run.rows.trees[0], *run.rows.trees[1], *run.rows.mismatched.values()]
        total_tokens = sum(tree_tokens(t, engine.shared) for t in all_trees)
        reference = built.reference_seconds / built.reference_tokens * total_tokens
    return Probe(
        tuple(seconds[1:] or seconds),
        tuple(tokens[1:] or tokens),
        reference,
        evaluation,
        checkpoint_bytes * seconds_per_byte,
        load,
        peak_memory(loop.device),
        engine.packing,
        engine.fast,
    )


def _short_copy(run: OutlinedRun, folder: Path, steps: int) -> Run:
    """A run in `folder` on the first batches of the real run's schedule, in order, so that it takes the same steps."""
    schedule, repeat = run.schedule, run.method.updates
    indices = [
        i for n in range(-(-steps // repeat)) for i in schedule.batch(n * repeat) if n * repeat < schedule.total_steps
    ]
    train = run.config.train.model_copy(
        update={"shuffle": False, "epochs": 1.0, "max_steps": min(steps, schedule.total_steps)}
    )
    config: RunConfig = run.config.model_copy(update={"train": train, "output": str(folder)})
    folder.mkdir(parents=True)
    # reuse what is known about the data, with only the picked trees
    return Run(config, quiet=True, rows=run.rows.part(indices, HELD_OUT_ROWS, config), cache=False)


def _timed_steps(loop: Loop) -> tuple[list[float], list[int]]:
    seconds, tokens = [], []
    schedule = loop.schedule
    for step in range(schedule.total_steps):
        started = time.perf_counter()
        _, step_tokens, _ = loop.take_step(step, schedule)
        seconds.append(time.perf_counter() - started)
        tokens.append(step_tokens)
    return seconds, tokens


def _timed_evaluation(copy: Run, run: OutlinedRun, loop: Loop) -> float:
    """Seconds of a whole evaluation, scaled by the larger of two ratios: held-out tokens, and prompts to generate for."""
    if loop.evaluate is None:
        return 0.0
    loop.model.eval()
    started = time.perf_counter()
    loop.evaluate(1)
    measured = time.perf_counter() - started
    copy_tokens, run_tokens = (
        sum(tree_tokens(t, True) for t in part) for part in (copy.rows.trees[1], run.rows.trees[1])
    )
    prompts = run.config.evaluation.kl_prompts
    copy_rows, run_rows = len(copy.rows.trees[1]), len(run.rows.trees[1])
    rollouts = run.method.rollouts is not None
    copy_prompts = min(prompts, copy_rows) if rollouts or writes_completions(copy.config, copy.rows) else 0
    run_prompts = run_rows if rollouts else min(prompts, run_rows)
    growth = max(run_tokens / max(1, copy_tokens), run_prompts / copy_prompts if copy_prompts else 0.0)
    return measured * growth


def _write_speed(folder: Path) -> float:
    """Seconds per byte of a checkpoint: write, fsync and SHA-256."""
    block = os.urandom(1 << 20) * (WRITE_BYTES >> 20)
    path = folder / "speed"
    started = time.perf_counter()
    with path.open("wb") as file:
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
    hashlib.sha256(block).hexdigest()
    return (time.perf_counter() - started) / WRITE_BYTES


def duration_of(probe: Probe, work: Work) -> Duration:
    """Extrapolate from seconds per token of the probed steps: the lowest, their mean, and the highest."""
    rates = [s / max(1, t) for s, t in zip(probe.steps, probe.tokens, strict=True)]
    mean = sum(probe.steps) / max(1, sum(probe.tokens))
    fixed = {
        "loading": probe.load,
        "reference": probe.reference,
        "evaluations": probe.evaluation * work.evaluations,
        "checkpoints": probe.checkpoint * work.checkpoints,
    }
    low, likely, high = (rate * work.tokens for rate in (min(rates), mean, max(rates)))
    fixed_total = sum(fixed.values())
    return Duration(low + fixed_total, likely + fixed_total, high + fixed_total, {"steps": likely, **fixed})
