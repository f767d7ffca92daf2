"""Rows with pictures: where pictures are placed, the resulting prompts, and which rows are bad."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sight import paint, write_rows

from penchant.data.load import Dataset, load_preferences
from penchant.data.pictures import mark_of, open_picture
from penchant.data.split import held_out_rows
from penchant.errors import ConfigError, DataError, PenchantError
from penchant.types import PromptTree

ANSWER = {"role": "assistant", "content": "a cat"}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return paint(tmp_path / "img" / "a.png", 1)


def load(folder: Path, *rows: Mapping[str, Any], **how: Any) -> Dataset:
    return load_preferences(str(write_rows(folder, rows)), **{"image_dir": "", **how})


def asked(tree: PromptTree) -> str:
    """The prompt's text, with `#` for each picture placeholder."""
    text = tree.prompt if isinstance(tree.prompt, str) else "|".join(m.content for m in tree.prompt)
    for image in tree.images:
        text = text.replace(mark_of(image), "#", 1)
    return text


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def test_every_way_to_give_a_picture(tmp_path: Path, picture: Path) -> None:
    content = picture.read_bytes()
    encoded = base64.b64encode(content).decode()
    uri = f"data:image/png;base64,{encoded}"
    ways: list[Any] = ["img/a.png", str(picture), uri, {"path": "img/a.png"}, {"bytes": None, "path": "img/a.png"}]
    rows: list[dict[str, Any]] = [{"prompt": "What?", "completion": "a cat", "images": [way]} for way in ways]
    rows.append({"prompt": "What?", "completion": "a cat", "image": "img/a.png"})
    bare = {"type": "image"}
    rows += [
        {"messages": [user(part, "What?"), ANSWER]}
        for part in (
            {"type": "image", "image": "img/a.png"},
            {"type": "image", "path": "img/a.png"},
            {"type": "image", "base64": encoded},
            {"type": "image_url", "image_url": {"url": uri}},
        )
    ]
    rows.append({"messages": [user(bare, "What?"), ANSWER], "images": ["img/a.png"]})
    rows.append({"messages": [{"role": "user", "content": "<image>What?"}, ANSWER], "images": ["img/a.png"]})
    for row in rows:
        (tree,) = load(tmp_path, row).trees
        assert asked(tree) == "#What?"
        assert [Path(i.path).read_bytes() for i in tree.images] == [content]
        assert tree.completions[0].text == "a cat"
    image = open_picture(tree.images[0])
    assert (image.mode, image.size) == ("RGB", (40, 24))


def test_pictures_of_a_table_are_its_bytes(tmp_path: Path, picture: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"prompt": "What?", "completion": "a cat", "images": [{"bytes": picture.read_bytes(), "path": "elsewhere.png"}]}
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tree,) = load_preferences(str(tmp_path / "rows.parquet"), image_dir="").trees
    assert asked(tree) == "#What?" and Path(tree.images[0].path).read_bytes() == picture.read_bytes()


