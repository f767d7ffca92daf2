"""Realistic Axolotl and ms-swift files: every key is reported, and the result can be planned if its data exists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from sight import paint
from tiny import tiny_model_folder, write_jsonl

from penchant import api
from penchant.config import load_config
from penchant.errors import ConfigError
from penchant.importers import import_config
from penchant.importers.command import read_command

FILES = Path(__file__).parent / "files"
WORDS = ["red", "green", "blue", "white", "black", "gray", "pink", "brown"]


def _turns(word: str, *roles: str, who: str = "role", what: str = "content") -> list[dict[str, str]]:
    return [{who: role, what: f"{word} {i}"} for i, role in enumerate(roles)]


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# the rows that the files name
ROWS: dict[str, Any] = {
    "instructions": lambda w: {"instruction": f"Say {w}.", "input": "", "output": w},
    "chats": lambda w: {"conversations": _turns(w, "human", "gpt", "human", "gpt", who="from", what="value")},
    "questions": lambda w: {"question": f"What is {w}?", "answer": w, "prompt": f"What is {w}?"},
    "compared": lambda w: {"conversation": _turns(w, "user"), "chosen": _answer(w), "rejected": _answer("no")},
    "judged": lambda w: {"question": f"Say {w}.", "reply": w, "good": len(w) > 3},
    "orca": lambda w: {"system": "Be brief.", "question": f"Say {w}.", "chosen": w, "rejected": "no"},
    "pairs": lambda w: {"prompt": f"Please {w}.", "chosen": w, "rejected": "no", "topic": "colors"},
    "inputs": lambda w: {"input": f"Say {w}.", "chosen": w, "rejected": "no"},
    "books": lambda w: {"body": f"All about {w}."},
    "swift_pairs": lambda w: {"messages": _turns(w, "user", "assistant"), "rejected_response": "no"},
    "swift_judged": lambda w: {"messages": _turns(w, "user", "assistant"), "label": len(w) > 3},
    "swift_queries": lambda w: {"query": f"Say {w}.", "response": w, "rejected_response": "no", "history": [["Hi", "Hello"]]},
    "chats_of_roles": lambda w: {"messages": _turns(w, "user", "assistant")},
    "prompts": lambda w: {"messages": None, "prompt": f"Say {w}.", "solution": w},
    "text": lambda w: {"text": f"All about {w}."},
}  # fmt: skip

# expected settings of each file, and its keys without a counterpart
WHOLE: dict[str, tuple[dict[str, Any], set[str]]] = {
    "axolotl_sft.yml": (
        {"loss.name": "sft", "train.batch_size": 8, "train.epochs": 4.0, "train.optimizer": "adamw_8bit", "lora.r": 32, "data.max_length": 4096,
         "lora.target_modules": "all-linear", "data.validation_fraction": 0.25, "data.truncation": "bad_row", "data.on_bad_row": "skip", "checkpoint.every": "epoch",
         "data.sources.0.shape": "alpaca", "data.sources.1.layout_options": {"turns": "all"}, "data.sources.1.columns": {"messages": "conversations"},
         "data.sources.2.path": "data/questions.jsonl", "data.sources.2.columns": {"prompt": "question", "completion": "answer"}},
        {"sample_packing", "lora_modules_to_save", "warmup_steps", "evals_per_epoch", "deepspeed", "datasets[2].shards"},
    ),
    "axolotl_dpo.yml": (
        {"loss.name": "dpo", "loss.beta": 0.3, "model.quantize": "nf4", "lora.rslora": True, "lora.target_modules": ["q_proj", "v_proj", "k_proj", "o_proj"],
         "data.shape": "sharegpt_pairs", "data.columns": {"conversations": "conversation"}, "data.eval_path": "data/compared_test.jsonl",
         "train.max_steps": 20, "train.warmup_fraction": 0.1, "train.min_lr_fraction": 0.1, "train.gradient_checkpointing": "offload",
         "logging.trackers": ["wandb"], "logging.project": "preferences", "logging.name": "dpo-1", "model.dtype": "bf16"},
        {"chat_template", "special_tokens.eos_token", "plugins"},
    ),
    "axolotl_kto.yml": (
        {"loss.name": "kto", "loss.beta": 0.2, "loss.desirable_weight": 0.5, "data.columns": {"prompt": "question", "completion": "reply", "label": "good"},
         "data.validation_rows": 2, "train.batch_size": 8, "train.warmup_fraction": 0.1, "checkpoint.every": 5, "train.seed": 7,
         "data.truncation": "prompt_then_completion", "model.dtype": "fp32", "train.schedule": "cosine"},
        set(),
    ),
    "axolotl_simpo.yml": (
        {"loss.name": "simpo", "loss.beta": 2.0, "loss.gamma": 1.0, "loss.nll_weight": 0.0, "logging.trackers": ["tensorboard"], "train.warmup_fraction": 0.03,
         "data.sources.0.shape": "orca_pairs", "data.sources.1.shape": "pairs", "train.seed": 42},
        set(),
    ),
    "axolotl_orpo.yml": ({"loss.name": "orpo", "loss.beta": 0.1, "data.shape": "pairs", "train.schedule": "linear"}, {"chat_template"}),
    "axolotl_reward.yml": (
        {"algorithm.name": "reward_model", "data.shape": "orca_pairs", "evaluation.every": "epoch"}, {"chat_template"},
    ),
    "axolotl_grpo.yml": (
        {"algorithm.name": "grpo", "algorithm.samples": 4, "algorithm.beta": 0.001, "algorithm.max_new_tokens": 64, "algorithm.loss_mean": "constant",
         "algorithm.temperature": 0.7, "train.batch_size": 4, "reward": {"rewards.py:short": 2.0}, "train.max_steps": 10},
        {"trl.rollout_func", "datasets[0].type"},
    ),
    "axolotl_text.yml": (
        {"loss.name": "sft", "data.shape": "text", "data.columns": {"text": "body"}, "train.schedule": "constant", "train.warmup_fraction": 0.0}, set(),
    ),
    "swift_dpo.sh": (
        {"loss.name": "dpo", "loss.beta": 0.2, "loss.nll_weight": 0.1, "train.batch_size": 8, "train.lr": 1e-5, "lora.r": 8, "lora.target_modules": "all-linear",
         "data.sources.0.limit": 6, "data.sources.1.path": "data/pairs.jsonl", "data.validation_fraction": 0.25, "train.weight_decay": 0.1,
         "train.adam_beta2": 0.95, "model.dtype": "fp32", "checkpoint.keep_last": 2, "data.on_bad_row": "skip"},
        {"deepspeed", "system"},
    ),
    "swift_sft.yaml": (
        {"loss.name": "sft", "lora": None, "data.eval_path": "data/chats_of_roles_test.jsonl", "train.batch_size": 8, "evaluation.every": "epoch",
         "data.truncation": "prompt_then_completion", "logging.trackers": ["tensorboard"], "train.schedule": "cosine"},
        {"report_to", "neftune_noise_alpha"},
    ),
    "swift_kto_args.json": (
        {"loss.name": "kto", "loss.desirable_weight": 1.5, "train.batch_size": 16, "train.epochs": 1.0, "train.gradient_checkpointing": True,
         "lora.r": 8, "data.path": "data/swift_judged.jsonl", "evaluation.every": "epoch", "train.lr": 5e-5},
        {"eval_strategy"},
    ),
    "swift_grpo.sh": (
        {"algorithm.name": "grpo", "algorithm.samples": 4, "algorithm.beta": 0.01, "algorithm.clip_high": None, "algorithm.dynamic_sampling": 3,
         "algorithm.overlong_filter": True, "algorithm.temperature": 0.9, "algorithm.loss_mean": "token", "train.batch_size": 2, "lora": None,
         "reward": {"accuracy": 1.0, "plugin.py:brief": 0.5}, "train.lr": 1e-6},
        {"external_plugins"},
    ),
    "swift_simpo.yaml": (
        {"loss.name": "simpo", "loss.beta": 2.0, "loss.gamma": 1.0, "loss.nll_weight": 0.5, "model.quantize": "nf4", "train.batch_size": 16, "train.lr": 1e-4,
         "data.columns": {"ignored": "topic"}, "lora.dropout": 0.05},
        set(),
    ),
    "swift_rm.sh": ({"algorithm.name": "reward_model", "algorithm.centring": 0.01, "train.batch_size": 16}, set()),
    "swift_pt.sh": ({"loss.name": "sft", "train.batch_size": 16, "train.lr": 1e-5, "train.max_steps": 10}, {"packing", "deepspeed"}),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model, rows and rewards that the files refer to."""
    monkeypatch.chdir(tmp_path)
    tiny_model_folder(tmp_path / "models" / "tiny", chat=True)
    (tmp_path / "data").mkdir()
    for name, row in ROWS.items():
        rows = [{k: v for k, v in row(w).items() if v is not None} for w in WORDS]
        for path in (f"data/{name}.jsonl", f"data/{name}_test.jsonl"):
            write_jsonl(tmp_path / path, rows)
    short = "def {0}(prompts, completions, **more):\n    return [-len(c) for c in completions]\n"
    (tmp_path / "rewards.py").write_text(short.format("short"))
    (tmp_path / "plugin.py").write_text(short.format("brief"))
    return tmp_path


