"""Which rows a step has, and sums over global counts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from penchant.base.machine import in_fp64
from penchant.distributed.world import World
from penchant.types import LossOutput

# ---- Which trees a step trains on: a pure function of seed and step, so that a resumed run needs no data cursor but the step ----


@lru_cache(maxsize=2)  # drawn once an epoch, not at every step: a million rows take 20 ms
def _order(rows: int, seed: int | None, epoch: int) -> np.ndarray:
    order = np.arange(rows) if seed is None else np.random.default_rng([seed, epoch]).permutation(rows)
    order.flags.writeable = False
    return order


Share = tuple[int, int, int]  # of a source: its first tree, how many it has, how many of them an epoch takes


@lru_cache(maxsize=2)
def _mixed_order(shares: tuple[Share, ...], seed: int | None, epoch: int) -> np.ndarray:
    """Each source goes on where the epoch before it ended, pass after pass through its rows, so that all of them come up equally often."""
    taken = []
    for i, (first, rows, count) in enumerate(shares):
        passes, at = np.divmod(np.arange(epoch * count, (epoch + 1) * count), rows)
        for number in np.unique(passes):
            order = np.arange(rows) if seed is None else np.random.default_rng([seed, i, number]).permutation(rows)
            taken.append(first + order[at[passes == number]])
    drawn = np.concatenate(taken)[_order(sum(map(len, taken)), seed, epoch)]
    drawn.flags.writeable = False
    return drawn


def shares_of(
    rows: Sequence[int], weights: Sequence[float | None], repeats: Sequence[float | None]
) -> tuple[Share, ...]:
    """How many rows of each source an epoch takes; nothing where that is all of them, once.

    With weights, an epoch has as many rows as there are, dealt by weight: ``n_i = N w_i / sum w`` (at least 1, to the nearest). Otherwise
    ``n_i = rows_i repeat_i``.

    Args:
        rows: of each source, which follow one another; weights, repeats: of each source. A source without rows takes no part.
    """
    there = [i for i, n in enumerate(rows) if n]
    whole = sum(weights[i] or 0.0 for i in there)
    wanted = {i: sum(rows) * (weights[i] or 0.0) / whole if whole else rows[i] * (repeats[i] or 1.0) for i in there}
    counts = {i: max(1, round(n)) for i, n in wanted.items()}
    if all(counts[i] == rows[i] for i in there):
        return ()
    return tuple((sum(rows[:i]), rows[i], counts[i]) for i in there)


@dataclass(frozen=True, slots=True)
class BatchSchedule:
    """The batches of a run.

    Args:
        rows: trees in the training set; batch_size: trees per optimizer step (an epoch's last batch may be smaller; no row
            is ever left out).
        epochs: passes over the data, may be a fraction; max_steps: an upper bound, or None.
        seed: of the order; shuffle: False keeps the file's order.
        repeat: optimizer steps on each batch (online methods take several on the same rollouts).
        shares: of mixed sources; empty: an epoch has every tree once.
    """

    rows: int
    batch_size: int
    epochs: float
    max_steps: int | None = None
    seed: int = 0
    shuffle: bool = True
    repeat: int = 1
    shares: tuple[Share, ...] = ()

    @property
    def rows_per_epoch(self) -> int:
        return sum(count for *_, count in self.shares) or self.rows

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows_per_epoch / self.batch_size) * self.repeat

    @property
    def total_steps(self) -> int:
        steps = max(1, round(self.epochs * self.steps_per_epoch))
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def order(self, epoch: int) -> np.ndarray:
        """The order of rows in an epoch (0-based)."""
        seed = self.seed if self.shuffle else None
        return _mixed_order(self.shares, seed, epoch) if self.shares else _order(self.rows, seed, epoch)

    def batch(self, step: int) -> list[int]:
        """Row indices of optimizer step `step` (0-based)."""
        epoch, at = divmod(step, self.steps_per_epoch)
        order = self.order(epoch)
        at //= self.repeat
        return [int(i) for i in order[at * self.batch_size : (at + 1) * self.batch_size]]

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return step / self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether `step` steps done is the end of an epoch."""
        return step % self.steps_per_epoch == 0


# ---- Reduction by global counts: sums over micro-batches, then one division, so that 1x8 equals 4x2 ----


def reduced(output: LossOutput, totals: Mapping[str, float]) -> Tensor:
    """The micro-batch's part of the step's loss: each term over its global count; a term without a count is exactly zero."""
    parts = [values.sum() / totals[name] for name, (values, _) in output.summands().items() if totals[name] > 0]
    # no term at all counts (a batch of only bad answers with no weight on them): zero, with a graph to go back through
    return torch.stack(parts).sum() if parts else output.losses.sum() * 0.0


# of a micro-batch: names with their counts where those are known; sums, then the other counts
Summed = tuple[list[tuple[str, int | None]], set[str], Tensor]


