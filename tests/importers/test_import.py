"""Imported files: every key is reported, and the resulting config is equivalent and trains."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sight import paint
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.cli import build_parser, main
from penchant.config import RunConfig, config_from_mapping, load_config, parse_yaml
from penchant.data.load import load_preferences
from penchant.errors import ConfigError
from penchant.importers import SOURCES, Imported, import_config
from penchant.importers.rules import Untranslatable, translate

MODEL = {"model_name_or_path": "owner/model", "dataset_name": "train.jsonl", "output_dir": "out"}
LF = {"model_name_or_path": "owner/model", "dataset": "mine", "output_dir": "out"}

# (tool, method, their keys, expected settings)
FIXTURES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "trl_sft": (
        "trl", "sft",
        {**MODEL, "learning_rate": "2.0e-4", "num_train_epochs": 2, "packing": False, "dataset_text_field": "body", "eos_token": "<|im_end|>"},
        {"loss.name": "sft", "train.lr": 2e-4, "train.epochs": 2.0, "data.columns": {"text": "body"}, "data.max_length": 1024, "train.batch_size": 8},
    ),
    "trl_dpo": (
        "trl", "dpo",
        {**MODEL, "beta": 0.3, "loss_type": "sigmoid", "label_smoothing": 0.1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 6,
         "lr_scheduler_type": "cosine", "warmup_steps": 0.2, "use_peft": True, "lora_alpha": 8, "use_rslora": True, "lora_target_modules": "all-linear"},
        {"loss.name": "dpo", "loss.beta": 0.3, "loss.label_smoothing": 0.1, "train.batch_size": 12, "train.schedule": "cosine",
         "train.warmup_fraction": 0.2, "train.lr": 1e-6, "lora.alpha": 8.0, "lora.rslora": True, "lora.r": 16, "lora.target_modules": "all-linear", "train.epochs": 3.0},
    ),
    "trl_dpo_mix": (
        "trl", "auto",
        {**MODEL, "loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2], "sync_ref_model": True},
        {"loss.mix": [{"name": "dpo", "beta": 0.1, "label_smoothing": 0.0, "weight": 0.8}, {"name": "sft", "weight": 0.2}],
         "reference.sync_every": 512, "reference.sync_mixup": 0.6},
    ),
    "trl_f_dpo": (
        "trl", "auto", {**MODEL, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        {"loss.name": "f_dpo", "loss.divergence": "alpha", "loss.alpha": pytest.approx(0.3)},
    ),
    "trl_kto": ("trl", "auto", {**MODEL, "desirable_weight": 1.5, "fp16": True}, {"loss.name": "kto", "loss.desirable_weight": 1.5}),
    "trl_bco": ("trl", "bco", {**MODEL, "prompt_sample_size": 512}, {"loss.name": "bco", "train.lr": 5e-7}),
    "trl_orpo": ("trl", "orpo", {**MODEL, "beta": 0.2, "max_length": 512}, {"loss.name": "orpo", "loss.beta": 0.2, "data.max_length": 512}),
    "trl_simpo": (
        "trl", "auto", {**MODEL, "loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.8, "beta": 2.5},
        {"loss.name": "simpo", "loss.beta": 2.5, "loss.gamma": 0.8},
    ),
    "trl_cpo": ("trl", "cpo", {**MODEL, "loss_type": "sigmoid"}, {"loss.name": "cpo", "train.lr": 1e-6}),
    "trl_reward": (
        "trl", "auto", {**MODEL, "center_rewards_coefficient": 0.01, "max_steps": 40, "warmup_steps": 4},
        {"algorithm.name": "reward_model", "algorithm.centring": 0.01, "train.lr": 1e-4, "train.max_steps": 40, "train.warmup_fraction": 0.1},
    ),
    "trl_grpo": (
        "trl", "grpo",
        {**MODEL, "num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_iterations": 2,
         "steps_per_generation": 4, "reward_funcs": ["rewards.short", "think_format_reward"], "scale_rewards": False, "epsilon_high": 0.28},
        {"algorithm.name": "grpo", "algorithm.samples": 4, "train.batch_size": 8, "algorithm.minibatches": 2, "algorithm.epochs": 2,
         "algorithm.beta": 0.0, "algorithm.loss_mean": "token", "algorithm.scale_rewards": "none", "algorithm.max_new_tokens": 512,
         "algorithm.clip_high": 0.28, "reward": {"rewards.py:short": 1.0, "think_format": 1.0}},
    ),
    "trl_gspo": (
        "trl", "grpo",
        {**MODEL, "num_generations": 8, "reward_funcs": ["accuracy_reward"], "importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 3e-4,
         "mask_truncated_completions": True, "min_p": 0.1, "repetition_penalty": 1.1, "entropy_coef": 0.01, "delta": 1.5,
         "num_iterations": 2},
        {"algorithm.name": "gspo", "algorithm.loss_mean": "sequence", "algorithm.clip": 3e-4, "algorithm.clip_high": 3e-4, "algorithm.clip_dual": 1.5, "algorithm.epochs": 2,
         "algorithm.overlong_filter": True, "algorithm.min_p": 0.1, "algorithm.repetition_penalty": 1.1, "algorithm.entropy_coef": 0.01, "reward": {"accuracy": 1.0}},
    ),
    "trl_cispo": (
        "trl", "grpo",
        {**MODEL, "num_generations": 8, "reward_funcs": ["accuracy_reward"], "loss_type": "cispo", "epsilon_high": 5.0, "use_bias_correction_kl": True,
         "beta": 0.01, "use_peft": True, "load_in_4bit": True, "optim": "paged_adamw_8bit"},
        {"algorithm.name": "cispo", "algorithm.loss_mean": "token", "algorithm.clip_high": 4.0, "algorithm.kl_estimator": "unbiased", "model.quantize": "nf4",
         "train.optimizer": "paged_adamw_8bit"},
    ),
    "trl_gkd": (
        "trl", "auto", {**MODEL, "teacher_model_name_or_path": "owner/large", "lmbda": 0.7, "beta": 1.0},
        {"algorithm.name": "gkd", "train.lr": 2e-5, "reference.path": "owner/large", "algorithm.lambda": 0.7, "algorithm.divergence": "reverse_kl", "algorithm.temperature": 0.9},
    ),
    "trl_dft": ("trl", "sft", {**MODEL, "loss_type": "dft"}, {"loss.name": "dft"}),
    "trl_rloo": (
        "trl", "rloo", {**MODEL, "num_generations": 2, "reward_model_name_or_path": "runs/rm", "max_completion_length": 64},
        {"algorithm.name": "rloo", "algorithm.samples": 2, "train.batch_size": 4, "algorithm.max_new_tokens": 64, "reward": {"runs/rm": 1.0}},
    ),
    "trl_online_dpo": (
        "trl", "online_dpo", {**MODEL, "reward_model_path": "runs/rm", "beta": [0.2]},
        {"algorithm.name": "online_dpo", "algorithm.samples": 2, "algorithm.beta": 0.2, "algorithm.temperature": 0.9, "train.batch_size": 8},
    ),
    "trl_ppo": (
        "trl", "auto",
        {"sft_model_path": "owner/model", "reward_model_path": "runs/rm", "dataset_name": "me/prompts", "output_dir": "out", "total_episodes": 1000,
         "num_mini_batches": 2, "per_device_train_batch_size": 16, "kl_coef": 0.1},
        {"model.path": "owner/model", "algorithm.name": "ppo", "algorithm.beta": 0.1, "train.batch_size": 32, "algorithm.minibatches": 2,
         "train.max_steps": 32 * 4 * 2, "algorithm.adam_eps": 1e-8, "algorithm.value": "separate", "data.path": "me/prompts:train"},
    ),
    "lf_sft": (
        "llama-factory", "auto", {**LF, "stage": "sft", "finetuning_type": "full", "template": "qwen", "val_size": 0.1, "cutoff_len": 512, "plot_loss": True},
        {"loss.name": "sft", "data.validation_fraction": 0.1, "data.max_length": 512, "data.path": "data/mine.json", "train.batch_size": 8},
    ),
    "lf_dft": (
        "llama-factory", "auto",
        {**LF, "stage": "sft", "use_dft_loss": True, "use_muon": True, "quantization_bit": 4, "use_rslora": True},
        {"loss.name": "dft", "train.optimizer": "muon", "model.quantize": "nf4", "lora.rslora": True},
    ),
    "lf_dpo": (
        "llama-factory", "auto",
        {**LF, "stage": "dpo", "lora_rank": 4, "use_dora": True, "loraplus_lr_ratio": 16, "lora_target": "q_proj,v_proj", "pref_beta": 0.2, "pref_ftx": 0.1, "val_size": 50, "bf16": True},
        {"loss.name": "dpo", "loss.beta": 0.2, "loss.nll_weight": 0.1, "lora.r": 4, "lora.dora": True, "lora.lr_ratio": 16.0, "lora.alpha": 8.0, "lora.target_modules": ["q_proj", "v_proj"],
         "data.validation_rows": 50, "model.dtype": "bf16", "train.schedule": "linear", "train.warmup_fraction": 0.0, "data.max_length": 2048},
    ),
    "lf_simpo": ("llama-factory", "auto", {**LF, "stage": "dpo", "pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 1.2},
                 {"loss.name": "simpo", "loss.beta": 2.0, "loss.gamma": 1.2, "lora.r": 8}),
    "lf_kto": ("llama-factory", "auto", {**LF, "stage": "kto", "kto_rejected_weight": 1.3}, {"loss.name": "kto", "loss.undesirable_weight": 1.3}),
    "lf_rm": ("llama-factory", "auto", {**LF, "stage": "rm"}, {"algorithm.name": "reward_model"}),
    "lf_ppo": (
        "llama-factory", "auto", {**LF, "stage": "ppo", "reward_model": "runs/rm", "reward_model_type": "full", "max_new_tokens": 32, "top_p": 0.9},
        {"algorithm.kl_control": "adaptive", "algorithm.beta": 0.2, "algorithm.top_p": 0.9, "algorithm.top_k": 50, "algorithm.max_new_tokens": 32,
         "reward": "runs/rm"},
    ),
    "flat": (
        "auto", "auto",
        {"model_path": "m", "dataset_path": "d.jsonl", "loss_type": "dpo", "beta": 0.2, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05,
         "max_seq_length": 256, "batch_size": 4, "gradient_accumulation_steps": 4, "learning_rate": 5e-5, "epochs": 3, "chosen_column": "good"},
        {"model.path": "m", "data.path": "d.jsonl", "loss.beta": 0.2, "lora.r": 8, "lora.dropout": 0.05, "data.max_length": 256,
         "train.batch_size": 16, "train.lr": 5e-5, "train.epochs": 3.0, "data.columns": {"chosen": "good"}},
    ),
}  # fmt: skip


def _import(folder: Path, name: str, *overrides: str, **more: Any) -> tuple[Imported, RunConfig]:
    source, method, values, _ = FIXTURES[name]
    path = folder / "theirs.yaml"
    path.write_text(yaml.safe_dump(values | more))
    made = import_config(path, source, method, overrides=overrides)
    (folder / "ours.yaml").write_text(made.yaml)
    return made, load_config(folder / "ours.yaml")


def _at(config: RunConfig, key: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value


@pytest.mark.parametrize("name", sorted(FIXTURES))
def test_it_loads_and_means_the_same(tmp_path: Path, name: str) -> None:
    made, config = _import(tmp_path, name)
    for key, wanted in FIXTURES[name][3].items():
        found = _at(config, key)
        if key == "loss.mix":
            found = [{k: part[k] for k in want} for part, want in zip(found, wanted, strict=True)]
        assert found == wanted, key
    accounted = {k for line in made.translation.lines for k, _ in line.theirs}
    assert FIXTURES[name][2].keys() <= accounted
    for key in FIXTURES[name][2]:
        assert key in made.text


def _any_value() -> st.SearchStrategy[Any]:
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 3),
        st.floats(0.001, 2),
        st.sampled_from(["x", "no", "all"]),
        st.lists(st.just("a"), max_size=2),
    )


@st.composite
def _any_file(draw: st.DrawFn) -> tuple[str, str, dict[str, Any]]:
    source = SOURCES[draw(st.sampled_from(sorted(SOURCES)))]
    name = draw(st.sampled_from(sorted(source.methods)))
    rules = (source.rules, source.methods[name].rules, source.methods[name].parts, source.names)
    known = sorted({*itertools.chain.from_iterable(rules), "foreign_key", "another-one"})
    return source.name, name, draw(st.dictionaries(st.sampled_from(known), _any_value(), max_size=8))


@settings(max_examples=150, deadline=None)
@given(_any_file())
@example(("axolotl", "sft", {"model_name_or_path": None}))  # the rules' name for Axolotl's base_model
@example(("axolotl", "simpo", {"dpo_label_smoothing": True, "label_smoothing": None}))
@example(("ms-swift", "grpo", {"reward_model": False, "reward_model_name_or_path": None}))
@example(("trl", "dpo", {"beta": None}))
def test_no_key_is_ever_dropped(file: tuple[str, str, dict[str, Any]]) -> None:
    """For any file, each key has a line in the report, or the whole file is refused with an error."""
    source, method, values = file
    try:
        lines = translate(values, SOURCES[source], SOURCES[source].methods[method]).lines
    except (Untranslatable, ConfigError):
        return  # import_config turns it into a ConfigError
    assert values.keys() <= {k for line in lines for k, _ in line.theirs}


AXOLOTL = {"base_model": "owner/model", "datasets": [{"path": "pairs.jsonl", "type": "chatml.intel"}], "rl": "dpo"}


@pytest.mark.parametrize(
    ("source", "values", "said"),
    [
        ("trl", MODEL | {"use_peft": True, "lora_r": "many"}, "lora_r: 'many' is not a number; set the key by hand, or leave the key out"),
        ("axolotl", AXOLOTL | {"micro_batch_size": [2]}, "micro_batch_size: [2] is not a number"),
        ("trl", MODEL | {"use_peft": True, "lora_target_modules": 1.5}, "lora_target_modules: 1.5 cannot be understood; fix it"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_understood_is_refused_by_its_key(
    tmp_path: Path, source: str, values: dict[str, Any], said: str
) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=re.escape(said)):
        import_config(path, source, "dpo")


def test_words_for_true_and_false_mean_what_their_tool_reads(tmp_path: Path) -> None:
    """Their loaders read YAML 1.1, where no and off are false; a quoted word stays a text."""
    path = tmp_path / "theirs.yaml"
    off = "use_peft: no\nload_in_4bit: off\nfp16: No\nsync_ref_model: no\nbf16: off\n"
    path.write_text(f"model_name_or_path: a/b\ndataset_name: c/d\n{off}run_name: 'no'\noutput_dir: out\n")
    made = import_config(path, "trl", "dpo")
    (tmp_path / "ours.yaml").write_text(made.yaml)
    config = load_config(tmp_path / "ours.yaml")
    assert config.lora is None and config.model.quantize == "none" and config.reference.sync_every is None
    assert config.model.dtype == "fp32" and config.logging.name == "no" and not made.unsupported
    path.write_text("model_name_or_path: a/b\ndataset_name: c/d\nuse_peft: yes\nbf16: on\noutput_dir: out\n")
    made = import_config(path, "trl", "dpo")
    assert "lora:" in made.yaml and "dtype: bf16" in made.yaml


def test_a_key_that_nobody_knows_is_reported(tmp_path: Path) -> None:
    made, _ = _import(tmp_path, "trl_dpo", betta=3)
    assert made.unsupported == 1
    assert "betta: 3 (not a key that the importer knows; did you mean beta?)" in made.text
    assert "#   betta: 3" in made.yaml


def test_thinking_is_an_option_of_the_template(tmp_path: Path) -> None:
    _, config = _import(tmp_path, "lf_sft", enable_thinking=False)
    assert config.data.template_options == {"enable_thinking": False}


def test_defaults_that_differ_are_written_with_a_comment(tmp_path: Path) -> None:
    made, config = _import(tmp_path, "trl_kto")
    assert "schedule: linear  # TRL's default (lr_scheduler_type: linear)" in made.yaml
    assert config.train.warmup_fraction == 0.0 and config.train.seed == 42
    assert "weight_decay" not in made.yaml  # the default is 0 in both


def test_the_devices_of_their_run_count(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(FIXTURES["trl_dpo"][2]))
    assert "batch_size: 48" in import_config(tmp_path / "t.yaml", method="dpo", devices=4).yaml
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({**FIXTURES["trl_dpo"][2], "num_processes": 4}))
    made = import_config(tmp_path / "t.yaml", method="dpo")
    assert "batch_size: 48" in made.yaml and not made.unsupported


@pytest.mark.parametrize(
    ("name", "more", "wanted"),
    [
        # two generations of 32 completions make one optimizer step of 64
        ("trl_grpo", {"gradient_accumulation_steps": 8, "steps_per_generation": None, "generation_batch_size": 32},
         {"train.batch_size": 16, "algorithm.minibatches": 1}),
        ("trl_grpo", {"beta": 0.04}, {"algorithm.kl_estimator": "unbiased"}),
        ("trl_grpo", {"beta": 0.04, "use_bias_correction_kl": False}, {"algorithm.kl_estimator": "k3"}),
        ("trl_sft", {"shuffle_dataset": False}, {"train.shuffle": True}),
        ("trl_kto", {}, {"train.shuffle": False}),  # the prompts of a batch are compared with each other there
        ("trl_kto", {"train_sampling_strategy": "random"}, {"train.shuffle": True}),
        ("trl_dpo", {"train_sampling_strategy": "sequential"}, {"train.shuffle": False}),
        ("lf_kto", {}, {"train.shuffle": True}),
        ("trl_ppo", {"total_episodes": None, "max_steps": 7}, {"train.max_steps": None, "train.epochs": 3.0}),
        ("lf_sft", {"optim": "adafactor", "use_muon": False}, {"train.optimizer": "adafactor"}),
        ("lf_ppo", {"max_steps": 10, "ppo_buffer_size": 2, "ppo_epochs": 3}, {"train.max_steps": 60}),
    ],
    ids=str,
)  # fmt: skip
def test_keys_that_depend_on_others(tmp_path: Path, name: str, more: dict[str, Any], wanted: dict[str, Any]) -> None:
    _, config = _import(tmp_path, name, **more)
    assert {key: _at(config, key) for key in wanted} == wanted


def test_generations_that_no_number_of_steps_fits_are_reported(tmp_path: Path) -> None:
    made, _ = _import(tmp_path, "trl_grpo", steps_per_generation=3)
    assert "fix steps_per_generation" in made.text and made.unsupported


def test_a_mixture_of_trl_drops_no_word(tmp_path: Path) -> None:
    values = {k: v for k, v in FIXTURES["trl_sft"][2].items() if k != "dataset_name"}
    parts = [{"path": "me/all"}, {"path": "me/some", "fraction": 0.1}, {"path": "me/folder", "data_dir": "sub"}]
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump({**values, "datasets": parts}))
    made = import_config(tmp_path / "theirs.yaml", "trl", "sft")
    (line,) = (x for x in made.translation.lines if x.status == "unsupported" and x.theirs[0][0] == "datasets")
    assert line.theirs[0][1] == parts[1:] and "path: me/all:train" in made.yaml.replace("'", "")


def test_names_in_dataset_info_are_looked_up(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    info = {
        "mine": {
            "file_name": "mine.jsonl",
            "ranking": True,
            "columns": {"prompt": "question", "chosen": "good", "rejected": "bad", "system": "sys", "videos": "films"},
        },
        "chat": {"hf_hub_url": "me/chat", "formatting": "sharegpt", "columns": {"messages": "turns"}},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    made, config = _import(tmp_path, "lf_dpo")
    assert config.data.path == "data/mine.jsonl"
    assert config.data.columns == {"instruction": "question", "chosen": "good", "rejected": "bad", "system": "sys"}
    assert "mine.columns.videos: films" in made.text and made.unsupported == 0  # a problem with a column, not a key
    _, config = _import(tmp_path, "lf_sft", dataset="chat")
    assert config.data.path == "me/chat:train" and config.data.columns == {"conversations": "turns"}
    with pytest.raises(ConfigError, match="there is no 'gone'"):
        _import(tmp_path, "lf_sft", dataset="gone")


TURN = {"from": "human", "value": "Name a prime."}
GOOD, BAD = {"from": "gpt", "value": "Seven."}, {"from": "gpt", "value": "Eight."}
ALPACA_ROW = {"q": "Name a prime.", "more": "Below 8.", "sys": "Be brief.", "before": [["Hi", "Hello"]]}
DATA_SETS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # name: (description, a row, our layout)
    "ranking": (
        {"ranking": True, "formatting": "sharegpt",
         "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}},
        {"conversations": [TURN], "chosen": GOOD, "rejected": BAD}, "sharegpt_pairs",
    ),
    "ranking, names of its own": (
        {"ranking": True, "formatting": "sharegpt",
         "columns": {"messages": "turns", "chosen": "good", "rejected": "bad", "system": "sys"}},
        {"turns": [TURN], "good": GOOD, "bad": BAD, "sys": "Be brief.", "prompt": "an id"}, "sharegpt_pairs",
    ),
    "conversations": (
        {"formatting": "sharegpt", "columns": {"messages": "turns", "system": "sys", "tools": "functions_of"}},
        {"turns": [TURN, GOOD], "sys": "Be brief.", "functions_of": '[{"name": "look", "parameters": {}}]'}, "sharegpt",
    ),
    "kto": (
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "kto_tag": "good"}},
        {"conversations": [TURN, GOOD], "good": True}, "sharegpt_kto",
    ),
    "alpaca": (
        {"columns": {"prompt": "q", "query": "more", "response": "a", "system": "sys", "history": "before"}},
        {**ALPACA_ROW, "a": "Seven."}, "alpaca",
    ),
    "alpaca ranking": (
        {"ranking": True, "columns": {"prompt": "q", "query": "more", "chosen": "good", "rejected": "bad",
                                      "system": "sys", "history": "before"}},
        {**ALPACA_ROW, "good": "Seven.", "bad": "Eight."}, "alpaca_pairs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(DATA_SETS))
def test_rows_of_a_described_data_set_load(tmp_path: Path, name: str) -> None:
    """The imported config reads the described rows, including system prompts and earlier turns."""
    described, row, layout = DATA_SETS[name]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.jsonl", **described}}))
    (tmp_path / "data" / "mine.jsonl").write_text(json.dumps(row) + "\n")
    made, config = _import(tmp_path, "lf_dpo")
    file, data = str(tmp_path / str(config.data.path)), config.data
    found = load_preferences(file, shape=data.shape, columns=data.columns)
    assert (found.shape, found.accepted, len(found.quarantined)) == (layout, 1, 0)
    prompt = found.trees[0].prompt
    said = [prompt] if isinstance(prompt, str) else [m.content for m in prompt]
    assert any("Name a prime." in text for text in said)
    assert found.trees[0].completions[0].text == "Seven."
    assert ("Be brief." in said) == ("sys" in row) and ("Hello" in said) == ("before" in row)
    assert ("look" in found.trees[0].tools) == ("functions_of" in row)
    assert not any(
        line.status == "unsupported" for line in made.translation.lines if line.theirs[0][0].startswith("mine")
    )


def _described(folder: Path, **sets: Any) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "dataset_info.json").write_text(json.dumps(sets))


CHATS = {"file_name": "chats.jsonl", "formatting": "sharegpt"}


def test_turns_of_conversations_are_learned_as_theirs(tmp_path: Path) -> None:
    _described(tmp_path, chats=CHATS, more=CHATS | {"file_name": "more.jsonl"}, mine={"file_name": "mine.jsonl"})
    for more, options in (({}, {"turns": "all"}), ({"mask_history": True}, {})):
        _, config = _import(tmp_path, "lf_sft", dataset="chats,more", **more)
        assert config.data.layout_options == options and config.data.path == ["data/chats.jsonl", "data/more.jsonl"]
    _, config = _import(tmp_path, "lf_dpo", dataset="chats")
    assert config.data.layout_options == {}


def test_answers_of_a_history_that_they_learn_are_reported(tmp_path: Path) -> None:
    _described(tmp_path, mine={"file_name": "mine.jsonl", "columns": {"history": "before"}})
    for name, more, is_reported in (
        ("lf_sft", {}, True),
        ("lf_sft", {"mask_history": True}, False),
        ("lf_dpo", {}, False),
    ):
        made, _ = _import(tmp_path, name, **more)
        assert ("mine.columns.history" in made.yaml) is is_reported


def test_several_sets_have_their_own_settings(tmp_path: Path) -> None:
    _described(tmp_path, chats=CHATS, mine={"file_name": "mine.jsonl"})
    _, config = _import(tmp_path, "lf_sft", dataset="chats,mine")  # each set has its own settings
    assert [s.reading() for s in config.data.sources] == [{"shape": "sharegpt", "layout_options": {"turns": "all"}}, {}]


@pytest.mark.parametrize(
    "change,vision",
    [({}, "frozen"), (dict.fromkeys(("freeze_vision_tower", "freeze_multi_modal_projector"), False), "trained")],
)
def test_a_described_set_with_pictures(tmp_path: Path, change: dict[str, Any], vision: str) -> None:
    _described(tmp_path, seen=CHATS | {"columns": {"messages": "conversations", "images": "pics"}})
    paint(tmp_path / "media" / "a.png", 0)
    row = {"conversations": [{**TURN, "value": "<image>What is it?"}, GOOD], "pics": ["a.png"]}
    write_jsonl(tmp_path / "data" / "chats.jsonl", [row])
    made, config = _import(tmp_path, "lf_sft", dataset="seen", media_dir="media", image_max_pixels=9000, **change)
    data = config.data
    assert (config.model.vision, data.image_dir, made.unsupported) == (vision, "media", 1)
    reading: Any = data.model_dump(include={"shape", "columns", "layout_options"})
    (tree,) = load_preferences(str(tmp_path / data.path), **reading, image_dir=str(tmp_path / "media")).trees
    assert len(tree.images) == 1 and tree.completions[0].text == "Seven."
    made, config = _import(tmp_path, "lf_sft", dataset="seen", freeze_vision_tower=False)
    assert config.model.vision == "frozen" and made.unsupported == 1  # training only one of the two is unsupported


@pytest.mark.parametrize(
    "values,more,match",
    [
        ({"model_name_or_path": "m", "learning_rate": 1e-5}, {}, "does not say which of TRL's trainers"),
        ({"model_name_or_path": "m", "beta": 0.1}, {"method": "dpo"}, "no usable data.path"),
        ({**MODEL, "num_generations": 4}, {"method": "grpo"}, "reward"),
        ({**MODEL, "gradient_accumulation_steps": "many"}, {"method": "dpo"}, "'many' is not a number"),
        ({**MODEL, "learning_rate": 1e-5}, {"method": "dpoo"}, 'did you mean dpo'),
        ({**MODEL, "learning_rate": 1e-5}, {"source": "trll"}, 'did you mean trl'),
        ({**MODEL, "weight_decay": -1}, {"method": "dpo"}, "does not translate into a valid config"),
    ],
)  # fmt: skip
def test_a_persons_mistake_is_a_sentence(tmp_path: Path, values: Any, more: Any, match: str) -> None:
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=match):
        import_config(tmp_path / "t.yaml", **more)


def test_text_of_others_cannot_act(tmp_path: Path) -> None:
    made, _ = _import(tmp_path, "trl_dpo", **{"run_name": "a\x1b[31m\nmodel: {path: evil}", "\x1b[2Jkey": "x\ny: z"})
    assert "\x1b" not in made.text + made.yaml
    assert yaml.safe_load(made.yaml)["model"]["path"] == "owner/model"


@pytest.mark.parametrize(
    "name", ["trl_dpo", "trl_kto", "trl_simpo", "trl_reward", "trl_dpo_mix", "lf_dpo", "lf_kto", "flat"]
)
def test_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One step on a tiny model, with their keys for data and model."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model_folder(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", polite_rows(16))
    _import(tmp_path, name, f"model.path={model}", "data.path=train.jsonl", "data.max_length=128", "data.columns={}", "data.validation_rows=4",
            "data.validation_fraction=null", "evaluation.samples=0", "evaluation.kl_prompts=0", "train.max_steps=1", "model.dtype=fp32")  # fmt: skip
    result = api.train(tmp_path / "ours.yaml", quiet=True)
    assert result.model is not None and Path(result.model).is_dir()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = tmp_path / "simpo.yaml", tmp_path / "ours.yaml"
    theirs.write_text(yaml.safe_dump(FIXTURES["trl_simpo"][2]))
    assert main(["import", str(theirs)]) == 0
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out)["loss"]["gamma"] == 0.8 and "loss.gamma = 0.8" in printed.err
    assert main(["import", str(theirs), "train.lr=1e-3", "--output", str(ours)]) == 0
    assert load_config(ours).train.lr == 1e-3
    assert main(["import", str(theirs), "--output", str(ours)]) == 2
    assert "already exists" in capsys.readouterr().err
    theirs.write_text(theirs.read_text() + "load_in_4bit: true\n")
    assert main(["import", str(theirs), "--output", str(tmp_path / "no.yaml"), "--strict"]) == 2
    assert "1 key(s) are not supported" in capsys.readouterr().err and not (tmp_path / "no.yaml").exists()


@pytest.mark.parametrize("tool,name", [("trl", "trl_dpo"), ("trl", "trl_ppo"), ("lf", "lf_dpo"), ("flat", "flat")])
@pytest.mark.parametrize(
    "asked,ours,reported",
    [
        (["wandb", "tensorboard", "mlflow", "trackio"], ["wandb", "tensorboard", "mlflow", "trackio"], ""),
        ("wandb", ["wandb"], ""),
        ("TensorBoard, wandb", ["tensorboard", "wandb"], ""),
        (["comet_ml", "wandb", "swanlab"], ["wandb"], "report_to: comet_ml, swanlab: there is no tracker"),
        ("comet_ml", [], "report_to: comet_ml: there is no tracker"),
        ("none", [], ""),
        (["none"], [], ""),
        ([], [], ""),
        (None, [], ""),
        ("all", ["tensorboard", "trackio"], ""),
    ],
)
def test_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, name: str, asked: Any, ours: list[str], reported: str
) -> None:
    there = {"tensorboard": "x.py", "trackio": "x.py", "wandb": None}  # a `wandb` folder is not a package
    monkeypatch.setattr(
        "penchant.importers.hf.importlib.util.find_spec",
        lambda module: SimpleNamespace(origin=there[module]) if module in there else None,
    )
    made, config = _import(tmp_path, name, report_to=asked, run_name="first try")
    assert config.logging.trackers == ours and config.logging.name == "first try"
    assert ("NOT SUPPORTED" in made.yaml) == bool(reported) and reported in made.yaml.replace("#   ", "")
    assert made.unsupported == bool(reported) and "report_to" in made.text


def test_flat_words_for_wandb(tmp_path: Path) -> None:
    _, config = _import(tmp_path, "flat", report_to="mlflow", use_wandb=True, wandb_project="mine")
    assert config.logging.trackers == ["mlflow", "wandb"] and config.logging.project == "mine"
    made, config = _import(tmp_path, "flat", use_wandb=False)
    assert config.logging.trackers == [] and "use_wandb: False (off, as here)" in made.text


@pytest.mark.parametrize("name", ["model", "base_model"])
def test_a_word_that_tools_have_too_makes_no_flat_file_theirs(tmp_path: Path, name: str) -> None:
    words = {name: "m", "train_file": "rows.jsonl", "loss": "ipo", "lr": 1e-5, "sequence_len": 99}
    (tmp_path / "flat.yaml").write_text(json.dumps(words))
    made = import_config(str(tmp_path / "flat.yaml"))
    assert (made.translation.source.name, made.unsupported) == ("flat", 0)


def _reported(text: str) -> set[str]:
    """(keys listed under NOT SUPPORTED, lines that begin with "differs")."""
    lines = [line.removeprefix("#").strip() for line in text.splitlines()]
    start = next((i for i, line in enumerate(lines) if line.startswith("NOT SUPPORTED")), len(lines))
    listed = itertools.takewhile(lambda line: line and not line.startswith("differs"), lines[start + 1 :])
    return {line.split(":")[0] for line in listed} | {line for line in lines if line.startswith("differs")}


def test_the_screen_and_the_file_report_the_same(tmp_path: Path) -> None:
    """An unsupported default of theirs is not in either list of the file's keys, but in both lists of remarks."""
    (tmp_path / "train.jsonl").write_text("")
    more = {"eval_strategy": "steps", "eval_steps": 5, "neftune_noise_alpha": 5, "deepspeed": "z.json"}
    made, _ = _import(tmp_path, "trl_dpo", **more)
    assert _reported(made.text) == _reported(made.yaml)
    assert {k for k in _reported(made.text) if not k.startswith("differs")} == {"neftune_noise_alpha", "deepspeed"}
    said = "differs: TRL's default dataset_test_split: test: a file has no test split"
    assert said in made.text and said in made.yaml and made.unsupported == 2
    made, config = _import(tmp_path, "trl_dpo", **more, test_split_size=0.1)
    assert config.data.validation_fraction == 0.1 and "dataset_test_split" not in made.text + made.yaml


