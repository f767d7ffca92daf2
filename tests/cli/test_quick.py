"""Commands that need no tensors, and config errors, must not import torch or transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from studio_people import word
from tiny import polite_rows, write_jsonl

import penchant

# a process with the imports that most commands need; each command runs in a fork of it, and those imports count too
SCRIPT = """
import json, os, sys, traceback
import numpy, pyarrow, rich.console
import penchant.config
from penchant.cli import main
for line in sys.stdin:
    folder, arguments = json.loads(line)
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        print(json.dumps(status), flush=True)
        continue
    os.chdir(folder)
    for number, name in (0, os.devnull), (1, "stdout"), (2, "stderr"):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    heavy = sorted({"torch", "transformers", "peft", "datasets"} & set(sys.modules))
    print("\\n" + json.dumps([code, heavy]), flush=True)
    sys.stderr.flush()
    os._exit(0)
"""
FINISHED = str(Path(__file__).parents[1] / "fixtures/v0_1/finished")


Answer = tuple[int, list[str], str]


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Answer]]:
    """(exit code, heavy modules imported, stderr) of a command run in its own process."""
    environment = {**os.environ, "PYTHONPATH": str(Path(penchant.__file__).parents[1])}
    environment.pop("PENCHANT_REEXECUTED", None)
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forks:
        assert forks.stdin is not None and forks.stdout is not None

        def answer(folder: Path, *arguments: str) -> Answer:
            print(json.dumps([str(folder), arguments]), file=forks.stdin, flush=True)
            status = json.loads(forks.stdout.readline())
            said = (folder / "stderr").read_text()
            assert status == 0, said
            code, heavy = json.loads((folder / "stdout").read_text().splitlines()[-1])
            return code, heavy, said

        yield answer


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
        ("data", "get", "own/pairs", "--from", "pairs.jsonl", "--output", "got"),
        ("flags", FINISHED),
        ("watch", FINISHED, "--once"),
        ("compare", "--judge", "humans:preferences.jsonl"),
    ],
    ids=" ".join,
)
def test_no_tensors_no_torch(command: tuple[str, ...], tmp_path: Path, run: Callable[..., Answer]) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", polite_rows()[:3])
    write_jsonl(tmp_path / "preferences.jsonl", [word(0).to_json()])
    assert run(tmp_path, *command)[:2] == (0, [])


PLAYING = "algorithm: grpo\nreward: sentiment\nrollout: {{environment: {}}}"


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
        ("train", ("./model", "./bare"), "bare: the folder has no weights"),
        ("train", ("output: run", "output: pairs.jsonl"), "output is a file"),
        ("train", ("output: run", "output: pairs.jsonl/below"), "lies below one"),
        ("train", ("output: run", "output: model"), "output is a model's folder"),
        ("train", ("output: run", "output: taken"), "taken/checkpoints: is not a folder"),
        ("train", ("loss: {name: dpo, beta: 0.1}", PLAYING.format("calculater")), 'did you mean "calculator"'),
        ("train", ("loss: {name: dpo, beta: 0.1}", PLAYING.format("envs.py:Env")), "envs.py: no such file"),
    ],
)
def test_a_mistake_is_answered_before_torch(
    command: str, change: tuple[str, str], words: str, tmp_path: Path, run: Callable[..., Answer]
) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", polite_rows()[:3])
    for name in ("model", "bare"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "model/model.safetensors").write_bytes(b"")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/checkpoints").write_text("")
    text = "model: {path: ./model}\ndata: {path: pairs.jsonl}\nloss: {name: dpo, beta: 0.1}\noutput: run\n"
    assert change[0] in text
    (tmp_path / "run.yaml").write_text(text.replace(*change))
    more = ["seed=0,1"] if command == "sweep" else []
    code, heavy, said = run(tmp_path, command, "run.yaml", *more)
    assert (code, heavy) == (2, []) and words in said


@pytest.mark.parametrize(
    ("command", "body"),
    [
        (["train"], "model: {path: ./model}\ndata: {path: pairs.jsonl}\n"),
        (["plan"], "model: {path: ./model}\ndata: {path: pairs.jsonl}\n"),
        (["sweep"], "base: {model: {path: m}, data: {path: d, validation_rows: 1}}\ngrid: {train.seed: [0, 1]}\n"),
        (
            ["sweep", "--plan"],
            "base: {model: {path: m}, data: {path: d, validation_rows: 1}}\ngrid: {train.seed: [0, 1]}\n",
        ),
        (["pipeline"], "defaults: {model: {path: m}, data: {path: d}}\nstages: {seed-0: {loss: sft}}\n"),
        (["pipeline", "--plan"], "defaults: {model: {path: m}, data: {path: d}}\nstages: {seed-0: {loss: sft}}\n"),
    ],
    ids=str,
)
def test_an_output_that_cannot_be_made_is_answered_before_torch(
    command: list[str], body: str, tmp_path: Path, run: Callable[..., Answer]
) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", polite_rows()[:3])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/seed-0").write_text("")
    outputs = [("/proc/x", 5, "cannot be written"), ("pairs.jsonl", 2, "output is a file")]
    if "model" not in body.split(":")[0]:  # the folder of a run or stage
        outputs.append(("taken", 2, "seed-0: output is a file"))
    for output, expected, words in outputs:
        (tmp_path / "it.yaml").write_text(f"{body}output: {output}\n")
        name, *options = command
        code, heavy, said = run(tmp_path, name, "it.yaml", *options)
        assert (code, heavy) == (expected, []) and words in said, output
    assert not list(tmp_path.rglob(".*"))


def test_a_plan_needs_no_weights(tmp_path: Path, run: Callable[..., Answer]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    text = "model: {path: ./model}\ndata: {path: pears.jsonl}\noutput: run\n"
    (tmp_path / "run.yaml").write_text(text)
    assert run(tmp_path, "plan", "run.yaml")[:2] == (2, [])
    assert "pears.jsonl: no such file" in run(tmp_path, "plan", "run.yaml")[2]


def test_an_export_of_a_run_that_is_not_there_is_answered_before_torch(
    tmp_path: Path, run: Callable[..., Answer]
) -> None:
    (tmp_path / "runs/dpo").mkdir(parents=True)
    for named, words in (
        ("runs/dop", "did you mean runs/dpo?"),
        ("owner/name", "no such run"),
        ("stderr", "is a file"),
    ):
        code, heavy, said = run(tmp_path, "export", named, "--to", "pt")
        assert (code, heavy) == (2, []) and words in said, named
