"""Sources mixed by weight, and several held-out sets: rows of an epoch, exact resume, identity, metrics by set."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.config import config_from_mapping, load_config
from penchant.data.mapped import StoredRows, StoredTokens
from penchant.errors import CheckpointError, ConfigError, DataError
from penchant.runfolder.values import sample_size
from penchant.runs import Run
from penchant.runs.rows import Rows
from penchant.runs.sharing import Uncached
from penchant.training.console import console
from penchant.training.loop import Paused
from penchant.training.steps import BatchSchedule, shares_of


def _epochs(schedule: BatchSchedule) -> list[list[int]]:
    per = schedule.steps_per_epoch
    return [
        [i for step in range(start, start + per) for i in schedule.batch(step)]
        for start in range(0, schedule.total_steps, per)
    ]


def test_weights_deal_an_epoch_and_every_row_of_a_source_comes_up_equally_often() -> None:
    shares = shares_of([8, 2, 0], [1.0, 1.0, 5.0], [None] * 3)
    assert shares == ((0, 8, 5), (8, 2, 5))  # at most all rows; a source without rows is left out
    epochs = _epochs(BatchSchedule(10, 3, 8.0, shares=shares))
    assert all(sum(i >= 8 for i in e) == 5 and len(e) == 10 for e in epochs) and len(epochs) == 8
    seen = Counter(i for e in epochs for i in e)
    assert {seen[i] for i in range(8)} == {5} and {seen[i] for i in (8, 9)} == {20}
    assert epochs[0] != epochs[1] != _epochs(BatchSchedule(10, 3, 8.0, seed=1, shares=shares))[1]


def test_repeat_says_how_often_an_epoch_goes_through_a_source() -> None:
    assert shares_of([4, 4], [None] * 2, [None, None]) == () == shares_of([4, 4], [None] * 2, [1.0, None])
    shares = shares_of([4, 4], [None] * 2, [None, 0.5])
    schedule = BatchSchedule(8, 2, 2.0, shares=shares)
    one, two = _epochs(schedule)
    assert schedule.steps_per_epoch == 3 and len(one) == 6
    assert sorted(i for i in (*one, *two) if i >= 4) == [4, 5, 6, 7]  # the second epoch uses the remaining rows
    (whole,) = _epochs(BatchSchedule(8, 2, 1.0, shares=shares_of([4, 4], [None] * 2, [2.0, None])))
    assert Counter(whole) == Counter([*range(4), *range(8)])


def _base(folder: Path) -> dict[str, Any]:
    polite = polite_rows(16)
    other = [{"question": r["prompt"] + " Now?", "good": r["chosen"], "bad": r["rejected"]} for r in polite[:6]]
    return {
        "model": {"path": tiny_model_folder(folder / "model"), "dtype": "fp32"},
        "data": [
            {"path": write_jsonl(folder / "polite.jsonl", polite), "weight": 1, "limit": 12},
            {
                "path": write_jsonl(folder / "other.jsonl", other),
                "weight": 3,
                "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"},
            },
        ],
        "train": {"epochs": 1, "batch_size": 4, "tokens_per_step": 600, "lr": 3e-3},
        "checkpoint": {"every": 2},
        "evaluation": {"samples": 0, "every": None, "kl_prompts": 0},
        "output": str(folder / "run"),
    }


def _held_out(folder: Path) -> dict[str, Any]:
    rows = polite_rows(24)
    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows[20:]]
    return {
        "plain": write_jsonl(folder / "plain.jsonl", rows[16:20]),
        "swapped": write_jsonl(folder / "swapped.jsonl", swapped),
    }


def _with_data(base: dict[str, Any], **more: Any) -> dict[str, Any]:
    sources = base["data"] if isinstance(base["data"], list) else base["data"]["sources"]
    return {**base, "data": {"sources": sources, "max_length": 128, **more}}


def test_a_run_of_two_sources_and_two_held_out_sets_resumes_to_the_bit(tmp_path: Path) -> None:
    base = _with_data(_base(tmp_path), eval_path=_held_out(tmp_path))
    whole = api.train({**base, "output": str(tmp_path / "whole")}, quiet=True)
    assert whole.steps == 5  # 12 + 6 rows
    with pytest.raises(Paused):
        Run(api.as_config(base, ()), quiet=True, pause_at=2).train()
    resumed = api.train(base, quiet=True)
    for name in ("model.safetensors",):
        assert (whole.model / name).read_bytes() == (resumed.model / name).read_bytes()
    after = resumed.after
    assert after["eval/rows"] == 8 and after["eval/plain/rows"] == after["eval/swapped/rows"] == 4
    assert sample_size(after, "eval/plain/rewards/accuracies") == 4 and sample_size(after, "eval/loss") == 8
    of_sets = (after["eval/plain/loss"], after["eval/swapped/loss"])
    assert after["eval/loss"] == pytest.approx(np.mean(of_sets), rel=1e-6) and of_sets[0] < of_sets[1]
    # each set's metrics equal those of a run with that set alone
    alone = {**_with_data(base, eval_path=base["data"]["eval_path"]["swapped"]), "output": str(tmp_path / "alone")}
    assert api.train(alone, quiet=True).after["eval/loss"] == pytest.approx(of_sets[1], rel=1e-6)
    manifest = json.loads((resumed.folder / "manifest.json").read_text())["data"]
    assert [v["accepted"] for n, v in manifest.items() if n.startswith("source")] == [12, 6]
    # identity: a source's rows and its weight
    other = Path(base["data"]["sources"][1]["path"])
    text = other.read_text()
    other.write_text(text.replace("Now?", "Then?"))
    with pytest.raises(CheckpointError, match=r"other\.jsonl"):
        api.train(base, quiet=True)
    other.write_text(text)
    base["data"]["sources"][1]["weight"] = 2
    with pytest.raises(CheckpointError, match="weight"):
        api.train(base, quiet=True)


def test_a_mixture_on_disk_is_the_same_run_and_its_rows_are_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _with_data(_base(tmp_path), eval_path=_held_out(tmp_path))
    in_memory = api.train({**base, "output": str(tmp_path / "memory")}, quiet=True)
    monkeypatch.setattr("penchant.data.cached.AUTO_BYTES", 0)
    for output in ("made", "opened"):  # the second one finds the cache entry
        found = api.train({**base, "output": str(tmp_path / output)}, quiet=True)
        assert (found.model / "model.safetensors").read_bytes() == (in_memory.model / "model.safetensors").read_bytes()
        assert {k: v for k, v in found.after.items() if k.startswith("eval/") and "second" not in k} == {
            k: v for k, v in in_memory.after.items() if k.startswith("eval/") and "second" not in k
        }
    run = Run(api.as_config({**base, "output": str(tmp_path / "rows")}, ()), quiet=True)
    for trees, kind in ((run.rows.datasets[0].trees, StoredRows), (run.rows.trees[0], StoredTokens)):
        assert isinstance(trees, kind) and [t.origin for t in trees] == [0] * 12 + [1] * 6
    with pytest.raises(Paused):
        Run(api.as_config({**base, "output": str(tmp_path / "paused")}, ()), quiet=True, pause_at=2).train()
    resumed = api.train({**base, "output": str(tmp_path / "paused")}, quiet=True)
    assert (resumed.model / "model.safetensors").read_bytes() == (in_memory.model / "model.safetensors").read_bytes()


def test_the_rows_of_each_source_are_dealt_by_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_from_mapping(_with_data(_base(tmp_path)))
    rows = Rows(config, Uncached(), console(quiet=False))
    assert [t.origin for t in rows.trees[0]] == [0] * 12 + [1] * 6
    assert rows.shares == ((0, 12, 4), (12, 6, 14)) and rows.datasets[0].total == 18
    assert re.search(r"that an epoch takes: 4 of \S+ \(of 12\), 14 of \S+ \(of 6\)", "".join(capsys.readouterr()))
    held = Rows(config_from_mapping(_with_data(_base(tmp_path), validation_rows=5)), Uncached(), console(quiet=True))
    assert sum(n for _, n, _ in held.shares) == 13 and len(held.trees[1]) == 5


def test_a_list_is_the_sources_in_a_file_too_and_keys_can_be_set_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(_base(tmp_path)))
    config = load_config(path, ["data.max_length=99"])
    assert config.data.max_length == 99 and [s.weight for s in config.data.sources] == [1.0, 3.0]
    assert config.data.path == [str(tmp_path / "polite.jsonl"), str(tmp_path / "other.jsonl")]
    path.write_text(json.dumps({**_base(tmp_path), "data": [{"path": "a.jsonl", "wieght": 2}]}))
    with pytest.raises(ConfigError, match="weight"):
        load_config(path)


@pytest.mark.parametrize(
    "sources,what",
    [
        ([{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl"}], "sources.1 has no weight"),
        ([{"path": "a.jsonl", "weight": 1, "repeat": 2}], "keep one"),
        ([{"weight": 1}], "path"),
        ([{"path": "a.jsonl", "weight": 0}], "weight"),
    ],
)
def test_odd_sources_are_refused(sources: list[Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        config_from_mapping({"model": {"path": "m"}, "data": sources, "output": "o"})


def test_what_cannot_be_mixed_is_said(tmp_path: Path) -> None:
    base = _base(tmp_path)
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "A tale."}])
    base |= {"loss": "sft", "data": [{"path": base["data"][0]["path"]}, {"path": text}]}
    with pytest.raises(DataError, match=r"different kinds.*pairs.*text"):
        _ = Rows(config_from_mapping(base), Uncached(), console(quiet=True)).trees
    named = _with_data(_base(tmp_path), eval_path={"rewards": text})
    with pytest.raises(ConfigError, match="held-out set"):
        _ = Rows(config_from_mapping(named), Uncached(), console(quiet=True)).held_out_sets
