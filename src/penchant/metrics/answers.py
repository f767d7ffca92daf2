"""Figures of given answers under a model: log-probs, KL, perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penchant.base.machine import place_of
from penchant.data.packing import pack, run_passes
from penchant.errors import ModelError
from penchant.logprobs.reference import LiveReference
from penchant.losses.divergences import DivergenceKind, log_probs, value_of
from penchant.metrics.figures import Figure, exp, mean_figure, prompt_clusters, ratio_figure, share_figure
from penchant.types import PackedBatch, TokenTree

# ---- Figures of given answers: log-probs, preference accuracy and margin against a reference, perplexity, exact KL ----


@dataclass(frozen=True, slots=True)
class _Completions:
    """Arrays over completions, in the order of the trees."""

    tree: np.ndarray
    slot: np.ndarray
    good: np.ndarray
    lengths: np.ndarray
    clusters: np.ndarray


def is_answer(tree: TokenTree) -> bool:
    """Whether it is known which completions of a row are good: a pair, one labeled answer, or one answer without a label."""
    k = len(tree.completion_ids)
    return k == 1 or (k == 2 and (not any(label is not None for label in tree.labels) or tree.labels == (True, False)))


def answer_figures(scores: TokenScores, trees: Sequence[TokenTree], beta: float) -> list[Figure]:
    """Compute every figure of given answers, over rows, with intervals by prompt.

    Args:
        scores: of `trees`; trees: pairs (chosen first) or single answers (rejected if labeled so); beta: for ``implicit_reward/...``.
    """
    c = _completions(trees)
    policy = completion_sums(scores.policy, c.lengths)
    figures = [*_by_side("logps", policy, c), *_pair_accuracy("logps/accuracies", policy, c)]
    figures += _perplexities("perplexity", -policy, c)
    if scores.reference is not None:
        reference = completion_sums(scores.reference, c.lengths)
        ratio = policy - reference
        figures += _perplexities("perplexity_ratio", -ratio, c)
        figures += [*_by_side("ref_logps", reference, c), *_by_side("logratios", ratio, c)]
        figures += _by_side("implicit_reward", beta * ratio, c)
        gaps, clusters = _pair_gaps(beta * ratio, c)
        figures += [mean_figure("implicit_reward/margins", gaps, clusters)] if len(gaps) else []
        figures += _pair_accuracy("implicit_reward/accuracies", ratio, c)
    return figures + kl_figures("answers/kl", scores, c.lengths, c.clusters)


def figures_by_answer(
    scores: TokenScores, trees: Sequence[TokenTree], beta: float
) -> Iterator[tuple[dict[str, Any], TokenTree, int]]:
    """Yield the ``logps``, ``ref_logps``, ``logratios``, ``implicit_reward`` and exact KL of each answer, its tree and its slot in it.

    Values are sums over the answer's tokens, in nats.

    Args:
        scores, trees, beta: as for `answer_figures`.
    """
    c = _completions(trees)
    token_values = {"logps": scores.policy, "ref_logps": scores.reference}
    token_values |= {"kl/policy_ref": scores.policy_ref, "kl/ref_policy": scores.ref_policy}
    sums = {name: completion_sums(values, c.lengths) for name, values in token_values.items() if values is not None}
    if "ref_logps" in sums:
        sums["logratios"] = sums["logps"] - sums["ref_logps"]
        sums["implicit_reward"] = beta * sums["logratios"]
    for i, (tree, slot) in enumerate(zip(c.tree.tolist(), c.slot.tolist(), strict=True)):
        facts = {"chosen": bool(c.good[i]), "tokens": int(c.lengths[i])}
        yield facts | {name: float(values[i]) for name, values in sums.items()}, trees[tree], slot


def kl_figures(name: str, scores: TokenScores, lengths: np.ndarray, clusters: np.ndarray) -> list[Figure]:
    """Exact KL in both directions, per completion and per token; empty if it was not computed.

    Args:
        lengths, clusters: tokens and prompt of each completion, in order.
    """
    figures = []
    for direction, values in (("policy_ref", scores.policy_ref), ("ref_policy", scores.ref_policy)):
        if values is not None:
            sums = completion_sums(values, lengths)
            figures.append(mean_figure(f"{name}/{direction}", sums, clusters))
            figures.append(ratio_figure(f"{name}/{direction}_per_token", sums, lengths, clusters))
    return figures


def completion_sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sums over each completion's tokens: (R,) to (C,)."""
    return np.add.reduceat(values, np.concatenate(([0], np.cumsum(lengths)[:-1])))


