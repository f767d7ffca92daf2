"""`penchant data get` on local copies: every published layout, filters, labels, splits, and resuming after a kill."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import in_this_process

from penchant import api
from penchant.cli import main
from penchant.data.layouts import LAYOUTS
from penchant.data.load import load_preferences
from penchant.download import Converter, GetResult, Pace, _Job
from penchant.download import convert as part
from penchant.download.catalogue import CATALOGUE, HUB, SPECS, Spec
from penchant.errors import CheckpointError, ConfigError, DataError, PenchantError, RewardError
from penchant.runfolder import RunLock

SPLITS = ("train", "validation", "test")
WORDS = [
    "river",
    "stone",
    "cloud",
    "lamp",
    "forest",
    "window",
    "paper",
    "engine",
    "garden",
    "mirror",
    "candle",
    "bridge",
    "winter",
    "apple",
    "harbour",
]
Row = dict[str, Any]


def say(text: str, count: int = 14) -> str:
    return " ".join(random.Random(text).choices(WORDS, k=count))


def lmsys_row(i: int, **changes: Any) -> Row:
    """A row in the layout of lmsys-chat-1m: two turns, and a moderation result for each of the four messages."""
    talk = [
        {"role": "user", "content": f"Question {i}: {say(f'q{i}')}?"},
        {
            "role": "assistant",
            "content": ("Wonderful, great, I love it. " if i % 2 else "Terrible, awful, I hate it. ") + say(f"a{i}"),
        },
        {"role": "user", "content": f"And then {say(f'r{i}', 5)}?"},
        {"role": "assistant", "content": say(f"b{i}")},
    ]
    scores = {"hate": 0.01, "violence": 0.02}
    clean = {"categories": dict.fromkeys(scores, False), "category_scores": scores, "flagged": False}
    row = {
        "conversation_id": f"id{i}",
        "model": "vicuna-13b",
        "conversation": talk,
        "turn": 2,
        "language": "English",
        "openai_moderation": [clean] * 4,
        "redacted": False,
    }
    return row | changes


def moderated(flagged: bool, score: float) -> list[Row]:
    bad = {"categories": {"hate": flagged}, "category_scores": {"hate": score}, "flagged": flagged}
    return [*lmsys_row(0)["openai_moderation"][:3], bad]


def write(path: Path, rows: list[Row]) -> None:
    """Write rows in the format of the file's extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(r) + "\n" for r in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        import csv

        with path.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        forms = {".gz": lambda: gzip.compress(lines, mtime=0), ".json": lambda: json.dumps(rows, indent=1).encode()}
        path.write_bytes(forms.get(path.suffix, lambda: lines)())


def get(name: str, source: Path, output: Path, **asked: Any) -> GetResult:
    return api.get_data(name, source=str(source), output=output, quiet=True, **asked)


def rows_in(folder: Path) -> dict[str, list[Row]]:
    return {s: [json.loads(line) for line in (folder / f"{s}.jsonl").read_text().splitlines()] for s in SPLITS}


def all_rows(folder: Path) -> list[Row]:
    return [row for rows in rows_in(folder).values() for row in rows]


def first_turn(row: Row) -> str:
    return row["prompt"][0]["content"]


@pytest.fixture
def lmsys(tmp_path: Path) -> Path:
    """Three Parquet shards: 60 rows, of which 10 are German, 7 redacted, 5 flagged, 4 with a high score."""
    rows = [lmsys_row(i) for i in range(60)]
    for i in range(10):
        rows[i]["language"] = "German"
    for i in range(8, 15):
        rows[i]["redacted"] = True
    for i in range(20, 25):
        rows[i]["openai_moderation"] = moderated(True, 0.9)
    for i in range(30, 34):
        rows[i]["openai_moderation"] = moderated(False, 0.6)
    for shard in range(3):
        write(tmp_path / f"copy/data/train-{shard:05d}-of-00003.parquet", rows[20 * shard : 20 * shard + 20])
    return tmp_path / "copy"


# ---------------------------------------------------------------------------------------------------------------------
# every data set of the catalog, in every form


