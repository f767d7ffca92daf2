"""Activation offloading to host memory between forward and backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model_folder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from penchant.models import activations
from penchant.models.activations import Offloaded, offload
from penchant.models.load import backbone_of, load_causal_model
from penchant.models.options import ModelConfig


def _gradients(model: Any, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(input_ids=ids).logits.square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_gradients_are_equal_and_weights_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SMALL", 0)
    model = load_causal_model(ModelConfig(path=tiny_model_folder(tmp_path / "m")), torch.device("cpu"))
    ids = torch.arange(12)[None]
    plain = _gradients(model, ids)
    moved: list[tuple[bool, bool]] = []
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    class Watched(Offloaded):
        def __init__(self, module: torch.nn.Module, pin: bool) -> None:
            super().__init__(module, pin)
            pack = self.pack_hook

            def watched(saved: Tensor) -> Any:
                kept = pack(saved)
                moved.append((not isinstance(kept, Tensor), saved.untyped_storage().data_ptr() in own))
                return kept

            self.pack_hook = watched

    monkeypatch.setattr(activations, "Offloaded", Watched)
    offload(backbone_of(model), pin=False)
    again = _gradients(model, ids)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert (True, False) in moved and (False, True) in moved and (True, True) not in moved
    seen = len(moved)
    with torch.no_grad():
        model(input_ids=ids)
    assert len(moved) == seen


def test_copies_to_the_host_do_not_wait_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asynchronous copies need page-locked memory."""
    waits: list[bool] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default:
                waits.append(len(args) < 3 or not args[2])
            return func(*args, **(kwargs or {}))

    empty = torch.empty
    # a CPU has no page-locked memory
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **how: empty(*size, **how))
    hooks = Offloaded(torch.nn.Linear(1, 1), pin=True)
    with Copies():
        hooks.pack_hook(torch.ones(1 << 15))
    assert waits == [False]


def test_a_pass_that_fails_leaves_nothing_entered() -> None:
    layer = torch.nn.Linear(400, 400)
    offload(layer, pin=False)
    with pytest.raises(RuntimeError):
        layer(torch.ones(1, 3))
    x = torch.ones(400, 400, requires_grad=True)
    kept = (x * 2).exp()
    node: Any = kept.grad_fn
    assert node._saved_result.data_ptr() == kept.data_ptr()
