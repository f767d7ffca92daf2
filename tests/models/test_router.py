"""The load balancing loss of mixture-of-experts routers, compared with transformers' function."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import load_tool
from families import mixture_of_experts, some_trees, tiny_model
from tiny import polite_rows, tiny_tokenizer, write_jsonl
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from penchant.config import load_config
from penchant.data.packing import pack
from penchant.errors import ConfigError
from penchant.logprobs import Scorer
from penchant.models.router import router_loss
from penchant.runs import Run
from penchant.types import PackedBatch, TokenTree

COEF = 0.7


def _gradient(model: Any) -> torch.Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def _theirs(model: Any, trees: Sequence[TokenTree]) -> tuple[float, torch.Tensor]:
    """By transformers alone, one padded row per completion. The mask is 0 at padding and repeated prompts."""
    rows = [[*t.prompt_ids.tolist(), *c.tolist()] for t in trees for c in t.completion_ids]
    again = [len(t.prompt_ids) if i else 0 for t in trees for i in range(len(t.completion_ids))]
    longest = max(map(len, rows))
    ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
    real = torch.tensor([[int(i < len(r)) for i in range(longest)] for r in rows])
    counted = torch.tensor([[int(a <= i < len(r)) for i in range(longest)] for a, r in zip(again, rows, strict=True)])
    logits = model(input_ids=ids, attention_mask=real, output_router_logits=True).router_logits
    loss, all_real = (load_balancing_loss_func(logits, 4, 2, mask) for mask in (counted, real))
    assert isinstance(loss, torch.Tensor) and abs(float(loss.detach() - all_real)) > 1e-4  # repeats would show
    model.zero_grad()
    (COEF * loss).backward()
    return float(loss.detach()), _gradient(model)


def _ours(model: Any, packing: Any, micro: Sequence[Sequence[TokenTree]]) -> tuple[float, torch.Tensor]:
    scorer = Scorer(model, packing)
    scorer.router = router = router_loss(model, "auto")
    router.run = scorer.hidden
    batches: list[PackedBatch] = [pack(trees, shared=packing == "shared") for trees in micro]
    router.begin_step(model, batches)
    model.zero_grad()
    for batch in batches:
        (scorer.logps(batch).sums.sum() * 0.0).backward()
    return router.end_step(), _gradient(model)


@pytest.mark.parametrize("packing", ["shared", "separate", "padded"])
@pytest.mark.parametrize("sizes", [(4,), (1, 2, 1)])
def test_it_is_transformers_own_over_real_tokens(packing: str, sizes: tuple[int, ...]) -> None:
    """For any packing and any micro-batches: over every token of the step, each prompt once, without padding."""
    model, trees = mixture_of_experts(), some_trees()
    trees = [*trees, *trees][:4]
    want, gradient = _theirs(model, trees)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    found, ours = _ours(model, packing, [trees[a : a + n] for a, n in zip(starts, sizes, strict=True)])
    assert found == pytest.approx(want, rel=1e-5)
    assert (ours - gradient).norm() <= 1e-5 * gradient.norm() and gradient.norm() > 0


def test_it_is_added_only_while_a_step_trains() -> None:
    model, (batch, *_) = mixture_of_experts(), [pack(some_trees())]
    scorer = Scorer(model, "shared")
    plain = scorer.hidden(batch)
    scorer.router = router_loss(model, 0.1)
    assert scorer.router.coef == 0.1 and not scorer.router.listens
    assert torch.equal(scorer.hidden(batch), plain)
    scorer.router.begin_step(model, [batch])
    assert scorer.router.listens and torch.equal(scorer.hidden(batch), plain)
    scorer.router.end_step()
    assert not scorer.router.listens


def test_a_model_without_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="no balance loss"):
        router_loss(tiny_model("llama"), "auto")
    model = mixture_of_experts()
    model.config.router_aux_loss_coef = 0.0
    with pytest.raises(ConfigError, match="is auto, and the model's own"):
        router_loss(model, "auto")
    assert router_loss(model, 0.01).coef == 0.01
    model.config.num_experts_per_tok = 3  # unlike the layers: the loss follows the config
    assert router_loss(model, 0.01).top_k == 3


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    with load_tool().silent():
        mixture_of_experts(260).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _trained(mixture: Path, tmp_path: Path, name: str, *more: str) -> list[dict[str, Any]]:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: {mixture}, dtype: fp32}}\n"
        f"data: {{path: {write_jsonl(tmp_path / 'rows.jsonl', polite_rows(8))}, validation_rows: 2}}\n"
        "train: {max_steps: 2, batch_size: 4, lr: 1e-3}\nevaluation: {samples: 0, kl_prompts: 0, at_start: false}\n"
    )
    Run(load_config(config, [f"output={tmp_path / name}", *more]), quiet=True).train()
    lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(["loss.name=dpo"], marks=pytest.mark.slow),
        ["loss.name=dpo", "lora.r=2", "reference.ema=0.9"],
        pytest.param(["algorithm.name=reward_model"], marks=pytest.mark.slow),
        pytest.param(
            ["algorithm.name=rloo", "algorithm.samples=2", "algorithm.max_new_tokens=4", "reward=words"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["dpo", "ema", "reward_model", "rloo"],
)
def test_methods_train_with_it(method: list[str], mixture: Path, tmp_path: Path) -> None:
    """Case 19: mixtures of experts with every kind of method. Each step logs the loss, and micro-batches do not change it."""
    whole = _trained(mixture, tmp_path, "whole", "model.router_aux_loss=auto", *method)
    cut = _trained(mixture, tmp_path, "cut", "model.router_aux_loss=auto", "train.tokens_per_step=130", *method)
    for a, b in zip(whole, cut, strict=True):
        assert a["router_aux_loss"] == pytest.approx(b["router_aux_loss"], rel=1e-3) and a["router_aux_loss"] >= 1.9
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    plain = _trained(mixture, tmp_path, "plain", *method)
    assert "router_aux_loss" not in plain[0]
    assert whole[0]["loss"] - COEF * whole[0]["router_aux_loss"] == pytest.approx(plain[0]["loss"], abs=1e-4)
    assert whole[1]["grad_norm"] != plain[1]["grad_norm"]
