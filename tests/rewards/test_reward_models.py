"""A trained reward model as a reward: it scores as in its own evaluation, for any policy tokenizer; PPO's value model."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from encoders import encoder_folder, encoder_tokenizer
from tiny import polite_rows, tiny_model_folder, tiny_tokenizer, write_jsonl

from penchant import api
from penchant.config import config_from_mapping, dump_config
from penchant.data.tokenize import tokenize
from penchant.errors import CheckpointError, ConfigError, DataError, ModelError
from penchant.models.load import backbone_of
from penchant.models.reward import head_of
from penchant.rewards import load_reward
from penchant.rewards.reward_model import (
    PolicyText,
    RewardModel,
    find_reward_model,
    load_reward_function,
    rewards_of,
    rows_by_source,
)
from penchant.runs import Run
from penchant.runs.identity import reward_contents
from penchant.types import PromptTree, TokenTree

CPU = torch.device("cpu")


def reward_run(folder: Path, model: str, **more: Any) -> dict[str, Any]:
    return {
        "model": {"path": model, "dtype": "fp32"},
        "data": {
            "path": write_jsonl(folder / "pairs.jsonl", polite_rows()),
            "validation_rows": 6,
            "max_length": 128,
            **more.pop("data", {}),
        },
        "algorithm": "reward_model",
        "train": {"max_steps": 2, "batch_size": 6, "tokens_per_step": 600, "lr": 1e-2, "warmup_fraction": 0.0},
        "evaluation": {"every": None, "at_start": False},
        "output": str(folder / "reward"),
        **more,
    }


class Trained(NamedTuple):
    """A reward model's run, its scores of the held-out pairs in its own evaluation, and its base model."""

    run: Run
    own: list[float]
    start: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Reward models by kind (plain, chat, encoder), each trained once. Tests must not change their folders."""

    @cache
    def of(kind: str) -> Trained:
        folder = tmp_path_factory.mktemp(kind)
        if kind == "encoder":
            start, more = encoder_folder(folder / "model"), {"data": {"max_length": 64}}
        else:
            start, more = tiny_model_folder(folder / "model", chat=kind == "chat"), {}
        config = reward_run(folder, start, **more)
        api.train(config, quiet=True)
        run = Run(api.as_config(Path(config["output"]) / "config.resolved.yaml"), quiet=True)
        run.evaluate()
        return Trained(run, rewards_of(run.built.parts.engine, run.rows.trees[1]), start)

    return of


def as_rollouts(run: Run, tokenizer: Any, template: str = "auto") -> tuple[list[TokenTree], PolicyText]:
    """The run's held-out pairs, as if sampled by a policy with this tokenizer."""
    assert run.rows.datasets[1] is not None
    data = run.rows.datasets[1]
    trees = tokenize(data, tokenizer, template=template, max_length=4096).trees
    return list(trees), PolicyText(tokenizer, template, rows_by_source(data.trees))


