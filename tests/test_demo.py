"""The demo, small: every stage on a few openings; the whole of it in `make test-all`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penchant import demo
from penchant.errors import CheckpointError
from penchant.evaluation.lexicon import sentiment


@pytest.fixture
def few_openings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openings = json.loads(demo.asset("openings.json").read_text())
    assert not set(openings["train"]) & set(openings["eval"])
    small = tmp_path / "openings.json"
    small.write_text(json.dumps({"train": openings["train"][:24], "eval": openings["eval"][:5]}))
    real = demo.asset
    monkeypatch.setattr(demo, "asset", lambda name: small if name == "openings.json" else real(name))
    monkeypatch.setattr(demo, "NEW_TOKENS", 12)
    monkeypatch.setitem(demo.TRAINING, "data", {**demo.TRAINING["data"], "validation_rows": 4})


@pytest.mark.usefixtures("few_openings")
def test_every_stage_leaves_its_result(tmp_path: Path) -> None:
    code = demo.run_demo(tmp_path / "demo", quiet=True)
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


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no demo"):
        demo.run_demo(tmp_path, quiet=True)
    assert (tmp_path / "thesis.txt").exists()


def test_the_lexicon_knows_good_from_bad() -> None:
    good, bad, none = sentiment(["a wonderful, moving film", "a terrible, boring mess", "it is a film"])
    assert good > 0.5 > 0 > -0.5 > bad
    assert none == 0


@pytest.mark.slow
def test_the_goals_are_met(tmp_path: Path) -> None:
    assert demo.run_demo(tmp_path / "demo", quiet=True) == 0
