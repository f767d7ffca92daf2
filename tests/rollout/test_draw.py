"""Sampling: the right distribution and log-probs, exact top-k and top-p, and never a token of probability zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from penchant.errors import ModelError
from penchant.rollout.generate import check_logps, draw, row_uniforms


def _spread(rows: int) -> torch.Tensor:
    """Uniform numbers at the centers of equal steps, for which the draws match the distribution up to one step."""
    return (torch.arange(rows, dtype=torch.float64) + 0.5) / rows


@pytest.mark.parametrize("vocabulary", [7, 256, 700])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_shares_are_probabilities(vocabulary: int, temperature: float) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0)) * 2
    rows = 20_000
    tokens, logps = draw(logits.expand(rows, -1), _spread(rows), temperature=temperature)
    expected = torch.log_softmax(logits.double() / temperature, -1)
    shares = torch.bincount(tokens, minlength=vocabulary) / rows
    # inverse of a step function on an even grid, so each share is within one step of its probability
    assert (shares - expected.exp()).abs().max() <= 1.0 / rows + 1e-6
    assert logps.tolist() == pytest.approx(expected[tokens].tolist(), abs=1e-5)


def test_greedy_is_the_argmax() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.5]])
    tokens, logps = draw(logits, torch.tensor([0.9, 0.9], dtype=torch.float64), temperature=0)
    assert tokens.tolist() == [1, 0]
    assert logps.tolist() == pytest.approx(torch.log_softmax(logits, -1).amax(-1).tolist())


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"), [(2, 1.0, 2), (0, 0.6, 2), (0, 0.5, 1), (3, 0.99, 3), (3, 0.7, 2), (0, 1e-9, 1)]
)
def test_only_the_likely_are_drawn(top_k: int, top_p: float, kept: int) -> None:
    # probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625, shuffled; of the first three alone: 0.571, 0.286, 0.143
    logits = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625]).log()
    order = [1, 3, 0]
    tokens, logps = draw(logits.expand(4000, -1), _spread(4000), temperature=1.0, top_k=top_k, top_p=top_p)
    assert set(tokens.tolist()) == set(order[:kept])
    # proportions among the kept ones stay the same, and log-probs are of the full distribution
    p = torch.tensor([0.5, 0.25, 0.125])[:kept]
    share = (tokens == 1).float().mean()
    assert float(share) == pytest.approx(float(p[0] / p.sum()), abs=1e-3)
    assert logps[tokens == 1].unique().tolist() == pytest.approx([np.log(0.5)], abs=1e-5)


def test_top_p_of_a_flat_row_reaches_beyond_the_first_look() -> None:
    tokens, _ = draw(torch.zeros(5000, 2000), _spread(5000), temperature=1.0, top_p=0.9)
    assert abs(len(tokens.unique()) - 1800) <= 1


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((6, 600), float("-inf"))
    logits[:, 300] = 0.0
    edges = torch.tensor([0.0, 1e-300, 0.25, 0.5, 1.0 - 2**-53, 0.999999999], dtype=torch.float64)
    for options in ({}, {"top_k": 5}, {"top_p": 0.9}):
        tokens, logps = draw(logits, edges, temperature=1.0, **options)
        assert tokens.tolist() == [300] * 6 and logps.tolist() == [0.0] * 6


def test_uniform_numbers_belong_to_seed_prompt_and_sample() -> None:
    one = row_uniforms(1, 2, 3, 8)
    assert (one == row_uniforms(1, 2, 3, 8)).all() and (one[:4] == row_uniforms(1, 2, 3, 4)).all()
    for other in (row_uniforms(0, 2, 3, 8), row_uniforms(1, 0, 3, 8), row_uniforms(1, 2, 0, 8)):
        assert (one != other).all()
    assert ((one >= 0) & (one < 1)).all()


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="uniforms"):
        draw(torch.zeros(2, 3), torch.zeros(3, dtype=torch.float64), temperature=1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}])
def test_damaged_logits_give_tokens_that_exist_and_are_refused_at_the_end(bad: float, how: dict[str, Any]) -> None:
    logits = torch.zeros(3, 700)
    logits[1, 5] = bad
    tokens, logps = draw(logits, _spread(3), **how)
    assert bool(((tokens >= 0) & (tokens < 700)).all()) and logps[[0, 2]].isfinite().all()
    with pytest.raises(ModelError, match="logits are NaN or infinite"):
        check_logps(logps)


def test_min_p_keeps_tokens_of_a_share_of_the_likeliest() -> None:
    """0.5, 0.25, 0.15, 0.1: at 0.4 of the likeliest, two remain in proportion. Log-probs are of the full distribution."""
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    tokens, logps = draw(logits.expand(3000, -1), _spread(3000), temperature=1.0, min_p=0.4)
    assert torch.bincount(tokens, minlength=4).tolist() == [2000, 1000, 0, 0]
    assert torch.allclose(logps, logits[tokens])
    tokens, _ = draw(logits.expand(3000, -1), _spread(3000), temperature=1.0, min_p=0.25, top_k=2)
    assert set(tokens.tolist()) == {0, 1}
