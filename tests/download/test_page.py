"""The commands of docs/data_get.md run as shown, with a tiny model in place of the 135M one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tiny import tiny_model_folder

from penchant import api
from penchant.cli import main

PAGE = (Path(__file__).parents[2] / "docs/data_get.md").read_text()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_page_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(sh|python|yaml)\n(.*?)```", PAGE, flags=re.S)
    assert [kind for kind, _ in blocks] == ["sh", "python", "sh", "sh", "sh", "yaml"]
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, "docs/data_get.md", "exec"), {})
        for line in text.splitlines() if kind == "sh" else ():
            assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "43 rows = 43 accepted + 0 filtered" in said
    assert "43 rows = 40 accepted + 3 filtered (1 language; 1 moderation; 1 redacted) + 0 kept aside" in said
    Path("rloo.yaml").write_text(blocks[-1][1].replace(MODEL, tiny_model_folder(tmp_path / "model")))
    small = ["train.max_steps=1", "algorithm.max_new_tokens=4", "data.max_length=64", "evaluation.samples=0"]
    assert "eval/reward" in api.train("rloo.yaml", *small, quiet=True).after


def test_every_option_is_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "get", "--help"])
    options = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert options and not [o for o in options if not re.search(rf"[` ]{o}[` ]", PAGE)]
