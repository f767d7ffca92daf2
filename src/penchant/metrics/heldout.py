"""A loss and its metrics on held-out rows, with confidence intervals."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from penchant.base.stats import Z95
from penchant.data.mapped import extra_of
from penchant.data.packing import run_passes
from penchant.metrics.figures import exp
from penchant.metrics.stats import Interval, bootstrap_ci, share_ci
from penchant.training.own import loss_of
from penchant.training.steps import Totals
from penchant.types import Algorithm, LossOutput, Scored, TokenTree

# ---- A loss and its metrics on a held-out set: means over rows (never over batches), with 95% intervals clustered by prompt ----

WITH_INTERVAL = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "logps/accuracies",
    "logratios/chosen",
    "logratios/rejected",
)


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
    """Run the forward passes over `trees`; return the scores and the order in which the trees were scored.

    Scheduled hyperparameters take their values at progress `at`.
    """
    parts: list[Scored] = []
    order: list[int] = []
    with torch.no_grad():
        algorithm.begin_step(0, at, trees)
        lanes = algorithm.side_by_side
        passes = run_passes(algorithm.score, trees, tokens_per_step, shared=shared, device=device, lanes=lanes)
        for members, scored in passes:
            parts.append(scored)
            order += members
            if progress is not None:
                progress(len(order), len(trees))
    return Scored.cat(parts), order


def heldout_metrics(
    algorithm: Algorithm, scored: Scored, trees: Sequence[TokenTree], *, prefix: str = "eval/"
) -> dict[str, Any]:
    """Compute every metric of an algorithm over scored trees.

    ``mean = sum_rows value / sum_rows weight``. Intervals resample whole prompts (percentile bootstrap), or use the delta method over
    prompts if values have weights (tokens).

    Args:
        trees: in the order in which they were scored.

    Returns:
        ``{prefix + name: mean}``, ``{prefix + name + "/ci": [low, high]}``, ``rows``, and ``perplexity`` if the loss has an ``nll``.
    """
    with torch.no_grad():
        # one call over all rows: a loss that uses batch statistics must not depend on how the rows were batched
        out = loss_of(algorithm, scored)
    clusters = np.array([_prompt_cluster(t) for t in trees])
    if len(set(clusters.tolist())) == 1:
        clusters = np.arange(len(trees))  # all rows share one prompt (or have none): resample rows instead
    totals = Totals()
    totals.add(out)
    metrics: dict[str, Any] = dict(totals.means(prefix))
    by_completion = clusters[scored.tree.cpu().numpy()]
    loss_values = {"loss": (out.losses, out.weights)} if not out.terms else {}
    has_row_weights = scored.row_weights is not None
    for name, (values, weights) in {**loss_values, **out.metrics}.items():
        # one value per tree or completion, equally weighted: the case for the bootstrap over prompts
        labels = next((c for c in (clusters, by_completion) if len(c) == len(values)), None)
        if name in WITH_INTERVAL and weights is None and labels is not None and len(values) > 1:
            interval_of = share_ci if name.endswith("accuracies") else bootstrap_ci
            metrics |= interval_of(values.cpu().double().numpy(), clusters=labels, draws=2000).named(prefix + name)
            if name.endswith("rewards/accuracies"):
                ties = name.removesuffix("accuracies") + "ties"
                metrics[prefix + ties] = float((values == 0.5).double().mean())
        elif (
            (name in ("loss", "nll") or (name in WITH_INTERVAL and has_row_weights))
            and weights is not None
            and labels is not None
            and len(values) > 1
        ):
            ratio = mean_ratio(values.cpu().double().numpy(), weights.cpu().double().numpy(), labels)
            metrics |= ratio.named(prefix + name)
    metrics |= {prefix + name: value for name, value in _pair_figures(scored, out, clusters).items()}
    if prefix + "nll" in metrics:
        metrics[prefix + "perplexity"] = exp(metrics[prefix + "nll"])
    metrics[prefix + "rows"] = len(trees)
    return metrics


def metrics_by_set(
    algorithm: Algorithm, scored: Scored, trees: Sequence[TokenTree], names: Sequence[str]
) -> dict[str, Any]:
    """Compute `heldout_metrics` for each of several held-out sets, as ``eval/NAME/loss`` and so on.

    Args:
        trees: in the order in which they were scored; names: of the sets, indexed by the trees' `origin`. Sets without trees are left out.
    """
    metrics: dict[str, Any] = {}
    origins = extra_of(trees, "origin")
    for origin, name in enumerate(names):
        indices = np.flatnonzero(origins == origin).tolist()
        if indices:
            subset = [trees[i] for i in indices]
            metrics |= heldout_metrics(algorithm, scored.of_trees(indices), subset, prefix=f"eval/{name}/")
    return metrics


def row_losses(algorithm: Algorithm, scored: Scored, trees: Sequence[TokenTree]) -> dict[int, tuple[float, float]]:
    """Map each data row to its loss and weight (1, or tokens); empty unless the loss has a single term and one value per row."""
    with torch.no_grad():
        out = algorithm.loss(scored)
    if out.terms or len(out.losses) != len(trees) or len({t.row for t in trees}) != len(trees):
        return {}
    weights = torch.ones_like(out.losses) if out.weights is None else out.weights
    values = zip(out.losses.double().tolist(), weights.double().tolist(), strict=True)
    return dict(zip((t.row for t in trees), values, strict=True))


def loss_change(
    before: Mapping[int, tuple[float, float]], after: Mapping[int, tuple[float, float]], trees: Sequence[TokenTree]
) -> dict[str, Any]:
    """``sum (after - before) / sum weight`` with its interval by prompt. Pairing each row with itself removes the variance between rows.

    Empty if the rows differ, or if all rows start at the same loss (log 2): the loss's own interval then says the same.
    """
    rows = [t.row for t in trees]
    if set(before) != set(after) or len({round(before[r][0] / max(before[r][1], 1.0), 6) for r in rows}) < 2:
        return {}
    change = [after[r][0] - before[r][0] for r in rows]
    prompts = [_prompt_cluster(t) for t in trees]
    clusters = prompts if len(set(prompts)) > 1 else rows
    return mean_ratio(change, [after[r][1] for r in rows], clusters).named("eval/loss_change")


def _pair_figures(scored: Scored, out: LossOutput, clusters: np.ndarray) -> dict[str, Any]:
    """Likelihood figures of the chosen answers and length figures; empty if the rows are not pairs."""
    if not scored.is_pairs or len(clusters) < 2:
        return {}

    def column(values: Tensor | None, slot: int) -> np.ndarray | None:
        return None if values is None else scored.sides(values)[slot].cpu().double().numpy()

    lengths, rejected_lengths = column(scored.lengths, 0), column(scored.lengths, 1)
    assert lengths is not None and rejected_lengths is not None
    figures: dict[str, Any] = {}
    if "logps/chosen" in out.metrics:  # not for a reward model, whose scores are rewards instead of log-probs
        chosen, reference, weight = (column(v, 0) for v in (scored.policy_logps, scored.ref_logps, scored.row_weights))
        assert chosen is not None
        w = np.ones_like(chosen) if weight is None else weight
        figures |= likelihood_figures(chosen * w, lengths * w, clusters, None if reference is None else reference * w)
    right, weights = out.metrics.get("rewards/accuracies", (None, None))
    if right is not None and weights is None and len(right) == len(clusters):
        figures |= length_figures(right.cpu().double().numpy(), lengths - rejected_lengths, clusters)
    return figures


def _prompt_cluster(tree: TokenTree) -> int:
    return int.from_bytes(hashlib.blake2b(tree.prompt_key, digest_size=7).digest(), "little")


# ---- Figures of held-out pairs beyond a loss's own metrics: likelihood of the chosen answers, effect of length. numpy only ----

RIDGE = 0.25  # 1 / variance of the Gaussian penalty on both logistic parameters: keeps the fit finite if length decides every pair


def mean_ratio(values: ArrayLike, weights: ArrayLike, clusters: ArrayLike) -> Interval:
    """``sum values / sum weights`` with its 95% interval, by the delta method over clusters.

    ``se = sqrt(k / (k - 1) sum_c e_c^2) / sum weights, e_c = sum_{i in c} (v_i - r w_i)``. A single cluster gives zero width.

    Args:
        values, weights: (n,), weights above 0; clusters: (n,) prompt of each row.
    """
    v, w = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    ratio = float(v.sum() / w.sum())
    e = np.bincount(member, weights=v - ratio * w)
    k = len(e)
    half = Z95 * math.sqrt(k / (k - 1) * float((e**2).sum())) / float(w.sum()) if k > 1 else 0.0
    return Interval(ratio, ratio - half, ratio + half)


def likelihood_figures(
    chosen: ArrayLike, lengths: ArrayLike, clusters: ArrayLike, ref_chosen: ArrayLike | None = None
) -> dict[str, Any]:
    """``perplexity/chosen = exp(-sum log p / sum tokens)`` and its ratio to the reference's, with intervals by prompt.

    Args:
        chosen, ref_chosen: summed log-probs of chosen answers in nats, (rows,); lengths: their tokens; clusters: (rows,) prompts. If
            rows have weights, the log-probs and lengths are already multiplied by them.
    """
    policy = np.asarray(chosen, dtype=np.float64)
    figures = _perplexity("perplexity/chosen", mean_ratio(-policy, lengths, clusters))
    if ref_chosen is not None:
        change = np.asarray(ref_chosen, dtype=np.float64) - policy
        figures |= _perplexity("perplexity_ratio/chosen", mean_ratio(change, lengths, clusters))
    return figures


def _perplexity(name: str, nats: Interval) -> dict[str, Any]:
    return Interval(*(exp(x) for x in (nats.estimate, nats.low, nats.high))).named(name)


def length_figures(right: ArrayLike, gaps: ArrayLike, clusters: ArrayLike) -> dict[str, Any]:
    """How preferences depend on length; each figure has its interval by prompt.

    - ``length/longer_wins``: accuracy of always preferring the longer answer; equal lengths count half.
    - ``length/agreement``: share of pairs in which the model prefers the longer answer; equal lengths count half.
    - ``length/controlled_accuracy``: the model's accuracy at equal length, from a logistic fit in the length gap.

    Args:
        right: (rows,) 1 if the chosen answer is preferred, 0.5 for a tie; gaps: chosen minus rejected tokens; clusters: prompts.
    """
    y, g = np.asarray(right, dtype=np.float64), np.asarray(gaps, dtype=np.float64)
    longer = (g > 0) + 0.5 * (g == 0)
    agrees = np.where(g == 0, 0.5, np.where(g > 0, y, 1.0 - y))
    return {
        **share_ci(longer, clusters=clusters, draws=2000).named("length/longer_wins"),
        **share_ci(agrees, clusters=clusters, draws=2000).named("length/agreement"),
        **accuracy_at_equal_length(y, g, clusters).named("length/controlled_accuracy"),
    }


def accuracy_at_equal_length(right: ArrayLike, gaps: ArrayLike, clusters: ArrayLike) -> Interval:
    """Accuracy at a length gap of zero, from a logistic fit in the gap.

    ``P(right) = sigmoid(theta + phi tanh(gap / s))``, s the standard deviation of the gaps. The figure is ``sigmoid(theta)``; its 95% interval
    uses the sandwich variance over prompts on the scale of theta. Same form as length-controlled win rates (arXiv 2404.04475).

    Args:
        right: (rows,) within 0 and 1; gaps: (rows,) tokens; clusters: (rows,) prompts.
    """
    y, g = np.asarray(right, dtype=np.float64), np.asarray(gaps, dtype=np.float64)
    spread = float(g.std())
    x = np.stack([np.ones_like(g), np.tanh(g / spread) if spread > 0 else np.zeros_like(g)], axis=1)
    beta = np.zeros(2)
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-(x @ beta)))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, x.T @ (y - p) - RIDGE * beta)
        beta = beta + np.clip(step, -2.0, 2.0)
    p = 1.0 / (1.0 + np.exp(-(x @ beta)))
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    k = int(member.max()) + 1
    scores = np.stack([np.bincount(member, weights=x[:, j] * (y - p)) for j in range(2)], axis=1)
    bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(2))
    variance = float((bread @ (scores.T @ scores) @ bread)[0, 0]) * (k / (k - 1) if k > 1 else 1.0)
    half = Z95 * math.sqrt(max(0.0, variance))
    rate, low, high = (1.0 / (1.0 + math.exp(-t)) for t in (beta[0], beta[0] - half, beta[0] + half))
    return Interval(float(rate), float(low), float(high))


# ---- How training changed held-out pairs: the same figures for every method, whatever its loss ----


@dataclass(frozen=True, slots=True)
class PairChange:
    """Log-prob changes of held-out pairs, policy minus reference, in nats per completion, (rows,) each."""

    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def margins(self) -> np.ndarray:
        """``d_w - d_l``: DPO's margin without its beta."""
        return self.chosen - self.rejected

    @property
    def correct(self) -> np.ndarray:
        """1 if the chosen completion gained more than the rejected one, 0.5 for a tie, else 0."""
        return (self.margins > 0) + 0.5 * (self.margins == 0)


