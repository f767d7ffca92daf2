"""The studio's row files, without a server: pages, search, filters, edits, differences, tokens."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer

from penchant.data.audit.fix import DEFAULT, Fixed, fix, read_edits
from penchant.data.load import load_preferences
from penchant.data.read import Bounds, read_rows
from penchant.errors import DataError
from penchant.studio import rows
from penchant.studio.rows import (
    Edits,
    File,
    LineIndex,
    answers_of,
    as_json,
    content_hash,
    diff_words,
    is_quarantined,
    line_numbers,
    rows_of_places,
)
from penchant.types import Completion, Message, PromptTree

MODEL = Path(__file__).parents[1] / "fixtures/v0_1/model"


def pairs(n: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Question {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}."} for i in range(1, n + 1)]


def write(path: Path, made: Sequence[dict[str, Any]], end: str = "\n") -> Path:
    path.write_text(end.join(json.dumps(row) for row in made) + end, newline="")
    return path


def numbers(file: File, start: int = 1, **how: Any) -> list[int]:
    return [item.number for item in file.page(start, **how).items]


# ---- Pages ----


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("last", [True, False])
def test_every_line_is_found_where_the_reader_says_it_is(tmp_path: Path, end: str, last: bool) -> None:
    path = write(tmp_path / "a.jsonl", pairs(700), end)
    if not last:
        path.write_bytes(path.read_bytes().rstrip())
    file = File(path)
    said = {row.where: row.values for row in read_rows(str(path))}  # type: ignore[union-attr]
    found: dict[str, Any] = {}
    at: int | None = 1
    while at is not None:
        page = file.page(at, 90)
        found |= {item.where: item.values for item in page.items}
        at = page.next
    assert found == said
    assert file.lines is not None and file.page(next(iter(numbers(file, 655))), 1).items[0].values is not None
    file.lines.scan()
    assert file.lines.total == path.read_bytes().count(b"\n") + (not last)


def test_the_first_page_of_a_long_file_reads_its_beginning_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", pairs(20_000))

    def never(self: LineIndex, line: int | None = None, seconds: float = 0.0) -> None:
        raise AssertionError("the whole file was looked at")

    monkeypatch.setattr(LineIndex, "scan", never)
    page = File(path).page(1)
    assert [item.number for item in page.items] == list(range(1, 21)) and page.next == 21


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_line_over_the_bound_is_told_and_the_others_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(rows, "Bounds", lambda: Bounds(row_mb=0.001))
    made = pairs(5)
    made[at - 1]["chosen"] = "long " * 3000
    items = File(write(tmp_path / "a.jsonl", made)).page(1).items
    assert [item.number for item in items] == [1, 2, 3, 4, 5]
    assert items[at - 1].aside and "longer than 0.001 MB" in items[at - 1].aside[0]
    assert [len(item.trees) for item in items] == [int(i != at) for i in range(1, 6)]


def test_lines_are_counted_a_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BLOCK", 37)
    path = write(tmp_path / "a.jsonl", pairs(1200))
    lines = LineIndex(path)
    data = path.read_bytes()
    starts = [0, *(i + 1 for i, byte in enumerate(data) if byte == 10)]
    for line in (1, 2, 255, 256, 257, 258, 512, 513, 514, 1024, 1025, 1200):
        assert lines.offset(line) == starts[line - 1]
    assert lines.offset(1201) is None and lines.offset(0) is None


def test_a_page_is_the_same_in_every_format(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = pairs(50)
    write(tmp_path / "a.jsonl", made)
    (tmp_path / "b.json").write_text(json.dumps(made))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "d.csv").write_text(
        "prompt,chosen,rejected\n" + "".join(f"{r['prompt']},{r['chosen']},{r['rejected']}\n" for r in made)
    )
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "e.parquet")
    for name in ("a.jsonl", "b.json", "c.jsonl.gz", "d.csv", "e.parquet"):
        file = File(tmp_path / name)
        for start in (1, 21, 41, 11):  # forward, to the end, and back
            page = file.page(start)
            prompts = [item.trees[0].prompt for item in page.items]
            assert prompts == [r["prompt"] for r in made[start - 1 : start + 19]], (name, start)
            assert page.next == (start + 20 if start < 31 else None)


def test_trees_are_those_that_training_reads(tmp_path: Path) -> None:
    made = [
        *pairs(5),
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        {"prompt": "", "chosen": "a", "rejected": 3},
    ]
    path = write(tmp_path / "a.jsonl", made)
    with path.open("a") as out:
        out.write("{broken\n[1, 2]\n")
    loaded = load_preferences(str(path), on_bad_row="skip")
    page = File(path).page(1)
    assert [tree for item in page.items for tree in item.trees] == [*loaded.trees]
    aside = [(item.where, *item.aside) for item in page.items if is_quarantined(item) and item.aside]
    assert aside == [(q.where, q.what, q.how) for q in loaded.quarantined]
    assert numbers(File(path), wanted=is_quarantined) == [6, 7, 8, 9]


def test_rows_that_make_an_example_together_are_shown_together(tmp_path: Path) -> None:
    from penchant.data.layouts import LAYOUTS

    name, layout = next((n, one) for n, one in LAYOUTS.items() if one.group is not None and one.rest)
    path = write(tmp_path / "a.jsonl", [layout.example, *layout.rest])  # type: ignore[list-item]
    file = File(path, name)
    assert file.grouped and [item.trees for item in file.page(1).items if item.trees]


def test_rows_of_no_layout_are_shown_as_they_are(tmp_path: Path) -> None:
    file = File(write(tmp_path / "a.jsonl", [{"x": 1, "y": [2]}]))
    (item,) = file.page(1).items
    assert "no known layout" in file.problem and item.values == {"x": 1, "y": [2]} and not item.trees


def test_a_quarantine_is_shown_with_its_reasons(tmp_path: Path) -> None:
    row = {"where": "train.jsonl:7", "what": '"chosen" is empty', "how": "fill it", "row": {"prompt": "p"}}
    (item,) = File(write(tmp_path / "quarantine.train.jsonl", [row])).page(1).items
    assert (
        item.aside == ('"chosen" is empty', "fill it") and item.raw == {"prompt": "p"} and item.where == "train.jsonl:7"
    )


# ---- Search ----


def test_search_finds_texts_in_any_case_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pairs(300)
    made[250]["chosen"] = "Über den <Wolken>"
    path = write(tmp_path / "a.jsonl", made)
    raw = tmp_path / "b.jsonl"
    raw.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in made))
    escaped = tmp_path / "c.jsonl"  # as Go writes JSON
    escaped.write_text(raw.read_text().replace("<", "\\u003c"))
    for file in (File(path), File(raw), File(escaped)):
        assert numbers(file, needle="ÜBER DEN") == [251] and numbers(file, needle="<wolken") == [251]
        assert numbers(file, needle="question 77?") == [77]
        assert numbers(file, needle="nowhere") == []
        assert numbers(file, needle="QUESTION", max_rows=3) == [1, 2, 3]
    monkeypatch.setattr(rows, "SECONDS", 0.0)  # no time left, so it reports where it stopped
    page = File(path).page(1, needle="question 300?")
    while not page.items:
        assert page.next is not None
        page = File(path).page(page.next, needle="question 300?")
    assert page.items[0].number == 300


def test_places_of_findings_name_rows() -> None:
    where = ["a.jsonl:12 (as a.jsonl:3)", "a.jsonl:5#2", "my file (1).csv:9", "owner/name: row 7", "odd"]
    assert rows_of_places(where) == ["a.jsonl:12", "a.jsonl:5", "my file (1).csv:9", "owner/name: row 7"]
    assert line_numbers(rows_of_places(where)) == [12, 5, 9, 7]


# ---- Differences ----


@pytest.mark.parametrize("a, b", [("I can do it.", "I cannot do it!"), ("", "x"), ("a  b\n", "a b"), ("same", "same")])
def test_differences_keep_both_texts(a: str, b: str) -> None:
    left, right = diff_words(a, b)
    assert "".join(t for _, t in left) == a and "".join(t for _, t in right) == b
    assert [t for m, t in left if not m] == [t for m, t in right if not m]
    assert any(m for m, _ in (*left, *right)) == (a != b)


def test_differences_are_of_words_and_bounded(tmp_path: Path) -> None:
    left, right = diff_words("It can work", "It cannot work")
    assert ("in", "can") in left and ("in", "cannot") in right
    long = "word " * 3000
    assert diff_words(long, long + "more") == ([("", long)], [("", long + "more")])
    file = File(write(tmp_path / "a.jsonl", pairs(1)))
    chosen, rejected = answers_of(file.page(1).items[0].trees[0], diff=True)
    assert (chosen.kind, rejected.kind) == ("chosen", "rejected") and ("in", "Good") in chosen.words


def test_what_cannot_be_seen_is_an_escape_in_json() -> None:
    raw = {"a": "x\u202ey\x1b[31m\u200b", "b": "né"}
    said = as_json(raw)
    assert "\u202e" not in said and "\x1b" not in said and "\\u202e" in said and "né" in said
    assert json.loads(said) == raw


# ---- Edits ----


def copy(edits: Edits, output: Path, also: bool) -> Fixed:
    """Write the corrected copy with `penchant data fix --edits`."""
    made = read_edits(edits.file) if edits.file.exists() else {}
    return fix(str(edits.root / edits.path), output, edits=made, drop=DEFAULT if also else ())


def test_edits_that_cannot_be_read_are_a_sentence() -> None:
    for path in ("~nobody-has-this/edits", "a\0b"):
        with pytest.raises(DataError, match="cannot be read"):
            read_edits(path)


def test_edits_go_into_a_copy_with_a_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*pairs(4), pairs(1)[0]])
    before = path.read_bytes()
    file, edits = File(path), Edits(tmp_path, "a.jsonl")
    two, three, four, _ = file.page(2).items
    edits.add(two.where, "changed", content_hash(two), {"prompt": "Mine?", "chosen": "Yes.", "rejected": "No."})
    edits.add(three.where, "dropped", content_hash(three))
    edits.add(four.where, "dropped", content_hash(four))
    edits.add(four.where, "undone")
    assert {*Edits(tmp_path, "a.jsonl").latest()} == {"a.jsonl:2", "a.jsonl:3"}  # after a restart they are read again
    done = copy(edits, tmp_path / "b.jsonl", also=True)
    assert (done.rows, done.written, done.edited) == (5, 3, 1)
    assert done.dropped["by_hand"] == 1 and done.dropped["duplicates"] == 1
    assert [json.loads(line)["prompt"] for line in done.output.read_text().splitlines()] == [
        "Question 1?",
        "Mine?",
        "Question 4?",
    ]
    told = {row["where"]: row for row in map(json.loads, done.touched.read_text().splitlines())}
    assert told["a.jsonl:2"]["action"] == "changed" and told["a.jsonl:2"]["row"]["prompt"] == "Question 2?"
    assert told["a.jsonl:3"]["rule"] == "by_hand" and told["a.jsonl:5"]["rule"] == "duplicates"
    assert path.read_bytes() == before and "rows that a person dropped" in done.to_text()


def test_an_edit_of_a_row_that_is_another_one_now_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(3))
    edits = Edits(tmp_path, "a.jsonl")
    item = File(path).page(2).items[0]
    edits.add(item.where, "dropped", content_hash(item))
    write(path, pairs(4)[1:])
    with pytest.raises(DataError, match="another row now"):
        copy(edits, tmp_path / "b.jsonl", also=False)
    write(path, pairs(1))
    with pytest.raises(DataError, match="no longer exists"):
        copy(edits, tmp_path / "b.jsonl", also=False)
    assert not (tmp_path / "b.jsonl").exists()


def test_the_original_is_never_written_to(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(3))
    (tmp_path / "link.jsonl").symlink_to(path)
    for name in ("a.jsonl", "link.jsonl"):
        with pytest.raises(DataError):
            copy(Edits(tmp_path, "a.jsonl"), tmp_path / name, also=False)
    assert path.read_text().count("\n") == 3


@pytest.mark.parametrize("said", ["", "[1]", "{", '{"a": 1} {"b": 2}', '{"a": 1, "a": 2}'])
def test_what_is_no_row_is_said(said: str) -> None:
    with pytest.raises(DataError):
        rows.parse_edited_row(said)


def test_a_row_may_stand_on_several_lines() -> None:
    assert rows.parse_edited_row('{\r\n "a": "b\\nc",\n "d": 1\n}') == {"a": "b\nc", "d": 1}


# ---- Tokens ----


def test_tokens_say_what_is_trained_and_what_is_cut(tmp_path: Path) -> None:
    from penchant.data.tokenize import tokenize
    from penchant.models.load import load_tokenizer

    tokenizer = load_tokenizer(str(MODEL))
    path = write(
        tmp_path / "a.jsonl",
        [{"prompt": "Ask 1: " + "may I have tea? " * 6, "chosen": "Of course. " * 8, "rejected": "No."}],
    )
    item = File(path).page(1).items[0]
    (tree,) = item.trees
    trained = tokenize(load_preferences(str(path)), tokenizer, max_length=24).trees[0]
    shown = dict(rows.tokens_of(tree, "pairs", tokenizer, {"max_length": 24}))
    assert [*shown] == ["prompt", "chosen", "rejected"]
    assert [t.id for t in shown["prompt"] if t.kind != "cut"] == trained.prompt_ids.tolist()
    assert [t.id for t in shown["chosen"] if t.kind == "trained"] == trained.completion_ids[0].tolist()
    assert [t.id for t in shown["rejected"]] == trained.completion_ids[1].tolist() and shown["rejected"][
        -1
    ].id == tokenizer.eos_token_id
    whole = tokenize(load_preferences(str(path)), tokenizer, max_length=4096).trees[0]
    assert [t.id for t in shown["prompt"]] == whole.prompt_ids.tolist()  # including the truncated part
    assert [t.id for t in shown["chosen"]] == whole.completion_ids[0].tolist()
    assert {t.kind for t in shown["chosen"]} == {"trained", "cut"}


def test_turns_of_others_are_masked() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
    more = (Message("user", "three", False), Message("assistant", "four"))
    tree = PromptTree((Message("user", "one"),), (Completion("two", more=more),))
    shown = dict(rows.tokens_of(tree, "sft", tokenizer, {}))
    said = {kind: "".join(t.text for t in shown["answer"] if t.kind == kind) for kind in ("trained", "masked")}
    assert said == {"trained": "two</s>four</s>", "masked": "\n<s>user:three</s>\n<s>assistant:"}


def test_a_token_is_shown_as_it_stands_behind_the_one_before_it() -> None:
    """With a tokenizer that encodes a word's leading space as a marker and drops it at the start of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "▁good": 1, "▁day": 2, "s": 3}, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    kinds = ["trained", "trained", "trained", "cut"]
    alone = rows._display_tokens(tokenizer, [1, 2, 3, 1], kinds)
    assert [t.text for t in alone] == ["good", " day", "s", " good"] and [t.kind for t in alone] == kinds
    assert [t.text for t in rows._display_tokens(tokenizer, [1, 2], kinds, before=[3])] == [" good", " day"]
