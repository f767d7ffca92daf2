"""Plots: complete, finite, small, and with a table of their values."""

from __future__ import annotations

import json
import math
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
from report_folders import evaluation, make_comparison, make_run, make_sweep, write_lines

from penchant.report.curves import curves, metric_points
from penchant.report.data import read_report
from penchant.report.frontier import (
    Frontier,
    Spot,
    comparison_frontier,
    draw_frontier,
    frontier,
    pareto_front,
    runs_frontier,
)
from penchant.report.svg import LEFT, Axis, Level, Line, Plot, figure, move_apart, path_data, sparkline, style_classes


def _plot(*lines: Line, **more: object) -> Plot:
    return Plot("k", "Title", "nats", "step", lines, "what is seen", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "points",
    [
        ((1.0, 2.0),), ((1.0, 2.0), (2.0, 2.0)), ((1.0, 0.0), (2.0, 0.0)), ((0.0, 1e-300), (1.0, 1e300)), ((5.0, -1e9), (5.0, 3.0)),
        tuple((float(i), math.sin(i)) for i in range(5000)), ((1.0, math.nan), (2.0, 1.0), (3.0, math.inf)),
    ],
)  # fmt: skip
def test_plots_survive_odd_series(points: tuple[tuple[float, float], ...]) -> None:
    made = str(figure(_plot(Line("a", points, tag="a"), log_y=True)))
    assert "nan" not in made and "inf" not in made and len(made) < 40_000
    assert "<table>" in made and 'role="img"' in made and 'aria-label="Title. what is seen"' in made


def test_nothing_to_draw_is_no_plot() -> None:
    assert figure(_plot(Line("a", ((1.0, math.nan),)))) is None and figure(_plot()) is None


def test_a_path_goes_where_its_points_are() -> None:
    points = [(float(i), random.Random(i).uniform(-5, 5)) for i in range(200)]
    across, up = Axis(0, 199, 60, 500), Axis(-5, 5, 250, 10)
    text = path_data(points, across, up)
    numbers = [float(n) for n in re.findall(r"-?(?:\d+\.?\d*|\.\d+)", text)]
    x, y = numbers[:2]
    for (dx, dy), point in zip(zip(numbers[2::2], numbers[3::2], strict=True), points[1:], strict=True):
        x, y = x + dx, y + dy
        assert x == pytest.approx(across(point[0]), abs=0.051) and y == pytest.approx(up(point[1]), abs=0.051)


def test_log_axes_are_drawn_where_values_span_decades_and_are_positive() -> None:
    wide = ((1.0, 0.01), (2.0, 50.0))
    assert ">0.1</text>" in str(figure(_plot(Line("a", wide), log_y=True)))
    assert ">0.1</text>" not in str(figure(_plot(Line("a", wide))))
    assert "nan" not in str(
        figure(_plot(Line("a", ((1.0, -1.0), (2.0, 900.0))), log_y=True, levels=(Level(-0.5, "x"),)))
    )


def test_the_table_behind_holds_exact_figures_and_intervals() -> None:
    points = tuple((float(i), i / 7) for i in range(1000))
    made = str(
        figure(_plot(Line("held out", ((10.0, 0.61),), ends=((10.0, 0.58, 0.66),), marked=True), Line("train", points)))
    )
    assert "0.610 [0.580, 0.660]" in made or "0.61 [0.58, 0.66]" in made
    rows = re.findall(
        r'<th scope="row" class="n">([\d,.]+)</th><td class="n">([^<]*)</td><td class="n">([\d,.]*)</td>', made
    )
    assert 60 <= len(rows) <= 90 and rows[0][0] == "0" and rows[-1][0] == "999"
    for x, _, y in rows:
        assert float(y.replace(",", "")) == pytest.approx(float(x) / 7, rel=0.006)


def test_labels_are_moved_apart_and_stay_inside() -> None:
    found = move_apart([50.0, 50.0, 50.0, 10.0], 0.0, 100.0, 15.0)
    ordered = sorted(found)
    assert all(b - a >= 14.9 for a, b in pairwise(ordered)) and found[3] == min(found)
    crowded = move_apart([1.0] * 40, 0.0, 100.0, 15.0)
    assert min(crowded) >= -0.001 and max(crowded) <= 100.001
    assert move_apart([], 0, 1, 1) == []


