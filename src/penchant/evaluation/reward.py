"""How good a reward model is on held-out pairs: accuracy, calibration, and what length has to do with it. numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np

BINS = 10


def calibration(margins: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """Whether sigmoid(margin) is the share of pairs that are ranked right.

    The chosen answer always comes first, so each pair is folded: confidence ``c = sigmoid(|m|)`` in [0.5, 1], right ``1[m > 0]`` (a tie
    counts half). ``ECE = sum_b n_b / n |mean right - mean c|`` over bins of equal counts; Brier score ``mean (c - right)^2``.

    Args:
        margins: (n,) reward of the chosen minus reward of the rejected answer; bins: at most so many.

    Papers: arXiv 1706.04599 (ECE, with bins of equal width there); Brier (1950).
    """
    m = np.asarray(margins, dtype=np.float64)
    confidence = 1.0 / (1.0 + np.exp(-np.abs(m)))
    right = (m > 0) + 0.5 * (m == 0)
    order = np.argsort(confidence, kind="stable")
    parts = [p for p in np.array_split(order, min(bins, len(m))) if len(p)]
    rows = [{"rows": len(p), "confidence": float(confidence[p].mean()), "right": float(right[p].mean())} for p in parts]
    ece = sum(r["rows"] * abs(r["right"] - r["confidence"]) for r in rows) / len(m)
    return {"ece": float(ece), "brier": float(np.mean((confidence - right) ** 2)), "bins": rows}


def by_length_gap(margins: np.ndarray, gaps: np.ndarray) -> dict[str, Any]:
    """Accuracy within quartiles of the length gap, and of the rule that the longer answer wins.

    Args:
        margins: (n,) as above; gaps: (n,) tokens of the chosen minus tokens of the rejected answer. Pairs of one gap stay together.
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
    """(flat ``eval/...`` figures for the log, tables for calibration.json and the report) of held-out pairs."""
    fit, length = calibration(margins), by_length_gap(margins, gaps)
    flat = {
        "eval/calibration/ece": fit["ece"],
        "eval/calibration/brier": fit["brier"],
        "eval/length/longer_wins": length["longer_wins"],
        **{f"eval/length/q{r['quartile']}/accuracy": r["accuracy"] for r in length["quartiles"]},
    }
    return flat, {"rows": len(margins), "calibration": fit, "length": length}


def as_text(quality: dict[str, Any]) -> str:
    """The tables as text: confidence against the share right, accuracy by length gap."""
    lines = ["confidence  share right  pairs"]
    lines += [f"{b['confidence']:>10.3f}  {b['right']:>11.3f}  {b['rows']:>5}" for b in quality["calibration"]["bins"]]
    lines += ["", "chosen - rejected tokens  accuracy  pairs"]
    for r in quality["length"]["quartiles"]:
        span = f"{r['from']} to {r['to']}"
        lines.append(f"{span:>24}  {r['accuracy']:>8.3f}  {r['rows']:>5}")
    return "\n".join(lines)
