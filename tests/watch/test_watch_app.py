"""The `watch` command: frames, keys, signals, messages if there is nothing to show, and that it never changes a run."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from run_folders import lines, make_run, perf_rows, train_rows

from penchant.cli import main
from penchant.runfolder import RunLock

COMMAND = [sys.executable, "-m", "penchant", "watch"]


def tree(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_one_frame_where_the_output_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run", 8)
    before = tree(tmp_path)
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setenv("LINES", "31")
    assert main(["watch", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "step 8/20" in said and "\x1b" not in said
    assert len(said.splitlines()) <= 30 and max(map(len, said.splitlines())) <= 90
    assert tree(tmp_path) == before
    assert main(["watch", "--once", str(folder), str(folder)]) == 0
    assert "2 runs: 2 interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,expected",
    [
        (["rnu"], "rnu: no such folder yet; there is {0}/run; give a run's folder"),
        (["empty"], "empty: no run in this folder yet; give a run's folder"),
        (["run/metrics.jsonl"], "metrics.jsonl: is a file; give the folder that its `output` names"),
        (["run", "--interval", "0"], "--interval: is 0; give seconds above 0"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    make_run(tmp_path / "run", 8)
    (tmp_path / "empty").mkdir()
    assert main(["watch", str(tmp_path / arguments[0]), *arguments[1:]]) == 2
    assert expected.format(tmp_path) in capsys.readouterr().err


def test_it_starts_without_torch_and_says_characters_that_the_output_knows(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "日本", 8)
    script = "import sys; from penchant.cli import main; main(sys.argv[1:]); print(*sys.modules)"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script, "watch", str(folder)], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "??" in done.stdout.splitlines()[0] and "step 8/20" in done.stdout
    assert not {"torch", "transformers", "numpy", "pydantic"} & set(done.stdout.splitlines()[-1].split())


def test_a_reader_that_has_left_is_no_failure(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [*COMMAND, str(make_run(tmp_path / "run", 8))]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


class Terminal:
    """`penchant watch` in a terminal of 80 by 24."""

    def __init__(self, *arguments: str, **env: str) -> None:
        self.master, slave = pty.openpty()
        env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", "PYTHONUTF8": "1", **env}
        self.process = subprocess.Popen(
            [*COMMAND, *arguments, "--interval", "0.2"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            start_new_session=True,
            # a suite in the background ignores SIGINT and its children would inherit that, unlike a terminal's
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(slave)
        self.said = ""

    def wait_for(self, text: str, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while text not in self.said:
            assert time.monotonic() < end, f"{text!r} was not said in\n{self.said[-3000:]}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.said += self._read()

    def _read(self) -> str:
        try:
            return os.read(self.master, 65536).decode(errors="replace")
        except OSError:  # the other end is closed
            return ""

    def close(self, seconds: float = 120.0) -> int:
        """Wait for its end, read its remaining output, and return its exit code."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it goes on\n{self.said[-3000:]}"
            if select.select([self.master], [], [], 0.05)[0]:
                self.said += self._read()
        while select.select([self.master], [], [], 0)[0] and (more := self._read()):
            self.said += more
        return self.process.returncode


@contextmanager
def terminal(*arguments: str, **env: str) -> Iterator[Terminal]:
    made = Terminal(*arguments, **env)
    try:
        yield made
    finally:
        made.process.kill()
        os.close(made.master)


def test_a_run_that_comes_and_goes_on_until_q(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with terminal(str(folder), NO_COLOR="1", COLUMNS="400") as shown:  # wide enough for any path
        shown.wait_for("folder yet")
        make_run(folder, 8)
        with RunLock(folder):
            shown.wait_for("step 8/20")
            with (folder / "metrics.jsonl").open("a") as out, (folder / "perf.jsonl").open("a") as perf:
                out.write(lines(train_rows(9, 9)))
                perf.write(lines(perf_rows(9, 9)))
            shown.wait_for("step 9/20")
            shown.wait_for(", 22s left")
            before = tree(folder)
            time.sleep(0.5)
            assert tree(folder) == before
        os.write(shown.master, b"xq")
        assert shown.close() == 0
        assert shown.said.count("\x1b[?1049h") == shown.said.count("\x1b[?1049l") == 1  # the screen is restored
        assert "━━━" in shown.said and any(0x2800 < ord(c) < 0x2900 for c in shown.said)
        assert not [c for c in ("\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[36m", "\x1b[1;36m") if c in shown.said]


@pytest.mark.parametrize("how", ["ctrl-c", "term"])
def test_it_leaves_cleanly(tmp_path: Path, how: str) -> None:
    make_run(tmp_path / "runs/a", 8)
    make_run(tmp_path / "runs/b", 20, status="finished", total_steps=20)
    with terminal(str(tmp_path / "runs")) as shown:
        shown.wait_for("2 runs: 1 interrupted, 1 finished")
        os.write(shown.master, b"n")
        shown.wait_for("its process died")
        os.write(shown.master, b"p")
        if how == "term":
            shown.process.send_signal(signal.SIGTERM)
        else:
            os.killpg(shown.process.pid, signal.SIGINT)
        assert shown.close() == 0 and "Traceback" not in shown.said and shown.said.count("\x1b[?1049l") == 1


def test_a_folder_that_turns_out_to_be_a_sweep(tmp_path: Path) -> None:
    with terminal(str(tmp_path / "sweep"), COLUMNS="400") as shown:
        shown.wait_for("folder yet")
        make_run(tmp_path / "aside/a", 8)
        (tmp_path / "aside/sweep.json").write_text(json.dumps({"runs": {"a": {"state": "running"}}}))
        os.rename(tmp_path / "aside", tmp_path / "sweep")
        shown.wait_for("1 run: 1 interrupted")
        os.write(shown.master, b"q")
        assert shown.close() == 0
