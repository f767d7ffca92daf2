"""CONTRIBUTING.md: the files that it names exist, and the code of its recipes works."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from report_folders import make_run, write_lines
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api, cli
from penchant.algorithms import ALGORITHMS
from penchant.data.layouts import LAYOUTS
from penchant.data.layouts import layout as layouts
from penchant.data.load import load_preferences
from penchant.errors import ConfigError, DataError
from penchant.losses import LOSSES
from penchant.report import page
from penchant.report.data import read_report
from penchant.types import PairLogps, Scored

ROOT = Path(__file__).parents[2]
LOSS = """
from typing import Annotated
import torch.nn.functional as F
from penchant.losses import Range, loss
from penchant.losses.helpers import pair_logratios, pair_output
from penchant.types import LossOutput, PairLogps
"""
LAYOUT = """
from penchant.data.layouts import fields
from penchant.data.layouts.fields import RowError
from penchant.data.layouts.layout import Fields, layout
from penchant.data.layouts.plain import pair
from penchant.types import PromptTree
"""
ALGORITHM = """
from dataclasses import dataclass
from pydantic import Field
from penchant.algorithms import AlgorithmConfig
from penchant.logprobs import Scorer
from penchant.types import Algorithm, LossOutput, Scored
"""
SECTION = """
from penchant.report.data import ReportData
from penchant.report.html import Element, user_text, table
from penchant.report.page import Section, num
from penchant.report.svg import number
"""
COMMAND = """
import argparse
from dataclasses import MISSING, dataclass
from typing import Any
from penchant.cli.arguments import add_arguments, options_of
from penchant.data.load import load_preferences
from penchant.requests import option, request_of, shows
"""
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def recipe(title: str, imports: str) -> dict[str, Any]:
    """The names that a recipe's code defines."""
    section = PAGE.split(f"### {title}\n")[1].split("\n### ")[0]
    code = "".join(re.findall(r"```python\n(.*?)```", section, flags=re.S))
    module = ModuleType("recipe")
    sys.modules["recipe"] = module  # dataclasses look their module up
    exec("from __future__ import annotations\n" + imports + code, vars(module))
    return vars(module)


def test_the_files_it_names_are_there() -> None:
    named = {n for n in re.findall(r"`([\w./]+)`", PAGE) if "/" in n or n.endswith((".py", ".toml", ".txt"))}
    assert len(named) > 30
    places = (ROOT, ROOT / "src/penchant", ROOT / "src/penchant/losses", ROOT / "src/penchant/data/layouts")
    missing = [n for n in named if not any((place / n).exists() for place in places) and n != "rewards/accuracies"]
    assert missing == []
    there = {p.name for p in (ROOT / "src/penchant").iterdir() if p.suffix in ("", ".py") and p.name[:2] != "__"}
    assert there - {n.rstrip("/") for n in named} == set()


def test_its_loss_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "capped_dpo", None)  # taken out again afterwards
    del LOSSES["capped_dpo"]
    recipe("Add a loss", LOSS)
    spec = LOSSES["capped_dpo"]
    assert {n: f.default for n, f in spec.params.model_fields.items()} == {"beta": 0.1, "cap": 3.0}
    rows = [[-5.0, -50.0, -9.0], [-6.0, -12.0, -8.0], [-5.5, -10.0, -9.5], [-5.5, -11.0, -7.0]]
    chosen, rejected, reference_chosen, reference_rejected = (torch.tensor(r, dtype=torch.float64) for r in rows)
    lengths = torch.full((3,), 4.0, dtype=torch.float64)
    logps = PairLogps(chosen, rejected, reference_chosen, reference_rejected, lengths, lengths)
    out = spec.fn(logps, beta=2.0, cap=1.0)
    h = [a - c - (b - d) for a, b, c, d in zip(*rows, strict=True)]
    assert out.losses.tolist() == pytest.approx([math.log1p(math.exp(-min(2.0 * x, 1.0))) for x in h], abs=1e-12)


