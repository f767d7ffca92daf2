"""The rows of each step, and sums over global counts."""

from __future__ import annotations

import math
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

# ---- Which trees a step trains on: a pure function of seed and step, so that resuming needs only the step ----


@lru_cache(maxsize=2)  # once per epoch instead of every step: a million rows take 20 ms
def _order(rows: int, seed: int | None, epoch: int) -> np.ndarray:
    order = np.arange(rows) if seed is None else np.random.default_rng([seed, epoch]).permutation(rows)
    order.flags.writeable = False
    return order


Share = tuple[int, int, int]  # of a source: its first tree, its number of trees, how many of them an epoch takes


@lru_cache(maxsize=2)
def _mixed_order(shares: tuple[Share, ...], seed: int | None, epoch: int) -> np.ndarray:
    """Continue each source where the previous epoch stopped, pass after pass, so that its rows come up equally often."""
    parts = []
    for i, (first, rows, count) in enumerate(shares):
        passes, offsets = np.divmod(np.arange(epoch * count, (epoch + 1) * count), rows)
        for number in np.unique(passes):
            order = np.arange(rows) if seed is None else np.random.default_rng([seed, i, number]).permutation(rows)
            parts.append(first + order[offsets[passes == number]])
    mixed = np.concatenate(parts)[_order(sum(map(len, parts)), seed, epoch)]
    mixed.flags.writeable = False
    return mixed


def shares_of(
    rows: Sequence[int], weights: Sequence[float | None], repeats: Sequence[float | None]
) -> tuple[Share, ...]:
    """Number of rows that an epoch takes from each source; empty if it takes every row once.

    With weights, an epoch has N rows in all, split by weight: ``n_i = N w_i / sum w`` (rounded, at least 1). Otherwise
    ``n_i = rows_i repeat_i``.

    Args:
        rows: row count of each source, in their order; weights, repeats: of each source. Sources without rows are skipped.
    """
    nonempty = [i for i, n in enumerate(rows) if n]
    total_weight = sum(weights[i] or 0.0 for i in nonempty)
    targets = {
        i: sum(rows) * (weights[i] or 0.0) / total_weight if total_weight else rows[i] * (repeats[i] or 1.0)
        for i in nonempty
    }
    counts = {i: max(1, round(n)) for i, n in targets.items()}
    if all(counts[i] == rows[i] for i in nonempty):
        return ()
    return tuple((sum(rows[:i]), rows[i], counts[i]) for i in nonempty)


