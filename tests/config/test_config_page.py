"""`penchant config` and docs/config.md are generated from the schema, completely."""

from __future__ import annotations

from pathlib import Path

import pytest

from penchant.cli import main
from penchant.config import default_settings
from penchant.config.page import REJECTED, error_for, markdown, parts, text

KEYS = {k.path: k for p in parts() for k in p.keys}


def test_the_docs_page_is_what_the_command_prints() -> None:
    page = (Path(__file__).parents[2] / "docs/config.md").read_text()
    assert page == markdown(), "run: penchant config --markdown > docs/config.md"


def test_every_default_of_the_schema_is_there() -> None:
    for section, values in default_settings().items():
        if isinstance(values, dict):
            for name, value in values.items():
                names = [f"{name}.{n}" for n in value] if f"{section}.{name}" == "data.bounds" else [name]
                for n in names:
                    assert f"{section}.{n}" in KEYS, f"{section}.{n} is on no page"
    assert KEYS["train.warmup_fraction"].default == "0.1"
    assert KEYS["train.warmup_fraction"].takes == "number, >= 0, < 1"
    assert KEYS["model.path"].default == "required"
    assert KEYS["algorithm.lambda"].default == "0.95"  # by its alias


def test_every_key_says_what_it_means() -> None:
    assert [k for k, v in KEYS.items() if not v.meaning] == []


@pytest.mark.parametrize("settings", REJECTED, ids=" ".join)
def test_what_the_page_calls_refused_is(settings: tuple[str, ...]) -> None:
    assert len(error_for(settings)) > 20


def test_what_is_accepted_cannot_stand_there() -> None:
    with pytest.raises(AssertionError, match="is accepted"):
        error_for(("train.lr=1e-5",))


def test_one_key_and_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "train.lr"]) == 0
    out = capsys.readouterr().out
    assert "train.lr: number or auto (default: auto)" in out and "epochs" not in out
    assert "train.epochs" in text("train") and "data.path" not in text("train")
    assert main(["config", "train.lrr"]) == 2
    assert "did you mean train.lr?" in capsys.readouterr().err
    assert main(["config", "max_length"]) == 2
    assert "did you mean data.max_length?" in capsys.readouterr().err
