"""Verdict sentences in reports of runs, sweeps and comparisons, and claims they must not make."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_folders import evaluation, make_comparison, make_flags, make_run, make_sweep, write_json

from penchant.metrics.names import Metric
from penchant.report.data import read_report
from penchant.report.flags import flags
from penchant.report.settings import ranking, settings_table
from penchant.report.verdict import Change, cards, changes, headline, held_out, verdict


def words(node: Any) -> str:
    return re.sub(r"<[^>]*>", "", str(node))


def _said(*paths: Path) -> str:
    return words(verdict(read_report(paths, 0.0)))


@pytest.mark.parametrize(
    "figure,before,before_ci,after,after_ci,reading",
    [
        (Metric("a", "", null=0.5, better="higher"), 0.5, None, 0.7, (0.6, 0.8), "better"),
        (Metric("a", "", null=0.5, better="higher"), 0.5, None, 0.4, (0.3, 0.45), "worse"),
        (Metric("a", "", null=0.5, better="higher"), 0.5, None, 0.6, (0.5, 0.7), "unclear"),
        (Metric("l", "", better="lower"), 0.69, (0.69, 0.69), 0.6, (0.5, 0.68), "better"),
        (Metric("l", "", better="lower"), 0.69, (0.6, 0.8), 0.6, (0.5, 0.68), "unclear"),
        (Metric("k", ""), 0.0, None, 3.0, (2.0, 4.0), "moved"),
        (Metric("k", "", better="higher"), None, None, 3.0, (2.0, 4.0), "plain"),
        (Metric("k", "", better="higher"), 1.0, None, 3.0, None, "plain"),
    ],
)
def test_an_interval_decides_what_may_be_said(
    figure: Metric, before: Any, before_ci: Any, after: float, after_ci: Any, reading: str
) -> None:
    assert Change(figure, before, before_ci, after, after_ci).reading == reading


def test_a_run_that_learned(tmp_path: Path) -> None:
    text = _said(make_run(tmp_path / "r"))
    assert (
        "The policy prefers the chosen answer in 70.0% [62.0%, 78.0%] of 100 held-out rows; the interval lies above one half."
        in text
    )
    assert "Nothing separates" not in text


def test_a_run_that_shows_nothing_says_so_first(tmp_path: Path) -> None:
    text = _said(make_run(tmp_path / "r", evals=[evaluation(0), evaluation(40, 0.53, 0.1)]))
    assert text.startswith("\u25cbnot shown: No figure differs from chance on the held-out rows.")
    assert "the interval includes one half, which chance gives" in text


def test_a_loss_alone_is_not_called_chance(tmp_path: Path) -> None:
    """Supervised training has no chance level: overlapping intervals of start and end only mean no visible change."""
    rows = [
        {"kind": "eval", "step": step, "eval/loss": loss, "eval/loss/ci": [loss - 1, loss + 1], "eval/rows": 29}
        for step, loss in ((0, 4.8), (40, 3.7))
    ]
    text = _said(make_run(tmp_path / "r", evals=rows))
    assert "chance" not in text and text.startswith("\u25cbnot shown: The intervals of start and end overlap")


def test_a_run_without_held_out_rows_or_with_the_start_only(tmp_path: Path) -> None:
    assert "Nothing was held out" in _said(make_run(tmp_path / "a", evals=[]))
    assert "Only the start was evaluated so far" in _said(make_run(tmp_path / "b", evals=[evaluation(0)]))


def test_rewards_and_kl_of_an_online_run(tmp_path: Path) -> None:
    first = {
        "kind": "eval",
        "step": 0,
        "eval/reward": 0.1,
        "eval/reward/ci": [0.05, 0.15],
        "eval/loss": -0.1,
        "eval/kl/policy_ref": 0.0,
    }
    last = {"kind": "eval", "step": 9, "eval/reward": 0.6, "eval/reward/ci": [0.5, 0.7], "eval/loss": -0.6, "eval/kl/policy_ref": 4.2,
            "eval/win_rate": 0.8, "eval/win_rate/ci": [0.7, 0.9], "eval/kl/policy_ref/ci": [4.0, 4.4]}  # fmt: skip
    text = _said(make_run(tmp_path / "r", evals=[first, last]))
    assert (
        "Its completions win 80.0% [70.0%, 90.0%] of comparisons with the start\u2019s; the interval lies above one half."
        in text
    )
    assert (
        "Reward of fresh completions went from 0.100 to 0.60 [0.50, 0.70]; better than the start by its interval."
        in text
    )
    assert "It moved 4.20 [4.00, 4.40] nats per completion away from the start (KL)." in text
    assert "Loss" not in text  # it is minus the reward, which is already there


def test_a_reward_model_has_its_own_words(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    manifest = json.loads((run / "manifest.json").read_text())
    write_json(run / "manifest.json", {**manifest, "loss": "reward_model"})
    assert "The reward model scores the chosen answer higher in 70.0%" in _said(run)


def test_a_runs_own_verdict_and_goals(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    headline = [{"name": "win rate", "before": None, "after": 0.83, "ci": [0.8, 0.86], "goal": "above 0.75", "met": True},
                {"name": "sentiment", "before": 0.1, "after": 0.6, "change": 0.5, "ci": [0.4, 0.6], "goal": "up", "met": False}]  # fmt: skip
    write_json(run / "results.json", {"verdict": "Every goal was met.", "headline": headline})
    assert _said(run).startswith("Every goal was met.")
    text = words(cards(read_report([run], 0.0).runs[0]))
    assert (
        "83.0%[80.0%, 86.0%]\u2713 met: above 0.75" in text
        and "0.100 \u2192 0.600change 0.50 [0.40, 0.60]\u2717 not met: up" in text
    )


def test_beside_a_runs_own_verdict_rows_are_counted_whole(tmp_path: Path) -> None:
    few = [{**e, "eval/rows": 40} for e in (evaluation(0), evaluation(40, 0.53, 0.1))]
    run = make_run(tmp_path / "r", evals=few)
    write_json(run / "results.json", {"verdict": "Every goal was met.", "headline": []})
    assert "On the 40 held-out rows no figure differs from chance." in _said(run)


def test_the_held_out_table(tmp_path: Path) -> None:
    run = read_report([make_run(tmp_path / "r")], 0.0).runs[0]
    text = words(held_out(run))
    assert "At step 40, over 100 held-out rows" in text and "50.0%70.0%[62.0%, 78.0%]" in text
    assert [c.figure.name for c in changes(run)] == ["rewards/accuracies", "loss"]


def test_a_sweeps_best_is_no_proof(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s")
    text = _said(sweep)
    assert (
        "Best by validation of 2 settings: B beta-0.3, preference accuracy 70.5% on 100 held-out rows (70.0% to 71.0% over seeds, sd 0.7 points)."
        in text
    )
    assert "Seeds of it and of the next, A beta-0.1, do not overlap." in text
    assert "In 4 of 4 runs the 95% interval lies above one half." in text
    assert "It was chosen by these held-out rows" in text
    table = words(settings_table(read_report([sweep], 0.0)))
    assert table.index("beta-0.3") < table.index("beta-0.1") and "best by validation" in table


def test_settings_whose_seeds_overlap_are_not_told_apart(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s", seeds=(0, 1, 12))
    assert "overlap: nothing here tells the two apart" in _said(sweep)


def test_a_direction_of_min_turns_the_order_round(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s")
    state = json.loads((sweep / "sweep.json").read_text())
    write_json(sweep / "sweep.json", {**state, "table": {"metric": "eval/rewards/accuracies", "direction": "min"}})
    ranked = ranking(read_report([sweep], 0.0))
    assert ranked is not None and [r.setting.name for r in ranked.best] == ["beta-0.1"]


def test_a_setting_of_which_a_run_stopped_is_not_called_best(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s")
    state = json.loads((sweep / "sweep.json").read_text())
    state["runs"]["beta-0.3-seed-1"] |= {"state": "stopped", "why": "the loss is NaN"}
    write_json(sweep / "sweep.json", state)
    data = read_report([sweep], 0.0)
    ranked = ranking(data)
    assert ranked is not None and [r.setting.name for r in ranked.best] == ["beta-0.1"]
    assert "1 of 2 seed 1 stopped: the loss is NaN" in words(settings_table(data))


def test_a_sweep_without_figures_says_so(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s")
    for metrics in sweep.glob("*/metrics.jsonl"):
        metrics.write_text("")
    text = _said(sweep)
    assert "none of them with a figure on held-out rows" in text


def test_a_comparison_speaks_for_itself(tmp_path: Path) -> None:
    made = str(verdict(read_report([make_comparison(tmp_path / "c")], 0.0)))
    assert "mark good" in made and "mark open" in made and "no clear winner" in made
    (tmp_path / "c/comparison.json").write_text("{}")
    assert "holds no verdict" in _said(tmp_path / "c")


def test_sentences_by_other_rewards_are_folded(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path / "c")
    figures = json.loads((folder / "comparison.json").read_text())
    figures["sentences"] = ["a is better than b: x"] * 12 + ["By words: a is better than b: y"]
    figures["verdict"] = [{"tone": "good", "by": ""}] * 12 + [{"tone": "good", "by": "words"}]
    write_json(folder / "comparison.json", figures)
    made = str(verdict(read_report([folder], 0.0)))
    assert "4 more sentences" in made and "<summary>The same by other rewards</summary>" in made


def test_the_mark_of_a_sentence_is_its_tone_and_none_of_its_words(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path / "c")
    figures = json.loads((folder / "comparison.json").read_text())
    figures["sentences"] = ["no clear winner wins", "By the way is better than b: x"]
    figures["verdict"] = [{"tone": "good", "by": ""}, {"tone": "open", "by": ""}]
    write_json(folder / "comparison.json", figures)
    made = str(verdict(read_report([folder], 0.0)))
    assert made.index("mark good") < made.index("no clear winner wins") < made.index("mark open")
    assert made.count("mark good") == made.count("mark open") == 1 and "The same by" not in made


@pytest.mark.parametrize("given", [None, [], [{"tone": "worst", "by": None}], "good", [7]])
def test_a_file_that_says_nothing_of_its_sentences_is_read(tmp_path: Path, given: Any) -> None:
    folder = make_comparison(tmp_path / "c")
    figures = json.loads((folder / "comparison.json").read_text())
    write_json(folder / "comparison.json", {**figures, "verdict": given})
    made = str(verdict(read_report([folder], 0.0)))
    assert all(s in words(made) for s in figures["sentences"])
    assert "mark plain" in made and "mark good" not in made and "mark open" not in made


def test_flags_stand_with_their_evidence_warnings_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    assert flags(read_report([run], 0.0)) is None
    write_json(run / "flags.json", [])
    assert words(flags(read_report([run], 0.0))) == "No flag was raised."
    make_flags(run)
    made = str(flags(read_report([run], 0.0)))
    assert made.index("warning: ") < made.index("note: ") and made.count('class="spark') == 1
    assert "\u221210 \u2192 \u221219" in words(made) and "steps 0 to 30" in words(made)
    write_json(run / "flags.json", {"flags": [{"title": "wrapped"}]})
    assert "wrapped" in words(flags(read_report([run], 0.0)))


def test_counts_among_the_evidence_are_whole_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    evidence = [{"label": "rows", "values": [36.0]}, {"label": "share", "values": [36.5]}]
    write_json(run / "flags.json", [{"name": "x", "title": "t", "sentence": "s", "evidence": evidence}])
    made = words(flags(read_report([run], 0.0)))
    assert "rows 36" in made and "36.0" not in made and "36.5" in made


def test_one_kind_of_flag_of_several_runs_is_one_card(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s")
    for run in sorted(sweep.glob("beta-*"))[:3]:
        flag = {
            "name": "x",
            "title": "t",
            "level": "warning",
            "sentence": f"seen in {run.name}",
            "advice": "do it",
            "evidence": [],
        }
        write_json(run / "flags.json", [flag])
    write_json(sweep / "beta-0.3-seed-1/flags.json", [])
    made = str(flags(read_report([sweep], 0.0)))
    assert made.count("<article") == 1 and "in 3 of 4 runs" in made and made.count("do it") == 1
    assert made.index("seen in beta-0.1-seed-0") < made.index("the 2 others") < made.index("seen in beta-0.1-seed-1")
    compared = make_comparison(tmp_path / "c")
    write_json(compared / "flags.json", [])
    assert "in 3 of 5 runs and comparisons" in str(flags(read_report([sweep, compared], 0.0)))


def test_runs_that_halving_left_behind_are_no_results(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s")
    state = json.loads((sweep / "sweep.json").read_text())
    for seed in (0, 1):
        state["runs"][f"beta-0.3-seed-{seed}"] |= {"state": "cut", "why": "stopped at rung 1 of 3: rank 2 of 2"}
    write_json(sweep / "sweep.json", state)
    data = read_report([sweep], 0.0)
    assert "2 runs were stopped early by successive halving: they have no result" in words(verdict(data))
    assert "seed 0 was stopped at rung 1 of 3: rank 2 of 2" in words(settings_table(data))
    ranked = ranking(data)
    assert ranked is not None and [r.setting.name for r in ranked.best] == ["beta-0.1"]


def test_unchanged_answers_are_said_and_leave_no_green_mark(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    before = str(verdict(read_report([run], 0.0)))
    rows = [{"prompt": str(i), "before": "x", "after": "x"} for i in range(4)]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    after = str(verdict(read_report([run], 0.0)))
    assert "4 of 4 sampled answers are unchanged" in after and "unchanged" not in before
    assert 'class="mark good"' in before and 'class="mark good"' not in after


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [(30, {"eval/rewards/ties": 1.0}, "tied on 30 of 30 held-out rows"), (2, {}, "1 of 2 held-out rows")],
)
def test_ties_and_a_few_rows_are_counts(tmp_path: Path, rows: int, more: dict[str, Any], said: str) -> None:
    run = make_run(tmp_path / "r")
    line = {"kind": "eval", "step": 9, "eval/rows": rows, "eval/rewards/accuracies": 0.5, **more}
    (run / "metrics.jsonl").write_text(json.dumps(line | {"eval/rewards/accuracies/ci": [0.0, 1.0]}) + "\n")
    data = read_report([run], 0.0)
    shown = words(verdict(data))
    assert said in shown and "100.0%" not in shown and headline(data)
