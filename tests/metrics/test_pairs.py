"""Log-prob changes of held-out pairs: signs, ties, shapes."""

from __future__ import annotations

import pytest
import torch

from penchant.metrics.heldout import pair_change


def test_chosen_comes_first() -> None:
    change = pair_change(torch.tensor([-1.0, -5.0, -2.0, -2.0]), torch.tensor([-2.0, -4.0, -3.0, -3.0]))
    assert change.chosen.tolist() == [1.0, 1.0] and change.rejected.tolist() == [-1.0, 1.0]
    assert change.margins.tolist() == [2.0, 0.0]
    assert change.correct.tolist() == [1.0, 0.5]


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 x rows"):
        pair_change(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="2 x rows"):
        pair_change(torch.zeros(4), torch.zeros(2))
