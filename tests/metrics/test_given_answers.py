"""Metrics of given answers and texts, computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from penchant.metrics.answers import TokenScores, answer_figures, completion_sums, is_answer, strip_eos, text_figures
from penchant.metrics.figures import Figure
from penchant.types import TokenTree


def tree(prompt: int, *lengths: int, labels: tuple[bool | None, ...] = (), source: str = "") -> TokenTree:
    ids = tuple(np.arange(n, dtype=np.int32) for n in lengths)
    return TokenTree(0, np.array([prompt], np.int32), ids, (False,) * len(lengths), source, labels)


PAIRS = [tree(1, 2, 1), tree(2, 1, 1), tree(1, 1, 2)]
# log-prob sums: (-3, -4), (-2, -1), (-5, -5), and the reference's (-4, -4), (-2, -2), (-6, -8)
POLICY = np.array([-1.0, -2.0, -4.0, -2.0, -1.0, -5.0, -2.0, -3.0])
REFERENCE = np.array([-2.0, -2.0, -4.0, -2.0, -2.0, -6.0, -4.0, -4.0])


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    assert len({f.name for f in figures}) == len(figures)
    return {f.name: f for f in figures}


def test_pairs_by_hand() -> None:
    scores = TokenScores(POLICY, REFERENCE, np.full(8, 0.5), np.arange(8.0))
    found = by_name(answer_figures(scores, PAIRS, beta=0.1))
    values = {name: f.value for name, f in found.items()}
    assert values["logps/chosen"] == pytest.approx(-10 / 3) and values["logps/rejected"] == pytest.approx(-10 / 3)
    assert values["logps/accuracies"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert values["perplexity/chosen"] == pytest.approx(math.exp(10 / 4))
    assert values["perplexity/rejected"] == pytest.approx(math.exp(10 / 4))
    assert values["perplexity_ratio/chosen"] == pytest.approx(math.exp(-2 / 4))
    assert values["ref_logps/chosen"] == pytest.approx(-4.0)
    assert values["logratios/chosen"] == pytest.approx((1 + 0 + 1) / 3)
    assert values["logratios/rejected"] == pytest.approx((0 + 1 + 3) / 3)
    assert values["implicit_reward/margins"] == pytest.approx(0.1 * (1 - 1 - 2) / 3)
    assert values["implicit_reward/accuracies"] == pytest.approx(1 / 3)
    assert values["answers/kl/policy_ref"] == pytest.approx(4 / 6)
    assert values["answers/kl/policy_ref_per_token"] == pytest.approx(0.5)
    assert values["answers/kl/ref_policy"] == pytest.approx(28 / 6)
    assert found["implicit_reward/margins"].n == 3 and found["answers/kl/policy_ref"].n == 6
    # two prompts: the first and third pair are resampled together
    assert found["implicit_reward/margins"].interval == (pytest.approx(-0.1), pytest.approx(-0.05))


def test_a_margin_against_itself_is_nothing() -> None:
    found = by_name(answer_figures(TokenScores(POLICY, POLICY), PAIRS, beta=1.0))
    assert found["implicit_reward/accuracies"].value == 0.5 and found["implicit_reward/margins"].value == 0.0


def test_without_a_reference_nothing_is_said_of_one() -> None:
    names = set(by_name(answer_figures(TokenScores(POLICY), PAIRS, 1.0)))
    sides = {f"{name}/{side}" for name in ("logps", "perplexity") for side in ("chosen", "rejected")}
    assert names == sides | {"logps/accuracies"}


def test_single_answers_are_good_unless_their_label_says_otherwise() -> None:
    trees = [tree(1, 2), tree(2, 1, labels=(True,)), tree(3, 3, labels=(False,))]
    found = by_name(answer_figures(TokenScores(np.array([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0])), trees, 1.0))
    assert found["logps/chosen"].value == pytest.approx(-3.0) and found["logps/chosen"].n == 2
    assert found["logps/rejected"].value == pytest.approx(-15.0) and found["logps/rejected"].n == 1
    assert "logps/accuracies" not in found


def test_what_counts_as_an_answer() -> None:
    assert is_answer(tree(1, 2)) and is_answer(tree(1, 2, 2)) and is_answer(tree(1, 2, 2, labels=(True, False)))
    assert not is_answer(tree(1)) and not is_answer(tree(1, 2, 2, labels=(False, True)))
    assert not is_answer(tree(1, 1, 1, 1))


def test_sums_of_completions() -> None:
    assert completion_sums(np.array([1.0, 2.0, 4.0, 8.0]), np.array([1, 3])).tolist() == [1.0, 14.0]


def test_text_by_hand() -> None:
    """Two documents, the first in two chunks. Tokens and bytes are summed over documents, not averaged."""
    chunks = [tree(0, 2, source="a"), tree(0, 1, source="a"), tree(0, 1, source="b")]
    scores = TokenScores(np.array([-1.0, -2.0, -3.0, -2.0]), np.array([-1.0, -1.0, -1.0, -1.0]))
    found = by_name(text_figures(scores, chunks, {"a": 12, "b": 4}))
    assert found["text/perplexity"].value == pytest.approx(math.exp(8 / 4))
    assert found["text/perplexity"].interval is None  # both have the same value, which does not make it certain
    assert found["text/bits_per_byte"].value == pytest.approx(8 / math.log(2) / 16)
    assert found["text/ref_perplexity"].value == pytest.approx(math.e)
    assert found["text/perplexity_ratio"].value == pytest.approx(math.e)
    assert found["text/perplexity"].n == 2


def test_eos_behind_a_document_is_not_part_of_it() -> None:
    ids = np.array([4, 1], np.int32)
    whole = TokenTree(0, np.array([0], np.int32), (ids,), (False,), "a")
    cut = TokenTree(1, np.array([0], np.int32), (ids,), (True,), "b")  # its end is in another chunk
    only = TokenTree(2, np.array([0], np.int32), (ids[1:],), (False,), "b")
    left = strip_eos([whole, cut, only], eos=1)
    assert [t.completion_ids[0].tolist() for t in left] == [[4], [4, 1]]
    assert [t.row for t in left] == [0, 1]