CASES = {
    "same tokenizer": ("plain", {}),
    "chat template in both": ("chat", {"chat": True}),
    "chat policy, plain reward model": ("plain", {"chat": True}),
    "plain policy, chat reward model": ("chat", {}),
    "other specials": ("plain", {"bos": False}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_rollouts_get_the_score_of_the_reward_models_own_evaluation(trained: Any, case: str) -> None:
    kind, of_policy = CASES[case]
    run, own, _ = trained(kind)
    trees, policy = as_rollouts(run, tiny_tokenizer(**of_policy))
    folder = find_reward_model(str(run.folder))
    assert folder is not None
    model = load_reward_function("reward", folder, CPU, policy)
    assert model._same_format == (case in ("same tokenizer", "chat template in both"))
    assert np.std(own) > 0.01
    assert model.score_trees(trees) == pytest.approx(own, abs=1e-5)


def test_a_reward_does_not_depend_on_what_is_scored_with_it(trained: Any) -> None:
    """A prompt and completion that are too long are tokenized again, to be cut, and no others are."""
    run = trained("plain").run
    (one, two, *_), policy = as_rollouts(run, tiny_tokenizer())
    folder = find_reward_model(str(run.folder))
    assert folder is not None
    model = load_reward_function("reward", folder, CPU, policy)
    tokenizer = tiny_tokenizer()
    (odd,) = [i for i in range(260) if tokenizer.convert_ids_to_tokens(i) == "\u00ff"]  # byte 255, in no text
    assert tokenizer.decode([odd]) == "\ufffd"
    one = replace(one, completion_ids=(np.array([odd, odd, 1], np.int32),), truncated=(False,))
    too_long = replace(two, completion_ids=(np.repeat(two.completion_ids[0], 40),), truncated=(True,))
    alone = model.score_trees([one])
    assert model.score_trees([too_long, one]) == pytest.approx([*model.score_trees([too_long]), *alone], abs=1e-5)


def test_an_encoder_judges_the_texts(trained: Any) -> None:
    run, own, _ = trained("encoder")
    trees, policy = as_rollouts(run, tiny_tokenizer(chat=True))
    reward = load_reward({str(run.folder): 2.0, "words": -1.0}, policy)
    words = [float(len(c.text.split())) for t in run.rows.datasets[1].trees for c in t.completions]  # type: ignore[union-attr]
    texts = [c.text for t in run.rows.datasets[1].trees for c in t.completions]  # type: ignore[union-attr]
    expected = [2.0 * r - w for r, w in zip(own, words, strict=True)]
    assert reward([""] * len(own), texts, trees).tolist() == pytest.approx(expected, abs=1e-5)


def test_texts_alone_can_be_judged_too(trained: Any) -> None:
    run, own, _ = trained("plain")
    pairs = [(t.prompt, c.text) for t in run.rows.datasets[1].trees for c in t.completions]  # type: ignore[union-attr]
    reward = load_reward(str(run.folder))
    assert reward([str(p) for p, _ in pairs], [c for _, c in pairs]).tolist() == pytest.approx(own, abs=1e-5)


@pytest.mark.parametrize("chat", [False, True])
def test_an_unfinished_completion_is_judged_without_eos(trained: Any, chat: bool) -> None:
    run = trained("plain").run
    trees, policy = as_rollouts(run, tiny_tokenizer(chat=chat), "auto")
    cut = TokenTree(0, trees[0].prompt_ids, (trees[0].completion_ids[0][:-1],), (True,), trees[0].source)
    assert find_reward_model(str(run.folder)) is not None
    model = load_reward_function("r", find_reward_model(str(run.folder)), CPU, policy)  # type: ignore[arg-type]
    plain = run.rows.trees[1][0]
    expected = rewards_of(
        run.built.parts.engine, [TokenTree(0, plain.prompt_ids, (plain.completion_ids[0][:-1],), (True,))]
    )
    assert model.score_trees([cut]) == pytest.approx(expected, abs=1e-5)
    assert model.score_trees([cut]) != pytest.approx(model.score_trees(trees[:1])[:1], abs=1e-4)


def test_prompts_of_files_with_one_name_are_not_mixed_up(trained: Any) -> None:
    run = trained("plain").run
    trees, policy = as_rollouts(run, tiny_tokenizer(chat=True), "auto")
    first = next(iter(policy.rows))
    other = PromptTree("another prompt", (), first)
    known = run.rows.datasets[1].trees
    twice = rows_by_source([*known, other])
    assert twice[first] is None and len(twice) == len(rows_by_source(known))
    folder = find_reward_model(str(run.folder))
    assert folder is not None
    model = load_reward_function("r", folder, CPU, replace(policy, rows=twice))
    with pytest.raises(DataError, match="different names"):
        model.score_trees([t for t in trees if t.source == first])


@pytest.mark.parametrize("kind", ["plain", "encoder", "open"])
def test_a_policy_that_ends_at_once_is_judged_too(tmp_path: Path, trained: Any, kind: str) -> None:
    """Its completion is EOS alone: no text and, if the reward model was trained without EOS (data.add_eos=false), no token."""
    if kind == "open":
        api.train(reward_run(tmp_path, tiny_model_folder(tmp_path / "model"), data={"add_eos": False}), quiet=True)
        run = Run(api.as_config(tmp_path / "reward/config.resolved.yaml"), quiet=True)
        run.evaluate()
    else:
        run = trained(kind).run
    tokenizer = tiny_tokenizer()
    trees, policy = as_rollouts(run, tokenizer)
    at_once = replace(trees[0], completion_ids=(np.array([tokenizer.eos_token_id], np.int32),), truncated=(False,))
    some = replace(trees[1], completion_ids=trees[1].completion_ids[:1], truncated=trees[1].truncated[:1])
    judge = load_reward(str(run.folder), policy)
    both = judge(["", ""], ["", "some"], [at_once, some])
    alone = [judge([""], ["x"], [t])[0] for t in (at_once, some)]
    assert both.tolist() == pytest.approx(alone, abs=1e-5) and both[0] != both[1]
    if kind == "open":  # the score at the prompt's last token
        from transformers import AutoModelForSequenceClassification

        folder = find_reward_model(str(run.folder))
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([at_once.prompt_ids.tolist()])).logits[0, 0]
        assert both[0] == pytest.approx(float(expected), abs=1e-5)


def test_the_reward_models_of_other_people(tmp_path: Path) -> None:
    """A folder with one label and none of our files."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(encoder_folder(tmp_path / "e"), num_labels=1)
    model.save_pretrained(tmp_path / "foreign")
    tokenizer = encoder_tokenizer()
    tokenizer.save_pretrained(tmp_path / "foreign")
    batch = tokenizer(["p", "p"], ["good", "bad one"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**batch).logits[:, 0].tolist()
    assert load_reward(str(tmp_path / "foreign"))(["p", "p"], ["good", "bad one"]).tolist() == pytest.approx(
        expected, abs=1e-5
    )


# ---- in online methods ----------------------------------------------------------------------------------------------


def online(folder: Path, model: str, reward: Any, **algorithm: Any) -> dict[str, Any]:
    return {
        "model": {"path": model, "dtype": "fp32"},
        "data": {"path": write_jsonl(folder / "p.jsonl", polite_rows(12)), "validation_rows": 4, "max_length": 128},
        "algorithm": {"name": "ppo", "samples": 2, "max_new_tokens": 4, "epochs": 1, **algorithm},
        "reward": reward,
        "train": {"max_steps": 1, "batch_size": 4, "lr": 1e-3},
        "evaluation": {"samples": 0, "every": None},
        "output": str(folder / "online"),
    }


def test_an_online_run_is_judged_by_the_reward_model(tmp_path: Path, trained: Any) -> None:
    run, _, model = trained("chat")
    config = online(tmp_path, model, {str(run.folder): 1.0, "device": "cpu"}, name="rloo")
    policy = Run(api.as_config(config), quiet=True)
    groups = policy.built.algorithm.writer.write(policy.rows.trees[1], 0)
    expected = rewards_of(run.built.parts.engine, [g.tree for g in groups])
    assert torch.cat([g.rewards for g in groups]).tolist() == pytest.approx(expected, abs=1e-5)
    assert "eval/reward" in api.train(config, quiet=True).after


def test_ppos_value_model_starts_as_the_reward_model(tmp_path: Path, trained: Any) -> None:
    reward, _, model = trained("plain")
    config = online(tmp_path, model, {str(reward.folder): 0.5, "words": 0.1}, value="separate")
    run = Run(api.as_config(config), quiet=True)
    value = run.built.parts.modules["value"]
    theirs = backbone_of(reward.built.parts.model).state_dict()
    assert all(torch.equal(w, theirs[n]) for n, w in backbone_of(value.backbone).state_dict().items())
    assert torch.allclose(value.head.weight, 0.5 * head_of(reward.built.parts.model).weight)
    zero = Run(api.as_config({**config, "algorithm": {**config["algorithm"], "value_init": "zero"}}), quiet=True)
    assert not zero.built.parts.modules["value"].head.weight.any()
    assert api.train(config, quiet=True).steps == 1


@pytest.mark.parametrize("why", ["encoder", "no reward model", "another architecture"])
def test_a_value_model_that_cannot_start_there(tmp_path: Path, trained: Any, why: str) -> None:
    model = tiny_model_folder(tmp_path / "model")
    reward = "words"
    if why == "encoder":
        reward = str(trained("encoder").run.folder)
    if why == "another architecture":
        from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

        config = LlamaConfig.from_pretrained(model, num_labels=1, num_hidden_layers=2)
        LlamaForSequenceClassification(config).save_pretrained(tmp_path / "larger")
        AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "larger")
        reward = str(tmp_path / "larger")
    config = online(tmp_path, model, reward, value="separate")
    run = Run(api.as_config(config), quiet=True)
    assert not run.built.parts.modules["value"].head.weight.any()
    config["algorithm"]["value_init"] = "reward"
    with pytest.raises(ConfigError, match=r"algorithm\.value_init: is reward, but"):
        _ = Run(api.as_config(config), quiet=True).built


def test_a_head_on_the_policy_cannot_start_as_a_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set value: separate"):
        api.as_config(online(tmp_path, "m", "words", value_init="reward"))


# ---- the section, identity, refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written", ["words", {"words": 1.0}, {"words": -0.5, "sentiment": 1.0}, {"words": 1.0, "device": "cpu"}]
)
def test_the_section_stays_as_it_was_written(tmp_path: Path, written: Any) -> None:
    config = config_from_mapping(online(tmp_path, "m", written))
    assert config.model_dump(mode="json")["reward"] == written
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert api.as_config(again) == config


@pytest.mark.parametrize("written", [{"words": "much"}, {"words": 1.0, "device": "tpu"}, 3])
def test_a_section_that_is_none(tmp_path: Path, written: Any) -> None:
    with pytest.raises(ConfigError, match="reward"):
        config_from_mapping(online(tmp_path, "m", written))


def test_folders_that_hold_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a reward model"):
        load_reward(tiny_model_folder(tmp_path / "policy"))
    config = tmp_path / "policy" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": -1}))  # damaged
    with pytest.raises(ConfigError, match="no architecture named"):
        load_reward(str(config.parent))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.resolved.yaml").write_text("")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        load_reward(str(tmp_path / "new"))
    with pytest.raises(ConfigError, match="runs/nowhere: no such folder"):
        load_reward("runs/nowhere")
    with pytest.raises(ConfigError, match="'stage:reward' is a pipeline's stage"):
        load_reward("stage:reward")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"reward\.device: is cuda, but no CUDA device is visible"):
            load_reward({tiny_model_folder(tmp_path / "m"): 1.0, "device": "cuda"})


def test_a_reward_model_is_no_policy(tmp_path: Path, trained: Any) -> None:
    folder = find_reward_model(str(trained("plain").run.folder))
    with pytest.raises(ModelError, match=r"a classifier or reward model \(it has score.weight\), which writes nothing"):
        api.train(online(tmp_path, str(folder), "words"), quiet=True)


def test_a_changed_reward_is_another_run(tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def f(prompts, completions):\n    return [float(len(c)) for c in completions]\n")
    config = online(tmp_path, tiny_model_folder(tmp_path / "model"), f"{file}:f", name="rloo")
    api.train(config, quiet=True)
    identity = tmp_path / "online" / "identity.json"
    kept = identity.read_text()
    api.train(config, quiet=True)
    file.write_text(file.read_text() + "# changed\n")
    with pytest.raises(CheckpointError, match=r"content of reward .*rewards\.py:f"):
        api.train(config, quiet=True)
    # a run of an older version, which did not record it, still resumes
    old = json.loads(kept)
    identity.write_text(json.dumps({k: v for k, v in old.items() if not k.startswith("content of")}))
    identity.with_name("sums.json").unlink()
    api.train(config, quiet=True)


def test_the_content_of_a_reward_model_is_its_weights(tmp_path: Path, trained: Any) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(find_reward_model(str(trained("plain").run.folder)), folder)  # type: ignore[type-var]
    (tmp_path / "words").mkdir()  # a folder with a built-in reward's name is not a reward model
    config = api.as_config(online(tmp_path, "m", {str(folder): 1.0, "words": 1.0}))
    with contextlib.chdir(tmp_path):
        (one,) = reward_contents(config).values()
    (folder / "model.safetensors").write_bytes(b"other")
    (other,) = reward_contents(config).values()
    assert one != other


def test_the_best_checkpoint_is_taken(tmp_path: Path) -> None:
    config = reward_run(tmp_path, tiny_model_folder(tmp_path / "model"))
    config["train"]["max_steps"] = 3
    config |= {"evaluation": {"every": 1}, "checkpoint": {"every": 1, "metric": "eval/loss", "mode": "max"}}
    result = api.train(config, quiet=True)
    assert result.best_step is not None and result.best_step < result.steps
    assert find_reward_model(config["output"]) == result.folder / f"checkpoints/step-{result.best_step}/model"


def test_a_prompt_that_cannot_be_told_is_no_other_rows() -> None:
    tokenizer = tiny_tokenizer()
    policy = PolicyText(tokenizer, rows={"x.jsonl:1": None})
    judge = RewardModel(None, tokenizer, True, "auto", 32, True, policy)  # type: ignore[arg-type]
    tree = TokenTree(0, np.array([5, 6], np.int32), (np.array([7], np.int32),), (True,), "x.jsonl:1")
    with pytest.raises(DataError, match="give the data files different names"):
        judge.score_trees([tree])
