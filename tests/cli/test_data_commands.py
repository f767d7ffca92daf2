"""`penchant data audit` and `penchant data fix` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from audit_rows import pair, planted, write

from penchant.cli import main
from penchant.data.load import load_preferences
from penchant.errors import DataError


def test_several_files_are_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").mkdir()
    a, b = write(tmp_path / "a.jsonl", planted()), write(tmp_path / "x" / "a.jsonl", [pair(0)])
    assert main(["data", "audit", str(a), str(b), "--no-languages", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert found["leakage_a.jsonl_a.jsonl_(2)"]["count"] == 1 and found["duplicates"]["count"] == 2


def test_reward_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", planted())
    (tmp_path / "mine.py").write_text("def long(texts):\n    return [len(t) > 270 for t in texts]\n")
    assert main(["data", "audit", str(path), "--reward", "words", "--check", f"{tmp_path}/mine.py:long"]) == 0
    said = capsys.readouterr().out
    assert "label noise: words prefers the rejected answer" in said and "texts of which long says yes" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data", "audit"], "no file is given"),
        (["data", "audit", "nowhere.jsonl"], "no such file"),
        (["data", "audit", "--split", "train"], "names no split"),
        (["data", "audit", "FILE", "--check", "toxic"], "names no function"),
        (["data", "audit", "FILE", "--reward", "nonsense"], "is not a reward"),
        (["data", "audit", "run.yaml", "--limit", "3"], "goes with data files"),
        (["data", "audit", "run.yaml", "--limit", "0"], "goes with data files"),
        (["data", "audit", "run.yaml", "--shape", "pairs"], "goes with data files"),
        (["data", "audit", "run.yaml", "--workers", "2"], "goes with data files"),
        (["data", "audit", "FILE", "--limit", "-1"], "give 1 or more"),
        (["data", "audit", "FILE", "--json", "a.jsonl/x.json"], "cannot be written"),
        (["data", "audit", "FILE", "--html", "a.jsonl/x.html"], "cannot be written"),
        (["data", "get", "FILE", "--set", "margin=[1"], "is not YAML"),
        (["data", "fix", "FILE", "FILE"], "is an input"),
        (["data", "fix", "FILE", "out.txt"], "the copy is JSONL"),
        (["data", "fix", "FILE", "out.jsonl", "--drop", "nonsense"], "is not a rule"),
    ],
)
def test_mistakes_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.jsonl", [pair(0)])
    assert main([str(path) if a == "FILE" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_fix_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = write(tmp_path / "a.jsonl", planted()), tmp_path / "b.jsonl"
    assert (
        main(["data", "fix", str(source), str(output), "--drop", "cycles,near_duplicates", "--keep", "empty,bad_rows"])
        == 0
    )
    said = capsys.readouterr().out
    assert "20 rows = 13 written (0 of them changed) + 7 dropped" in said
    assert main(["data", "fix", str(source), str(output), "--redact", "pii", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["redacted"] == {"email": 1}


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["data", "show", "FILE"], "--shape"),
        (["data", "audit", "FILE"], "--shape"),
        (["data", "fix", "FILE", "out.jsonl"], "--shape"),
        (["data", "get", "mine", "--from", "FILE"], "--layout"),
        (["data", "audit", "run.yaml"], "data.shape"),
    ],
)
def test_errors_name_what_can_be_set_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str], option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(write(tmp_path / "a.jsonl", [{"q": f"q{i}", "my plus": "a", "minus": "b"} for i in range(6)]))
    config = {"model": {"path": "."}, "data": {"path": path}, "loss": {"name": "dpo"}, "output": "run"}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert main([path if part == "FILE" else part for part in command]) == 2
    error = capsys.readouterr().err
    assert option in error and {"--shape", "--layout", "data.shape"} & set(error.split()) == {option}
    mapped = ("--column prompt=q --column chosen='my plus'" in error, "data.columns={prompt: q" in error)
    assert mapped == (option[0] == "-", option[0] == "d")
    with pytest.raises(DataError, match=r"data\.columns=\{prompt: q.*data\.shape"):  # as in Python and in the studio
        load_preferences(path)


NAMED = ["--column", "prompt=q", "--column", "chosen=plus", "--column", "rejected=minus"]


def test_columns_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same option for every command that reads rows. Errors name it, and a cleaned copy keeps the column names."""
    rows = [{"q": r["prompt"], "plus": r["chosen"], "minus": r["rejected"]} for r in (pair(i) for i in range(6))]
    path, output = str(write(tmp_path / "a.jsonl", [*rows, rows[0]])), tmp_path / "b.jsonl"
    other = str(write(tmp_path / "other.jsonl", rows[1:2]))
    fix = ["data", "fix", path, str(output), "--drop", "leakage", "--against", other]
    for command in (["data", "audit", path], fix, ["data", "show", path]):
        assert main(command) == 2
        assert "--column prompt=q" in capsys.readouterr().err
        assert main([*command, *NAMED]) == 0
        capsys.readouterr()
        assert main([*command, "--column", "prompt"]) == 2
        assert "write --column name=value" in capsys.readouterr().err
    assert [json.loads(line) for line in output.read_text().splitlines()] == [rows[0], *rows[2:]]
    assert main(["data", "audit", path, *NAMED, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"]["duplicates"]["count"] == 1
    assert main(["data", "audit", "run.yaml", *NAMED]) == 2
    assert "--column: goes with data files, not with a config; set data.columns there" in capsys.readouterr().err
    assert main(["data", "show", path, *NAMED, "--column", "prompt=plus"]) == 2
    assert "'prompt' is given twice" in capsys.readouterr().err
