"""No meaningful column is silently dropped: it is used, refused, or reported as unused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penchant.cli import main
from penchant.data.layouts import LAYOUTS, RowError
from penchant.data.load import layout_line, load_preferences
from penchant.errors import DataError
from penchant.init import propose
from penchant.init.look import ModelFacts, look_at_data
from penchant.types import Message

USER = [{"role": "user", "content": "Where?"}]
SYSTEM = {"role": "system", "content": "Be a pirate."}
ASKED = (Message("system", "Be a pirate."), Message("user", "Where?"))


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def written(tmp_path: Path, *rows: dict[str, Any]) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", [n for n, layout in LAYOUTS.items() if layout.kind != "text" and layout.group is None])
@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_is_in_front_of_the_prompt_in_every_layout(name: str, column: str) -> None:
    example = {k: v for k, v in LAYOUTS[name].example.items() if k != "system"}
    for plain, tree in zip(
        LAYOUTS[name].convert(example, {}), LAYOUTS[name].convert({**example, column: "Be a pirate."}, {}), strict=True
    ):
        prompt = (Message("user", plain.prompt),) if isinstance(plain.prompt, str) else plain.prompt
        assert tree.prompt == (Message("system", "Be a pirate."), *prompt)
        assert tree.completions == plain.completions
        for nothing in (None, "", "  "):
            assert LAYOUTS[name].convert({**example, column: nothing}, {}) == LAYOUTS[name].convert(example, {})


@pytest.mark.parametrize("name", [n for n, layout in LAYOUTS.items() if layout.group is None])
@pytest.mark.parametrize("column", ["images", "videos", "audios", "image", "tools"])
def test_pictures_sound_and_what_is_no_tool_are_refused_in_every_layout(name: str, column: str) -> None:
    layout = LAYOUTS[name]
    with pytest.raises(RowError, match=f'"{column}"'):
        layout.convert({**layout.example, column: ["cat.png"]}, {})
    for nothing in ([], None, "", "[]"):
        assert layout.convert({**layout.example, column: nothing}, {}) == layout.convert(layout.example, {})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, *USER], "chosen": [*USER, *said("Arr.")], "rejected": [*USER, *said("West.")]},
        {"prompt": [SYSTEM, *USER], "chosen": said("Arr."), "rejected": said("West.")},
        {"prompt": "Where?", "chosen": [SYSTEM, *USER, *said("Arr.")], "rejected": [SYSTEM, *USER, *said("West.")]},
        {"prompt": [SYSTEM, *USER], "completion": [*USER, *said("Arr.")]},
        {"prompt": [SYSTEM, *USER], "completion": said("Arr."), "label": True},
    ],
)
def test_a_system_turn_that_stands_in_the_prompt_alone_is_kept(tmp_path: Path, row: dict[str, Any]) -> None:
    (tree,) = load_preferences(written(tmp_path, row)).trees
    assert tree.prompt == ASKED and tree.completions[0].text == "Arr."


def test_turns_between_the_prompt_and_the_answer_are_kept(tmp_path: Path) -> None:
    more = [*said("Which port?"), {"role": "user", "content": "0"}]
    wanted = (*ASKED, Message("assistant", "Which port?"), Message("user", "0"))
    pair = {"prompt": [SYSTEM, *USER], "chosen": [*more, *said("a")], "rejected": [*more, *said("b")]}
    assert load_preferences(written(tmp_path, pair)).trees[0].prompt == wanted
    sft = {"prompt": "Where?", "completion": [*more, *said("a")]}
    assert load_preferences(written(tmp_path, sft)).trees[0].prompt == wanted[1:]
    other = [{"role": "user", "content": "When?"}]
    with pytest.raises(DataError, match="do not go on from those of the prompt"):
        load_preferences(
            written(tmp_path, {"prompt": USER, "chosen": [*other, *said("a")], "rejected": [*other, *said("b")]})
        )


def test_columns_that_are_not_used_are_named_once(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "id": 7, "topic": "ports", "note": None, "chosen_score": 1}
    path = written(tmp_path, row, {**row, "prompt": "q"})
    found = load_preferences(path)
    assert found.columns is not None and found.columns.unused == ["id", "topic"]
    assert layout_line(found, path).endswith("; not used: id, topic")
    assert layout_line(load_preferences(path, shape="pairs"), path).endswith("; not used: id, topic")
    del row["id"], row["topic"]
    assert "not used" not in layout_line(load_preferences(written(tmp_path, row)), path)


def test_keys_of_turns_that_are_not_used_are_named_once(tmp_path: Path) -> None:
    part = {"type": "text", "text": "What now?", "cache_control": {"type": "ephemeral"}}
    asked = [{"role": "user", "content": "Where?", "name": "Ann"}, {**said("West.")[0], "foo": 1, "id": None}]
    tools = [{"role": "tool", "name": "map", "content": "{}"}, {"role": "user", "content": [part]}]
    path = written(tmp_path, *({"messages": [*asked, *tools, *said(f"{i}")], "id": i} for i in range(1, 3)))
    named = ["id", "messages[].name (user)", "messages[].foo", "messages[].content[].cache_control"]
    found = load_preferences(path)
    assert found.columns is not None and found.columns.unused == named
    assert layout_line(found, path).endswith(f"; not used: {', '.join(named)}")
    answer = {"role": "assistant", "content": "West.", "weight": 1, "logprob": -1.5}
    pair = {"prompt": USER, "chosen": [answer], "rejected": said("East.")}
    columns = load_preferences(written(tmp_path, pair)).columns
    assert columns is not None and columns.unused == ["chosen[].weight", "chosen[].logprob"]


def test_a_cell_of_a_table_that_says_that_it_is_missing_is_no_text(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    words = ["nan", "NaN", "None", "null", "NULL", "<NA>", "NaT", " nan "]
    lines = [f"instruction,input,output,system\nWhere?,{w},West.,{w}\n" for w in words]
    for word, text in zip(words, lines, strict=True):
        table.write_text(text)
        (tree,) = load_preferences(str(table)).trees  # optional columns are absent
        assert tree.prompt == "Where?" and tree.completions[0].text == "West."
        table.write_text(f"prompt,completion\nWhere?,{word}\nWhen?,Nancy\n")
        found = load_preferences(str(table), on_bad_row="skip")
        assert [t.completions[0].text for t in found.trees] == ["Nancy"] and found.total == 2
        assert word.strip() in found.quarantined[0].what and found.quarantined[0].where == "rows.csv:2"
    rows = [{"prompt": "Not a number?", "completion": w} for w in words]
    assert [t.completions[0].text for t in load_preferences(written(tmp_path, *rows)).trees] == words
    assert load_preferences(written(tmp_path, {"system": float("nan"), **rows[0]})).trees[0].prompt == "Not a number?"
    with pytest.raises(DataError, match="completion"):
        load_preferences(written(tmp_path, {"prompt": "What?", "completion": float("nan")}))


def test_a_parquet_file_has_nulls_so_none_is_a_word_and_nan_is_not(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    texts = ["nan", "None", None, "<NA>", "West."]
    pq.write_table(pa.table({"prompt": list("abcde"), "completion": texts}), path)
    found = load_preferences(str(path), on_bad_row="skip")
    assert [t.completions[0].text for t in found.trees] == ["None", "West."]
    assert [q.where for q in found.quarantined] == [f"rows.parquet: row {i}" for i in (1, 3, 4)]


def test_the_commands_name_columns_that_are_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, *({"prompt": f"p{i}", "completion": "a", "topic": "ports"} for i in range(4)))
    for command in (["show"], ["audit"]):
        assert main(["data", *command, path]) == 0
        assert "not used: topic" in capsys.readouterr().out
    assert main(["data", "show", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unused"] == ["topic"]


@pytest.mark.parametrize("name", [n for n, layout in LAYOUTS.items() if layout.group is None])
def test_what_detection_looks_for_is_used(name: str) -> None:
    layout = LAYOUTS[name]
    strange = {**layout.example, "a_column_of_mine": "x y"}
    assert [c for c in layout.unused([strange], {}) if c not in layout.example] == ["a_column_of_mine"]


@pytest.mark.parametrize(
    "theirs,row",
    [
        ("promt", {"promt": "Name one, please.", "chosen": "The one.", "rejected": "The two."}),
        ("Prompt", {"Prompt": "Name one.", "completion": "The one."}),
        ("lable", {"prompt": "Name one.", "completion": "The one.", "lable": True}),
        ("competion", {"prompt": "Name one.", "competion": "The one."}),
        ("sytem", {"sytem": "Be brief.", "prompt": "Name one.", "completion": "The one."}),
        ("rejectd", {"prompt": "Name one.", "chosen": "The one.", "rejectd": "The two."}),
    ],
)
def test_a_slip_in_a_name_is_asked_about(tmp_path: Path, theirs: str, row: dict[str, Any]) -> None:
    ours = {"promt": "prompt", "Prompt": "prompt", "lable": "label", "competion": "completion", "sytem": "system"}
    with pytest.raises(DataError, match=f'"{theirs}"') as error:
        load_preferences(written(tmp_path, row))
    name = ours.get(theirs, "rejected")
    assert f"data.columns={{{name}: {theirs}}}" in str(error.value)
    found = load_preferences(written(tmp_path, row), columns={name: theirs})
    assert found.columns is not None and not found.columns.unused


@pytest.mark.parametrize("rare_at", [120, None])
def test_a_mapped_column_may_come_late_but_not_never(tmp_path: Path, rare_at: int | None) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"Q{i}", "chosen": "A", "rejected": "B"} for i in range(150)]
    if rare_at is not None:
        rows[rare_at]["persona"] = "Be brief."
    path, columns = written(tmp_path, *rows), {"system": "persona"}
    assert len(load_preferences(path, columns=columns, limit=110).trees) == 110
    if rare_at is None:
        with pytest.raises(DataError, match='maps system to "persona", and there is no such column'):
            load_preferences(path, columns=columns)
        return
    prompts = [tree.prompt for tree in load_preferences(path, columns=columns).trees]
    assert prompts[119] == "Q119" and isinstance(prompts[120], tuple) and prompts[120][0].content == "Be brief."


def test_a_shared_start_is_no_prompt_beside_another_text(tmp_path: Path) -> None:
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert load_preferences(written(tmp_path, {**row, "source": "web", "margin": "0.5"})).shape == "implicit_pairs"
    with pytest.raises(DataError, match="query"):
        load_preferences(written(tmp_path, {**row, "query": "What color is the sky?"}))
    named = load_preferences(written(tmp_path, {**row, "query": "Sky?"}), shape="implicit_pairs")
    assert named.columns is not None and named.columns.unused == ["query"]


def csv_of(tmp_path: Path, *rows: dict[str, Any]) -> str:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return str(path)


@pytest.mark.parametrize("write", [json.dumps, str])
def test_messages_as_text_in_a_cell_are_messages(tmp_path: Path, write: Any) -> None:
    asked = [SYSTEM, {"role": "user", "content": 'Where\'s it?\n"There"'}]
    before = tuple(Message(m["role"], m["content"]) for m in asked)
    rows: list[dict[str, Any]] = [
        {"prompt": asked, "chosen": said("a"), "rejected": said("b")},
        {"chosen": [*asked, *said("a")], "rejected": [*asked, *said("b")]},
        {"messages": [*asked, *said("a")]},
        {"prompt": asked, "completion": said("a"), "label": "True"},
        {"conversations": asked, "chosen": said("a")[0], "rejected": said("b")[0]},
    ]
    for row in rows:
        (tree,) = load_preferences(csv_of(tmp_path, {k: v if k == "label" else write(v) for k, v in row.items()})).trees
        assert tree.prompt == before and tree.completions[0].text == "a"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "[{'role': 'user', 'content': 'Where?'", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "completion": "[{'role': 'assistant', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]"},
        {"text": "[{'content': 'Where?', 'role': 'user'}]"},
        {"instruction": "i", "output": '{"from": "gpt", "value": "a"}'},
    ],
)
def test_messages_as_text_that_cannot_be_read_are_a_bad_row(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="holds messages as text"):
        load_preferences(csv_of(tmp_path, row))


def test_other_texts_that_begin_with_a_bracket_are_texts(tmp_path: Path) -> None:
    for text in ('[{"name": "x"}]', '{"value": 3}', "[1, 2]", "{'role'}"):
        (tree,) = load_preferences(csv_of(tmp_path, {"prompt": "p", "completion": text})).trees
        assert tree.completions[0].text == text


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*USER, *said("a")], "feedback": "thumbs_down"},
        {"messages": [*USER, *said("a")], "rating": -1},
        {"prompt": "p", "completion": "a", "feedback": "thumbs_up"},
        {"instruction": "p", "output": "a", "rating": 4},
        {"conversations": [*USER, {**said("a")[0], "feedback": "thumbs_down"}]},
    ],
)
def test_judged_answers_are_no_demonstrations(tmp_path: Path, row: dict[str, Any]) -> None:
    for options in {}, {"turns": "every"}:
        if options and not {"messages", "conversations"} & row.keys():
            continue
        layouts = {"messages": "messages", "conversations": "sharegpt", "instruction": "alpaca", "prompt": "sft"}
        layout = next(layouts[name] for name in row if name in layouts)
        with pytest.raises(DataError, match="rates the answer"):
            load_preferences(written(tmp_path, row), shape=layout, layout_options=options)


def test_thumbs_are_labels_and_a_judgement_can_be_set_aside(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": "a", "feedback": f"thumbs_{way}"} for i, way in enumerate(("up", "down"))]
    found = load_preferences(written(tmp_path, *rows), columns={"label": "feedback"})
    assert [t.completions[0].label for t in found.trees] == [True, False] and found.kind == "unpaired"
    found = load_preferences(written(tmp_path, *rows), columns={"ignored": "feedback"})
    assert found.kind == "sft" and found.columns is not None and found.columns.unused == ["ignored"]
    words = {"prompt": "p", "completion": "a", "feedback": "What a fine answer that is."}
    assert load_preferences(written(tmp_path, words)).kind == "sft"


def test_answers_of_weight_0_are_not_learned(tmp_path: Path) -> None:
    first, last = said("first")[0], said("last")[0]
    for nothing, some in (({"weight": 0}, {"weight": 1}), ({"train": False}, {"train": True})):
        row = {"system": "s", "messages": [*USER, {**first, **some}, *USER, {**last, **nothing}]}
        with pytest.raises(DataError, match=r"none of 1 row could be used.*not to be learned"):
            load_preferences(written(tmp_path, row))
        (tree,) = load_preferences(written(tmp_path, row), layout_options={"turns": "every"}).trees
        assert tree.completions[0].text == "first"
        row = {"messages": [*USER, {**first, **nothing}, *USER, {**last, **some}]}
        assert [t.completions[0].text for t in load_preferences(written(tmp_path, row)).trees] == ["last"]
        (tree,) = load_preferences(written(tmp_path, row), layout_options={"turns": "every"}).trees
        assert tree.completions[0].text == "last"
    with pytest.raises(DataError, match="must be 0 or 1"):
        load_preferences(written(tmp_path, {"messages": [*USER, {**last, "weight": 0.5}]}))


@pytest.mark.parametrize(
    "more",
    [
        {"answers": ["a", "b", "c", "d"], "ranking": [2, 1, 3, 4]},
        {"responses": ["a", "b", "c", "d"]},
        {"answer1": "a", "answer2": "b", "selected": "left"},
        {"answer_a": "a", "answer_b": "b", "answer_c": "c"},
    ],
)
def test_several_answers_are_no_prompt_alone(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="several answers"):
        load_preferences(written(tmp_path, {"prompt": "p", **more}))


def test_init_names_unused_columns_and_says_why_rows_are_kept_aside(
    tmp_path: Path,
) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No.", "topic": "x"} for i in range(60)
    ]
    path = written(tmp_path, *rows, {**rows[0], "images": ["a.png"]}, {**rows[1], "chosen": ""})
    facts = look_at_data(path, None)
    assert "columns that are not used: topic" in facts.to_text()
    assert '1 x "images" is not empty' in facts.to_text() and '1 x "chosen" is empty' in facts.to_text()
    section = propose(facts, ModelFacts("m", 10**8, 2048), "dpo").sections["data"]
    assert section["on_bad_row"][0] == "skip" and '1 x "chosen" is empty' in section["on_bad_row"][1]


# ---- other names -----------------------------------------------------------------------------------------------------

OTHERS = {
    "prompt, answer": ({"prompt": "p", "answer": "a"}, "sft", {None}),
    "question, answer": ({"question": "p", "answer": "a"}, "sft", {None}),
    "prompt, response, score": ({"prompt": "p", "response": "a", "score": 2}, "scored", {None}),
    "prompt, completion, feedback": (
        {"prompt": "p", "completion": "a", "feedback": "thumbs_down"},
        "unpaired",
        {False},
    ),
    "prompt, response, feedback": ({"prompt": "p", "response": "a", "feedback": "thumbs_up"}, "unpaired", {True}),
    "query, reply, thumbs_up": ({"query": "p", "reply": "a", "thumbs_up": False}, "unpaired", {False}),
    "messages, feedback": ({"messages": [*USER, *said("a")], "feedback": "thumbs_down"}, "unpaired", {False}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_usual_names_of_a_prompt_an_answer_and_a_word_about_it_are_read_and_said(tmp_path: Path, case: str) -> None:
    row, kind, labels = OTHERS[case]
    path = written(tmp_path, row, row)
    found = load_preferences(path)
    assert found.kind == kind
    assert {c.label for t in found.trees for c in t.completions} == labels
    assert found.trees[0].completions[0].text == "a"
    assert "is read as" in layout_line(found, path)
    assert "not used" not in layout_line(found, path)


def test_a_number_about_an_answer_and_two_answers_are_still_asked_about(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rates the answer"):
        load_preferences(written(tmp_path, {"prompt": "p", "completion": "a", "rating": 4}))
    with pytest.raises(DataError, match=r"no known layout|several answers"):
        load_preferences(written(tmp_path, {"prompt": "p", "answer": "a", "response": "b"}))


def test_unused_columns_of_grouped_and_own_layouts_are_named(tmp_path: Path) -> None:
    layout = LAYOUTS["oasst_flat"]
    rows = [{**row, "topic": "x"} for row in (layout.example, *layout.rest)]
    path = written(tmp_path, *rows)
    assert "topic" in layout_line(load_preferences(path), path).split("not used: ")[1]
    own = tmp_path / "mine.py"
    own.write_text(
        'class One:\n    "x"\n    kind = "sft"\n    columns = ("q",)\n    example = {"q": "a", "a": "b"}\n'
        '    def convert(self, row):\n        return {"prompt": row["q"], "completion": row["a"]}\n'
        "class All(One):\n    def convert(self, row):\n"
        '        row = {**row}\n        return {"prompt": row["q"], "completion": row["a"]}\n'
    )
    path = written(tmp_path, {"q": "p", "a": "a", "topic": "x"})
    assert "not used: topic" in layout_line(load_preferences(path, shape=f"{own}:One"), path)
    assert "not used" not in layout_line(load_preferences(path, shape=f"{own}:All"), path)


def test_a_score_beside_messages_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, {"messages": [*USER, *said("a")], "score": 3})
    assert "not used: score" in layout_line(load_preferences(path), path)


def test_an_audit_without_a_usable_row_gives_the_first_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, {"prompt": "p", "completion": "a", "score": float("nan")})
    assert main(["data", "audit", path]) == 2
    assert 'rows.jsonl:1: "score" is' in capsys.readouterr().err
