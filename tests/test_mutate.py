"""tools/mutate.py: its table matches the current source, and it distinguishes killed mutations from surviving ones."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "tools" / "mutate.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["mutate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutate = _load()


def test_every_text_stands_once_in_its_file() -> None:
    table = mutate.read_table()
    assert len(table) >= 50 and len({m.name for m in table}) == len(table)
    assert [f"{m.name}: {problem}" for m in table if (problem := m.problem(ROOT)) is not None] == []
    assert [m.name for m in table if m.old == m.new or not m.why] == []


def test_every_test_of_the_table_is_there() -> None:
    missing = []
    for mutation in mutate.read_table():
        for test in mutation.paths():
            file, _, name = test.partition("::")
            path = ROOT / file
            if not path.exists() or (name and f"def {name}(" not in path.read_text(encoding="utf-8")):
                missing.append(f"{mutation.name}: {test}")
    assert missing == []


def _repository(folder: Path) -> Path:
    """A repository with two functions and a test of one of them."""
    for name, text in {
        "src/penchant/__init__.py": "",
        "src/penchant/sums.py": "def total(a, b):\n    return a + b\n\n\ndef unused():\n    return 1\n",
        "tests/test_sums.py": "from penchant.sums import total\n\n\ndef test_total():\n    assert total(1, 2) == 3\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


KILLED = mutate.Mutation("sign", "sums.py", "a + b", "a - b", "a sum", "test_sums.py")
SURVIVED = mutate.Mutation("unused", "sums.py", "return 1", "return 2", "nothing", "test_sums.py")


def test_a_change_that_a_test_notices_is_killed_and_another_survives(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    root = _repository(tmp_path / "root")
    before = (root / "src/penchant/sums.py").read_text()
    assert mutate.run([KILLED, SURVIVED], root, options=mutate.options_of(["--no-check", "--fresh"])) == 1
    out = capfd.readouterr().out
    assert "by tests/test_sums.py::test_total" in out and "2 mutations: 1 killed, 1 survived" in out
    assert (root / "src/penchant/sums.py").read_text() == before  # the working tree is never touched


def test_a_run_goes_on_behind_what_its_log_has_settled(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, options = _repository(tmp_path / "root"), mutate.options_of(["--no-check", "--log", str(tmp_path / "log")])
    codes = iter([1, 0, 0])
    monkeypatch.setattr(mutate, "run_tests", lambda *_, **__: (next(codes), ""))
    assert mutate.run([KILLED, SURVIVED], root, options=options) == 1
    capfd.readouterr()
    assert mutate.run([KILLED, SURVIVED], root, options=options) == 1  # surviving mutations are tried again
    assert "1 mutations: 0 killed, 1 survived" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("mutation", "pytest_code", "code", "said"),
    [
        (KILLED, 1, 0, "1 killed, 0 survived"),
        (KILLED, None, 0, "1 killed, 0 survived"),  # a timeout
        (replace(SURVIVED, accepted="nobody calls it"), 0, 0, "0 survived, 1 accepted"),
        (replace(KILLED, accepted="no reason"), 1, 0, "sign is killed now"),
        (replace(KILLED, old="a * b"), 1, 1, "1 not applicable"),
        (KILLED, 2, 1, "1 broken"),  # an error before any test ran
    ],
)
def test_what_becomes_of_a_mutation(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    mutation: Any,
    pytest_code: int | None,
    code: int,
    said: str,
) -> None:
    monkeypatch.setattr(mutate, "run_tests", lambda *_, **__: (pytest_code, ""))
    root = _repository(tmp_path / "root")
    assert mutate.run([mutation], root, options=mutate.options_of(["--no-check"])) == code
    assert said in capfd.readouterr().out


def test_nothing_is_tried_where_the_tests_fail_anyway(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutate, "run_tests", lambda *_, **__: (1, ""))
    assert mutate.run([KILLED], _repository(tmp_path / "root"), options=mutate.options_of([])) == 1
    assert "killed" not in capfd.readouterr().out


def test_mutations_are_chosen_by_name_and_file(capfd: pytest.CaptureFixture[str]) -> None:
    table = mutate.read_table()
    assert [m.name for m in mutate.chosen(table, ["k3-sign"])] == ["k3-sign"]
    assert {m.file for m in mutate.chosen(table, ["resume-*"], "training/loop")} == {"training/loop.py"}
    assert mutate.main(["no-such-mutation"]) == 2
    assert mutate.main(["--list", "k3-*"]) == 0 and "k3-sign" in capfd.readouterr().out
