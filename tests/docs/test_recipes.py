"""The recipes that print the tables of docs/results.md run, and their tables match what was measured."""

from __future__ import annotations

import ast
import json
import sys
from argparse import Namespace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny import tiny_model_folder, write_jsonl

from penchant import api
from penchant.errors import PenchantError

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPTS = sorted([*RECIPES.glob("*.py"), *RECIPES.parent.glob("benchmarks/*.py"), *RECIPES.parent.glob("tools/*.py")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_what_a_script_imports_of_penchant_exists(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "penchant":
            module = import_module(str(node.module))
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or find_spec(f"{node.module}.{name}"), f"{node.module} has no {name}"


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPES))
    for name in ("experiments", "loss_table", "dpo_shift_table", "pmpo_table", "frontier", "distillation"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import experiments

    monkeypatch.setattr(experiments, "HH_PAIRS", 8)
    monkeypatch.setattr(experiments, "HH_HELDOUT", 4)
    monkeypatch.setattr(experiments, "SAMPLE_TOKENS", 4)
    return experiments


@pytest.mark.slow  # two trainings, each evaluated with separate models
def test_a_table_of_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiments: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """The start compared with itself shows no change; after a step the table matches the run's own evaluation."""
    monkeypatch.chdir(tmp_path)
    model = Path(tiny_model_folder(tmp_path / "model", chat=True))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    rows = [
        {
            "prompt": turn("user", f"Say {i}."),
            "chosen": turn("assistant", f"yes {i}"),
            "rejected": turn("assistant", "no"),
        }
        for i in range(12)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    import loss_table

    asked = "loss_table.py --task hh --seeds 1 --model model --data rows.jsonl --only dpo,kto --threads 1"
    monkeypatch.setattr(sys, "argv", asked.split())
    loss_table.main()
    table = [
        [c.strip() for c in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    assert [row[0] for row in table] == ["loss", "-" * len(table[1][0]), experiments.START, "dpo", "kto"]
    start, dpo = table[2], table[3]
    assert start[3:6] == ["0.00"] * 3 and start[6] == "0.00"
    measured = json.loads((tmp_path / "runs/tables/hh/losses/dpo/seed-0/measured.json").read_text())
    before = json.loads((tmp_path / "runs/tables/hh/start.json").read_text())
    moved = [a - b for a, b in zip(measured["logps"], before["logps"], strict=True)]
    assert measured["chosen"] == pytest.approx(moved[::2], abs=1e-4) and any(abs(m) > 1e-3 for m in moved)
    assert dpo[4] == f"{sum(moved[::2]) / 4:.2f}"


@pytest.mark.parametrize("script", ["loss_table", "dpo_shift_table", "pmpo_table", "frontier"])
def test_every_run_of_a_table_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiments: ModuleType, script: str
) -> None:
    """No config of a table is refused, so no row says why it could not run."""
    (tmp_path / "demo").mkdir()
    for name in ("train", "heldout", "unpaired"):
        (tmp_path / "demo" / f"{name}.jsonl").write_text("{}\n")
    accepted: list[Any] = []

    def stop(config: Any, quiet: bool) -> None:
        accepted.append(api.as_config(config))
        raise PenchantError("here", "not trained")

    monkeypatch.setattr(experiments, "train", stop)
    monkeypatch.setattr(experiments, "_measure", lambda *_: {"reward": 0.0})
    module = import_module(script)
    for name in ("print_table", "print_frontier", "print_at", "print_samples"):
        monkeypatch.setattr(module, name, lambda *_: None, raising=False)
    monkeypatch.setattr(sys, "argv", [script, "--seeds", "1", "--output", str(tmp_path)])
    module.main()
    refused = [text for p in tmp_path.rglob("measured.json") if "not trained" not in (text := p.read_text())]
    assert accepted and not refused


def test_every_student_of_the_distillation_is_accepted(tmp_path: Path, experiments: ModuleType) -> None:
    recipe = import_module("distillation")
    args = Namespace(epochs=2, lr=3e-4, output=tmp_path)
    for name in recipe.STUDENTS:
        api.as_config(recipe.config_of(name, 0, args, tmp_path / "rows.jsonl", "teacher"))
