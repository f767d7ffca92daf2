"""Tests of tests/pages.py, which parses and runs the documentation's blocks, on made-up blocks."""

from __future__ import annotations

from pathlib import Path

import pages
import pytest
from pages import Block, Shell, simple_commands


def _block(text: str, language: str = "sh") -> Block:
    return Block("made.md", 1, language, text)


def test_a_shell_block_is_taken_apart_into_commands() -> None:
    text = "# a remark\n.venv/bin/penchant train \\\n  run.yaml   # on\n\ncat > a.py <<'END'\n# not a remark\nx = 1\nEND\nls\n"
    assert _block(text).commands() == [
        "penchant train    run.yaml",
        "cat > a.py <<'END'\n# not a remark\nx = 1\nEND",
        "ls",
    ]


@pytest.mark.parametrize(
    "command,simple",
    [
        ("KEY=1 penchant serve a --port 0 &", [["penchant", "serve", "a", "--port", "0"]]),
        ("printf 'a | b' | penchant chat a > out.txt", [["printf", "a | b"], ["penchant", "chat", "a"]]),
        ("cd a && ls || true", [["cd", "a"], ["ls"], ["true"]]),
        ("cat > a.txt <<END\nls | wc\nEND", [["cat"]]),
        ("penchant train 'a=[b, c]' d=e", [["penchant", "train", "a=[b, c]", "d=e"]]),
    ],
)
def test_a_command_is_taken_apart(command: str, simple: list[list[str]]) -> None:
    assert simple_commands(command) == simple


@pytest.fixture
def shell(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Shell:
    monkeypatch.chdir(tmp_path_factory.mktemp("page"))
    return Shell(capsys, monkeypatch, {"^never ": "here"}, {}, {})


def _page(monkeypatch: pytest.MonkeyPatch, *made: Block) -> str:
    monkeypatch.setattr(pages, "blocks", lambda page: list(made))
    return "made.md"


def test_blocks_run_in_order_and_see_what_came_before(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _block("cat > a.txt <<END\n1\nEND\nnever run this\nprintf 2 >> a.txt\n")
    second = _block("assert open('a.txt').read() == '1\\n2'\nopen('b.txt', 'w').write('8000')\n", "python")
    shell.run(_page(monkeypatch, first, second))
    assert shell.ran == 3
    assert Path("b.txt").read_text() == str(shell.port) != "8000"


@pytest.mark.parametrize(
    "block,what",
    [
        (_block("penchant losses nosuch\n"), "made.md:1: penchant losses nosuch"),
        (_block("false\n"), "made.md:1: false"),
        (_block("assert 1 == 2\n", "python"), "1 == 2"),
    ],
    ids=["penchant", "bash", "python"],
)
def test_what_fails_fails(shell: Shell, monkeypatch: pytest.MonkeyPatch, block: Block, what: str) -> None:
    with pytest.raises(AssertionError) as caught:
        shell.run(_page(monkeypatch, block))
    assert what in str(caught.value) or block.language == "python"


def test_a_process_that_is_left_behind_is_told_and_ended(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    page = _page(monkeypatch, _block("penchant serve nothing-here &\n"))
    with pytest.raises(AssertionError, match="leaves a process behind"):
        shell.run(page)
    (process,) = shell.background
    assert process.wait(120) != 0
