"""Tree attention: the mask by hand, and long trees, which use another implementation, equal to short ones."""

from __future__ import annotations

import pytest
import torch
from families import some_trees

from penchant.data.packing import pack
from penchant.models import tree_attention as module
from penchant.models.tree_attention import tree_attention, tree_layout, tree_mask
from penchant.types import Segment


def test_the_mask_by_hand() -> None:
    """Two prompt tokens, completions of two and one, and one padding token, which attends only to itself."""
    got = tree_mask(Segment(0, 2, (2, 1)), 6, None)
    assert got.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_a_window_is_measured_in_positions() -> None:
    """A window of 2: a token attends to itself and the one before. The second completion's positions follow the prompt."""
    got = tree_mask(Segment(0, 2, (2, 2)), 6, 2)
    assert got.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("window", [None, 3])
def test_long_trees_equal_short_ones(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """Beyond `_EAGER_MAX_LENGTH` tokens PyTorch's fused attention is used, with the same mask and the model's own scale."""
    batch = pack(some_trees())
    layout = tree_layout(batch, window)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch.tokens, heads, 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2))
    eager = tree_attention(q, k, v, layout, 0.9)
    monkeypatch.setattr(module, "_EAGER_MAX_LENGTH", 0)
    fused = tree_attention(q, k, v, layout, 0.9)
    assert torch.allclose(fused, eager, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(eager, tree_attention(q, k, v, layout, 8**-0.5), rtol=1e-3)


def test_padding_is_spread_over_its_own_tree() -> None:
    """On a GPU the gradients of positions that are gathered to one place are added up one after the other."""
    batch = pack(some_trees())
    of_token = torch.repeat_interleave(torch.tensor([s.length for s in batch.segments]))
    for group in tree_layout(batch).groups:
        for index in group.index:
            (tree,) = of_token[index].unique().tolist()
            n = batch.segments[tree].length
            assert int(index.bincount().max()) <= -(-len(index) // n)
