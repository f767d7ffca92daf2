"""A run, checkpoint or adapter folder given as a model is resolved before the first step."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.config import config_from_mapping
from penchant.errors import CheckpointError, ConfigError, ModelError, PenchantError
from penchant.models.load import load_causal_model, load_tokenizer
from penchant.models.merge import merged_model
from penchant.models.options import ModelConfig
from penchant.plan.outline import OutlinedRun
from penchant.runs import Run
from penchant.runs.find import find_model
from penchant.runs.parts import reference_source
from penchant.runs.rows import Rows
from penchant.runs.sharing import Uncached
from penchant.runs.state import check_models, file_hashes
from penchant.training.console import QuietConsole
from penchant.training.loop import Paused

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
    """A full fine-tuning run and an adapter run on it, one step each."""
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
        assert file_hashes(config)["models"] == file_hashes(run.config)["models"]
        assert len(run.rows.tokenizer) > 0


def test_an_adapter_is_merged_into_its_base_before_the_first_step(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = work / "lora/checkpoints/step-1/model"
    with monkeypatch.context() as patch:  # the run of another user, whose folder cannot be written to
        patch.setattr("os.access", lambda *_: False)
        patch.setenv("PENCHANT_CACHE", str(tmp_path))
        elsewhere = Run(config_from_mapping(values(work, "next", str(adapter))), quiet=True).config.model.path
    assert Path(elsewhere).parent == tmp_path / "reference/merged" and not (work / "lora/merged").exists()
    for given in (work / "lora", adapter):
        config = config_from_mapping(values(work, "next", str(given)))
        check_models(config)
        assert Path(OutlinedRun(config, quiet=True).config.model.path).is_dir()
        path = Run(config, quiet=True).config.model.path
        assert path == str(work / "lora/merged/step-1")
    expected = merged_model(ModelConfig(path=str(work / "start")), adapter, CPU)
    ids = torch.arange(12)[None]
    for folder in (path, elsewhere):
        made = load_causal_model(ModelConfig(path=folder), CPU)
        assert torch.allclose(made(ids).logits, expected(ids).logits, atol=1e-5)
    assert not torch.allclose(
        made(ids).logits, load_causal_model(ModelConfig(path=str(work / "start")), CPU)(ids).logits, atol=1e-5
    )


@pytest.mark.parametrize(
    ("loss", "tokens", "what"),
    [
        ("dpo", 60, "its embedding has 60 tokens"),
        ("pmpo", 300, "its vocabulary is 300"),
        ("dpo", 260, "its tokenizer has"),
    ],
)
def test_a_reference_of_other_tokens_is_refused(work: Path, tmp_path: Path, loss: str, tokens: int, what: str) -> None:
    other = Path(tiny_model_folder(tmp_path / "other"))
    model = load_causal_model(ModelConfig(path=str(other)), CPU)
    model.resize_token_embeddings(tokens)
    model.save_pretrained(other)
    if tokens == 260:
        definition = json.loads((other / "tokenizer.json").read_text())
        vocabulary = definition["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (other / "tokenizer.json").write_text(json.dumps(definition))
    config = values(work, "next", str(work / "start"), loss={"name": loss}, reference={"path": str(other)})
    with pytest.raises(ConfigError, match=f"reference.path: does not fit .*{what}"):
        _ = Run(config_from_mapping(config), quiet=True).built


def test_a_reference_needs_no_token_that_only_pads(work: Path, tmp_path: Path) -> None:
    policy = tiny_model_folder(tmp_path / "policy")
    tokenizer, model = load_tokenizer(policy), load_causal_model(ModelConfig(path=policy), CPU)
    size = model.get_input_embeddings().weight.shape[0]
    tokenizer.add_tokens([f"<{i}>" for i in range(size - len(tokenizer))])
    for folder, add in ((tmp_path / "reference", False), (Path(policy), True)):
        if add:
            tokenizer.add_special_tokens({"pad_token": "<pad of its own>"})
            model.resize_token_embeddings(size + 1)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    config = values(work, "next", policy, reference={"path": str(tmp_path / "reference")})
    assert Run(config_from_mapping(config), quiet=True).built


def test_a_revision_is_that_of_the_models_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr("penchant.runs.rows.load_tokenizer", lambda *named: loaded.append(named))
    for other in ("owner/other", "owner/model"):
        model = {"path": "owner/model", "revision": "v2", "tokenizer": other}
        config = config_from_mapping(
            {"model": model, "data": {"path": "d"}, "reference": {"path": other}, "output": "o"}
        )
        loaded.append((reference_source(config).path, reference_source(config).revision))
        _ = Rows(config, Uncached(), QuietConsole()).tokenizer
    assert loaded == [("owner/other", None)] * 2 + [("owner/model", "v2")] * 2


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
    """In the form that transformers and vLLM read, for turns that do not end with the tokenizer's EOS (Gemma, Phi)."""
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


# ---- model.adapter: continuing to train an adapter ----


