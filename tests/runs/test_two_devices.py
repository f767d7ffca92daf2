"""A reference and a reward model on other devices: placement, a single place for transfers, and unchanged results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import encoder_folder
from test_run import base

from penchant import api, logprobs
from penchant.base import machine
from penchant.config import config_from_mapping
from penchant.distributed import world
from penchant.errors import ConfigError
from penchant.logprobs import Elsewhere, Scorer
from penchant.plan.plan import make_plan
from penchant.plan.text import plan_text
from penchant.runs import Run, parts
from penchant.runs.parts import check_places

__all__ = ["base"]  # the fixture

CPU = torch.device("cpu")
SHORT = ("train.max_steps=2", "train.epochs=1.0", "evaluation.samples=0")


def figures(result: api.TrainResult) -> tuple[bytes, bytes]:
    return (result.folder / "metrics.jsonl").read_bytes(), next(result.model.glob("*.safetensors")).read_bytes()


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Treat `reference.device` as a second CPU, and record each transferred tensor's (dtype, destination)."""
    crossed: list[tuple[str, str]] = []
    place = torch.device("cpu", 0)
    monkeypatch.setattr(parts, "reference_place", lambda config: place)
    real = logprobs.moved
    monkeypatch.setattr(
        logprobs, "moved", lambda t, device: (crossed.append((str(t.dtype), str(device))), real(t, device))[1]
    )
    return crossed


@pytest.mark.parametrize(
    "more", [(), ("loss.name=pmpo",), ("reference.ema=0.5",)], ids=["log-probs", "logits", "a reference that moves"]
)
def test_no_figure_moves(base: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest, more: Any) -> None:
    here = api.train(base, "reference.kind=frozen", *SHORT, *more, f"output={tmp_path}/here", quiet=True)
    crossed = request.getfixturevalue("other")
    there = api.train(base, "reference.kind=frozen", *SHORT, *more, f"output={tmp_path}/there", quiet=True)
    assert figures(there) == figures(here)
    assert ("torch.float32", "cpu") in crossed  # log-probs, or logits, came back


