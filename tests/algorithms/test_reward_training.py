"""Reward models, from a config to a folder that others can load: equal scores, exact resume, LoRA heads, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import ENCODERS, encoder_folder
from families import family_configs, some_pairs, tiny_model
from steps import train_until_killed
from tiny import polite_rows, tiny_model_folder, tiny_tokenizer, write_jsonl

from penchant import api
from penchant.algorithms.reward_model import RewardModelConfig, RewardTraining
from penchant.data.packing import pack
from penchant.errors import ConfigError, DataError, ModelError
from penchant.logprobs import Scorer
from penchant.models.reward import choose_padding, head_of
from penchant.rewards.reward_model import CausalRewards, by_length, make_scorer, rewards_of
from penchant.runs import Run
from penchant.runs.parts import model_writer


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    return {
        "model": {"path": tiny_model_folder(tmp_path / "model"), "dtype": "fp32"},
        "data": {"path": write_jsonl(tmp_path / "pairs.jsonl", polite_rows()), "validation_rows": 6, "max_length": 128},
        "algorithm": {"name": "reward_model"},
        "train": {"epochs": 2, "batch_size": 6, "tokens_per_step": 600, "lr": 3e-3, "warmup_fraction": 0.0},
        "output": str(tmp_path / "run"),
    }


@pytest.fixture
def encoder(base: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {**base, "model": {"path": encoder_folder(tmp_path / "encoder"), "dtype": "fp32"}}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def stranger(folder: Path) -> tuple[Any, Any]:
    """Scores computed with transformers alone, without Penchant."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval(), AutoTokenizer.from_pretrained(folder)


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("live_reports")
def test_a_causal_model_learns_and_leaves_its_evidence(base: dict[str, Any]) -> None:
    result = api.train(base, quiet=True)
    assert result.after["eval/loss"] < 0.1 and result.after["eval/rewards/accuracies"] == 1.0
    assert "eval/rewards/accuracies/ci" in result.after and 0 <= result.after["eval/calibration/ece"] <= 0.5
    kept = json.loads((result.folder / "calibration.json").read_text())
    assert kept["step"] == result.steps and sum(b["rows"] for b in kept["calibration"]["bins"]) == 6
    report = (result.folder / "report.html").read_text()
    assert "Reliability" in report and "longer answer" in report
    evaluated = api.evaluate(result.folder, quiet=True)
    assert evaluated["eval/loss"] == pytest.approx(result.after["eval/loss"], rel=1e-6)
    assert evaluated["tables"]["length"]["longer_wins"] == result.after["eval/length/longer_wins"]


def test_an_encoder_learns(encoder: dict[str, Any]) -> None:
    encoder["train"] |= {"epochs": 4}
    encoder["data"]["max_length"] = 1024  # larger than its own limit, which then applies
    result = api.train(encoder, quiet=True)
    assert result.after["eval/rewards/accuracies"] == 1.0
    assert result.after["eval/loss"] < result.before["eval/loss"] - 0.1


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_micro_batches_do_not_matter(base: dict[str, Any], encoder: dict[str, Any], kind: str) -> None:
    """The gradient of one step is the same for 1x8 and 4x2."""
    run = Run(api.as_config(base if kind == "causal" else encoder), quiet=True)
    training = RewardTraining(run.built.parts.engine, RewardModelConfig(name="reward_model", centring=0.1))
    run.built.parts.model.double()
    trees = run.rows.trees[0][:8]
    cut = {}
    for sizes in ((8,), (2, 2, 2, 2), (5, 3)):
        cut[sizes] = gradient(training, trees, sizes, shared=run.built.parts.engine.shared)
    for other in ((2, 2, 2, 2), (5, 3)):
        assert (cut[other] - cut[8,]).norm() <= 1e-6 * cut[8,].norm()


