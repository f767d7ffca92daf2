"""Vision-language models: log-probs against the model's own forward, losses in closed form, and which weights stay frozen."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sight import KINDS, own_logp, paint, pictured_rows, seeing_model, write_rows
from tiny import tiny_model_folder

from penchant import api
from penchant.config import config_from_mapping
from penchant.data.load import load_preferences
from penchant.data.packing import pack
from penchant.data.tokenize_pictures import PicturedTokenization
from penchant.errors import CheckpointError, ConfigError, DataError
from penchant.logprobs.packing import choose_pictured
from penchant.models.load import load_causal_model, load_processor
from penchant.models.options import ModelConfig
from penchant.runs import Run
from penchant.training.loop import Paused

BETA = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows with pictures."""
    made = tmp_path_factory.mktemp("vision")
    seeing_model(made / "model")
    write_rows(made, pictured_rows(made))
    return made


def config(folder: Path, output: Path, *overrides: str) -> Any:
    values = {
        "model": {"path": str(folder / "model"), "vision": "frozen", "dtype": "fp32"},
        "data": {"path": str(folder / "pairs.jsonl"), "max_length": 256, "validation_rows": 2},
        "train": {"batch_size": 2, "lr": 1e-3, "epochs": 2},
        "output": str(output),
    }
    return config_from_mapping(values, list(overrides))


