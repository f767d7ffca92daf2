"""A run's state as `penchant watch` reads it: progress, time left, status, and frames that fit and that no text can break."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from run_folders import eval_row, lines, make_run, perf_rows, train_rows

from penchant.base.text import clean
from penchant.runfolder import RunLock
from penchant.studio.shelf import Shelf
from penchant.watch.plot import ASCII
from penchant.watch.screens import Size, format_change, format_figure, group_frame, run_frame, with_interval
from penchant.watch.views import GroupView, RunView, number, open_view, step_count

SIZES = [(80, 24), (80, 23), (120, 40), (40, 12), (200, 70), (20, 3), (60, 1)]


def seen(folder: Path) -> RunView:
    view = RunView(folder, "run")
    view.refresh()
    return view


def text(view: RunView | GroupView, width: int = 80, height: int = 24, **kw: Any) -> str:
    draw: Callable[..., Any] = run_frame if isinstance(view, RunView) else group_frame
    return "\n".join(line.plain for line in draw(view, Size(width, height, **kw)))


# ---- progress -------------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 8)
    with RunLock(folder):
        view = seen(folder)
        assert (view.state, view.step, view.total, view.epoch) == ("running", 8, 20, (0.8, 2.0))
        assert view.speed is not None and (view.speed.seconds, view.speed.tokens, view.speed.trees) == (2.0, 50.0, 4.0)
        assert view.seconds_left == 12 * 2.0
        said = text(view)
        for part in (
            "dpo  run",
            "running, 24s left",
            "step 8/20",
            "40%",
            "epoch 0.80 of 2",
            "50 tokens/s  4.0 pairs/s",
        ):
            assert part in said
        assert "peak 1.50 GB  lr 1.0e-04" in said and "held out, 1,234 rows" in said
        assert re.search(r"accuracy +0.5000 \[0.4500, 0.6500\]  0.5800 \[0.5300, 0.6500\]  \+0.0800", said)
        # only the speed of the last steps counts, and appended lines are read
        with (folder / "perf.jsonl").open("a") as out:
            out.write(lines(perf_rows(9, 30, seconds=1.0)))
        with (folder / "metrics.jsonl").open("a") as out:
            out.write(lines(train_rows(9, 10)))
        view.refresh()
        assert view.step == 10 and view.points["eval/loss"][-1].step == 8 and len(view.line["loss"]) == 10


def test_a_change_has_the_digits_of_its_figures(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 8)
    rows = [{"kind": "eval", "step": step, "eval/kl/k3": kl} for step, kl in ((0, 1e-5), (8, 4e-5))]
    (folder / "metrics.jsonl").write_text(lines(rows))
    assert re.search(r"KL, nats +1.00e-05  4.00e-05  \+3.00e-05", text(seen(folder)))


def test_a_zero_has_no_sign() -> None:
    assert format_figure(-0.0) == format_figure(0.0) and format_change(-0.0) == format_change(0.0)


def test_a_resumed_run_goes_back_and_its_old_steps_are_gone(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 8)
    view = seen(folder)
    assert view.line["loss"][-1] == (8, pytest.approx(0.62))
    # killed after step 8, resumed from step 5: metrics.jsonl is truncated, perf.jsonl only grows
    (folder / "metrics.jsonl").write_text(lines([eval_row(0), *train_rows(1, 5)]))
    view.refresh()
    assert view.step == 5 and [s for s, _ in view.line["loss"]] == [1, 2, 3, 4, 5]
    assert [p.step for p in view.points["eval/loss"]] == [0] and view.last_eval["step"] == 0
    with (folder / "perf.jsonl").open("a") as out:
        out.write(lines(perf_rows(6, 6, seconds=9.0)))
    with (folder / "metrics.jsonl").open("a") as out:
        out.write(lines(train_rows(6, 6)))
    view.refresh()
    assert view.step == 6 and view.speed is not None and view.speed.seconds == (5 * 2.0 + 9.0) / 6


def test_only_the_last_steps_say_how_fast_it_is(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 25)
    (folder / "perf.jsonl").write_text(lines([*perf_rows(1, 5, seconds=100.0), *perf_rows(6, 25, seconds=1.0)]))
    view = seen(folder)
    assert view.speed is not None and view.speed.seconds == 1.0


@pytest.mark.parametrize("value", [True, None, "3", [3], float("nan"), float("-inf"), 10**400, 1e300, -1e300])
def test_what_is_no_number_is_none(tmp_path: Path, value: Any) -> None:
    assert number(value) is None and step_count(value) is None
    folder = make_run(tmp_path / "run", 3)
    rows = [r | {"loss": v} for r, v in zip(train_rows(1, 3), (-1e300, value, 1e300), strict=True)]
    (folder / "metrics.jsonl").write_text(lines(rows))
    assert "preference accuracy" in text(seen(folder)) and "loss" not in text(seen(folder)).split("──")[0]


def test_steps_between_two_logged_ones_count(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 4)
    (folder / "config.resolved.yaml").write_text("logging: {every: 5}\ntrain: {epochs: 2.0}\n")
    (folder / "metrics.jsonl").write_text(lines([eval_row(0), *train_rows(5, 5)]))
    (folder / "perf.jsonl").write_text(lines(perf_rows(1, 8)))
    assert seen(folder).step == 8
    (folder / "perf.jsonl").write_text(lines(perf_rows(1, 36)))  # from an earlier run in this folder
    assert seen(folder).step == 5


@pytest.mark.parametrize(
    "manifest,held,state,words",
    [
        ({}, True, "running", "24s left"),
        ({}, False, "interrupted", "its process died without a message; run the same command to resume"),
        ({"status": "interrupted"}, False, "interrupted", "the same command to resume"),
        ({"status": "interrupted"}, True, "preparing", ""),  # resumed, not yet at its first step
        ({"status": "stopped", "why": "the loss is \x1b[31mNaN"}, False, "stopped", r"the loss is \x1b[31mNaN"),
        ({"status": "stopped"}, False, "interrupted", "it ended before its last step"),
        ({"status": "paused", "why": "at step 8"}, False, "paused", "at step 8"),
        ({"status": "finished"}, False, "finished", "in 1m05s"),
        ({"status": "finished"}, True, "finished", ""),  # while it writes its report
    ],
)
def test_states(tmp_path: Path, manifest: dict[str, Any], held: bool, state: str, words: str) -> None:
    folder = make_run(tmp_path / "run", 8, **manifest)
    if held:
        with RunLock(folder):
            view = seen(folder)
    else:
        view = seen(folder)
    assert view.state == state and words in text(view) and state in text(view)


def test_a_run_without_a_manifest_that_has_steps_is_not_before_its_first(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 8)
    (folder / "manifest.json").unlink(missing_ok=True)
    view = seen(folder)
    assert (view.state, view.why) == ("interrupted", "it has no manifest.json")


def test_before_there_is_anything(tmp_path: Path) -> None:
    assert seen(tmp_path / "none").state == "waiting"
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "identity.json").write_text("{}")
    assert (seen(folder).state, seen(folder).why) == ("interrupted", "before its first step")
    with RunLock(folder):
        assert seen(folder).state == "preparing" and "the first step is still to come" in text(seen(folder))


def test_a_batch_that_stopped_an_older_run_says_why(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 8, status="stopped")
    (folder / "stopped-batch-step-8.json").write_text('{"what": "the gradient norm is nan"}')
    assert (seen(folder).state, seen(folder).why) == ("stopped", "the gradient norm is nan")


def test_totals_come_from_the_manifest_or_from_epochs(tmp_path: Path) -> None:
    assert seen(make_run(tmp_path / "a", 8, total_steps=17)).total == 17
    folder = make_run(tmp_path / "b", 8)
    assert seen(folder).total == 20
    (folder / "config.resolved.yaml").write_text("train: {epochs: 2.0, max_steps: 12}\n")
    assert seen(folder).total == 12 and seen(folder).epoch == (0.8, pytest.approx(1.2))


def test_an_online_run_shows_reward_kl_and_length_first(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 8)
    (folder / "config.resolved.yaml").write_text("algorithm: {name: rloo}\ntrain: {epochs: 2.0}\n")
    rows = [r | {"reward": 0.1 * r["step"], "kl/policy_ref": 0.2, "completions/length": 30.0} for r in train_rows(1, 8)]
    (folder / "metrics.jsonl").write_text(lines(rows))
    said = text(seen(folder), 120, 40)
    head = next(line for line in said.splitlines() if "KL to the start" in line)
    assert head.startswith("reward  0.8000") and "completion tokens  30.00" in head
    assert "4.0 prompts/s" in said and "training: mean of the first and of the last steps" in said


def test_answers_and_flags(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 8)
    (folder / "samples.before.jsonl").write_text(lines([{"prompt": "Why?", "completion": "No."}]))
    assert "answers before training" in text(seen(folder)) and "start   No." in text(seen(folder))
    (folder / "samples.jsonl").write_text(lines([{"prompt": "Why?", "before": "No.", "after": "Because " * 40}]))
    flag = {"title": "length grows", "level": "warning", "sentence": "from 30 to 90 tokens", "advice": "", "name": "x"}
    (folder / "flags.json").write_text(json.dumps([flag] * 5))
    said = text(seen(folder))
    assert "last answers" in said and "after   Because Because" in said
    assert said.count("! length grows: from 30 to 90 tokens") == 2 and "! and 3 more in flags.json" in said
    (folder / "flags.json").write_text(json.dumps({"flags": [flag]}))
    assert text(seen(folder)).count("length grows") == 1


# ---- frames ---------------------------------------------------------------------------------------------------------

EVIL = "\x1b]0;pwned\x07\x1b[2J[red]x[/red]\r\b\u202eabc\u2028\u200b\x00\x9b31m\ud800 日本語 é"


def test_nothing_from_files_reaches_the_terminal_as_it_is(tmp_path: Path) -> None:
    name = "run\x1b[31m[bold]"
    folder = make_run(tmp_path / name, 8, status="stopped", why=EVIL, loss=EVIL)
    rows = [{"prompt": EVIL, "before": EVIL, "after": EVIL + "\nnext\tline"}] * 3
    (folder / "samples.jsonl").write_text(lines(rows))
    (folder / "flags.json").write_text(json.dumps([{"title": EVIL, "sentence": EVIL, "level": "warning"}]))
    view = open_view([folder])
    view.refresh()
    assert isinstance(view, RunView)
    (tmp_path / "sweep.json").write_text(
        json.dumps({"sweep": {"runs": [name]}, "runs": {name: {"state": EVIL, "why": EVIL}}})
    )
    group = open_view([tmp_path])
    group.refresh()
    for said in (text(view, 120, 50), text(group, 120, 50)):
        assert all(c.isprintable() for line in said.split("\n") for c in line)
    assert r"run\x1b[31m[bold]" in text(group, 120, 50)
    assert r"\x1b]0;pwned\x07\x1b[2J[red]x[/red]\r\x08\u202eabc" in text(view, 120, 50)
    assert clean("a\nb\tc\xa0d") == "a↵ b c d" and clean("ü 日本") == "ü 日本"


@pytest.mark.parametrize("width,height", SIZES)
@pytest.mark.parametrize("glyphs", [None, ASCII])
def test_frames_fit(tmp_path: Path, width: int, height: int, glyphs: Any) -> None:
    folder = make_run(tmp_path / "sweep/日本語-run", 8)
    (folder / "samples.jsonl").write_text(
        lines([{"prompt": "日本語" * 60, "before": "x" * 300, "after": "y " * 200}] * 4)
    )
    make_run(tmp_path / "sweep/b", 20, status="finished")
    (tmp_path / "sweep/sweep.json").write_text(
        json.dumps({"runs": {n: {} for n in ("日本語-run", "b", *map(str, range(60)))}})
    )
    for path in (folder, tmp_path / "sweep", tmp_path / "none"):
        view = open_view([path])
        view.refresh()
        kw = {} if glyphs is None else {"glyphs": glyphs}
        found = text(view, width, height, **kw).split("\n")
        assert len(found) <= height
        assert {cell_len(line) for line in found} == {width}


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)
KEYS = ["kind", "step", "epoch", "loss", "eval/loss", "eval/loss/ci", "seconds", "status", "steps", "train", "why"]
KEYS += ["tokens_per_second", "peak_memory_gb", "prompt", "after", "runs", "sweep", "metric", "started", "lr", "reward"]
ROW = st.dictionaries(st.sampled_from(KEYS), JSON, max_size=8) | st.fixed_dictionaries(
    {"kind": st.sampled_from(["train", "eval"]), "step": st.integers(-1, 9), "loss": JSON, "eval/loss": JSON}
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(ROW, JSON), max_size=5), st.lists(ROW, max_size=3), ROW)
def test_no_file_can_bring_it_down(tmp_path: Path, rows: list[Any], perf: list[Any], manifest: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    made = {"metrics.jsonl": rows, "perf.jsonl": perf, "samples.jsonl": rows}
    for name, content in made.items():
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in content))
    for name in ("manifest.json", "config.resolved.yaml", "flags.json"):
        (folder / name).write_text(json.dumps(manifest))
    text(seen(folder))
    (folder / "sweep.json").write_text(json.dumps({"runs": manifest, "sweep": manifest, "table": manifest}))
    group = open_view([folder])
    group.refresh()
    text(group)


# ---- several runs ---------------------------------------------------------------------------------------------------


def make_sweep(folder: Path) -> Path:
    make_run(folder / "a", 20, status="finished", total_steps=20)
    make_run(folder / "b", 8, total_steps=20)
    make_run(folder / "c", 5, status="paused", why="at step 5", total_steps=20)
    rungs = {"1": {"step": 5, "metrics": {"eval/rewards/accuracies": 0.4321}}}
    cut = {"state": "cut", "why": "stopped at rung 1 of 3: rank 3 of 4", "rungs": rungs}
    records = {"a": {"state": "finished"}, "b": {"state": "running"}, "c": cut}
    about = {"metric": "eval/rewards/accuracies", "runs": ["a", "b", "c", "d"], "halving": {"rungs": 3}}
    (folder / "sweep.json").write_text(json.dumps({"sweep": about, "table": None, "runs": records}))
    return folder


def test_a_sweep_has_a_line_a_run_and_the_time_left_of_all(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "sweep")
    with RunLock(folder / "b"):
        view = open_view([folder])
        assert isinstance(view, GroupView)
        view.refresh()
        assert [m.state for m in view.members] == ["finished", "running", "cut", "to come"]
        assert view.seconds_left == (12 + 20) * 2.0  # b has 12 steps left, d all 20
        said = text(view, 110, 30)
        assert view.is_active
    view.refresh()
    assert not view.is_active and "not running" in text(view)
    with RunLock(folder):  # between two of its runs
        assert view.is_active and "running, at most" in text(view)
    assert "running, at most 1m04s left" in said and "4 runs: 1 running, 1 finished, 1 cut, 1 to come" in said
    rows = {line.split()[0]: line for line in said.splitlines()[3:7]}
    assert "20/20  0.7000 " in rows["a"] and "[" not in rows["a"] and "24s left, 50 tokens/s" in rows["b"]
    assert "5/20   0.4321 " in rows["c"] and "rung 1 of 3: rank 3 of 4" in rows["c"]
    assert rows["d"].split() == ["d", "to", "come"]
    assert "── b ─" in said  # the active run is shown below


def test_where_runs_do_not_fit_those_that_go_on_stay(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "sweep")
    state = json.loads((folder / "sweep.json").read_text())
    state["sweep"]["runs"] = [*(f"x{i}" for i in range(90)), "b"]
    (folder / "sweep.json").write_text(json.dumps(state))
    with RunLock(folder / "b"):
        view = open_view([folder])
        view.refresh()
        said = text(view, 80, 24)
    assert "b                 running" in said or "\nb " in said
    assert "more that do not fit" in said


@pytest.mark.parametrize("name", ["beta-0.3-seed-", "meta-llama-Llama-3.2-1B-dpo-beta-0.3-lr-1e-05-seed-"])
def test_runs_that_differ_by_the_seed_are_told_apart(tmp_path: Path, name: str) -> None:
    folder = make_sweep(tmp_path / "sweep")
    state = json.loads((folder / "sweep.json").read_text())
    state["sweep"]["runs"] = ["a", "b", "c", f"{name}0", f"{name}1"]
    (folder / "sweep.json").write_text(json.dumps(state))
    view = open_view([folder])
    view.refresh()
    shown = [line.split()[0] for line in text(view, 80, 24).splitlines() if "to come" in line][1:]
    assert [n[-1] for n in shown] == ["0", "1"]


def test_a_sweep_s_names_lead_nowhere_else(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "sweep")
    make_run(tmp_path / "secret", 3)
    (folder / "sweep.json").write_text(
        json.dumps({"sweep": {"runs": ["../secret", "..", "", str(tmp_path / "secret"), "a\0", 3, "a"]}})
    )
    view = open_view([folder])
    view.refresh()
    assert isinstance(view, GroupView) and [m.view.folder.name for m in view.members] == ["a"]


def test_pipelines_folders_and_several_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "pipe/sft", 20, status="finished")
    make_run(tmp_path / "pipe/sft.1", 20, status="finished")  # a folder that --redo moved aside
    (tmp_path / "pipe/pipeline.json").write_text(
        json.dumps({"stages": {"sft": {"state": "finished"}}, "comparison": {}})
    )
    pipe, folder = open_view([tmp_path / "pipe"]), open_view([tmp_path])
    both = open_view([tmp_path / "pipe/sft", tmp_path / "none"])
    for view, names in (
        (pipe, ["sft"]),
        (folder, ["pipe/sft", "pipe/sft.1"]),
        (both, [str(tmp_path / "pipe/sft"), str(tmp_path / "none")]),
    ):
        view.refresh()
        assert isinstance(view, GroupView) and [m.view.name for m in view.members] == names
        assert "finished" in text(view)


def test_a_stopped_run_among_several_is_seen_when_it_goes_on(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_run(tmp_path / name, 8, status="stopped", why="the loss is not a number", total_steps=20)
    view = open_view([tmp_path])
    view.refresh()
    assert isinstance(view, GroupView) and [m.state for m in view.members] == ["stopped", "stopped"]
    assert text(view).splitlines()[0].endswith("not running")
    make_run(tmp_path / "one", 20, status="finished", total_steps=20)  # resumed
    view.refresh()
    assert [(m.state, m.view.step) for m in view.members] == [("finished", 20), ("stopped", 8)]


def test_a_run_that_was_deleted_and_begins_anew_is_not_the_old_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 20, status="finished", total_steps=20)
    view = seen(run)
    assert view.state == "finished"
    shutil.rmtree(run)
    with RunLock(run):
        (run / "identity.json").write_text("{}")
        view.refresh()
        assert view.state == "preparing" and view.total is None


def test_a_pipeline_shows_the_stages_to_come_and_what_an_interrupted_one_is(tmp_path: Path) -> None:
    make_run(tmp_path / "sft", 20, status="finished")
    make_run(tmp_path / "dpo", 8, status="interrupted", total_steps=20)
    record: dict[str, Any] = {"pipeline": {"stages": ["sft", "dpo", "ppo"]}, "comparison": {}}
    record["stages"] = {"sft": {"state": "finished"}, "dpo": {"state": "stopped"}}
    (tmp_path / "pipeline.json").write_text(json.dumps(record))
    view = open_view([tmp_path])
    view.refresh()
    assert isinstance(view, GroupView) and "not running" in text(view)
    assert [(m.view.name, m.state) for m in view.members] == [
        ("sft", "finished"),
        ("dpo", "interrupted"),
        ("ppo", "to come"),
    ]
    (line,) = (line for line in Shelf(tmp_path).lines()[0] if line.kind == "pipeline")
    assert line.state == "interrupted" and line.inside == {"finished": 1, "interrupted": 1, "to come": 1}


@pytest.mark.parametrize(("kind", "key", "state"), [("pipeline", "stages", "stopped"), ("sweep", "runs", "finished")])
def test_a_stage_that_stopped_itself_stops_a_pipeline_and_is_a_result_of_a_sweep(
    tmp_path: Path, kind: str, key: str, state: str
) -> None:
    make_run(tmp_path / "one", 20, status="finished")
    make_run(tmp_path / "two", 8, status="stopped", why="the loss is not a number", total_steps=20)
    record = {kind: {key: ["one", "two"]}, key: {"one": {"state": "finished"}, "two": {"state": "stopped"}}}
    (tmp_path / f"{kind}.json").write_text(json.dumps(record))
    view = open_view([tmp_path])
    view.refresh()
    assert text(view).splitlines()[0].endswith(state)
    (line,) = (line for line in Shelf(tmp_path).lines()[0] if line.kind == kind)
    assert line.state == state and line.inside == {"finished": 1, "stopped": 1}


def test_an_interval_that_rounding_leaves_without_a_width_is_not_shown() -> None:
    assert with_interval(0.7, (0.6, 0.8)) == "0.7000 [0.6000, 0.8000]"
    assert with_interval(0.7, (0.69999, 0.70001)) == with_interval(0.7, None) == "0.7000"
