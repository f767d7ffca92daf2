"""Calibration and length effects, by hand and on margins with a known true value."""

from __future__ import annotations

import math

import numpy as np
import pytest

from penchant.metrics.heldout import by_length_gap, calibration, format_quality, pair_quality


def test_calibration_by_hand() -> None:
    """Two bins of two: confidences sigmoid(1), sigmoid(1), sigmoid(2), sigmoid(2); correct 1, 0 and 1, 1."""
    s1, s2 = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    found = calibration(np.array([2.0, 1.0, -1.0, 2.0]), bins=2)
    assert [b["confidence"] for b in found["bins"]] == pytest.approx([s1, s2])
    assert [b["right"] for b in found["bins"]] == [0.5, 1.0]
    assert found["ece"] == pytest.approx(0.5 * abs(s1 - 0.5) + 0.5 * (1 - s2))
    assert found["brier"] == pytest.approx(((1 - s1) ** 2 + s1**2 + 2 * (1 - s2) ** 2) / 4)


def test_a_tie_counts_half() -> None:
    found = calibration(np.zeros(4), bins=1)
    assert found["bins"] == [{"rows": 4, "confidence": 0.5, "right": 0.5}]
    assert found["ece"] == 0.0


def test_the_order_of_pairs_with_equal_confidence_does_not_matter() -> None:
    """Bins of two divide three pairs of confidence sigmoid(1), two of them right: 2/3 on both sides of the edge."""
    orders = ([1.0, 1.0, -1.0, 2.0], [-1.0, 1.0, 1.0, 2.0], [2.0, 1.0, -1.0, 1.0])
    first, *others = [calibration(np.array(margins), bins=2) for margins in orders]
    assert [b["right"] for b in first["bins"]] == pytest.approx([2 / 3, (2 / 3 + 1) / 2])
    assert all(other["ece"] == first["ece"] for other in others)


def test_calibrated_margins_have_a_small_error_and_overconfident_ones_a_large_one() -> None:
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(0, 1.5, 20_000))
    right = rng.random(20_000) < 1 / (1 + np.exp(-size))
    margins = np.where(right, size, -size)
    assert calibration(margins)["ece"] < 0.015
    assert calibration(5 * margins)["ece"] > 0.15
    assert calibration(5 * margins)["brier"] > calibration(margins)["brier"]


def test_length_quartiles_by_hand() -> None:
    margins = np.array([1.0, -1.0, 1.0, 1.0, -1.0, 0.0, 1.0, 1.0])
    gaps = np.array([-8, -6, -4, -2, 0, 2, 4, 6])
    found = by_length_gap(margins, gaps)
    assert [r["accuracy"] for r in found["quartiles"]] == [0.5, 1.0, 0.25, 1.0]
    assert [(r["from"], r["to"], r["rows"]) for r in found["quartiles"]] == [
        (-8, -6, 2),
        (-4, -2, 2),
        (0, 2, 2),
        (4, 6, 2),
    ]
    assert found["longer_wins"] == pytest.approx((3 + 0.5) / 8)


def test_pairs_of_one_gap_stay_together() -> None:
    found = by_length_gap(np.ones(6), np.array([0, 0, 0, 0, 0, 5]))
    assert [r["rows"] for r in found["quartiles"]] == [5, 1]


def test_flat_figures_and_tables() -> None:
    flat, quality = pair_quality(np.array([1.0, -2.0, 3.0]), np.array([4.0, -1.0, 2.0]))
    assert flat["eval/calibration/ece"] == quality["calibration"]["ece"]
    assert flat["eval/length/longer_wins"] == pytest.approx(2 / 3)
    text = format_quality(quality)
    assert "share right" in text and "2 to 2" in text