def gradient(training: RewardTraining, trees: Any, sizes: tuple[int, ...], *, shared: bool) -> torch.Tensor:
    model = training.scorer.model
    model.zero_grad()
    at = 0
    for n in sizes:
        batch = pack(trees[at : at + n], shared=shared)
        (training.loss(training.score(batch)).losses.sum() / len(trees)).backward()
        assert training.weights(batch) == {"main": float(n)}
        at += n
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["lora", "encoder"])
def test_a_killed_run_ends_where_an_uninterrupted_one_ends(
    base: dict[str, Any], encoder: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config = encoder if kind == "encoder" else base
    config |= {"checkpoint": {"every": 1}} | ({"lora": {"r": 4, "dropout": 0.1}} if kind == "lora" else {})
    whole = api.train(config, quiet=True)
    config["output"] = str(tmp_path / "killed")
    train_until_killed(config, 3, monkeypatch)
    resumed = api.train(config, quiet=True)
    for name in ("metrics.jsonl", "calibration.json"):
        assert (whole.folder / name).read_bytes() == (resumed.folder / name).read_bytes()
    for name in ("state.safetensors", "model/model.safetensors"):
        file = f"checkpoints/step-{whole.steps}/{name}"
        assert (whole.folder / file).read_bytes() == (resumed.folder / file).read_bytes()


def test_margins_from_scores(base: dict[str, Any], tmp_path: Path) -> None:
    rows = [{**r, "chosen_score": 3.0, "rejected_score": 1.0} for r in polite_rows()]
    base["data"]["path"] = write_jsonl(tmp_path / "scored.jsonl", rows)
    plain = api.train(base, quiet=True)
    wide = api.train(base, "algorithm.margin=scores", f"output={tmp_path}/wide", quiet=True)
    assert wide.before["eval/loss"] > plain.before["eval/loss"] + 1.0  # log(1 + e^2) against log 2
    assert wide.after["eval/rewards/margins"] > plain.after["eval/rewards/margins"]


@pytest.mark.slow
def test_centring_moves_the_mean_reward_to_zero(base: dict[str, Any], tmp_path: Path) -> None:
    free = api.train(base, quiet=True).after
    held = api.train(base, "algorithm.centring=0.5", "train.epochs=5", f"output={tmp_path}/c", quiet=True).after
    middle = abs(held["eval/rewards/chosen"] + held["eval/rewards/rejected"])
    assert middle < 0.5
    off = api.train(base, "algorithm.centring=0.5", f"output={tmp_path}/off", quiet=True).after
    # same rows, steps and start, so the difference is due to centering
    assert off["eval/rewards/chosen"] != free["eval/rewards/chosen"]


# ---- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2-window"])
def test_the_score_is_the_heads_at_the_last_token(family: str) -> None:
    """Shared, separate and padded packing, compared with one plain pass per completion."""
    model = tiny_model(family)
    torch.manual_seed(0)
    model.score = torch.nn.Linear(32, 1, bias=False, dtype=torch.float64)
    trees = some_pairs()
    expected = []
    with torch.no_grad():
        for tree in trees:
            for ids in tree.completion_ids:
                row = torch.tensor(np.concatenate([tree.prompt_ids, ids])).long()[None]
                hidden = model.base_model(row).last_hidden_state[0, -1]
                expected.append(float(model.score.weight[0] @ hidden))
    for packing in ("shared", "separate", "padded"):
        scorer = CausalRewards(Scorer(model, packing))  # type: ignore[arg-type]
        with torch.no_grad():
            found = scorer.rewards(pack(trees, shared=scorer.shared)).tolist()
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("lora,pad", [(False, True), (True, False)])
def test_a_stranger_gets_our_scores_from_the_saved_causal_model(base: dict[str, Any], lora: bool, pad: bool) -> None:
    """With padding on both sides and single rows, for tokenizers with pad == EOS or without a pad token."""
    folder = Path(base["model"]["path"])
    tiny_tokenizer(pad=pad).save_pretrained(folder)
    base |= {"lora": {"r": 4}} if lora else {}
    base["train"] |= {"lr": 1e-2, "max_steps": 1}
    base["evaluation"] = {"every": None, "at_start": False}
    result = api.train(base, quiet=True)
    run = Run(api.as_config(result.folder / "config.resolved.yaml"), quiet=True)
    run.evaluate()
    trees = run.rows.trees[1]
    ours = rewards_of(run.built.parts.engine, trees)
    model, tokenizer = stranger(result.model)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    rows = [np.concatenate([t.prompt_ids, c]).tolist() for t in trees for c in t.completion_ids]
    assert all(r[-1] == tokenizer.eos_token_id for r in rows) and len({len(r) for r in rows}) > 1
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        with torch.no_grad():
            theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].tolist()
        assert theirs == pytest.approx(ours, abs=2e-4), side
    with torch.no_grad():
        alone = [float(model(input_ids=torch.tensor([r])).logits[0, 0]) for r in rows]
    assert alone == pytest.approx(ours, abs=2e-4)
    # and from text, by the settings saved beside the model
    text = [t.prompt + t.completions[0].text + tokenizer.eos_token for t in run.rows.datasets[1].trees]  # type: ignore[union-attr, operator]
    tokenizer.padding_side = "right"
    batch = tokenizer(text, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        theirs = model(**batch).logits[:, 0].tolist()
    assert theirs == pytest.approx(ours[::2], abs=2e-4)


@pytest.mark.parametrize("family", ENCODERS)
def test_a_stranger_gets_our_scores_from_the_saved_encoder(base: dict[str, Any], tmp_path: Path, family: str) -> None:
    base |= {"model": {"path": encoder_folder(tmp_path / "encoder", family), "dtype": "fp32"}}
    run = Run(api.as_config(base), quiet=True)
    ours = rewards_of(run.built.parts.engine, run.rows.trees[1])
    assert np.std(ours) > 1e-3
    model_writer(run.built, run.rows)(tmp_path / "saved")
    model, tokenizer = stranger(tmp_path / "saved")
    pairs = [(t.prompt, c.text) for t in run.rows.datasets[1].trees for c in t.completions]  # type: ignore[union-attr]
    batch = tokenizer([p for p, _ in pairs], [c for _, c in pairs], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert model(**batch).logits[:, 0].tolist() == pytest.approx(ours, abs=1e-5)


def test_padding_is_never_a_token_that_ends_a_text() -> None:
    for tokenizer in (tiny_tokenizer(pad=True), tiny_tokenizer(), tiny_tokenizer(bos=False)):
        choose_padding(tokenizer)
        assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
    alone = tiny_tokenizer(bos=False)
    alone.unk_token = None
    alone.pad_token = None
    choose_padding(alone)
    assert alone.pad_token == "<|pad|>" and alone.pad_token_id == len(alone) - 1


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_a_new_padding_token_gets_a_row_of_its_own(base: dict[str, Any], tmp_path: Path, lora: Any) -> None:
    """GPT-2 has a single special token, and no spare row in its embedding."""
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.unk_token = tokenizer.eos_token
    config = family_configs()["gpt2"]()
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    base |= {"model": {"path": str(tmp_path / "gpt2"), "dtype": "fp32"}, "lora": lora}
    run = Run(api.as_config(base), quiet=True)
    ours = rewards_of(run.built.parts.engine, run.rows.trees[1])
    model_writer(run.built, run.rows)(tmp_path / "saved")
    model, saved = stranger(tmp_path / "saved")
    assert saved.pad_token_id == 259 and model.get_input_embeddings().weight.shape[0] == 260
    rows = [np.concatenate([t.prompt_ids, c]).tolist() for t in run.rows.trees[1] for c in t.completion_ids]
    batch = saved.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].tolist()
    assert theirs == pytest.approx(ours, abs=1e-5) and np.std(ours) > 1e-2


def test_groups_of_similar_length() -> None:
    assert by_length([4, 10, 8, 3, 1]) == [[1, 2], [0, 3], [4]]


# ---- heads, LoRA, files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_under_lora_the_head_is_trained_and_saved(base: dict[str, Any], encoder: dict[str, Any], kind: str) -> None:
    """A known trap is a reward head that LoRA leaves random and frozen."""
    config = {**(base if kind == "causal" else encoder), "lora": {"r": 4}}
    config["train"] |= {"max_steps": 1, "lr": 1e-2}
    before = head_of(Run(api.as_config(config), quiet=True).built.parts.model).weight.detach().clone()
    result = api.train(config, quiet=True)
    name = "score.weight" if kind == "causal" else "classifier.weight"
    after = weights(result.model)[name]
    assert not torch.allclose(before, after, atol=1e-3)
    run = Run(api.as_config(result.folder / "config.resolved.yaml"), quiet=True)
    run.evaluate()
    assert torch.equal(head_of(run.built.parts.model).weight, after)
    body = [n for n, p in run.built.parts.model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert all("modules_to_save" in n for n in body)
    if kind == "encoder":  # the tiny BERT was saved with its pooler, which therefore gets an adapter too
        assert not any("pooler" in n for n in body)


def test_a_new_pooler_is_trained_under_lora(encoder: dict[str, Any]) -> None:
    from safetensors.torch import load_file, save_file

    file = Path(encoder["model"]["path"]) / "model.safetensors"
    save_file({n: w for n, w in load_file(file).items() if "pooler" not in n}, file, {"format": "pt"})
    run = Run(api.as_config({**encoder, "lora": {"r": 4}}), quiet=True)
    trained = [n for n, p in run.built.parts.model.named_parameters() if p.requires_grad]
    assert any("pooler.modules_to_save" in n for n in trained) and not any(
        "pooler" in n and "lora_" in n for n in trained
    )


def test_peft_loads_the_adapter_with_its_head(base: dict[str, Any]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base["train"]["max_steps"] = 2
    result = api.train({**base, "lora": {"r": 4}}, quiet=True)
    start = AutoModelForSequenceClassification.from_pretrained(base["model"]["path"], num_labels=1)
    model = PeftModel.from_pretrained(start, result.model / "adapter").eval()
    whole, _ = stranger(result.model)
    ids = torch.tensor([[5, 9, 33, 1]])
    model.config.pad_token_id = whole.config.pad_token_id
    with torch.no_grad():
        assert float(model(input_ids=ids).logits) == pytest.approx(float(whole(input_ids=ids).logits), abs=1e-5)


def test_a_reward_model_keeps_its_head_and_a_new_head_is_small(base: dict[str, Any], tmp_path: Path) -> None:
    base["train"]["max_steps"] = 1
    result = api.train(base, quiet=True)
    again = Run(api.as_config({**base, "model": {"path": str(result.model), "dtype": "fp32"}}), quiet=True)
    assert torch.equal(head_of(again.built.parts.model).weight, weights(result.model)["score.weight"])
    fresh = [
        head_of(Run(api.as_config({**base, "train": {"seed": s}}), quiet=True).built.parts.model).weight
        for s in (0, 0, 1)
    ]
    assert torch.equal(fresh[0], fresh[1]) and not torch.equal(fresh[0], fresh[2])
    assert float(fresh[0].detach().std()) == pytest.approx(1 / 33**0.5, rel=0.4)


def test_a_classifier_of_several_labels_gives_its_body(base: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    three = AutoModelForSequenceClassification.from_pretrained(encoder_folder(tmp_path / "e"), num_labels=3)
    three.save_pretrained(tmp_path / "e")
    run = Run(api.as_config({**base, "model": {"path": str(tmp_path / "e"), "dtype": "fp32"}}), quiet=True)
    assert torch.equal(run.built.parts.model.bert.pooler.dense.weight, three.bert.pooler.dense.weight)
    assert head_of(run.built.parts.model).weight.shape == (1, 32)


def test_a_state_dict_on_request(base: dict[str, Any]) -> None:
    base["train"]["max_steps"] = 1
    result = api.train({**base, "checkpoint": {"pt": True}}, quiet=True)
    state = torch.load(result.model / "state_dict.pt", weights_only=True)
    kept = weights(result.model)
    assert state.keys() == kept.keys() and all(torch.equal(state[n], kept[n]) for n in kept)
    model, _ = stranger(result.model)
    model.load_state_dict(state)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,what",
    [
        ({"reward": "words"}, "takes none; leave out reward"),
        ({"loss": "kto"}, "loss and algorithm are both set"),
        ({"algorithm": {"name": "reward_model", "margins": "scores"}}, 'did you mean "margin"'),
        ({"algorithm": "reward_modl"}, 'did you mean "reward_model"'),
        ({"algorithm": {"name": "reward_model", "label_smoothing": 0.6}}, "less than 0.5"),
        ({"reference": {"ema": 0.9}}, "no reference that could move"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(base: dict[str, Any], change: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        api.train({**base, **change}, quiet=True)


def test_labels_are_no_pairs(base: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": f" c{i}", "label": i % 2 == 0} for i in range(20)]
    base["data"]["path"] = write_jsonl(tmp_path / "labels.jsonl", rows)
    with pytest.raises(DataError, match=r"these rows are unpaired; give rows with prompt, chosen and rejected$"):
        api.train(base, quiet=True)


def test_pairs_without_scores_have_no_margin(base: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r'algorithm\.name=reward_model needs "chosen_score"'):
        api.train(base, "algorithm.margin=scores", quiet=True)


def test_a_folder_with_half_the_weights_is_refused(base: dict[str, Any]) -> None:
    from safetensors.torch import load_file, save_file

    file = Path(base["model"]["path"]) / "model.safetensors"
    save_file({n: w for n, w in load_file(file).items() if "layers.0.mlp" not in n}, file, {"format": "pt"})
    with pytest.raises(ModelError, match="weights are missing"):
        api.train(base, quiet=True)


def test_packed_attention_is_refused_for_an_encoder() -> None:
    with pytest.raises(ConfigError, match=r"model\.attention: varlen is for packed rows"):
        make_scorer(None, True, None, "auto", "auto", "varlen")


def test_make_scorer_uses_the_fast_path_where_it_can(base: dict[str, Any]) -> None:
    run = Run(api.as_config(base), quiet=True)
    slow, _ = make_scorer(run.built.parts.model, False, run.rows.tokenizer, "auto", "off")
    assert run.built.parts.engine.fast and not slow.fast
    assert rewards_of(run.built.parts.engine, run.rows.trees[0]) == pytest.approx(
        rewards_of(slow, run.rows.trees[0]), abs=1e-5
    )
