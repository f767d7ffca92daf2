"""Metrics of generated completions, computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from penchant.metrics.answers import TokenScores
from penchant.metrics.completions import Completions, generation_figures, generation_kl
from penchant.types import TokenTree


def written(rewards: np.ndarray | None = None) -> Completions:
    """Two prompts, two completions each."""
    ids = [[5, 6, 5, 6, 5, 6, 5, 1], [5, 6], [7, 8, 9, 1], [7]]
    trees = [
        TokenTree(i, np.array([3, i], np.int32), tuple(np.array(c, np.int32) for c in pair), (False, True))
        for i, pair in enumerate((ids[:2], ids[2:]))
    ]
    return Completions(trees, ["a", "b", "c", "d"], rewards)


def test_by_hand() -> None:
    found = {f.name: f for f in generation_figures(written(np.array([1.0, 2.0, 3.0, 6.0])), {"words": np.ones(4)})}
    values = {name: f.value for name, f in found.items()}
    assert values["generated/reward"] == 3.0 and found["generated/reward"].interval == (1.5, 4.5)
    assert values["generated/reward[words]"] == 1.0
    assert values["generated/length"] == pytest.approx(15 / 4)
    assert values["generated/ended"] == 0.5
    assert values["generated/distinct_1"] == pytest.approx(6 / 15)  # 5 6 1 7 8 9
    assert values["generated/distinct_2"] == pytest.approx(6 / 11)  # 56 65 51 78 89 91
    # 5656 6565 5656 6565 5651: two of five again; 7891 none; the other two are too short
    assert values["generated/repetition"] == pytest.approx((2 / 5 + 0) / 2) and found["generated/repetition"].n == 2


def test_without_a_reward_there_is_none() -> None:
    names = {f.name for f in generation_figures(written(), {})}
    assert not any("reward" in n for n in names)


def test_kl_by_hand() -> None:
    d = np.linspace(-0.2, 0.5, 15)
    scores = TokenScores(d, np.zeros(15), np.full(15, 0.1), np.full(15, 0.2))
    found = {f.name: f.value for f in generation_kl(scores, written(), sampled=True)}
    assert found["generated/kl/k1"] == pytest.approx(d.sum() / 4)
    assert found["generated/kl/k3"] == pytest.approx(np.mean(np.exp(-d) - 1 + d))
    assert found["generated/kl/policy_ref"] == pytest.approx(1.5 / 4)
    assert found["generated/kl/ref_policy_per_token"] == pytest.approx(0.2)
    assert not any("k1" in f.name for f in generation_kl(scores, written(), sampled=False))
