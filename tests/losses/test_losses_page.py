"""`penchant losses` and docs/losses.md are generated from the registry, completely."""

from __future__ import annotations

from pathlib import Path

import pytest

from penchant.cli import main
from penchant.losses import LOSSES
from penchant.losses.page import describe, markdown, text


def test_the_docs_page_is_what_the_command_prints() -> None:
    page = (Path(__file__).parents[2] / "docs/losses.md").read_text()
    assert page == markdown(), "run: penchant losses --markdown > docs/losses.md"


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_listed_with_formula_and_hyperparameters(name: str) -> None:
    spec = LOSSES[name]
    assert f"\n{name}" in text() and spec.formula in text()
    assert f"`{name}`" in markdown()
    for field, info in spec.params.model_fields.items():
        assert f"loss.{info.alias or field} = " in describe(name)
    assert spec.formula in describe(name)
    assert "Logps" not in describe(name), "that is for callers from Python"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["losses", "dpo-shift"]) == 0
    assert "loss.lambda = 0.75" in capsys.readouterr().out
    assert main(["losses", "kt"]) == 2
    assert 'did you mean "kto"?' in capsys.readouterr().err
