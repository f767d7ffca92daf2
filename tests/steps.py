"""One optimizer step cut into micro-batches, as the loop takes it: what equality tests compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from penchant.data.packing import pack
from penchant.training.steps import reduced
from penchant.types import TokenTree


def step_gradient(
    algorithm: Any, trees: Sequence[TokenTree], sizes: Sequence[int], more: Iterable[torch.nn.Parameter] = ()
) -> torch.Tensor:
    """The gradient of one step over `trees`, in micro-batches of the given sizes: all parameters of the policy (and `more`), flat."""
    parameters = [*algorithm.scorer.model.parameters(), *more]
    for p in parameters:
        p.grad = None
    trees = algorithm.begin_step(0, 0.0, trees)
    batches, at = [], 0
    for n in sizes:
        batches.append(pack(trees[at : at + n]))
        at += n
    weights = [algorithm.weights(b) for b in batches]
    counts = {k: sum(w[k] for w in weights) for k in weights[0]}
    for batch in batches:
        reduced(algorithm.loss(algorithm.score(batch)), counts).backward()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