def _completions(trees: Sequence[TokenTree]) -> _Completions:
    by_tree = prompt_clusters(trees)
    tree = [i for i, t in enumerate(trees) for _ in t.completion_ids]
    slot = [s for t in trees for s in range(len(t.completion_ids))]
    good = [_is_good(t, s) for t in trees for s in range(len(t.completion_ids))]
    lengths = [n for t in trees for n in t.trained]
    return _Completions(np.array(tree), np.array(slot), np.array(good), np.array(lengths), by_tree[tree])


def _is_good(tree: TokenTree, slot: int) -> bool:
    label = tree.labels[slot] if tree.labels else None
    return slot == 0 if label is None else label


def _sides(name: str, c: _Completions) -> Iterator[tuple[str, np.ndarray]]:
    """Yield ``NAME/chosen`` and ``NAME/rejected`` with their masks over completions, if there are any."""
    sides = ((f"{name}/chosen", c.good), (f"{name}/rejected", ~c.good))
    return ((side, mask) for side, mask in sides if mask.any())


def _by_side(name: str, values: np.ndarray, c: _Completions) -> list[Figure]:
    return [mean_figure(side, values[mask], c.clusters[mask]) for side, mask in _sides(name, c)]


def _perplexities(name: str, nats: np.ndarray, c: _Completions) -> list[Figure]:
    """``exp(sum nats / sum tokens)`` for chosen and rejected answers."""
    return [ratio_figure(s, nats[mask], c.lengths[mask], c.clusters[mask], exp) for s, mask in _sides(name, c)]


def _pair_gaps(values: np.ndarray, c: _Completions) -> tuple[np.ndarray, np.ndarray]:
    """Chosen minus rejected of every pair, and each pair's prompt."""
    second = np.flatnonzero(c.slot == 1)
    return values[second - 1] - values[second], c.clusters[second]


def _pair_accuracy(name: str, values: np.ndarray, c: _Completions) -> list[Figure]:
    gaps, clusters = _pair_gaps(values, c)
    return [share_figure(name, (gaps > 0) + 0.5 * (gaps == 0), clusters)] if len(gaps) else []


# ---- Both models' log-probs of every completion token, and the exact KL there over the whole vocabulary, computed in chunks ----

