"""Training steps for equality tests: a loop with defaults, a step split into micro-batches, a run killed after a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from penchant import api
from penchant.data.packing import pack
from penchant.training.console import QuietConsole
from penchant.training.loop import Loop
from penchant.training.optim import MasterAdamW
from penchant.training.options import CheckpointConfig, EvalConfig, LoggingConfig, TrainConfig
from penchant.training.steps import reduced
from penchant.types import TokenTree


def small_loop(
    algorithm: Any,
    optimizer: MasterAdamW,
    trees: Sequence[TokenTree],
    train: Mapping[str, Any],
    folder: Path,
    **more: Any,
) -> Loop:
    """A quiet loop that trains the algorithm's policy and saves it with `save_pretrained`. `more` is passed to Loop."""
    model = algorithm.scorer.model
    defaults: dict[str, Any] = {
        "shared": True,
        "peak_lr": 1e-2,
        "evaluation": EvalConfig(),
        "checkpoint": CheckpointConfig(),
        "logging": LoggingConfig(),
        "write_model": lambda: lambda to: model.save_pretrained(to),
        "console": QuietConsole(),
    }
    own = {"model": model, "algorithm": algorithm, "optimizer": optimizer, "trees": trees, "folder": folder}
    return Loop(**(defaults | own | {"train": TrainConfig(**train)} | more))


def step_gradient(
    algorithm: Any, trees: Sequence[TokenTree], sizes: Sequence[int], more: Iterable[torch.nn.Parameter] = ()
) -> torch.Tensor:
    """Flat gradient of one step over `trees` in micro-batches of the given sizes, over all parameters of the policy (and `more`)."""
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


class Killed(BaseException):
    """Simulates kill -9: an exception that the loop's cleanup does not handle."""


def train_until_killed(config: Mapping[str, Any], step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and die after a step and everything that the loop does after it."""
    real = Loop._after_step

    def killed(self: Loop, *args: Any) -> None:
        real(self, *args)
        if self.state.step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_after_step", killed)
        with pytest.raises(Killed):
            api.train(config, quiet=True)
