"""Figures of generated text: distinct-n."""

from __future__ import annotations

from collections.abc import Sequence


def distinct_n(samples: Sequence[Sequence[int]], n: int = 2) -> float:
    """Share of n-grams that are different, over all samples together: ``unique / total`` (arXiv 1510.03055).

    Args:
        samples: token ids of each text; n: length of the grams.
    """
    grams = [tuple(ids[i : i + n]) for ids in samples for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
