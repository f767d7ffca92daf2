"""docs/eval.md has every figure as it is defined, and every option."""

from __future__ import annotations

from pathlib import Path

import pytest

from penchant.cli import build_parser
from penchant.metrics.names import GLOSSARY, markdown, meaning_of

PAGE = (Path(__file__).parents[2] / "docs/eval.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", markdown().splitlines()[2:], ids=list(GLOSSARY))
def test_every_figure_is_on_the_page(row: str) -> None:
    assert row in PAGE


def test_every_option_is_on_the_page() -> None:
    commands = next(a for a in build_parser()._actions if a.dest == "command")
    options = [o for a in commands.choices["eval"]._actions for o in a.option_strings if o not in ("-h", "--help")]  # type: ignore[index]
    assert len(options) > 20
    assert [o for o in options if f"`{o}" not in PAGE] == []


def test_meanings_are_found_with_and_without_their_prefix() -> None:
    assert meaning_of("eval/rewards/margins") is GLOSSARY["rewards/margins"]
    assert meaning_of("generated/reward[runs/n]") is not None
    assert meaning_of("eval/rewards/margins/ci") is None and meaning_of("eval/generated/reward/ci") is None
