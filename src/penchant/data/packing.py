"""Packing of token trees: which trees go into one forward pass, and the packed row itself."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from penchant.base.lanes import side_by_side
from penchant.base.lazy import torch
from penchant.data.mapped import part_lengths
from penchant.distributed.world import current, dealt_passes
from penchant.types import PackedBatch, PicturedPrompt, Segment, TokenTree

T = TypeVar("T")


def plan_microbatches(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Split trees into few forward passes of at most `budget` tokens, by best-fit decreasing.

    Args:
        sizes: tokens of each tree, as it will be packed.
        budget: `tokens_per_step`; a tree larger than the budget gets its own pass.

    Returns:
        Lists of indices into `sizes`, each in ascending order; the same input always gives the same plan.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted: bisect finds the tightest bin that fits
    bins: list[list[int]] = []
    for i in order:
        tightest = bisect_left(room, (sizes[i], -1))
        if tightest < len(room):
            left, b = room.pop(tightest)
        else:
            left, b = budget, len(bins)
            bins.append([])
        bins[b].append(i)
        if left > sizes[i]:
            insort(room, (left - sizes[i], b))
    return [sorted(b) for b in bins]


def plan_balanced(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """As few passes as `plan_microbatches` needs, but of nearly equal size (longest processing time first).

    Equal passes keep the peak memory of a step down and never cost an extra pass; if balancing would exceed the
    budget, the best-fit plan is returned.
    """
    plan = plan_microbatches(sizes, budget)
    bins = _balanced(sizes, len(plan))
    largest = max((sum(sizes[i] for i in members) for members in bins), default=0)
    return plan if largest > max(budget, max(sizes, default=0)) else bins


def plan_for_ranks(sizes: Sequence[int], budget: int, ranks: int) -> list[list[int]]:
    """The passes of a step shared by several ranks, the same list on each: rank r runs passes r, r + ranks, r + 2 ranks, ...

    Their number is a multiple of `ranks`; passes without trees are empty and come last. The largest come first: the ranks wait for
    each other at every layer, so passes that run at the same time should be equal.
    """
    plan = plan_microbatches(sizes, budget)
    count = -(-len(plan) // ranks) * ranks
    bins = _balanced(sizes, count)
    if max((sum(sizes[i] for i in members) for members in bins), default=0) > max(budget, max(sizes, default=0)):
        bins = plan
    bins = sorted(bins, key=lambda members: -sum(sizes[i] for i in members))
    return [*bins, *([[]] * (count - len(bins)))]


def _balanced(sizes: Sequence[int], count: int) -> list[list[int]]:
    heap = [(0, b) for b in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, b = heapq.heappop(heap)
        bins[b].append(i)
        heapq.heappush(heap, (load + sizes[i], b))
    return [sorted(b) for b in bins if b]


SIDE_BY_SIDE = 8  # passes that share `tokens_per_step` if a CPU runs one per thread
# Tokens of such a pass: in a smaller one, reading the weights takes as long as multiplying by them. With a small budget or few rows
# two threads still beat one, so passes may go down to LEAST_TOKENS.
PASS_TOKENS, LEAST_TOKENS = 512, 128


def plan_passes(sizes: Sequence[int], budget: int, lanes: bool, strands: int = 1) -> list[list[int]]:
    """The passes of a step: `plan_balanced`, or, for passes that run side by side (`base/lanes.py`), more and smaller ones.

    Their number is a multiple of four if the trees allow it, else of two, so that two or four threads finish together; the largest
    comes first. The plan does not depend on the number of threads, so sums do not either.

    Args:
        strands: passes that each of these becomes (`Algorithm.strands`); if several, the fewest passes keep the threads busy.
    """
    if not lanes:
        return plan_balanced(sizes, budget)
    pass_limit = max(pass_tokens(budget), max(sizes, default=0))
    min_passes = -(-sum(sizes) // pass_limit)
    count = min_passes
    if strands == 1:
        count = max(min_passes, min(-(-min_passes // 4) * 4, sum(sizes) // LEAST_TOKENS))
        count -= count % 2 if count > max(1, min_passes) else 0  # two threads would run the third of three passes alone
    bins = _balanced(sizes, min(count, len(sizes)))
    while any(sum(sizes[i] for i in members) > pass_limit for members in bins):
        bins = _balanced(sizes, len(bins) + 1)
    return sorted(bins, key=lambda members: -sum(sizes[i] for i in members))


def pass_tokens(budget: int) -> int:
    """Tokens per pass if several passes share a budget."""
    return min(budget, max(PASS_TOKENS, budget // SIDE_BY_SIDE), max(LEAST_TOKENS, budget // 2))


def max_concurrent_passes(sizes: Sequence[int], budget: int, trees: int) -> int:
    """How many passes of these sizes may run side by side within a budget, at most one per tree."""
    return max(1, min(trees, budget // max(sizes, default=1)))


def pack(trees: Sequence[TokenTree], *, shared: bool = True) -> PackedBatch:
    """Lay trees into one row without padding.

    Args:
        trees: at least one tree.
        shared: True lays ``[prompt, completion 1, completion 2, ...]`` per tree; False repeats the prompt before every
            completion. Completions are numbered tree by tree in both, so the losses see the same order.

    Returns:
        The packed batch; every completion token is predicted from the position before it, the first one from the
        prompt's last position. Tokens that a tree's masks leave out are in the row, but not among the targets.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    predict: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    segments: list[Segment] = []
    pictures: list[PicturedPrompt | None] = []
    completion_tree: list[int] = []
    completion_slot: list[int] = []
    lengths: list[int] = []
    labels: list[bool | None] = []
    scores: list[float | None] = []
    row_weights: list[float] = []
    offset = 0
    for t, tree in enumerate(trees):
        p = len(tree.prompt_ids)
        masks: Sequence[np.ndarray | None] = tree.masks or (None,) * len(tree.completion_ids)
        parts = list(zip(tree.completion_ids, masks, strict=True))
        for group in [parts] if shared else [[part] for part in parts]:
            segments.append(Segment(offset, p, tuple(len(c) for c, _ in group)))
            pictures.append(tree.pictures)
            ids.append(tree.prompt_ids)
            positions.append(np.arange(p))
            last_prompt = offset + p - 1
            offset += p
            for completion, mask in group:
                n = len(completion)
                ids.append(completion)
                positions.append(np.arange(p, p + n))
                before = np.concatenate(([last_prompt], np.arange(offset, offset + n - 1)))
                predict.append(before if mask is None else before[mask])
                targets.append(completion if mask is None else completion[mask])
                lengths.append(len(targets[-1]))
                offset += n
        completion_tree += [t] * len(tree.completion_ids)
        completion_slot += range(len(tree.completion_ids))
        labels += tree.labels or (None,) * len(tree.completion_ids)
        scores += tree.scores or (None,) * len(tree.completion_ids)
        row_weights += (tree.weight,) * len(tree.completion_ids)

    def flat(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    counts = torch.tensor(lengths)
    return PackedBatch(
        input_ids=flat(ids),
        position_ids=flat(positions),
        segments=tuple(segments),
        predict_index=flat(predict),
        target_ids=flat(targets),
        completion_of=torch.repeat_interleave(torch.arange(len(lengths)), counts),
        completion_tree=torch.tensor(completion_tree),
        completion_slot=torch.tensor(completion_slot),
        lengths=counts,
        rows=tuple(tree.row for tree in trees),
        labels=_tensor_if_complete(labels),
        scores=_tensor_if_complete(scores),
        row_weights=None if all(w == 1.0 for w in row_weights) else torch.tensor(row_weights, dtype=torch.float32),
        pairs=all(len(tree.completion_ids) == 2 for tree in trees),
        most=max(len(tree.completion_ids) for tree in trees),
        pictures=tuple(pictures) if any(pictures) else (),
    )


def _tensor_if_complete(values: Sequence[bool | float | None]) -> torch.Tensor | None:
    return None if any(v is None for v in values) else torch.tensor(values, dtype=torch.float32)


def tree_tokens(tree: TokenTree, shared: bool) -> int:
    """Tokens that a tree takes in a packed row."""
    return tree.shared_tokens if shared else tree.separate_tokens


def tree_sizes(trees: Sequence[TokenTree], shared: bool) -> list[int]:
    """`tree_tokens` of each tree."""
    counts, lengths = part_lengths(trees)
    starts = np.cumsum(counts) - counts
    totals = np.add.reduceat(lengths, starts) if len(counts) else lengths
    sizes: list[int] = (totals if shared else totals + (counts - 2) * lengths[starts]).tolist()
    return sizes


def run_passes(
    call: Callable[[PackedBatch], T],
    trees: Sequence[TokenTree],
    tokens_per_step: int,
    *,
    shared: bool,
    device: torch.device,
    lanes: bool = False,
) -> Iterator[tuple[list[int], T]]:
    """Run all trees in forward passes of at most `tokens_per_step` tokens; yields each pass's tree indices and `call(batch)`.

    Passes do not follow the order of the trees: put results back by index, or keep the order in which trees were scored. With several
    ranks, each runs some of the passes and all of them get all results.

    Args:
        lanes: passes are smaller and run side by side (`plan_passes`); `call` must be thread-safe.
    """
    sizes = tree_sizes(trees, shared)
    plan = plan_microbatches(sizes, pass_tokens(tokens_per_step) if lanes else tokens_per_step)
    if lanes and not current().many:  # of one size and an even number, so that two threads finish together
        even = _balanced(sizes, len(plan) + len(plan) % 2)
        plan = plan if any(sum(sizes[i] for i in members) > pass_tokens(tokens_per_step) for members in even) else even

    def run_pass(members: list[int]) -> T:
        return call(pack([trees[i] for i in members], shared=shared).to(device))

    if current().many:
        yield from dealt_passes(plan, run_pass, device, sizes)
        return
    pass_sizes = [sum(sizes[i] for i in members) for members in plan]
    concurrent = max_concurrent_passes(pass_sizes, tokens_per_step, len(trees)) if lanes else 1
    yield from zip(plan, side_by_side(run_pass, plan, most=concurrent), strict=True)
