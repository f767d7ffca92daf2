"""Contracts that every registered loss keeps."""

from __future__ import annotations

import pytest
import torch

from penchant.losses import LOSSES
from penchant.types import PairLogps, UnpairedLogps


def _call(name: str, order: torch.Tensor, **params: float):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(6, generator=generator, dtype=torch.float64)[order] * 3 for _ in range(4))
    lengths = torch.arange(1, 7, dtype=torch.float64)[order]
    spec = LOSSES[name]
    logps = PairLogps(a, b, c, d, lengths, lengths) if spec.signal == "pairs" else UnpairedLogps(a, lengths, c)
    return spec.fn(logps, **{**spec.params().model_dump(), **params})


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_permuting_rows_permutes_losses(name: str) -> None:
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    assert torch.equal(_call(name, torch.arange(6)).losses[order], _call(name, order).losses)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_hyperparameter_changes_the_result(name: str) -> None:
    base = _call(name, torch.arange(6)).losses
    for field, value in LOSSES[name].params().model_dump().items():
        changed = _call(name, torch.arange(6), **{field: value + 0.1}).losses
        assert not torch.allclose(base, changed), f"{name}.{field} is ignored"


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_metrics_are_detached_and_unreduced(name: str) -> None:
    out = _call(name, torch.arange(6))
    assert out.losses.shape == (6,)
    for metric, (values, _) in out.metrics.items():
        assert values.shape == (6,) and not values.requires_grad, metric


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_specs_describe_themselves(name: str) -> None:
    spec = LOSSES[name]
    assert spec.name == name and spec.formula
    for field, info in spec.params.model_fields.items():
        assert info.description, f"{name}.{field} has no description"