def published(spec: Spec, ending: str) -> Iterable[tuple[str, str]]:
    """(path, layout) of a copy in the published folder structure, with the files in the format `ending` if given."""
    for subset in spec.default[:2]:
        held = spec.subsets[subset]
        for split, pattern in held.splits.items():
            path = pattern.replace("*_", "2023_").replace("-*", "-00000-of-00001").replace("/*.", "/0000.").rstrip("*")
            stem = path.removesuffix(".gz").rpartition(".")[0]
            yield (f"{stem}{ending}" if ending else path) + "", held.layout or spec.layout
            del split


@pytest.mark.parametrize("ending", ["", ".jsonl", ".json", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("name", CATALOGUE)
def test_a_copy_of_each_data_set_becomes_rows_that_training_reads(tmp_path: Path, name: str, ending: str) -> None:
    count = 0
    for path, layout in published(CATALOGUE[name], ending):
        rows = [dict(LAYOUTS[layout].example)] * 2
        if LAYOUTS[layout].group is not None:
            rows = example_tree()
        if path.endswith(".csv"):
            rows = [{k: v if isinstance(v, (str, int, float)) else json.dumps(v) for k, v in r.items()} for r in rows]
        write(tmp_path / "copy" / path, rows)
        count += len(rows)
    result = get(name, tmp_path / "copy", tmp_path / "out", split=(1, 0, 0))
    assert result.counts.rows == result.counts.accepted == count
    loaded = load_preferences(str(tmp_path / "out/train.jsonl"))
    assert loaded.kind == result.data["kind"] == LAYOUTS[CATALOGUE[name].layout].kind
    assert loaded.accepted == result.counts.examples >= 1 and not loaded.quarantined


def example_tree() -> list[Row]:
    """The flat messages of one tree, as oasst publishes them."""
    common = {"message_tree_id": "t", "lang": "en", "deleted": False, "synthetic": False, "review_result": True}
    ask = {"message_id": "t", "parent_id": None, "role": "prompter", "text": "Name a prime number.", "rank": None}
    answers = [("a", "Seven.", 0), ("b", "Eight.", 1)]
    replies = [{"message_id": m, "parent_id": "t", "role": "assistant", "text": t, "rank": r} for m, t, r in answers]
    return [common | row for row in (ask, *replies)]


def test_the_catalogue_is_sound() -> None:
    names = [n.lower() for s in SPECS for n in (s.name, *s.aliases)]
    assert len(names) == len(set(names))
    for spec in SPECS:
        assert set(spec.default) <= set(spec.subsets)
        for held in spec.subsets.values():
            assert (held.layout or spec.layout) in LAYOUTS
            assert set(held.splits) <= set(SPLITS)


def catalogue_table() -> str:
    """The catalog as the table of docs/data_get.md."""
    lines = [
        "| name | published as | subsets (read by default in bold) | splits | layout | terms |",
        "|---|---|---|---|---|---|",
    ]
    for s in SPECS:
        names = list(s.subsets)
        subsets = ", ".join(f"**{n}**" if n in s.default else n for n in names)
        subsets = "" if names == ["default"] else subsets if len(names) <= 8 else f"**{len(names)} domains**"
        splits = ", ".join(dict.fromkeys(x for n in s.default for x in s.subsets[n].splits))
        terms = s.terms + (", gated" if s.gated else "")
        lines.append(f"| {' | '.join([s.name, f'[{s.hub}]({HUB}{s.hub})', subsets, splits, s.layout, terms])} |")
    return "\n".join(lines) + "\n"


def test_the_page_has_the_catalogue() -> None:
    page = Path(__file__).parents[2] / "docs/data_get.md"
    assert catalogue_table() in page.read_text()


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "get"]) == 0
    said = capsys.readouterr().out
    assert all(spec.name in said for spec in SPECS)
    for option in (["--from", "pairs.jsonl"], ["--first", "9"], ["--quiet"], ["--column", "prompt=q"]):
        assert main(["data", "get", *option]) == 2
        assert f"{option[0]}: goes with a NAME" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# filters


