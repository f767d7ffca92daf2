"""Sampled KL against the exact one of a model whose every step is the same small distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import tiny_model

from penchant.evaluation.sampled_kl import sampled_kl
from penchant.logprobs import Scorer
from penchant.reference import LiveReference


def _live(seed: int) -> LiveReference:
    return LiveReference(Scorer(tiny_model("llama", seed=seed, dtype=torch.float32), "shared"))


def _estimate(policy: LiveReference, reference: LiveReference, n: int) -> dict[str, float]:
    return sampled_kl(
        policy, reference, [[5, 6]] * n, max_new_tokens=1, eos_token_id=None, seed=0, tokens_per_step=4096
    )


def test_equal_models_have_no_kl() -> None:
    got = _estimate(_live(0), _live(0), 8)
    assert got["kl/policy_ref"] == 0.0
    assert got["kl/per_token"] == 0.0


def test_both_estimators_agree_with_the_exact_kl() -> None:
    policy, reference = _live(0), _live(1)
    with torch.no_grad():
        p, q = (
            torch.log_softmax(r.scorer.model(torch.tensor([[5, 6]])).logits[0, -1], -1) for r in (policy, reference)
        )
    exact = float((p.exp() * (p - q)).sum())
    got = _estimate(policy, reference, 6000)
    assert got["kl/policy_ref"] == pytest.approx(exact, rel=0.15)
    assert got["kl/per_token"] == pytest.approx(exact, rel=0.1)
    low, high = got["kl/policy_ref/ci"]  # type: ignore[misc]
    assert low < exact < high
    assert np.isfinite(exact) and exact > 0.001