def pair_change(policy: Tensor, reference: Tensor) -> PairChange:
    """Compute how the log-probs of pairs changed from reference to policy.

    Args:
        policy, reference: summed log-probs in nats, (2 x rows,), each pair's chosen completion before its rejected one.

    Raises:
        ValueError: the shapes differ, or the length is odd.
    """
    if policy.shape != reference.shape or policy.ndim != 1 or len(policy) % 2:
        raise ValueError(f"log-probs must both be (2 x rows,), got {tuple(policy.shape)}, {tuple(reference.shape)}")
    change = (policy.double() - reference.double()).numpy().reshape(-1, 2)
    return PairChange(change[:, 0], change[:, 1])


# ---- Quality of a reward model on held-out pairs: accuracy, calibration, dependence on length. numpy only ----

BINS = 10


def calibration(margins: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """Measure how well sigmoid(margin) matches the share of pairs ranked correctly.

    The chosen answer always comes first, so each pair is folded: confidence ``c = sigmoid(|m|)`` in [0.5, 1], right ``1[m > 0]`` (a tie
    counts half). ``ECE = sum_b n_b / n |mean right - mean c|`` over bins of equal counts; Brier score ``mean (c - right)^2``.
    If a bin's edge divides pairs of equal confidence, each side has their mean of `right`, so the order of the pairs doesn't matter.

    Args:
        margins: (n,) reward of the chosen minus reward of the rejected answer; bins: maximum number of bins.

    Papers: arXiv 1706.04599 (ECE; its bins have equal width); Brier (1950).
    """
    m = np.asarray(margins, dtype=np.float64)
    confidence = 1.0 / (1.0 + np.exp(-np.abs(m)))
    right = (m > 0) + 0.5 * (m == 0)
    _, equal, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    shared = (np.bincount(equal, right) / counts)[equal]
    parts = [p for p in np.array_split(np.argsort(confidence), min(bins, len(m))) if len(p)]
    rows = [
        {"rows": len(p), "confidence": float(confidence[p].mean()), "right": float(shared[p].mean())} for p in parts
    ]
    ece = sum(r["rows"] * abs(r["right"] - r["confidence"]) for r in rows) / len(m)
    return {"ece": float(ece), "brier": float(np.mean((confidence - right) ** 2)), "bins": rows}


def by_length_gap(margins: np.ndarray, gaps: np.ndarray) -> dict[str, Any]:
    """Accuracy within quartiles of the length gap, and of always preferring the longer answer.

    Args:
        margins: (n,) as in `calibration`; gaps: (n,) tokens of the chosen minus tokens of the rejected answer. Equal gaps share a quartile.
    """
    m, g = np.asarray(margins, dtype=np.float64), np.asarray(gaps, dtype=np.float64)
    right = (m > 0) + 0.5 * (m == 0)
    quartile = np.searchsorted(np.quantile(g, [0.25, 0.5, 0.75]), g, side="left")
    rows = [
        {
            "quartile": q + 1,
            "from": int(g[quartile == q].min()),
            "to": int(g[quartile == q].max()),
            "rows": int((quartile == q).sum()),
            "accuracy": float(right[quartile == q].mean()),
        }
        for q in range(4)
        if (quartile == q).any()
    ]
    return {"longer_wins": float(np.mean((g > 0) + 0.5 * (g == 0))), "quartiles": rows}


def pair_quality(margins: np.ndarray, gaps: np.ndarray) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the flat ``eval/...`` figures for the log, and the tables for calibration.json and the report."""
    reliability, length = calibration(margins), by_length_gap(margins, gaps)
    flat = {
        "eval/calibration/ece": reliability["ece"],
        "eval/calibration/brier": reliability["brier"],
        "eval/length/longer_wins": length["longer_wins"],
        **{f"eval/length/q{r['quartile']}/accuracy": r["accuracy"] for r in length["quartiles"]},
    }
    return flat, {"rows": len(margins), "calibration": reliability, "length": length}


def format_quality(quality: dict[str, Any]) -> str:
    """Format the tables as text: share right by confidence, accuracy by length gap."""
    lines = ["confidence  share right  pairs"]
    lines += [f"{b['confidence']:>10.3f}  {b['right']:>11.3f}  {b['rows']:>5}" for b in quality["calibration"]["bins"]]
    lines += ["", "chosen - rejected tokens  accuracy  pairs"]
    for r in quality["length"]["quartiles"]:
        span = f"{r['from']} to {r['to']}"
        lines.append(f"{span:>24}  {r['accuracy']:>8.3f}  {r['rows']:>5}")
    return "\n".join(lines)
