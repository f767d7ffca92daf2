"""Data of one kind for a loss of another: the rules, and the refusals with file, field and option."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import from_rows

from penchant.data.adapt import adapt, mismatched_rows
from penchant.data.load import Dataset, summary
from penchant.data.options import DataConfig
from penchant.errors import DataError
from penchant.losses import LOSSES

PAIRS = [
    {"prompt": "p", "chosen": "good", "rejected": "bad", "chosen_score": 2.0, "rejected_score": 0.5},
    {"prompt": "q", "chosen": "fine", "rejected": "poor", "chosen_score": 1.0, "rejected_score": 1.5},
    {"prompt": "r", "chosen": "yes", "rejected": "no"},
]
LABELLED: list[dict[str, Any]] = [
    {"prompt": "p", "completion": "good", "label": True},
    {"prompt": "p", "completion": "bad", "label": 0},
    {"prompt": "q", "completion": "so so", "label": "good"},
]
SCORED = [
    {"prompt": "p", "completion": "best", "score": 3},
    {"prompt": "p", "completion": "worst", "score": -1.0},
    {"prompt": "p", "completion": "middle", "score": 1.0},
    {"prompt": "q", "completion": "alone", "score": 2.0},
]


def made(rows: list[dict[str, Any]], loss: str, **options: Any) -> Dataset:
    spec = LOSSES[loss]
    data = DataConfig(path="x.jsonl", **options)
    return adapt(from_rows(rows, name="x.jsonl"), loss, spec.signal, spec.needs, data, "x.jsonl")


def test_shapes_are_recognized() -> None:
    assert [from_rows(r).shape for r in (PAIRS, LABELLED, SCORED)] == ["pairs", "unpaired", "scored"]
    labels = [t.completions[0].label for t in from_rows(LABELLED).trees]
    assert labels == [True, False, True]


@pytest.mark.parametrize("loss", ["kto", "bco", "pmpo"])
def test_pairs_are_taken_apart_and_keep_their_prompt_together(loss: str) -> None:
    dataset = made(PAIRS, loss)
    assert [[c.label for c in t.completions] for t in dataset.trees] == [[True, False]] * 3


def test_scores_become_labels_at_the_threshold() -> None:
    dataset = made(SCORED, "kto", score_threshold=1.0)
    assert [t.completions[0].label for t in dataset.trees] == [True, False, True, True]


def test_scores_become_pairs_by_an_explicit_rule() -> None:
    dataset = made(SCORED, "dpo", pairs_from_scores="best_worst")
    (tree,) = dataset.trees
    assert [c.text for c in tree.completions] == ["best", "worst"]
    assert [c.score for c in tree.completions] == [3.0, -1.0]
    assert dataset.kind == "pairs"
    assert summary(dataset).startswith("4 rows (scored) = 3 accepted + 1 kept aside") and "1 example" in summary(
        dataset
    )
    lists = made(SCORED, "plackett_luce")
    assert (lists.total, lists.accepted, len(lists.trees), len(lists.quarantined)) == (4, 3, 1, 1)
    assert [q.what for q in dataset.quarantined] == ["no two different scores among the prompt's 1 answer"]


@pytest.mark.parametrize("loss", ["dpo", "plackett_luce"])
def test_answers_that_become_one_row_have_one_weight(loss: str) -> None:
    how: dict[str, Any] = {"pairs_from_scores": "best_worst"} if loss == "dpo" else {}
    data, spec = DataConfig(path="x.jsonl", **how), LOSSES[loss]

    def weighted(*weights: float) -> Dataset:
        rows = [{**r, "w": w} for r, w in zip(SCORED, weights, strict=True)]
        read = from_rows(rows, name="x.jsonl", weight="w")
        return adapt(read, loss, spec.signal, spec.needs, data, "x.jsonl")

    assert weighted(2, 2, 2, 1).trees[0].weight == 2
    with pytest.raises(DataError, match=r"x\.jsonl:2: counts 3, and .*\(x\.jsonl:1\) 2; .*one weight"):
        weighted(2, 3, 2, 1)


def test_options_that_would_be_ignored_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.score_threshold is set, but loss\.name=kto on rows that are pairs"):
        made(PAIRS, "kto", score_threshold=1.0)
    with pytest.raises(DataError, match=r"data\.pairs_from_scores is set, but loss\.name=kto"):
        made(SCORED, "kto", pairs_from_scores="best_worst")


def test_scores_reach_the_loss_that_needs_them() -> None:
    with pytest.raises(DataError, match=r'x\.jsonl:3: loss\.name=rebel needs "chosen_score"'):
        made(PAIRS, "rebel")
    assert made(PAIRS, "rebel", on_bad_row="skip").accepted == 2
    odpo = made(PAIRS, "odpo", on_bad_row="skip")
    assert odpo.accepted == 1
    assert '"chosen_score" (1) is not above "rejected_score" (1.5)' in {q.what for q in odpo.quarantined}


def test_sft_learns_good_answers_only_and_counts_the_others() -> None:
    dataset = made(LABELLED, "sft")
    assert [t.completions[0].text for t in dataset.trees] == ["good", "so so"]
    assert len(dataset.quarantined) == 1 and dataset.total == 3


@pytest.mark.parametrize(
    "rows,loss,what",
    [
        (LABELLED, "dpo", "needs pairs .* these rows are unpaired; .*kto, bco or pmpo"),
        (SCORED, "dpo", "data.pairs_from_scores=best_worst"),
        (SCORED, "kto", r'"score" \(median 2\); set data.score_threshold'),
        ([{"prompt": "p", "completion": "c"}], "pmpo", 'rows are sft; add a "label" column'),
        ([{"text": "t"}], "kto", "rows are text"),
        ([{**LABELLED[1]}], "sft", "there is none"),
        ([SCORED[3]], "dpo", "these rows are single answers"),
    ],
)
def test_refusals_name_file_field_and_option(rows: list[dict[str, Any]], loss: str, what: str) -> None:
    with pytest.raises(DataError, match=what) as error:
        made(rows, loss)
    assert str(error.value).startswith("x.jsonl")


def test_no_prompt_with_two_scores() -> None:
    with pytest.raises(DataError, match="no prompt has two answers"):
        made([SCORED[3]], "dpo", pairs_from_scores="best_worst")


@pytest.mark.parametrize(
    "row,what",
    [
        ({"prompt": "p", "completion": "c", "label": "maybe"}, "\"label\" is 'maybe'; give true or false"),
        ({"prompt": "p", "completion": "c", "label": None}, '"label" is missing'),
        ({"prompt": "p", "completion": "c", "score": "high"}, "\"score\" is 'high'; make it a finite number"),
        ({"prompt": "p", "completion": "c", "score": float("nan")}, "make it a finite number"),
        ({"prompt": "p", "completion": "c", "score": True}, "make it a finite number"),
        ({**PAIRS[0], "chosen_score": "x"}, "\"chosen_score\" is 'x'"),
    ],
)
def test_bad_labels_and_scores_are_named(row: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what):
        from_rows([row], name="x.jsonl")


@given(st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=12))
def test_mismatch_takes_the_next_other_prompt(prompts: list[bytes]) -> None:
    partners = mismatched_rows(prompts)
    if len(set(prompts)) < 2:
        assert partners is None
        return
    assert partners is not None
    n = len(prompts)
    for i, partner in enumerate(partners):
        steps = (partner - i) % n
        assert prompts[partner] != prompts[i]
        assert all(prompts[(i + k) % n] == prompts[i] for k in range(steps))
