"""Number formatting and axis ticks."""

from __future__ import annotations

import math
import random

import pytest

from penchant.report.svg import (
    MINUS,
    axis,
    downsample,
    duration,
    estimate,
    interval,
    log_labels,
    log_ticks,
    number,
    percent,
    pick_evenly,
    smooth,
    tick_labels,
    ticks,
    window,
    with_interval,
)


@pytest.mark.parametrize(
    "value,shown",
    [
        (0, "0"), (0.693147, "0.693"), (12345.6, "12,346"), (1e-5, "1.00e-5"), (None, "\u2013"), (math.nan, "\u2013"), (99.95, "100.0"),
        (-0.5, "\u22120.500"), (2.5e7, "2.50e7"), (1e300, "1.00e300"),
    ],
)  # fmt: skip
def test_numbers(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_an_interval_without_a_width_is_not_shown() -> None:
    assert with_interval(0.5, (0.5, 0.5), share=True) == with_interval(0.5, (0.50001, 0.50002), share=True) == "50.0%"
    assert with_interval(0.5, None, share=True) == "50.0%" and with_interval(0.5, (0.4, 0.6), True).endswith(
        "[40.0%, 60.0%]"
    )


def test_an_interval_has_as_many_digits_as_its_width_deserves() -> None:
    assert interval(0.4353, 0.5701) == "[0.44, 0.57]" and estimate(0.5051, (0.4353, 0.5701)) == "0.51"
    assert interval(0.43, 0.57, share=True) == "[43.0%, 57.0%]" and estimate(0.5, (0.43, 0.57), share=True) == "50.0%"
    assert interval(110.0, 340.0) == "[110, 340]"
    assert percent(None) == "\u2013"


def test_an_end_beside_zero_does_not_look_like_zero() -> None:
    assert interval(-0.123, -0.003) == "[\u22120.123, \u22120.003]"
    assert interval(-0.0000001, 5.0) == "[0.000, 5.000]"


def test_a_figure_too_small_for_six_decimals_has_an_exponent() -> None:
    assert with_interval(3e-8, (1e-8, 5e-8)) == "3.00e-8 [1.00e-8, 5.00e-8]"
    assert interval(-2e-7, 4e-6) == "[\u22122.00e-7, 4.00e-6]"


def test_durations() -> None:
    assert [duration(s) for s in (4.25, 45, 754, 3900, 100_000, None)] == [
        "4.2 s",
        "45 s",
        "12 min 34 s",
        "1 h 05 min",
        "1 d 3 h 46 min",
        "\u2013",
    ]


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.03, 0.97) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert tick_labels(ticks(-0.013, 0.021)) == ["\u22120.01", "0.00", "0.01", "0.02"]
    assert log_labels(log_ticks(0.09, 900)) == ["0.1", "1", "10", "100"]
    assert log_labels(log_ticks(1.5, 40)) == ["2", "5", "10", "20"]


@pytest.mark.parametrize("value", [0.6931471, 1_234_567.0, 3.3e-7, -98_765.4, 2e12])
@pytest.mark.parametrize("width", [0.0, 1e-15, 1e-9, 1e-6, 1e-4, 0.03])
def test_ticks_of_a_narrow_range_are_told_apart(value: float, width: float) -> None:
    scale = axis([value, value * (1 + width)], 0, 100)
    places, labels = zip(*scale.ticks(5), strict=True)
    assert len(labels) >= 2
    assert len(set(labels)) == len(labels) and max(map(len, labels)) <= 12
    shown = [float(label.replace(MINUS, "-").replace(",", "")) for label in labels]
    assert shown == pytest.approx(places, rel=1e-6 * max(width, 1e-3), abs=0)


@pytest.mark.parametrize("low,high", [(0, 1e-12), (1e9, 1e9 + 3), (-5e7, 8e8), (0.1, 0.1 + 1e-13)])
def test_ticks_of_odd_ranges_end(low: float, high: float) -> None:
    found = ticks(low, high)
    assert len(found) <= 12 and len(tick_labels(found)) == len(found)


def test_thinning_keeps_every_peak() -> None:
    rng = random.Random(0)
    points = [(float(i), rng.random()) for i in range(20_000)]
    points[7_777] = (7_777.0, 50.0)
    points[3_333] = (3_333.0, -50.0)
    kept = downsample(points, 300)
    assert len(kept) <= 1200 and set(kept) <= set(points) and kept == sorted(kept)
    assert (7_777.0, 50.0) in kept and (3_333.0, -50.0) in kept and kept[0] == points[0] and kept[-1] == points[-1]
    assert downsample(points[:100], 300) == points[:100]


def test_a_running_mean_is_a_mean() -> None:
    points = [(float(i), float(i)) for i in range(600)]
    made, size = smooth(points), window(len(points))
    assert size == 21 and made[300] == (300.0, pytest.approx(300.0)) and made[0][1] == pytest.approx(5.0)


def test_rows_are_spread_evenly_with_both_ends() -> None:
    assert pick_evenly(range(5), 9) == [0, 1, 2, 3, 4]
    assert pick_evenly(range(101), 5) == [0, 25, 50, 75, 100]
