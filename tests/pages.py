"""Parse and run the fenced blocks of README.md and docs/, for the documentation's tests."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from penchant.cli import main

ROOT = Path(__file__).parents[1]
NAMES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.M | re.S)
FILE = re.compile(r"^# (\S+\.(?:yaml|yml|py|jsonl|csv))\b.*\n")
HEREDOC = re.compile(r"<<-?\s*'?(\w+)'?")
OPERATORS = {"|", "||", "&&", "&", ";"}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The name of the file that the block shows, if its first line names one."""
        found = FILE.match(self.text)
        return found[1] if found else None

    def commands(self) -> list[str]:
        """The commands of a shell block, without comments, with continued lines and here-documents joined."""
        found: list[str] = []
        lines = iter(self.text.replace("\\\n", " ").splitlines())
        for line in lines:
            command = re.sub(r"(^|\s+)#.*$", "", line).strip()
            ends = HEREDOC.search(command)
            if ends:
                body = []
                while not body or body[-1] != ends[1]:
                    body.append(next(lines))
                command = "\n".join([command, *body])
            if command:
                found.append(re.sub(r"^\.venv/bin/", "", command))
        return found

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """A page's fenced blocks, in order."""
    text = (ROOT / page).read_text()
    return [
        Block(page, text[: m.start()].count("\n") + 1, m[2], re.sub(rf"^{m[1]}", "", m[3], flags=re.M))
        for m in FENCE.finditer(text)
    ]


BLOCKS = [b for page in NAMES for b in blocks(page)]


def of(*languages: str) -> list[Block]:
    """All blocks of the given languages on all pages."""
    return [b for b in BLOCKS if b.language in languages]


def page_file(page: str, name: str) -> str:
    """The text of the block that shows this file."""
    return next(b.text for b in BLOCKS if b.page == page and b.file == name)


def words(command: str) -> list[str]:
    """Words and operators of a command line. Of a here-document, only the first line."""
    parts = shlex.shlex(command.split("\n")[0], posix=True, punctuation_chars=True)
    parts.whitespace_split = True
    return list(parts)


def simple_commands(command: str) -> list[list[str]]:
    """The commands joined by pipes, `&&` and so on, without leading assignments and redirections."""
    found: list[list[str]] = [[]]
    given = iter(words(command))
    for word in given:
        if word in OPERATORS:
            found.append([])
        elif word.startswith((">", "<")):
            next(given)
        elif found[-1] or not re.match(r"[A-Z_]+=", word):
            found[-1].append(word)
    return [c for c in found if c]


def free_port() -> int:
    """A local port that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Shell:
    """Runs a page's blocks in order in the current folder, with `penchant` in this process if possible.

    Args:
        capsys: to show errors. not_run: patterns of commands to skip. planned: ``{pattern of commands: words to append}``.
            typed: ``{pattern of commands: text to type into them}``. port: replaces 8000.
    """

    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    not_run: Mapping[str, str]
    planned: Mapping[str, str]
    typed: Mapping[str, str]
    port: int = 0
    ran: int = 0
    background: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, page: str) -> None:
        """Run the whole page, which must have ended its background processes."""
        self.port = free_port()
        try:
            every = blocks(page)
            for i, block in enumerate(every):
                self._block(block, [c for b in every[i:] if b.language == "sh" for c in b.commands()])
            assert all(p.poll() is not None for p in self.background), f"{page} leaves a process behind"
        finally:
            for process in self.background:
                process.kill()

    def _block(self, block: Block, to_come: list[str]) -> None:
        if block.file:
            Path(block.file).write_text(block.text)
            kind = next((k for k, key in (("sweep", "base:"), ("pipeline", "stages:")) if key in block.text), "train")
            if any(c.startswith(f"penchant {kind} {block.file}") for c in to_come):
                forget_output(block.text)
        elif block.language == "python":
            exec(compile(self._here(block.text), str(block), "exec"), {"__name__": "page"})
            self.ran += 1
        elif block.language == "sh":
            for command in block.commands():
                if not any(re.search(pattern, command, flags=re.M) for pattern in self.not_run):
                    self._command(block, self._here(command))
                    self.ran += 1

    def _here(self, text: str) -> str:
        return re.sub(r"\b8000\b", str(self.port), text)

    def _command(self, where: Block, command: str) -> None:
        parts = words(command)
        if parts[0] == "kill":
            self._kill(where, parts[1:])
        elif parts[0] == "penchant" and parts[-1] == "&":
            # not a fork: it would lack the OpenMP threads that an earlier test may have used, and wait for them forever
            self.background.append(subprocess.Popen([sys.executable, "-m", *parts[:-1]], env=_environment()))
        elif parts[0] == "penchant" and not OPERATORS & set(parts):
            self._penchant(where, command, parts[1:], self._typed(command))
        elif "| penchant " in command:
            first, rest = command.split("| penchant ", 1)
            self._penchant(where, command, shlex.split(rest), self._bash(where, first))
        elif parts[:2] == ["python", "-c"]:
            with redirect_stdout(io.StringIO()) as said:
                exec(parts[2], {"__name__": "page"})
            assert said.getvalue() in (ROOT / where.page).read_text(), f"{where}: the page shows something else"
        else:
            self._bash(where, command)

    def _typed(self, command: str) -> str:
        return next((text for pattern, text in self.typed.items() if re.search(pattern, command)), "")

    def _penchant(self, where: Block, command: str, arguments: list[str], typed: str) -> None:
        for pattern, more in self.planned.items():
            if re.search(pattern, command):
                arguments = [*arguments, *(m for m in more.split() if m not in arguments)]
        self.monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        code = main(arguments)
        assert code == 0, f"{where}: {command}\n{self.capsys.readouterr().err}"
        if arguments[0] == "init":
            forget_output(
                Path(arguments[arguments.index("--output") + 1] if "--output" in arguments else "run.yaml").read_text()
            )

    def _bash(self, where: Block, command: str) -> str:
        parts = words(command)
        if parts[0] == "python" and (ROOT / parts[1]).exists():
            command = f"cd {shlex.quote(str(ROOT))} && {command}"  # a script in the repository
        done = subprocess.run(["bash", "-c", command], env=_environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{where}: {command}\n{done.stderr}"
        return done.stdout

    def _kill(self, where: Block, names: list[str]) -> None:
        for name in names:
            process = self.background[int(name.removeprefix("%")) - 1]
            process.terminate()
            assert process.wait(120) == 0, f"{where}: kill {name}"


def forget_output(config: str) -> None:
    """Remove a stand-in for the run that a config of the page creates itself."""
    for made in re.findall(r"^output: ([^\s#]+)", config, flags=re.M):
        shutil.rmtree(made, ignore_errors=True)


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PATH": path}


def runs_something(page: str) -> bool:
    """Whether a page has a block that can be run."""
    return any(b.language in ("sh", "python") for b in blocks(page))