class Totals:
    """Sums and counts of losses and metrics over any number of micro-batches, in fp64.

    They stay on the device until `read`: a GPU that is asked for a number in the middle of a step stands still.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}
        self.terms: set[str] = set()
        self._added: list[tuple[list[tuple[str, int | None]], Tensor]] = []

    @staticmethod
    def summed(output: LossOutput) -> Summed:
        """One micro-batch, to be appended."""
        terms = {f"loss/{name}": (values.detach(), weights) for name, (values, weights) in output.summands().items()}
        figures = {**terms, **output.metrics}
        names = [(name, values.numel() if weights is None else None) for name, (values, weights) in figures.items()]
        sums = [in_fp64(values).sum() for values, _ in figures.values()]
        counts = [in_fp64(weights).sum() for _, weights in figures.values() if weights is not None]
        return names, set(terms), torch.stack([*sums, *counts])

    def append(self, summed: Summed) -> None:
        names, terms, numbers = summed
        self.terms |= terms
        self._added.append((names, numbers))

    def add(self, output: LossOutput) -> None:
        """Add one micro-batch."""
        self.append(self.summed(output))

    def read(self, *more: Tensor) -> list[float]:
        """Bring what was added to the host, and `more` single numbers, which are returned, in one transfer."""
        vectors = [v for _, v in self._added]
        # offloaded gradients have their norm in the host's memory, and losses are on the GPU
        vectors += [in_fp64(m.detach()).reshape(1).to((vectors or more)[0].device) for m in more]
        found = iter(on_host(torch.cat(vectors)) if vectors else [])
        for names, _ in self._added:
            for name, _ in names:
                self.sums[name] = self.sums.get(name, 0.0) + next(found)
            for name, known in names:
                self.counts[name] = self.counts.get(name, 0.0) + (next(found) if known is None else known)
        self._added.clear()
        return list(found)

    def join(self, world: World) -> None:
        """Add what the other ranks have read, in the order of the ranks: the same numbers on each."""
        if not world.many:
            return
        parts = world.gather((self.sums, self.counts, self.terms))
        self.sums, self.counts, self.terms = {}, {}, set()
        for sums, counts, terms in parts:
            self.terms |= terms
            for mine, theirs in ((self.sums, sums), (self.counts, counts)):
                for name, value in theirs.items():
                    mine[name] = mine.get(name, 0.0) + value

    @property
    def finite(self) -> bool:
        """Whether every loss that was read is: in fp64 no sum of finite fp32 numbers overflows."""
        return all(math.isfinite(self.sums[name]) for name in self.terms)

    def means(self, prefix: str = "") -> dict[str, float]:
        """``loss``, its terms where it has several, and every metric; one without a single example is left out."""
        self.read()
        means = {name: s / self.counts[name] for name, s in self.sums.items() if self.counts[name] > 0}
        loss = {"loss": sum(v for name, v in means.items() if name in self.terms)}
        hidden = self.terms if len(self.terms) == 1 else set()
        for part in [n.removesuffix("chosen") for n in means if n.endswith("rewards/chosen")]:
            if f"{part}rejected" in means:  # labelled answers: mean of good minus mean of bad
                means.setdefault(f"{part}margins", means[f"{part}chosen"] - means[f"{part}rejected"])
        return {prefix + name: v for name, v in (loss | means).items() if name not in hidden}


def on_host(vector: Tensor) -> list[float]:
    """The numbers of a vector: where a step waits for the GPU, and the only place where it may."""
    numbers: list[float] = vector.tolist()
    return numbers


# ---- How a GPU computes ----


@contextmanager
def repeatable(device: torch.device, wanted: bool) -> Iterator[None]:
    """A step in which a GPU takes only operations that give the same bits each time; a CPU does so anyway.

    No wider than a step: sampling needs operations of which there is no such kind (floating-point cumsum). An operation of a step
    that has none is warned of by torch, by name.
    """
    if device.type != "cuda" or not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill: Any = torch.utils.deterministic
    filled = fill.fill_uninitialized_memory
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill.fill_uninitialized_memory = False  # a pass over every buffer that only finds bugs
    torch.backends.cuda.enable_cudnn_sdp(False)  # first choice on Hopper, unordered, and warn_only lets it pass
    try:
        with _ordered_attention():
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        fill.fill_uninitialized_memory = filled


@contextmanager
def _ordered_attention() -> Iterator[None]:
    """Within a step, SDPA's backward kernels take their ordered way, which they do not where the mode only warns."""
    plain = F.scaled_dot_product_attention

    def ordered(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = plain(query, key, value, *args, **kwargs)
        if out.requires_grad:  # its gradient comes just before the kernel, those of its inputs (no leaves) just behind
            out.register_hook(lambda _: torch.use_deterministic_algorithms(True))
            for x in (query, key, value):
                if x.requires_grad:
                    x.register_hook(lambda _: torch.use_deterministic_algorithms(True, warn_only=True))
        return out

    F.scaled_dot_product_attention = ordered  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain  # type: ignore[assignment]


def set_precision(device: torch.device, tf32: bool) -> None:
    """How a GPU multiplies: fp32 as it is or in TF32; sums of bf16 products never in bf16."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
