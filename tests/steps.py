"""Steps as the loop takes them, for equality tests: a loop with defaults, a step cut into micro-batches, a run that is killed after one."""

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
    """A loop that trains the algorithm's policy, says nothing, and saves the policy by its own method; `more` as Loop has it."""
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


class Killed(BaseException):
    """A kill -9: nothing of the loop's own clean-up knows about it."""


def train_until_killed(config: Mapping[str, Any], step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and die behind a step and whatever the loop does after it."""
    real = Loop._after_step

    def killed(self: Loop, *args: Any) -> None:
        real(self, *args)
        if self.state.step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_after_step", killed)
        with pytest.raises(Killed):
            api.train(config, quiet=True)
