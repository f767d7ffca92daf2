"""One figure of an evaluation with its interval and count. Figures are always over rows, never over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from penchant.metrics.stats import Interval, bootstrap_ci, bootstrap_ratio, share_ci
from penchant.types import TokenTree

PREFIX = "eval/"
DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure with its interval.

    Args:
        name: without ``eval/``, see metrics.yaml; value: the estimate; interval: 95%, or None (see `of`).
        n: how many pairs, completions or documents it is over.
    """

    name: str
    value: float
    interval: tuple[float, float] | None
    n: int

    @staticmethod
    def of(
        name: str, interval: Interval, n: int, clusters: ArrayLike, map_: Callable[[float], float] = float
    ) -> Figure:
        """Make a figure from an interval, which is dropped if it comes from a single cluster or has zero width.

        `map_` is an increasing function, applied to the value and both ends.
        """
        has_interval = len(np.unique(np.asarray(clusters))) > 1 and interval.low < interval.high
        return Figure(
            name, map_(interval.estimate), (map_(interval.low), map_(interval.high)) if has_interval else None, n
        )


def mean_figure(name: str, values: ArrayLike, clusters: ArrayLike) -> Figure:
    """``mean(values)``; the interval resamples whole clusters.

    Args:
        values: (n,); clusters: (n,) prompt of each.
    """
    x = np.asarray(values, dtype=np.float64)
    return Figure.of(name, bootstrap_ci(x, clusters=clusters, draws=DRAWS), len(x), clusters)


def share_figure(name: str, values: ArrayLike, clusters: ArrayLike) -> Figure:
    """`mean_figure` for values within [0, 1]; the interval keeps a width even if all rows agree (see `share_ci`)."""
    x = np.asarray(values, dtype=np.float64)
    return Figure.of(name, share_ci(x, clusters=clusters, draws=DRAWS), len(x), clusters)


def ratio_figure(
    name: str,
    numerators: ArrayLike,
    denominators: ArrayLike,
    clusters: ArrayLike,
    map_: Callable[[float], float] = float,
) -> Figure:
    """``map(sum a / sum b)`` with an increasing `map_` (exp, for a perplexity); the interval resamples whole clusters.

    Args:
        numerators, denominators, clusters: (n,).
    """
    interval = bootstrap_ratio(numerators, denominators, clusters=clusters, draws=DRAWS)
    return Figure.of(name, interval, len(np.asarray(numerators)), clusters, map_)


def exp(value: float) -> float:
    """``e^value``, capped at e^700 to stay finite."""
    return math.exp(min(700.0, value))


def flatten(figures: Iterable[Figure]) -> dict[str, Any]:
    """Flatten figures to ``{eval/NAME: value, eval/NAME/ci: [low, high], eval/NAME/n: n}``, the format of a metrics line."""
    line: dict[str, Any] = {}
    for f in figures:
        line[PREFIX + f.name] = f.value
        if f.interval is not None:
            line[f"{PREFIX}{f.name}/ci"] = list(f.interval)
        line[f"{PREFIX}{f.name}/n"] = f.n
    return line


def prompt_numbers(trees: Sequence[TokenTree]) -> np.ndarray:
    """The index of each tree's prompt, (trees,)."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(t.prompt_key, len(numbers)) for t in trees])


def prompt_clusters(trees: Sequence[TokenTree]) -> np.ndarray:
    """Cluster indices for intervals: `prompt_numbers`, or each tree by itself if all share one prompt (or have none)."""
    numbers = prompt_numbers(trees)
    return numbers if numbers.any() else np.arange(len(trees))
