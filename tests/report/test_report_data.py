"""Reading folders for reports: their kind, which runs belong together, and problems with them."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from report_folders import evaluation, make_comparison, make_run, make_sweep, write_json

from penchant.errors import CheckpointError
from penchant.report.data import letter, read_report, without_seed
from penchant.runfolder import RunLock
from penchant.runfolder.read import may_be_running, read_lines
from penchant.runfolder.values import ci_of, flatten, num


def test_a_wrong_path_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such run folder"):
        read_report([tmp_path / "nowhere"], 0.0)
    with pytest.raises(CheckpointError, match="holds no run"):
        read_report([tmp_path], 0.0)
    checkpoint = tmp_path / "checkpoints" / "step-1"
    for name in ("manifest.json", "state.json"):
        write_json(checkpoint / name, {})
    with pytest.raises(CheckpointError, match="holds no run"):
        read_report([checkpoint], 0.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        read_report([tmp_path / "file"], 0.0)


def test_what_a_folder_is(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "run")
    make_sweep(tmp_path / "sweep")
    make_comparison(tmp_path / "cmp")
    assert read_report([tmp_path / "a/run"], 0.0).kind == "run"
    assert read_report([tmp_path / "a"], 0.0).kind == "runs"
    assert read_report([tmp_path / "cmp"], 0.0).kind == "comparison"
    sweep = read_report([tmp_path / "sweep"], 0.0)
    assert sweep.kind == "sweep" and [r.name for r in sweep.runs] == [
        f"beta-{b}-seed-{s}" for s in (0, 1) for b in (0.1, 0.3)
    ]
    both = read_report([tmp_path / "a/run", tmp_path / "cmp"], 0.0)
    assert both.kind == "runs" and len(both.runs) == 1 and len(both.comparisons) == 1 and both.title == "run, cmp"


def test_a_comparison_brings_the_runs_that_it_compared(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    folder = make_comparison(tmp_path / "cmp")
    figures = json.loads((folder / "comparison.json").read_text())
    figures["checkpoints"] = {
        "run": str(run / "checkpoints/step-9/model"),
        "gone": "/nowhere/checkpoints/step-1/model",
        "odd": 3,
    }
    write_json(folder / "comparison.json", figures)
    assert [r.name for r in read_report([folder], 0.0).runs] == ["run"]


def test_seeds_of_one_setting_are_together_and_others_are_not(tmp_path: Path) -> None:
    for beta in (0.1, 0.3):
        for seed in (0, 1):
            make_run(tmp_path / f"beta-{beta}" / f"seed-{seed}", seed=seed, beta=beta)
    data = read_report([tmp_path], 0.0)
    assert [(s.key, s.name, len(s.runs)) for s in data.settings] == [("A", "beta-0.1", 2), ("B", "beta-0.3", 2)]
    assert data.setting_of(data.runs[3]).key == "B" and data.find_setting("beta-0.1/seed-1") is data.settings[0]
    sweep = read_report([make_sweep(tmp_path / "sweep")], 0.0)
    betas = [(s.name, [r.config["loss"]["beta"] for r in s.runs]) for s in sweep.settings]
    assert betas == [("beta-0.1", [0.1, 0.1]), ("beta-0.3", [0.3, 0.3])]


def test_a_name_that_leads_out_of_the_sweep_is_not_followed(tmp_path: Path) -> None:
    make_run(tmp_path / "outside")
    write_json(
        tmp_path / "sweep" / "sweep.json",
        {"runs": {"../outside": {"state": "finished"}, "..": {}, "": {}}, "table": None},
    )
    assert read_report([tmp_path / "sweep"], 0.0).runs == ()


def test_half_lines_are_passed_over_and_bad_ones_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    with (run / "metrics.jsonl").open("a") as out:
        out.write('nonsense\n[1]\n{"kind": "train"}\n{"kind": "train", "step": 4')
    data = read_report([run], 0.0)
    assert data.runs[0].bad_lines == 3 and len(data.runs[0].trained) == 3


def test_unicode_line_ends_inside_a_string_are_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": "one\u2028two\x85three"}\n', encoding="utf-8")
    assert read_lines(tmp_path / "x.jsonl") == ([{"a": "one\u2028two\x85three"}], 0)


def test_values_that_are_no_numbers_are_none() -> None:
    row = {"a": float("nan"), "b": True, "c": "1", "d": 10**400, "e": 2, "e/ci": [1, 3], "f/ci": [3, 1], "g/ci": "xy"}
    assert [num(row, k) for k in "abcde"] == [None, None, None, None, 2.0]
    assert ci_of(row, "e") == (1.0, 3.0) and ci_of(row, "f") is None and ci_of(row, "g") is None
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_a_running_run_whose_process_is_gone_was_killed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", status="running")
    assert may_be_running(run) and read_report([run], 0.0).is_running
    with RunLock(run):
        assert read_report([run], 0.0).is_running
    (run / ".lock").write_text(f"PID {os.getpid()} on {socket.gethostname()}\n")
    assert may_be_running(run)  # a run sees itself even if the kernel's list of locks lacks its own
    (run / ".lock").write_text(f"PID {os.getppid()} on {socket.gethostname()}\n")
    if Path("/proc/locks").exists():  # another process now has the run's PID
        assert not read_report([run], 0.0).is_running
    (run / ".lock").write_text(f"PID 999999999 on {socket.gethostname()}\n")
    data = read_report([run], 0.0)
    assert not data.is_running and data.runs[0].status == "killed"
    (run / ".lock").write_text("PID 999999999 on another-machine\n")
    assert read_report([run], 0.0).is_running


def test_letters_and_names() -> None:
    assert [letter(i) for i in (0, 25, 26, 27, 52)] == ["A", "Z", "AA", "AB", "BA"]
    assert [without_seed(n) for n in ("beta-0.1-seed-3", "x/seed-0", "seed-1", "plain")] == [
        "beta-0.1",
        "x",
        "seed-1",
        "plain",
    ]


def test_metrics_of_a_step_logged_twice_count_once(tmp_path: Path) -> None:
    from penchant.report.curves import metric_points

    run = make_run(tmp_path / "run", evals=[evaluation(0), evaluation(9, 0.6), evaluation(9, 0.8)])
    assert metric_points(read_report([run], 0.0).runs[0], "eval/rewards/accuracies") == ((0.0, 0.5), (9.0, 0.8))
