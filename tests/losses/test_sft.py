"""SFT: a mean over tokens of the global batch, not a mean of means."""

from __future__ import annotations

import pytest
import torch

from penchant.losses.sft import sft
from penchant.types import UnpairedLogps


def test_tokens_are_the_weights() -> None:
    out = sft(UnpairedLogps(torch.tensor([-6.0, -1.0]), torch.tensor([3.0, 1.0])))
    assert out.losses.tolist() == [6.0, 1.0]
    assert out.weights is not None
    assert (out.losses.sum() / out.weights.sum()).item() == pytest.approx(7 / 4)  # a mean of means would be 1.5
