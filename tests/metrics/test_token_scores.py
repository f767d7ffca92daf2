"""Exact KL against brute force in float64, across packings, and as the limit of the sampled estimate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model

from penchant.errors import ModelError
from penchant.logprobs import Scorer
from penchant.logprobs.reference import LiveReference
from penchant.metrics import answers as token_scores
from penchant.metrics.answers import TokenScores, completion_sums, score_tokens
from penchant.metrics.completions import Completions, generation_kl
from penchant.rollout.generate import sample
from penchant.types import TokenTree

TREES = [
    TokenTree(
        0, np.array([5, 6, 7], np.int32), (np.array([9, 4, 8], np.int32), np.array([8, 3], np.int32)), (False,) * 2
    ),
    TokenTree(1, np.array([3], np.int32), (np.array([11], np.int32),), (False,)),
    TokenTree(
        2, np.array([5, 9], np.int32), (np.array([1, 2, 3, 4, 5], np.int32), np.array([6], np.int32)), (False,) * 2
    ),
]


def live(family: str, seed: int, packing: Any = "shared") -> LiveReference:
    return LiveReference(Scorer(tiny_model(family, seed=seed, dtype=torch.float64), packing))


def brute(policy: LiveReference, reference: LiveReference) -> np.ndarray:
    """Scores of shape (4, R), one completion at a time from the models' own logits."""
    found = []
    for tree in TREES:
        p = len(tree.prompt_ids)
        for ids in tree.completion_ids:
            row = torch.tensor(np.concatenate((tree.prompt_ids, ids)).astype(np.int64))[None]
            with torch.no_grad():
                lp, lq = (torch.log_softmax(m.scorer.model(row).logits[0, p - 1 : -1], -1) for m in (policy, reference))
            picked = [x.gather(1, row[0, p:, None]).squeeze(1) for x in (lp, lq)]
            both = [(a.exp() * (a - b)).sum(-1) for a, b in ((lp, lq), (lq, lp))]
            found.append(torch.stack([*picked, *both]))
    return torch.cat(found, 1).numpy()


def as_rows(scores: TokenScores) -> np.ndarray:
    return np.stack([scores.policy, scores.reference, scores.policy_ref, scores.ref_policy])  # type: ignore[list-item]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])  # untied, tied with positions, capped logits
def test_exact_kl_is_brute_force(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference = live(family, 0), live(family, 1)
    whole = as_rows(score_tokens(policy, reference, TREES, exact=True, tokens_per_step=4096))
    np.testing.assert_allclose(whole, brute(policy, reference), rtol=1e-9, atol=1e-12)
    assert (whole[2:] > 1e-4).all()
    other = score_tokens(policy, live(family, 1, "padded"), TREES, exact=True, tokens_per_step=8)
    np.testing.assert_allclose(as_rows(other), whole, rtol=1e-9, atol=1e-12)


def test_logits_are_held_for_a_few_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference = live("llama", 0), live("llama", 1)
    long = [TokenTree(0, np.array([5], np.int32), (np.arange(60, dtype=np.int32) % 90,), (False,))]
    before = as_rows(score_tokens(policy, reference, long, exact=True, tokens_per_step=4096))
    seen: list[int] = []
    real = token_scores.log_probs
    monkeypatch.setattr(token_scores, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(token_scores, "log_probs", lambda x: (seen.append(len(x)), real(x))[1])
    after = as_rows(score_tokens(policy, reference, long, exact=True, tokens_per_step=4096))
    assert max(seen) == 16 and len(seen) == 2 * 4
    np.testing.assert_allclose(after, before, rtol=1e-12)


def test_without_the_exact_kl_log_probs_are_the_same() -> None:
    policy, reference = live("llama", 0), live("llama", 1)
    exact = score_tokens(policy, reference, TREES, exact=True, tokens_per_step=4096)
    plain = score_tokens(policy, reference, TREES, exact=False, tokens_per_step=4096)
    alone = score_tokens(policy, None, TREES, exact=True, tokens_per_step=4096)
    assert plain.policy_ref is None and alone.reference is None and alone.policy_ref is None
    for found in (plain, alone):
        np.testing.assert_allclose(found.policy, exact.policy, rtol=1e-10)
    np.testing.assert_allclose(plain.reference, exact.reference, rtol=1e-10)  # type: ignore[arg-type]


def test_another_vocabulary_is_refused() -> None:
    policy, reference = live("llama", 0), live("llama", 1)
    reference.scorer.model.resize_token_embeddings(99)
    with pytest.raises(ModelError, match="99 logits a token, the model 97"):
        score_tokens(policy, reference, TREES, exact=True, tokens_per_step=4096)


def test_k1_goes_towards_the_exact_kl_and_the_exact_one_varies_less() -> None:
    """For two-token completions, the mean of k1 and the mean of the exact sums estimate the same number."""
    policy, reference = live("llama", 0), live("llama", 1)
    n = 1500
    rows = sample(policy.scorer.model, [[5, 6]], n=n, max_new_tokens=2, seed=0)[0]
    ids = tuple(np.array(r.ids, np.int32) for r in rows)
    written = Completions([TokenTree(0, np.array([5, 6], np.int32), ids, (True,) * n)], [""] * n, None)
    scores = score_tokens(policy, reference, written.trees, exact=True, tokens_per_step=10**6)
    figures = {f.name: f for f in generation_kl(scores, written, sampled=True)}
    exact = figures["generated/kl/policy_ref"].value
    with torch.no_grad():  # the true value: KL of the first token, plus that of the second after every first
        model = [m.scorer.model for m in (policy, reference)]
        lp, lq = (torch.log_softmax(m(torch.tensor([[5, 6]])).logits[0, -1], -1) for m in model)
        pairs = torch.tensor([[5, 6, v] for v in range(97)])
        lp2, lq2 = (torch.log_softmax(m(pairs).logits[:, -1], -1) for m in model)
        truth = float((lp.exp() * (lp - lq)).sum() + (lp.exp() * (lp2.exp() * (lp2 - lq2)).sum(-1)).sum())
    assert exact == pytest.approx(truth, rel=0.01)
    lengths = np.full(n, 2)
    k1 = completion_sums(scores.policy - scores.reference, lengths)
    error = k1.std() / np.sqrt(n)
    assert abs(figures["generated/kl/k1"].value - truth) < 4 * error
    assert figures["generated/kl/k1"].value == pytest.approx(k1.mean())
    assert figures["generated/kl/k3"].value == pytest.approx(truth / 2, rel=0.1)
    assert completion_sums(scores.policy_ref, lengths).std() < 0.2 * k1.std()  # type: ignore[arg-type]
    assert figures["generated/kl/policy_ref_per_token"].value == pytest.approx(exact / 2)
