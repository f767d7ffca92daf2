"""Sweeps: what varies, what runs share, which runs are skipped, resumed and refused, and the table."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import ForkedPython
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.cli import main
from penchant.errors import CheckpointError, ConfigError, ModelError
from penchant.runfolder import write_summed
from penchant.runs.sharing import ObjectCache, Uncached
from penchant.sweep import Sweep, load_sweep
from penchant.sweep import workers as sweep_jobs
from penchant.sweep.conduct import SweepConductor
from penchant.sweep.search import Range, SearchConfig, draw
from penchant.sweep.table import make_table
from penchant.sweep.worker import train_order
from penchant.sweep.workers import order_json, split_cores
from penchant.training.loop import Loop

TEXT = """\
output: {output}
base:
  model: {{path: some/model, dtype: fp32}}
  data: {{path: train.jsonl, validation_fraction: 0.1}}
  loss: {{name: dpo, label_smoothing: 0.1}}
grid:
  loss.beta: [0.1, 0.5]
  seed: [0, 1]
"""


def written(tmp_path: Path, text: str = TEXT) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(text.format(output=tmp_path / "sweep"))
    return path


def names(sweep: Sweep) -> list[str]:
    return [r.name for r in sweep.runs]


# ---- the config -----------------------------------------------------------------------------------------------------


def test_a_run_that_may_be_finished_and_read_only_is_not_written_to(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path))
    folder = sweep.runs[0].folder
    folder.mkdir(parents=True)
    os.utime(folder, (1, 1))
    SweepConductor(sweep, quiet=True)
    assert folder.stat().st_mtime == 1


def test_the_runs_of_a_grid_their_names_and_order(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path), ["train.lr=1e-4", "base.train.epochs=2.0"])
    # seeds vary slowest, so that an interrupted sweep treats all settings alike
    assert names(sweep) == ["beta-0.1-seed-0", "beta-0.5-seed-0", "beta-0.1-seed-1", "beta-0.5-seed-1"]
    assert [r.setting for r in sweep.runs] == ["beta-0.1", "beta-0.5"] * 2
    last = sweep.runs[-1]
    assert last.config.loss.params.beta == 0.5 and last.config.loss.params.label_smoothing == 0.1
    assert (last.seed, last.config.train.lr, last.config.train.epochs) == (1, 1e-4, 2.0)
    assert last.config.output == str(tmp_path / "sweep/beta-0.5-seed-1")
    assert last.varied == {"loss.beta": 0.5, "train.seed": 1}
    # whatever the seed, the same rows are held out
    assert {r.config.data.split_seed for r in sweep.runs} == {0}
    assert (sweep.metric, sweep.higher) == ("eval/rewards/accuracies", True)


def test_methods_and_overlays_take_the_place_of_the_base_s(tmp_path: Path) -> None:
    text = TEXT.replace("loss.beta: [0.1, 0.5]", "loss.name: [dpo, ipo]\n  loss.beta: [0.2]").replace("[0, 1]", "[3]")
    sweep = load_sweep(written(tmp_path, text))
    assert names(sweep) == ["dpo-beta-0.2-seed-3", "ipo-beta-0.2-seed-3"]
    assert sweep.runs[1].config.loss.to_mapping()["beta"] == 0.2  # dpo's label_smoothing does not carry over to ipo
    over = "runs:\n  dpo: {{lora: {{r: 4}}}}\n  kto: {{loss: kto}}\ngrid: {{train.seed: [0, 1]}}\n"
    sweep = load_sweep(written(tmp_path, TEXT.split("grid:")[0] + over))
    assert names(sweep) == ["dpo-seed-0", "kto-seed-0", "dpo-seed-1", "kto-seed-1"]
    assert sweep.runs[0].config.lora is not None and sweep.runs[1].config.lora is None
    assert sweep.runs[1].varied == {"run": "kto", "train.seed": 0}


def test_lists_on_the_command_line(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        f"output: {tmp_path}/first\nmodel: {{path: some/model}}\ndata: {{path: train.jsonl, validation_rows: 9}}\n"
    )
    lists = ["beta=0.1,0.3", "train.seed=0,1", "train.epochs=2.0", "data.path=[a.jsonl, b.jsonl]"]
    sweep = load_sweep(run, [*lists, 'reference.path="x,y"'])
    assert names(sweep) == ["beta-0.1-seed-0", "beta-0.3-seed-0", "beta-0.1-seed-1", "beta-0.3-seed-1"]
    assert sweep.output == tmp_path / "first-sweep"  # never the run's own folder
    one = sweep.runs[0].config
    assert one.data.path == ["a.jsonl", "b.jsonl"] and one.train.epochs == 2.0 and one.reference.path == "x,y"
    made = load_sweep(run, ["loss.beta={from: 0.1, to: 0.5},0.3"])
    assert names(made) == ["beta-0.1_0.5", "beta-0.3"]
    # a grid key can be narrowed, and keeps its name
    assert names(load_sweep(written(tmp_path), ["seed=1"])) == ["beta-0.1-seed-1", "beta-0.5-seed-1"]
    assert load_sweep(written(tmp_path), [f"output={tmp_path}/o"]).output == tmp_path / "o"


def test_a_base_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("output: runs/x\nmodel: {path: m}\ndata: {path: d, validation_rows: 5}\n")
    text = "output: {output}\nbase: run.yaml\ngrid: {{batch_size: [4, 8]}}\nmetric: eval/loss\n"
    sweep = load_sweep(written(tmp_path, text))
    assert names(sweep) == ["batch_size-4", "batch_size-8"]
    assert not sweep.higher and sweep.runs[0].config.output == str(tmp_path / "sweep/batch_size-4")
    (tmp_path / "run.yaml").write_text("output: x\nmodel: {path: m}\ndata: {path: d, validation_rows: 5, pth: 1}\n")
    with pytest.raises(ConfigError, match=r'run.yaml:3: run batch_size-4: unknown key "pth" in data; did you mean'):
        load_sweep(written(tmp_path, text))


@pytest.mark.parametrize(
    "old,new,expected",
    [
        (
            "loss.beta",
            "loss.btea",
            'sweep.yaml:7: run btea-0.1-seed-0: unknown key "btea" in loss; did you mean "beta"?',
        ),
        ("[0.1, 0.5]", "[0.1, yes]", "sweep.yaml:7: run beta-yes-seed-0: loss.beta is 'yes'; give a number"),
        ("  seed:", "  seeed:", 'sweep.yaml:8: unknown key "seeed"; did you mean "seed"?'),
        ("  seed:", "  learning_rate:", 'sweep.yaml:8: unknown key "learning_rate"; did you mean "train.lr"?'),
        ("  seed:", "  every:", '"every" may be evaluation.every or checkpoint.every or logging.every; write it out'),
        ("[0, 1]", "[0, 0]", "sweep.yaml:8: train.seed: 0 is listed twice; keep one"),
        ("[0, 1]", "0", "sweep.yaml:8: grid.train.seed is 0; give a list of values"),
        ("[0, 1]", "[]", "sweep.yaml:8: grid.train.seed is []; give a list of values"),
        ("[0, 1]\n", "[0]\n  train: {{seed: [1]}}\n", "train.seed is in the grid twice"),
        (", validation_fraction: 0.1", "", "sweep.yaml:4: nothing is held out, so runs cannot be compared"),
        ("grid:", "gird:", 'sweep.yaml:6: unknown key "gird" at the top level; did you mean "grid"?'),
        (
            "grid:",
            "train: {{lr: 1e-4}}\ngrid:",
            'unknown key "train" at the top level; it goes into "base": base.train',
        ),
        ("output: {output}\n", "", "sweep.yaml: output is missing"),
        ("grid:", "runs: [{{name: dpo}}]\ngrid:", "sweep.yaml:6: runs is not a mapping; write runs: {dpo: {loss: dpo}"),
        ("grid:", "runs: {{a/b: {{loss: dpo}}}}\ngrid:", "sweep.yaml:6: runs.a/b: not a name"),
        ("grid:", "metric: accuracy\ngrid:", "sweep.yaml:6: metric is 'accuracy'; give a held-out figure"),
        ("grid:", "direction: up\ngrid:", "sweep.yaml:6: direction is 'up'; give min or max"),
        ("grid:", "runs: {{a: {{loss: sft}}, b:}}\ngrid:", "these runs have no one"),
        (
            "grid:",
            "search: {{trials: 2, space: {{seed: [0, 1]}}}}\ngrid:",
            "search is combined with a grid or runs; keep one",
        ),
    ],
)
def test_mistakes_are_met_with_their_line(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in TEXT
    text = TEXT.replace(old, new)
    path = written(tmp_path, text.replace("loss.beta", "train.lr") if "loss: sft" in new else text)
    with pytest.raises(ConfigError) as error:
        load_sweep(path)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "section,expected",
    [
        ("{{trials: 3}}", "search.space is missing"),
        ("{{trials: 3, space: {{beta: {{from: 1, to: 0.1}}}}}}", "from is 1 and to is 0.1"),
        ("{{trials: 3, space: {{beta: {{from: 0.0, to: 1.0, log: true}}}}}}", "give a number above 0"),
        ("{{trials: 3, space: {{beta: [0.1]}}}}", "space.beta has no two choices"),
        ("{{trails: 3, space: {{beta: [0.1, 1]}}}}", 'unknown key "trails" in search; did you mean "trials"?'),
        ("{{trials: 3, space: {{beta: {{from: 0.1, to: -1.0}}}}}}", "from is 0.1 and to is -1"),
        ("{{trials: 3, space: {{beta: [0.1, -3.0]}}}}", "beta"),  # the last choice is checked before anything trains
    ],
)
def test_a_mistaken_search(tmp_path: Path, section: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)) as error:
        load_sweep(written(tmp_path, TEXT.split("grid:")[0] + f"search: {section}\n"))
    assert "sweep.yaml:6" in str(error.value)


def test_nothing_to_sweep(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing varies"):
        load_sweep(written(tmp_path, TEXT.split("grid:")[0]))


# ---- what runs share ------------------------------------------------------------------------------------------------


def test_shared_things_are_made_once_and_handed_out_unshared() -> None:
    shared = ObjectCache(kept=2)
    calls: list[int] = []

    def make() -> list[int]:
        calls.append(1)
        return [0]

    one, other = shared.fresh(("model", 1), make), shared.fresh(("model", 1), make)
    one[0] = 7
    assert other == [0] and shared.fresh(("model", 1), make) == [0] and len(calls) == 1
    assert shared.once(("rows", 1), make) is shared.once(("rows", 1), make)
    for i in (2, 1, 3):  # 2 is the least recently used
        shared.once(("model", i), make)
    before = len(calls)
    shared.once(("model", 1), make)
    assert len(calls) == before
    shared.once(("model", 2), make)
    assert len(calls) == before + 1
    assert Uncached().once(("rows", 1), make) is not Uncached().once(("rows", 1), make)


def base_in(folder: Path) -> dict[str, Any]:
    return {
        "output": str(folder / "sweep"),
        "base": {
            "model": {"path": tiny_model_folder(folder / "model"), "dtype": "fp32"},
            "data": {
                "path": write_jsonl(folder / "pairs.jsonl", polite_rows(24)),
                "validation_rows": 8,
                "max_length": 96,
            },
            "train": {"batch_size": 8, "lr": 3e-3, "tokens_per_step": 900, "warmup_fraction": 0.0},
            "evaluation": {"samples": 0, "kl_prompts": 0},
            "checkpoint": {"every": 1},
        },
        "grid": {"loss.beta": [0.1, 0.5]},
    }


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    return base_in(tmp_path)


def run(base: dict[str, Any], *overrides: str, **options: Any) -> Any:
    return api.sweep(base, *overrides, quiet=True, **options)


def plan(base: dict[str, Any], *overrides: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in api.sweep_plan(base, *overrides).splitlines()[:-1]]


def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the names of the runs whose training loop is entered."""
    found: list[str] = []
    real = Loop.run
    monkeypatch.setattr(Loop, "run", lambda self: (found.append(self.folder.name), real(self))[1])
    return found


