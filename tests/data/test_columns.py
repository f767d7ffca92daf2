"""No column that says something is dropped without a word: it is used, refused, or named as not used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penchant.data.layouts import LAYOUTS, RowError
from penchant.data.load import load_preferences
from penchant.errors import DataError
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
def test_pictures_sound_and_tools_are_refused_in_every_layout(name: str, column: str) -> None:
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
