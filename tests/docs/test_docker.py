"""The Dockerfiles are linted, their steps match the script, and the files they copy exist."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docker_{name}", ROOT / f"docker/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check, dependencies = _module("check"), _module("dependencies")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_linter_finds_nothing(file: Path) -> None:
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([linter, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_steps_are_what_they_should_be(file: Path) -> None:
    steps = check.steps(file.read_text(), {"TORCH_INDEX": "https://index"}, "/usr/bin")
    copied = [s for s in steps if s.name == "COPY"]
    for step in copied:
        for source in step.text.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source.rstrip('/')}" in (ROOT / ".dockerignore").read_text().split(), (
                f"{source} does not reach the builder"
            )
    runs = [check.command(s) for s in steps if s.name == "RUN"]
    assert not any(r.startswith("--") for r in runs) and any("-r requirements.txt" in r for r in runs)
    last = steps[-1]
    assert last.user == "1000:1000" and last.folder == "/workspace"
    assert last.env["PATH"] == "/opt/penchant/bin:/usr/bin" and last.env["TORCH_INDEX"] == "https://index"
    assert next(s.text for s in steps if s.name == "ENTRYPOINT") == '["penchant"]'
    assert [s.text for s in copied][-1] == "src src"  # the source is the last layer


def test_both_files_differ_only_where_they_must() -> None:
    def runs(name: str) -> list[str]:
        return [
            s.text
            for s in check.steps((ROOT / f"docker/{name}.Dockerfile").read_text(), {}, "")
            if s.name in ("RUN", "COPY", "USER", "WORKDIR")
        ]

    compiler, *cuda = runs("cuda")  # Triton compiles its launcher with it
    assert compiler.startswith("apt-get update") and "gcc" in compiler and cuda == runs("cpu")


def test_the_dependencies_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    assert dependencies.dependencies(text, []) == project["dependencies"]
    assert dependencies.dependencies(text, ["eval"])[-2:] == project["optional-dependencies"]["eval"]
    with pytest.raises(KeyError):
        dependencies.dependencies(text, ["gone"])


def test_a_dockerfile_is_read_line_by_line() -> None:
    text = "FROM a\n# note\nENV A=1 \\\n    B=$A/${A}x\nARG C=4\nWORKDIR /w\nRUN --mount=type=cache,target=/x make \\\n    all\n"
    steps = check.steps(text, {"C": "5"}, "/bin")
    assert [(s.line, s.name) for s in steps] == [(1, "FROM"), (3, "ENV"), (5, "ARG"), (6, "WORKDIR"), (7, "RUN")]
    assert check.command(steps[-1]) == "make all"
    assert steps[-1].env == {"PATH": "/bin", "A": "1", "B": "/x", "C": "5"} and steps[-1].folder == "/w"
    with pytest.raises(ValueError, match="line 1: HEALTHCHECK"):
        check.steps("HEALTHCHECK true\n", {}, "")
