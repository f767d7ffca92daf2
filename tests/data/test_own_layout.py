"""A user's own layout from a file: training, display, audit, identity by its file, and one message per error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.cli import main
from penchant.config import load_config
from penchant.data import cached as cached_module
from penchant.data.cached import DataCache
from penchant.data.layouts import layout_named
from penchant.data.load import load_preferences
from penchant.errors import CheckpointError, ConfigError, DataError
from penchant.types import Completion, PromptTree

CLASS = '''
class MyLayout:
    """Tickets with two replies"""

    kind = "pairs"
    columns = ("ticket", "replies")
    example = {"ticket": "How?", "replies": ["So.", "No."]}

    def convert(self, row):
        good, bad = row["replies"]
        return {"prompt": row["ticket"], "chosen": good, "rejected": bad}
'''
READING: dict[str, Any] = {"columns": {}, "on_bad_row": "skip", "identical": "bad_row", "limit": None}


def layout(folder: Path, text: str = CLASS) -> str:
    (folder / "my_layout.py").write_text(text)
    return f"{folder / 'my_layout.py'}:MyLayout"


def tickets(path: Path, rows: list[dict[str, Any]]) -> str:
    return write_jsonl(path, [{"ticket": r["prompt"], "replies": [r["chosen"], r["rejected"]]} for r in rows])


def test_rows_are_those_of_the_plain_layout(tmp_path: Path) -> None:
    rows = polite_rows()[:6]
    mine = load_preferences(tickets(tmp_path / "a.jsonl", rows), shape=layout(tmp_path), **READING)
    plain = load_preferences(write_jsonl(tmp_path / "b.jsonl", rows), **READING)
    assert mine.fingerprint == plain.fingerprint and mine.kind == plain.kind == "pairs"


def test_bad_rows_are_counted_sentences(tmp_path: Path) -> None:
    good = {"ticket": "t", "replies": ["a", "b"]}
    bad = [{"ticket": "t"}, {"ticket": "t", "replies": ["a"]}, {"ticket": "t", "replies": ["a", 3]}]
    path, name = write_jsonl(tmp_path / "a.jsonl", [good, *bad]), layout(tmp_path)
    found = load_preferences(path, shape=name, **READING)
    assert found.accepted == 1 and found.total == 4
    assert [q.where for q in found.quarantined] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]
    for q, words in zip(found.quarantined, ("no column \"?'?replies", "ValueError", "rejected"), strict=True):
        assert re.search(words, q.what) and q.how
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        load_preferences(path, shape=name)


@pytest.mark.parametrize(
    ("kind", "made", "want"),
    [
        ("unpaired", '{"prompt": "p", "completion": "c", "label": True}', PromptTree("p", (Completion("c", True),))),
        ("scored", '{"prompt": "p", "completion": "c", "score": 2}', PromptTree("p", (Completion("c", None, 2.0),))),
        ("sft", '{"prompt": "p", "completion": "c"}', PromptTree("p", (Completion("c"),))),
        ("prompts", '{"prompt": "p"}', PromptTree("p", ())),
        ("text", '{"text": "c"}', PromptTree("", (Completion("c"),))),
        ("sft", 'PromptTree("p", (Completion("c"),))', PromptTree("p", (Completion("c"),))),
    ],
)
def test_every_kind(tmp_path: Path, kind: str, made: str, want: PromptTree) -> None:
    text = f"""
from penchant.types import Completion, PromptTree
class MyLayout:
    kind, example = {kind!r}, {{"x": 1}}
    def convert(self, row):
        return {made}
"""
    found = layout_named(layout(tmp_path, text))
    assert found.kind == kind and found.example_trees == (want,)


def test_none_leaves_a_row_out_and_a_list_gives_several(tmp_path: Path) -> None:
    text = """
class MyLayout:
    kind, example = "sft", {"n": 2}
    def convert(self, row):
        return [{"prompt": "p", "completion": str(i)} for i in range(row["n"])] or None
