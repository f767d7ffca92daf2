"""`penchant init`: its configs load, plan and train unchanged; it asks only for what is missing, and overwrites nothing."""

from __future__ import annotations

import io
import os
import pty
import select
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from processes import forked
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.cli import main
from penchant.config import load_config, parse_yaml
from penchant.data.load import load_preferences
from penchant.errors import ConfigError, ModelError, PenchantError
from penchant.init import GOALS, _yaml_scalar, goals_for, look, propose, write_config
from penchant.init.ask import Asker, collect_answers
from penchant.init.look import DataFacts, ModelFacts, look_at_data, look_at_model
from penchant.metrics.stats import wilson
from penchant.runs import Run
from penchant.runs.parts import peak_lr

ROWS: dict[str, list[dict[str, Any]]] = {
    "pairs": [dict(r) for r in polite_rows(40)],
    "unpaired": [{"prompt": f"Q{i}", "completion": f" answer {i}", "label": i % 2 == 0} for i in range(40)],
    "scored": [{"prompt": f"Q{i // 2}", "completion": f" answer {i}", "score": i % 7 + 0.5} for i in range(80)],
    "prompts": [{"prompt": f"Question {i}?"} for i in range(40)],
    "sft": [{"prompt": f"Q{i}", "completion": f" answer {i}"} for i in range(40)],
    "text": [{"text": f"A document about {i}. " * 3} for i in range(40)],
}
SMALL = ["train.max_steps=1", "train.batch_size=4", "evaluation.samples=0", "evaluation.kl_prompts=0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


# each kind of data and each way to train once; the other combinations are slow
BY_DEFAULT = {
    ("pairs", "dpo"), ("pairs", "reward"), ("unpaired", "kto"), ("scored", "simpo"), ("prompts", "rloo"), ("text", "sft"),
}  # fmt: skip
COMBINATIONS = [
    pytest.param(kind, goal.name, marks=() if (kind, goal.name) in BY_DEFAULT else (pytest.mark.slow,))
    for kind in ROWS
    for goal in goals_for(kind)
]


@pytest.mark.parametrize("kind,goal", COMBINATIONS)
def test_every_goal_trains_as_written(kind: str, goal: str, tmp_path: Path, model: str) -> None:
    """Every goal that is offered for a kind of data, since each kind serves a goal in a different way."""
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS[kind])
    file = tmp_path / "run.yaml"
    flags = ["--data", data, "--model", model, "--goal", goal, "--run-folder", str(tmp_path / "run")]
    assert main(["init", *flags, "--output", str(file)]) == 0
    config = load_config(file)
    assert str(config.data.path) == data and config.lora is None
    short = [*SMALL, "algorithm.max_new_tokens=3"] if GOALS[goal].online else SMALL
    plan = api.plan(file, *short, probe=False)
    assert plan.work.steps == 1 and plan.memory.fits
    assert api.train(file, *short, quiet=True).steps == 1


def test_every_goal_is_tried_and_every_kind_has_one() -> None:
    assert {(k, g.name) for k in ROWS for g in goals_for(k)} >= BY_DEFAULT
    assert {g.name for k in ROWS for g in goals_for(k)} == set(GOALS)
    assert goals_for("pairs")[0].name == "dpo" and goals_for("unpaired")[0].name == "kto"
    assert goals_for("prompts")[0].name == "ppo" and goals_for("sft")[0].name == goals_for("text")[0].name == "sft"


def test_each_key_has_a_reason_and_reads_back(tmp_path: Path, model: str) -> None:
    data = look_at_data(write_jsonl(tmp_path / "rows.jsonl", ROWS["pairs"]), model)
    text = propose(data, look_at_model(model), "dpo").to_yaml()
    keys = [line for line in text.splitlines() if line.startswith("  ")]
    assert keys and all("  # " in line for line in keys)
    values, _ = parse_yaml(text, "run.yaml")
    assert values["loss"] == {"name": "dpo", "beta": 0.1} and values["data"]["max_length"] == 128


