"""The demo on a few openings, with every stage. `make test-all` runs it in full."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penchant import demo
from penchant.errors import CheckpointError, DataError
from penchant.rewards.builtin import sentiment
from penchant.runfolder import RunLock, damaged_files


@pytest.fixture
def few_openings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openings = json.loads(demo.asset("openings.json").read_text())
    assert not set(openings["train"]) & set(openings["eval"])
    small = tmp_path / "openings.json"
    small.write_text(json.dumps({"train": openings["train"][:12], "eval": openings["eval"][:3]}))
    real = demo.asset
    monkeypatch.setattr(demo, "asset", lambda name: small if name == "openings.json" else real(name))
    monkeypatch.setattr(demo, "NEW_TOKENS", 12)
    monkeypatch.setattr(demo, "SAMPLES", 6)
    monkeypatch.setitem(demo.TRAINING, "data", {**demo.TRAINING["data"], "validation_rows": 4})


@pytest.mark.usefixtures("few_openings")
def test_every_stage_leaves_its_result(tmp_path: Path) -> None:
    code = demo.run_demo(tmp_path / "demo", quiet=True)
    assert not damaged_files(tmp_path / "demo")
    results = json.loads((tmp_path / "demo/results.json").read_text())
    assert code == (0 if all(h.get("met", True) for h in results["headline"]) else 1)
    by_name = {h["name"]: h for h in results["headline"]}
    reward = by_name["mean sentiment reward"]
    assert reward["after"] - reward["before"] == pytest.approx(reward["change"])
    for row in map(json.loads, (tmp_path / "demo/pairs.jsonl").read_text().splitlines()):
        assert row["chosen_score"] - row["rejected_score"] >= demo.MIN_GAP
        assert sentiment([row["chosen"]])[0] == pytest.approx(row["chosen_score"])
    sample = json.loads((tmp_path / "demo/samples.jsonl").read_text().splitlines()[0])
    assert sentiment([sample["after"]])[0] == pytest.approx(sample["reward_after"])
    assert (
        "Every goal" in (tmp_path / "demo/report.html").read_text()
        or "Not every goal" in (tmp_path / "demo/report.html").read_text()
    )


@pytest.mark.parametrize("name", ["thesis.txt", "pairs.jsonl"])
def test_a_folder_that_is_no_demo_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match="not made by"):
        demo.run_demo(tmp_path, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_former_demo_is_replaced_unless_it_still_trains(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    demo._fresh(folder)
    (folder / "old.txt").write_text("")
    with RunLock(folder), pytest.raises(CheckpointError, match="another run holds"):
        demo._fresh(folder)
    assert (folder / "old.txt").exists()
    demo._fresh(folder)
    assert [p.name for p in folder.iterdir()] == [demo.MARK]


def test_an_output_that_is_a_file_or_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(CheckpointError, match="file"):
            demo.run_demo(output, quiet=True)
    demo._fresh(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(CheckpointError, match="not made by"):
        demo.run_demo(tmp_path / "link", quiet=True)
    assert (tmp_path / "real" / demo.MARK).exists()


def test_bad_reviews_are_met_before_the_work(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    for reviews in (tmp_path / "missing.jsonl", empty):
        with pytest.raises(DataError):
            demo.run_demo(tmp_path / "demo", reviews=str(reviews), quiet=True)
    assert not (tmp_path / "demo").exists()


def test_the_lexicon_knows_good_from_bad() -> None:
    good, bad, none = sentiment(["a wonderful, moving film", "a terrible, boring mess", "it is a film"])
    assert good > 0.5 > 0 > -0.5 > bad
    assert none == 0


@pytest.mark.slow
def test_the_goals_are_met(tmp_path: Path) -> None:
    assert demo.run_demo(tmp_path / "demo", quiet=True) == 0
