"""What a model makes of given answers: log-probs, preference accuracy and margin against a reference, perplexity, exact KL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from penchant.evaluation.figures import Figure, exp, mean_of, prompt_clusters, ratio_of, share_of
from penchant.evaluation.token_scores import TokenScores
from penchant.types import TokenTree

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class _Completions:
    """Arrays over completions, tree by tree."""

    tree: np.ndarray
    slot: np.ndarray
    good: np.ndarray
    lengths: np.ndarray
    clusters: np.ndarray


def is_answer(tree: TokenTree) -> bool:
    """Whether a row says which of its completions are good: a pair, one labelled answer, or one answer without label."""
    k = len(tree.completion_ids)
    return k == 1 or (k == 2 and (not any(label is not None for label in tree.labels) or tree.labels == (True, False)))


def answer_figures(scores: TokenScores, trees: Sequence[TokenTree], beta: float) -> list[Figure]:
    """Every figure of given answers, over rows, with intervals by prompt.

    Args:
        scores: of `trees`; trees: pairs (chosen first) or single answers (bad where their label says so); beta: of ``rewards/...``.
    """
    c = _completions(trees)
    policy = _sums(scores.policy, c)
    found = [*_by_side("logps", policy, c), *_pair_share("logps/accuracies", policy, c)]
    found += _perplexities("perplexity", -policy, c)
    if scores.reference is not None:
        reference = _sums(scores.reference, c)
        ratio = policy - reference
        found += _perplexities("perplexity_ratio", -ratio, c)
        found += [*_by_side("ref_logps", reference, c), *_by_side("logratios", ratio, c)]
        found += _by_side("rewards", beta * ratio, c)
        found += [*_margins("rewards/margins", beta * ratio, c), *_pair_share("rewards/accuracies", ratio, c)]
    return found + kl_figures("answers/kl", scores, c.lengths, c.clusters)


def kl_figures(name: str, scores: TokenScores, lengths: np.ndarray, clusters: np.ndarray) -> list[Figure]:
    """Exact KL both ways round, summed over a completion and a token; nothing where it was not computed.

    Args:
        lengths, clusters: tokens and prompt of each completion, in order.
    """
    found = []
    for way, values in (("policy_ref", scores.policy_ref), ("ref_policy", scores.ref_policy)):
        if values is not None:
            sums = completion_sums(values, lengths)
            found.append(mean_of(f"{name}/{way}", sums, clusters))
            found.append(ratio_of(f"{name}/{way}_per_token", sums, lengths, clusters))
    return found


def completion_sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sums over each completion's tokens: (R,) to (C,)."""
    return np.add.reduceat(values, np.concatenate(([0], np.cumsum(lengths)[:-1])))


def _completions(trees: Sequence[TokenTree]) -> _Completions:
    by_tree = prompt_clusters(trees)
    tree = [i for i, t in enumerate(trees) for _ in t.completion_ids]
    slot = [s for t in trees for s in range(len(t.completion_ids))]
    good = [_good(t, s) for t in trees for s in range(len(t.completion_ids))]
    lengths = [len(ids) for t in trees for ids in t.completion_ids]
    return _Completions(np.array(tree), np.array(slot), np.array(good), np.array(lengths), by_tree[tree])


def _good(tree: TokenTree, slot: int) -> bool:
    label = tree.labels[slot] if tree.labels else None
    return slot == 0 if label is None else label


def _sums(tokens: np.ndarray, c: _Completions) -> np.ndarray:
    return completion_sums(tokens, c.lengths)


def _by_side(name: str, values: np.ndarray, c: _Completions) -> list[Figure]:
    return [
        mean_of(f"{name}/{side}", values[c.good == good], c.clusters[c.good == good])
        for side, good in zip(SIDES, (True, False), strict=True)
        if (c.good == good).any()
    ]


def _perplexities(name: str, nats: np.ndarray, c: _Completions) -> list[Figure]:
    """``exp(sum nats / sum tokens)`` of each side."""
    sides = [(side, c.good == good) for side, good in zip(SIDES, (True, False), strict=True)]
    return [
        ratio_of(f"{name}/{side}", nats[mine], c.lengths[mine], c.clusters[mine], exp)
        for side, mine in sides
        if mine.any()
    ]


def _gaps(values: np.ndarray, c: _Completions) -> tuple[np.ndarray, np.ndarray]:
    """Chosen minus rejected of every pair, and each pair's prompt."""
    second = np.flatnonzero(c.slot == 1)
    return values[second - 1] - values[second], c.clusters[second]


def _margins(name: str, values: np.ndarray, c: _Completions) -> list[Figure]:
    gaps, clusters = _gaps(values, c)
    return [mean_of(name, gaps, clusters)] if len(gaps) else []


def _pair_share(name: str, values: np.ndarray, c: _Completions) -> list[Figure]:
    gaps, clusters = _gaps(values, c)
    return [share_of(name, (gaps > 0) + 0.5 * (gaps == 0), clusters)] if len(gaps) else []
