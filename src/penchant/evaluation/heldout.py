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
from penchant.training.reduce import Totals
from penchant.types import Algorithm, Scored, TokenTree

WITH_INTERVAL = ("loss", "rewards/accuracies", "rewards/margins", "logps/accuracies")


def evaluate_heldout(
    algorithm: Algorithm,
    trees: Sequence[TokenTree],
    *,
    shared: bool,
    tokens_per_step: int,
    device: torch.device,
    at: float = 0.0,
    prefix: str = "eval/",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Every metric of an algorithm over `trees`, with scheduled hyperparameters as they are at progress `at`.

    ``mean = sum_rows value / sum_rows weight``; intervals are percentile bootstraps that draw whole prompts.

    Returns:
        ``{prefix + name: mean}``, ``{prefix + name + "/ci": [low, high]}``, ``rows``, and ``perplexity`` for losses over tokens.
    """
    scored, order = score_heldout(
        algorithm, trees, shared=shared, tokens_per_step=tokens_per_step, device=device, at=at, progress=progress
    )
    return heldout_metrics(algorithm, scored, [trees[i] for i in order], prefix=prefix)


def score_heldout(
    algorithm: Algorithm,
    trees: Sequence[TokenTree],
    *,
    shared: bool,
    tokens_per_step: int,
    device: torch.device,
    at: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Scored, list[int]]:
    """What the forward passes over `trees` leave, and the order in which the trees went through."""
    parts: list[Scored] = []
    order: list[int] = []
    with torch.no_grad():
        algorithm.begin_step(0, at, trees)
        for members in plan_microbatches([tree_tokens(t, shared) for t in trees], tokens_per_step):
            parts.append(algorithm.score(pack([trees[i] for i in members], shared=shared).to(device)))
            order += members
            if progress is not None:
                progress(len(order), len(trees))
    return Scored.cat(parts), order


def heldout_metrics(
    algorithm: Algorithm, scored: Scored, trees: Sequence[TokenTree], *, prefix: str = "eval/"
) -> dict[str, Any]:
    """The metrics of `evaluate_heldout` from scored trees, in the order in which they were scored."""
    with torch.no_grad():
        # once over all rows: a loss that looks at its batch must not see a chance part of them
        out = algorithm.loss(scored)
    clusters = np.array([_prompt_cluster(t) for t in trees])
    if len(set(clusters.tolist())) == 1:
        clusters = np.arange(len(trees))  # one prompt for all (or none): rows are drawn one by one
    totals = Totals()
    totals.add(out)
    metrics: dict[str, Any] = dict(totals.means(prefix))
    by_completion = clusters[scored.tree.cpu().numpy()]
    rows = {"loss": (out.losses, out.weights)} if not out.terms else {}
    for name, (values, weights) in {**rows, **out.metrics}.items():
        # one value a tree or a completion, equal weights: what the bootstrap over prompts is for
        labels = next((c for c in (clusters, by_completion) if len(c) == len(values)), None)
        if name in WITH_INTERVAL and weights is None and labels is not None and len(values) > 1:
            interval = bootstrap_ci(values.double().cpu().numpy(), clusters=labels, draws=2000)
            metrics[f"{prefix}{name}/ci"] = [interval.low, interval.high]
    if prefix + "nll" in metrics:
        metrics[prefix + "perplexity"] = math.exp(min(700.0, metrics[prefix + "nll"]))
    metrics[prefix + "rows"] = len(trees)
    return metrics


def _prompt_cluster(tree: TokenTree) -> int:
    return int.from_bytes(hashlib.blake2b(tree.prompt_ids.tobytes(), digest_size=7).digest(), "little")
