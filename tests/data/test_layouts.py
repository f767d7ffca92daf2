"""Every layout: its rows give exactly the expected examples, and detection finds it and lists other layouts that fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rows import from_rows

from penchant.data.layouts import LAYOUTS, LeftOut, RowError, detect
from penchant.data.layouts.page import tree_json
from penchant.data.load import Converted, convert_rows, load_preferences, summary
from penchant.data.read import BadRow, Row, read_rows
from penchant.errors import ConfigError, DataError

FOLDER = Path(__file__).parent / "layouts"
# rows that are well-formed in another layout too, in which case both are shown to the user
OTHERS = {"ultrafeedback_binarized": ("pairs",), "argilla_pairs": ("pairs",)}


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def expected_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.expected.jsonl").read_text(encoding="utf-8").splitlines()]


def converted(name: str, **options: Any) -> list[Converted]:
    rows = read_rows(str(FOLDER / f"{name}.jsonl"))
    return list(convert_rows(rows, LAYOUTS[name], LAYOUTS[name].settings(options)))


def trees(name: str, row: int, **options: Any) -> list[dict[str, Any]]:
    made = LAYOUTS[name].convert(rows_of(name)[row], LAYOUTS[name].settings(options))
    return [tree_json(t) for t in made]


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_become_exactly_these_examples(name: str) -> None:
    made, wanted = converted(name), expected_of(name)
    assert len(made) == len(wanted)
    for got, want in zip(made, wanted, strict=True):
        assert [tree_json(t) for t in got.trees] == want.get("trees", [])
        assert got.rows == want.get("rows", 1)
        assert [want["aside"] in q.what for q in got.aside] == ([True] * got.rows if "aside" in want else [])
        assert all(q.how for q in got.aside), "how to fix it is said"
    assert any(m.trees for m in made) and any(m.aside for m in made)


@pytest.mark.parametrize("name", LAYOUTS)
def test_detection_finds_the_layout_and_names_what_else_fits(name: str) -> None:
    found = detect(rows_of(name))
    assert found.layout == name and found.why == LAYOUTS[name].why
    assert set(found.others) == set(OTHERS.get(name, ()))
    whole = load_preferences(str(FOLDER / f"{name}.jsonl"), on_bad_row="skip")
    assert whole.detection == found and whole.shape == name
    assert whole.total == len(rows_of(name)) == whole.accepted + len(whole.quarantined)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_example_is_of_its_layout(name: str) -> None:
    layout = LAYOUTS[name]
    assert detect([layout.example, *layout.rest]).layout == name
    assert layout.example_trees and layout.summary and layout.source
    assert layout.kind in {"pairs", "unpaired", "scored", "sft", "prompts", "text"}
    assert all(o.default == o.check(o.default, name) for o in layout.options.values())


# ---------------------------------------------------------------------------------------------------------------------
# options


def test_ultrafeedback_ranks_by_what_is_asked_for() -> None:
    (tree,) = trees("ultrafeedback", 0, score="overall")
    assert [(c["text"], c["score"]) for c in tree["completions"]] == [("bad", 10.0), ("good", 8.0)]
    (tree,) = trees("ultrafeedback", 0, score="truthfulness")
    assert [(c["text"], c["score"]) for c in tree["completions"]] == [("good", 4.0), ("bad", 1.0)]


def test_ultrafeedback_binarized_can_be_supervised() -> None:
    assert LAYOUTS["ultrafeedback_binarized"].kind_of({"use": "sft"}) == "sft"
    (tree,) = trees("ultrafeedback_binarized", 1, use="sft")
    assert tree == {"prompt": [{"role": "user", "content": "a"}], "completions": [{"text": "b"}]}


def test_helpsteer_scores_are_one_attribute_or_a_weighted_mean() -> None:
    score = {a: trees("helpsteer", 0, attribute=a)[0]["completions"][0]["score"] for a in ("verbosity", "mean")}
    assert score == {"verbosity": 2.0, "mean": (4 + 3 + 4 + 1 + 2) / 5}
    weighted = trees("helpsteer", 0, attribute="mean", weight_verbosity=-1, weight_complexity=0)
    assert weighted[0]["completions"][0]["score"] == (4 + 3 + 4 - 2) / 4


@pytest.mark.parametrize("name,row", [("helpsteer2_pairs", 1), ("helpsteer3_pairs", 1), ("shp", 1)])
def test_weak_preferences_can_be_left_out(name: str, row: int) -> None:
    option = {"min_score_ratio": 2} if name == "shp" else {"min_strength": 2}
    with pytest.raises(LeftOut, match=r"below 2|weaker than 2"):
        trees(name, row, **option)
    assert trees(name, 0, **option) == trees(name, 0)


def test_a_vote_just_strong_enough_is_kept() -> None:
    assert trees("shp", 1, min_score_ratio=1.5) == trees("shp", 1)
    assert trees("helpsteer2_pairs", 0, min_strength=2) == trees("helpsteer2_pairs", 0)


def test_nothing_below_a_deleted_message_is_used() -> None:
    row = rows_of("oasst")[0]
    with pytest.raises(LeftOut):
        LAYOUTS["oasst"].convert({**row, "prompt": {**row["prompt"], "deleted": True}}, {})


def test_pku_prefers_the_better_or_the_safer_answer() -> None:
    assert trees("pku_saferlhf", 0, prefer="safer")[0]["completions"][0]["text"] == "öne"
    with pytest.raises(LeftOut, match="the preferred answer is unsafe"):
        trees("pku_saferlhf", 0, chosen="safe")
    assert trees("pku_saferlhf", 1, chosen="safe") == trees("pku_saferlhf", 1)


def test_summaries_without_confidence_can_be_left_out() -> None:
    assert trees("tldr_comparisons", 1, min_confidence=7) == trees("tldr_comparisons", 1)
    for row, least, what in ((1, 8, "a confidence below 8"), (0, 1, "no confidence")):
        with pytest.raises(LeftOut, match=what):
            trees("tldr_comparisons", row, min_confidence=least)


def test_ties_are_left_out_and_stop_nothing_unless_they_shall() -> None:
    path = str(FOLDER / "arena.jsonl")
    found = load_preferences(path, limit=5)  # on_bad_row is error, and a tie is not a bad row
    assert (found.accepted, [q.what for q in found.quarantined][:2]) == (2, ["a tie", "both are bad"])
    with pytest.raises(DataError, match=r"arena\.jsonl:3: a tie"):
        load_preferences(path, layout_options={"ties": "bad_row"})
    with pytest.raises(DataError, match=r'arena\.jsonl:7: "winner" names no model'):
        load_preferences(path)


def test_the_first_answers_of_two_conversations_can_be_compared() -> None:
    (tree,) = trees("arena", 4, turns="first")
    assert [c["text"] for c in tree["completions"]] == ["x", "y"] and tree["prompt"][0]["content"] == "hi"
    (tree,) = trees("arena_55k", 1, turns="first")
    assert [c["text"] for c in tree["completions"]] == ["same", "same"]


@pytest.mark.parametrize(
    "use,kind,wanted",
    [
        ("sft", "sft", [(["a", "b", "ç"], ["d"])]),
        ("every_turn", "sft", [(["a"], ["b"]), (["a", "b", "ç"], ["d"])]),
        ("first_turn", "sft", [(["a"], ["b"])]),
        ("prompts", "prompts", [(["a", "b", "ç"], [])]),
        ("first_prompt", "prompts", [(["a"], [])]),
    ],
)
def test_a_conversation_gives_answers_or_prompts(use: str, kind: str, wanted: list[Any]) -> None:
    found = [
        ([m["content"] for m in t["prompt"]], [c["text"] for c in t["completions"]]) for t in trees("lmsys", 1, use=use)
    ]
    assert found == wanted and LAYOUTS["lmsys"].kind_of({"use": use}) == kind


@pytest.mark.parametrize("name,row", [("messages", 1), ("sharegpt", 1)])
def test_every_answer_of_a_conversation_can_be_learned(name: str, row: int) -> None:
    found = trees(name, row, turns="every")
    assert [c["text"] for t in found for c in t["completions"]] == ["b", "d"]
    assert all(t["prompt"][0] == {"role": "system", "content": "be brief"} for t in found)


def test_argilla_ratings_of_people_or_of_a_model() -> None:
    with pytest.raises(RowError, match="has no submitted response"):
        trees("argilla_ratings", 1, rated_by="people")
    with pytest.raises(RowError, match="has no suggestion"):
        trees("argilla_ratings", 0, rated_by="model")
    assert trees("argilla_ratings", 1, rated_by="model") == trees("argilla_ratings", 1)


@pytest.mark.parametrize(
    "use,kind,wanted",
    [
        ("neighbours", "pairs", [["best", "worse"], ["ten", "two"], ["two", "one"]]),
        ("scored", "scored", [["best", "worse"], ["ten", "two", "one"]]),
        ("sft", "sft", [["best"], ["ten"]]),
    ],
)
def test_message_trees_give_pairs_scores_or_answers(use: str, kind: str, wanted: list[list[str]]) -> None:
    for made in (trees("oasst", 0, use=use), [tree_json(t) for t in converted("oasst_flat", use=use)[0].trees]):
        assert [[c["text"] for c in t["completions"]] for t in made] == wanted
    assert LAYOUTS["oasst"].kind_of({"use": use}) == kind


def test_two_answers_behind_each_other_are_not_joined() -> None:
    """The second would otherwise go on with the first, without even a space between them."""
    start = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nAssistant:"
    with pytest.raises(DataError, match="ends with two assistant turns"):
        from_rows([{"chosen": f"{start} Yes?", "rejected": f"{start} What?"}])


def test_an_orca_tie_can_be_kept() -> None:
    assert len(trees("orca_pairs", 2, ties="keep")) == 1


@pytest.mark.parametrize(
    "shape,options,what",
    [
        ("hh", {"ties": "keep"}, "data.layout_options.ties: is not an option of the layout hh; it has no options"),
        ("shp", {"min_score": 2}, "it has min_score_ratio"),
        ("shp", {"min_score_ratio": 0}, "give a number from 1"),
        ("shp", {"min_score_ratio": True}, "give a number from 1"),
        ("lmsys", {"use": "all"}, "choose one of sft, every_turn"),
        ("nope", {}, "'nope' is not a layout"),
    ],
)
def test_wrong_options_are_refused(shape: str, options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_rows([{"prompt": "p"}], shape=shape, layout_options=options)
    assert what in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# accounting, detection, robustness


def test_rows_and_examples_are_counted_apart() -> None:
    found = load_preferences(str(FOLDER / "oasst.jsonl"), on_bad_row="skip")
    assert (found.total, found.accepted, len(found.quarantined), len(found.trees)) == (4, 1, 3, 2)
    assert summary(found).startswith("4 rows (oasst) = 1 accepted + 3 kept aside") and "2 examples" in summary(found)
    assert [t.source for t in found.trees] == ["oasst.jsonl:1#1", "oasst.jsonl:1#2"]
    flat = load_preferences(str(FOLDER / "oasst_flat.jsonl"), on_bad_row="skip")
    assert [(t.prompt, t.completions) for t in flat.trees] == [(t.prompt, t.completions) for t in found.trees]
    assert flat.fingerprint == found.fingerprint
    assert (flat.total, flat.accepted, len(flat.quarantined)) == (11, 8, 3)
    half = found.subset([1])
    assert (half.total, half.accepted, half.quarantined) == (1, 1, ())


def test_rows_that_cannot_be_read_are_counted_among_groups() -> None:
    flat = [Row(f"x:{i}", r) for i, r in enumerate(rows_of("oasst_flat"), 1)]
    rows: list[Row | BadRow] = [BadRow("x:0", "broken", "fix it", "{"), *flat, Row("x:99", {"message_id": "z"})]
    made = list(convert_rows(rows, LAYOUTS["oasst_flat"], {}))
    assert sum(m.rows for m in made) == len(rows)
    assert {q.what for m in made for q in m.aside} >= {"broken", '"message_tree_id" is null'}


def test_identical_answers_of_a_scored_pair_are_no_bad_row() -> None:
    row = {"instruction": "hi", "generations": ["same", "same"], "ratings": [1, 2]}
    assert len(from_rows([row]).trees[0].completions) == 2


def test_stepwise_supervision_is_refused_with_a_sentence() -> None:
    row = {"prompt": "1+1+1", "completions": ["1+1=2", "2+1=3"], "labels": [True, True]}
    with pytest.raises(DataError, match=r"this is stepwise supervision .* no process rewards here"):
        from_rows([row])


def test_the_most_rows_decide_and_the_first_of_equals_wins() -> None:
    pair, text = {"prompt": "p", "chosen": "a", "rejected": "b"}, {"text": "t"}
    assert detect([text, pair, pair]).layout == "pairs"
    assert detect([pair, text, text]).layout == "text"
    assert detect([]).layout is None and detect([{"q": 1}]).why == "the columns fit no known layout"


def test_columns_are_renamed_before_detection() -> None:
    row = {"post": "hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
    assert from_rows([row], columns={"history": "post"}).shape == "shp"


keys = st.sampled_from(
    [
        "role",
        "content",
        "from",
        "value",
        "text",
        "response",
        "Rating",
        "confidence",
        "replies",
        "rank",
        "user",
        "assistant",
    ]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("examples_of_each", [10, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_json_row_is_converted_or_says_what_is_wrong(name: str, examples_of_each: int) -> None:
    layout = LAYOUTS[name]
    examples = (layout.example, *layout.rest)
    names = sorted({*layout.columns, *(c for e in examples for c in e)})
    wheres = st.dictionaries(st.sampled_from(names), json_values, max_size=len(names))
    options = st.fixed_dictionaries(
        {n: st.sampled_from(o.choices) if o.choices else st.just(o.default) for n, o in layout.options.items()}
    )

    @given(st.sampled_from(examples), wheres, st.booleans(), options)
    @settings(max_examples=examples_of_each, deadline=None, suppress_health_check=list(HealthCheck))
    def convert(example: dict[str, Any], broken: dict[str, Any], whole: bool, chosen: dict[str, Any]) -> None:
        row = {**example, **broken} if whole else broken
        layout.fits(row)
        detect([row])
        try:
            if layout.group is not None:
                layout.group.key(row)
                row = dict(layout.group.fold([row]))
            made = layout.convert(row, chosen)
        except RowError as error:
            assert error.what and error.how
        else:
            assert made and all(c.text.strip() for t in made for c in t.completions)

    convert()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_number_too_long_to_print_is_no_crash(name: str) -> None:
    layout = LAYOUTS[name]
    for column in {*layout.example, *layout.columns}:
        row = {**layout.example, column: 10**5000}
        try:
            layout.convert(layout.group.fold([row]) if layout.group is not None else row, {})
        except RowError as error:
            assert error.what
