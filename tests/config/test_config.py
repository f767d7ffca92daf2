"""The config: typed and strict, with the line of every error and a way to fix it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.config import RunConfig, config_from_mapping, dump_config, load_config, result_settings
from penchant.config.yaml import read_mapping
from penchant.errors import ConfigError

BASE = "model: {path: m}\ndata: {path: d}\noutput: o\n"


def _load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.e-5", "0.00001", ".00001", "10e-6"])
def test_numbers_without_a_dot_are_numbers(tmp_path: Path, text: str) -> None:
    assert _load(tmp_path, BASE + f"train: {{lr: {text}}}").train.lr == 1e-5


@pytest.mark.parametrize(
    "text,overrides,message",
    [
        ("train:\n  lr: true", (), r"run\.yaml:5: train\.lr is true \(a boolean\); give a number such as 5e-6"),
        (
            "train:\n  learning_rate: 1e-5",
            (),
            r'run\.yaml:5: unknown key "learning_rate" in train; did you mean "train\.lr"\?',
        ),
        ("train:\n  epochss: 3", (), r'run\.yaml:5: unknown key "epochss" in train; did you mean "epochs"\?'),
        (
            "batch_size: 3",
            (),
            r'run\.yaml:4: unknown key "batch_size" at the top level; did you mean "train\.batch_size"\?',
        ),
        ("train: {batch_size: 0}", (), r"train\.batch_size is 0; give a number greater than or equal to 1"),
        ("train: {batch_size: 1.5}", (), r"train\.batch_size is 1\.5; give a whole number"),
        ("train: {schedule: foo}", (), r"train\.schedule is 'foo'; give 'constant', 'linear' or 'cosine'"),
        ("loss: {name: dpoo}", (), r"""'dpoo' is not a loss; did you mean "dpo"\?"""),
        ("loss: {name: dpo, betta: 1}", (), r'unknown key "betta" in loss'),
        ("loss: {name: dpo, beta: -1}", (), r"loss\.beta is -1; give a number greater than 0"),
        ("loss: {name: sft, beta: 0.1}", (), r'unknown key "beta" in loss'),
        ("train: {divergence_ceiling: 1}", (), r"train\.divergence_ceiling has no effect with dpo"),
        (
            "train: {divergence_ceiling: 1}",
            ("algorithm=rloo", "reward=words"),
            r"train\.divergence_ceiling has no effect with rloo",
        ),
        ("", ("checkpoint.metric=eval/rewards/accuracies",), r"of which higher is better.*set checkpoint\.mode=max"),
        ("output: x", (), r"run\.yaml:4: output is set twice"),
        ("  bad: : x", (), r"run\.yaml:4: not valid YAML"),
        ("", ("train.shuffle=yes",), r"command line: train\.shuffle is 'yes'; give true or false"),
        ("", ("train.lr",), r"command line: 'train\.lr' is not an override; write key\.path=value"),
        ("", ("data.path.x=1",), r"command line: data\.path is a value, not a section"),
        (
            "",
            ("data.validation_rows=3", "data.eval_path=x"),
            r"command line: data: eval_path and validation_rows are both",
        ),
        ("train: {lr: 1e-4}\nreward: words", (), r"run\.yaml:5: reward is set without an algorithm"),
        ("", ("data.eval_path=3",), r"command line: data\.eval_path is 3; give text \(.*\) or a list or a mapping$"),
        ("", ("data.path=[]",), r"command line: data\.path: is empty; give at least one file"),
        ("", ("data.columns={1: text}",), r"command line: data\.columns\.1 is 1; give text"),
        ("", ("data=[{path: a}, {path: b, weight: 2}]",), r"command line: data: sources\.0 has no weight"),
        (
            "",
            ("data=[{path: a}]", "data.sources.0.limit=2"),
            r"data is a list, so data\.sources\.0\.limit cannot be set",
        ),
        ("train: 3", (), r"train is 3; it is a section: indent"),
        ("algorithm: rloo\nreward: {repetition: {n: x}}", (), r"reward\.repetition\.n is 'x'; give a whole number"),
        ("", ("lora=16",), r"command line: lora is 16; it is a section: set its keys, as in lora\.r=16"),
        ("train: {lr: '1e-4'}", (), r"train\.lr is the text '1e-4'; write 1e-4 without quotes"),
        ("train: {shuffle: 'true'}", (), r"write true without quotes"),
        ("train: {beta: 0.2}", (), r'did you mean "loss\.beta"\?'),
        ("algorithm: rloo\nreward: words\ntrain: {beta: 0.2}", (), r'did you mean "algorithm\.beta"\?'),
        ("loss: {beta: hello}", (), r"loss\.beta is 'hello'; give a number such as 0\.1"),
        ("loss: {loss_type: ipo}", (), r'did you mean "loss\.name"\?'),
        ("loss: dop", (), r'did you mean "dpo"\?'),
        ("load_in_4bit: true", (), r'did you mean "model\.quantize"\?'),
        ("algorithm: grpo\nreward: {overlong: 0.5}", (), r"overlong needs max; write \{overlong: \{max: \.\.\.\}\}"),
        (
            "algorithm: grpo\nreward: {overlong: {maximum: 9}}",
            (),
            r"overlong has no option 'maximum'; there are max, cache",
        ),
        ("", ("foo.bar=1",), r'command line: unknown key "foo" at the top level'),
        ("", ("lr=1e-4",), r'command line: unknown key "lr" at the top level; did you mean "train\.lr"\?'),
        ("", ("trian.lr=1e-4",), r'did you mean "train"\?'),
        ("", ("data.colums.prompt=q",), r'command line: unknown key "colums" in data; did you mean "columns"\?'),
        ("", ("data.validation_fraction=0",), r"give a number > 0 and < 1, or null for none"),
        (
            "algorithm: rloo\nreward: words\nloss: {beta: 0.3}",
            (),
            r"run\.yaml:6: loss and algorithm are both set; keep one",
        ),
        ("", ("algorithm=rloo", "reward=words", "loss=dpo"), r"loss and algorithm are both set"),
    ],
)
def test_mistakes_are_sentences(tmp_path: Path, text: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, BASE + text, *overrides)


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, BASE + "train:\n  lr: true\n  epochss: 1\nfoo: 1")
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["5", "6", "7"]


@pytest.mark.parametrize(
    "text,message",
    [("", "is empty"), ("- a", "holds a list"), ("model: {path: m}\ndata: {path: d}", "output is missing")],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, text)


def test_a_python_script_is_no_config(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text('from trl import DPOConfig\n\nargs = DPOConfig(output_dir="x", beta=0.1)\n')
    for kind in ("foreign", "run"):
        with pytest.raises(ConfigError, match="is a Python script"):
            read_mapping(script, kind)


def test_another_tools_config_leads_to_import(tmp_path: Path) -> None:
    foreign = "model_name_or_path: m\ndataset_name: d\nlearning_rate: 1e-6\nbeta: 0.1\noutput_dir: o\n"
    with pytest.raises(ConfigError, match=r"run\.yaml: .*model_name_or_path.*penchant import .*run\.yaml"):
        _load(tmp_path, foreign)
    with pytest.raises(ConfigError, match=r'did you mean "model"'):  # mistyped keys of our own still get suggestions
        _load(tmp_path, "modle: {path: m}\ndatta: {path: d}\noutput: o\n")


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(BASE)
    with pytest.raises(ConfigError, match=r"no such file; did you mean run\.yaml"):
        load_config(tmp_path / "rum.yaml")


def test_a_mistyped_metric_of_checkpoints_is_refused_unless_the_users_code_may_log_it(tmp_path: Path) -> None:
    """It would never name a best checkpoint."""
    text = BASE + "checkpoint: {metric: eval/rewards/acuracies}"
    with pytest.raises(ConfigError, match=r'checkpoint.metric .*did you mean "eval/rewards/accuracies"'):
        _load(tmp_path, text)
    for metric in ("eval/loss", "eval/held/loss", "eval/kl/k3", "eval/rewards/margins"):
        best = f"checkpoint={{metric: {metric}, mode: min}}"
        assert _load(tmp_path, BASE, best).checkpoint.metric == metric
    online = "algorithm=rloo", "reward=words", "checkpoint={metric: eval/rewards/words/mean, mode: max}"
    assert _load(tmp_path, BASE, *online).checkpoint.metric == "eval/rewards/words/mean"
    _load(tmp_path, text, "algorithm=rloo", f"reward={tmp_path}/mine.py:reward")
    (tmp_path / "config.resolved.yaml").write_text(text)
    assert load_config(tmp_path / "config.resolved.yaml").checkpoint.metric == "eval/rewards/acuracies"


@pytest.mark.parametrize(
    ("overrides", "metric", "how"),
    [
        ((), "eval/grad_norm", "training steps alone have it"),
        ((), "eval/held/beta", "training steps alone have it"),
        ((), "eval/reward", "set evaluation.reward"),
        (("evaluation.reward=words",), "eval/reward", None),
        ((), "eval/rewards/words/mean", "set evaluation.reward"),
        ((), "eval/win_rate", "set evaluation.reward"),
        (("algorithm=rloo", "reward=words"), "eval/win_rate", None),
        (("evaluation.kl_prompts=0",), "eval/kl/k3", "set evaluation.kl_prompts"),
        (("algorithm=reward_model",), "eval/completions/length", "writes no completions"),
        ((), "eval/loss/main", "give eval/loss"),
        (("loss={name: dpo, nll_weight: 0.1}",), "eval/loss/nl", "loss/main or loss/nll"),
        (("loss={name: dpo, nll_weight: 0.1}",), "eval/loss/nll", None),
        (("loss={name: dpo, nll_weight: 0.1}",), "eval/held/loss/nll", None),
        (("loss.mix=[{name: dpo}, {name: sft}]",), "eval/loss/sft", None),
        (("loss.mix=[{name: dpo}, {name: sft}]",), "eval/held/loss/sf", "loss/main or loss/sft"),
        (("loss=pmpo",), "eval/loss/negative", None),
        (("loss.mix=[{name: kto}, {name: pmpo}]",), "eval/loss/pmpo/divergence", None),
        (("algorithm=rloo", "reward=words"), "eval/loss/main", "give eval/loss"),
    ],
)
def test_a_metric_that_such_a_run_never_has_is_known_before_it_runs(
    tmp_path: Path, overrides: tuple[str, ...], metric: str, how: str | None
) -> None:
    found = _load(tmp_path, BASE, *overrides).unknown_metric(metric)
    assert found is None if how is None else how in str(found)


def test_a_run_that_kept_its_worst_checkpoint_is_told_how_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set checkpoint\.mode=max.*resume.*checkpoint\.mode=min"):
        _load(tmp_path, BASE, "checkpoint.metric=eval/rewards/accuracies")
    assert _load(tmp_path, BASE, "checkpoint.metric=eval/rewards/accuracies", "checkpoint.mode=min")


def test_overrides_win_and_make_sections(tmp_path: Path) -> None:
    config = _load(tmp_path, BASE + "train: {lr: 1e-5}", "train.lr=2e-5", "lora.r=8", "loss=sft")
    assert config.train.lr == 2e-5
    assert config.lora is not None and config.lora.r == 8
    assert config.loss.name == "sft"


def test_yes_is_a_word_and_010_is_ten(tmp_path: Path) -> None:
    config = _load(tmp_path, BASE + "train: {batch_size: 010}", "data.path=yes")
    assert config.data.path == "yes"
    assert config.train.batch_size == 10


@given(
    st.fixed_dictionaries(
        {
            "lr": st.floats(1e-9, 1),
            "epochs": st.floats(0.01, 99),
            "batch_size": st.integers(1, 9999),
            "seed": st.integers(0, 2**31 - 1),
        }
    ),
    st.floats(1e-3, 10),
    st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1),
)
def test_dump_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, train: dict[str, float], beta: float, name: str
) -> None:
    config = config_from_mapping(
        {
            "model": {"path": name},
            "data": {"path": "d"},
            "output": "o",
            "train": train,
            "loss": {"name": "dpo", "beta": beta},
            "lora": {"r": 2},
        }
    )
    path = tmp_path_factory.mktemp("c") / "c.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_every_key_has_a_description() -> None:
    def check(section: type, prefix: str) -> None:
        for name, info in section.model_fields.items():  # type: ignore[attr-defined]
            annotation = info.annotation
            inner = [a for a in (annotation, *getattr(annotation, "__args__", ())) if hasattr(a, "model_fields")]
            if inner and name != "loss":
                check(inner[0], f"{prefix}{name}.")
            elif name != "loss":
                assert info.description, f"{prefix}{name} has no description"

    check(RunConfig, "")


def test_an_algorithm_takes_the_place_of_the_files_loss(tmp_path: Path) -> None:
    config = _load(tmp_path, BASE + "loss: {name: ipo, beta: 0.3}", "algorithm=rloo", "reward=words")
    assert config.algorithm is not None and config.loss.name == "dpo"
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(config))  # a resolved config has both a loss and an algorithm
    assert load_config(path) == config


@pytest.mark.parametrize("name", ["0E0", "1e5", "null", "true", "1_000", "012", "~"])
def test_a_text_that_looks_like_another_kind_is_written_as_text(tmp_path: Path, name: str) -> None:
    config = config_from_mapping(
        {"model": {"path": "m"}, "data": {"path": "d", "columns": {"prompt": name}}, "output": "o"}
    )
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.yaml") == config


def test_max_length_auto_is_the_default(tmp_path: Path) -> None:
    data = _load(tmp_path, BASE, "data.max_length=auto").data
    assert data.max_length == 1024 and "max_length" not in data.model_fields_set


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json", "rows.jsonl.gz"])
def test_data_in_place_of_a_config_leads_to_init(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('[{"prompt": "p", "chosen": "c", "rejected": "r"}]\n')
    with pytest.raises(ConfigError, match=r"is a data file.*penchant init --data .*" + name):
        load_config(tmp_path / name)


def test_a_runs_folder_in_place_of_a_config_leads_to_its_config(tmp_path: Path) -> None:
    own = tmp_path / "dpo" / "config.resolved.yaml"
    own.parent.mkdir()
    own.write_text(BASE)
    for name in ("dpo", "dpoo"):
        with pytest.raises(ConfigError, match=r"dpo/config\.resolved\.yaml"):
            load_config(tmp_path / name)
    (tmp_path / "runn.yaml").write_text(BASE)
    with pytest.raises(ConfigError, match=r"did you mean runn\.yaml"):
        load_config(tmp_path / "run.yaml")


def test_how_long_something_may_take_is_no_part_of_what_is_computed() -> None:
    """A run that hit a timeout can resume with a longer one."""
    base = {"model": {"path": "x"}, "data": {"path": "y"}, "algorithm": {"name": "grpo"}, "output": "o"}

    def computed(reward: dict[str, Any], **rollout: Any) -> dict[str, Any]:
        return result_settings(config_from_mapping({**base, "reward": reward, "rollout": rollout}, []))

    short = computed({"words": 1.0, "timeout": 5.0}, environment="calculator", environment_timeout=1.0)
    assert (
        short
        == computed({"words": 1.0}, environment="calculator")
        != computed({"words": 2.0}, environment="calculator")
    )
