"""docs/eval.md has every metric with its definition, and every option."""

from __future__ import annotations

from pathlib import Path

import pytest
from refresh import eval_page

from penchant.cli import build_parser
from penchant.metrics.names import METRICS

PAGE = (Path(__file__).parents[2] / "docs/eval.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", eval_page().splitlines()[2:], ids=[m.name for m in METRICS.values() if m.over])
def test_every_figure_is_on_the_page(row: str) -> None:
    assert row in PAGE


def test_every_option_is_on_the_page() -> None:
    commands = next(a for a in build_parser()._actions if a.dest == "command")
    options = [o for a in commands.choices["eval"]._actions for o in a.option_strings if o not in ("-h", "--help")]  # type: ignore[index]
    assert len(options) > 20
    assert [o for o in options if f"`{o}" not in PAGE] == []
