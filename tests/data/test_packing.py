"""Packing: no tree is lost or repeated, budgets are kept, rows are full."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from families import make_tree, some_trees
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.data.mapped import StoredTokens, TokenWriter
from penchant.data.packing import pack, plan_balanced, plan_microbatches, tree_sizes, tree_tokens

sizes_and_budgets = st.tuples(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(50, 1000))


@given(sizes_and_budgets)
@settings(max_examples=100, deadline=None)
def test_every_tree_is_in_exactly_one_pass_within_budget(case: tuple[list[int], int]) -> None:
    sizes, budget = case
    for plan in (plan_microbatches(sizes, budget), plan_balanced(sizes, budget)):
        assert sorted(i for members in plan for i in members) == list(range(len(sizes)))
        for members in plan:
            assert sum(sizes[i] for i in members) <= budget or len(members) == 1 or max(sizes) > budget


def test_passes_are_at_least_95_percent_full_on_lengths_like_real_ones() -> None:
    sizes = np.clip(np.random.default_rng(0).lognormal(5.3, 0.6, 2000), 20, 1000).astype(int).tolist()
    plan = plan_microbatches(sizes, 4096)
    assert sum(sizes) / (len(plan) * 4096) >= 0.95


def test_balanced_plan_needs_no_more_passes() -> None:
    sizes = [900, 800, 700, 300, 200, 100, 90, 5]
    assert len(plan_balanced(sizes, 1000)) == len(plan_microbatches(sizes, 1000)) == 4


def test_shared_lays_the_prompt_once_and_restarts_positions() -> None:
    tree = make_tree(0, 3, (2, 4))
    batch = pack([tree])
    assert batch.input_ids.tolist() == [*tree.prompt_ids, *tree.completion_ids[0], *tree.completion_ids[1]]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6]
    assert batch.tokens == tree.shared_tokens == 9


def test_separate_repeats_the_prompt() -> None:
    tree = make_tree(0, 3, (2, 4))
    batch = pack([tree], shared=False)
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]
    assert batch.tokens == tree.separate_tokens == 12
    assert len(batch.segments) == 2


def test_sizes_of_all_trees_are_those_of_each(tmp_path: Path) -> None:
    """For trees in memory and stored trees, with and without completions."""
    trees = [make_tree(i, 3 + i, lengths) for i, lengths in enumerate([(2, 4), (), (1,), (5, 1, 2)])]
    writer = TokenWriter(tmp_path)
    for tree in trees:
        k = len(tree.completion_ids)
        writer.write(replace(tree, labels=(None,) * k, scores=(None,) * k))
    writer.close()
    for shared in (True, False):
        assert tree_sizes(trees, shared) == tree_sizes(StoredTokens(tmp_path), shared)
        assert tree_sizes(trees, shared) == [tree_tokens(t, shared) for t in trees] and tree_sizes([], shared) == []


def test_losses_cannot_tell_the_packings_apart() -> None:
    shared, separate = pack(some_trees()), pack(some_trees(), shared=False)
    for name in ("target_ids", "completion_of", "completion_tree", "completion_slot", "lengths"):
        assert torch.equal(getattr(shared, name), getattr(separate, name)), name
    assert torch.equal(shared.input_ids[shared.predict_index], separate.input_ids[separate.predict_index])


def test_a_balanced_plan_gives_way_where_it_would_break_the_budget() -> None:
    """Assigning the longest first to the emptier pass would put 5, 3 and 3 together: 11 tokens with a budget of 10."""
    sizes = [5, 5, 4, 3, 3]
    plan = plan_balanced(sizes, 10)
    assert sorted(sum(sizes[i] for i in members) for members in plan) == [10, 10]


def test_what_some_completions_lack_the_batch_does_not_have() -> None:
    tree = make_tree(0, 3, (2, 4))
    for scores, labels in (((1.0, None), (None, True)), ((), ())):
        batch = pack([replace(tree, scores=scores, labels=labels)])
        assert batch.scores is None and batch.labels is None
    batch = pack([replace(tree, scores=(2.0, 1.0), labels=(True, False))])
    assert batch.scores is not None and batch.scores.tolist() == [2.0, 1.0]
    assert batch.labels is not None and batch.labels.tolist() == [1.0, 0.0]
