"""Untrusted names, messages and files never reach a terminal unescaped, and no command overwrites its input."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import polite_rows

from penchant import api
from penchant.base.files import FIGURES, check_output
from penchant.base.text import Shown, for_terminal, printable
from penchant.cli import main
from penchant.errors import ConfigError, PenchantError
from penchant.requests import EvalRequest

EVIL = "a\x1b[31mb\x1b]0;t\x07c\u202ed\x9b31m\u2066e\u200ff\x7f\x00g"
SECRETS = "https://user:pass@host/x sk-abcdefghijklmnop1234 hf_abcdefghijklmnopqrst"


def _safe(text: str) -> bool:
    return all(c in "\n\t" or c.isprintable() for c in text)


def test_what_is_printed_is_printable_and_hides_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "open-sesame-1")
    monkeypatch.setenv("MAX_TOKENS", "1000000")  # a number, not a secret
    out = io.StringIO()
    print(f"{EVIL}\n\tto {SECRETS} open-sesame-1 1000000 日本語\u3000é", file=Shown(out))
    said = out.getvalue()
    assert _safe(said.replace("\u3000", "")) and said.endswith("1000000 日本語\u3000é\n") and "\n\tto " in said
    assert not re.search("user|pass|sk-abc|hf_abc|sesame", said)


@pytest.mark.parametrize("secret", [*SECRETS.split()[1:], "Bearer abcdefghijk1", "token=abcdefgh"])
@pytest.mark.parametrize("before", ["\n", "\x1b", "\u2066", "\x07", "\U000e0001", "\\n"])
def test_a_secret_behind_an_escape_is_hidden(before: str, secret: str) -> None:
    for text in (f"a{before}{secret}", repr(f"a{before}{secret}"), json.dumps([f"a{before}{secret}"])):
        assert secret[-7:] not in for_terminal(text), text


def test_what_is_escaped_in_json_is_the_same_json() -> None:
    value = {"a": "\x7f\x9b\u202e\u2028\U000e0001 \u00a0", "b": "é\x1b"}
    assert json.loads(for_terminal(json.dumps(value, ensure_ascii=False, indent=1))) == value
    assert printable("\x1b\n") == "\\x1b\\n"


def test_an_encoding_that_lacks_letters_is_no_traceback() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print("é 日", file=Shown(stream))
    stream.flush()
    assert raw.getvalue() == b"\\xe9 \\u65e5\n"


@pytest.mark.parametrize(
    "command",
    [
        ["report", "PATH"],
        ["flags", "PATH"],
        ["watch", "--once", "PATH"],
        ["compare", "PATH"],
        ["export", "PATH", "--to", "pt"],
        ["data", "show", "PATH"],
        ["data", "audit", "PATH"],
        ["data", "fix", "PATH", "out.jsonl"],
        ["import", "PATH"],
        ["track", "PATH", "--to", "tensorboard"],
        ["config", "PATH"],
        ["losses", "PATH"],
        ["plan", "PATH"],
        ["PATH"],
        ["train", "run.yaml", "PATH"],
    ],
    ids=lambda c: " ".join(c),
)
def test_no_command_lets_escapes_through(command: list[str], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    evil = EVIL.replace("\x00", "") + " https://user:pass@host"
    try:
        assert main([evil if part == "PATH" else part for part in command]) == 2
    except SystemExit as stop:
        assert stop.code == 2
    said = "".join(capsys.readouterr())
    assert said and _safe(said) and "user:pass" not in said


def test_texts_of_rows_do_not_reach_the_terminal_as_they_are(tmp_path: Path, capsys: Any) -> None:
    rows = [{"prompt": EVIL, "chosen": f"{EVIL}1", "rejected": "b"}, *polite_rows(3)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for more in ([], ["--json"]):
        assert main(["data", "show", str(file), *more]) == 0
        assert _safe(capsys.readouterr().out)


def test_a_long_path_is_a_sentence(capsys: Any) -> None:
    for path in ("a" * 5000, "a/" * 3000):
        for command in (["report", path], ["data", "show", path], ["plan", f"{path}.yaml"], ["flags", path]):
            assert main(command) in (2, 5)
            assert "Traceback" not in capsys.readouterr().err


# ---- outputs ----


@pytest.mark.parametrize("how", ["itself", "link", "hard link", "relative"])
def test_no_output_is_an_input(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, output = tmp_path / "data.jsonl", tmp_path / "other.json"
    data.write_text("{}\n")
    if how == "link":
        output.symlink_to(data)
    elif how == "hard link":
        os.link(data, output)
    name = {"itself": str(data), "relative": "./data.jsonl"}.get(how, str(output))
    for asked in ({"data": str(data)}, {"text": str(data), "data": None}):
        for flag in ("output", "samples_output"):
            more = {"generate": 1} if flag == "samples_output" else {}
            with pytest.raises(ConfigError, match="is what this command reads"):
                EvalRequest(**{flag: name}, **more, **asked).check()
    for flag in ("--json", "--html"):
        assert main(["data", "audit", str(data), flag, name]) == 2
    assert main(["import", str(data), "--output", name, "--force"]) == 2
    assert data.read_text() == "{}\n"


def test_what_another_wrote_is_not_written_over(tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{"a": 1}')
    for file in (mine, tmp_path):
        if file.is_file():
            with pytest.raises(ConfigError, match="already exists"):
                check_output(file, FIGURES)
    mine.write_text('{\n "time": "2026-01-01"')
    assert check_output(mine, FIGURES) == mine
    mine.write_text("")
    assert check_output(mine, FIGURES) == mine


def test_a_report_is_written_over_a_report_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 0.5}\n')
    for name in ("metrics.jsonl", "thesis.html"):
        file = run / name
        file.write_text(file.read_text() if file.exists() else "<html>mine</html>")
        before = file.read_text()
        with pytest.raises(PenchantError, match="already exists"):
            api.report(run, output=file)
        assert file.read_text() == before
    page = api.report(run)
    assert api.report(run, output=page) == page  # its own report may be overwritten
