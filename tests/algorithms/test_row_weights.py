"""Row weights: weight 2 equals the row twice, in every loss that is a mean, its gradients, metrics and held-out metrics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parameters import one_of_each_kind
from rows import from_rows
from steps import step_gradient
from test_offline import offline, pairs, singles
from tiny import tiny_model_folder, tiny_tokenizer

from penchant import api
from penchant.algorithms.offline import Offline
from penchant.data.cached import DataCache
from penchant.data.load import load_preferences
from penchant.data.mapped import StoredTokens, row_weights
from penchant.data.packing import pack
from penchant.data.tokenize import tokenize
from penchant.errors import ConfigError, DataError
from penchant.losses import LOSSES
from penchant.losses.supervised import bradley_terry
from penchant.metrics.heldout import heldout_metrics
from penchant.training.steps import Totals
from penchant.types import TokenTree

MEANS = [n for n in LOSSES if "batch" not in LOSSES[n].needs]


def _twice(trees: list[TokenTree]) -> tuple[list[TokenTree], list[TokenTree]]:
    """The trees with weights 2, 1, 3, 1, ..., and the trees repeated that many times."""
    weights = [(2.0, 1.0, 3.0)[i % 3] for i in range(len(trees))]
    weighted = [replace(t, weight=w) for t, w in zip(trees, weights, strict=True)]
    return weighted, [t for t, w in zip(trees, weights, strict=True) for _ in range(int(w))]


def _means(algorithm: Offline, trees: list[TokenTree], sizes: list[int]) -> dict[str, float]:
    totals, at = Totals(), 0
    algorithm.begin_step(0, 0.0, trees)
    for n in sizes:
        with torch.no_grad():
            totals.add(algorithm.loss(algorithm.score(pack(trees[at : at + n]))))
        at += n
    return totals.means()


@pytest.mark.parametrize("name", one_of_each_kind(MEANS))
def test_a_row_of_weight_two_is_the_row_twice(name: str) -> None:
    """In one pass and in several, some of which only have weights of 1."""
    for given in [pairs(4)] + [singles()] * (LOSSES[name].signal in ("unpaired", "tokens")):
        weighted, twice = _twice(given)
        algorithm = offline(name, trees=given, nll_weight=0.5 if LOSSES[name].signal == "pairs" else 0.0)
        wanted = step_gradient(algorithm, twice, [len(twice)])
        for sizes in ([len(weighted)], [1] * len(weighted)):
            assert (step_gradient(algorithm, weighted, sizes) - wanted).norm() <= 1e-6 * wanted.norm()
            found = _means(algorithm, weighted, sizes)
            assert found == pytest.approx(_means(algorithm, twice, [len(twice)]), rel=1e-5, abs=1e-7), sizes


def test_equal_weights_change_nothing() -> None:
    trees = pairs(4)
    algorithm = offline("dpo", trees=trees)
    wanted = step_gradient(algorithm, trees, [4])
    found = step_gradient(algorithm, [replace(t, weight=0.25) for t in trees], [4])
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_held_out_figures_are_weighted_and_have_intervals(name: str) -> None:
    weighted, twice = _twice(pairs(6))
    algorithm = offline(name, trees=weighted)
    with torch.no_grad():
        found, wanted = (heldout_metrics(algorithm, algorithm.score(pack(t)), t) for t in (weighted, twice))
    means = {
        n: v
        for n, v in found.items()
        if isinstance(v, float) and n.startswith(("eval/loss", "eval/rewards", "eval/nll", "eval/perplexity"))
    }
    assert means and means == pytest.approx({n: wanted[n] for n in means}, rel=1e-5, abs=1e-7)
    low, high = found["eval/loss/ci"]
    assert low <= found["eval/loss"] <= high


def test_a_reward_models_loss_is_weighted() -> None:
    chosen, rejected, weights = (
        torch.tensor([1.0, 0.2, -1.0]),
        torch.tensor([0.0, 0.5, 1.0]),
        torch.tensor([2.0, 1.0, 3.0]),
    )
    out = bradley_terry(chosen, rejected).weighted(weights)
    wanted = -(torch.nn.functional.logsigmoid(chosen - rejected) * weights).sum() / 6
    assert out.weights is not None and torch.allclose(out.losses.sum() / out.weights.sum(), wanted)


ROWS = [{"prompt": f"{i}?", "completion": "yes", "counts": w} for i, w in enumerate((2, 0.5, 1, 0))]


def test_a_column_says_what_rows_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.data.cached.AUTO_BYTES", 0)
    plain = from_rows(ROWS)
    assert plain.columns is not None and plain.columns.unused == ["counts"]
    how: dict[str, Any] = {"weight": "counts"}
    rows = from_rows(ROWS, **how)
    assert [t.weight for t in rows.trees] == [2.0, 0.5, 1.0] and rows.columns is not None and rows.columns.unused == []
    assert rows.accepted == 3 and '"counts" is 0' in rows.quarantined[0].what  # left out, not bad
    assert (
        rows.fingerprint
        != from_rows(ROWS[:3]).fingerprint
        == from_rows([{**r, "counts": 1} for r in ROWS[:3]], **how).fingerprint
    )
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    kept = DataCache().load(str(path), **how)
    assert tuple(kept.trees) == tuple(load_preferences(str(path), **how).trees)
    settings: dict[str, Any] = {
        "template": "plain", "template_options": {}, "max_length": 64, "truncation": "prompt_then_completion",
        "on_bad_row": "error", "identical": "bad_row", "add_eos": True,
    }  # fmt: skip
    stored = DataCache().tokenize(kept, tiny_tokenizer(), **settings).trees
    assert isinstance(stored, StoredTokens) and [t.weight for t in stored] == [2.0, 0.5, 1.0]
    assert np.array_equal(row_weights(stored.take(np.array([0, 2]))), [2.0, 1.0])
    assert row_weights(tokenize(plain, tiny_tokenizer(), max_length=64).trees) is None


@pytest.mark.parametrize("value", [-1, "much", None, True, float("nan"), [1]])
def test_what_is_no_weight_is_a_bad_row(value: Any) -> None:
    with pytest.raises(DataError, match="counts"):
        from_rows([{**ROWS[0], "counts": value}], weight="counts")


@pytest.mark.parametrize(
    "more,what",
    [
        ({"loss": {"name": "aot"}}, "all rows of a step"),
        ({"algorithm": {"name": "rloo"}, "reward": "length"}, "writes its answers"),
    ],
)
def test_where_weights_mean_nothing_they_are_refused(tmp_path: Path, more: dict[str, Any], what: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i}?", "chosen": "a", "rejected": "b", "w": i + 1}) + "\n" for i in range(4))
    )
    config = {"model": {"path": tiny_model_folder(tmp_path / "m")}, "data": {"path": str(path), "weight": "w"},
              "output": str(tmp_path / "run"), **more}  # fmt: skip
    with pytest.raises(ConfigError, match=what):
        api.train(config, quiet=True)
