"""Commands that need no tensors, and mistakes in a config, are answered before torch or transformers is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import polite_rows, write_jsonl

import penchant

SCRIPT = """
import json, sys
from penchant.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
heavy = sorted({"torch", "transformers", "peft", "datasets"} & set(sys.modules))
print("\\n" + json.dumps([code, heavy]))
"""
FINISHED = str(Path(__file__).parents[1] / "fixtures/v0_1/finished")


def run(folder: Path, *arguments: str) -> tuple[int, list[str], str]:
    """The exit code of a command in a process of its own, the heavy modules it left behind, and what it wrote to stderr."""
    environment = {**os.environ, "PYTHONPATH": str(Path(penchant.__file__).parents[1])}
    environment.pop("PENCHANT_REEXECUTED", None)
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    code, heavy = json.loads(done.stdout.splitlines()[-1])
    return code, heavy, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("--help",),
        ("train", "--help"),
        ("losses",),
        ("losses", "dpo"),
        ("config",),
        ("data", "formats"),
        ("data", "formats", "hh"),
        ("data", "show", "pairs.jsonl"),
        ("flags", FINISHED),
        ("watch", FINISHED, "--once"),
    ],
    ids=" ".join,
)
def test_no_tensors_no_torch(command: tuple[str, ...], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", polite_rows()[:3])
    assert run(tmp_path, *command)[:2] == (0, [])


@pytest.mark.parametrize(
    ("command", "change", "words"),
    [
        ("train", ("beta", "betta"), 'did you mean "beta"'),
        ("eval", ("beta", "betta"), 'did you mean "beta"'),
        ("plan", ("beta", "betta"), 'did you mean "beta"'),
        ("sweep", ("beta", "betta"), 'did you mean "beta"'),
        ("pipeline", ("beta", "betta"), "run.yaml"),
        ("train", ("pairs.jsonl", "pears.jsonl"), "pears.jsonl: no such file"),
        ("train", ("./model", "./modle"), "modle: no such folder"),
    ],
)
def test_a_mistake_is_answered_before_torch(command: str, change: tuple[str, str], words: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", polite_rows()[:3])
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    text = "model: {path: ./model}\ndata: {path: pairs.jsonl}\nloss: {name: dpo, beta: 0.1}\noutput: run\n"
    assert change[0] in text
    (tmp_path / "run.yaml").write_text(text.replace(*change))
    more = ["seed=0,1"] if command == "sweep" else []
    code, heavy, said = run(tmp_path, command, "run.yaml", *more)
    assert (code, heavy) == (2, []) and words in said