def test_nothing_crosses_in_another_place(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reference on the meta device, using its tensors without a transfer would fail. A transfer back gives zeros."""
    place = torch.device("meta")
    back: list[tuple[int, ...]] = []

    def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if tensor.is_meta and device.type == "cpu":
            back.append(tuple(tensor.shape))
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        return tensor.to(device)

    monkeypatch.setattr(logprobs, "moved", moved)
    monkeypatch.setattr(parts, "reference_place", lambda config: place)
    load = parts.fresh_model
    monkeypatch.setattr(
        parts, "fresh_model", lambda c, source, device, *a, **k: load(c, source, CPU, *a, **k).to(device)
    )
    monkeypatch.setattr(parts, "choose_packing", lambda m, packing, *_: (Scorer(m, packing, "off"), ""))
    for name in ("dpo", "pmpo"):
        run = Run(
            config_from_mapping(base, ["reference.kind=frozen", f"loss.name={name}", "model.kernels=off"]), quiet=True
        )
        reference = run.built.parts.live_reference
        assert isinstance(reference.scorer, Elsewhere) and not reference.exact
        assert {p.device.type for p in reference.scorer.model.parameters()} == {"meta"}
        assert {p.device.type for p in run.built.parts.model.parameters()} == {"cpu"}
        batch = parts_batch(run)
        loss = run.built.algorithm.loss(run.built.algorithm.score(batch))
        assert loss.losses.device.type == "cpu" and loss.losses.requires_grad
    vocabulary = run.built.parts.model.get_input_embeddings().weight.shape[0]
    assert (int(batch.lengths.shape[0]),) in back and any(s[-1] == vocabulary for s in back)


def parts_batch(run: Run) -> Any:
    from penchant.data.packing import pack

    return pack(list(run.rows.trees[0])[:3], shared=run.built.parts.scorer.shared)


def test_a_gradient_comes_back_from_another_device() -> None:
    """The transfer is part of the graph, which a trained model on another device (a value model) needs."""
    weight = torch.ones(3, requires_grad=True)
    assert machine.moved(weight * 2, torch.device("cpu")).sum().backward() is None and weight.grad is not None


# ---- errors ---------------------------------------------------------------------------------------------------------


def two_cards(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    "settings,cards,expected",
    [
        (
            ["reference.device=cuda:2"],
            2,
            r"reference.device: is cuda:2, but there is no cuda:2 here, only cuda:0, cuda:1",
        ),
        (["reference.device=cuda:1"], 0, r"reference.device: is cuda:1, but no CUDA device is visible"),
        (
            ["reference.device=cuda1"],
            2,
            r"reference.device.*'cuda1'; give auto, cpu, cuda, mps, xpu, or one of several",
        ),
        ([f"reference.device=cuda:{'9' * 20}"], 2, r"give auto, cpu"),
        (["reference.device=cuda:01"], 2, r"'cuda:01'; give"),
        (["reference.device=mps:1"], 2, r"'mps:1'; give"),
        (["reward={words: 1.0, device: 'cuda:-1'}"], 2, r"'cuda:-1'; give"),
        (["reference.device=cpu", "reference.kind=cached"], 0, r"a reference of kind cached is the policy itself"),
        (
            ["reference.device=cpu", "lora={r: 2}", "reference.kind=adapter"],
            0,
            "a reference of kind adapter is the policy",
        ),
    ],
)
def test_a_device_that_is_not_to_be_had(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch, settings: list[str], cards: int, expected: str
) -> None:
    two_cards(monkeypatch, cards)
    if any("reward" in s for s in settings):
        base |= {"algorithm": "rloo"}
        del base["loss"]
    with pytest.raises(ConfigError, match=expected):
        api.train(base, "model.device=cpu", *settings, quiet=True)
    assert not (Path(base["output"]) / "metrics.jsonl").exists()


def test_several_processes_have_no_second_card(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    two_cards(monkeypatch, 2)
    monkeypatch.setattr(parts, "current", lambda: world.World(rank=0, size=2))
    for settings in (["reference.device=cuda:1"], ["reference.device=cpu"]):
        with pytest.raises(
            ConfigError, match=r"reference.device: is .* each of the 2 processes has a device of its own"
        ):
            check_places(config_from_mapping(base, settings))
    online = {**base, "algorithm": "rloo", "reward": {"runs/reward": 1.0, "device": "cuda:1"}}
    del online["loss"]
    with pytest.raises(ConfigError, match=r"reward.device: is cuda:1, and each of the 2 processes"):
        check_places(config_from_mapping(online, []))
    online["reward"]["device"] = "cpu"  # each process has one
    check_places(config_from_mapping(online, []))


# ---- placement ------------------------------------------------------------------------------------------------------


def test_a_device_makes_the_reference_a_model_of_its_own(base: dict[str, Any]) -> None:
    for more in ([], ["lora={r: 2}"]):
        run = Run(config_from_mapping(base, ["reference.device=cpu", *more]), quiet=True)
        assert run.built.reference_kind == "frozen"


def test_a_plan_counts_each_device(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    two_cards(monkeypatch, 2)
    base |= {"algorithm": "rloo", "reward": {encoder_folder(tmp_path / "rm"): 1.0, "device": "cuda:1"}}
    del base["loss"]
    config = config_from_mapping(base, ["model.device=cpu", "reference.device=cuda:1"])
    away = make_plan(config, {}, with_probe=False)
    here = make_plan(config_from_mapping(base, ["model.device=cpu", "reward.device=auto"]), {}, with_probe=False)
    copy = here.memory.parts["reference"]
    assert copy > 0 and away.memory.parts["reference"] == 0 and here.memory.elsewhere == {}
    of_reward = sum(p.stat().st_size for p in (tmp_path / "rm").glob("*.safetensors"))
    assert away.memory.elsewhere["cuda:1"] > copy + of_reward
    assert "and on cuda:1" in plan_text(away, whole=True)
    assert json.loads(json.dumps(away.to_json()))["memory"]["elsewhere"]["cuda:1"] > 0
