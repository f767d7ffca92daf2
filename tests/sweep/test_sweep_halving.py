"""Successive halving: the metrics at a rung decide which settings continue, and a survivor equals the run without halving."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from test_sweep import InProcess, base, left, names, plan, run, trained, written

from penchant.errors import CheckpointError, ConfigError
from penchant.runs import Run
from penchant.sweep import conduct as sweep_run
from penchant.sweep import load_sweep
from penchant.sweep import workers as sweep_jobs
from penchant.sweep.conduct import mark_cut_runs, standings_at
from penchant.sweep.halving import Halving, standings
from penchant.sweep.table import make_table
from penchant.training.loop import Interrupted, Loop, Paused

__all__ = ["base"]  # the fixture

RULE = Halving(3, 3, "eval/loss", False, "")
BETAS = "loss.beta=0.05,0.1,0.3,2.0"


# ---- the rule -------------------------------------------------------------------------------------------------------


def test_rungs_lie_a_factor_apart_and_end_with_the_run() -> None:
    assert RULE.steps(36) == [4, 12, 36] and RULE.steps(100) == [11, 33, 100]
    assert Halving(2, 2, "m", True, "").steps(7) == [4, 7]  # 3.5 rounds to even
    assert [RULE.survivors(n) for n in (1, 2, 3, 4, 9, 10)] == [1, 1, 1, 2, 3, 4]
    # the work of 9 settings with factor 3 and 3 rungs: 9/9 + 3 * (1/3 - 1/9) + 1 * (1 - 1/3) of a full run
    assert 9 * 4 + 3 * (12 - 4) + 1 * (36 - 12) == 84


@pytest.mark.parametrize("higher", [False, True])
def test_the_best_by_their_mean_go_on_and_ties_are_not_broken(higher: bool) -> None:
    sign = -1.0 if higher else 1.0
    rule = Halving(3, 3, "m", higher, "")
    values = {"a": (0.5, 0.7), "b": (0.1, 0.9), "c": (0.6, 0.6), "d": (0.9, 0.9), "e": (0.4, None), "f": (0.8, 0.8)}
    found = standings({k: [None if x is None else sign * x for x in v] for k, v in values.items()}, rule)
    kept = {s.setting: (s.rank, s.kept) for s in found}
    # two of six continue: b (0.5), and the tied a and c (0.6); e has 0.4, but one of its seeds stopped itself
    assert kept == {"b": (1, True), "a": (2, True), "c": (2, True), "f": (4, False), "d": (5, False), "e": (6, False)}
    assert [s.rank for s in found] == sorted(s.rank for s in found)
    assert next(s for s in found if s.setting == "e").mean is None
    assert not any(s.kept for s in standings({"a": [None], "b": [None]}, rule))


def reached(**rungs: float | None) -> dict[str, Any]:
    found = {k[1:]: {"step": 1, "metrics": {"eval/loss": v, "eval/rows": 8}} for k, v in rungs.items()}
    return {"state": "paused", "rungs": found}


def test_seeds_stay_or_go_together_and_ranks_stand_in_the_table(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path), ["beta=0.1,0.3,0.5,0.7", "halving={rungs: 3, factor: 2}", "metric=eval/nll"])
    assert sweep.halving is not None and (sweep.halving.metric, sweep.halving.higher) == ("eval/nll", False)
    rule = Halving(3, 2, "eval/loss", False, "")
    first = {"0.1": (0.5, 0.5), "0.3": (0.1, 0.3), "0.5": (0.3, 0.3), "0.7": (0.9, None)}
    records = {f"beta-{b}-seed-{s}": reached(r1=v[s]) for b, v in first.items() for s in (0, 1)}
    records["beta-0.7-seed-1"] = {"state": "stopped", "why": "step 3: a floor", "rungs": {}}
    for one in ("beta-0.3-seed-0", "beta-0.3-seed-1", "beta-0.5-seed-0", "beta-0.5-seed-1"):
        records[one]["rungs"] |= reached(r2=0.2 if "0.3" in one else 0.1)["rungs"]
    mark_cut_runs(sweep.runs, records, rule, 1, standings_at(sweep.runs, records, rule, 1))
    second = standings_at(sweep.runs, records, rule, 2)
    assert [(s.setting, s.kept) for s in second] == [("beta-0.5", True), ("beta-0.3", False)]
    mark_cut_runs(sweep.runs, records, rule, 2, second)
    states = {n: r["state"] for n, r in records.items()}
    assert [n for n, s in states.items() if s == "paused"] == ["beta-0.5-seed-0", "beta-0.5-seed-1"]
    assert states["beta-0.7-seed-1"] == "stopped" and states["beta-0.7-seed-0"] == "cut"
    assert records["beta-0.7-seed-0"]["why"] == "stopped at rung 1 of 3: another seed of it stopped itself"
    for s in (0, 1):
        records[f"beta-0.5-seed-{s}"] |= {"state": "finished", "metrics": {"eval/loss": 0.05, "eval/rows": 8}}
    table = make_table(sweep.runs, records, "eval/loss", False)
    # cut settings have no value, however good their metric was at the rung
    assert [(r.setting, r.values) for r in table.rows] == [
        ("beta-0.5", (0.05, 0.05)),
        ("beta-0.3", ()),
        ("beta-0.1", ()),
        ("beta-0.7", ()),
    ]
    said = table.to_text()
    assert "best by validation: beta-0.5 (0.0500); 4 settings were tried, 3 of them only in part" in said
    assert re.search(r"^beta-0.3 +-  +-  +0 of 2, stopped at rung 2 of 3: rank 2 of 2 \(0.2000 there\)$", said, re.M)
    assert re.search(r"^beta-0.1 .*stopped at rung 1 of 3: rank 3 of 4 \(0.5000 there\)$", said, re.M)
    assert "3 settings were stopped early by successive halving: they have no result" in said
    assert "what is cut early might have won later" in said
    assert table.to_json()["settings"][1]["cut"]["rank"] == 2 and table.to_json()["settings"][0]["cut"] is None


# ---- user errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section,expected",
    [
        ("{{rungs: 1}}", "sweep.yaml:6: halving.rungs is 1"),
        ("{{rugs: 3}}", 'sweep.yaml:6: unknown key "rugs" in halving; did you mean "rungs"?'),
        ("3", "sweep.yaml:6: halving is 3; write halving: {rungs: 3, factor: 3}"),
        ("{{metric: loss}}", "sweep.yaml:6: halving.metric is 'loss'; give a held-out figure"),
        ("{{metric: eval/loss}}", "halved by eval/loss, but the loss varies, so it is not on one scale"),
    ],
)
def test_mistakes_are_met_with_their_line(tmp_path: Path, section: str, expected: str) -> None:
    text = Path(written(tmp_path)).read_text().replace("grid:", f"halving: {section}\ngrid:".replace("{{", "{"))
    path = tmp_path / "sweep.yaml"
    path.write_text(text.replace("}}", "}"))
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_sweep(path)


def test_what_cannot_be_halved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one setting only, so nothing can be halved"):
        load_sweep(written(tmp_path), ["beta=0.1", "halving={factor: 2}"])
    search = "search: {{trials: 2, space: {{beta: [0.1, 0.2]}}}}\nhalving: {{}}\n"
    path = written(
        tmp_path, written(tmp_path).read_text().split("grid:")[0].replace("{", "{{").replace("}", "}}") + search
    )
    with pytest.raises(ConfigError, match=r"sweep.yaml:7: halving is combined with a search, .*; keep one"):
        load_sweep(path)


def test_a_run_too_short_is_refused_before_anything_trains(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = trained(monkeypatch)
    with pytest.raises(ConfigError, match="has 2 optimizer steps, too few for 3 rungs with a factor of 3; lower"):
        run(base, "halving={rungs: 3}")
    assert entered == []


# ---- running --------------------------------------------------------------------------------------------------------


@pytest.fixture
def halved(base: dict[str, Any]) -> dict[str, Any]:
    """Four settings of 8 steps with warm-up and cosine. Rungs at 2, 4 and 8, where only the second coincides with an evaluation."""
    base["base"]["train"] |= {"epochs": 4.0, "warmup_fraction": 0.2}
    base["base"]["checkpoint"] = {"every": None, "keep_last": 1}
    base["base"]["evaluation"] = {"samples": 0, "kl_prompts": 0, "every": 4}
    base["grid"] = {"train.lr": [1e-4, 3e-2, 1e-3, 3e-3]}
    return base | {"halving": {"rungs": 3, "factor": 2}, "metric": "eval/rewards/margins"}


def test_a_survivor_is_the_run_that_was_never_halved_bit_for_bit(
    halved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halved["base"]["evaluation"] |= {"samples": 1, "sample_tokens": 3, "kl_prompts": 2}
    full = {k: v for k, v in halved.items() if k != "halving"}
    whole = run(full, f"output={tmp_path}/whole")
    steps: list[tuple[str, int]] = []
    real = Loop.take_step
    monkeypatch.setattr(
        Loop, "take_step", lambda self, step, *a: (steps.append((self.folder.name, step)), real(self, step, *a))[1]
    )
    result = run(halved)
    states = {n: r["state"] for n, r in result.runs.items()}
    assert sorted(states.values()) == ["cut", "cut", "cut", "finished"]
    survivor = next(n for n, s in states.items() if s == "finished")
    assert left(tmp_path / "sweep" / survivor) == left(tmp_path / "whole" / survivor)
    for file in ("samples.jsonl", "samples.before.jsonl"):
        assert (tmp_path / "sweep" / survivor / file).read_bytes() == (
            tmp_path / "whole" / survivor / file
        ).read_bytes()
    assert result.runs[survivor]["metrics"] == whole.runs[survivor]["metrics"]
    # no step is repeated, and cut runs take none beyond their rung
    assert len(steps) == len(set(steps)) == 2 * 4 + 2 * 2 + 1 * 4
    cut = [r["cut"] for r in result.runs.values() if r["state"] == "cut"]
    assert sorted((c["rung"], c["rank"], c["among"]) for c in cut) == [(1, 3, 4), (1, 4, 4), (2, 2, 2)]
    # a cut run's log is the beginning of the complete run's
    for name in states:
        short, long = ((tmp_path / d / name / "metrics.jsonl").read_bytes() for d in ("sweep", "whole"))
        assert long.startswith(short) and (name == survivor) == (len(short) == len(long))
    lines = [json.loads(x) for x in (tmp_path / "sweep/sweep.jsonl").read_text().splitlines()]
    assert [(x["state"], "metrics" in x) for x in lines if x["run"] != survivor] == [("cut", False)] * 3
    about = json.loads((tmp_path / "sweep/sweep.json").read_text())["sweep"]
    assert len(about["halving"]["judged"]) == 2 and about["runs"] == names(load_sweep(halved))

    before = len(steps)
    assert run(halved).to_text() == result.to_text() and len(steps) == before
    assert sum("stopped at rung" in line for line in plan(halved)) >= 3
    # without halving, every run continues to its end, and is then the same too
    on = run(full)
    assert on.to_text() == whole.to_text() and len(steps) == 4 * 8
    assert all(left(tmp_path / "sweep" / n) == left(tmp_path / "whole" / n) for n in states)


class Killed(BaseException):
    """Simulates a kill: an exception that nothing catches."""


def kill(*_: Any, **__: Any) -> Any:
    raise Killed


def test_killed_again_and_again_it_ends_with_the_same_ranks_also_two_at_a_time(
    halved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills between a rung's checkpoint and its record, between a rung's end and its ranking, and by Ctrl-C in the second rung."""
    whole = run(halved, f"output={tmp_path}/whole")
    real = Loop.take_step

    def interrupted(self: Loop, step: int, *rest: Any) -> Any:
        if step == 2:  # the first step after the first rung, with a checkpoint between two rungs
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, step, *rest)

    kills: list[tuple[Any, str, Any, type[BaseException]]] = [
        (Loop, "_pause", kill, Killed),
        (sweep_run, "standings_at", kill, Killed),
        (Loop, "take_step", interrupted, Interrupted),
    ]
    for where, name, by, error in kills:
        with monkeypatch.context() as patched:
            patched.setattr(where, name, by)
            with pytest.raises(error):
                run(halved)
    monkeypatch.setattr(sweep_jobs, "Worker", InProcess)
    again = run(halved, jobs=2)
    assert again.to_text() == whole.to_text()
    for name, record in again.runs.items():
        other = whole.runs[name]
        assert (record["state"], record.get("cut")) == (other["state"], other.get("cut"))
        assert record["rungs"] == other["rungs"]
        assert left(tmp_path / "sweep" / name) == left(tmp_path / "whole" / name)