def trained_on(work: Path, output: str, adapter: Path | str, **more: Any) -> dict[str, Any]:
    found = values(work, output, str(work / "start"), **more)
    found["model"]["adapter"] = str(adapter)
    found["train"] = {**found["train"], "batch_size": 2, "max_steps": 3}
    return found


@pytest.mark.parametrize("kind", ["adapter", "cached", "frozen"])
def test_the_reference_of_an_adapter_that_is_trained_on_is_its_start(work: Path, tmp_path: Path, kind: str) -> None:
    """Compared with peft's own modules, after training too. At step 0, policy and reference are bitwise equal."""
    from penchant.data.packing import pack
    from penchant.models.lora import with_adapter

    config = trained_on(work, str(tmp_path / "on"), work / "lora", reference={"kind": kind})
    run = Run(config_from_mapping(config), quiet=True)
    assert run.config.lora is not None and run.config.lora.r == 2
    result = run.train()
    assert run.config.model.adapter == str(work / "lora/checkpoints/step-1/model")
    first = json.loads((tmp_path / "on/metrics.jsonl").read_text().splitlines()[0])
    assert first["rewards/margins"] == 0.0 if kind == "adapter" else abs(first["rewards/margins"]) < 1e-4

    trees = run.rows.trees[0][:2]
    reference = run.built.parts.reference
    found = reference.logps(pack(trees))
    with torch.no_grad():
        now = run.built.parts.scorer.logps(pack(trees)).sums
        own = with_adapter(
            load_causal_model(ModelConfig(path=str(work / "start")), CPU), work / "lora/checkpoints/step-1/model"
        )
        expected = []
        for tree in trees:
            for completion in tree.completion_ids:
                ids = torch.tensor([*tree.prompt_ids.tolist(), *completion.tolist()])
                logps = own(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])
                expected.append(logps[len(tree.prompt_ids) - 1 :].sum())
    assert torch.allclose(found, torch.stack(expected), atol=1e-3)
    assert not torch.allclose(now, found, atol=1e-2)

    source = find_model(str(tmp_path / "on"))
    assert source.start is not None and source.start.adapter == work / "lora/checkpoints/step-1/model"
    ids = torch.arange(12)[None]
    assert torch.allclose(source.start.load(CPU)(ids).logits, own(ids).logits, atol=1e-4)
    assert str(result.model).endswith("step-3/model") and (result.model / "adapter_config.json").exists()


def test_a_run_that_trains_an_adapter_on_resumes_to_the_same_numbers(work: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for name, pauses in (("whole", [None]), ("parts", [1, None])):
        for pause in pauses:
            config = trained_on(work, str(tmp_path / name), work / "lora", lora={"dropout": 0.1, "lr_ratio": 4.0})
            run = Run(config_from_mapping(config), quiet=True, pause_at=pause)
            with contextlib.suppress(Paused):
                run.train()
    a, b = (load_file(tmp_path / n / "checkpoints/step-3/model/adapter_model.safetensors") for n in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    made = api.export(tmp_path / "parts", to="merged", output=str(tmp_path / "merged")).folder
    merged = merged_model(ModelConfig(path=str(work / "start")), tmp_path / "parts/checkpoints/step-3/model", CPU)
    ids = torch.arange(12)[None]
    assert torch.allclose(
        load_causal_model(ModelConfig(path=str(made)), CPU)(ids).logits, merged(ids).logits, atol=1e-4
    )
    # with another adapter it is another run
    shutil.copytree(work / "lora/checkpoints/step-1/model", tmp_path / "other")
    with pytest.raises(PenchantError, match="adapter"):
        Run(config_from_mapping(trained_on(work, str(tmp_path / "parts"), tmp_path / "other")), quiet=True).train()


def test_what_is_no_adapter_of_this_model_is_a_sentence(work: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "several" / name).mkdir(parents=True)
        (tmp_path / "several" / name / "adapter_config.json").write_text("{}")
    for given, match in (
        (work / "whole", "is a whole model"),
        (tmp_path / "nowhere", "no such folder"),
        (work / "start", "holds no adapter"),
        (tmp_path / "several", "several adapters .one, two."),
    ):
        with pytest.raises(ModelError, match=match):
            Run(config_from_mapping(trained_on(work, "never", given)), quiet=True)
    twice = trained_on(work, "never", work / "lora")
    twice["model"]["path"] = str(work / "lora/checkpoints/step-1/model")
    with pytest.raises(ConfigError, match="is the adapter's own folder"):
        Run(config_from_mapping(twice), quiet=True)
    twice["model"]["path"] = str(work / "whole")
    with pytest.raises(ModelError, match="not those that the adapter"):
        Run(config_from_mapping(twice), quiet=True).train()
    twice["model"]["adapter"] = [str(work / "lora"), str(work / "lora")]
    with pytest.raises(ConfigError, match="several are named"):
        config_from_mapping(twice)
    judge = trained_on(work, "never", work / "lora", algorithm="reward_model")
    del judge["loss"]
    with pytest.raises(ConfigError, match="a reward model's adapter"):
        Run(config_from_mapping(judge), quiet=True)
