"""Trees with several scored answers, and rows with several trees: adapting, splitting, counting and tokenizing."""

from __future__ import annotations

from typing import Any

import pytest
from rows import from_rows
from tiny import tiny_tokenizer

from penchant.data.adapt import adapt, repeated_prompts
from penchant.data.audit import audit
from penchant.data.load import Dataset
from penchant.data.options import DataConfig
from penchant.data.split import split_by_prompt
from penchant.data.tokenize import tokenize
from penchant.errors import DataError

NAMES = "hi there", "who", "what now"


def rated(*ratings: float) -> Dataset:
    answers = [f"answer {i}" for i in range(len(ratings))]
    return from_rows([{"instruction": n, "generations": answers, "ratings": list(ratings)} for n in NAMES], name="x")


def adapted(dataset: Dataset, signal: str, **options: Any) -> Dataset:
    return adapt(dataset, "loss", signal, frozenset(), DataConfig(path="x", **options), "x")


def conversations() -> Dataset:
    rows = [
        {
            "model": "m",
            "conversation": [{"role": r, "content": f"{r} {n} {i}"} for i in (1, 2) for r in ("user", "assistant")],
        }
        for n in NAMES
    ]
    return from_rows(rows, name="x", layout_options={"use": "every_turn"})


def test_the_best_of_all_answers_is_set_against_the_worst() -> None:
    pairs = adapted(rated(2, 5, 1, 4), "pairs", pairs_from_scores="best_worst")
    assert [[(c.text, c.label, c.score) for c in t.completions] for t in pairs.trees] == [
        [("answer 1", True, 5.0), ("answer 2", False, 1.0)]
    ] * 3
    assert (pairs.kind, pairs.total, pairs.accepted) == ("pairs", 3, 3)


def test_every_answer_gets_its_label() -> None:
    labelled = adapted(rated(2, 5, 1, 4), "unpaired", score_threshold=3)
    assert [[c.label for c in t.completions] for t in labelled.trees] == [[True, True, False, False]] * 3
    found = audit(labelled).findings
    assert (found["good_answers"].count, found["good_answers"].of) == (6, 12)
    scores = audit(rated(2, 5, 1, 4)).findings["scores"]
    assert (scores.count, scores.of) == (6, 12)


def test_a_list_holds_all_answers_of_a_prompt_the_best_first() -> None:
    lists = adapted(rated(2, 5, 1, 4), "lists")
    assert [[c.score for c in t.completions] for t in lists.trees] == [[5.0, 4.0, 2.0, 1.0]] * 3
    rows = [{"prompt": "p", "completion": f"a{i}", "score": s} for i, s in enumerate((1, 3, 2))]
    single = adapted(from_rows([*rows, {"prompt": "q", "completion": "b", "score": 1}]), "lists")
    assert [[c.text for c in t.completions] for t in single.trees] == [["a1", "a2", "a0"]]
    assert (single.total, single.accepted) == (4, 3)
    assert [q.what for q in single.quarantined] == ["no two different scores among the prompt's 1 answer"]
    pairs = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    pairs[1] |= {"chosen_score": 0.5, "rejected_score": 0.25}  # type: ignore[dict-item]
    two = adapted(from_rows(pairs), "lists")
    assert [[c.score for c in t.completions] for t in two.trees] == [[1.0, 0.0], [0.5, 0.25]]
    with pytest.raises(DataError, match="needs answers with scores, but these rows are sft"):
        adapted(from_rows([{"prompt": "p", "completion": "a"}]), "lists")


def test_supervised_training_meets_the_best_answer_first() -> None:
    assert [t.completions[0].text for t in adapted(rated(2, 5, 1), "tokens").trees] == ["answer 1"] * 3


def test_prompts_of_many_answers_stand_once() -> None:
    once = adapted(rated(1, 2), "prompts")
    assert (once.total, once.accepted, [t.completions for t in once.trees]) == (3, 3, [()] * 3)


def test_rows_of_repeated_prompts_keep_their_count_and_it_is_said() -> None:
    prompts = adapted(from_rows([{"prompt": f"p{i % 44}"} for i in range(60)]), "prompts")
    assert (prompts.total, prompts.accepted, len(prompts.trees)) == (60, 60, 60)
    assert repeated_prompts(prompts) == "60 rows: 44 distinct prompts"
    answers = adapted(from_rows([{"prompt": f"p{i % 2}", "completion": f"a{i}"} for i in range(6)]), "prompts")
    assert (answers.total, answers.accepted, [t.prompt for t in answers.trees]) == (6, 6, ["p0", "p1"])
    assert repeated_prompts(answers) == "6 rows: 2 distinct prompts"
    assert not repeated_prompts(adapted(from_rows([{"prompt": "p"}, {"prompt": "q"}]), "prompts"))


@pytest.mark.parametrize("kind,kept", [("scored", 1), ("pairs", 0)])
def test_equal_answers_are_bad_only_in_a_pair(kind: str, kept: int) -> None:
    rows: dict[str, dict[str, Any]] = {
        "scored": {"instruction": "hi", "generations": ["same", "same"], "ratings": [1, 2]},
        "pairs": {"prompt": "hi", "chosen": "same", "rejected": "same"},
    }
    dataset = from_rows([rows[kind]], identical="keep")
    assert audit(dataset).findings["identical_pairs"].count == 1 - kept
    assert tokenize(dataset, tiny_tokenizer(), max_length=32, on_bad_row="skip").accepted == kept


def test_rows_of_several_examples_are_split_by_example() -> None:
    dataset = conversations()
    assert (dataset.total, dataset.accepted, len(dataset.trees)) == (3, 3, 6)
    train, held = split_by_prompt(dataset, validation_rows=5)
    assert (len(train.trees), len(held.trees), train.total, held.total) == (1, 5, 1, 5)
    assert {t.source for t in (*train.trees, *held.trees)} == {t.source for t in dataset.trees}
    train, held = split_by_prompt(dataset, validation_rows=1)
    assert {t.source for t in (*train.trees, *held.trees)} == {t.source for t in dataset.trees}
    assert audit(dataset).findings["duplicates"].of == 6
    assert audit(dataset).findings["bad_rows"].of == 3