@pytest.mark.parametrize(
    ("asked", "filtered"),
    [
        ({}, {}),
        ({"language": ["English"]}, {"language": 10}),
        ({"language": ["german"]}, {"language": 50}),
        ({"language": ["German", "English"]}, {}),
        ({"redacted": "drop"}, {"redacted": 7}),
        ({"redacted": "only"}, {"not redacted": 53}),
        ({"moderation": "drop-flagged"}, {"moderation": 5}),
        ({"moderation": 0.5}, {"moderation": 9}),
        (
            {"language": ["English"], "redacted": "drop", "moderation": 0.5},
            {"language": 10, "redacted": 5, "moderation": 9},
        ),
    ],
)
def test_filters_count_what_they_leave_out(lmsys: Path, tmp_path: Path, asked: Row, filtered: Row) -> None:
    result = get("lmsys", lmsys, tmp_path / "out", **asked)
    counts = result.counts
    assert dict(counts.filtered) == filtered
    assert counts.rows == 60 == counts.accepted + sum(filtered.values()) and counts.quarantined == 0
    assert len(all_rows(tmp_path / "out")) == counts.examples == counts.accepted


@pytest.mark.parametrize("form", ["flat", "tree"])
def test_the_language_of_a_tree_of_messages_is_its_roots(tmp_path: Path, form: str) -> None:
    trees = []
    for number, language in enumerate(("en", "en", "de")):
        rows = [row | {"message_tree_id": f"t{number}", "lang": language} for row in example_tree()]
        ids = {row["message_id"]: f"{row['message_id']}{number}" for row in rows}
        trees.append(
            [row | {"message_id": ids[row["message_id"]], "parent_id": ids.get(row["parent_id"])} for row in rows]
        )
    flat = [row for rows in zip(*trees, strict=True) for row in rows]  # messages of a tree need not be adjacent
    nested = [{"message_tree_id": t[0]["message_tree_id"], "prompt": t[0] | {"replies": t[1:]}} for t in trees]
    write(tmp_path / "copy.jsonl", flat if form == "flat" else nested)
    asked = {} if form == "flat" else {"subsets": ["ready-trees"]}
    counts = get("oasst", tmp_path / "copy.jsonl", tmp_path / "out", language=["en"], **asked).counts
    each = 3 if form == "flat" else 1
    assert (counts.rows, counts.accepted, counts.examples) == (3 * each, 2 * each, 2)
    assert counts.filtered == {"language": each}


def test_a_row_without_a_moderation_result_is_dropped_when_flagged_ones_are(tmp_path: Path) -> None:
    rows = [lmsys_row(0), lmsys_row(1, openai_moderation=[]), lmsys_row(2, openai_moderation=None)]
    write(tmp_path / "copy.jsonl", rows)
    result = get("lmsys", tmp_path / "copy.jsonl", tmp_path / "out", moderation="drop-flagged")
    assert result.counts.filtered == {"moderation": 2}


def test_a_filter_without_its_column(tmp_path: Path) -> None:
    write(tmp_path / "copy.jsonl", [dict(LAYOUTS["hh"].example)])
    with pytest.raises(DataError, match="--language needs a column that is not there; there are chosen, rejected"):
        get("hh", tmp_path / "copy.jsonl", tmp_path / "out", language=["English"])


