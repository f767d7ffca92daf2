"""Which rows a step has, and what metrics average over."""

from __future__ import annotations

import pytest
import torch

from penchant.training.steps import BatchSchedule, Totals, is_due, reduced
from penchant.types import LossOutput


def _epochs(schedule: BatchSchedule) -> list[list[int]]:
    """The rows of every epoch, in training order."""
    per = schedule.steps_per_epoch
    return [
        [i for step in range(start, start + per) for i in schedule.batch(step)]
        for start in range(0, schedule.total_steps, per)
    ]


def test_every_epoch_has_every_row_in_an_order_of_its_own() -> None:
    one, two = _epochs(BatchSchedule(10, 4, 2.0))
    assert sorted(one) == sorted(two) == list(range(10)) and one != two
    assert _epochs(BatchSchedule(10, 4, 2.0)) == [one, two]
    assert _epochs(BatchSchedule(10, 4, 1.0, seed=1)) != [one]
    assert _epochs(BatchSchedule(10, 4, 2.0, shuffle=False)) == [list(range(10))] * 2


def test_several_updates_on_a_batch_skip_no_row() -> None:
    schedule = BatchSchedule(10, 4, 1.0, repeat=3)
    batches = [schedule.batch(step) for step in range(schedule.total_steps)]
    assert len(batches) == 9 and batches[::3] == batches[1::3] == batches[2::3]
    assert sorted(i for b in batches[::3] for i in b) == list(range(10))
    assert [schedule.ends_epoch(step) for step in (8, 9)] == [False, True] and schedule.epoch_at(9) == 1.0


def test_steps_are_bounded_and_fractions_are_of_an_epoch() -> None:
    assert BatchSchedule(10, 4, 1.0).total_steps == 3
    assert BatchSchedule(10, 4, 2.0, max_steps=5).total_steps == 5
    assert BatchSchedule(10, 4, 2.0, max_steps=9).total_steps == 6
    assert BatchSchedule(10, 4, 0.7).total_steps == 2
    assert BatchSchedule(10, 4, 0.01).total_steps == 1


@pytest.mark.parametrize(("every", "due"), [(None, []), (4, [4, 8]), ("epoch", [3, 6, 9])])
def test_the_steps_that_are_due_can_be_told_from_the_logged_epochs(every: int | str | None, due: list[int]) -> None:
    schedule = BatchSchedule(10, 4, 3.2)
    steps = range(1, schedule.total_steps + 1)
    assert [step for step in steps if is_due(every, step, schedule.ends_epoch(step))] == due
    logged = {step: round(schedule.epoch_at(step), 6) for step in steps}
    assert [step for step in steps if is_due(every, step, logged[step] % 1 == 0)] == due


def _output(losses: list[float], tokens: list[float], bad: list[float]) -> LossOutput:
    value, weights = torch.tensor(losses, requires_grad=True), torch.tensor(tokens)
    none = torch.zeros(len(bad))
    return LossOutput(value, weights, {"rows": (value.detach(), None)}, {"bad": (torch.tensor(bad) * 0.0, none)})


def test_means_are_over_everything_and_not_over_batches() -> None:
    totals = Totals()
    for part in (_output([2.0, 4.0], [1.0, 3.0], [1.0, 1.0]), _output([9.0], [6.0], [1.0])):
        totals.add(part)
    means = totals.means("eval/")
    # sums over tokens; the mean of the batches' means would be 1.5 and 1.5
    assert means["eval/loss"] == pytest.approx(15 / 10)
    assert means["eval/rows"] == pytest.approx(15 / 3)
    assert "eval/loss/bad" not in means  # without a single example


def test_a_term_without_examples_is_exactly_zero() -> None:
    out = _output([2.0, 4.0], [1.0, 3.0], [1.0, 1.0])
    loss = reduced(out, {"main": 12.0, "bad": 0.0})
    loss.backward()
    assert loss.item() == pytest.approx(0.5) and out.losses.grad.tolist() == pytest.approx([1 / 12] * 2)
    nothing = reduced(out, {"main": 0.0, "bad": 0.0})
    nothing.backward()  # there is a graph to backpropagate through
    assert nothing.item() == 0.0


def test_labelled_answers_have_a_margin_of_means_too() -> None:
    good, bad = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    rewards = torch.tensor([2.0, 4.0, 1.0])
    totals = Totals()
    metrics = {"rewards/chosen": (rewards * good, good), "rewards/rejected": (rewards * bad, bad)}
    totals.add(LossOutput(torch.zeros(3), metrics=metrics))
    assert totals.means("eval/")["eval/rewards/margins"] == 3.0 - 1.0
