"""A loss and its metrics on a held-out set: means over rows (never over batch means), with 95% intervals by prompt."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from penchant.data.packing import pack, plan_microbatches, tree_tokens
from penchant.evaluation.stats import bootstrap_ci
from penchant.types import Algorithm, TokenTree

WITH_INTERVAL = ("loss", "rewards/accuracies", "rewards/margins", "logps/accuracies")


def evaluate_heldout(
    algorithm: Algorithm,
    trees: Sequence[TokenTree],
    *,
    shared: bool,
    tokens_per_step: int,
    device: torch.device,
    prefix: str = "eval/",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Every metric of an algorithm over `trees`.

    ``mean = sum_rows value / sum_rows weight``; intervals are percentile bootstraps that draw whole prompts.

    Returns:
        ``{prefix + name: mean}``, ``{prefix + name + "/ci": [low, high]}``, ``rows``, and ``perplexity`` for losses over tokens.
    """
    columns: dict[str, list[np.ndarray]] = {}
    weights: dict[str, list[np.ndarray]] = {}
    order: list[int] = []
    sizes = [tree_tokens(t, shared) for t in trees]
    with torch.no_grad():
        for members in plan_microbatches(sizes, tokens_per_step):
            out = algorithm.loss(pack([trees[i] for i in members], shared=shared).to(device))
            named = {"loss": (out.losses, out.weights), **out.metrics}
            for name, (value, weight) in named.items():
                columns.setdefault(name, []).append(value.double().cpu().numpy())
                weights.setdefault(name, []).append(
                    np.ones(len(value)) if weight is None else weight.double().cpu().numpy()
                )
            order += members
            if progress is not None:
                progress(len(order), len(trees))
    clusters = np.array([_prompt_cluster(trees[i]) for i in order])
    metrics: dict[str, Any] = {}
    for name in columns:
        values, shares = np.concatenate(columns[name]), np.concatenate(weights[name])
        metrics[prefix + name] = float(values.sum() / shares.sum())
        # one value a tree, equal weights: what the bootstrap over prompts is for
        if name in WITH_INTERVAL and len(values) == len(clusters) and bool((shares == 1).all()) and len(values) > 1:
            interval = bootstrap_ci(values, clusters=clusters, draws=2000)
            metrics[f"{prefix}{name}/ci"] = [interval.low, interval.high]
    if prefix + "nll" in metrics:
        metrics[prefix + "perplexity"] = math.exp(min(700.0, metrics[prefix + "nll"]))
    metrics[prefix + "rows"] = len(trees)
    return metrics


def _prompt_cluster(tree: TokenTree) -> int:
    return int.from_bytes(hashlib.blake2b(tree.prompt_ids.tobytes(), digest_size=7).digest(), "little")
