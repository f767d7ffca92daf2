"""`penchant compare`: how it groups seeds, finds the common start and the held-out rows, and which warnings it gives."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from endpoints import longer, serve
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.base.files import write_text_atomically
from penchant.cli import main
from penchant.compare.runs import NUMBERS, WORDS, budget_sentences, group_by_setting, read_runs
from penchant.errors import CheckpointError, ConfigError, DataError, ModelError, PenchantError
from penchant.judges import JudgeOptions

ROWS = polite_rows(40)
REWARD = "def vowels(prompts, completions):\n    return [sum(c in 'aeiou' for c in t) for t in completions]\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start model, its data, and runs from it: dpo with two seeds, a longer ipo, rloo, and dpo with an adapter."""
    root = tmp_path_factory.mktemp("world")
    tiny_model_folder(root / "model")
    write_jsonl(root / "train.jsonl", ROWS[:24])
    write_jsonl(root / "valid.jsonl", ROWS[24:])
    (root / "rewards.py").write_text(REWARD)
    online = {"name": "rloo", "samples": 2, "max_new_tokens": 4}
    train(root, "dpo")
    train(root, "dpo-seed-1", train={"seed": 1})
    train(root, "ipo", loss={"name": "ipo"}, train={"max_steps": 4}, checkpoint={"every": 2})
    train(root, "rloo", loss=None, algorithm=online, reward=f"{root}/rewards.py:vowels")
    train(root, "lora", lora={"r": 4}, train={"lr": 3e-2}, evaluation={"every": 1})  # its only checkpoint is the last
    return root


def train(root: Path, name: str, **changes: Any) -> Path:
    base: dict[str, Any] = {
        "model": {"path": str(root / "model"), "dtype": "fp32"},
        "data": {"path": str(root / "train.jsonl"), "eval_path": str(root / "valid.jsonl"), "max_length": 96},
        "loss": {"name": "dpo"},
        "train": {"batch_size": 6, "max_steps": 2, "lr": 3e-3, "tokens_per_step": 900, "warmup_fraction": 0.0},
        "evaluation": {"samples": 0, "kl_prompts": 0, "at_start": False, "every": None},
        "checkpoint": {"every": None},
        "output": str(root / "runs" / name),
    }
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) and key in base else value
    return Path(api.train({k: v for k, v in base.items() if v is not None}, quiet=True).folder)


def compare(world: Path, *names: str, **options: Any) -> Any:
    output = options.pop("output", world / "out")
    sizes = {"prompts": 12, "max_new_tokens": 4, **options}
    return api.compare(*(world / "runs" / n for n in names), output=output, quiet=True, **sizes)


def copied(world: Path, tmp_path: Path, name: str = "dpo", to: str = "copy", **config: Any) -> Path:
    """Copy a run's folder and change sections of its config."""
    folder = tmp_path / to
    shutil.copytree(world / "runs" / name, folder)
    path = folder / "config.resolved.yaml"
    values = yaml.safe_load(path.read_text())
    for key, value in config.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(values))
    (folder / "sums.json").unlink()  # as after a deliberate change
    return folder


def edit(folder: Path, change: Any, name: str = "manifest.json") -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def refused(world: Path, kind: type[PenchantError], match: str, *names: str | Path, **options: Any) -> None:
    with pytest.raises(kind, match=match):
        compare(world, *map(str, names), **options)


# ---- end to end -----------------------------------------------------------------------------------------------------


