"""Schedules: exact at both ends, monotone, and constant at the start value for a single step."""

from __future__ import annotations

import math

import pytest

from penchant.losses.schedules import Schedule, progress_at


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("total", [2, 3, 10, 997])
def test_both_ends_are_exact(shape: str, total: int) -> None:
    schedule = Schedule.model_validate({"from": 0.1, "to": 0.7, "shape": shape})
    values = [schedule.at(progress_at(step, total)) for step in range(total)]
    assert values[0] == 0.1 and values[-1] == 0.7
    assert values == sorted(values)
    assert schedule.at(progress_at(total + 5, total)) == 0.7  # the evaluation after the last step


def test_the_middle() -> None:
    assert Schedule(start=1.0, end=3.0).at(0.25) == 1.5
    assert Schedule(start=1.0, end=3.0, shape="cosine").at(0.25) == pytest.approx(1 + (1 - math.cos(math.pi / 4)))


def test_a_run_of_one_step_has_the_first_value() -> None:
    assert progress_at(0, 1) == 0.0