def test_a_file_is_never_overwritten(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, file = write_jsonl(tmp_path / "rows.jsonl", ROWS["pairs"]), tmp_path / "run.yaml"
    file.write_text("mine")
    assert main(["init", "--data", data, "--model", model, "--goal", "dpo", "--output", str(file)]) == 2
    assert file.read_text() == "mine" and "never overwrites" in capsys.readouterr().err


def test_without_a_terminal_the_missing_flags_are_named(model: str) -> None:
    nobody = Asker(io.StringIO(), io.StringIO(), terminal=False)
    with pytest.raises(ConfigError, match="--data and --goal are not given") as told:
        collect_answers(nobody, None, model, None)
    assert "dpo|" in told.value.how


@pytest.mark.parametrize(
    "kind,goal,said",
    [
        ("prompts", "dpo", "with these rows: ppo, rloo, grpo"),
        ("pairs", "dop", "'dop' is not known; did you mean \"dpo\"?"),
        ("text", "kto", "sft"),
    ],
)
def test_a_goal_that_does_not_fit_is_refused(kind: str, goal: str, said: str, tmp_path: Path, model: str) -> None:
    data = look_at_data(write_jsonl(tmp_path / "rows.jsonl", ROWS[kind]), model)
    with pytest.raises(ConfigError, match=r".") as told:
        propose(data, look_at_model(model), goal)
    assert said in str(told.value)


def test_an_encoder_becomes_a_reward_model_alone(tmp_path: Path) -> None:
    data = DataFacts("d", "pairs", "pairs", 40, 0, 40, (9, 20, 30, 40), (5, 9, 9, 9), "tokens")
    encoder = ModelFacts("bert", 4_000_000, 512, encoder=True)
    assert propose(data, encoder, "reward").goal.name == "reward"
    with pytest.raises(ConfigError, match="is an encoder"):
        propose(data, encoder, "dpo")


def test_values_follow_data_model_and_machine() -> None:
    data = DataFacts("d", "pairs", "pairs", 4000, 3, 4000, (200, 700, 900, 1500), (100, 300, 400, 900), "tokens")
    small, huge = ModelFacts("m", 10**8, 2048), ModelFacts("m", 10**13, 2048)
    plain = propose(data, small, "dpo").sections
    assert plain["data"]["max_length"][0] == 768 and "lora" not in plain and plain["data"]["on_bad_row"][0] == "skip"
    assert plain["data"]["validation_rows"][0] == 200 and plain["train"]["batch_size"][0] == 32
    adapted = propose(data, huge, "dpo").sections
    assert adapted["lora"]["r"][0] == 16 and adapted["train"]["lr"][0] == plain["train"]["lr"][0] == "auto"
    assert propose(data, small, "dpo", lora=True).sections["lora"] and "5e-06" in plain["train"]["lr"][1]
    assert propose(data, ModelFacts("m", 10**8, 512), "dpo").sections["data"]["max_length"][0] == 512
    assert propose(data, small, "ppo").sections["data"]["max_length"][0] == 384  # for prompts alone
    few = DataFacts("d", "pairs", "pairs", 60, 0, 60, (9, 9, 9, 9), (9, 9, 9, 9), "tokens")
    assert propose(few, small, "dpo").sections["train"]["batch_size"][0] == 4


@given(st.one_of(st.text(), st.integers(), st.booleans(), st.floats(1e-12, 1e12)))
@example("\x85")
@example("a\u2028b")
def test_any_value_reads_back(value: Any) -> None:
    shown = _yaml_scalar(value)
    read, _ = parse_yaml(f"key: {shown}", "yaml")
    assert read["key"] == (pytest.approx(value, rel=0.06) if isinstance(value, float) else value)


def test_the_questions_are_asked_with_their_defaults(tmp_path: Path, model: str) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS["pairs"])
    screen = io.StringIO()
    typed = io.StringIO(f"{tmp_path}/nothing.jsonl\n{data}\n{model}\nkpo\n\n")
    found = collect_answers(Asker(typed, screen, terminal=True), None, None, None)
    assert found.goal == "dpo" and found.data.unit == "tokens"
    shown = screen.getvalue()
    assert (
        "no such file" in shown
        and "40 rows, pairs;" in shown
        and "Goal [dpo]" in shown
        and "'kpo' is not known" in shown
    )