def test_pictures_stand_where_the_row_says(tmp_path: Path, picture: Path) -> None:
    paint(tmp_path / "img" / "b.png", 2)
    both, bare = ["img/a.png", "img/b.png"], {"type": "image"}
    turns = [user("First ", bare, "?"), {"role": "assistant", "content": "yes"}, user("And ", bare), ANSWER]
    whole = load(tmp_path, {"messages": turns, "images": both}).trees[0]
    assert asked(whole) == "First #?|yes|And #"
    assert [Path(i.path).name for i in whole.images] == ["a.png", "b.png"]

    # an answer trained by itself has the pictures before it
    each = load(tmp_path, {"messages": turns, "images": both}, layout_options={"turns": "every"}).trees
    assert [(asked(t), len(t.images)) for t in each] == [("First #?", 1), ("First #?|yes|And #", 2)]

    # conversations that repeat the prompt, and LLaMA-Factory's pairs format
    pair = {side: [user(bare, "What?"), {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    assert asked(load(tmp_path, {**pair, "images": ["img/a.png"]}).trees[0]) == "#What?"
    factory = {
        "conversations": [{"from": "human", "value": "<image>What<image>?"}],
        **{side: {"from": "gpt", "value": side} for side in ("chosen", "rejected")},
    }
    assert asked(load(tmp_path, {**factory, "images": both}).trees[0]) == "#What#?"

    # with a system turn, pictures precede the user's text; a row without pictures keeps its text
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    assert (
        asked(load(tmp_path, {"prompt": system, "completion": [ANSWER], "images": both}).trees[0])
        == "Be brief.|##What?"
    )
    assert (
        asked(load(tmp_path, {"prompt": "<image> is a tag", "completion": "yes", "images": []}).trees[0])
        == "<image> is a tag"
    )


def test_one_question_about_two_pictures_is_two_prompts(tmp_path: Path, picture: Path) -> None:
    paint(tmp_path / "img" / "b.png", 2)
    rows = [{"prompt": "What?", "completion": c, "images": [f"img/{n}.png"]} for n in "ab" for c in ("1", "2")]
    data = load(tmp_path, *rows)
    assert held_out_rows(data, validation_rows=2).tolist() in ([0, 1], [2, 3])
    before = data.fingerprint
    assert load(tmp_path, *rows).fingerprint == before
    paint(tmp_path / "img" / "b.png", 3)
    assert load(tmp_path, *rows).fingerprint != before


@pytest.mark.parametrize(
    ("images", "prompt", "said"),
    [
        (["img/none.png"], "What?", "no such file"),
        (["img/../../a.png"], "What?", "lies outside"),
        (["/etc/hosts"], "What?", "lies outside"),
        (["https://example.com/a.png"], "What?", "nothing is fetched"),
        (["img"], "What?", "no such file"),
        (["img/text.png"], "What?", "not a picture that can be read"),
        (["data:image/png;base64,????"], "What?", "not base64"),
        ([7], "What?", "is a number"),
        ([None], "What?", "is null"),
        ([{"width": 3}], "What?", "names no picture"),
        ([{"image": {"image": "img/a.png"}}], "What?", "names no picture"),
        (["img/a.png"], "<image> or <image>?", "more places"),
        (["img/a.png", "img/a.png", "img/b.png"], "<image>?", "has 3 pictures, and its prompt has places for 1"),
        (["img/a.png", "img/a.png"], "<image>?", "has 2 pictures, and its prompt has places for 1"),
    ],
)
def test_a_picture_that_cannot_be_used_is_a_bad_row(
    tmp_path: Path, picture: Path, images: Any, prompt: str, said: str
) -> None:
    (tmp_path / "img" / "text.png").write_text("no picture")
    paint(tmp_path / "img" / "b.png", 2)
    row = {"prompt": prompt, "completion": "a cat", "images": images}
    with pytest.raises(DataError, match=said):
        load(tmp_path, row)
    good = {"prompt": "What?", "completion": "a cat", "images": ["img/a.png"]}
    kept = load(tmp_path, row, good, on_bad_row="skip")
    assert (len(kept.trees), len(kept.quarantined)) == (1, 1)


def test_a_picture_of_a_column_that_is_not_used_is_not_lost(tmp_path: Path, picture: Path) -> None:
    shown = [user({"type": "image", "path": "img/a.png"}, "What?")]
    with pytest.raises(DataError, match="has 1 picture, and its prompt has places for 0"):
        load(tmp_path, {"prompt": "What?", "completion": "a cat", "shown": shown})


def test_an_answer_has_no_picture(tmp_path: Path, picture: Path) -> None:
    turns = [user("Draw"), {"role": "assistant", "content": [{"type": "image"}]}]
    with pytest.raises(DataError, match="a picture is in an answer"):
        load(tmp_path, {"messages": turns, "images": ["img/a.png"]})


def test_bombs_are_refused_by_their_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: Path) -> None:
    monkeypatch.setattr("penchant.data.pictures.MOST_PIXELS", 40 * 24 - 1)
    with pytest.raises(DataError, match="pixels"):
        load(tmp_path, {"prompt": "What?", "completion": "a cat", "images": ["img/a.png"]})
    monkeypatch.setattr("penchant.data.pictures.MOST_BYTES", 100)
    with pytest.raises(DataError, match="more than 0 MB"):
        load(tmp_path, {"prompt": "What?", "completion": "a cat", "images": ["img/a.png"]})


def test_files_of_several_folders_need_one_that_holds_the_pictures(tmp_path: Path, picture: Path) -> None:
    row = {"prompt": "What?", "completion": "a cat", "images": ["img/a.png"]}
    (tmp_path / "more").mkdir()
    files = [str(write_rows(folder, [row])) for folder in (tmp_path, tmp_path / "more")]
    with pytest.raises(ConfigError, match=r"data\.image_dir"):
        load_preferences(files, image_dir="")
    assert len(load_preferences(files, image_dir=str(tmp_path)).trees) == 2


def test_text_alone_says_what_to_do_with_pictures(tmp_path: Path, picture: Path) -> None:
    rows = [
        {"prompt": "What?", "completion": "a cat", "images": ["img/a.png"]},
        {"messages": [user({"type": "image_url"}), ANSWER]},
    ]
    for row in rows:
        file = write_rows(tmp_path, [row])
        with pytest.raises(DataError, match=r"model\.vision=frozen"):
            load_preferences(str(file))
        with pytest.raises(PenchantError, match=r"model\.vision=frozen"):
            load_preferences(str(file), on_bad_row="skip")
    with pytest.raises(DataError, match="drop the row"):
        load_preferences(str(write_rows(tmp_path, [{"prompt": "What?", "completion": "x", "videos": ["a.mp4"]}])))