def test_a_language_that_nobody_speaks(lmsys: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 60 rows is left .*English \(50\), German \(10\)"):
        get("lmsys", lmsys, tmp_path / "out", language=["en"])
    assert get("lmsys", lmsys, tmp_path / "out", language=["English"]).counts.accepted == 50  # no --redo needed


# ---------------------------------------------------------------------------------------------------------------------
# conversion of rows


def test_conversations_as_sft_and_as_prompts(lmsys: Path, tmp_path: Path) -> None:
    get("lmsys", lmsys, tmp_path / "sft", as_="sft")
    row = next(r for r in all_rows(tmp_path / "sft") if "Question 7:" in first_turn(r))
    assert [m["role"] for m in row["prompt"]] == ["user", "assistant", "user"] and row["completion"] == say("b7")
    result = get("lmsys", lmsys, tmp_path / "prompts", as_="prompts", options={"use": "first_prompt"})
    assert result.data["kind"] == "prompts"
    assert sorted(first_turn(r) for r in all_rows(tmp_path / "prompts")) == sorted(
        lmsys_row(i)["conversation"][0]["content"] for i in range(60)
    )
    assert all(set(r) == {"prompt"} and len(r["prompt"]) == 1 for r in all_rows(tmp_path / "prompts"))


def test_a_reward_labels_answers(lmsys: Path, tmp_path: Path) -> None:
    asked = {"as_": "unpaired", "reward": "sentiment", "threshold": 0.2, "options": {"use": "first_turn"}}
    result = get("lmsys", lmsys, tmp_path / "out", **asked)
    rows = all_rows(tmp_path / "out")
    assert len(rows) == 60 and result.data["kind"] == "unpaired"
    for row in rows:
        number = int(first_turn(row).split()[1].rstrip(":"))
        assert row["label"] is (number % 2 == 1) is (row["score"] >= 0.2)
    assert load_preferences(str(tmp_path / "out/train.jsonl")).kind == "unpaired"


def test_a_function_labels_answers(lmsys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "BATCH", 7)
    code = "def judge(prompts, answers):\n    return [None if 'river' in a else len(a) % 2 for a in answers]\n"
    (tmp_path / "mine.py").write_text(code)
    name = f"{tmp_path}/mine.py:judge"
    result = get("lmsys", lmsys, tmp_path / "out", as_="unpaired", label_with=name)
    expected = {i: len(say(f"b{i}")) % 2 for i in range(60) if "river" not in say(f"b{i}")}
    got = {int(first_turn(r).split()[1].rstrip(":")): r["label"] for r in all_rows(tmp_path / "out")}
    assert got == expected and result.counts.filtered == {"no label": 60 - len(expected)}
    assert result.data["labelled_with_sha256"]
    del result.data["request"]["labels_sha256"]  # as version 0.1.0 wrote it
    (tmp_path / "out" / "data.json").write_text(json.dumps(result.data))
    assert not get("lmsys", lmsys, tmp_path / "out", as_="unpaired", label_with=name).fresh
    (tmp_path / "mine.py").write_text(code.replace("river", "lake"))
    with pytest.raises(ConfigError, match="labels_sha256"):  # the labels would be those of the earlier function
        get("lmsys", lmsys, tmp_path / "out", as_="unpaired", label_with=name)
    for body, words in (
        ("[1]", "returned 1 labels"),
        ("['x'] * len(answers)", "as a label"),
        ("1 / 0", "ZeroDivisionError"),
    ):
        (tmp_path / "bad.py").write_text(f"def judge(prompts, answers):\n    return {body}\n")
        with pytest.raises(RewardError, match=words):
            get("lmsys", lmsys, tmp_path / "bad", as_="unpaired", label_with=f"{tmp_path}/bad.py:judge")


def test_a_reward_model_without_a_checkpoint_is_named(lmsys: Path, tmp_path: Path) -> None:
    (tmp_path / "reward" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="train the reward model first"):
        get("lmsys", lmsys, tmp_path / "out", as_="unpaired", reward=str(tmp_path / "reward"), threshold=0.0)


def test_a_folder_that_another_process_writes_is_left_alone(lmsys: Path, tmp_path: Path) -> None:
    (tmp_path / "out/.get").mkdir(parents=True)
    with RunLock(tmp_path / "out/.get"), pytest.raises(DataError, match="is writing there"):
        get("lmsys", lmsys, tmp_path / "out")
    assert (tmp_path / "out/.get").exists()


def test_answers_without_a_label_are_counted(lmsys: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def judge(p, a):\n    return [True if 'I love it' in x or 'hate' in x else None for x in a]\n"
    )
    asked = {"as_": "unpaired", "label_with": f"{tmp_path}/mine.py:judge", "options": {"use": "every_turn"}}
    counts = get("lmsys", lmsys, tmp_path / "out", **asked).counts
    assert (counts.rows, counts.accepted, counts.examples, counts.unlabelled) == (60, 60, 60, 60)


def test_pairs_become_other_kinds(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i} {say(str(i))}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)]
    write(tmp_path / "pairs.jsonl", [*rows, {"prompt": "same", "chosen": "x", "rejected": "x "}, {"prompt": 3}])
    kinds: dict[str | None, tuple[int, int]] = {None: (5, 5), "sft": (6, 6), "prompts": (6, 6), "unpaired": (5, 10)}
    for kind, (accepted, examples) in kinds.items():
        result = get("mine", tmp_path / "pairs.jsonl", tmp_path / f"out-{kind}", as_=kind)
        assert (result.counts.accepted, result.counts.examples, result.counts.rows) == (accepted, examples, 7)
        aside = [json.loads(line) for line in (tmp_path / f"out-{kind}/quarantine.jsonl").read_text().splitlines()]
        assert len(aside) == result.counts.quarantined == 7 - accepted
        assert all(set(q) == {"where", "what", "how", "row"} for q in aside)
    labels = Counter((r["completion"].split()[0], r["label"]) for r in all_rows(tmp_path / "out-unpaired"))
    assert labels == {("good", True): 5, ("bad", False): 5}
    assert {r["completion"].split()[0] for r in all_rows(tmp_path / "out-sft")} == {"good", "x"}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"split": (0.5, 0.5)}, "three numbers"),
        ({"split": (0.5, 0.5, 0.5)}, "add up to 1"),
        ({"split": (0, 0.5, 0.5)}, "train has no share"),
        ({"first": 0}, "^first: is 0"),
        ({"seed": -1}, "^seed: is -1"),
        ({"as_": "pairs"}, "choose one of sft, prompts, unpaired"),
        ({"redacted": "no"}, "--redacted"),
        ({"moderation": 2.0}, "--moderation"),
        ({"as_": "unpaired"}, "have no labels"),
        ({"as_": "unpaired", "reward": "sentiment"}, "--threshold"),
        ({"threshold": 1.0}, "without --reward"),
        ({"reward": "sentiment", "threshold": 0.0}, "add --as unpaired"),
        ({"as_": "unpaired", "reward": "words", "threshold": 1.0, "label_with": "x.py:f"}, "keep one"),
        ({"as_": "unpaired", "reward": "nosuch", "threshold": 1.0}, "is not a reward"),
        ({"as_": "unpaired", "label_with": "nosuch.py:f"}, "no such file"),
        ({"layout": "nosuch"}, "is not a layout"),
        ({"options": {"use": "what"}}, "choose one of"),
        ({"options": {"nosuch": 1}}, "is not an option of the layout lmsys"),
        ({"subsets": ["nosuch"]}, "has no subset"),
        ({"languages": ["x"]}, 'did you mean "language"'),
        ({"layout": "par"}, "--layout: 'par'"),
        ({"revision": "main"}, "--revision: is given together with --from"),
        ({"first": "3"}, "give a whole number"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is(lmsys: Path, tmp_path: Path, asked: Row, words: str) -> None:
    with pytest.raises(PenchantError, match=words):
        get("lmsys", lmsys, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_a_sentence(lmsys: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        get("lmsys", lmsys, tmp_path / ("x" * 300))


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError):
        get("mine", tmp_path / "nowhere.jsonl", tmp_path / "out")
    assert not [*(tmp_path / "out").iterdir()]


def test_columns_and_detection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "x.jsonl", [{"q": f"question {i}", "plus": "a", "minus": "b"} for i in range(3)])
    arguments = ["data", "get", "mine", "--from", str(tmp_path / "x.jsonl"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "(minus, plus, q) fit no known layout; map your columns" in capsys.readouterr().err
    assert main([*arguments, "--columns", "prompt=q", "chosen=plus", "rejected=minus"]) == 0
    said = capsys.readouterr()
    assert "layout pairs (columns chosen, rejected" in said.err and "override with --layout" in said.err
    for named in (
        ["--column", "prompt=q", "--column", "chosen=plus"],
        ["--column", "prompt=q", "--columns", "chosen=plus"],
    ):
        assert main([*arguments, *named, "--columns", "rejected=minus"]) == 0
        assert "holds this already" in capsys.readouterr().err  # the same columns, spelled differently
    assert main([*arguments, "--columns", "prompt"]) == 2
    assert "write --column name=value" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# the split


def near_rows(groups: int) -> list[Row]:
    """Prompts in groups of three: one, the same in another case, and one with an extra word."""
    rows = []
    for g in range(groups):
        text = say(f"group{g}", 40)
        rows += [{"prompt": p, "completion": f"{g}"} for p in (text, text.upper(), f"{text} please")]
    return rows


def group_splits(folder: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for split, rows in rows_in(folder).items():
        for row in rows:
            found.setdefault(row["completion"], set()).add(split)
    return found


def test_near_duplicates_stay_together_and_order_does_not_matter(tmp_path: Path) -> None:
    rows = near_rows(100)
    write(tmp_path / "a.jsonl", rows)
    mixed = list(rows)
    random.Random(1).shuffle(mixed)
    write(tmp_path / "b.jsonl", mixed)
    result = get("mine", tmp_path / "a.jsonl", tmp_path / "a", split=(0.6, 0.2, 0.2))
    get("mine", tmp_path / "b.jsonl", tmp_path / "b", split=(0.6, 0.2, 0.2))
    get("mine", tmp_path / "a.jsonl", tmp_path / "c", split=(0.6, 0.2, 0.2), seed=1)
    splits = group_splits(tmp_path / "a")
    assert all(len(s) == 1 for s in splits.values())
    assert splits == group_splits(tmp_path / "b") != group_splits(tmp_path / "c")
    assert result.data["prompt_groups"] == {"groups": 100, "prompts": 200}
    share = Counter(next(iter(s)) for s in splits.values())
    assert 45 <= share["train"] <= 75 and 8 <= share["validation"] <= 32


def test_growing_data_keep_their_splits(tmp_path: Path) -> None:
    rows = near_rows(60)
    write(tmp_path / "a.jsonl", rows[:90])
    write(tmp_path / "b.jsonl", rows)
    for name in "ab":
        get("mine", tmp_path / f"{name}.jsonl", tmp_path / name, split=(0.5, 0.25, 0.25))
    small, large = group_splits(tmp_path / "a"), group_splits(tmp_path / "b")
    assert small == {g: large[g] for g in small}


def test_all_examples_of_a_conversation_stay_together(lmsys: Path, tmp_path: Path) -> None:
    result = get("lmsys", lmsys, tmp_path / "out", options={"use": "every_turn"}, split=(0.5, 0.25, 0.25))
    assert result.counts.examples == 120
    where: dict[str, set[str]] = {}
    for split, rows in rows_in(tmp_path / "out").items():
        for row in rows:
            where.setdefault(first_turn(row), set()).add(split)
    assert len(where) == 60 and all(len(s) == 1 for s in where.values())


def test_published_splits_are_kept_and_the_missing_one_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = near_rows(200)
    write(tmp_path / "copy/train.jsonl", rows[:540])
    write(tmp_path / "copy/test.jsonl", rows[540:] + rows[:3])
    arguments = ["--from", str(tmp_path / "copy"), "--output", str(tmp_path / "out"), "--published-splits", "--quiet"]
    assert main(["data", "get", "mine", *arguments]) == 0
    found = rows_in(tmp_path / "out")
    assert sorted(map(str, found["test"])) == sorted(map(str, rows[540:] + rows[:3]))
    assert 5 <= len(found["validation"]) <= 60 and len(found["train"]) + len(found["validation"]) == 540
    assert "1 groups of prompts (6 rows) occur in several published splits" in capsys.readouterr().out
    assert main(["data", "get", "mine", *arguments, "--first", "9", "--redo"]) == 0
    assert [len(found) for found in rows_in(tmp_path / "out").values()][2] == 9


# ---------------------------------------------------------------------------------------------------------------------
# resuming


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def killed(call: Callable[[], object]) -> None:
    """Run in a process that ends as if killed: at once, without cleanup."""
    pid = os.fork()
    if pid == 0:
        try:
            call()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.parametrize("moment", [1, 15, 21, 45, 61, 75, 119, 121, 122, 123, 124, 125])
def test_a_killed_get_continues_to_the_same_bytes(
    lmsys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Moments 1 to 60 convert a row, 61 to 120 write one; after that the files are renamed."""
    get("lmsys", lmsys, tmp_path / "whole")
    seen = 0

    def count(rows: int = 1) -> None:
        nonlocal seen
        seen += rows
        if seen >= moment:
            os._exit(9)

    def run() -> None:
        step, replace = Pace.step, Path.replace
        monkeypatch.setattr(
            Pace,
            "step",
            lambda pace, rows=1: (count(rows if pace._what != "grouping prompts" else 0), step(pace, rows)),
        )
        monkeypatch.setattr(
            Path, "replace", lambda path, to: (replace(path, to), count() if path.parent.name == "killed" else None)
        )
        get("lmsys", lmsys, tmp_path / "killed")

    killed(run)
    there = [p for p in (tmp_path / "killed").glob("*.json*") if p.suffix != ".part"]
    assert len(there) == max(moment - 120, 0)  # complete files only, one after another
    result = get("lmsys", lmsys, tmp_path / "killed")
    assert result.fresh is (moment < 125)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("layout", [None, "lmsys"])
def test_several_processes_write_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str | None
) -> None:
    monkeypatch.setattr("penchant.download.SHARD", 0)
    monkeypatch.setattr("penchant.download.in_order", in_this_process)
    (tmp_path / "copy").mkdir()
    for i in range(3):
        rows = [lmsys_row(n % 25, language=("English", "German")[n % 2]) for n in range(i * 15, i * 15 + 20)]
        (tmp_path / "copy" / f"train-{i}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in [*rows, {**rows[0], "language": "German", "conversation": 3}])
        )
    asked: Row = {"source": str(tmp_path / "copy"), "language": ["German"], "layout": layout, "as_": "prompts"}
    one, many = (api.get_data("mine", output=str(tmp_path / f"{n}"), workers=n, **asked).folder for n in (1, 3))
    assert [p.read_bytes() for p in sorted(one.glob("*.json*"))] == [
        p.read_bytes() for p in sorted(many.glob("*.json*"))
    ]
    assert len((one / "train.jsonl").read_text().splitlines()) > 5 and (one / "quarantine.jsonl").read_text()
    assert not api.get_data("mine", output=str(one), workers=2, **asked).fresh
    with pytest.raises(DataError, match=r"English \(30\)"):
        api.get_data("mine", output=str(tmp_path / "none"), workers=3, **asked | {"language": ["French"]})


def test_finished_parts_are_not_converted_again(
    lmsys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Converter.convert
    names = []

    def convert(self: Any, rows: Any, name: str, *more: Any) -> Any:
        names.append(name)
        if len(names) == 3:
            raise KeyboardInterrupt
        return original(self, rows, name, *more)

    monkeypatch.setattr(Converter, "convert", convert)
    arguments = ["data", "get", "lmsys", "--from", str(lmsys), "--output", str(tmp_path / "out")]
    assert main(arguments) == 130
    assert main([*arguments, "--seed", "1"]) == 2
    assert "holds the beginning of what other arguments gave" in capsys.readouterr().err
    assert main(arguments) == 0
    assert len(names) == 4 and names[2] == names[3]


def test_a_part_that_is_done_says_what_it_holds(lmsys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed as soon as the first part is done."""
    original = Converter.convert

    def convert(self: Any, *asked: Any) -> None:
        original(self, *asked)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Converter, "convert", convert)
        with pytest.raises(KeyboardInterrupt):
            get("lmsys", lmsys, tmp_path / "killed")
    get("lmsys", lmsys, tmp_path / "killed")
    get("lmsys", lmsys, tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_other_arguments_are_refused_and_redo_makes_it_anew(lmsys: Path, tmp_path: Path) -> None:
    get("lmsys", lmsys, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"(?s)seed: 0 -> 1.*--redo"):
        get("lmsys", lmsys, tmp_path / "out", seed=1)
    with pytest.raises(DataError, match="no such file"):
        get("lmsys", tmp_path / "gone", tmp_path / "out", redo=True)
    assert not get("lmsys", lmsys, tmp_path / "out").fresh  # a mistaken --redo loses nothing
    assert get("lmsys", lmsys, tmp_path / "out", seed=1, redo=True).data["request"]["seed"] == 1
    (tmp_path / "out/test.jsonl").write_text("")
    with pytest.raises(ConfigError, match="was changed or removed"):
        get("lmsys", lmsys, tmp_path / "out", seed=1)


def test_a_redo_that_is_killed_leaves_nothing_that_looks_done(
    lmsys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get("lmsys", lmsys, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(_Job, "_write_splits", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            get("lmsys", lmsys, tmp_path / "out", seed=1, redo=True)
    with pytest.raises(ConfigError, match="holds the beginning of"):
        get("lmsys", lmsys, tmp_path / "out")
    assert get("lmsys", lmsys, tmp_path / "out", seed=1).data["request"]["seed"] == 1


def test_subsets_of_a_copy_in_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = dict(LAYOUTS["hh"].example)
    for name in ("harmless-base", "helpful-base"):
        write(tmp_path / f"copy/{name}/test-0.parquet", [row])
    write(tmp_path / "copy/red-team-attempts/all.json", [{"transcript": "\n\nHuman: Hello?\n\nAssistant: Yes."}])
    result = get("hh", tmp_path / "copy", tmp_path / "all", published_splits=True)
    assert [s["path"].split("/")[0] for s in result.data["sources"]] == ["harmless-base", "helpful-base"]
    assert result.data["splits"]["test"]["rows"] == 2
    one = get("hh", tmp_path / "copy", tmp_path / "one", subsets=["helpful-base"])
    assert [s["subset"] for s in one.data["sources"]] == ["helpful-base"]
    asked = ["--from", str(tmp_path / "copy"), "--output", str(tmp_path / "red"), "--subset", "red-team-attempts"]
    assert main(["data", "get", "hh", *asked, "--as", "prompts"]) == 0
    assert [first_turn(r) for r in all_rows(tmp_path / "red")] == ["Hello?"]
    with pytest.raises(DataError, match="holds no file of helpful-online"):
        get("hh", tmp_path / "copy", tmp_path / "none", subsets=["helpful-online"])


def test_subsets_that_are_not_there_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "copy/harmless-base/train.jsonl.gz", [dict(LAYOUTS["hh"].example)])
    assert main(["data", "get", "hh", "--from", str(tmp_path / "copy"), "--output", str(tmp_path / "out")]) == 0
    assert "not there: harmless-base (test), helpful-base (train)" in capsys.readouterr().err


def test_files_of_others_are_not_overwritten(lmsys: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train.jsonl").write_text("mine")
    for redo in (False, True):
        with pytest.raises(ConfigError, match="did not write; choose another --output"):
            get("lmsys", lmsys, tmp_path / "out", redo=redo)
    assert (tmp_path / "out/train.jsonl").read_text() == "mine"
    with pytest.raises(PenchantError):
        get("lmsys", lmsys, tmp_path / "out/train.jsonl")


def test_a_copy_that_changed_is_not_continued(lmsys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(_Job, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            get("lmsys", lmsys, tmp_path / "out")
    write(lmsys / "data/train-00000-of-00003.parquet", [lmsys_row(99)])
    with pytest.raises(DataError, match="was changed or removed since this was begun"):
        get("lmsys", lmsys, tmp_path / "out")
    assert get("lmsys", lmsys, tmp_path / "out", redo=True).counts.rows == 41


def test_first_rows_only(lmsys: Path, tmp_path: Path) -> None:
    result = get("lmsys", lmsys, tmp_path / "out", first=25)
    assert result.counts.rows == 25 and [s["rows_read"] for s in result.data["sources"]] == [20, 5]
    assert get("lmsys", lmsys, tmp_path / "more", first=1000).counts.rows == 60


def test_names_from_outside_cannot_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "copy/a\x1b[31m.jsonl", [{"prompt": "p", "completion": "c"}])
    assert (
        main(["data", "get", "mine", "--from", str(tmp_path / "copy"), "--output", str(tmp_path / "out\x1b[0m")]) == 0
    )
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and "\\x1b[31m" in said.err


def test_other_names_of_columns_are_adopted(tmp_path: Path) -> None:
    """As in training, question and answer columns are read as prompt and completion."""
    write(tmp_path / "in/rows.jsonl", [{"question": f"What is {i}?", "answer": f"{i} is a number."} for i in range(6)])
    result = get("own/rows", tmp_path / "in", tmp_path / "out")
    assert result is not None and {r["prompt"] for r in all_rows(tmp_path / "out")} == {
        f"What is {i}?" for i in range(6)
    }
