"""A loss and its metrics on a held-out set: means over rows (never over batch means), with 95% intervals by prompt."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penchant.data.packing import pack, plan_microbatches, tree_tokens
from penchant.evaluation.answers import length_figures, likelihood_figures, mean_ratio
from penchant.evaluation.stats import bootstrap_ci, share_ci
from penchant.training.reduce import Totals
from penchant.types import Algorithm, LossOutput, Scored, TokenTree

WITH_INTERVAL = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "logps/accuracies",
    "logratios/chosen",
    "logratios/rejected",
)


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
            of = share_ci if name.endswith("accuracies") else bootstrap_ci
            interval = of(values.double().cpu().numpy(), clusters=labels, draws=2000)
            metrics[f"{prefix}{name}/ci"] = [interval.low, interval.high]
        elif name in ("loss", "nll") and weights is not None and labels is not None and len(values) > 1:
            of_tokens = mean_ratio(values.double().cpu().numpy(), weights.double().cpu().numpy(), labels)
            metrics[f"{prefix}{name}/ci"] = [of_tokens.low, of_tokens.high]
    metrics |= {prefix + name: value for name, value in _pair_figures(scored, out, clusters).items()}
    if prefix + "nll" in metrics:
        metrics[prefix + "perplexity"] = math.exp(min(700.0, metrics[prefix + "nll"]))
    metrics[prefix + "rows"] = len(trees)
    return metrics


def _pair_figures(scored: Scored, out: LossOutput, clusters: np.ndarray) -> dict[str, Any]:
    """How likely the chosen answers of pairs are, and what length explains; nothing for other rows."""
    if not scored.is_pairs or len(clusters) < 2:
        return {}

    def column(values: Tensor | None, slot: int) -> np.ndarray | None:
        return None if values is None else values[scored.slot == slot].double().cpu().numpy()

    lengths, others = column(scored.lengths, 0), column(scored.lengths, 1)
    assert lengths is not None and others is not None
    found: dict[str, Any] = {}
    if "logps/chosen" in out.metrics:  # a reward model has rewards where others have log-probs
        chosen = column(scored.policy_logps, 0)
        assert chosen is not None
        found |= likelihood_figures(chosen, lengths, clusters, column(scored.ref_logps, 0))
    right, weights = out.metrics.get("rewards/accuracies", (None, None))
    if right is not None and weights is None and len(right) == len(clusters):
        found |= length_figures(right.double().cpu().numpy(), lengths - others, clusters)
    return found


def _prompt_cluster(tree: TokenTree) -> int:
    return int.from_bytes(hashlib.blake2b(tree.prompt_ids.tobytes(), digest_size=7).digest(), "little")
