"""`data fix`: which rows are dropped or kept, that counts add up, no secrets are written, and the input is never changed."""

from __future__ import annotations

import gzip
import json
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audit_rows import pair, planted, write
from rows import in_this_process

from penchant import api
from penchant.cli import main
from penchant.data import read
from penchant.data.audit.fix import DEFAULT, RULES, default_rules, fix
from penchant.data.layouts import LAYOUTS
from penchant.data.load import load_preferences
from penchant.errors import DataError

FOLDER = Path(__file__).parent / "layouts"
ALL = [r for r in RULES if r != "leakage"]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(touched: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row in lines(touched):
        found.setdefault(row.get("rule", "changed"), []).append(int(row["where"].rsplit(":", 1)[1]))
    return found


def test_the_safe_rules(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", planted())
    before = source.read_bytes()
    done = api.fix(source, tmp_path / "b.jsonl")
    assert numbers(done.touched) == {"duplicates": [9], "identical": [19], "empty": [20]}
    assert lines(done.output) == [r for i, r in enumerate(planted(), 1) if i not in (9, 19, 20)]
    assert (done.rows, done.written, sum(done.dropped.values()), done.changed) == (20, 17, 3, 0)
    assert source.read_bytes() == before and tuple(done.rules) == DEFAULT
    assert "dropping: unreadable, bad_rows, empty, identical, duplicates; redacting: nothing" in done.to_text()


def test_rules_may_be_one_text(tmp_path: Path) -> None:
    """A single string, as on the command line."""
    source = write(tmp_path / "a.jsonl", planted())
    done = api.fix(source, tmp_path / "b.jsonl", drop="near_duplicates, cycles", keep="empty", redact="pii")
    listed = api.fix(source, tmp_path / "c.jsonl", drop=["near_duplicates", "cycles"], keep=["empty"], redact=["pii"])
    assert numbers(done.touched) == numbers(listed.touched) and done.rules == listed.rules and done.redact == ("pii",)


def test_every_rule(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", planted())
    done = fix(str(source), tmp_path / "b.jsonl", drop=ALL)
    assert numbers(done.touched) == {
        "contradictions": [2, 11],
        "near_contradictions": [12],
        "duplicates": [9],
        "near_duplicates": [10],
        "cycles": [14, 15, 16],
        "secrets": [18],
        "identical": [19],
        "empty": [20],
    }
    (both,) = [r for r in lines(done.touched) if r["where"].endswith(":18")]
    assert both["also"] == ["pii"] and "AKIA" not in json.dumps(both) and "a@b.co" not in json.dumps(both)
    assert done.rows == done.written + sum(done.dropped.values()) == 20
    again = fix(str(done.output), tmp_path / "c.jsonl", drop=ALL)
    assert again.written == again.rows == done.written and again.touched.read_text() == ""


def test_several_processes_decide_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, other = write(tmp_path / "a.jsonl", planted()), write(tmp_path / "others.jsonl", [pair(6)])
    with source.open("a") as out:
        out.write("{broken\n")
    monkeypatch.setattr(read, "SHARD", 500)
    monkeypatch.setattr(read, "CHUNK", 100)
    monkeypatch.setattr("penchant.data.audit.fix.in_order", in_this_process)
    made = []
    for workers in (1, 3):
        done = fix(str(source), tmp_path / f"{workers}.jsonl", drop=tuple(RULES), against=[str(other)], workers=workers)
        made.append((done.touched.read_bytes(), done.output.read_bytes(), done.dropped))
    assert made[0] == made[1] and len(read.shards_of(str(source))) > 3
    assert {"leakage", "cycles", "near_duplicates", "unreadable"} <= {r for r, n in made[0][2].items() if n}


def test_masking_keeps_the_row(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "mail a@b.co"}],
        "chosen": "k AKIAABCDEFGHIJKLMNOP",
        "rejected": "no",
        "n": 7,
    }
    source = write(tmp_path / "a.jsonl", [row, pair(0)])
    done = fix(str(source), tmp_path / "b.jsonl", redact=("pii", "secrets"))
    masked, kept = lines(done.output)
    assert masked["prompt"][0]["content"] == "mail [EMAIL]" and masked["chosen"] == "k [API_KEY]" and masked["n"] == 7
    assert kept == pair(0) and done.changed == 1 and dict(done.redacted) == {"email": 1, "api_key": 1}
    assert lines(done.touched) == [
        {"where": "a.jsonl:1", "action": "changed", "masked": {"email": 1, "api_key": 1}, "line": 1}
    ]


def test_rows_that_cannot_be_read_are_listed(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(
        json.dumps(pair(0)).encode() + b"\n{broken\n\xff\xfe bad\n" + json.dumps(pair(1)).encode() + b"\n"
    )
    done = fix(str(source), tmp_path / "b.jsonl")
    assert (done.rows, done.written, done.dropped["unreadable"]) == (4, 2, 2)
    assert all(r["what"] for r in lines(done.touched))


def test_leakage_against_other_splits(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [pair(0), pair(1) | {"prompt": pair(9)["prompt"].upper()}, pair(2)])
    test = write(tmp_path / "test.jsonl", [pair(9)])
    done = api.fix(train, tmp_path / "b.jsonl", drop=["leakage"], against=[test])
    assert numbers(done.touched) == {"leakage": [2]} and done.written == 2


def test_labels_that_contradict_go_together(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completion": c, "label": label}
        for c, label in (("a", True), ("b", True), ("a", False), ("a", True))
    ]
    done = fix(str(write(tmp_path / "a.jsonl", rows)), tmp_path / "b.jsonl", drop=("contradictions",))
    assert lines(done.output) == rows[1:2]


def test_parquet_stays_parquet_with_its_schema(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["p", "p", "mail a@b.co"],
            "chosen": ["a", "a", "c"],
            "rejected": ["b", "b", "d"],
            "n": pa.array([1, 1, 2], pa.int16()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    done = fix(str(tmp_path / "a.parquet"), tmp_path / "b.parquet", redact=("pii",))
    made = pq.read_table(done.output)
    assert made.schema == table.schema and made.to_pylist()[1]["prompt"] == "mail [EMAIL]" and done.written == 2


def test_packed_lines_stay_packed_and_others_become_lines(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as out:
        out.write(json.dumps(pair(0)) + "\n")
    done = fix(str(tmp_path / "a.jsonl.gz"), tmp_path / "b.jsonl.gz")
    assert json.loads(gzip.decompress(done.output.read_bytes())) == pair(0) and not done.notes
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\np,a,b\n")
    made = fix(str(tmp_path / "a.csv"), tmp_path / "c.jsonl")
    assert lines(made.output) == [{"prompt": "p", "chosen": "a", "rejected": "b"}] and "becomes JSONL" in made.to_text()


def test_a_lone_surrogate_is_written_as_an_escape(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    good = '{"prompt": "p", "chosen": "a", "rejected": "b", "note": "\\ud800"}'
    bad = good.replace('"p"', '"\\ud800"')
    source.write_text(f"{good}\n{bad}\n")
    done = fix(str(source), tmp_path / "b.jsonl")
    assert lines(done.output) == [json.loads(good)] and done.dropped["bad_rows"] == 1
    assert "\\ud800" in done.output.read_text() and "\\ud800" in done.touched.read_text()


SEVERAL = {"oasst": "a row of the layout oasst gives several examples", "oasst_flat": "make examples together"}
SEVERAL["studio"] = SEVERAL["oasst_flat"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_mended_or_refused_with_a_command_that_works(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "some rows.jsonl"
    source.write_bytes((FOLDER / f"{layout}.jsonl").read_bytes())
    if layout not in SEVERAL:
        done = fix(str(source), tmp_path / "b.jsonl")
        assert done.rows == done.written + sum(done.dropped.values()) == len(lines(source)) and done.written
        return
    with pytest.raises(DataError, match=SEVERAL[layout]) as refused:
        fix(str(source), tmp_path / "b.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == [source.name]
    command = shlex.split(refused.value.how.partition(": penchant ")[2])
    assert command[-4:-2] == ["--layout", layout]
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--quiet"]) == 0
    examples = load_preferences(str(source), on_bad_row="skip").trees
    again = fix("data/mine/train.jsonl", tmp_path / "b.jsonl")
    assert (again.rows, again.written) == (len(examples), len(examples)) and len(examples) > 1


def test_that_command_reads_the_columns_as_fix_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = lines(FOLDER / "oasst.jsonl")
    source = write(
        tmp_path / "some rows.jsonl", [{"a tree" if k == "prompt" else k: v for k, v in r.items()} for r in rows]
    )
    with pytest.raises(DataError, match=SEVERAL["oasst"]) as refused:
        fix(str(source), tmp_path / "b.jsonl", shape="oasst", columns={"prompt": "a tree"})
    command = shlex.split(refused.value.how.partition(": penchant ")[2])
    monkeypatch.chdir(tmp_path)
    assert "prompt=a tree" in command and main([*command, "--quiet"]) == 0
    assert lines(tmp_path / "data/mine/train.jsonl")


def test_what_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [pair(0)])
    (tmp_path / "there.jsonl").write_text("x")
    (tmp_path / "link.jsonl").symlink_to(source)
    for output, said in (
        ("a.jsonl", "is an input"),
        ("link.jsonl", "is an input"),
        ("there.jsonl", "already exists"),
        ("b.parquet", "the copy is JSONL"),
        ("no/b.jsonl", "folder does not exist"),
    ):
        with pytest.raises(DataError, match=said):
            fix(str(source), tmp_path / output, overwrite=output != "there.jsonl")
    with pytest.raises(DataError, match="not the name of a file"):
        fix(str(source), "")
    for more, said in (
        ({"drop": ("nonsense",)}, "is not a rule"),
        ({"redact": ("names",)}, "cannot be redacted"),
        ({"drop": ("pii",), "redact": ("pii",)}, "dropped already"),
        ({"drop": ("leakage",)}, "needs the other splits"),
        ({"against": ("x",)}, "rule leakage"),
    ):
        with pytest.raises(DataError, match=said):
            fix(str(source), tmp_path / "b.jsonl", **more)  # type: ignore[arg-type]
    assert json.loads(source.read_text()) == pair(0) and (tmp_path / "there.jsonl").read_text() == "x"


def test_nothing_is_left_behind_when_no_row_is_left(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "mail a@b.co", "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match="no row would be left"):
        fix(str(source), tmp_path / "b.jsonl", drop=("pii",))
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_rules_are_added_and_kept() -> None:
    assert default_rules() == DEFAULT
    assert "cycles" in default_rules(["cycles"]) and "duplicates" not in default_rules(keep=["duplicates"])
    for more in ({"drop": ["x"]}, {"keep": ["unreadable"]}, {"drop": ["pii"], "keep": ["pii"]}):
        with pytest.raises(DataError):
            default_rules(**more)  # type: ignore[arg-type]


def test_a_pair_of_equal_answers_is_no_contradiction(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "b", "chosen": "x", "rejected": "x"}, pair(1)])
    assert fix(str(source), tmp_path / "b.jsonl", drop=("contradictions",)).written == 2


def test_marks_are_of_their_own_rows_behind_a_bad_one(tmp_path: Path) -> None:
    rows = [pair(1), {"prompt": "no answers"}, pair(2), pair(2), pair(3)]
    done = fix(str(write(tmp_path / "a.jsonl", rows)), tmp_path / "b.jsonl", drop=("duplicates",))
    assert numbers(done.touched) == {"duplicates": [4]} and done.written == 4
