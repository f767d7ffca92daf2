"""The studio's list of a folder's contents and live run updates, without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import eval_row, lines, make_run, perf_rows, train_rows

from penchant.runfolder.read import Tail
from penchant.studio.shelf import MOST_POINTS, Feed, Shelf, find_folders, thin

FIXTURES = Path(__file__).parents[1] / "fixtures/v0_1"


def test_everything_of_a_folder_is_found() -> None:
    found, more = find_folders(FIXTURES)
    kinds = {(f.kind, f.path) for f in found}
    assert {("run", "finished"), ("sweep", "sweep"), ("run", "sweep/beta-0.1"), ("comparison", "pipeline")} <= kinds
    assert not more and not any("checkpoints" in f.path for f in found)


def test_groups_say_what_they_found() -> None:
    groups = {(line.kind, line.path): line for line in Shelf(FIXTURES).lines()[0] if line.kind != "run"}
    sweep, compared = groups["sweep", "sweep"], groups["comparison", "pipeline"]
    assert sweep.headline == "best by validation: beta-0.1, beta-0.5" and sweep.inside == {"finished": 2}
    assert sweep.state == "finished"
    assert compared.headline == json.loads((FIXTURES / "pipeline" / "comparison.json").read_text())["sentences"][0]


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    make_run(tmp_path / "outside" / "secret")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "outside")
    assert find_folders(tmp_path / "inside") == ([], False)


def test_a_line_says_state_step_figure_and_flags(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 8, status="finished", total_steps=20)
    (run / "flags.json").write_text(json.dumps([{"level": "warning"}, {"level": "note"}, {"level": "note"}]))
    make_run(tmp_path / "b", 3)
    by_path = {line.path: line for line in Shelf(tmp_path).lines()[0]}
    a, b = by_path["a"], by_path["b"]
    assert (a.state, a.step, a.total, a.warnings, a.notes) == ("finished", 8, 20, 1, 2)
    assert (a.label, a.headline) == ("preference accuracy", "58.0% [53.0%, 65.0%]")
    assert b.state == "interrupted"  # its status is running, but its process is gone


def test_a_long_log_is_read_at_its_end_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "a", 0)
    (run / "metrics.jsonl").write_text(lines(train_rows(1, 5000)))
    read: list[int] = []
    before = Tail._read_new_rows
    monkeypatch.setattr(Tail, "_read_new_rows", lambda self, file: [*map(read_of(read), before(self, file))])
    (line,) = Shelf(tmp_path).lines()[0]
    assert line.step == 5000
    assert 0 < len(read) < 200


def read_of(into: list[int]) -> Any:
    def take(row: dict[str, Any]) -> dict[str, Any]:
        into.append(row["step"])
        return row

    return take


def test_only_what_was_appended_is_read_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.studio.shelf.FRESH", 0.0)
    run = make_run(tmp_path / "a", 8)
    shelf = Shelf(tmp_path)
    feed, other = Feed(shelf, ["a"]), Feed(shelf, ["a"])
    first = feed.updates()["a"]
    assert first["line"]["loss"][0] == list(range(1, 9)) and first["points"]["loss"][0] == [0, 8]
    assert first["points"]["rewards/accuracies"][2] == [0.45, 0.53] and first["facts"]["step"].startswith("8")
    assert feed.updates() == {}
    read: list[int] = []
    before = Tail._read_new_rows
    monkeypatch.setattr(Tail, "_read_new_rows", lambda self, file: [*map(read_of(read), before(self, file))])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(lines(train_rows(9, 9)) + '{"kind": "train", "st')
    updates = feed.updates()["a"]
    assert read == [9] and updates["line"]["loss"] == [[9], [pytest.approx(0.61)]] and "points" not in updates
    assert other.updates()["a"]["line"]["loss"][0] == list(range(1, 10))  # a page opened later gets all of it


def test_a_log_that_is_cut_back_is_told_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.studio.shelf.FRESH", 0.0)
    run = make_run(tmp_path / "a", 8)
    feed = Feed(Shelf(tmp_path), ["a"])
    feed.updates()
    (run / "metrics.jsonl").write_text(lines([eval_row(0), *train_rows(1, 4)]))  # resumed from step 4
    updates = feed.updates()["a"]
    assert updates["anew"] is True and updates["line"]["loss"][0] == [1, 2, 3, 4]


def test_flags_appear_as_they_are_written_and_are_inert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.studio.shelf.FRESH", 0.0)
    run = make_run(tmp_path / "a", 8)
    feed = Feed(Shelf(tmp_path), ["a"])
    assert feed.updates()["a"]["facts"]["flags"] == []
    said = [{"title": "evil \u202e \x1b[31m", "level": "warning", "sentence": "s", "advice": "a"}]
    (run / "flags.json").write_text(json.dumps(said))
    (flag,) = feed.updates()["a"]["facts"]["flags"]
    assert flag["level"] == "warning" and "\u202e" not in flag["title"] and "\x1b" not in flag["title"]


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    values = list(range(10 * MOST_POINTS + 7))
    kept = thin(values)
    assert len(kept) <= MOST_POINTS + 1 and kept[0] == 0 and kept[-1] == values[-1]
    assert thin([1, 2, 3]) == [1, 2, 3]


def test_damaged_files_bring_nothing_down(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "manifest.json", "flags.json", "identity.json", "sweep.json", "comparison.json"):
        for number, text in enumerate(
            ("", "{", "[1, 2]", "\0\xff", '{"runs": 3, "table": [], "verdict": 5}', "[" * 9999)
        ):
            folder = tmp_path / f"{name}-{number}"
            make_run(folder, 2)
            (folder / name).write_text(text)
    shelf = Shelf(tmp_path)
    found, _ = shelf.lines()
    assert len([line for line in found if line.kind == "run"]) == 36
    assert Feed(shelf, [line.path for line in found if line.kind == "run"]).updates()


def test_perf_gives_speed_and_time_left(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 8)
    (run / "perf.jsonl").write_text(lines(perf_rows(1, 8)))
    assert "tokens/s" in Feed(Shelf(tmp_path), ["a"]).updates()["a"]["facts"]["speed"]
