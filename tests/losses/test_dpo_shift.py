"""DPO-Shift: closed forms, lambda 1 is DPO, schedules reach both ends."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from golden import POINTS, check_golden, log_sigmoid, pairs, sigmoid

from penchant.losses.dpo import dpo
from penchant.losses.dpo_shift import DPOShiftParams, dpo_shift
from penchant.losses.schedules import progress_at


def test_golden_values_and_gradients() -> None:
    beta, lam = 0.3, 0.6
    z = lambda p: beta * (p.dw - lam * p.dl)  # noqa: E731
    check_golden(
        dpo_shift,
        lambda p: -log_sigmoid(z(p)),
        lambda p: (-beta * sigmoid(-z(p)), lam * beta * sigmoid(-z(p))),
        beta=beta,
        lam=lam,
    )


def test_lambda_1_is_dpo() -> None:
    assert torch.equal(dpo_shift(pairs(POINTS), lam=1.0).losses, dpo(pairs(POINTS)).losses)


@pytest.mark.parametrize(
    "name,ends",
    [
        ("increase_linear", (0.5, 1.0)),
        ("linear_increase", (0.5, 1.0)),
        ("decrease_linear", (1.0, 0.5)),
        ("linear_decrease", (1.0, 0.5)),
        ("fixed", (0.75, 0.75)),
    ],
)
def test_schedules_reach_both_ends(name: str, ends: tuple[float, float]) -> None:
    schedule = DPOShiftParams(schedule=name).schedules()["lam"]
    total = 7
    values = [schedule.at(progress_at(step, total)) for step in range(total)]
    assert (values[0], values[-1]) == ends
    steps = [b - a for a, b in pairwise(values)]
    assert steps == pytest.approx([(ends[1] - ends[0]) / (total - 1)] * (total - 1), abs=1e-15)


def test_only_the_bounds_of_its_own_schedule_matter() -> None:
    assert DPOShiftParams(schedule="increase_linear", lambda_min=0.2, lambda_max=0.9).schedules()["lam"].at(0.5) == 0.55
