"""Run, load or check every fenced block of README.md and docs/, page by page in order, with stand-ins for data and models.

A block that begins with `# NAME.yaml` or `# NAME.py` is that file. Hub model names are folders with a tiny model here, and runs that a
page takes for granted exist (tests/page_world.py), so blocks run as shown. Commands that are not run are listed in NOT_RUN with a reason,
and still checked: their arguments are parsed, and files of the repository must exist.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from page_world import shared_world
from pages import BLOCKS, NAMES, ROOT, Block, Shell, blocks, of, page_file, runs_something, simple_commands

from penchant.cli import build_parser
from penchant.config import load_config, parse_yaml
from penchant.importers import import_config
from penchant.pipeline import load_pipeline
from penchant.sweep import load_sweep

CHECKED = {"sh", "yaml", "json", "python", "math"}  # how each is checked: below
OUTPUT = {"", "text"}  # output of a command, or a formula in plain text: nothing to run
SHELL = {"python", "vllm", "docker", "pip", "ln", "cat", "printf", "kill", "export"}  # commonly installed, or explained

# {pattern of a shell line that is never run: reason}
NOT_RUN = {
    r"^make ": "minutes long, or installs; `make demo` is tests/test_demo.py",
    r"\bvllm serve ": "needs vLLM; tests/rollout/ has a server with its routes",
    r"^docker ": "needs a container engine; tests/docs/test_docker.py checks the files",
    r"^(python -m )?pip (install|wheel) ": "needs the network",
    r" qlora\.yaml": "needs a large model and the extra bnb; tests/models/test_quantize.py trains a small one",
    r"--judge http": "needs a model behind an endpoint; tests/judges/ has one on this machine",
    r"--host 0\.0\.0\.0": "listens to other machines until it is ended; tests/serve/ does so on this one",
    r"^export ": "is for the shell that a person sits at, and the command after it is not run here",
    r" --(processes|gpus) \d": "starts processes, each importing torch; tests/distributed does",
    r" --jobs \d": "starts processes, each importing torch; tests/sweep/ does",
    r"^penchant studio": "runs until it is ended; tests/studio/ does",
    r"^penchant demo": "two minutes; tests/test_demo.py does, and a stand-in for runs/demo is here",
}
# {pattern of a command that trains many runs and is only planned in the default suite: words to append}
PLANNED = {r"^penchant sweep ": "--plan", r"^penchant pipeline .*(?=stages\.|pipeline\.yaml)": "--plan"}
# {pattern of a command that generates texts: words that keep them short in the default suite}
SHORT = {
    r"^penchant chat ": "--max-new-tokens=8",
    r"^penchant compare (?!--judge humans)": "--max-new-tokens=8",
    r"^penchant train ": "evaluation.kl_prompts=4 evaluation.samples=2 evaluation.sample_tokens=4",
}
# {pattern of a command that reads input: what a user types}
TYPED = {r"^penchant chat .*--prefer": "The film was\n/left\n/quit\n", r"^penchant chat ": "The film was\n/quit\n"}
# {page that runs in `make test-all` only: reason}
SLOW_PAGES = {
    "docs/tutorial.md": "trains the bundled model three times",
    "docs/rewards.md": "trains on arithmetic; tests/test_readme.py does so for a step",
}


def test_no_kind_of_block_is_unaccounted_for() -> None:
    strange = [f"{b}: ```{b.language}" for b in BLOCKS if b.language not in CHECKED | OUTPUT]
    assert not strange, f"say here how these are checked: {strange}"
    for page in NAMES:
        assert len(re.findall(r"^ *```", (ROOT / page).read_text(), flags=re.M)) == 2 * len(blocks(page)), page
    assert len(of("sh")) > 20 and len(of("yaml")) > 20


def test_no_exception_is_left_over() -> None:
    """A stale entry would hide the next command that it matches."""
    commands = [c for b in of("sh") for c in b.commands()]
    for table in (NOT_RUN, PLANNED, SHORT, TYPED):
        assert [p for p in table if not any(re.search(p, c, flags=re.M) for c in commands)] == []
    assert set(SLOW_PAGES) <= {p for p in NAMES if runs_something(p)}


# ---------------------------------------------------------------------------------------------------------------------
# yaml, json, math


@pytest.fixture(scope="module")
def shown_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's run.yaml and the pages' loss and algorithm, which other blocks use."""
    folder = tmp_path_factory.mktemp("shown")
    (folder / "run.yaml").write_text(page_file("README.md", "run.yaml"))
    for page, file in (("docs/own_losses.md", "my_losses.py"), ("docs/own_algorithms.md", "my_algorithms.py")):
        (folder / file).write_text(next(b for b in of("python") if str(b).startswith(page)).text)
    return folder


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml_is_a_config(block: Block, shown_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config of a run, pipeline or sweep, one that the importer reads, or sections of a run's config."""
    monkeypatch.chdir(shown_files)
    values, _ = parse_yaml(block.text, str(block))
    assert isinstance(values, dict)
    path = shown_files / "block.yaml"
    path.write_text(block.text)
    if "stages" in values:
        load_pipeline(path)
    elif "base" in values:
        load_sweep(path)
    elif {"model_name_or_path", "base_model"} & values.keys():
        assert import_config(path, method="dpo").yaml
    else:
        base = {"model": "{path: m}", "data": "{path: d.jsonl}", "output": "o"}
        if "reward" in values and "algorithm" not in values:
            base["algorithm"] = "rloo"
        path.write_text("".join(f"{k}: {v}\n" for k, v in base.items() if k not in values) + block.text)
        load_config(path)


def test_settings_in_tables_are_configs(tmp_path: Path) -> None:
    text = (ROOT / "docs/methods/index.md").read_text()
    sections = re.findall(r"^\| [^|]*\| `((?:loss|reference): \{.*?\})`", text, flags=re.M)
    assert len(sections) == 5
    for section in sections:
        (tmp_path / "run.yaml").write_text(f"model: {{path: m}}\ndata: {{path: d}}\noutput: o\n{section}\n")
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_json_parses(block: Block) -> None:
    """A single value, or JSONL rows."""
    try:
        json.loads(block.text)
    except ValueError:
        rows = [json.loads(line) for line in block.text.splitlines()]
        assert len(rows) > 1 and all(isinstance(row, dict) for row in rows)


@pytest.mark.parametrize("block", of("math"), ids=str)
def test_math_becomes_mathml(block: Block) -> None:
    convert = pytest.importorskip("latex2mathml.converter").convert
    made = convert(block.text.strip(), display="block")
    assert made.startswith("<math") and "\\" not in re.sub(r"&#x0005C;", "", made), made


# ---------------------------------------------------------------------------------------------------------------------
# sh, python


@pytest.mark.parametrize("block", of("sh"), ids=str)
def test_every_command_is_one(block: Block) -> None:
    """The command accepts its arguments, and make's targets and the repository's files exist."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert block.commands()
    for command in block.commands():
        for first, *rest in simple_commands(command):
            if first == "penchant":
                args, left = build_parser().parse_known_args(rest)
                assert args.command is not None
                assert all("=" in r and not r.startswith("-") for r in left), f"{block}: {command}"
            elif first == "make":
                assert set(rest) <= targets, f"{block}: {command}"
            else:
                assert first in SHELL, f"{block}: say here how `{first}` is checked"
            for word in rest:
                if word.startswith(("recipes/", "benchmarks/", "docker/", "scripts/")):
                    assert (ROOT / word).exists(), f"{block}: {word}"


@pytest.fixture
def page_folder(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world. Its data and models are small, so lengths and lr need no change."""
    base = tmp_path_factory.getbasetemp()
    world = shared_world(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)
    folder = tmp_path / "page"
    shutil.copytree(world, folder, symlinks=True, copy_function=_copy)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "cache"))
    return folder


def _copy(source: str, target: str) -> None:
    """Copy a file, but hard-link weights. They are most of the bytes, and are only ever replaced by renaming."""
    (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)


RUNNABLE = [p for p in NAMES if runs_something(p)]


@pytest.mark.parametrize("page", [p for p in RUNNABLE if p not in SLOW_PAGES])
def test_a_page_runs_in_order(
    page: str, page_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(page, Shell(capsys, monkeypatch, NOT_RUN, {**PLANNED, **SHORT}, TYPED))


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE)
def test_a_page_runs_whole(
    page: str, page_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_a_cluster = {r" --on slurm ": "--plan"}
    _run(page, Shell(capsys, monkeypatch, NOT_RUN, without_a_cluster, TYPED))


def _run(page: str, shell: Shell) -> None:
    if not any("--output run.yaml" in c or c.startswith("penchant init") for b in blocks(page) for c in b.commands()):
        Path("run.yaml").write_text(page_file("README.md", "run.yaml"))
    shell.run(page)