def left(folder: Path) -> tuple[bytes, bytes]:
    """A run's metrics and final weights."""
    last = max(folder.glob("checkpoints/step-*"), key=lambda p: int(p.name[5:]))
    weights = next(last.glob("model/*.safetensors"))
    return (folder / "metrics.jsonl").read_bytes(), weights.read_bytes()


def test_a_run_in_a_sweep_is_the_run_by_itself_bit_for_bit(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For methods that need different parts, with generated answers and the KL against the start."""
    base["base"]["evaluation"] = {"samples": 2, "sample_tokens": 5, "kl_prompts": 3}
    base["base"]["train"]["max_steps"] = 2
    base |= {
        "grid": {},
        "metric": "eval/logps/accuracies",
        "runs": {
            "hot": {"loss": {"name": "dpo", "beta": 2.0}, "train": {"lr": 3e-2}},
            "dpo": {},  # after a run that moved far, without any trace of it
            "kto": {"loss": "kto"},
            "simpo": {"loss": "simpo"},
            "ema": {"reference": {"ema": 0.9}},
            "lora": {"lora": {"r": 2, "dropout": 0.2}, "train": {"seed": 5}},
            "bf16": {"model": {"dtype": "bf16"}},
        },
    }
    sweep = load_sweep(base)
    looked: list[str] = []
    conductor = SweepConductor(sweep, quiet=True, check_memory=lambda run: looked.append(run.config.model.dtype))
    conductor.run()
    assert sorted(looked) == ["bf16", *["fp32"] * 5]  # once per model, adapter, method and reference
    made = conductor.shared.made
    assert (made["model"], made["rows"], made["split"], made["tokenizer"]) == (1, 1, 1, 1)
    assert made["tokens"] == 3  # all rows, train and held out
    # one start each with a reference, without one, with an adapter, and in bf16 (not shared: kto's and a moving reference's)
    assert made["start"] == 4 and made["packing"] == 4
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "cold"))
    for one in sweep.runs:
        alone = one.config.model_copy(update={"output": str(tmp_path / "alone" / one.name)})
        api.train(alone, quiet=True)
        assert left(tmp_path / "alone" / one.name) == left(one.folder), one.name
        assert (tmp_path / "alone" / one.name / "samples.jsonl").read_bytes() == (
            one.folder / "samples.jsonl"
        ).read_bytes()
        audits = [json.loads((f / "audit.json").read_text()) for f in (one.folder, tmp_path / "alone" / one.name)]
        assert audits[0] == audits[1]


def test_the_reference_is_computed_once_for_all(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import penchant.logprobs.reference as reference

    calls: list[int] = []
    real = reference.compute_logps
    monkeypatch.setattr(
        reference, "compute_logps", lambda *args, **kw: (calls.append(len(args[1])), real(*args, **kw))[1]
    )
    base["base"]["train"]["max_steps"] = 1
    run(base, "loss.beta=0.1", "loss.name=dpo,ipo", "train.seed=0,1")
    assert calls == [16, 8]  # training and held-out rows, for any loss, beta and seed


# ---- running --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("live_reports")
def test_all_of_it_then_nothing_twice(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base["base"]["train"]["max_steps"] = 1
    base["base"]["data"]["validation_rows"] = 10  # fewer rows have no interval
    base["grid"]["train.seed"] = [0, 1]
    assert plan(base) == [f"{n}  to run: not started" for n in names(load_sweep(base))]
    assert not (tmp_path / "sweep").exists()  # a plan writes nothing
    entered = trained(monkeypatch)
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps(base))
    assert main(["sweep", str(path)]) == 0
    assert entered == ["beta-0.1-seed-0", "beta-0.5-seed-0", "beta-0.1-seed-1", "beta-0.5-seed-1"]
    said = capsys.readouterr()
    progress = [line for line in said.err.splitlines() if line.startswith("[")]
    assert len(progress) == 4 and re.match(
        r"\[1/4\] beta-0.1-seed-0: eval/\S+ [\d.]+, 1 steps, \d+s; left ", progress[0]
    )
    assert "eval/rewards/accuracies (higher is better) at the end of each run, 10 held-out rows" in said.out
    assert re.search(r"best by validation: .*; 2 settings were tried", said.out)
    assert re.search(r"^beta-0.1 +\d\.\d{4}  sd \d\.\d{4} over seeds, \d\.\d+ to \d\.\d+  2$", said.out, flags=re.M)
    report = (tmp_path / "sweep/report.html").read_text()
    assert "Penchant report \u00b7 sweep" in report and '"running":false' in report
    assert "Best by validation of 2 settings" in report
    lines = [json.loads(x) for x in (tmp_path / "sweep/sweep.jsonl").read_text().splitlines()]
    assert [(x["run"], x["setting"], x["seed"], x["state"]) for x in lines] == [
        (n, n[:8], int(n[-1]), "finished") for n in entered
    ]
    state = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert state["table"]["tried"] == 2 and state["table"]["settings"][0]["sd"] is not None

    again = run(base)
    assert len(entered) == 4 and again.to_text() == said.out.rstrip("\n")
    assert plan(base)[0] == "beta-0.1-seed-0  unchanged: 1 steps"
    wider = run(base, "loss.beta=0.1,0.5,0.9", "train.seed=0")  # a longer list keeps what is done
    assert entered[4:] == ["beta-0.9-seed-0"] and len(wider.table.rows) == 3
    assert wider.table.rows[0].interval is not None and "95% by prompt [" in wider.to_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted sweep of runs of three steps, read-only."""
    base = base_in(tmp_path_factory.mktemp("whole"))
    run(base, "train.epochs=1.5")
    return Path(base["output"])


@pytest.mark.parametrize("how", ["signal", "kill"])
def test_an_interrupted_run_is_resumed_and_is_no_result(
    base: dict[str, Any], whole: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    real = Loop._after_step

    def interrupt(self: Loop, *args: Any) -> None:
        if self.folder.name == "beta-0.5" and self.state.step == 2:
            if how != "signal":
                raise MemoryError  # nothing is saved after step 1
            os.kill(os.getpid(), signal.SIGINT)
        real(self, *args)

    path = tmp_path / "sweep.json.yaml"
    base["base"]["train"]["epochs"] = 1.5
    base["output"] = str(tmp_path / "other")
    path.write_text(json.dumps(base))
    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_after_step", interrupt)
        if how == "signal":
            assert main(["sweep", str(path), "--quiet"]) == 4
        else:
            with pytest.raises(MemoryError):
                run(base)
    state = tmp_path / "other/sweep.json"
    records = json.loads(state.read_text())["runs"]
    assert [r["state"] for r in records.values()] == ["finished", "interrupted"]
    if how == "kill":  # what a kill -9 leaves
        records["beta-0.5"]["state"] = "running"
        write_summed(state, json.dumps({**json.loads(state.read_text()), "runs": records}))
    assert len((tmp_path / "other/sweep.jsonl").read_text().splitlines()) == 1
    assert plan(base) == [
        "beta-0.1  unchanged: 3 steps",
        f"beta-0.5  to continue: interrupted at step {2 if how == 'signal' else 1}",
    ]
    entered = trained(monkeypatch)
    run(base)
    assert entered == ["beta-0.5"]
    for name in ("beta-0.1", "beta-0.5"):
        assert left(tmp_path / "other" / name) == left(whole / name)


def test_a_run_that_stops_itself_is_a_result(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base["grid"] = {"train.logp_floor": [-0.01, -50.0]}
    result = run(base)
    record = result.runs["logp_floor--0.01"]
    assert record["state"] == "stopped" and "below train.logp_floor=-0.01" in record["why"]
    said = result.to_text()
    assert "stopped: step 0: the mean log-prob of its completions is" in said
    assert "best by validation: logp_floor--50 (" in said and "; 2 settings were tried" in said
    entered = trained(monkeypatch)
    assert run(base).to_text() == said and entered == []
    assert plan(base)[0].startswith("logp_floor--0.01  unchanged: stopped itself: step 0")


def test_what_has_changed_is_refused_with_its_name(base: dict[str, Any], tmp_path: Path) -> None:
    base["base"]["train"]["max_steps"] = 1
    run(base)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "sweep").glob("beta*/**/*")}
    with pytest.raises(
        CheckpointError, match=r"run beta-0.1 was already run, .* other inputs: train.lr: 0.003 -> 0.001; undo"
    ):
        run(base, "train.lr=1e-3")
    rows = polite_rows(24)
    rows[3]["chosen"] += "!"
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(CheckpointError, match=r"the (training|held-out) rows have changed"):
        run(base)
    write_jsonl(tmp_path / "pairs.jsonl", polite_rows(24))
    tiny_model_folder(tmp_path / "model", seed=1)
    with pytest.raises(CheckpointError, match=r"the model of model.path has changed"):
        run(base)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "sweep").glob("beta*/**/*")}
    (tmp_path / "sweep/sweep.json").unlink()
    with pytest.raises(CheckpointError, match="its folder holds a run that this sweep did not make"):
        run(base)