@dataclass(frozen=True, slots=True)
class BatchSchedule:
    """The batches of a run.

    Args:
        rows: trees in the training set; batch_size: trees per optimizer step (an epoch's last batch may be smaller; no row
            is ever left out).
        epochs: passes over the data, may be fractional; max_steps: an upper bound, or None.
        seed: of the order; shuffle: False keeps the order of the file.
        repeat: optimizer steps per batch (online methods take several on the same rollouts).
        shares: of mixed sources; empty: an epoch takes every tree once.
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
        """Row indices in the order of an epoch (0-based)."""
        seed = self.seed if self.shuffle else None
        return _mixed_order(self.shares, seed, epoch) if self.shares else _order(self.rows, seed, epoch)

    def batch(self, step: int) -> list[int]:
        """Row indices of optimizer step `step` (0-based)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = self.order(epoch)
        position //= self.repeat
        return [int(i) for i in order[position * self.batch_size : (position + 1) * self.batch_size]]

    def epoch_at(self, step: int) -> float:
        """Epochs completed after `step` steps."""
        return step / self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch ends after `step` steps."""
        return step % self.steps_per_epoch == 0


def is_due(every: int | str | None, step: int, ends_epoch: bool) -> bool:
    """Whether an interval such as `checkpoint.every` ends after `step` steps; the last step of a run is always due besides."""
    if every is None:
        return False
    return ends_epoch if every == "epoch" else step % int(every) == 0


# ---- Reduction by global counts: sums over micro-batches, then one division, so that 1x8 equals 4x2 ----


def reduced(output: LossOutput, totals: Mapping[str, float]) -> Tensor:
    """A micro-batch's share of the step's loss: each term over its global count, or zero if that count is zero."""
    parts = [values.sum() / totals[name] for name, (values, _) in output.summands().items() if totals[name] > 0]
    # no term counts (e.g. a batch of only bad answers with zero weight): a zero that still has a graph for backward
    return torch.stack(parts).sum() if parts else output.losses.sum() * 0.0


# of a micro-batch: names and counts (None: on the device); names of loss terms; sums followed by the counts on the device
Summed = tuple[list[tuple[str, int | None]], set[str], Tensor]


class Totals:
    """Sums and counts of losses and metrics over any number of micro-batches, in fp64.

    They stay on the device until `read`, as reading a number in the middle of a step would stall a GPU.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}
        self.terms: set[str] = set()
        self._pending: list[tuple[list[tuple[str, int | None]], Tensor]] = []

    @staticmethod
    def summed(output: LossOutput) -> Summed:
        """The sums and counts of one micro-batch, for `append`."""
        terms = {f"loss/{name}": (values.detach(), weights) for name, (values, weights) in output.summands().items()}
        figures = {**terms, **output.metrics}
        names = [(name, values.numel() if weights is None else None) for name, (values, weights) in figures.items()]
        sums = [in_fp64(values).sum() for values, _ in figures.values()]
        counts = [in_fp64(weights).sum() for _, weights in figures.values() if weights is not None]
        return names, set(terms), torch.stack([*sums, *counts])

    def append(self, summed: Summed) -> None:
        names, terms, numbers = summed
        self.terms |= terms
        self._pending.append((names, numbers))

    def add(self, output: LossOutput) -> None:
        """Add one micro-batch."""
        self.append(self.summed(output))

    def read(self, *more: Tensor) -> list[float]:
        """Move everything added so far to the host in one transfer, along with the scalars `more`, which are returned."""
        vectors = [v for _, v in self._pending]
        # with offloaded gradients the norm is in host memory, while losses are on the GPU
        vectors += [in_fp64(m.detach()).reshape(1).to((vectors or more)[0].device) for m in more]
        numbers = iter(on_host(torch.cat(vectors)) if vectors else [])
        for names, _ in self._pending:
            for name, _ in names:
                self.sums[name] = self.sums.get(name, 0.0) + next(numbers)
            for name, count in names:
                self.counts[name] = self.counts.get(name, 0.0) + (next(numbers) if count is None else count)
        self._pending.clear()
        return list(numbers)

    def join(self, world: World) -> None:
        """Add the totals that the other ranks have read, in rank order, so that all ranks get the same numbers."""
        if not world.many:
            return
        parts = world.gather((self.sums, self.counts, self.terms))
        self.sums, self.counts, self.terms = {}, {}, set()
        for sums, counts, terms in parts:
            self.terms |= terms
            for own, other in ((self.sums, sums), (self.counts, counts)):
                for name, value in other.items():
                    own[name] = own.get(name, 0.0) + value

    @property
    def finite(self) -> bool:
        """Whether every loss read so far is finite; in fp64, sums of finite fp32 numbers do not overflow."""
        return all(math.isfinite(self.sums[name]) for name in self.terms)

    def means(self, prefix: str = "") -> dict[str, float]:
        """``loss``, its terms if there are several, and every metric; those with a zero count are left out."""
        self.read()
        means = {name: s / self.counts[name] for name, s in self.sums.items() if self.counts[name] > 0}
        loss = {"loss": sum(v for name, v in means.items() if name in self.terms)}
        hidden = self.terms if len(self.terms) == 1 else set()
        for stem in [n.removesuffix("chosen") for n in means if n.endswith("rewards/chosen")]:
            if f"{stem}rejected" in means:  # labelled answers: mean of good minus mean of bad
                means.setdefault(f"{stem}margins", means[f"{stem}chosen"] - means[f"{stem}rejected"])
        return {prefix + name: v for name, v in (loss | means).items() if name not in hidden}


def on_host(vector: Tensor) -> list[float]:
    """Copy a vector to the host: the only place where a step may wait for the GPU."""
    numbers: list[float] = vector.tolist()
    return numbers


# ---- How a GPU computes ----


@contextmanager
def repeatable(device: torch.device, wanted: bool) -> Iterator[None]:
    """Use only deterministic GPU operations within a step; a CPU is deterministic anyway.

    It covers only the step, as sampling needs operations without a deterministic version (floating-point cumsum). If a
    step uses such an operation, torch warns and names it.
    """
    if device.type != "cuda" or not wanted:
        yield
        return
    previous = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    previous_fill = deterministic.fill_uninitialized_memory
    cudnn_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # an extra pass over every buffer, useful only for debugging
    torch.backends.cuda.enable_cudnn_sdp(False)  # first choice on Hopper, nondeterministic, and allowed by warn_only
    try:
        with _ordered_attention():
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn_enabled)
        torch.use_deterministic_algorithms(previous[0], warn_only=previous[1])
        deterministic.fill_uninitialized_memory = previous_fill


@contextmanager
def _ordered_attention() -> Iterator[None]:
    """Make SDPA's backward kernels deterministic within a step, which they are not in warn-only mode."""
    original = F.scaled_dot_product_attention

    def ordered(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = original(query, key, value, *args, **kwargs)
        if out.requires_grad:  # this hook runs just before the backward kernel, those of its (non-leaf) inputs after
            out.register_hook(lambda _: torch.use_deterministic_algorithms(True))
            for x in (query, key, value):
                if x.requires_grad:
                    x.register_hook(lambda _: torch.use_deterministic_algorithms(True, warn_only=True))
        return out

    F.scaled_dot_product_attention = ordered  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original  # type: ignore[assignment]
