"""Sampled KL compared with the exact KL of a model with the same small distribution at every step."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import some_trees, tiny_model

from penchant.logprobs import Scorer
from penchant.logprobs.reference import LiveReference
from penchant.metrics.completions import estimate_kl, kl_by_completion, sample_completions


def _live(seed: int) -> LiveReference:
    return LiveReference(Scorer(tiny_model("llama", seed=seed, dtype=torch.float32), "shared"))


def _estimate(policy: LiveReference, reference: LiveReference, n: int) -> dict[str, float]:
    wordless = SimpleNamespace(eos_token_id=None, decode=lambda ids, **_: "")
    written = sample_completions(policy.scorer.model, wordless, [[5, 6]] * n, n=1, max_new_tokens=1, seed=0)
    return estimate_kl(policy, reference, written.trees, tokens_per_step=4096)


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


def test_k1_and_k3_by_hand() -> None:
    """k3 is positive for either sign of its argument, so only the exact value distinguishes them."""
    models = [tiny_model("llama", seed=seed) for seed in (0, 1)]
    for model in models:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(20.0)  # far apart, so that the wrong sign gives another k3
    trees = some_trees()
    policy, reference = (LiveReference(Scorer(m, "shared")) for m in models)
    k1, k3 = kl_by_completion(policy, reference, trees, tokens_per_step=30)
    gaps = []
    for tree in trees:
        for ids in tree.completion_ids:
            row = torch.tensor([[*tree.prompt_ids.tolist(), *ids.tolist()]])
            start = len(tree.prompt_ids)
            with torch.no_grad():
                p, q = (torch.log_softmax(m(input_ids=row).logits[0, start - 1 : -1], -1) for m in models)
            written = torch.tensor(ids.tolist())[:, None]
            gaps.append((p - q).gather(1, written)[:, 0].numpy())
    d = np.concatenate(gaps)
    assert k1 == pytest.approx([g.sum() for g in gaps], rel=1e-9)
    assert k3 == pytest.approx([(np.exp(-g) - 1 + g).sum() for g in gaps], rel=1e-9)
    figures = estimate_kl(policy, reference, trees, tokens_per_step=30)
    assert figures["kl/per_token"] == pytest.approx(sum(k3) / sum(map(len, gaps)), rel=1e-9)  # not per completion
    assert abs((np.exp(d) - 1 - d).sum() / k3.sum() - 1) > 0.1  # the other sign gives another number
