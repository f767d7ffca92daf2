"""CONTRIBUTING.md: the files that it names are there, and its loss is what it says."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from penchant.losses import LOSSES
from penchant.types import PairLogps

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
HEADER = """
from typing import Annotated
import torch.nn.functional as F
from penchant.losses import Range, loss
from penchant.losses.helpers import pair_logratios, pair_output
from penchant.types import LossOutput, PairLogps
"""


def test_the_files_it_names_are_there() -> None:
    named = {n for n in re.findall(r"`([\w./]+)`", PAGE) if "/" in n or n.endswith((".py", ".toml", ".txt"))}
    assert len(named) > 30
    places = (ROOT, ROOT / "src/penchant", ROOT / "src/penchant/losses", ROOT / "src/penchant/data/layouts")
    missing = [n for n in named if not any((place / n).exists() for place in places) and n != "rewards/accuracies"]
    assert missing == []


def test_its_loss_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    monkeypatch.setitem(LOSSES, "capped_dpo", None)  # taken out again afterwards
    del LOSSES["capped_dpo"]
    space: dict[str, object] = {}
    exec(HEADER + code, space)
    spec = LOSSES["capped_dpo"]
    assert {n: f.default for n, f in spec.params.model_fields.items()} == {"beta": 0.1, "cap": 3.0}
    rows = [[-5.0, -50.0, -9.0], [-6.0, -12.0, -8.0], [-5.5, -10.0, -9.5], [-5.5, -11.0, -7.0]]
    chosen, rejected, reference_chosen, reference_rejected = (torch.tensor(r, dtype=torch.float64) for r in rows)
    lengths = torch.full((3,), 4.0, dtype=torch.float64)
    logps = PairLogps(chosen, rejected, reference_chosen, reference_rejected, lengths, lengths)
    out = spec.fn(logps, beta=2.0, cap=1.0)
    h = [a - c - (b - d) for a, b, c, d in zip(*rows, strict=True)]
    assert out.losses.tolist() == pytest.approx([math.log1p(math.exp(-min(2.0 * x, 1.0))) for x in h], abs=1e-12)