def test_what_is_met_before_anything_trains(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entered = trained(monkeypatch)
    with pytest.raises(ModelError, match=r"run beta-0.1-path-\S*none: no such folder"):
        run(base, f"model.path={tmp_path}/model,{tmp_path}/none")
    with pytest.raises(ModelError, match=r"stage:sft: run \S+: no such folder"):  # such a reference needs a pipeline
        run(base, "model.path=stage:sft")
    with pytest.raises(ConfigError, match="--jobs"):
        run(base, jobs=0)
    with pytest.raises(ConfigError, match="auto decides for each run by itself"):
        run(base, "train.gradient_checkpointing=auto")
    assert entered == []
    api.train({**base["base"], "output": str(tmp_path / "one")}, "train.max_steps=1", quiet=True)
    with pytest.raises(CheckpointError, match="is the folder of one run; choose another output"):
        run(base, f"output={tmp_path}/one")


def test_a_mistyped_metric_is_answered_and_costs_nothing(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base["base"]["train"]["max_steps"] = 1
    entered = trained(monkeypatch)
    with pytest.raises(ConfigError, match=r'eval/rewards/acuracies, .*; did you mean "eval/rewards/accuracies"'):
        run(base, "metric=eval/rewards/acuracies")
    assert entered == []
    with pytest.raises(ConfigError, match=r"eval/reward, .*set evaluation.reward"):
        run(base, "metric=eval/reward")
    assert entered == []
    with pytest.raises(ConfigError, match=r"eval/calibration/ece, which run .*; did you mean"):  # of other methods
        run(base, "metric=eval/calibration/ece")
    assert entered == ["beta-0.1"]
    run(base)
    assert entered == ["beta-0.1", "beta-0.5"]


def test_an_online_sweep_by_reward(base: dict[str, Any]) -> None:
    base["base"] |= {"algorithm": {"name": "rloo", "samples": 2, "max_new_tokens": 4}, "reward": "words"}
    base["base"]["train"]["max_steps"] = 1
    result = run(base | {"grid": {"beta": [0.0, 0.1]}})
    assert result.table.metric == "eval/reward" and [r.varied for r in result.table.rows] == [
        {"algorithm.beta": r}
        for r in (result.table.rows[0].varied["algorithm.beta"], result.table.rows[1].varied["algorithm.beta"])
    ]
    assert all(r.whole for r in result.table.rows)


# ---- several at a time ----------------------------------------------------------------------------------------------


class InProcess:
    """A worker without a process that takes and returns the same messages as a real one."""

    def __init__(self, cores: list[int], quiet: bool) -> None:
        self.shared = ObjectCache()

    def train(self, run: Any, pause_at: int | None = None) -> Any:
        return json.loads(json.dumps(train_order(order_json(run, pause_at), self.shared)))

    def interrupt(self, number: int = 0) -> None:
        pass

    def close(self) -> None:
        pass


def test_errors_come_back_from_workers_with_their_place(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_jobs, "Worker", InProcess)
    path = tmp_path / "sweep.yaml"
    base["base"]["lora"] = {"target_modules": ["nowhere"]}  # only a worker, which loads the model, can detect it
    path.write_text(json.dumps(base, indent=1))
    line = 1 + next(i for i, text in enumerate(path.read_text().splitlines()) if "target_modules" in text)
    with pytest.raises(ConfigError, match=rf"sweep.yaml:{line}: run beta-0.\d: lora.target_modules"):
        api.sweep(path, quiet=True, jobs=2)
    assert {r["state"] for r in json.loads((tmp_path / "sweep/sweep.json").read_text())["runs"].values()} == {
        "interrupted"
    }


def test_two_at_a_time_is_the_same(base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one process that trains both runs, and with two workers that take runs from the queue."""
    base["base"]["train"]["max_steps"] = 1
    said = run(base).to_text()
    monkeypatch.setattr(sweep_jobs, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": ForkedPython}))
    worker = sweep_jobs.Worker(split_cores(1)[0], quiet=True)
    for one in load_sweep(base, [f"output={tmp_path}/process"]).runs:
        made = worker.train(one)
        assert made is not None and made["state"] == "finished"
    worker.close()
    assert worker.process.returncode == 0
    monkeypatch.setattr(sweep_jobs, "Worker", InProcess)
    result = run(base, f"output={tmp_path}/jobs", jobs=2)
    assert result.to_text() == said
    for name in result.runs:
        assert left(tmp_path / "process" / name) == left(tmp_path / "sweep" / name)


@pytest.mark.slow
def test_ctrl_c_reaches_every_worker_once(base: dict[str, Any], tmp_path: Path) -> None:
    base["base"]["train"]["epochs"] = 30.0
    base["base"]["checkpoint"]["every"] = None
    run(base, f"output={tmp_path}/whole")
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps(base))
    command = [sys.executable, "-m", "penchant", "sweep", str(path), "--jobs", "2", "--quiet"]
    process = subprocess.Popen(command, start_new_session=True)
    folders = [tmp_path / "sweep" / n for n in ("beta-0.1", "beta-0.5")]
    while not all((f / "perf.jsonl").exists() and (f / "perf.jsonl").stat().st_size for f in folders):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 4
    records = json.loads((tmp_path / "sweep/sweep.json").read_text())["runs"]
    assert {r["state"] for r in records.values()} == {"interrupted"}
    assert all("interrupted at step" in line for line in plan(base))
    result = run(base, jobs=2)
    for name in result.runs:
        assert left(tmp_path / "sweep" / name) == left(tmp_path / "whole" / name)


def test_cores_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2, 5, 7}, raising=False)
    assert split_cores(2) == [[0, 2, 7], [1, 5]]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3}, raising=False)
    assert split_cores(3) == [[3], [3], [3]]


# ---- a search -------------------------------------------------------------------------------------------------------

SPACE: dict[str, Any] = {
    "loss.beta": Range(low=0.01, high=1.0, log=True),
    "batch": Range(low=2, high=9),
    "loss.name": ["dpo", "ipo", {"a": 1}],
}


def test_what_is_drawn_depends_on_seed_and_number_only() -> None:
    search = SearchConfig(trials=9, space=SPACE, sampler="random")
    many = [draw(search, i, [], True) for i in range(300)]
    assert many == [draw(search, i, [({}, 1.0)], False) for i in range(300)]
    assert many[0] != draw(search.model_copy(update={"seed": 1}), 0, [], True)
    betas = [m["loss.beta"] for m in many]
    assert min(betas) >= 0.01 and max(betas) <= 1.0 and 100 < sum(b < 0.1 for b in betas) < 200  # even in the logarithm
    assert all(float(f"{b:.4g}") == b for b in betas)
    assert {m["batch"] for m in many} == set(range(2, 10))
    assert all(any(m["loss.name"] == c for m in many) for c in SPACE["loss.name"])


def test_the_optuna_sampler_learns_and_draws_the_same_again() -> None:
    pytest.importorskip("optuna")
    search = SearchConfig(trials=40, space=SPACE)
    earlier: list[tuple[dict[str, Any], float | None]] = []
    for i in range(40):
        drawn = draw(search, i, earlier, True)
        assert drawn == draw(search, i, earlier, True)
        earlier.append((drawn, None if drawn["batch"] == 2 else -abs(drawn["loss.beta"] - 0.03)))
    early, late = ([abs(p["loss.beta"] - 0.03) for p, _ in part] for part in (earlier[:10], earlier[-10:]))
    assert sorted(late)[5] < sorted(early)[5]


def test_without_optuna_a_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(
        ConfigError, match=r"tpe needs Optuna; pip install 'penchant\[search\]', or set search.sampler=random"
    ):
        draw(SearchConfig(trials=1, space=SPACE), 0, [], True)


def test_a_search_continues_with_the_same_trials(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    del base["grid"]
    base["base"]["train"]["max_steps"] = 1
    base["search"] = {"trials": 2, "sampler": "random", "space": {"beta": {"from": 0.01, "to": 1.0, "log": True}}}
    entered = trained(monkeypatch)
    first = run(base)
    assert entered == ["trial-0", "trial-1"]
    assert re.search(r"best by validation: trial-\d.*2 settings were tried", first.to_text())
    more = run(base, "search.trials=3")
    assert entered == ["trial-0", "trial-1", "trial-2"]
    assert [r["varied"] for r in more.runs.values()][:2] == [r["varied"] for r in first.runs.values()]
    assert len({r["varied"]["loss.beta"] for r in more.runs.values()}) == 3
    with pytest.raises(CheckpointError, match=r"search has changed since 3 of its trials were drawn: .*seed: 0 -> 4"):
        run(base, "search.seed=4")


# ---- the table ------------------------------------------------------------------------------------------------------


def record(value: float | None, **more: Any) -> dict[str, Any]:
    return {"state": "finished", "steps": 1, "metrics": {"eval/loss": value, "eval/rows": 8}, **more}


def test_the_best_is_a_whole_setting_by_its_mean(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path), ["beta=0.1,0.3,0.5,0.7"])
    values = {0.1: (0.5, 0.7), 0.3: (0.1, None), 0.5: (0.4, 0.6), 0.7: (0.05, 0.05)}
    records = {f"beta-{b:g}-seed-{s}": record(v[s]) for b, v in values.items() for s in (0, 1)}
    records["beta-0.7-seed-1"] = {"state": "stopped", "why": "step 3: a floor"}
    table = make_table(sweep.runs, records, "eval/loss", False)
    assert [r.setting for r in table.rows][:2] == ["beta-0.5", "beta-0.1"]
    assert [r.setting for r in table.best] == ["beta-0.5"]  # 0.3 and 0.7 have lower means, over surviving runs
    assert table.rows[0].mean == pytest.approx(0.5) and table.to_json()["settings"][0]["sd"] == pytest.approx(0.02**0.5)
    said = table.to_text()
    assert "best by validation: beta-0.5 (0.5000); 4 settings were tried" in said
    assert "its lead proves nothing" in said and "not on one scale" in said
    assert "1 of 2, stopped: step 3: a floor" in said and "1 of 2, stopped: eval/loss is not a number" in said
    higher = make_table(sweep.runs, records, "eval/loss", True)
    assert [r.setting for r in higher.best] == ["beta-0.1"]


def test_equal_settings_are_both_best_and_none_where_none_is_done(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path))
    table = make_table(sweep.runs, {r.name: record(0.5) for r in sweep.runs}, "eval/loss", False)
    assert "best by validation: beta-0.1, beta-0.5 (0.5000)" in table.to_text()
    nothing = make_table(sweep.runs, {}, "eval/loss", False)
    assert "none is called best" in nothing.to_text() and "2 to come" in nothing.to_text()