def test_two_runs_their_start_and_a_reward(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    asked = ["compare", "runs/dpo", "runs/rloo", "--reward", "rewards.py:vowels", "--prompts", "12"]
    asked += ["--max-new-tokens", "4", "--samples", "2", "--output", str(tmp_path / "out"), "--quiet"]
    assert main(asked) == 0
    text = capsys.readouterr().out
    figures = json.loads((tmp_path / "out/comparison.json").read_text())
    rows = [json.loads(x) for x in (tmp_path / "out/comparison.jsonl").read_text().splitlines()]
    assert list(figures["models"]) == ["start", "dpo", "rloo"] == list(rows[0]["completions"])
    assert len(rows) == 24 and {r["prompt"] for r in rows} <= {r["prompt"] for r in ROWS[24:]}
    pairs = [(c["name"], c["other"]) for c in figures["comparisons"]]
    assert pairs == [("dpo", "start"), ("rloo", "start"), ("dpo", "rloo")]
    assert "p corrected for 3 comparisons" in text and "win rate at equal length" in text
    for name, found in figures["models"].items():
        judged = [sum(c in "aeiou" for c in r["completions"][name]["text"]) for r in rows]
        assert found["reward"] == pytest.approx(np.mean(judged))
        assert found["tokens"] == pytest.approx(np.mean([r["completions"][name]["tokens"] for r in rows]))
    assert "kl" not in figures["models"]["start"] and figures["models"]["dpo"]["kl/ci"]
    lines = text.rstrip().splitlines()
    assert lines[-1] == "dpo and rloo have one seed each: another seed of the same setting could change this verdict."
    assert all("clear winner" in x or "is better than" in x for x in lines[-4:-1])
    assert "Trained to raise this reward: rloo." in text
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == figures  # the same result again


def test_without_a_reward_it_is_of_likelihoods(world: Path) -> None:
    found = compare(world, "dpo", "lora").figures
    assert found["outcome"] == "held-out preference accuracy"
    assert "reward" not in found["models"]["dpo"] and "win_rate" not in found["models"]["dpo"]
    assert {"preference_accuracy", "perplexity", "kl", "tokens"} <= set(found["models"]["dpo"])
    assert found["models"]["lora"]["kl_per_token"] > 0  # the adapter is merged into the start
    assert all(c["win_rate"] is None for c in found["comparisons"])
    gained = found["models"]["dpo"]["preference_accuracy"] - 0.5
    assert found["comparisons"][0]["difference"]["estimate"] == pytest.approx(gained)


def test_a_trained_reward_model_judges(world: Path) -> None:
    changes = {"algorithm": {"name": "reward_model"}, "loss": None}
    judge = train(world, "judge", **changes)
    found = compare(world, "dpo", reward=str(judge)).figures
    assert "reward" in found["models"]["dpo"] and found["settings"]["rewards"]
    refused(world, ConfigError, "is a reward model, which writes nothing", "dpo", "judge")


def test_other_rewards_stand_beside_it(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = str(train(world, "judge-too", algorithm={"name": "reward_model"}, loss=None))
    vowels = f"{world}/rewards.py:vowels"
    asked = ["compare", str(world / "runs/dpo"), str(world / "runs/rloo"), "--reward", judge, "--also", vowels]
    asked += ["--also", "words", "--prompts", "12", "--max-new-tokens", "4", "--output", str(tmp_path), "--quiet"]
    assert main(asked) == 0
    text = capsys.readouterr().out
    figures = json.loads((tmp_path / "comparison.json").read_text())
    rows = [json.loads(x) for x in (tmp_path / "comparison.jsonl").read_text().splitlines()]
    for name, found in figures["models"].items():
        judged = [sum(c in "aeiou" for c in r["completions"][name]["text"]) for r in rows]
        assert found["also"][vowels]["reward"] == pytest.approx(np.mean(judged))
        assert [r["completions"][name]["also"][vowels] for r in rows] == judged
    assert list(figures["also"]) == [vowels, "words"] and all(len(v) == 3 for v in figures["also"].values())
    assert figures["settings"]["also"] == [vowels, "words"]
    assert set(figures["settings"]["rewards"]) == {judge, f"{world}/rewards.py"}
    assert f"reward, by {vowels}" in text and "\nBy words: " in text and "p corrected for 6 comparisons" in text
    assert f"Trained to raise {vowels}: rloo." in text and "Trained to raise this reward" not in text
    refused(world, ConfigError, "--also: is given without a reward", "dpo", also=["words"])
    refused(world, ConfigError, "--also: names words twice", "dpo", reward="words", also=["words"])
    refused(world, ConfigError, "'nicer' is not a reward", "dpo", reward="words", also=["nicer"])
    refused(world, ConfigError, "dpo is not a reward model", "dpo", reward="words", also=[str(world / "runs/dpo")])


def judged_by(world: Path, url: str, *more: str) -> int:
    asked = ["compare", str(world / "runs/dpo"), str(world / "runs/rloo"), "--judge", url, "--judge-model", "judge-7b"]
    asked += ["--prompts", "12", "--max-new-tokens", "4", "--quiet", *more]
    return main(asked)


def test_a_model_behind_an_endpoint_judges_pair_by_pair(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0987654321")
    output = ["--output", str(tmp_path / "out"), "--judge-concurrency", "2"]
    with serve(longer) as server:
        assert judged_by(world, server.url, *output) == 0
        text = capsys.readouterr().out
        figures = json.loads((tmp_path / "out/comparison.json").read_text())
        rows = [json.loads(x) for x in (tmp_path / "out/comparison.jsonl").read_text().splitlines()]
        questions = {a.texts for a in server.questions}
        assert all(a.headers["authorization"] == "Bearer sk-secret-0987654321" for a in server.asked)
        assert judged_by(world, server.url, *output) == 0  # a second call asks nothing
        assert len(server.questions) == len(questions) == figures["judge"]["asked"] > 0
    capsys.readouterr()
    again = json.loads((tmp_path / "out/comparison.json").read_text())["judge"]
    assert (figures["judge"]["cached"], again["cached"]) == (0, len(questions))
    assert again == figures["judge"] | {"cached": len(questions)}
    # the judge is asked about the completions only, each pair in both orders
    expected = set()
    for row in rows:
        for one, other in (("dpo", "start"), ("rloo", "start"), ("dpo", "rloo")):
            a, b = (row["completions"][n]["text"] for n in (one, other))
            expected |= {(row["prompt"], a, b), (row["prompt"], b, a)} if a != b else set()
    assert questions == expected
    length = {n: np.array([len(r["completions"][n]["text"]) for r in rows]) for n in rows[0]["completions"]}
    for name in ("dpo", "rloo"):
        wins = (length[name] > length["start"]) + 0.5 * (length[name] == length["start"])
        assert figures["models"][name]["judged"]["judge-7b"]["win_rate"] == pytest.approx(wins.mean())
    judge = figures["judge"]
    assert (judge["first_position"], judge["failures"]) == (0.5, 0)
    low, high = judge["first_position/ci"]  # one half in every pair, but the interval has a width
    assert 0 < low < 0.5 < high < 1
    assert figures["outcome"] == "judged win rate" and figures["comparisons"] == judge["comparisons"]
    assert figures["settings"]["judge"]["endpoint"] == server.url and len(judge["comparisons"]) == 3
    assert "win rate against start (ties half), by judge-7b" in text and "p corrected for 3 comparisons" in text
    assert "The judge judge-7b shows no clear preference for a position: 50%" in text and "\nBy judge-7b: " in text
    written = "".join(p.read_text() for p in [*(tmp_path / "out").iterdir(), *world.glob("out/*")])
    assert "sk-secret" not in text + written


def test_judges_that_cannot_be_trusted(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "out"), "--reward", "words"]
    with serve(lambda *_: "A") as server:
        assert judged_by(world, server.url, *output) == 0
    text = capsys.readouterr().out
    figures = json.loads((tmp_path / "out/comparison.json").read_text())
    assert figures["judge"]["first_position"] == 1.0 and figures["judge"]["disagreed"] == figures["judge"]["pairs"]
    assert "The judge judge-7b favors the first position: 100% [" in text and ", 100%] of its verdicts" in text
    assert figures["outcome"] == "mean reward" and "By judge-7b: Between dpo and start there is no clear winner" in text
    with serve(lambda *_: "It depends.\x1b[2J") as server:
        assert judged_by(world, server.url, *output, "--judge-parameters", '{"temperature": 1}') == 0
        assert len(server.questions) == 2 * figures["judge"]["asked"]  # each is asked once more
    text = capsys.readouterr().out
    figures = json.loads((tmp_path / "out/comparison.json").read_text())
    assert figures["judge"]["failures"] == figures["judge"]["asked"] and "first_position" not in figures["judge"]
    assert "By judge-7b: no winner is named: " in text and "(100%) could not be judged" in text
    assert "reply to a trial question cannot be read: 'It depends.\\x1b[2J'" in text and "\x1b" not in text
    assert judged_by(world, server.url, "--judge-model", "other") == 2  # the server is gone
    assert "cannot be reached" in capsys.readouterr().err


def test_a_judge_of_ones_own_and_seeds(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "judge.py").write_text("def longer(prompt, a, b):\n    return len(a) / max(1, len(a) + len(b))\n")
    judge = f"{tmp_path}/judge.py:longer"
    found = compare(world, "dpo", "ipo", "dpo-seed-1", judge=judge, reward="words", samples=2)
    figures = found.figures
    over = {(c["name"], c["other"]): c["p_seeds"] is not None for c in figures["judge"]["comparisons"]}
    assert over == {("dpo", "start"): True, ("ipo", "start"): False, ("dpo", "ipo"): False}
    assert figures["judge"]["first_position"] == pytest.approx(0.5) and len(figures["judge"]["sha256"]) == 64
    assert f"By {judge}: " in found.to_text()
    assert main(["compare", str(world / "runs/dpo"), "--judge-model", "m"]) == 2
    assert "--judge-model: is given without --judge" in capsys.readouterr().err
    refused(world, ConfigError, "'sentiment' is not a judge", "dpo", judge="sentiment")
    own = "Which is longer?\n<<prompt x>>\n{prompt}\n<<answer A x>>\n{answer_a}\n<<answer B x>>\n{answer_b}\n<<end x>>"
    (tmp_path / "own.txt").write_text(own)
    with serve(longer) as server:
        options = JudgeOptions(server.url, "m", instruction=tmp_path / "own.txt")
        compare(world, "dpo", judge=options)
        assert all(a.content.startswith("Which is longer?") for a in server.asked)


def test_the_default_folder_is_named_after_what_is_compared(world: Path) -> None:
    assert compare(world, "dpo", output=None).folder == world / "runs/compare-dpo"


# ---- seeds ----------------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_alone_are_one_setting(world: Path) -> None:
    found = compare(world, "dpo", "ipo", "dpo-seed-1", reward=f"{world}/rewards.py:vowels")
    figures = found.figures
    assert figures["seeds"] == {"dpo": {"dpo": 0, "dpo-seed-1": 1}, "ipo": {"ipo": 0}}
    assert list(figures["models"]) == ["start", "dpo", "ipo"] and list(figures["runs"]) == ["dpo", "dpo-seed-1"]
    mean = np.mean([figures["runs"][n]["reward"] for n in ("dpo", "dpo-seed-1")])
    assert figures["models"]["dpo"]["reward"] == pytest.approx(mean)
    over = {(c["name"], c["other"]): c["p_seeds"] is not None for c in figures["comparisons"]}
    assert over == {("dpo", "start"): True, ("ipo", "start"): False, ("dpo", "ipo"): False}
    assert "over seeds and prompts for dpo" in figures["heading"]
    assert figures["sentences"][-1].startswith("ipo has one seed")


def test_the_same_seed_twice_is_no_second_seed(world: Path, tmp_path: Path) -> None:
    other = copied(world, tmp_path, output="elsewhere", logging={"every": 2})
    refused(world, CheckpointError, r"the setting and seed of dpo \(seed 0\)", "dpo", other)
    refused(world, CheckpointError, "is given twice", "dpo", "dpo")


@pytest.mark.parametrize("what", ["beta", "rows", "start", "reward"])
def test_what_makes_another_setting(world: Path, tmp_path: Path, what: str) -> None:
    loss = {"beta": 0.37} if what == "beta" else {}
    other = copied(world, tmp_path, train={"seed": 5}, loss=loss)
    assert (
        len(group_by_setting(read_runs([world / "runs/dpo", copied(world, tmp_path, to="x", train={"seed": 5})], None)))
        == 1
    )
    if what == "rows":
        edit(other, lambda m: m["data"]["train"].update(fingerprint="0"))
    if what == "start":
        edit(other, lambda m: m["model"].update(sha256="0"))
    if what == "reward":
        edit(other, lambda m: m.update({"content of reward r.py:f": "0"}), "identity.json")
    assert len(group_by_setting(read_runs([world / "runs/dpo", other], None))) == 2


def test_runs_of_one_name_are_told_apart(world: Path, tmp_path: Path) -> None:
    other = copied(world, tmp_path, to="b/dpo", loss={"beta": 0.37})
    start = copied(world, tmp_path, to="b/start", loss={"beta": 0.38})
    names = [r.name for r in read_runs([world / "runs/dpo", other, start, world / "runs/ipo"], None)]
    assert names == ["runs/dpo", "b/dpo", "b/start", "ipo"]


# ---- the common start -----------------------------------------------------------------------------------------------


def test_other_weights_or_tokenizers_are_refused(world: Path, tmp_path: Path) -> None:
    root = tmp_path
    tiny_model_folder(root / "model", seed=1)
    for name in ("train.jsonl", "valid.jsonl"):
        shutil.copy(world / name, root / name)
    other = train(root, "other")
    refused(world, ConfigError, "dpo and other start from different weights.*--against RUN", "dpo", other)
    found = compare(world, "dpo", str(other), against=world / "runs/ipo").figures
    assert list(found["models"]) == ["ipo", "dpo", "other"]
    assert [(c["name"], c["other"]) for c in found["comparisons"]] == [
        ("dpo", "ipo"),
        ("other", "ipo"),
        ("dpo", "other"),
    ]
    assert found["sentences"][-1].startswith("ipo, dpo and other have one seed each")
    said = found["budget"]["sentences"]  # the baseline has trained for longer
    assert any(line.startswith("Optimizer steps differ: ") and "ipo 4" in line for line in said)
    again = compare(world, "dpo", "ipo", against=world / "runs/ipo").figures  # also given as one of the runs
    assert list(again["models"]) == ["ipo", "dpo"]
    refused(world, ConfigError, "nothing to compare with --against", "ipo", against=world / "runs/ipo")
    tokens = copied(world, tmp_path, loss={"beta": 0.2})
    edit(tokens, lambda m: m.update(tokenizer_sha256="0"))
    refused(world, ConfigError, "have different tokenizers", "dpo", tokens)


def test_a_start_that_has_changed_is_not_the_start(world: Path, tmp_path: Path) -> None:
    root = tmp_path
    tiny_model_folder(root / "model")
    for name in ("train.jsonl", "valid.jsonl"):
        shutil.copy(world / name, root / name)
    run = train(root, "lora", lora={"r": 2}, train={"max_steps": 1})
    compare(world, str(run))
    tiny_model_folder(root / "model", seed=3)
    refused(world, ModelError, "is no longer the model that lora started from", run)
    # its adapter belongs on that model, whatever it is compared with
    refused(world, ModelError, "is no longer the model that lora started from", run, against=world / "runs/dpo")


def test_the_same_start_in_another_precision_is_the_same(world: Path) -> None:
    train(world, "bf16", model={"dtype": "bf16"}, train={"max_steps": 1})
    found = compare(world, "dpo", "bf16").figures
    assert "Precisions differ: dpo float32, bf16 bfloat16." in found["budget"]["sentences"]


# ---- the rows -------------------------------------------------------------------------------------------------------


def test_rows_that_any_run_trained_on_are_left_out_and_counted(world: Path, tmp_path: Path) -> None:
    split = {"eval_path": None, "validation_rows": 12}
    one, other = (train(world, f"split-{s}", data=split, train={"seed": s}) for s in (0, 1))
    kept, left = set(), set()
    for folder in (one, other):
        held = {t.prompt for t in read_runs([folder], None)[0].data.rows.datasets[1].trees}
        left, kept = (held, held) if not kept else (left, kept & held)
    found = compare(world, "split-0", "split-1", output=tmp_path)
    assert found.figures["prompts"] == len(kept) and found.figures["left_out"] == 12 - len(kept) > 0
    assert f"Left out: {12 - len(kept)} rows whose prompts a compared run was trained on." in found.figures["notes"]
    assert {json.loads(x)["prompt"] for x in (tmp_path / "comparison.jsonl").open()} == kept
    whole = train(world, "whole", data={"path": str(world / "valid.jsonl"), "eval_path": str(world / "train.jsonl")})
    refused(world, DataError, "every prompt there is one that a compared run was trained on", "dpo", whole)


def test_what_the_start_was_trained_on_is_not_held_out(world: Path, tmp_path: Path) -> None:
    seen = write_jsonl(tmp_path / "seen.jsonl", ROWS[:30])
    sft = train(world, "sft", loss={"name": "sft"}, data={"path": seen, "eval_path": None}, train={"max_steps": 1})
    start = next((sft / "checkpoints").glob("step-*")) / "model"
    after = train(world, "after", model={"path": str(start)}, train={"max_steps": 1})
    found = compare(world, str(after)).figures
    assert found["left_out"] == 6 and found["prompts"] == 10


def test_data_that_has_changed_is_refused(world: Path, tmp_path: Path) -> None:
    shutil.copy(world / "train.jsonl", tmp_path / "train.jsonl")
    run = train(world, "gone", data={"path": str(tmp_path / "train.jsonl")}, train={"max_steps": 1})
    write_jsonl(tmp_path / "train.jsonl", ROWS[5:24])
    refused(world, CheckpointError, "no longer holds the rows that gone was trained on", run)
    test = write_jsonl(tmp_path / "test.jsonl", ROWS[24:])
    found = compare(world, str(run), data=test)
    assert any("The training data of gone cannot be read" in n for n in found.figures["notes"])


def test_validation_rows_that_chose_a_checkpoint_are_said(world: Path, tmp_path: Path) -> None:
    run = train(world, "chosen", evaluation={"every": 1}, checkpoint={"every": 1, "mode": "max", "keep_last": 4})
    assert [r.step for s in (None, "best", "last", "1") for r in read_runs([run], s)] == [1, 1, 2, 1]
    said = "The checkpoints of chosen were chosen by held-out rows such as these"
    assert any(said in n for n in compare(world, str(run)).figures["notes"])
    assert not any(said in n for n in compare(world, str(run), step="last").figures["notes"])
    test = write_jsonl(tmp_path / "test.jsonl", [*ROWS[36:], *({**r, "prompt": "New. " + r["prompt"]} for r in ROWS)])
    notes = compare(world, str(run), data=test).figures["notes"]
    assert "4 of the test rows are held-out rows by which checkpoints were chosen." in notes
    refused(world, CheckpointError, "no such checkpoint; there are step-1, step-2", run, step=7)
    assert not any("were chosen by" in n for n in compare(world, "lora").figures["notes"])
    refused(world, ConfigError, "'first' is not a step", "dpo", step="first")


# ---- the test set ---------------------------------------------------------------------------------------------------


def test_every_reading_of_a_test_set_is_written_down_and_shown(world: Path, tmp_path: Path) -> None:
    test = Path(write_jsonl(tmp_path / "test.jsonl", ROWS[:4] + [{**r, "prompt": "Now. " + r["prompt"]} for r in ROWS]))
    first = compare(world, "dpo", data=test, output=tmp_path / "a")
    assert "read for the first time" in first.to_text() and first.figures["left_out"] == 4
    assert first.figures["test_readings_before"] == 0
    # with other runs, output or name, the rows are the same
    renamed = test.rename(tmp_path / "final.jsonl")
    second = compare(world, "ipo", data=renamed, output=tmp_path / "b").to_text()
    today = json.loads((tmp_path / "test_readings.jsonl").read_text().splitlines()[0])["time"][:10]
    assert f"This test set has been read once before, first on {today} for dpo: what is chosen by it" in second
    write_jsonl(renamed, [*(json.loads(x) for x in renamed.open()), {**ROWS[0], "prompt": "One more"}])
    third = compare(world, "lora", data=renamed, output=tmp_path / "b").to_text()
    assert "read once before" in third and "(1 of them with other rows in the file)" in third
    rows = [json.loads(x) for x in (tmp_path / "test_readings.jsonl").read_text().splitlines()]
    assert [r["runs"] for r in rows] == [["dpo"], ["ipo"], ["lora"]]
    assert rows[0]["checkpoints"]["dpo"].endswith("step-2/model") and rows[1]["output"] == str(tmp_path / "b")
    fourth = compare(world, "dpo", data=renamed, output=tmp_path / "b").to_text()
    assert f"has been read 2 times before, first on {today} for ipo, last on {today} for lora" in fourth
    other = write_jsonl(tmp_path / "other.jsonl", ROWS[30:])
    assert "first time" in compare(world, "dpo", data=other).to_text()
    (tmp_path / "test_readings.jsonl").write_text("{}\n")
    refused(world, DataError, "test_readings.jsonl:1: is not a reading", "dpo", data=renamed)


def test_a_reading_that_cannot_be_written_down_does_not_happen(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = write_jsonl(tmp_path / "test.jsonl", ROWS[24:])
    (tmp_path / "test_readings.jsonl").mkdir()
    refused(world, DataError, "nobody would know that the test set was read", "dpo", data=test, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    refused(world, DataError, "no such file", "dpo", data=tmp_path / "missing.jsonl")
    # recorded before the figures, so that a crash never leaves figures of an unrecorded use
    (tmp_path / "test_readings.jsonl").rmdir()
    monkeypatch.setattr("penchant.compare.comparison.write_files", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare(world, "dpo", data=test, output=tmp_path / "out")
    assert len((tmp_path / "test_readings.jsonl").read_text().splitlines()) == 1


def test_without_data_nothing_is_a_reading(world: Path) -> None:
    found = compare(world, "dpo")
    assert found.figures["test_readings_before"] is None and not list(world.rglob("test_readings.jsonl"))


# ---- budgets --------------------------------------------------------------------------------------------------------


def test_budgets_are_compared_from_the_runs_own_files(world: Path) -> None:
    found = compare(world, "dpo", "ipo", "rloo").figures
    said = found["budget"]["sentences"]
    assert "Optimizer steps differ: dpo 2, ipo 4, rloo 2." in said
    assert "Rows seen in training differ: dpo 12, ipo 24, rloo 12." in said
    assert "Completions written in training differ: dpo 0, ipo 0, rloo 24." in said
    assert any(s.startswith("Tokens computed in training differ: dpo ") for s in said)
    assert not any("data differs" in s for s in said)  # rloo uses the prompts of the same rows
    assert "The budgets are not equal:" in found["notes"]
    same = compare(world, "dpo", "dpo-seed-1").figures
    assert same["budget"]["equal"] and same["notes"][0].startswith("Equal budgets")
    assert compare(world, "dpo", "ipo", step="2").figures["budget"]["equal"]  # up to that step they are


def test_other_rows_are_said(world: Path, tmp_path: Path) -> None:
    fewer = write_jsonl(tmp_path / "fewer.jsonl", ROWS[8:24])
    train(world, "fewer", data={"path": fewer})
    said = str(compare(world, "dpo", "fewer").figures["budget"]["sentences"])
    assert "dpo was trained on 24 prompts, fewer on 16, and 16 are the same" in said
    answers = write_jsonl(tmp_path / "answers.jsonl", [{**r, "chosen": r["chosen"] + "!"} for r in ROWS[:24]])
    train(world, "answers", data={"path": answers})
    assert "the same prompts with other answers" in str(compare(world, "dpo", "answers").figures["budget"]["sentences"])


def test_an_unfinished_run_is_said(world: Path, tmp_path: Path) -> None:
    run = copied(world, tmp_path, loss={"beta": 0.2})
    edit(run, lambda m: m.update(status="stopped"))
    assert "copy did not finish: it stopped at step 2." in compare(world, run.as_posix()).figures["notes"][1]


def test_five_per_cent_are_no_difference() -> None:
    values = (100, 800, 0, 1e5, 1e-4, 0.1, 0.0, 1e6, "cosine", "auto", "float32")
    one = dict(zip((*NUMBERS, *WORDS), values, strict=True))
    assert budget_sentences({"a": [one], "b": [{**one, "steps": 105, "tokens": 1.05e5}]}) == []
    assert budget_sentences({"a": [one], "b": [{**one, "steps": 106}]}) == ["Optimizer steps differ: a 100, b 106."]
    assert budget_sentences({"a": [one, {**one, "steps": 50}]}) == [
        "Optimizer steps differ among the seeds of a: 100, 50."
    ]
    said = budget_sentences({"a": [one], "b": [{**one, "peak_lr": 3e-4, "schedule": "linear", "template": "plain"}]})
    assert said == [
        "Peak learning rates differ: a 0.0001, b 0.0003.",
        "Learning-rate schedules differ: a cosine, b linear.",
        "Prompt templates differ: a auto, b plain.",
    ]


# ---- user errors ----------------------------------------------------------------------------------------------------


def test_mistakes_are_sentences(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path / "nothing")]) == 2
    assert "no such run; give a folder that penchant train has written" in capsys.readouterr().err
    refused(world, CheckpointError, "is not a run", tmp_path)
    shutil.copytree(world / "runs/dpo", tmp_path / "hh/dpo")
    (tmp_path / "hh/pipeline.json").write_text("{}")
    refused(world, CheckpointError, "is a pipeline: give its stages, such as .*hh/dpo", tmp_path / "hh")
    refused(world, ConfigError, "'nice' is not a reward", "dpo", reward="nice")
    refused(world, ConfigError, "prompts: is 0; give at least 1", "dpo", prompts=0)
    refused(world, ConfigError, "beyond start's context of 256", "dpo", max_new_tokens=400)
    (tmp_path / "file").write_text("")
    refused(world, CheckpointError, "output is a file", "dpo", output=tmp_path / "file")
    (tmp_path / "hh/dpo/manifest.json").write_text("5")
    refused(world, CheckpointError, "manifest.json: is not a run's manifest", tmp_path / "hh/dpo")
    (tmp_path / "hh/dpo/manifest.json").write_text("{")
    refused(world, CheckpointError, "manifest.json: cannot be read", tmp_path / "hh/dpo")
    assert main(["compare"]) == 2
    assert "no run is given" in capsys.readouterr().err


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "comparison.jsonl"
    write_text_atomically(path, "old\n")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text_atomically(path, "new\n")
    assert path.read_text() == "old\n"


def test_flags_stand_in_the_figures_and_are_read_out(world: Path, tmp_path: Path) -> None:
    result = compare(world, "dpo", reward=f"{world}/rewards.py:vowels", output=tmp_path)
    kept = json.loads((tmp_path / "comparison.json").read_text())["flags"]
    assert {f["name"] for f in kept} >= {"few_prompts", "one_seed"}  # 12 prompts, one seed
    for flag in kept:
        assert flag["sentence"] in result.to_text()


def test_a_run_without_its_manifest_is_told_what_it_lacks(world: Path, tmp_path: Path) -> None:
    half = copied(world, tmp_path)
    (half / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        api.compare(half, output=tmp_path / "out")


def test_rows_without_answers_are_named_before_anybody_writes(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"prompt": r["prompt"]} for r in ROWS[24:]])
    api.compare(world / "runs" / "dpo", data=bare, prompts=12, max_new_tokens=4, output=tmp_path / "out")
    said = capsys.readouterr()
    text = said.out + said.err
    assert "neither a reward nor a held-out pair of answers. Give --reward" in text


def test_runs_that_train_other_adapters_on_have_no_common_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their base model is."""
    from types import SimpleNamespace

    from penchant.compare import runs

    def run(name: str, adapter: str | None) -> Any:
        path = None if adapter is None else tmp_path / adapter
        if path is not None:
            path.mkdir(exist_ok=True)
            (path / "adapter_model.safetensors").write_text(adapter)
        model = SimpleNamespace(adapter=None if path is None else str(path))
        manifest = {"model": {"sha256": "same"}, "hardware": {"dtype": "float32"}}
        config = SimpleNamespace(model=model)
        data = SimpleNamespace(config=config)
        return SimpleNamespace(name=name, folder=tmp_path / name, manifest=manifest, config=config, data=data, seed=0)

    monkeypatch.setattr(runs, "start_sha256", lambda _: "same")
    assert runs.common_start([run("one", "a"), run("two", "a")]).adapter == tmp_path / "a"
    assert runs.common_start([run("one", None), run("two", None)]).adapter is None
    for other in ("b", None):
        with pytest.raises(ConfigError, match="start from different weights"):
            runs.common_start([run("one", "a"), run("two", other)])