def test_its_layout_is_detected_and_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (entry,) = re.findall(r"### Add a data layout\n.*?```yaml\n(.*?)```", PAGE, flags=re.S)
    for name, about in yaml.safe_load(entry).items():
        monkeypatch.setitem(layouts._TABLE, name, about)
        monkeypatch.setitem(LAYOUTS, name, None)  # taken out again afterwards
    recipe("Add a data layout", LAYOUT)
    rows = [{"ticket": f"Where is {n}?", "replies": ["Here.", "Who knows."]} for n in "abc"]
    read = load_preferences(write_jsonl(tmp_path / "tickets.jsonl", rows))
    assert [t.prompt for t in read.trees] == ["Where is a?", "Where is b?", "Where is c?"]
    assert [[(c.text, c.label) for c in t.completions] for t in read.trees] == [
        [("Here.", True), ("Who knows.", False)]
    ] * 3
    bad = write_jsonl(tmp_path / "bad.jsonl", [*rows, {"ticket": "And d?", "replies": ["Here."]}])
    with pytest.raises(DataError, match=r"bad\.jsonl:4.*replies does not hold two texts"):
        load_preferences(bad)


def test_its_algorithm_trains_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = recipe("Add an algorithm", ALGORITHM)
    logps, pair = torch.tensor([-2.0, -6.0]), torch.tensor([0, 0])
    scored = Scored(tree=pair, slot=torch.tensor([0, 1]), lengths=torch.tensor([4, 4]), policy_logps=logps)
    assert made["ChosenOnlyStep"](None, 0.25).loss(scored).losses.tolist() == [0.75 * 2 + 0.25 * 6]
    monkeypatch.setitem(ALGORITHMS, "chosen_only", made["ChosenOnly"])
    config = {
        "model": {"path": tiny_model_folder(tmp_path / "model"), "dtype": "fp32"},
        "data": {
            "path": write_jsonl(tmp_path / "pairs.jsonl", polite_rows(12)),
            "validation_rows": 4,
            "max_length": 128,
        },
        "algorithm": {"name": "chosen_only", "label_smoothing": 0.0},
        "train": {"epochs": 4, "batch_size": 8, "lr": 1e-2},
        "evaluation": {"samples": 0, "kl_prompts": 0},
        "output": str(tmp_path / "run"),
    }
    api.train(config, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [m["loss"] for m in lines if m["kind"] == "train"]
    assert len(losses) == 4 and 0 < losses[-1] < losses[0] - 1
    with pytest.raises(ConfigError, match="label_smoothing"):
        api.train({**config, "algorithm": {"name": "chosen_only", "label_smoothing": 1.0}}, quiet=True)


def test_its_section_is_on_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = recipe("Add a report section", SECTION)["SECTION"]
    monkeypatch.setattr(page, "SECTIONS", (*page.SECTIONS, made))
    shown = page.render(read_report([make_run(tmp_path / "run", steps=40)], 0.0), strict=True)
    (section,) = re.findall(r'<section id="steps".*?</section>', shown, flags=re.S)
    assert re.findall(r"<td[^>]*>([^<]*)</td>", section)[0] == "40.0"
    write_lines(tmp_path / "run/metrics.jsonl", [])
    assert 'id="steps"' not in page.render(read_report([tmp_path / "run"], 0.0), strict=True)


def test_its_command_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recipe("Add a command", COMMAND)
    monkeypatch.setitem(sys.modules, "penchant.cli.count", SimpleNamespace(add=made["add"]))
    monkeypatch.setattr(cli, "COMMANDS", [*cli.COMMANDS, "count"])
    data = write_jsonl(tmp_path / "pairs.jsonl", polite_rows(5))
    assert cli.main(["count", data]) == 0 and cli.main(["count", data, "--limit", "2"]) == 0
    assert capsys.readouterr().out.split() == ["5", "2"]
    assert made["count"](data, limit=3) == 3
    with pytest.raises(SystemExit):
        cli.main(["count", data, "--limit", "0"])