def _leaves(values: Mapping[str, Any]) -> Iterator[str]:
    """Every key of a file, including those of its data sets and sections."""
    for key, value in values.items():
        yield key
        if isinstance(value, Mapping) and key in ("trl", "special_tokens"):
            yield from (f"{key}.{inner}" for inner in value)
        elif key in ("datasets", "test_datasets") and isinstance(value[0], Mapping):
            yield from (f"{key}[{i}].{inner}" for i, entry in enumerate(value) for inner in entry)


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_every_key_has_its_line_and_means_the_same(tmp_path: Path, name: str) -> None:
    wanted, left = WHOLE[name]
    path = FILES / name
    theirs = read_command(path).values if path.suffix == ".sh" else yaml.safe_load(path.read_text())
    made = import_config(path)
    assert made.translation.source.name == ("axolotl" if name.startswith("axolotl") else "ms-swift")
    lines = made.translation.lines
    accounted = {k for line in lines for k, _ in line.theirs}
    accounted |= {k.partition(".type.")[0] + ".type" for k in accounted if ".type." in k}
    assert set(_leaves(theirs)) - {"trl", "special_tokens"} <= accounted
    assert {k for line in lines if line.is_set and line.status == "unsupported" for k, _ in line.theirs} == left
    assert made.unsupported == len(left)
    (tmp_path / "ours.yaml").write_text(made.yaml)
    whole: Any = load_config(tmp_path / "ours.yaml").model_dump(mode="json")
    for key, value in wanted.items():
        found = whole
        for part in key.split("."):
            found = found[int(part)] if part.isdigit() else found[part]
        assert found == value, key


