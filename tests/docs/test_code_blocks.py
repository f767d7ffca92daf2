"""Every fenced block of README.md and docs/ is run, loaded or checked, page by page in order, with stand-ins for data and models.

A block that begins with `# NAME.yaml` or `# NAME.py` is that file. Model names of the hub are folders with a tiny model here, so what is shown runs as it is shown.
What is not run stands in NOT_RUN with its reason, and is still checked: a command's arguments are parsed, files of the repository exist.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.cli import build_parser, main
from penchant.config import load_config, parse_yaml
from penchant.importing import import_config
from penchant.pipeline import load_pipeline
from penchant.sweep import load_sweep

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.M | re.S)
FILE = re.compile(r"^# (\S+\.(?:yaml|yml|py|jsonl|csv))\b.*\n")

CHECKED = {"sh", "yaml", "json", "python", "math"}  # how each is checked: below
OUTPUT = {"", "text"}  # what a command printed, or a formula in plain letters: nothing to run

# a line of a shell block that is not run: why
NOT_RUN = {
    r"^make ": "minutes long, or installs; `make demo` is tests/test_demo.py",
    r"^docker ": "needs a container engine; tests/docs/test_docker.py checks the files",
    r"^(python -m )?pip install ": "needs the network",
    r"--judge http": "needs a model behind an endpoint; tests/judges/ has one on this machine",
    r" --jobs \d": "starts processes, each importing torch; tests/test_sweep.py does",
}
# a line that is only planned in the default suite, as it trains many runs: what is put behind it
PLANNED = {r"^penchant sweep ": " --plan", r"^penchant pipeline .*(?=stages\.|pipeline\.yaml)": " --plan"}
# pages that train the bundled model or wait for many runs: in `make test-all`
SLOW_PAGES = {"docs/tutorial.md"}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that the block is, if it says so."""
        found = FILE.match(self.text)
        return found[1] if found else None

    def commands(self) -> list[str]:
        """The lines of a shell block, comments off, in one form for `penchant`."""
        lines = [re.sub(r"\s+#.*$", "", s).strip() for s in self.text.replace("\\\n", " ").splitlines()]
        return [re.sub(r"^\.venv/bin/", "", s) for s in lines if s and not s.startswith("#")]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def _blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    return [
        Block(page, text[: m.start()].count("\n") + 1, m[2], re.sub(rf"^{m[1]}", "", m[3], flags=re.M))
        for m in FENCE.finditer(text)
    ]


BLOCKS = [b for page in PAGES for b in _blocks(page)]


def _of(*languages: str) -> list[Block]:
    return [b for b in BLOCKS if b.language in languages]


def test_no_kind_of_block_is_unaccounted_for() -> None:
    strange = [f"{b}: ```{b.language}" for b in BLOCKS if b.language not in CHECKED | OUTPUT]
    assert not strange, f"say here how these are checked: {strange}"
    for page in PAGES:
        assert len(re.findall(r"^ *```", (ROOT / page).read_text(), flags=re.M)) == 2 * len(_blocks(page)), page
    assert len(_of("sh")) > 20 and len(_of("yaml")) > 20


# ---------------------------------------------------------------------------------------------------------------------
# yaml, json, math


@pytest.fixture(scope="module")
def shown_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's run.yaml, which other pages build on."""
    folder = tmp_path_factory.mktemp("shown")
    (folder / "run.yaml").write_text(next(b.text for b in BLOCKS if b.page == "README.md" and b.file == "run.yaml"))
    return folder