def test_only_what_is_missing_is_asked(tmp_path: Path, model: str) -> None:
    data, screen = write_jsonl(tmp_path / "rows.jsonl", ROWS["unpaired"]), io.StringIO()
    found = collect_answers(Asker(io.StringIO("\n"), screen, terminal=True), data, model, None)
    assert found.goal == "kto" and "Data" not in screen.getvalue() and "Model (" not in screen.getvalue()


def test_wrong_answers_end(tmp_path: Path, model: str) -> None:
    typed = io.StringIO("nowhere.jsonl\n" * 9)
    with pytest.raises(PenchantError, match="no such file"):
        collect_answers(Asker(typed, io.StringIO(), terminal=True), None, model, "dpo")
    assert len(typed.read().splitlines()) == 6  # three tries
    with pytest.raises(ConfigError, match="the input ended"):
        collect_answers(Asker(io.StringIO(), io.StringIO(), terminal=True), None, model, "dpo")


def test_on_a_real_terminal(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS["pairs"])
    monkeypatch.chdir(tmp_path)
    leader, follower = pty.openpty()
    process = forked(lambda: main(["init"]), [follower] * 3)
    os.close(follower)
    shown = ""
    for question, answer in (("Data", ""), ("Model", model), ("Goal", "simpo"), ("next:", None)):
        shown += _until(leader, question)
        if answer is not None:
            os.write(leader, f"{answer}\n".encode())
    process.join(120)
    assert process.exitcode == 0
    os.close(leader)
    assert "[rows.jsonl]" in shown  # the one data file of the folder is the default
    assert load_config(tmp_path / "run.yaml").loss.name == "simpo"


def _until(terminal: int, text: str, seconds: float = 240.0) -> str:
    """Read a terminal's output until `text` appears."""
    seen, end = "", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 0.5)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


def _init(folder: Path, model: str, *flags: str) -> Any:
    """The data section that `penchant init` writes."""
    output = folder / "run.yaml"
    output.unlink(missing_ok=True)
    assert main(["init", "--model", model, "--goal", "dpo", "--output", str(output), *flags]) == 0
    return load_config(output).data


def test_held_out_rows_in_a_file_of_their_own(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS["pairs"])
    other = write_jsonl(tmp_path / "other.jsonl", [*ROWS["pairs"][:6], {"prompt": "x", "chosen": "y"}])
    section = _init(tmp_path, model, "--data", data, "--eval-data", other)
    assert (section.eval_path, section.validation_rows, section.on_bad_row) == (other, None, "skip")
    run = str(tmp_path / "run.yaml")
    assert api.train(run, *SMALL, f"output={tmp_path / 'run'}", quiet=True).model is not None
    labels = write_jsonl(tmp_path / "labels.jsonl", ROWS["unpaired"])
    for wrong, said in ((labels, "holds unpaired"), (data, "is the training data"), ("gone.jsonl", "no such file")):
        flags = ["--data", data, "--eval-data", wrong, "--output", str(tmp_path / "no.yaml")]
        assert main(["init", "--model", model, "--goal", "dpo", *flags]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "no.yaml").exists()


def test_the_next_command_of_data_get_works(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    copy, folder = write_jsonl(tmp_path / "copy.jsonl", ROWS["pairs"]), tmp_path / "a folder"
    get = ["data", "get", "mine", "--from", copy, "--split", "0.6,0.4,0", "--output", str(folder), "--quiet"]
    assert main(get) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if "penchant init" in line)
    words = shlex.split(command, comments=True)
    assert words[:2] == ["penchant", "init"] and "--eval-data" in words
    section = _init(tmp_path, model, *words[2:])
    assert section.path == str(folder / "train.jsonl") and section.eval_path == str(folder / "validation.jsonl")
    assert api.train(str(tmp_path / "run.yaml"), *SMALL, f"output={tmp_path / 'run'}", quiet=True).model is not None