FIRST = ("axolotl_simpo.yml", "swift_dpo.sh")


@pytest.mark.parametrize("name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.slow) for n in sorted(WHOLE)])
def test_where_its_data_is_it_can_be_planned(place: Path, name: str) -> None:
    """Every row of the file's data is read with the config's layout."""
    made = import_config(FILES / name)
    (place / "ours.yaml").write_text(made.yaml)
    here = ["quantize=none", "dtype=fp32"]
    more = ["train.optimizer=adamw", "logging.trackers=[]", "train.gradient_checkpointing=false", "data.max_length=128"]
    plan = api.plan(place / "ours.yaml", *(f"model.{k}" for k in here), *more, probe=False)
    assert plan.rows["train"].used and not any(rows.aside for rows in plan.rows.values())


def test_rows_of_a_pair_are_a_conversation_and_what_was_worse(place: Path) -> None:
    from penchant.data.load import load_preferences

    for name, prompt in (("swift_pairs", ["red 0"]), ("swift_queries", ["Hi", "Hello", "Say red."])):
        found = load_preferences(f"data/{name}.jsonl")
        tree = found.trees[0]
        assert (found.shape, found.accepted) == ("swift_pairs", len(WORDS))
        assert [m if isinstance(m, str) else m.content for m in tree.prompt] == prompt
        assert tree.completions[1].text == "no"


def test_defaults_of_ms_swift_that_its_trainers_change(place: Path) -> None:
    common = {"model": "m", "use_hf": True, "dataset": "data/prompts.jsonl", "max_length": 64, "output_dir": "o"}
    for method, more, wanted in (
        ("grpo", {"reward_funcs": ["accuracy"], "per_device_train_batch_size": 8, "global_world_size": 2},
         {"algorithm.top_p": 0.9, "algorithm.top_k": 50, "train.batch_size": 2}),
        ("gkd", {"teacher_model": "t"}, {"algorithm.top_p": 0.9, "algorithm.top_k": 50, "train.batch_size": 16}),
        ("ppo", {"reward_model": "r", "per_device_train_batch_size": 2}, {"algorithm.top_k": 0, "train.batch_size": 16}),
    ):  # fmt: skip
        (place / "theirs.yaml").write_text(yaml.safe_dump({**common, "rlhf_type": method, **more}))
        made = import_config(place / "theirs.yaml")
        (place / "ours.yaml").write_text(made.yaml)
        found: Any = load_config(place / "ours.yaml").model_dump(mode="json")
        for key, value in wanted.items():
            section, name = key.split(".")
            assert found[section][name] == value, (method, key)


def test_warm_up_of_axolotl_and_a_switch_that_is_off(place: Path) -> None:
    """A switch that is off leaves a setting to the other key; a default warm-up has at most 100 steps."""
    theirs = {"base_model": "models/tiny", "datasets": [{"path": "data/instructions.jsonl", "type": "alpaca"}]}
    more = {
        "micro_batch_size": 1,
        "gradient_checkpointing": True,
        "activation_offloading": False,
        "learning_rate": 1e-5,
    }
    for steps, warmup, told in (
        ({"warmup_steps": 0}, 0.0, False),
        ({}, 0.03, True),
        ({"max_steps": 1000}, 0.03, False),
        ({"max_steps": 10_000}, 0.01, False),
    ):
        values = {**theirs, **more, **steps, "output_dir": "o"}
        (place / "theirs.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        made = import_config(place / "theirs.yaml")
        (place / "ours.yaml").write_text(made.yaml)
        train = load_config(place / "ours.yaml").train
        assert (train.warmup_fraction, train.gradient_checkpointing) == (warmup, True)
        assert ("100 steps" in made.yaml) == ("100 steps" in made.text) == told
    kwargs = {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "low"}}
    (place / "theirs.yaml").write_text(yaml.safe_dump(theirs | more | kwargs))
    with pytest.raises(ConfigError, match="lr_scheduler_kwargs: 'low' is not a number"):
        import_config(place / "theirs.yaml")


def _swift(folder: Path, **values: Any) -> Any:
    (folder / "theirs.yaml").write_text(yaml.safe_dump({"model": "m", "use_hf": True, "max_length": 64} | values))
    made = import_config(folder / "theirs.yaml")
    (folder / "ours.yaml").write_text(made.yaml)
    return made, load_config(folder / "ours.yaml")


@pytest.mark.parametrize("method", ["", "kto", "grpo"])
def test_rows_of_ms_swift_are_shuffled_unless_both_switches_are_off(place: Path, method: str) -> None:
    more = {"rlhf_type": method} if method else {}
    more |= {"reward_funcs": ["accuracy"]} if method == "grpo" else {}
    for once, again, shuffled in ((None, None, True), (False, None, True), (True, False, True), (False, False, False)):
        switches = {"dataset_shuffle": once, "train_dataloader_shuffle": again}
        made, config = _swift(place, dataset=["data/instructions.jsonl"], **switches, **more)
        assert config.train.shuffle == shuffled
        assert ("a new one in each epoch" in made.text) == (again is False and shuffled)


def test_what_rows_of_ms_swift_hold_is_looked_at(place: Path) -> None:
    """No argument says whether all answers are trained on, or whether a vision model is needed."""
    for name, more, options in (
        ("chats_of_roles", {}, {"turns": "all"}),
        ("chats_of_roles", {"loss_scale": "last_round"}, {}),
        ("instructions", {"loss_scale": "default"}, {}),
    ):
        made, config = _swift(place, dataset=[f"data/{name}.jsonl"], **more)
        assert (config.data.layout_options, config.model.vision, made.unsupported) == (options, "off", 0)
    made, config = _swift(place, dataset=["data/chats_of_roles.jsonl", "data/instructions.jsonl"])
    assert config.data.layout_options == {} and "layout_options={turns: all}" in made.yaml
    assert "layout_options={turns: all}" in _swift(place, dataset=["owner/chats"])[0].yaml


@pytest.mark.parametrize("method", ["", "dpo"])
def test_pictures_of_ms_swift(place: Path, method: str) -> None:
    from penchant.data.load import load_preferences

    paint(place / "data" / "a.png", 0)
    asked = {"role": "user", "content": "<image>What is it?"}
    rows = [{"messages": [asked, _answer(w)], "rejected_response": "no", "pics": ["a.png"]} for w in WORDS]
    rows = rows if method else [{k: v for k, v in row.items() if k != "rejected_response"} for row in rows]
    write_jsonl(place / "data" / "seen.jsonl", rows)
    more = {"rlhf_type": method} if method else {}
    for frozen, vision in ((True, "frozen"), (False, "trained")):
        eyes = {"freeze_vit": frozen, "freeze_aligner": frozen, "freeze_llm": False, "columns": {"pics": "images"}}
        made, config = _swift(place, dataset="data/seen.jsonl", **eyes, **more)
        assert (config.model.vision, config.data.columns, made.unsupported) == (vision, {"images": "pics"}, 0)
        found = load_preferences(str(config.data.path), columns=config.data.columns, image_dir="")
        assert [len(t.images) for t in found.trees] == [1] * len(WORDS)


def test_a_processor_of_axolotl_means_pictures(place: Path) -> None:
    values = {"base_model": "m", "datasets": [{"path": "data/chats_of_roles.jsonl", "type": "chat_template"}]}
    for more, vision in (
        ({}, "off"),
        ({"processor_type": "AutoProcessor"}, "trained"),
        ({"processor_type": "AutoProcessor", "adapter": "lora", "lora_target_modules": ["q_proj"]}, "frozen"),
    ):
        (place / "theirs.yaml").write_text(yaml.safe_dump({**values, **more, "sequence_len": 64}))
        made = import_config(place / "theirs.yaml", "axolotl")
        (place / "ours.yaml").write_text(made.yaml)
        assert load_config(place / "ours.yaml").model.vision == vision and made.unsupported == 0
        assert "path: data/chats_of_roles.jsonl  # datasets[0].path" in made.yaml  # each key with its origin


@pytest.mark.parametrize(
    "script,what",
    [
        ("echo hello\n", "no command that trains"),
        ("swift sft --model a\nswift sft --model b\n", "2 commands that train"),
        ("swift sft --model $MODEL --dataset d.jsonl\n", "a variable that it does not set"),
        ("swift sft --model a --dataset $(cat names)\n", "--dataset is .*, or a shell"),
        ("swift sft --model a --max_length $(expr 8 / 0)\n", "--max_length is .*, or a shell"),
        ("swift sft demo.yaml\n", "without a name"),
        ("swift sft --model 'a\n", "cannot be understood"),
        ("swift sft --model a --dataset $(ls)\n", "or a shell"),
        ("swift sft --model a --dataset a `ls`\n", "or a shell"),
        ('swift sft --model a --dataset a "$@"\n', "or a shell"),
        ("A=x\n" + "A=$A$A$A$A\n" * 30 + "swift sft --dataset $B\n", "hold too much text"),
        ("#" * 300_000, "more than 256 kB"),
        (f"swift sft --config {'a' * 5000}\n", "cannot be read"),
    ],
)
def test_a_script_that_is_no_one_command_is_refused(tmp_path: Path, script: str, what: str) -> None:
    (tmp_path / "run.sh").write_text(script)
    with pytest.raises(ConfigError, match=what):
        import_config(tmp_path / "run.sh")


@pytest.mark.parametrize("sum_", ["$(expr 16 / $n)", "$(expr 2 \\* 4)", "$((16 / n))", "$((${n}+6))"])
def test_sums_of_a_script_are_computed_as_the_shell_does_it(tmp_path: Path, sum_: str) -> None:
    """ms-swift's example scripts use `--gradient_accumulation_steps $(expr 16 / $nproc_per_node)`."""
    (tmp_path / "run.sh").write_text(f"n=2\nswift sft --model a --gradient_accumulation_steps {sum_} --max_length 64\n")
    assert read_command(tmp_path / "run.sh").values == {
        "model": "a",
        "gradient_accumulation_steps": 8,
        "max_length": 64,
    }


@pytest.mark.parametrize("end", ["; rm -rf y", "|tee log", "&", "&& echo", " > log 2>&1 &", " 2>&1 | tee log"])
def test_what_ends_a_command_is_no_value(tmp_path: Path, end: str) -> None:
    script = f"cd x; NPROC_PER_NODE=² swift sft --model a --dataset 'd.jsonl#5'{end}\n"
    (tmp_path / "run.sh").write_text("\ufeff" + script, encoding="utf-8")
    made = import_config(tmp_path / "run.sh")
    assert made.translation.values["dataset"] == "d.jsonl#5" and made.unsupported == 0


def test_a_launcher_says_how_many_processes_there_are(tmp_path: Path) -> None:
    command = "trl dpo --model_name_or_path a/b --dataset_name d.jsonl --per_device_train_batch_size 2\n"
    (tmp_path / "run.sh").write_text("accelerate launch --num_processes 4 " + command)
    assert "batch_size: 8 " in import_config(tmp_path / "run.sh").yaml


@pytest.mark.parametrize(
    "line,said",
    [
        (f"eval_steps: {'9' * 4000}", "is not a number"),
        ("eval_steps: .inf", "is not a whole number"),
        ("1.5: x", "has the key 1.5"),
        (f"datasets: [{{path: {'x' * 3000}, type: alpaca}}]", "model.path|path"),
    ],
)
def test_odd_values_end_in_a_sentence(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "a.yml").write_text(f"base_model: a/b\nsequence_len: 8\n{line}\n")
    try:
        text = import_config(tmp_path / "a.yml", overrides=["data.path=d.jsonl"]).text
    except ConfigError as error:
        text = str(error)
    assert re.search(said, text)


def test_other_tools_commands_and_their_config_files(tmp_path: Path) -> None:
    """Command-line arguments override the config file that they name."""
    (tmp_path / "dpo.yaml").write_text("model_name_or_path: a/b\nbeta: 0.1\ndataset_name: rows.jsonl\n")
    (tmp_path / "run.sh").write_text("accelerate launch $(which trl) dpo --x\n")
    (tmp_path / "run.sh").write_text("trl dpo --config dpo.yaml --beta 0.4 # the best one\n")
    made = import_config(tmp_path / "run.sh")
    assert made.translation.method.title == "DPO" and "beta: 0.4" in made.yaml and "path: a/b" in made.yaml


def test_of_several_names_the_first_decides(tmp_path: Path) -> None:
    """trl.beta takes precedence over rl_beta; an empty key is not set."""
    values = {"base_model": "a/b", "rl": "dpo", "rl_beta": 0.5, "trl": {"beta": 0.25}, "micro_batch_size": None, "sequence_len": 64,
              "datasets": [{"path": "d.jsonl", "type": "chatml.ultra", "colour": "red", "split": None}], "learning_rate": "1e-5"}  # fmt: skip
    (tmp_path / "a.yml").write_text(yaml.safe_dump(values))
    made = import_config(tmp_path / "a.yml")
    assert "beta: 0.25" in made.yaml and "rl_beta: 0.5 (without effect there: trl.beta says it)" in made.text
    assert "micro_batch_size: None (not set)" in made.text and "datasets[0].colour: red" in made.text
    assert made.unsupported == 1


def test_hub_ids_are_told_from_files(tmp_path: Path) -> None:
    sets = [{"path": "owner/set", "type": "alpaca", "split": "train[:50]"}, {"path": "owner/other", "type": "alpaca", "split": "train[10%:]"},
            {"path": "s3://bucket/rows.parquet", "type": "alpaca"}, {"path": "owner/third", "type": "alpaca", "name": "main", "split": "test"}]  # fmt: skip
    values = {"base_model": "a/b", "sequence_len": 64, "micro_batch_size": 1, "datasets": sets}
    (tmp_path / "a.yml").write_text(yaml.safe_dump(values))
    made = import_config(tmp_path / "a.yml")
    places = [(s["path"], s.get("limit")) for s in yaml.safe_load(made.yaml)["data"]["sources"]]
    assert places == [("owner/set:train", 50), ("owner/other:train", None), ("owner/third:test", None)]
    left = {k for line in made.translation.lines if line.status == "unsupported" for k, _ in line.theirs}
    assert {"datasets[1].split", "datasets[2].path", "datasets[3].name"} <= left


def test_a_subset_and_where_a_hub_id_is_of(tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text(
        json.dumps({"model": "a/b", "dataset": ["HF::me/set:zh#10", "you/set"], "train_type": "full"})
    )
    made = import_config(tmp_path / "args.json")
    assert yaml.safe_load(made.yaml)["data"]["sources"] == [
        {"path": "me/set:train", "limit": 10},
        {"path": "you/set:train"},
    ]
    assert "the subset zh is not read" in made.text and "ModelScope's there" in made.text


def test_conversations_that_are_read_in_another_way_are_reported(tmp_path: Path) -> None:
    """Unknown roles and field names of turns, other trained turns, and prompt formats."""
    chats = {"path": "a.jsonl", "type": "chat_template", "field_messages": "talk"}
    sets = [
        {**chats, "roles": {"user": ["customer"], "assistant": ["agent"]}, "roles_to_train": ["user", "assistant"]},
        {**chats, "message_property_mappings": {"role": "speaker", "content": "text"}, "train_on_eos": "all"},
        {**chats, "roles_to_train": None, "message_field_training": "learn", "chat_template": "gemma"},
        {"path": "b.jsonl", "type": {"field_instruction": "q", "field_output": "a", "format": "Q: {instruction}", "system_prompt": ""}},
        {"path": "c.jsonl", "type": "context_qa"},
    ]  # fmt: skip
    values = {"base_model": "a/b", "sequence_len": 64, "micro_batch_size": 1, "datasets": sets}
    (tmp_path / "a.yml").write_text(yaml.safe_dump(values))
    made = import_config(tmp_path / "a.yml")
    left = {
        k for line in made.translation.lines if line.is_set and line.status == "unsupported" for k, _ in line.theirs
    }
    assert left == {
        "datasets[0].roles", "datasets[0].roles_to_train", "datasets[1].message_property_mappings", "datasets[1].train_on_eos",
        "datasets[2].message_field_training", "datasets[2].chat_template", "datasets[3].type.format", "datasets[4].type",
    }  # fmt: skip
    sources = yaml.safe_load(made.yaml)["data"]["sources"]
    assert [s.get("layout_options") for s in sources] == [{"turns": "all"}, {"turns": "all"}, None, None, None]
    assert sources[3] == {"path": "b.jsonl", "shape": "alpaca", "columns": {"instruction": "q", "output": "a"}}
    assert "datasets[2].roles_to_train" in made.text and "shape" not in sources[4]
