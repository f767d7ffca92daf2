"""Figures of generated text: how varied it is over all samples, and how much a sample repeats itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from penchant.evaluation.significance import t_quantile
from penchant.evaluation.stats import Interval


def distinct_n(samples: Sequence[Sequence[int]], n: int = 2) -> float:
    """Share of n-grams that are different, over all samples together: ``unique / total`` (arXiv 1510.03055).

    Args:
        samples: token ids of each text; n: length of the grams.
    """
    grams = [g for ids in samples for g in _grams(ids, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_n_interval(
    samples: Sequence[Sequence[int]], clusters: Sequence[int], n: int = 2, level: float = 0.95
) -> Interval | None:
    """`distinct_n` with a jackknife interval that leaves out one prompt at a time; None where there are fewer than two prompts.

    ``D +- t_{k-1} s``, ``s^2 = (k-1)/k sum_c (D_(c) - mean D_(.))^2``, D_(c) without prompt c. A bootstrap would draw prompts twice, whose
    grams are then no longer distinct: its draws lie below the figure itself.

    Args:
        clusters: the prompt of each sample.

    Paper: Efron and Stein, "The jackknife estimate of variance" (1981), which shows that s^2 is not too small on average.
    """
    by_cluster: dict[int, Counter[tuple[int, ...]]] = {}
    for ids, c in zip(samples, clusters, strict=True):
        by_cluster.setdefault(c, Counter()).update(_grams(ids, n))
    owners: Counter[tuple[int, ...]] = Counter(g for grams in by_cluster.values() for g in grams)
    total = sum(sum(grams.values()) for grams in by_cluster.values())
    k = len(by_cluster)
    if k < 2:
        return None
    left = []
    for grams in by_cluster.values():
        alone = sum(owners[g] == 1 for g in grams)  # grams that nobody else wrote
        rest = total - sum(grams.values())
        left.append((len(owners) - alone) / rest if rest else 0.0)
    without = np.array(left)
    half = t_quantile((1 + level) / 2, k - 1) * float(np.sqrt((k - 1) / k * ((without - without.mean()) ** 2).sum()))
    value = len(owners) / total if total else 0.0
    return Interval(value, max(0.0, value - half), min(1.0, value + half))


def repetition(ids: Sequence[int], n: int = 4) -> float | None:
    """Share of a text's n-grams that occurred before in it: ``1 - unique / total``; None where it is shorter than n tokens.

    Paper: arXiv 1908.04319 (seq-rep-n).
    """
    grams = list(_grams(ids, n))
    return 1.0 - len(set(grams)) / len(grams) if grams else None


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