def test_notes_name_what_there_is(tmp_path: Path) -> None:
    made, _ = _import(tmp_path, "lf_dpo", push_to_hub=True, hub_token="hf_abcdefghijklmnop", template="qwen")
    assert "penchant export RUN --to safetensors --push OWNER/NAME" in made.text
    assert "hf_abcdef" not in made.text + made.yaml
    assert "data.template" in made.text and "penchant data show" in made.text and "data audit" not in made.text
    parser = build_parser()
    parser.parse_args(["export", "RUN", "--to", "safetensors", "--push", "OWNER/NAME"])
    parser.parse_args(["data", "show", "FILE"])


@pytest.mark.parametrize(
    "values,tool",
    [
        ({"model": {"_component_": "x"}, "tokenizer": {"_component_": "y"}, "epochs": 1}, "torchtune"),
        ({"actor_rollout_ref": {"model": {}}, "algorithm": {"adv_estimator": "grpo"}}, "verl"),
    ],
)
def test_a_file_of_a_tool_that_is_not_read_is_refused(tmp_path: Path, values: Any, tool: str) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=f"a file of {tool}, which cannot be translated"):
        import_config(path, overrides=["data.path=x.jsonl", "model.path=m"])


def test_our_own_config_needs_no_import(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": {"path": "m"}, "data": {"path": "x.jsonl"}, "loss": {"name": "dpo"}}))
    with pytest.raises(ConfigError, match=r"own config already; use `penchant train .*run\.yaml`"):
        import_config(path)


def test_a_comment_stands_once(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text("model_name_or_path: a/b\nuse_peft: true\nlora_r: 8\ndo_train: true\ntrust_remote_code: true\n")
    made = import_config(path, "trl", "dpo", overrides=["data.path=x.jsonl"])
    assert made.yaml.count("use_peft: True") == 1 and made.unsupported == 0


def test_nothing_held_out_is_said(tmp_path: Path) -> None:
    """In the report and in the config, unless rows are held out."""
    name = next(n for n in FIXTURES if n.startswith("lf_"))
    for overrides, said in ((), True), (("data.validation_rows=10",), False):
        imported, _ = _import(tmp_path, name, *overrides, val_size=0)
        assert ("no rows are held out" in imported.text) is said and ("no rows are held out" in imported.yaml) is said


@pytest.mark.parametrize(
    "change,key",
    [
        ({"loss_type": "sapo"}, "loss_type"),
        ({"loss_type": "cispo"}, "loss_type"),  # epsilon_high is then 0.2, a cap that we cannot express
        ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"load_in_4bit": True}, "load_in_4bit"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy"),
        ({"optim": "galore_adamw"}, "optim"),
    ],
    ids=str,
)
def test_what_no_group_method_has_is_reported(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    values = {k: v for k, v in FIXTURES["trl_grpo"][2].items() if k != "epsilon_high"}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump({**values, **change}))
    made = import_config(tmp_path / "theirs.yaml", "trl", "grpo")
    assert key in {k for line in made.translation.lines if line.status == "unsupported" for k, _ in line.theirs}


def test_what_changes_nothing_with_the_method_is_left_out(tmp_path: Path) -> None:
    """Our config would refuse such a key, so the import drops it and still trains."""
    values = {**FIXTURES["trl_grpo"][2], "loss_type": "cispo", "epsilon": 0.1, "epsilon_high": 5.0, "delta": 4.0}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(values))
    made = import_config(tmp_path / "theirs.yaml", "trl", "grpo")
    idle = {k for line in made.translation.lines if line.status == "same" for k, _ in line.theirs}
    assert {"epsilon", "delta"} <= idle and "clip_dual" not in made.yaml and "clip_high" in made.yaml
    # with one update a batch no clip does anything, here or there
    once = {**FIXTURES["trl_gspo"][2], "num_iterations": 1, "epsilon_high": 5e-4}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(once))
    made = import_config(tmp_path / "theirs.yaml", "trl", "grpo")
    idle = {k for line in made.translation.lines if line.status == "same" for k, _ in line.theirs}
    assert {"epsilon_high", "delta"} <= idle and "clip_high" not in made.yaml
    config_from_mapping(parse_yaml(made.yaml, "")[0], [])
