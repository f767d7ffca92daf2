"""The benchmark's FLOP count, compared with counting by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    """Load a module of benchmarks/, which is not a package and not on the path."""
    spec = importlib.util.spec_from_file_location(f"penchant_benchmarks_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


flops = load("flops")
SMOLLM2 = flops.ModelShape(layers=30, width=576, heads=9, head_dim=64, kv_heads=3, ffn=1536, vocab=49152)


def test_block_parameters_are_the_models_without_its_embedding() -> None:
    assert SMOLLM2.block_parameters == 134_515_008 - 49152 * 576


def test_work_equals_a_count_of_pairs_one_by_one() -> None:
    trees = [(3, [2, 4]), (1, [1, 1]), (5, [6])]
    attended = 0
    for prompt, completions in trees:
        attended += sum(1 for q in range(prompt) for k in range(prompt) if k <= q)
        for c in completions:
            attended += sum(1 for q in range(prompt, prompt + c) for k in range(prompt + c) if k <= q)
    assert flops.work_of(trees) == flops.Work(unique_tokens=9 + 3 + 11, completion_tokens=6 + 2 + 6, attended=attended)


def test_rows_and_trees_are_the_same_work() -> None:
    rows = [{"prompt_ids": [1, 2, 3], "completion_ids": [[4, 5], [6]]}]
    assert flops.work_of_rows(rows) == flops.work_of([(3, [2, 1])])


@pytest.mark.parametrize("rho", [0, 1])
def test_formula_of_full_fine_tuning(rho: int) -> None:
    u, r, a = 1000, 400, 50_000
    n, v, d, layers, heads, dh = SMOLLM2.block_parameters, 49152, 576, 30, 9, 64
    expected = 2 * n * u * (3 + rho) + 2 * v * d * r * (3 + rho) + 4 * layers * heads * dh * a * (3.5 + rho)
    assert flops.flops(SMOLLM2, flops.Work(u, r, a), reference_runs=bool(rho)) == expected


def test_lora_saves_the_frozen_weight_gradients_and_pays_for_its_adapters() -> None:
    work = flops.Work(1000, 400, 0)
    full = flops.flops(SMOLLM2, work, reference_runs=True)
    lora = flops.flops(SMOLLM2, work, reference_runs=True, lora_rank=16)
    adapters = 30 * 16 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    assert SMOLLM2.lora_parameters(16) == adapters
    assert full - lora == full / 4 - 2 * adapters * 1000 * 3


def test_shape_is_read_from_a_config(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 100,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert flops.read_shape(tmp_path) == flops.ModelShape(2, 32, 4, 8, 4, 64, 100)
