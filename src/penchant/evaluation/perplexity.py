"""Perplexity and bits per byte of given texts, with intervals by document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from penchant.evaluation.figures import Figure, exp, ratio_of
from penchant.evaluation.given_answers import completion_sums
from penchant.evaluation.token_scores import TokenScores
from penchant.types import TokenTree


def without_eos(trees: Sequence[TokenTree], eos: int | None) -> list[TokenTree]:
    """Chunks of documents without the EOS that was put behind them: the text is measured, not that it ends."""
    found: list[TokenTree] = []
    for t in trees:
        ids = t.completion_ids[0]
        if not t.truncated[0] and len(ids) and ids[-1] == eos:
            ids = ids[:-1]
        if len(ids):
            found.append(replace(t, row=len(found), completion_ids=(ids,)))
    return found


def text_figures(scores: TokenScores, trees: Sequence[TokenTree], size: Mapping[str, int]) -> list[Figure]:
    """``perplexity = exp(-sum log p / tokens)`` and ``bits per byte = -sum log2 p / bytes`` over all documents.

    Args:
        scores: of `trees`; trees: chunks of documents, one completion each, by `source`; size: bytes (UTF-8) of each document.
    """
    lengths = np.array([len(t.completion_ids[0]) for t in trees])
    numbers = {source: i for i, source in enumerate(dict.fromkeys(t.source for t in trees))}
    document = np.array([numbers[t.source] for t in trees])
    n = len(numbers)
    by_document = [np.bincount(document, weights=w) for w in (lengths, -completion_sums(scores.policy, lengths))]
    tokens, nats = by_document
    each = np.arange(n)
    bytes_ = np.array([size[source] for source in numbers], dtype=np.float64)
    found = [
        ratio_of("text/perplexity", nats, tokens, each, exp),
        ratio_of("text/bits_per_byte", nats / math.log(2), bytes_, each),
    ]
    if scores.reference is not None:
        before = np.bincount(document, weights=-completion_sums(scores.reference, lengths))
        found.append(ratio_of("text/ref_perplexity", before, tokens, each, exp))
        found.append(ratio_of("text/perplexity_ratio", nats - before, tokens, each, exp))
    return found
