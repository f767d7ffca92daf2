"""Every optimizer equals its library's version on plain tensors, and resumes bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from penchant.errors import ConfigError
from penchant.training.optim import MasterAdamW, state_bytes
from penchant.training.options import TrainConfig

EIGHT_BIT = ["adamw_8bit", "paged_adamw_8bit"]
KINDS = ["adamw", *EIGHT_BIT, "adafactor", "muon", "sgd"]
# the first is large enough for 8 bits
SHAPES = {"layers.0.w": (80, 64), "layers.0.norm": (64,), "embed.weight": (9, 4)}
RATE = 0.05


def needs(kind: str) -> Any:
    return pytest.importorskip("bitsandbytes") if kind in EIGHT_BIT else None


def start(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in start(100 + step).items()}


def run(optimizer: MasterAdamW, steps: range) -> None:
    for step in steps:
        for name, g in gradients(step).items():
            p = optimizer.params[name]
            (p * g.to(p.dtype)).sum().backward()
        optimizer.clip(1.0)
        optimizer.step(RATE / (1 + step))


def library(kind: str, p: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
    """The optimizer as used directly: matrices decay, vectors do not."""
    matrices, vectors = ["layers.0.w", "embed.weight"], ["layers.0.norm"]
    groups = [{"params": [p[n] for n in names], "weight_decay": d} for names, d in ((matrices, 0.1), (vectors, 0.0))]
    betas = {"betas": (0.8, 0.9), "eps": 1e-6}
    if kind == "sgd":
        return [torch.optim.SGD(groups, momentum=0.7)]
    if kind == "adafactor":
        return [torch.optim.Adafactor(groups)]
    if kind == "muon":
        rest = [{"params": [p["embed.weight"]], "weight_decay": 0.1}, groups[1]]
        inner = torch.optim.Muon(
            [p["layers.0.w"]], weight_decay=0.1, momentum=0.7, adjust_lr_fn="match_rms_adamw", nesterov=True
        )
        return [inner, torch.optim.AdamW(rest, **betas)]  # type: ignore[arg-type]
    if kind == "adamw":
        return [torch.optim.AdamW(groups, **betas)]  # type: ignore[arg-type]
    bnb = needs(kind)
    return [(bnb.optim.AdamW8bit if kind == "adamw_8bit" else bnb.optim.PagedAdamW8bit)(groups, **betas)]


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("kind", KINDS)
def test_each_is_its_librarys_own(kind: str) -> None:
    needs(kind)
    ours, theirs = start(), start()
    momentum = 0.7 if kind in ("sgd", "muon") else None
    named, first = ours.items(), {n: p.detach().clone() for n, p in ours.items()}
    optimizer = MasterAdamW(
        named, dtype=torch.float32, kind=kind, betas=(0.8, 0.9), eps=1e-6, momentum=momentum, weight_decay=0.1
    )
    run(optimizer, range(3))
    parts = library(kind, theirs)
    for step in range(3):
        for name, g in gradients(step).items():
            theirs[name].grad = g.clone()
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        for part in parts:
            for group in part.param_groups:
                group["lr"] = RATE / (1 + step)
            part.step()
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(p, first[name])


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_one_ends_equal_to_the_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    needs(kind)
    whole = MasterAdamW(start().items(), dtype=dtype, kind=kind, weight_decay=0.1)
    run(whole, range(5))
    half = MasterAdamW(start().items(), dtype=dtype, kind=kind, weight_decay=0.1)
    run(half, range(2))
    save_file({k: v.contiguous() for k, v in half.state_tensors().items()}, tmp_path / "state.safetensors")
    again = MasterAdamW(start(1).items(), dtype=dtype, kind=kind, weight_decay=0.1)
    again.load_state_tensors(load_file(tmp_path / "state.safetensors"))
    run(again, range(2, 5))
    kept, found = whole.state_tensors(), again.state_tensors()
    assert kept.keys() == found.keys() and len(kept) > len(SHAPES)
    assert all(torch.equal(kept[k], found[k]) for k in kept)
    assert all(torch.equal(p, again.params[n]) for n, p in whole.params.items())


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("kind", KINDS)
def test_what_each_keeps_is_what_a_plan_says(kind: str) -> None:
    needs(kind)
    for momentum in (None, 0.0) if kind == "sgd" else (None,):
        optimizer = MasterAdamW(start().items(), dtype=torch.float32, kind=kind, momentum=momentum)
        run(optimizer, range(1))
        kept = optimizer.state_tensors().items()
        held = sum(t.nbytes for n, t in kept if n.split("/")[0] not in ("master", "step"))
        assert state_bytes(kind, start().items(), momentum) == held


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("kind", EIGHT_BIT)
def test_moments_of_8_bits_have_8_bits(kind: str) -> None:
    needs(kind)
    optimizer = MasterAdamW(start().items(), dtype=torch.float32, kind=kind)
    run(optimizer, range(1))
    kept = optimizer.state_tensors()
    assert kept["state1/layers.0.w"].dtype == kept["state2/layers.0.w"].dtype == torch.uint8


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_missing_extra_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'penchant\[bnb\]'"):
        MasterAdamW(start().items(), dtype=torch.float32, kind="adamw_8bit")


@pytest.mark.parametrize(
    "said",
    [
        {"optimizer": "adamw", "momentum": 0.9},
        {"optimizer": "adamw_8bit", "momentum": 0.9},
        {"optimizer": "sgd", "lr": 0.1, "adam_beta1": 0.8},
        {"optimizer": "adafactor", "lr": 0.1, "adam_eps": 1e-6},
        {"optimizer": "sgd"},
        {"optimizer": "adafactor"},
    ],
)
def test_keys_of_another_optimizer_are_refused(said: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainConfig(**said)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_config_resolves_to_is_read_again(kind: str) -> None:
    made = TrainConfig(optimizer=kind, lr=0.1)  # type: ignore[arg-type]
    assert TrainConfig(**made.model_dump()) == made
