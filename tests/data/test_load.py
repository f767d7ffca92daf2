"""Loading: every layout becomes prompt trees, every bad row is counted, and nothing is dropped silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import from_rows
from tiny import tiny_tokenizer

from penchant.data.layouts import RowError
from penchant.data.layouts.hh import from_hh
from penchant.data.load import load_preferences, summary, write_quarantine
from penchant.data.split import prompt_key, split_by_prompt
from penchant.data.tokenize import tokenize
from penchant.errors import ConfigError, DataError
from penchant.types import Message

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "good"}
OTHER = {"role": "assistant", "content": "bad"}


@pytest.mark.parametrize(
    "row,shape,prompt",
    [
        ({"prompt": "hi", "chosen": "good", "rejected": "bad"}, "pairs", "hi"),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, "pairs", (Message("user", "hi"),)),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "pairs", (Message("user", "hi"),)),
        ({"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "pairs", (Message("user", "hi"),)),
        ({"prompt": "hi", "chosen": [ANSWER], "rejected": [OTHER]}, "pairs", (Message("user", "hi"),)),
        (
            {"chosen": "\n\nHuman: hi\n\nAssistant: good", "rejected": "\n\nHuman: hi\n\nAssistant: bad"},
            "hh",
            (Message("user", "hi"),),
        ),
        ({"instruction": "hi", "input": "", "chosen": "good", "rejected": "bad"}, "alpaca_pairs", "hi"),
        ({"instruction": "hi", "input": "there", "chosen": "good", "rejected": "bad"}, "alpaca_pairs", "hi\n\nthere"),
    ],
)
def test_every_pair_shape(row: dict[str, Any], shape: str, prompt: Any) -> None:
    dataset = from_rows([row])
    assert dataset.shape == shape and dataset.kind == "pairs"
    tree = dataset.trees[0]
    assert tree.prompt == prompt
    assert [(c.text, c.label) for c in tree.completions] == [("good", True), ("bad", False)]


@pytest.mark.parametrize(
    "row,kind",
    [
        ({"prompt": "hi", "completion": "good"}, "sft"),
        ({"prompt": [USER], "completion": [ANSWER]}, "sft"),
        ({"messages": [USER, ANSWER]}, "sft"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "good"}]}, "sft"),
        ({"instruction": "hi", "output": "good"}, "sft"),
        ({"text": "good"}, "text"),
    ],
)
def test_every_single_shape(row: dict[str, Any], kind: str) -> None:
    dataset = from_rows([row])
    assert dataset.kind == kind
    assert dataset.trees[0].completions[0].text == "good"


def test_hh_is_split_at_the_last_assistant_turn() -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    tree = from_hh({"chosen": start + " d", "rejected": start + " e"})
    assert tree.prompt == (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert [c.text for c in tree.completions] == ["d", "e"]


def test_hh_with_different_prompts_is_a_bad_row() -> None:
    with pytest.raises(RowError, match="differ before their last answer"):
        from_hh({"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"})


words = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters=":"), min_size=1).filter(str.strip)


@given(st.lists(words, min_size=1, max_size=4), words, words)
def test_hh_parser_gives_back_what_was_said(turns: list[str], chosen: str, rejected: str) -> None:
    start = "".join(f"\n\nHuman: {t}\n\nAssistant: {t}" for t in turns[:-1]) + f"\n\nHuman: {turns[-1]}\n\nAssistant: "
    tree = from_hh({"chosen": start + chosen, "rejected": start + rejected})
    said = [t.strip() for turn in turns[:-1] for t in (turn, turn)] + [turns[-1].strip()]
    assert [m.content for m in tree.prompt] == said  # type: ignore[union-attr]
    assert [c.text for c in tree.completions] == [chosen.strip(), rejected.strip()]


GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.mark.parametrize(
    "bad,what",
    [
        ({"prompt": "p", "rejected": "r"}, '"chosen" is missing'),
        ({**GOOD, "chosen": None}, '"chosen" is null'),
        ({**GOOD, "chosen": ""}, '"chosen" is empty'),
        ({**GOOD, "chosen": " \n"}, '"chosen" is empty'),
        ({**GOOD, "chosen": 3}, r'"chosen" is a number \(3\)'),
        ({**GOOD, "chosen": True}, '"chosen" is a boolean'),
        ({**GOOD, "chosen": "r"}, '"chosen" equals "rejected"'),
        ({**GOOD, "chosen": " r "}, '"chosen" equals "rejected"'),
        ({**GOOD, "prompt": None}, '"prompt" is null'),
        ({"prompt": "p", "chosen": [USER], "rejected": [ANSWER]}, "does not end with an assistant turn"),
        ({"prompt": "p", "chosen": [{"role": "wizard", "content": "x"}], "rejected": [ANSWER]}, "role 'wizard'"),
    ],
)
def test_bad_rows_stop_or_are_kept_aside(tmp_path: Path, bad: dict[str, Any], what: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [GOOD, bad, {**GOOD, "prompt": "q"}]))
    with pytest.raises(DataError, match=r"train\.jsonl:2: .*" + what):
        load_preferences(str(path))
    dataset = load_preferences(str(path), on_bad_row="skip")
    assert (dataset.accepted, len(dataset.quarantined), dataset.total) == (2, 1, 3)
    assert "3 rows (pairs) = 2 accepted + 1 kept aside" in summary(dataset)
    kept = write_quarantine(dataset.quarantined, tmp_path, "train")
    assert kept is not None
    (line,) = kept.read_text().splitlines()
    assert json.loads(line)["where"] == "train.jsonl:2"
    assert json.loads(line)["row"] == bad


def test_identical_pairs_can_be_kept() -> None:
    assert from_rows([{**GOOD, "chosen": "r"}], identical="keep").accepted == 1


def test_columns_can_be_mapped() -> None:
    dataset = from_rows(
        [{"q": "p", "good": "c", "bad": "r"}], columns={"prompt": "q", "chosen": "good", "rejected": "bad"}
    )
    assert dataset.trees[0].prompt == "p"


def test_unknown_columns_are_listed() -> None:
    with pytest.raises(DataError, match=r"the columns \(reply_a, subject\) fit no known layout.*data\.columns"):
        from_rows([{"subject": "p", "reply_a": "c"}])


def test_several_files_and_limit(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({**GOOD, "prompt": f"{name}{i}"}) + "\n" for i in range(3)))
    paths = [str(tmp_path / n) for n in ("a.jsonl", "b.jsonl")]
    assert load_preferences(paths).total == 6
    assert load_preferences(paths, limit=4).trees[-1].source == "b.jsonl:1"
    with pytest.raises(ConfigError, match="limit: is -1"):
        load_preferences(paths, limit=-1)


def test_the_fingerprint_is_of_content() -> None:
    one, same = from_rows([GOOD]), from_rows([GOOD], name="elsewhere")
    assert one.fingerprint == same.fingerprint != from_rows([{**GOOD, "chosen": "C"}]).fingerprint


@given(st.lists(st.integers(0, 12), min_size=8, max_size=60), st.integers(1, 5), st.integers(0, 3))
def test_no_prompt_is_on_both_sides_of_a_split(prompts: list[int], wanted: int, seed: int) -> None:
    dataset = from_rows(
        [{"prompt": f"Prompt  {p}", "chosen": f"c{i}", "rejected": f"r{i}"} for i, p in enumerate(prompts)]
    )
    try:
        train, held = split_by_prompt(dataset, validation_rows=wanted, seed=seed)
    except DataError:
        return
    assert train.accepted + held.accepted == len(prompts)
    assert held.accepted <= wanted
    assert not {prompt_key(t.prompt) for t in train.trees} & {prompt_key(t.prompt) for t in held.trees}
    again = split_by_prompt(dataset, validation_rows=wanted, seed=seed)[1]
    assert again.fingerprint == held.fingerprint


def test_a_split_of_unique_prompts_is_exact() -> None:
    dataset = from_rows([{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(50)])
    assert split_by_prompt(dataset, validation_rows=7)[1].accepted == 7
    assert split_by_prompt(dataset, validation_fraction=0.2)[1].accepted == 10


def test_a_split_is_its_seeds() -> None:
    dataset = from_rows([{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(50)])
    held = [[t.source for t in split_by_prompt(dataset, validation_rows=7, seed=s)[1].trees] for s in (0, 0, 1)]
    assert held[0] == held[1] != held[2]


def test_real_files(shared_dir: Path) -> None:
    expected = {
        "hh-harmless-1700.jsonl": ("hh", 1694, 6),
        "polite-1000.json": ("alpaca_pairs", 995, 5),
        "ultrafeedback-1000.jsonl": ("pairs", 994, 6),
    }
    for name, (shape, accepted, aside) in expected.items():
        dataset = load_preferences(str(shared_dir / "data" / name), on_bad_row="skip")
        assert (dataset.shape, dataset.accepted, len(dataset.quarantined)) == (shape, accepted, aside), name


HALF = '"\\ud83d is half an emoji"'


@pytest.mark.parametrize(
    "row",
    [
        f'{{"prompt": {HALF}, "chosen": "a", "rejected": "b"}}',
        f'{{"prompt": "p", "chosen": "a", "rejected": {HALF}}}',
        f'{{"messages": [{{"role": "user", "content": {HALF}}}, {{"role": "assistant", "content": "a"}}]}}',
        f'{{"text": {HALF}}}',
    ],
)
def test_half_of_a_surrogate_pair_is_a_bad_row(tmp_path: Path, row: str) -> None:
    whole = row.replace("\\ud83d", "\\ud83d\\ude00")  # the complete emoji, as two escapes, is valid
    path = tmp_path / "a.jsonl"
    path.write_text(f"{whole}\n{row}\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: holds half of a surrogate pair \(\\ud83d, character 1 of a text"):
        load_preferences(str(path))
    kept = load_preferences(str(path), on_bad_row="skip")
    assert (kept.accepted, kept.total, kept.quarantined[0].where) == (1, 2, "a.jsonl:2")
    assert not tokenize(kept, tiny_tokenizer()).quarantined
    written = write_quarantine(kept.quarantined, tmp_path, "train")
    assert written is not None and json.loads(written.read_text())["row"] == json.loads(row)


def test_the_way_to_map_columns_uses_the_files_own_names() -> None:
    with pytest.raises(DataError, match=r"data\.columns=\{prompt: frage, chosen: gute antwort, rejected: schlechte\}"):
        from_rows([{"frage": "p", "nr": 1, "gute antwort": "c", "schlechte": "r"}])
    with pytest.raises(DataError, match=r"data\.columns=\{prompt: frage, completion: antwort\}"):
        from_rows([{"frage": "p", "antwort": "c"}])


@pytest.mark.parametrize(
    "first", ["How do I boil an egg?\tIn hot water.\tNo idea.", "Tell me a joke\tsure\t0.25", "b\tc\td" + "e" * 40]
)
def test_a_table_without_a_header_is_told_so(first: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text(f"{first}\nHow do I fry it?\tIn a pan.\tNo.\n")
    with pytest.raises(
        DataError, match=r"first line is read as the names of its columns .* put a line with names in front"
    ):
        load_preferences(str(path))
    path.write_text("frage\tgut\tschlecht\nHow do I fry it?\tIn a pan.\tNo.\n")
    with pytest.raises(DataError, match="fit no known layout"):
        load_preferences(str(path))