"""
    path = write_jsonl(tmp_path / "a.jsonl", [{"n": 2}, {"n": 0}, {"n": 1}])
    found = load_preferences(path, shape=layout(tmp_path, text), **{**READING, "on_bad_row": "error"})
    assert [t.completions[0].text for t in found.trees] == ["0", "1", "0"] and found.accepted == 2
    assert len(found.quarantined) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("class MyLayout", "class Other"), "no function 'MyLayout'"),
        (("def convert", "def turn"), "no method convert"),
        (('"pairs"', '"pair"'), "kind is 'pair'"),
        (("good, bad = row", "good = row"), "its example does not convert: .*NameError"),
        (('"rejected": bad', '"bad": bad'), 'its example does not convert: .*"rejected"'),
        (('"replies")', '"answers")'), "no column 'answers'"),
        (('("ticket", "replies")', '"ticket"'), "columns are 'ticket'"),
        (('example = {"ticket": "How?", "replies": ["So.", "No."]}', ""), "has no example"),
        (("return {", "return None and {"), "its example"),
        (('"""Tickets', '1 / 0\n    """Tickets'), "cannot be imported .ZeroDivisionError"),
        (
            ("def convert(self, row):", "def __init__(self):\n        1 / 0\n    def convert(self, row):"),
            "cannot be made",
        ),
        (("def convert(self, row):", "def __init__(self, x): pass\n    def convert(self, row):"), "does not take"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    assert change[0] in CLASS
    with pytest.raises(ConfigError, match=words) as caught:
        layout_named(layout(tmp_path, CLASS.replace(*change)))
    assert caught.value.how and "\n" not in str(caught.value)


def test_no_such_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tickets(tmp_path / "a.jsonl", polite_rows()[:2])
    assert main(["data", "show", path, "--shape", f"{tmp_path}/none.py:MyLayout"]) == 2
    assert "none.py: no such file" in capsys.readouterr().err


def test_commands_take_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, name = tickets(tmp_path / "a.jsonl", polite_rows()[:4]), layout(tmp_path)
    assert main(["data", "formats", name]) == 0
    assert "Tickets with two replies" in capsys.readouterr().out
    assert main(["data", "formats", name, "--json"]) == 0
    (described,) = json.loads(capsys.readouterr().out)
    assert described["kinds"] == ["pairs"] and described["becomes"][0]["prompt"] == "How?"
    assert main(["data", "show", path, "--shape", name]) == 0
    assert polite_rows()[0]["chosen"] in capsys.readouterr().out
    assert main(["data", "audit", path, "--shape", name]) == 0
    assert "4 rows" in capsys.readouterr().out
    assert main(["data", "get", "mine", "--from", path, "--layout", name, "--output", str(tmp_path / "got")]) == 0
    rows = [json.loads(line) for f in sorted((tmp_path / "got").glob("*n.jsonl")) for line in f.open()]
    assert {r["chosen"] for r in rows} <= {r["chosen"] for r in polite_rows()[:4]} and rows


def test_an_edited_layout_is_read_again_and_makes_the_cache_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_module, "AUTO_BYTES", 0)
    path, name = tickets(tmp_path / "a.jsonl", polite_rows()[:3]), layout(tmp_path)
    first = DataCache().load(path, shape=name, **READING)
    layout(tmp_path, CLASS.replace('row["ticket"],', '"New: " + row["ticket"],'))
    second = DataCache().load(path, shape=name, **READING)
    assert second.trees[0].prompt == f"New: {first.trees[0].prompt}" and second.fingerprint != first.fingerprint
    layout(tmp_path)
    said: list[str] = []
    assert DataCache(note=said.append).load(path, shape=name, **READING).fingerprint == first.fingerprint
    assert "read from" in said[0]


def test_a_run_trains_on_it_and_is_another_run_when_the_rows_change(tmp_path: Path) -> None:
    tickets(tmp_path / "a.jsonl", polite_rows())
    layout(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
model: {{path: {tiny_model_folder(tmp_path / "model")}, dtype: fp32}}
data: {{path: {tmp_path / "a.jsonl"}, shape: my_layout.py:MyLayout, validation_rows: 4, max_length: 128}}
loss: {{name: dpo}}
train: {{max_steps: 1, batch_size: 4, tokens_per_step: 600}}
output: {tmp_path / "run"}
"""
    )
    assert load_config(config).data.shape == f"{(tmp_path / 'my_layout.py').resolve()}:MyLayout"  # beside the config
    result = api.train(str(config), quiet=True)
    assert (result.folder / "metrics.jsonl").read_text()
    layout(tmp_path, CLASS.replace('row["ticket"],', '"New: " + row["ticket"],'))
    with pytest.raises(CheckpointError, match=r"different run.*\n *data:"):
        api.train(str(config), quiet=True)