def test_eight_colors_then_dashes() -> None:
    assert [style_classes(i) for i in (0, 7, 8, 33)] == ["c0 d0", "c7 d0", "c0 d1", "c1 d0"]
    assert len({style_classes(i) for i in range(32)}) == 32


def test_a_sparkline_says_what_it_shows() -> None:
    assert 'aria-label="KL: from 1.00 to 9.00"' in str(sparkline([1.0, 5.0, 9.0], "KL"))
    assert sparkline([1.0], "x") is None and sparkline([math.nan, 1.0], "x") is None


def test_one_run_has_train_and_held_out_in_one_plot(tmp_path: Path) -> None:
    made = str(curves(read_report([make_run(tmp_path / "r", steps=60)], 0.0)))
    assert made.count("<figure") >= 6 and "running mean of 5 steps" in made
    loss = made[made.index("<b>Loss</b>") : made.index("<b>Preference accuracy</b>")]
    assert 'class="tag c0 d0"' in loss and 'class="tag c1 d0"' in loss and ">held out</text>" in loss


def test_many_runs_have_a_letter_a_setting_thin_seeds_and_a_thick_mean(tmp_path: Path) -> None:
    made = str(curves(read_report([make_sweep(tmp_path / "s")], 0.0)))
    loss = made[made.index("<b>Loss, held out</b>") :]
    loss = loss[: loss.index("</figure>")]
    assert loss.count('class="thin"') == 4 and loss.count('class="thick"') == 2
    assert ">A</text>" in loss and ">B</text>" in loss and "A beta-0.1, mean of 2 seeds" in loss
    # the mean over seeds: 0.6931 - (0.1 + 0.11) / 8 at the end of A
    assert "0.667" in loss