def test_validation_rows_beside_are_proposed(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Only in a folder that `data get` wrote, since other files named validation.jsonl may be something else."""
    data = write_jsonl(tmp_path / "train.jsonl", ROWS["pairs"][:30])
    held_out = write_jsonl(tmp_path / "validation.jsonl", ROWS["pairs"][30:])
    assert _init(tmp_path, model, "--data", data).eval_path is None
    (tmp_path / "data.json").write_text("{}")
    capsys.readouterr()
    section = _init(tmp_path, model, "--data", data)
    assert section.eval_path == held_out and section.validation_rows is None
    assert f"held out: {held_out}, 10 rows" in capsys.readouterr().err
    section = _init(tmp_path, model, "--data", data, "--eval-data", "none")
    assert section.eval_path is None and section.validation_rows == 3
    Path(held_out).write_text("")
    assert _init(tmp_path, model, "--data", data).eval_path is None


@pytest.mark.parametrize(
    "goal,reward,said",
    [
        ("rloo", "sentimnt", "'sentimnt' is not a reward; did you mean sentiment?"),
        ("rloo", "mine.py:f", "mine.py: no such file"),
        ("rloo", "runs/gone", "runs/gone: no such folder"),
        ("rloo", "words:9-x", "words:9-x"),
        ("dpo", "sentiment", "dpo uses no reward"),
    ],
)
def test_a_reward_is_checked_at_once(
    goal: str, reward: str, said: str, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = write_jsonl(tmp_path / "rows.jsonl", ROWS["pairs"]), tmp_path / "run.yaml"
    flags = ["--data", data, "--model", model, "--goal", goal, "--output", str(output)]
    assert main(["init", *flags, "--reward", reward]) == 2
    assert said in capsys.readouterr().err and not output.exists()


def test_rewards_that_there_are(tmp_path: Path, model: str) -> None:
    (tmp_path / "mine.py").write_text("def f(prompts, completions):\n    return [0.0] * len(completions)\n")
    data = look_at_data(write_jsonl(tmp_path / "rows.jsonl", ROWS["pairs"]), model)
    for reward in ("sentiment", "words", "words:20-60", "matches:a", f"{tmp_path}/mine.py:f"):
        assert propose(data, look_at_model(model), "rloo", reward=reward).to_yaml()


def test_columns_of_ones_own(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"q": r["prompt"], "plus\u2028": r["chosen"], "minus": r["rejected"]} for r in ROWS["pairs"]]
    data, other = write_jsonl(tmp_path / "rows.jsonl", rows), write_jsonl(tmp_path / "other.jsonl", rows[:5])
    flags = ["--data", data, "--eval-data", other]
    assert main(["init", "--model", model, "--goal", "dpo", "--output", str(tmp_path / "run.yaml"), *flags]) == 2
    assert "--column prompt=q" in capsys.readouterr().err
    named = {"prompt": "q", "chosen": "plus\u2028", "rejected": "minus"}
    section = _init(tmp_path, model, *flags, *(f"--column={ours}={yours}" for ours, yours in named.items()))
    assert section.columns == named
    assert api.train(str(tmp_path / "run.yaml"), *SMALL, f"output={tmp_path / 'run'}", quiet=True).model is not None


@pytest.mark.parametrize("rows,held", [(40, 4), (60, 29), (100, 29), (400, 40), (4000, 200)])
def test_as_many_rows_are_held_out_as_a_verdict_needs(rows: int, held: int) -> None:
    data = DataFacts("d", "pairs", "pairs", rows, 0, rows, (9, 9, 9, 9), (9, 9, 9, 9), "tokens")
    start = propose(data, ModelFacts("m", 10**8, 512), "dpo")
    assert start.sections["data"]["validation_rows"][0] == held
    assert ("give no verdict" in start.remark) is (held < 29)
    # documents: one empty prompt
    text = DataFacts("d", "text", "text", rows, 0, 1, (9, 9, 9, 9), (0, 0, 0, 0), "tokens")
    assert propose(text, ModelFacts("m", 10**8, 512), "sft").sections["data"]["validation_rows"][0] == held
    # 70% of 29 pairs is distinguishable from chance, of 28 it is not
    assert wilson(int(0.7 * 29), 29).low > 0.5 >= wilson(int(0.7 * 28), 28).low


@pytest.mark.parametrize("goal", sorted(GOALS))
@pytest.mark.parametrize("lora", [False, True])
def test_the_rate_that_init_names_is_what_auto_gives(goal: str, lora: bool, tmp_path: Path, model: str) -> None:
    kind = GOALS[goal].kinds[0]
    data = look_at_data(write_jsonl(tmp_path / "rows.jsonl", ROWS[kind]), model)
    start = propose(data, look_at_model(model), goal, lora=lora)
    config = load_config(write_config(start, tmp_path / "run.yaml"), [f"output={tmp_path / 'run'}"])
    assert config.train.lr == "auto" and (config.lora is not None) is lora
    rows = Run(config, quiet=True).rows
    assert f"{peak_lr(config, rows, look_at_model(model).parameters or 0):g}" in start.sections["train"]["lr"][1]


def test_a_mistyped_model_is_met_before_the_data_is_read(tmp_path: Path, model: str) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS["pairs"])
    wrong = str(Path(model).parent / (Path(model).name + "l"))
    screen = io.StringIO()
    with pytest.raises(ModelError, match="no such folder; did you mean"):
        collect_answers(Asker(io.StringIO(), screen, terminal=False), data, wrong, "dpo")
    assert not screen.getvalue()


def test_rows_with_answers_are_checked_by_them(tmp_path: Path, model: str) -> None:
    """Also if the answers are numbers, which no demonstration is. The written config loads again."""
    for name, rows in (
        ("texts", [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(9)]),
        ("numbers", [{"question": f"{i}+1=", "answer": i + 1} for i in range(9)]),
    ):
        data = look_at_data(write_jsonl(tmp_path / f"{name}.jsonl", rows), model)
        start = propose(data, look_at_model(model), "grpo")
        assert data.rows == 9 and start.sections["reward"].keys() == {"accuracy"}
        assert load_config(write_config(start, tmp_path / f"{name}.yaml")).reward is not None


def test_no_more_rows_than_the_sample_are_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "SAMPLE", 4)
    dataset = load_preferences(write_jsonl(tmp_path / "rows.jsonl", polite_rows(7)))
    assert [len(look._lengths(dataset.subset(range(n)), None)[0]) for n in (0, 3, 4, 5, 7)] == [0, 3, 4, 4, 4]


def test_conversations_with_several_answers_are_learned_whole(tmp_path: Path, model: str) -> None:
    talk = [{"role": r, "content": f"{r} {i}"} for i in range(2) for r in ("user", "assistant")]
    rows = [{"messages": [{"role": "user", "content": f"Q{i}"}, *talk[1:]]} for i in range(12)]
    start = propose(look_at_data(write_jsonl(tmp_path / "a.jsonl", rows), model), look_at_model(model), "sft")
    assert start.sections["data"]["layout_options"][0] == {"turns": "all"}
    assert load_config(write_config(start, tmp_path / "run.yaml")).data.layout_options == {"turns": "all"}
    short = [{"messages": r["messages"][:2]} for r in rows]
    start = propose(look_at_data(write_jsonl(tmp_path / "b.jsonl", short), model), look_at_model(model), "sft")
    assert "layout_options" not in start.sections["data"]
