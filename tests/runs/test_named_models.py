"""A run's, a checkpoint's or an adapter's folder where a config asks for a model: settled before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.config import config_from_mapping
from penchant.errors import CheckpointError, ModelError
from penchant.models.load import load_causal_model
from penchant.models.merge import merged_model
from penchant.models.options import ModelConfig
from penchant.plan.outline import OutlinedRun
from penchant.runs import Run
from penchant.runs.find import find_model
from penchant.runs.state import check_models, files_of

CPU = torch.device("cpu")


def values(work: Path, output: str, model: str, **more: Any) -> dict[str, Any]:
    return {
        "model": {"path": model, "device": "cpu", "dtype": "fp32"},
        "data": {"path": str(work / "rows.jsonl"), "max_length": 128},
        "loss": {"name": "dpo"},
        "train": {"max_steps": 1, "threads": 1, "lr": 0.01},
        "output": str(work / output),
        **more,
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the whole model and one of an adapter on it, one step each."""
    folder = tmp_path_factory.mktemp("named")
    write_jsonl(folder / "rows.jsonl", polite_rows(6))
    start = tiny_model_folder(folder / "start")
    api.train(values(folder, "whole", start), quiet=True)
    api.train(values(folder, "lora", start, lora={"r": 2}), quiet=True)
    return folder


def test_a_runs_and_a_checkpoints_folder_stand_for_their_model(work: Path) -> None:
    model = work / "whole/checkpoints/step-1/model"
    for given in (work / "whole", work / "whole/checkpoints/step-1", model):
        config = config_from_mapping(values(work, "next", str(given), reference={"path": str(given)}))
        check_models(config)
        run = Run(config, quiet=True)
        assert (run.config.model.path, run.config.reference.path) == (str(model), str(model))
        assert files_of(config)["models"] == files_of(run.config)["models"]
        assert len(run.rows.tokenizer) > 0


def test_an_adapter_is_merged_into_its_base_before_the_first_step(work: Path, tmp_path: Path) -> None:
    adapter = work / "lora/checkpoints/step-1/model"
    for given in (work / "lora", adapter):
        config = config_from_mapping(values(work, "next", str(given)))
        check_models(config)
        assert Path(OutlinedRun(config, quiet=True).config.model.path).is_dir()
        path = Run(config, quiet=True).config.model.path
        assert path == str(work / "lora/merged/step-1")
    expected = merged_model(ModelConfig(path=str(work / "start")), adapter, CPU)
    ids = torch.arange(12)[None]
    made = load_causal_model(ModelConfig(path=path), CPU)
    assert torch.allclose(made(ids).logits, expected(ids).logits, atol=1e-5)
    assert not torch.allclose(
        made(ids).logits, load_causal_model(ModelConfig(path=str(work / "start")), CPU)(ids).logits, atol=1e-5
    )


def test_an_adapter_that_stands_alone_is_merged_in_the_cache_and_trained_on(work: Path) -> None:
    alone = work / "exported"
    api.export(work / "lora", to="adapter", output=str(alone))
    result = api.train(values(work, "on", str(alone), reference={"path": str(alone)}), quiet=True)
    assert (result.model / "config.json").exists()
    assert find_model(str(work / "on")).base.path == str(result.model)


def test_eval_of_a_config_takes_its_start_from_a_run(work: Path) -> None:
    from penchant.config import dump_config

    file = work / "run.yaml"
    file.write_text(dump_config(config_from_mapping(values(work, "never", str(work / "lora")))))
    assert find_model(str(file)).base.path == str(work / "lora/merged/step-1")


def test_a_run_without_a_checkpoint_or_a_base_that_is_gone_is_a_sentence(work: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.resolved.yaml").write_text((work / "whole/config.resolved.yaml").read_text())
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        Run(config_from_mapping(values(work, "next", str(tmp_path / "empty"))), quiet=True)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere/at/all"}')
    with pytest.raises(ModelError, match="is not there"):
        Run(config_from_mapping(values(work, "next", str(tmp_path / "adapter"))), quiet=True)


def test_saved_models_say_where_an_answer_ends(work: Path, tmp_path: Path) -> None:
    """As transformers and vLLM read it: a turn that ends with another id than the tokenizer's EOS (Gemma, Phi)."""
    from transformers import AddedToken, AutoTokenizer, GenerationConfig

    start = tiny_model_folder(tmp_path / "start", chat=True)
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=True)], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<end_of_turn>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(start)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    for output, lora in (("whole", None), ("lora", {"r": 2})):
        made = api.train({**values(work, "", start, lora=lora), "output": str(tmp_path / output)}, quiet=True)
        folder = made.model
        if lora is not None:
            folder = api.export(tmp_path / output, to="merged", output=str(tmp_path / "exported")).folder
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [tokenizer.eos_token_id, end]