def read(path: Path) -> tuple[Any, Any]:
    """Load a checkpoint with transformers alone."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_those_of_the_models_own_forward(tmp_path: Path, kind: str) -> None:
    source = ModelConfig(path=seeing_model(tmp_path / "model", kind), vision="frozen")
    rows = pictured_rows(tmp_path, 4)
    trees = load_preferences(str(write_rows(tmp_path, rows)), image_dir="").trees
    processor, model = load_processor(source), load_causal_model(source, torch.device("cpu")).eval()
    scorer, _ = choose_pictured(model, processor)
    made = PicturedTokenization(processor, "pairs", max_length=256)
    tokens = list(made.all(trees).trees)
    with torch.no_grad():
        found = scorer.logps(pack(tokens, shared=scorer.shared)).sums
    own = [
        own_logp(model, processor, tmp_path, r, r[side][0]["content"]) for r in rows for side in ("chosen", "rejected")
    ]
    assert found.tolist() == pytest.approx(own, abs=2e-3)

    # another picture gives other log-probs, and a picture that was changed on disk is not read
    picture = trees[1].images[0]
    other = replace(trees[1], images=trees[2].images)
    with torch.no_grad():
        there, instead = (scorer.logps(pack(list(made.all([t]).trees), shared=False)).sums for t in (trees[1], other))
    assert (there - instead).abs().min() > 1e-3
    paint(Path(picture.path), 99)
    with pytest.raises(DataError, match="was changed since the rows were read"):
        scorer.logps(pack([tokens[1]], shared=False))


def test_dpo_is_its_formula_and_the_vision_tower_stays(folder: Path, tmp_path: Path) -> None:
    result = Run(config(folder, tmp_path / "run"), quiet=True).train()
    assert result.before["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    rows = pictured_rows(folder)
    start, processor = read(folder / "model")
    trained, own_processor = read(result.model)
    run = Run(config(folder, tmp_path / "run"), quiet=True)
    held_out = run.rows.datasets[1]
    assert held_out is not None
    losses = []
    for tree in held_out.trees:
        row = rows[int(tree.source.rpartition(":")[2]) - 1]
        after, before = (
            [own_logp(m, p, folder, row, row[side][0]["content"]) for side in ("chosen", "rejected")]
            for m, p in ((trained, own_processor), (start, processor))
        )
        margin = BETA * ((after[0] - before[0]) - (after[1] - before[1]))
        losses.append(math.log1p(math.exp(-margin)))
    assert result.after["eval/loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert result.after["eval/loss"] < 0.69
    moved = {
        n.split(".")[1]
        for n, p in trained.named_parameters()
        if not torch.equal(p, start.get_parameter(n)) and "lm_head" not in n
    }
    assert moved == {"text_model"}

    # the checkpoint evaluates like the run, by itself and on a file
    assert api.evaluate(tmp_path / "run", quiet=True)["eval/loss"] == pytest.approx(result.after["eval/loss"], abs=1e-6)
    figures = api.evaluate(tmp_path / "run", data=str(folder / "pairs.jsonl"), quiet=True)
    own = [own_logp(trained, own_processor, folder, r, r["chosen"][0]["content"]) for r in rows]
    lengths = [len(r["chosen"][0]["content"]) + 1 for r in rows]
    assert figures["eval/perplexity/chosen"] == pytest.approx(math.exp(-sum(own) / sum(lengths)), rel=1e-4)
    assert figures["eval/logps/chosen"] == pytest.approx(sum(own) / len(own), rel=1e-5)
    # one question with six pictures makes six prompts
    assert not any("prompts with answers" in note and ": 3" in note for note in figures["notes"])


def test_an_adapter_is_of_the_language_model_and_a_run_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    more = ("lora.r=4", "checkpoint.every=2", "evaluation.every=null")
    whole = Run(config(folder, tmp_path / "whole", *more), quiet=True).train()
    with pytest.raises(Paused):
        Run(config(folder, tmp_path / "again", *more), quiet=True, pause_at=2).train()
    again = Run(config(folder, tmp_path / "again", *more), quiet=True).train()
    name = "adapter_model.safetensors"
    assert (whole.model / name).read_bytes() == (again.model / name).read_bytes()
    losses = [[row["loss"] for row in r.rows if row["kind"] == "train"] for r in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 4

    from peft import PeftModel

    start, processor = read(folder / "model")
    adapted: Any = PeftModel.from_pretrained(start, str(whole.model))
    names = [n for n, _ in adapted.named_parameters() if "lora_" in n]
    assert names and all(".text_model." in n for n in names)
    row = pictured_rows(folder)[1]
    said = row["chosen"][0]["content"]
    with adapted.disable_adapter():
        before = own_logp(adapted, processor, folder, row, said)
    assert abs(own_logp(adapted, processor, folder, row, said) - before) > 1e-3


@pytest.mark.slow
def test_sft_learns_answers_to_pictures(folder: Path, tmp_path: Path) -> None:
    rows = [{"messages": [*r["prompt"], *r["chosen"]], "images": r["images"]} for r in pictured_rows(folder)]
    write_rows(folder, rows, "sft.jsonl")
    more = ("loss=sft", "model.vision=trained", f"data.path={folder / 'sft.jsonl'}", "train.max_steps=2")
    result = Run(config(folder, tmp_path / "sft", *more), quiet=True).train()
    model, _ = read(result.model)
    start, processor = read(folder / "model")
    held_out = Run(config(folder, tmp_path / "sft", *more), quiet=True).rows.datasets[1]
    assert held_out is not None
    some = [pictured_rows(folder)[int(t.source.rpartition(":")[2]) - 1] for t in held_out.trees]
    tokens = sum(len(r["chosen"][0]["content"]) + 1 for r in some)
    for m, found in ((start, result.before), (model, result.after)):
        own = sum(own_logp(m, processor, folder, r, r["chosen"][0]["content"]) for r in some)
        assert found["eval/loss"] == pytest.approx(-own / tokens, rel=1e-4)
    moved = {n.split(".")[1] for n, p in model.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    assert {"vision_model", "connector", "text_model"} <= moved


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("algorithm=rloo", "algorithm"),
        ("train.packing=shared", "train.packing"),
        ("data.template=plain", "data.template"),
        ("evaluation.samples=2", "evaluation.samples"),
        ("launch.processes=2", "launch.processes"),
        ("model.vision=off", "model.vision=frozen"),
    ],
)
def test_what_reads_no_pictures_says_so(folder: Path, tmp_path: Path, override: str, said: str) -> None:
    more = ["reward=words"] if "rloo" in override else []
    more += [f"data.image_dir={folder}"] if "off" in override else []
    with pytest.raises(ConfigError, match=said):
        config(folder, tmp_path, override, *more)


def test_commands_of_text_alone_refuse_such_a_run(folder: Path, tmp_path: Path) -> None:
    from penchant.serve.model import load_chat_model

    given = config(
        folder, tmp_path / "run", "train.max_steps=1", "evaluation.at_start=false", "data.validation_rows=null"
    )
    Run(given, quiet=True).train()
    run = str(tmp_path / "run")
    for call in (
        lambda: load_chat_model(run),
        lambda: api.export(run, to="safetensors"),
        lambda: api.evaluate(run, text=str(write_rows(tmp_path, [{"text": "a"}]))),
    ):
        with pytest.raises(ConfigError, match="handles text alone"):
            call()
    with pytest.raises(ConfigError, match="takes no pictures"):
        load_causal_model(ModelConfig(path=tiny_model_folder(tmp_path / "blind"), vision="frozen"), torch.device("cpu"))


def test_a_comparison_of_given_answers_to_pictures(folder: Path, tmp_path: Path) -> None:
    """Compares log-probs without sampling. One question about several pictures makes as many prompts."""
    more = ("train.max_steps=1", "evaluation.at_start=false", "data.split_seed=0")
    for name, changes in (("one", ("lora.r=4",)), ("other", ("train.lr=1e-2", "train.seed=1"))):
        Run(config(folder, tmp_path / name, *more, *changes), quiet=True).train()
    found = api.compare(tmp_path / "one", tmp_path / "other", quiet=True)
    figures = found.figures
    assert (figures["prompts"], figures["answers"], figures["outcome"]) == (2, 2, "held-out preference accuracy")
    run = Run(config(folder, tmp_path / "one", *more, "lora.r=4"), quiet=True)
    assert run.rows.datasets[1] is not None
    rows = [pictured_rows(folder)[int(t.source.rpartition(":")[2]) - 1] for t in run.rows.datasets[1].trees]
    model, processor = read(folder / "model")
    own = [own_logp(model, processor, folder, r, r["chosen"][0]["content"]) for r in rows]
    lengths = [len(r["chosen"][0]["content"]) + 1 for r in rows]
    assert figures["models"]["start"]["perplexity"] == pytest.approx(math.exp(-sum(own) / sum(lengths)), rel=1e-4)
    assert {"preference_accuracy", "perplexity"} <= figures["models"]["other"].keys()
    assert "given answers" in found.to_text() and Path(api.report(found.folder)).is_file()
    with pytest.raises(ConfigError, match="no answers are generated"):
        api.compare(tmp_path / "one", reward="words")
    with pytest.raises(CheckpointError, match="it is a model: a run's start is compared with it anyway"):
        api.compare(tmp_path / "one", folder / "model")


def test_a_plan_of_a_run_with_pictures(folder: Path, tmp_path: Path) -> None:
    given = config(folder, tmp_path / "run", "train.max_steps=2")
    made = api.plan(given, probe=False)
    run = Run(given, quiet=True)
    assert made.work.tokens == sum(
        t.separate_tokens for step in range(2) for t in (run.rows.trees[0][i] for i in run.schedule.batch(step))
    )
    model, _ = read(folder / "model")
    language = {n: p for n, p in model.named_parameters() if "text_model" in n or "lm_head" in n}
    assert made.parameters == (model.num_parameters(), sum(p.numel() for p in language.values()))
    assert "vision tower" in made.memory.coarse and not (tmp_path / "run").exists()


def test_the_text_part_is_a_model_by_itself(folder: Path) -> None:
    """SmolVLM's folder without vision has its language model's weights, under another name."""
    whole, _ = read(folder / "model")
    part = load_causal_model(ModelConfig(path=str(folder / "model")), torch.device("cpu"))
    own = whole.model.text_model.state_dict()
    assert own and all(torch.equal(own[name], value) for name, value in part.model.state_dict().items())


def test_settings_of_the_image_processor(folder: Path) -> None:
    model = {"path": str(folder / "model"), "vision": "frozen"}
    smaller = load_processor(ModelConfig(**model, image_options={"do_image_splitting": False}))
    assert smaller.image_processor.do_image_splitting is False
    with pytest.raises(ConfigError, match=r"model\.image_options\.max_pixel.*not a setting"):
        load_processor(ModelConfig(**model, image_options={"max_pixel": 7}))
    with pytest.raises(ConfigError, match="vision"):
        config(folder, folder, "model.vision=off", "model.image_options={size: 3}")