def test_changes_are_refused_and_deleted_folders_of_what_was_cut_are_not_missed(
    halved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    halved["grid"] = {"train.lr": [1e-4, 3e-3]}
    halved["halving"]["rungs"] = 2
    result = run(halved)
    cut = next(n for n, r in result.runs.items() if r["state"] == "cut")
    shutil.rmtree(tmp_path / "sweep" / cut)
    entered = trained(monkeypatch)
    assert run(halved).to_text() == result.to_text() and entered == []
    with pytest.raises(
        CheckpointError, match="halving has changed since 2 of the runs were begun: factor: 2 -> 3; undo"
    ):
        run(halved, "halving.factor=3")
    with pytest.raises(CheckpointError, match="runs were added or left out after a rung was judged"):
        run(halved, "train.lr=0.0001,0.003,0.01")
    assert entered == []
    other = {k: v for k, v in halved.items() if k != "halving"} | {"output": str(tmp_path / "other")}
    run(other, "train.max_steps=2")
    with pytest.raises(CheckpointError, match="there was no halving"):
        run({**other, "halving": halved["halving"]}, "train.max_steps=2")


def test_a_setting_that_stops_itself_goes_with_all_its_seeds(halved: dict[str, Any]) -> None:
    halved["grid"] = {"train.logp_floor": [-0.01, -50.0]}
    halved["halving"]["rungs"] = 2
    result = run(halved)
    assert {n: r["state"] for n, r in result.runs.items()} == {
        "logp_floor--0.01": "stopped",
        "logp_floor--50": "finished",
    }
    assert "best by validation: logp_floor--50" in result.to_text()


def test_a_metric_of_other_methods_costs_one_rung_of_one_run(
    halved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = trained(monkeypatch)
    with pytest.raises(ConfigError, match=r"eval/calibration/ece, which run .*; did you mean"):
        run(halved, "metric=eval/calibration/ece")
    assert len(entered) == 1


# ---- the pause ------------------------------------------------------------------------------------------------------


def test_a_pause_says_its_figures_and_refuses_to_go_back(halved: dict[str, Any], tmp_path: Path) -> None:
    config = load_sweep(halved).runs[0].config
    with pytest.raises(Paused) as first:
        Run(config, quiet=True, pause_at=3).train()
    assert first.value.step == 3 and "eval/rewards/margins" in first.value.metrics
    manifest = json.loads((Path(config.output) / "manifest.json").read_text())
    assert (manifest["status"], manifest["steps"], manifest["total_steps"]) == ("paused", 3, 8)
    with pytest.raises(Paused) as again:  # the state after a kill between the checkpoint and the sweep's record
        Run(config, quiet=True, pause_at=3).train()
    assert again.value.metrics == first.value.metrics
    with pytest.raises(CheckpointError, match="is at step 3 already, beyond step 2"):
        Run(config, quiet=True, pause_at=2).train()
    assert Run(config, quiet=True, pause_at=8).train().steps == 8  # the end is not a pause


def test_the_documented_sweep_is_one(tmp_path: Path) -> None:
    docs = (Path(__file__).parents[2] / "docs/sweep.md").read_text()
    (block,) = re.findall(r"```yaml\n# halved.yaml\n(.*?)```", docs, flags=re.S)
    (tmp_path / "run.yaml").write_text("model: {path: m}\ndata: {path: d.jsonl, validation_fraction: 0.1}\n")
    (tmp_path / "halved.yaml").write_text(block)
    sweep = load_sweep(tmp_path / "halved.yaml")
    assert sweep.halving is not None and len({r.setting for r in sweep.runs}) == 10
    assert (sweep.halving.survivors(10), sweep.halving.survivors(4)) == (4, 2)  # as computed in the docs