def test_no_metrics_no_curves(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert curves(read_report([tmp_path], 0.0)) is None


def test_the_frontier_of_a_sweep_stands_at_the_means_of_its_seeds(tmp_path: Path) -> None:
    found = runs_frontier(read_report([make_sweep(tmp_path / "s")], 0.0))
    assert found is not None and found.label == "preference accuracy" and found.start == 0.5
    a, b = found.spots
    assert (a.key, a.x, a.runs) == ("A", 1.0, 2) and a.y == pytest.approx(0.605) and a.y_ci == (0.6, 0.61)
    assert b.x == 2.0 and b.y == pytest.approx(0.705)


def test_the_frontier_of_one_run_has_its_trail_and_intervals(tmp_path: Path) -> None:
    evals = [
        evaluation(
            i * 10,
            0.5 + i / 20,
            0.02,
            **{"eval/kl/policy_ref": float(i), "eval/reward": i / 10, "eval/reward/ci": [i / 10, i / 5]},
        )
        for i in range(4)
    ]
    found = runs_frontier(read_report([make_run(tmp_path / "r", evals=evals)], 0.0))
    assert found is not None and found.label == "reward" and found.start == 0.0
    assert found.spots[0].trail == ((0.0, 0.0), (1.0, 0.1), (2.0, 0.2), (3.0, 0.3)) and found.spots[
        0
    ].y_ci == pytest.approx((0.3, 0.6))


def test_a_frontier_has_no_common_start_where_runs_have_none(tmp_path: Path) -> None:
    runs = []
    for i, name in enumerate(("r", "s")):
        evals = [evaluation(k, 0.5, 0.02, **{"eval/kl/policy_ref": k / 9, "eval/reward": i + k / 9}) for k in (0, 9)]
        runs.append(make_run(tmp_path / name, evals=evals))
        manifest = json.loads((runs[i] / "manifest.json").read_text())
        (runs[i] / "manifest.json").write_text(json.dumps({**manifest, "model": {"sha256": name * 64}}))
    found = runs_frontier(read_report(runs, 0.0))
    assert found is not None and found.label == "reward" and found.start is None and "its own start" in found.source


def test_the_frontier_of_a_comparison(tmp_path: Path) -> None:
    data = read_report([make_comparison(tmp_path / "c")], 0.0)
    found = comparison_frontier(data.comparisons[0], data)
    assert found is not None and [s.name for s in found.spots] == ["ours", "fine"] and found.start == 0.1
    assert found.spots[1].x_ci == (4.5, 5.5)
    assert "None reaches as much with less KL: ours (0.500 at 4.00 nats), fine (0.600 at 5.00 nats)" in str(
        frontier(data)
    )


def test_a_log_axis_takes_a_trail_from_zero_and_an_interval_below_it() -> None:
    trail = ((0.0, 0.5), (0.01, 0.52), (0.02, 0.55))
    spots = (Spot("small", "A", 0, 0.02, 0.55, (-0.01, 0.05), None, 1, trail), Spot("large", "B", 1, 9.0, 0.8))
    drawn = str(draw_frontier(Frontier("win rate", True, spots, 0.5, "")))
    assert "log scale" in drawn and drawn.count('class="whisker"') == 1 and drawn.count('class="thin"') == 1
    assert "large: KL 9.00, 80.0%" in drawn
    for x in re.findall(r'd="M([\d.-]+) ', drawn):
        assert float(x) >= LEFT  # nothing is drawn outside the axes


def test_runs_that_did_not_end_are_no_part_of_a_frontier_of_many(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s")
    for seed in (0, 1):
        path = sweep / f"beta-0.1-seed-{seed}" / "manifest.json"
        path.write_text(path.read_text().replace("finished", "stopped"))
    found = runs_frontier(read_report([sweep], 0.0))
    assert (
        found is not None
        and [s.name for s in found.spots] == ["beta-0.3"]
        and "1 without these figures left out" in found.source
    )


def test_no_kl_no_frontier(tmp_path: Path) -> None:
    assert frontier(read_report([make_run(tmp_path / "r")], 0.0)) is None


def test_the_frontiers_steps_join_those_that_nobody_beats() -> None:
    spots = [
        Spot(n, "", i, x, y)
        for i, (n, x, y) in enumerate([("a", 1, 1), ("b", 2, 0.5), ("c", 3, 2), ("d", 3, 1.9), ("e", 4, 2)])
    ]
    assert [s.name for s in pareto_front(spots)] == ["a", "c"]


def test_an_online_runs_held_out_loss_is_no_curve_beside_its_trainings_and_each_reward_has_its_own(
    tmp_path: Path,
) -> None:
    """Its held-out loss is minus the reward and only serves to choose a checkpoint."""
    train = [{"kind": "train", "step": s, "loss": 0.1 * s, "reward": 1.0} for s in (1, 2)]
    held_out = [{"kind": "eval", "step": s, "eval/loss": -2.0, "eval/reward": 2.0} for s in (0, 2)]
    for line, prefix in [(x, "") for x in train] + [(x, "eval/") for x in held_out]:
        line |= {f"{prefix}rewards/polite/mean": 0.5, f"{prefix}rewards/my.py:short/mean": 1.5}  # type: ignore[operator]
    write_lines(tmp_path / "metrics.jsonl", [*train, *held_out])
    (run,) = read_report([tmp_path], 0.0).runs
    assert metric_points(run, "eval/loss") == () and metric_points(run, "loss") == ((1, 0.1), (2, 0.2))
    assert metric_points(run, "eval/reward") == ((0, 2.0), (2, 2.0))
    made = str(curves(read_report([tmp_path], 0.0)))
    for name in ("polite", "my.py:short"):
        assert f"Reward {name}" in made
    # an offline loss stays, even if a reward is evaluated beside it
    write_lines(tmp_path / "metrics.jsonl", [*train, {"kind": "eval", "step": 2, "eval/loss": 0.7, "eval/reward": 2.0}])
    assert metric_points(read_report([tmp_path], 0.0).runs[0], "eval/loss") == ((2, 0.7),)


def test_held_out_sets_have_curves_of_their_own(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    before = str(curves(read_report([folder], 0.0)))
    assert "by held-out set" not in before
    for line in lines:
        if line.get("kind") == "eval":
            line |= {"eval/math/loss": 0.5, "eval/math/rows": 4, "eval/general/loss": 0.7, "eval/general/rows": 4}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = str(curves(read_report([folder], 0.0)))
    assert "Loss by held-out set" in found and ">math<" in found and ">general<" in found
    assert "Preference accuracy by held-out set" not in found
