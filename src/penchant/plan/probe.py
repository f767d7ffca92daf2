"""How long a run will take: a few of its own steps, on its own rows, in a copy that is thrown away.

The copy is a run like any other, with its first batches as its data and a temporary folder as its output and cache; the folder and
the cache of the real run are not touched.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from penchant.base.machine import peak_memory
from penchant.config import RunConfig
from penchant.data.packing import tree_tokens
from penchant.logprobs.reference import CachedReference, LiveReference, adapter_off, compute_logps
from penchant.plan.outline import OutlinedRun
from penchant.plan.work import Work
from penchant.runs import Run
from penchant.training.loop import Loop
from penchant.types import TokenTree

HELD_OUT_ROWS = 12  # of a probed evaluation
WRITE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Probe:
    """Seconds, as measured.

    Args:
        steps: of each step after the first, which warms up; tokens: of each of them; reference, evaluation: of their whole passes,
            scaled from a few rows; checkpoint: of writing one; load: until the model stood; peak: bytes of this process at most.
        packing: what the real model takes; fast: whether a fast path runs.
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
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Duration:
    """Seconds of the whole run: the least, the likely, the most."""

    low: float
    likely: float
    high: float
    parts: dict[str, float]


class _Throwaway(Run):
    """A run on a few rows of another one's, whose reference log-probs come from no cache."""

    rows: tuple[list[TokenTree], list[TokenTree]]
    spent_on_reference = 0.0
    tokens_of_reference = 0

    def _cached_reference(self) -> CachedReference:
        """Computed anew for these rows, and timed: the real run's cache is neither read nor written."""
        live = LiveReference(self.scorer) if self.config.lora is None else adapter_off(self.scorer)
        if self.config.reference.path is not None:
            live = LiveReference(self._frozen_scorer())
        trees = [*self.trees[0], *self.trees[1], *self.mismatched.values()]
        started = time.perf_counter()
        found = compute_logps(live, trees, tokens_per_step=self.config.train.tokens_per_step)
        self.spent_on_reference = time.perf_counter() - started
        self.tokens_of_reference = sum(tree_tokens(t, self.scorer.shared) for t in trees)
        sums = found.sums.split([len(t.completion_ids) for t in trees])
        tokens = found.tokens.split([sum(map(len, t.completion_ids)) for t in trees])
        by_row = {t.row: s for t, s in zip(trees, sums, strict=True)}
        return CachedReference(by_row, {t.row: s for t, s in zip(trees, tokens, strict=True)})


def probe(run: OutlinedRun, work: Work, checkpoint_bytes: int, cached: bool | None, *, steps: int = 3) -> Probe:
    """Take `steps` optimizer steps of the run (the first one warms up), and a small evaluation, and time them.

    Raises:
        ConfigError, DataError, ModelError, RewardError: what the run itself would raise.
    """
    with tempfile.TemporaryDirectory(prefix="penchant-plan-") as folder:
        copy = _copy_of(run, Path(folder) / "run", steps)
        started = time.perf_counter()
        loop = copy.make_loop()
        load = time.perf_counter() - started - copy.spent_on_reference
        seconds, tokens = _timed_steps(loop)
        evaluation = _timed_evaluation(copy, run, loop)
        writing = _write_speed(Path(folder))
    reference = 0.0
    if cached is False and copy.tokens_of_reference:
        everything = [*run.trees[0], *run.trees[1], *run.mismatched.values()]
        whole = sum(tree_tokens(t, copy.engine.shared) for t in everything)
        reference = copy.spent_on_reference / copy.tokens_of_reference * whole
    return Probe(
        tuple(seconds[1:] or seconds),
        tuple(tokens[1:] or tokens),
        reference,
        evaluation,
        checkpoint_bytes * writing,
        load,
        peak_memory(),
        copy.engine.packing,
        copy.engine.fast,
    )


def _copy_of(run: OutlinedRun, folder: Path, steps: int) -> _Throwaway:
    """The first batches of the run's own schedule in their order, so that its steps are the run's steps."""
    schedule = run.schedule
    rounds = -(-steps // run.online.updates) if run.online is not None else steps
    repeat = run.online.updates if run.online is not None else 1
    picked = [i for n in range(rounds) for i in schedule.batch(n * repeat) if n * repeat < schedule.total_steps]
    trees = [run.trees[0][i] for i in picked]
    heldout = run.trees[1][:HELD_OUT_ROWS]
    train = run.config.train.model_copy(
        update={"shuffle": False, "epochs": 1.0, "max_steps": min(steps, run.total_steps)}
    )
    config: RunConfig = run.config.model_copy(update={"train": train, "output": str(folder)})
    folder.mkdir(parents=True)
    copy = _Throwaway(config, quiet=True)
    # what is known of the data is taken over; the trees are the copy's own few
    for name in ("tokenizer", "loaded", "datasets", "tokenized"):
        copy.__dict__[name] = getattr(run, name)
    copy.__dict__["trees"] = (trees, heldout)
    if run.mismatched:
        rows = {t.row for t in (*trees, *heldout)}
        copy.__dict__["mismatched"] = {row: t for row, t in run.mismatched.items() if row in rows}
    return copy


def _timed_steps(loop: Loop) -> tuple[list[float], list[int]]:
    seconds, tokens = [], []
    schedule = loop.schedule
    for step in range(schedule.total_steps):
        started = time.perf_counter()
        _, counted, _ = loop.take_step(step, schedule)
        seconds.append(time.perf_counter() - started)
        tokens.append(counted)
    return seconds, tokens


def _timed_evaluation(copy: _Throwaway, run: OutlinedRun, loop: Loop) -> float:
    """Seconds of a whole evaluation: scoring grows with the held-out rows, answers to `kl_prompts` prompts do not."""
    if loop.evaluate is None:
        return 0.0
    loop.model.eval()
    started = time.perf_counter()
    loop.evaluate(1)
    measured = time.perf_counter() - started
    few, whole = (sum(tree_tokens(t, True) for t in part) for part in (copy.trees[1], run.trees[1]))
    prompts = run.config.evaluation.kl_prompts
    written = min(prompts, len(copy.trees[1])) if copy.writes_fresh or copy.online is not None else 0
    asked = min(prompts, len(run.trees[1])) if copy.online is None else len(run.trees[1])
    growth = max(whole / max(1, few), asked / written if written else 0.0)
    return measured * growth


def _write_speed(folder: Path) -> float:
    """Seconds a byte of a checkpoint: written, forced to the disk, and summed."""
    block = os.urandom(1 << 20) * (WRITE_BYTES >> 20)
    path = folder / "speed"
    started = time.perf_counter()
    with path.open("wb") as file:
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
    hashlib.sha256(block).hexdigest()
    return (time.perf_counter() - started) / WRITE_BYTES


def duration_of(found: Probe, work: Work) -> Duration:
    """From seconds a token of the probed steps: the slowest, their mean, the fastest."""
    rates = [s / max(1, t) for s, t in zip(found.steps, found.tokens, strict=True)]
    mean = sum(found.steps) / max(1, sum(found.tokens))
    once = {
        "loading": found.load,
        "reference": found.reference,
        "evaluations": found.evaluation * work.evaluations,
        "checkpoints": found.checkpoint * work.checkpoints,
    }
    low, likely, high = (rate * work.tokens for rate in (min(rates), mean, max(rates)))
    rest = sum(once.values())
    return Duration(low + rest, likely + rest, high + rest, {"steps": likely, **once})
