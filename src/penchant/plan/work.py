"""Count a run's rows, tokens, steps and passes, and estimate its disk use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from penchant.base.files import free_bytes
from penchant.data.mapped import part_lengths
from penchant.data.packing import pass_tokens, plan_microbatches, plan_passes, tree_sizes, tree_tokens
from penchant.plan.outline import OutlinedRun
from penchant.runs.parts import checkpoint_bytes
from penchant.training.steps import BatchSchedule
from penchant.types import TokenTree

# ---- Rows, tokens, steps, passes, evaluations and checkpoints, counted with the run's own rows, schedule and packer ----

QUANTILES = (0.5, 0.9, 0.99, 1.0)
EXACT_STEPS = 2000  # steps whose passes are counted one by one; a longer run is extrapolated from them


@dataclass(frozen=True, slots=True)
class Rows:
    """Row and token counts of one part of the data.

    Args:
        read, accepted, aside: rows of its file(s); used: token trees in this part; layout, kind: as detected.
        prompts, completions: quantiles of tokens (50%, 90%, 99%, longest); cut: share of trees that lost tokens to max_length.
    """

    read: int
    accepted: int
    aside: int
    used: int
    layout: str
    kind: str
    prompts: tuple[int, ...]
    completions: tuple[int, ...]
    cut: float


@dataclass(frozen=True, slots=True)
class Work:
    """Steps, passes and tokens of a whole run.

    Args:
        steps, steps_per_epoch, warmup: optimizer steps; passes: micro-batches of all steps; largest: tokens of the largest micro-batch.
        sizes: number of distinct micro-batch sizes in tokens.
        tokens: tokens computed over the run; separate: the same with every prompt repeated; trained: completion tokens.
        evaluations, checkpoints: how many of each.
        batch: micro-batches of the step with the largest micro-batch, largest first.
        exact: whether every step was counted and no rollouts were assumed.
    """

    steps: int
    steps_per_epoch: int
    warmup: int
    passes: int
    tokens: int
    separate: int
    trained: int
    largest: int
    sizes: int
    evaluations: int
    checkpoints: int
    batch: tuple[tuple[TokenTree, ...], ...]
    exact: bool

    @property
    def saving(self) -> float:
        """Share of tokens saved by sharing prompts."""
        return 1.0 - self.tokens / self.separate if self.separate else 0.0


def rows_of(run: OutlinedRun) -> dict[str, Rows]:
    """`Rows` of the parts ``train`` and, if there is one, ``held out``."""
    parts = {}
    names = ("train", "held out")
    for name, tokenized, trees in zip(names, run.rows.tokenized, run.rows.trees, strict=True):
        if tokenized is None:
            continue
        source = run.rows.loaded["heldout" if name == "held out" and "heldout" in run.rows.loaded else "train"]
        cut = {*tokenized.cut_prompts, *tokenized.cut_completions}
        prompts, completions = _token_quantiles(trees)
        parts[name] = Rows(
            source.total,
            source.accepted,
            len(source.quarantined) + len(tokenized.quarantined),
            len(trees),
            source.shape,
            source.kind,
            prompts,
            completions,
            len(cut) / max(1, len(tokenized.trees)),
        )
    return parts


def _token_quantiles(trees: Sequence[TokenTree]) -> list[tuple[int, ...]]:
    """Quantiles of prompt lengths and of completion lengths, in tokens."""
    counts, lengths = part_lengths(trees)
    is_prompt = np.zeros(len(lengths), bool)
    is_prompt[np.cumsum(counts) - counts] = True
    return [
        tuple(map(int, np.quantile(values, QUANTILES, method="inverted_cdf"))) if len(values) else ()
        for values in (lengths[is_prompt], lengths[~is_prompt])
    ]


def work_of(run: OutlinedRun, exact_steps: int = EXACT_STEPS) -> Work:
    """Count the run's work step by step. Rollouts of an online method count with their maximum length."""
    trees = with_rollouts(run, run.rows.trees[0])
    schedule, train, rollouts = run.schedule, run.config.train, run.method.rollouts
    total = schedule.total_steps
    counted = min(total, exact_steps)
    shared = run.shared_prompts
    passes = tokens = separate = trained = 0
    largest: tuple[int, list[list[TokenTree]]] = (0, [])
    seen_sizes: set[int] = set()
    for step in range(counted):
        batch = [trees[i] for i in schedule.batch(step)]
        if rollouts is not None:  # an update takes one minibatch of the rollouts
            batch = batch[: -(-len(batch) // rollouts.minibatches)]
        sizes = [tree_tokens(t, shared) for t in batch]
        plan = plan_passes(sizes, train.tokens_per_step, run.side_by_side, 1 + run.method.copies)
        passes += len(plan)
        tokens += sum(sizes)
        separate += sum(t.separate_tokens for t in batch)
        trained += sum(n for t in batch for n in t.trained)
        pass_sizes = [sum(sizes[i] for i in members) for members in plan]
        seen_sizes.update(pass_sizes)
        longest = max(pass_sizes)
        if longest > largest[0]:
            passes_by_size = sorted(
                ([batch[i] for i in m] for m in plan), key=lambda b: -sum(tree_tokens(t, shared) for t in b)
            )
            largest = (longest, passes_by_size)
    scale = total / counted
    return Work(
        steps=total,
        steps_per_epoch=schedule.steps_per_epoch,
        warmup=round(train.warmup_fraction * total),
        passes=round(passes * scale),
        tokens=round(tokens * scale),
        separate=round(separate * scale),
        trained=round(trained * scale),
        largest=largest[0],
        sizes=len(seen_sizes),
        evaluations=_evaluations(run),
        checkpoints=_occurrences(run.config.checkpoint.every, schedule),
        batch=tuple(tuple(b) for b in largest[1]),
        exact=counted == total and rollouts is None,
    )


def with_rollouts(run: OutlinedRun, trees: Sequence[TokenTree]) -> Sequence[TokenTree]:
    """The trees that a step trains on. For an online method, each prompt gets completions of the maximum length."""
    rollouts = run.method.rollouts
    if rollouts is None:
        return trees
    ids, k = np.zeros(rollouts.max_new_tokens, np.int32), rollouts.trained
    return [replace(t, completion_ids=(ids,) * k, truncated=(True,) * k) for t in trees]


def _occurrences(every: int | str | None, schedule: BatchSchedule) -> int:
    """How often something happens in a run, including once at the end."""
    total = schedule.total_steps
    if every is None:
        return 1
    due = schedule.steps_per_epoch if every == "epoch" else int(every)
    return total // due + (total % due > 0)


def _evaluations(run: OutlinedRun) -> int:
    if not run.rows.trees[1]:
        return 0
    evaluation = run.config.evaluation
    return _occurrences(evaluation.every, run.schedule) + evaluation.at_start


def passes_over(run: OutlinedRun, trees: Sequence[TokenTree]) -> list[list[int]]:
    """Micro-batches (indices into `trees`) of passes without gradients, as used by evaluations and a cached reference."""
    budget = run.config.evaluation.tokens_per_step or run.config.train.tokens_per_step
    sizes = tree_sizes(trees, run.shared_prompts)
    return plan_microbatches(sizes, pass_tokens(budget) if run.side_by_side else budget)


def to_json(work: Work) -> dict[str, Any]:
    names = [f for f in Work.__dataclass_fields__ if f != "batch"]
    return {name: getattr(work, name) for name in names} | {"saving": work.saving}


# ---- Disk use: checkpoints, the reference cache and logs, compared with the free space ----

LINE_BYTES = 900  # of metrics.jsonl and perf.jsonl, per step; an evaluation's line is longer and rarer
REPORT_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Disk:
    """Estimated disk use of a run, in bytes.

    Args:
        checkpoint: size of one; kept: how many are kept.
        cache: of the reference, 0 if it already exists; logs: metrics, report, samples; free: on the disk of the run's folder.
    """

    checkpoint: int
    kept: int
    cache: int
    logs: int
    free: int

    @property
    def lasting(self) -> int:
        return self.checkpoint * self.kept + self.logs

    @property
    def peak(self) -> int:
        """Includes one more checkpoint: the oldest is deleted only after the new one is written."""
        return self.lasting + self.checkpoint

    @property
    def fits(self) -> bool:
        return self.peak + self.cache <= self.free


def disk_of(run: OutlinedRun, work: Work, cached: bool | None) -> Disk:
    """Estimate the disk use. `cached` tells whether the reference cache already exists; None if none is used."""
    options = run.config.checkpoint
    kept = min(work.checkpoints, options.keep_last + (1 if options.keep_best and work.evaluations else 0))
    completions = sum(len(t.completion_ids) for part in run.rows.trees for t in part)
    tokens = sum(n for part in run.rows.trees for t in part for n in t.trained)
    cache = 0
    if cached is False:
        cache = 4 * (completions + (tokens if "shared_logps" in run.method.needs else 0))
        cache += 4 * len(run.rows.mismatched)
    logs = LINE_BYTES * (work.steps + 4 * work.evaluations) + REPORT_BYTES
    size = checkpoint_bytes(run.config, run.model, run.dtype)
    return Disk(size, kept, cache, logs, free_bytes(run.folder) or 0)