@pytest.mark.parametrize("block", _of("yaml"), ids=str)
def test_yaml_is_a_config(block: Block, shown_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's, a pipeline's or a sweep's, another tool's that the importer reads, or sections of a run's."""
    monkeypatch.chdir(shown_files)
    values, _ = parse_yaml(block.text, str(block))
    assert isinstance(values, dict)
    path = shown_files / "block.yaml"
    path.write_text(block.text)
    if "stages" in values:
        load_pipeline(path)
    elif "base" in values:
        load_sweep(path)
    elif "model_name_or_path" in values:
        assert import_config(path, method="dpo").yaml
    else:
        base = {"model": "{path: m}", "data": "{path: d.jsonl}", "output": "o"}
        if "reward" in values and "algorithm" not in values:
            base["algorithm"] = "rloo"
        path.write_text("".join(f"{k}: {v}\n" for k, v in base.items() if k not in values) + block.text)
        load_config(path)


def test_settings_in_tables_are_configs(tmp_path: Path) -> None:
    sections = re.findall(r"^\| [^|]*\| `((?:loss|reference): \{.*?\})`", (ROOT / "README.md").read_text(), flags=re.M)
    assert len(sections) == 5
    for section in sections:
        (tmp_path / "run.yaml").write_text(f"model: {{path: m}}\ndata: {{path: d}}\noutput: o\n{section}\n")
        load_config(tmp_path / "run.yaml")


def test_json_parses() -> None:
    for block in _of("json"):
        json.loads(block.text)


@pytest.mark.parametrize("block", _of("math"), ids=str)
def test_math_becomes_mathml(block: Block) -> None:
    convert = pytest.importorskip("latex2mathml.converter").convert
    made = convert(block.text.strip(), display="block")
    assert made.startswith("<math") and "\\" not in re.sub(r"&#x0005C;", "", made), made


# ---------------------------------------------------------------------------------------------------------------------
# sh, python


@pytest.mark.parametrize("block", _of("sh"), ids=str)
def test_every_command_is_one(block: Block) -> None:
    """Arguments are what the command takes, make's targets and the repository's files are there."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert block.commands()
    for command in block.commands():
        first, *rest = shlex.split(command)
        if first == "penchant":
            args, left = build_parser().parse_known_args(rest)
            assert args.command is not None
            assert all("=" in r and not r.startswith("-") for r in left), f"{block}: {command}"
        elif first == "make":
            assert set(rest) <= targets, f"{block}: {command}"
        else:
            assert first in {"python", "docker", "pip", "ln", "cd", "git"}, (
                f"{block}: say here how `{first}` is checked"
            )
        for word in rest:
            if word.startswith(("recipes/", "benchmarks/", "docker/", "scripts/")):
                assert (ROOT / word).exists(), f"{block}: {word}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, models and finished runs under the names that the pages use."""
    folder = tmp_path_factory.mktemp("world")
    old = Path.cwd()
    os.chdir(folder)
    try:
        rows = polite_rows(120)  # README holds a hundred of them out
        for name, part in {"train": rows, "test": polite_rows(132)[120:]}.items():
            write_jsonl(folder / f"{name}.jsonl", part)
        write_jsonl(folder / "prompts.jsonl", [{"prompt": r["prompt"]} for r in rows])
        (folder / "book.txt").write_text("It was a dark night.\n\nThen it was day.\n")
        (folder / "HuggingFaceTB").mkdir()
        start = tiny_model_folder(folder / "base")
        config = json.loads((folder / "base/config.json").read_text())
        config["max_position_embeddings"] = (
            2048  # the default data.max_length fits, as it does in the models that the pages name
        )
        (folder / "base/config.json").write_text(json.dumps(config))
        for name in ("tuned", "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"):
            shutil.copytree(start, folder / name)
        _runs(start)
    finally:
        os.chdir(old)
    return folder


def _runs(start: str) -> None:
    small = [
        "train.max_steps=1",
        "data.max_length=128",
        "evaluation.samples=0",
        "evaluation.kl_prompts=2",
        "evaluation.sample_tokens=4",
    ]
    base = {"model": {"path": start}, "data": {"path": "train.jsonl", "validation_rows": 8}, "train": {"batch_size": 8}}
    online = {"algorithm": {"name": "ppo", "max_new_tokens": 4}, "reward": "words"}
    for name, more in {
        "first": {}, "second": {"loss": "ipo"}, "dpo": {}, "dpo-seed-1": {"train": {"batch_size": 8, "seed": 1}}, "reward": {"algorithm": "reward_model"},
        "ppo": online, "ppo-seed-1": {**online, "train": {"batch_size": 8, "seed": 1}}, "lora": {"lora": {"r": 2}},
    }.items():  # fmt: skip
        made = {**base, **more, "output": f"runs/{name}"}
        if name == "lora":
            made["output"] = "lora-run"
        result = api.train(made, *small, quiet=True)
        if name == "lora":
            shutil.copytree(result.model, "adapters/polite")
    sweep = {"output": "runs/sweep", "base": {**base, "evaluation": {"samples": 0}}, "grid": {"loss.beta": [0.1, 0.3]}}
    Path("world_sweep.yaml").write_text(json.dumps(sweep))
    api.sweep("world_sweep.yaml", *small, quiet=True)
    api.compare("runs/dpo", "runs/ppo", prompts=4, max_new_tokens=4, output="runs/compare-dpo-ppo", quiet=True)


@pytest.fixture
def page_folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world; data and rows are small, so lengths and lr need no change."""
    folder = tmp_path / "page"
    shutil.copytree(world, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "cache"))
    return folder


RUNNABLE = [p for p in PAGES if any(b.page == p and b.language in ("sh", "python") for b in BLOCKS)]


@pytest.mark.parametrize("page", [p for p in RUNNABLE if p not in SLOW_PAGES])
def test_a_page_runs_in_order(page: str, page_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run_page(page, capsys, plan=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE)
def test_a_page_runs_whole(page: str, page_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run_page(page, capsys, plan=False)


def _run_page(page: str, capsys: pytest.CaptureFixture[str], *, plan: bool) -> None:
    blocks = _blocks(page)
    for block in (b for b in blocks if b.file):
        Path(str(block.file)).write_text(block.text)
        for made in re.findall(r"^output: ([^\s#]+)", block.text, flags=re.M):
            shutil.rmtree(made, ignore_errors=True)  # the page makes it itself
    if not Path("run.yaml").exists() and not any("--output run.yaml" in b.text for b in blocks):
        Path("run.yaml").write_text(next(b.text for b in BLOCKS if b.page == "README.md" and b.file == "run.yaml"))
    for where, command in _steps(blocks):
        if command is None:
            exec(compile(where.text, str(where), "exec"), {"__name__": "page"})
        elif not any(re.search(pattern, command) for pattern in NOT_RUN):
            _run(where, command, capsys, plan)


def _steps(blocks: list[Block]) -> Iterator[tuple[Block, str | None]]:
    for block in blocks:
        if block.language == "sh":
            yield from ((block, command) for command in block.commands())
        elif block.language == "python" and not block.file:
            yield block, None


def _run(where: Block, command: str, capsys: pytest.CaptureFixture[str], plan: bool) -> None:
    words = shlex.split(command)
    if words[0] == "penchant":
        for pattern, more in PLANNED.items():
            if plan and re.search(pattern, command) and more.strip() not in words:
                words += shlex.split(more)
        code = main(words[1:])
        assert code == 0, f"{where}: {command}\n{capsys.readouterr().err}"
        return
    if words[0] == "python" and (ROOT / words[1]).exists():
        command = f"cd {shlex.quote(str(ROOT))} && {command}"  # a script of the repository
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{where}: {command}\n{done.stderr}"
