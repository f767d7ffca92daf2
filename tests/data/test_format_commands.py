"""`penchant data formats` and `penchant data show`: output comes from the registry, and file contents are escaped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penchant import api
from penchant.cli import main
from penchant.data.layouts import LAYOUTS
from penchant.data.layouts.page import MOST_ROWS, describe, markdown, preview, tree_lines
from penchant.data.options import DataConfig
from penchant.types import Completion, PromptTree

FOLDER = Path(__file__).parent / "layouts"


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def test_the_page_is_up_to_date() -> None:
    page = (Path(__file__).parents[2] / "docs/data_formats.md").read_text(encoding="utf-8")
    assert page == markdown(), "run: penchant data formats --markdown > docs/data_formats.md"


def test_every_layout_is_listed_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "formats"]) == 0
    listed = capsys.readouterr().out
    assert main(["data", "formats", "--json"]) == 0
    found = {f["name"]: f for f in json.loads(capsys.readouterr().out)}
    assert list(found) == list(LAYOUTS)
    for name, layout in LAYOUTS.items():
        assert f"\n{name} " in f"\n{listed}" and layout.source in listed
        assert found[name]["becomes"] and found[name]["kinds"][0] == layout.kind
        assert all(f"data.layout_options.{o} = " in describe(name) for o in layout.options)


def test_a_mistyped_layout_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "formats", "shpp"]) == 2
    assert "'shpp' is not a layout; did you mean \"shp\"?" in capsys.readouterr().err
    with pytest.raises(ValueError, match='did you mean "ultrafeedback"'):
        DataConfig(path="x", shape="ultrafeedbak")
    assert all(DataConfig(path="x", shape=name).shape == name for name in ("auto", *LAYOUTS))


@pytest.mark.parametrize("name", ["hh", "ultrafeedback", "oasst_flat", "arena"])
def test_show_says_the_layout_and_the_first_rows(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(FOLDER / f"{name}.jsonl"), "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{name}.jsonl: layout {name} ({LAYOUTS[name].why})")
    assert "override with --shape NAME" in out and "-> " in out
    assert main(["data", "show", str(FOLDER / f"{name}.jsonl"), "-n", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == name and found["examples"][0]["where"].startswith(f"{name}.jsonl:1")


def test_show_takes_options_columns_and_a_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path / "x.jsonl", {"post": "hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_ratio": 1.5}
    )
    arguments = ["data", "show", path, "--shape", "shp", "--column", "history=post"]
    assert main(arguments) == 0
    assert "as --shape says" in (out := capsys.readouterr().out) and "-> chosen: a" in out
    assert main([*arguments, "--set", "min_score_ratio=2"]) == 0
    assert "left out: a score ratio below 2" in capsys.readouterr().out
    for wrong in (["--set", "ratio"], ["--set", "ratio=2"], ["-n", "0"], ["--shape", "nope"]):
        assert main([*arguments, *wrong]) == 2


def test_nothing_of_a_file_reaches_the_terminal_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "a\x1b[31m\u202eb\r\nx.jsonl:9\x07"
    rows: list[dict[str, Any]] = [
        {"prompt": evil, "chosen": evil + "1", "rejected": "ok"},
        {"prompt": evil, "chosen": [evil], "rejected": 1},
    ]
    path = write(tmp_path / "x.jsonl", *rows, {"prompt": {evil: evil}, "chosen": "a", "rejected": "b", evil: evil})
    assert main(["data", "show", path, "-n", "9"]) == 0
    out = capsys.readouterr().out
    assert "a\\x1b[31m\\u202eb\\r\n      x.jsonl:9\\x07" in out and "kept aside" in out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert not [line for line in out.split("\n") if line.startswith("x.jsonl:9")]
    assert main(["data", "show", write(tmp_path / "y.jsonl", {evil: 1})]) == 2
    err = capsys.readouterr().err
    assert "fit no known layout" in err and all(c.isprintable() or c == "\n" for c in err)


def test_long_texts_are_cut_and_say_so() -> None:
    (line,) = tree_lines(PromptTree("p" * 20, ()), longest=5)
    assert line == "  prompt: ppppp ... (20 characters)"
    tree = PromptTree("p", (Completion("a\nb", False),))
    assert tree_lines(tree) == ["  prompt: p", "  -> bad answer: a", "      b"]


def test_a_layout_of_groups_reads_a_bounded_part_of_a_file(tmp_path: Path) -> None:
    tree = [json.loads(line) for line in (FOLDER / "oasst_flat.jsonl").read_text(encoding="utf-8").splitlines()][2:4]
    rows = [
        {**tree[0], "parent_id": None, "message_id": str(i), "message_tree_id": str(i)} for i in range(MOST_ROWS + 5)
    ]
    found = preview(write(tmp_path / "flat.jsonl", *rows), MOST_ROWS + 5)
    assert found.stream.shape == "oasst_flat" and sum(m.rows for m in found.shown) == MOST_ROWS


def test_the_audit_shows_the_layout(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.jsonl",
        {"prompt": "p", "chosen": "a", "rejected": "b", "prompt_id": 1, "score_chosen": 2, "score_rejected": 1},
    )
    found = api.audit(path)
    line = found.to_text().split("\n")[0]
    assert line == (
        "x.jsonl: layout ultrafeedback_binarized (columns prompt, prompt_id, chosen, rejected, score_chosen, score_rejected); "
        "other fits: pairs; override with data.shape=NAME"
    )
    assert found.to_json()["layout"] == line


def test_a_run_shows_and_records_the_layout_and_takes_its_options(tmp_path: Path) -> None:
    from penchant.runs import Run

    rows = [json.loads(line) for line in (FOLDER / "shp.jsonl").read_text(encoding="utf-8").splitlines()][:2]
    config = {
        "model": {"path": "unused"},
        "data": {"path": write(tmp_path / "x.jsonl", *rows), "layout_options": {"min_score_ratio": 2}},
        "loss": {"name": "dpo"},
        "output": str(tmp_path / "run"),
    }
    notes: list[str] = []
    run = Run(api.as_config(config, ()), quiet=True)
    run.console.note = notes.append  # type: ignore[method-assign,assignment]
    assert (run.rows.loaded["train"].accepted, run.rows.loaded["train"].total) == (1, 2)
    assert notes[0].startswith("x.jsonl: layout shp (columns history, human_ref_A, human_ref_B, labels); override with")
    assert notes[1] == "train: 2 rows (shp) = 1 accepted + 1 kept aside (1 x a score ratio below 2)"