CHUNK_ELEMENTS = 1 << 22  # logits of one model in memory at once: 16 MB in fp32
POLICY_REF, REF_POLICY = DivergenceKind("kl", "policy_ref"), DivergenceKind("kl", "ref_policy")


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Scores of every completion token, in the trees' order, in nats, float64, (R,) each.

    Args:
        policy, reference: log-probs; policy_ref: ``KL(policy || reference)`` of the next-token distributions; ref_policy: the other
            direction. None without a reference, or if the exact KL was not requested.
    """

    policy: np.ndarray
    reference: np.ndarray | None = None
    policy_ref: np.ndarray | None = None
    ref_policy: np.ndarray | None = None


def score_tokens(
    policy: LiveReference,
    reference: LiveReference | None,
    trees: Sequence[TokenTree],
    *,
    exact: bool,
    tokens_per_step: int,
    progress: Callable[[int, int], None] | None = None,
) -> TokenScores:
    """Score `trees` with the models, without gradient.

    ``KL(p || q) = sum_v p_v (log p_v - log q_v)`` at every position that predicts a completion token, in fp32 log space. Logits are
    kept for only a few rows at a time.

    Args:
        exact: also compute the exact KL in both directions; tokens_per_step: tokens per forward pass.

    Raises:
        ModelError: the models' vocabularies differ in size.
    """
    device = place_of(policy.scorer.model)
    shared, lanes = policy.scorer.shared, policy.side_by_side
    same_packing = reference is None or reference.scorer.shared == shared
    if not same_packing:  # row = index into trees, so that a batch can be repacked for the reference below
        trees = [replace(t, row=i) for i, t in enumerate(trees)]

    def score_batch(batch: PackedBatch) -> Tensor:
        if reference is None:
            return policy.completion_logps(batch).tokens[None]
        # completions are ordered tree by tree in either layout
        ref_batch = (
            batch if same_packing else pack([trees[i] for i in batch.rows], shared=reference.scorer.shared).to(device)
        )
        if exact:
            return _logps_and_kl(policy, reference, batch, ref_batch)
        return torch.stack([policy.completion_logps(batch).tokens, reference.completion_logps(ref_batch).tokens])

    parts: dict[int, Tensor] = {}
    lanes = lanes and (reference is None or reference.side_by_side)
    for members, part in run_passes(score_batch, trees, tokens_per_step, shared=shared, device=device, lanes=lanes):
        counts = [sum(trees[i].trained) for i in members]
        parts |= dict(zip(members, part.cpu().double().split(counts, dim=1), strict=True))
        if progress is not None:
            progress(len(parts), len(trees))
    scores = torch.cat([parts[i] for i in range(len(trees))], dim=1).numpy()
    return TokenScores(*scores)


def _logps_and_kl(
    policy: LiveReference, reference: LiveReference, batch: PackedBatch, reference_batch: PackedBatch
) -> Tensor:
    """(4, R): log-probs of both models, then KL in both directions."""
    policy_logits, ref_logits = policy.row_logits(batch), reference.row_logits(reference_batch)
    models: list[Any] = [policy.scorer.model, reference.scorer.model]
    rows = max(16, CHUNK_ELEMENTS // max(m.get_input_embeddings().weight.shape[0] for m in models))
    chunks = []
    for targets, start in zip(batch.target_ids.split(rows), range(0, len(batch.target_ids), rows), strict=True):
        p, q = policy_logits(slice(start, start + rows)), ref_logits(slice(start, start + rows))
        if p.shape != q.shape:
            how = "leave out the exact KL with --no-exact-kl, or give another --reference"
            raise ModelError("reference", f"has {q.shape[1]:,} logits a token, the model {p.shape[1]:,}", how)
        lp, lq = log_probs(p), log_probs(q)
        token_logps = [x.gather(1, targets[:, None]).squeeze(1) for x in (lp, lq)]
        chunks.append(torch.stack([*token_logps, value_of(lp, lq, POLICY_REF), value_of(lp, lq, REF_POLICY)]))
    return torch.cat(chunks, dim=1)


# ---- Perplexity and bits per byte of given texts, with intervals by document ----


def strip_eos(trees: Sequence[TokenTree], eos: int | None) -> list[TokenTree]:
    """Strip the appended EOS from chunks of documents, so that only the text itself is measured."""
    stripped: list[TokenTree] = []
    for t in trees:
        ids = t.completion_ids[0]
        if not t.truncated[0] and len(ids) and ids[-1] == eos:
            ids = ids[:-1]
        if len(ids):
            stripped.append(replace(t, row=len(stripped), completion_ids=(ids,)))
    return stripped


def text_figures(scores: TokenScores, trees: Sequence[TokenTree], size: Mapping[str, int]) -> list[Figure]:
    """``perplexity = exp(-sum log p / tokens)`` and ``bits per byte = -sum log2 p / bytes`` over all documents.

    Args:
        scores: of `trees`; trees: chunks of documents, one completion each, `source` names the document; size: UTF-8 bytes by document.
    """
    lengths = np.array([len(t.completion_ids[0]) for t in trees])
    numbers = {source: i for i, source in enumerate(dict.fromkeys(t.source for t in trees))}
    document = np.array([numbers[t.source] for t in trees])
    n = len(numbers)
    by_document = [np.bincount(document, weights=w) for w in (lengths, -completion_sums(scores.policy, lengths))]
    tokens, nats = by_document
    clusters = np.arange(n)
    bytes_ = np.array([size[source] for source in numbers], dtype=np.float64)
    figures = [
        ratio_figure("text/perplexity", nats, tokens, clusters, exp),
        ratio_figure("text/bits_per_byte", nats / math.log(2), bytes_, clusters),
    ]
    if scores.reference is not None:
        ref_nats = np.bincount(document, weights=-completion_sums(scores.reference, lengths))
        figures.append(ratio_figure("text/ref_perplexity", ref_nats, tokens, clusters, exp))
        figures.append(ratio_figure("text/perplexity_ratio", nats - ref_nats, tokens, clusters, exp))
    return figures
