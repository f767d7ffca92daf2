"""A merged adapter equals the model with the adapter, or the merge is refused."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from tiny import tiny_model_folder

from penchant.base.files import one_at_a_time
from penchant.errors import ModelError
from penchant.models import merge
from penchant.models.load import load_causal_model, load_tokenizer, save_model
from penchant.models.lora import add_lora
from penchant.models.options import LoraConfig, ModelConfig


@pytest.fixture
def base(tmp_path: Path) -> ModelConfig:
    return ModelConfig(path=tiny_model_folder(tmp_path / "model"))


@pytest.fixture
def adapter(base: ModelConfig, tmp_path: Path) -> Path:
    model = add_lora(load_causal_model(base, torch.device("cpu")), LoraConfig(r=4, alpha=8), seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    save_model(model, load_tokenizer(base.path), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_w_plus_scaled_b_a(base: ModelConfig, adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = merge.merge_to_folder(base, adapter, tmp_path / "out/merged")
    merged, start = (load_file(f / "model.safetensors") for f in (folder, Path(base.path)))
    deltas = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    b, a = (deltas[f"base_model.model.{name}.lora_{x}.weight"] for x in "BA")
    torch.testing.assert_close(merged[f"{name}.weight"], start[f"{name}.weight"] + 8 / 4 * b @ a)
    assert float((b @ a).abs().max()) > 0.01
    assert [p.name for p in folder.parent.iterdir()] == ["merged"]  # no partial files are left


def test_a_folder_that_computes_something_else_never_stands_at_its_name(
    base: ModelConfig, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Any, tokenizer: Any, folder: Path) -> None:
        start = load_causal_model(base, torch.device("cpu"))  # the base without its adapter
        save_model(start, tokenizer, folder)

    monkeypatch.setattr(merge, "save_model", wrong)
    with pytest.raises(ModelError, match="merging the adapter changed the logits by"):
        merge.merge_to_folder(base, adapter, tmp_path / "out/merged")
    assert not list((tmp_path / "out").iterdir())


def test_another_adapter_at_the_same_place_is_merged_anew(base: ModelConfig, adapter: Path, tmp_path: Path) -> None:
    folder = merge.merge_to_folder(base, adapter, tmp_path / "out/merged")
    before = merge.model_sha256(folder)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 4}))
    assert merge.model_sha256(merge.merge_to_folder(base, adapter, folder)) != before


def test_an_adapter_without_a_tokenizer_gets_that_of_its_base(base: ModelConfig, adapter: Path, tmp_path: Path) -> None:
    """peft saves an adapter alone."""
    for path in adapter.iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    folder = merge.merge_to_folder(base, adapter, tmp_path / "out/merged")
    assert load_tokenizer(str(folder)).get_vocab() == load_tokenizer(base.path).get_vocab()


def test_two_processes_at_once_merge_once(
    base: ModelConfig, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one neither merges nor replaces a folder that the first one may be reading."""
    real, folder, calls = merge.merged_model, tmp_path / "out/merged", []
    second = Thread(target=merge.merge_to_folder, args=(base, adapter, folder))

    def merged_model(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            second.start()
            second.join(0.3)  # it waits for the first one
        return real(*args)

    monkeypatch.setattr(merge, "merged_model", merged_model)
    merge.merge_to_folder(base, adapter, folder)
    second.join()
    assert len(calls) == 1 and [p.name for p in folder.parent.iterdir()] == ["merged"]


def test_an_adapter_of_a_classifier_is_refused(base: ModelConfig, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    with pytest.raises(ModelError, match="SEQ_CLS is not a language model"):
        merge.merged_model(base, adapter, torch.device("cpu"))


def test_an_interrupted_waiter_leaves_the_lock_to_its_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the file, a third process would take a lock of its own and merge at the same time."""
    lock = tmp_path / ".merged.lock"

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with one_at_a_time(lock):
        with monkeypatch.context() as patch:
            patch.setattr("fcntl.flock", interrupt)
            with pytest.raises(KeyboardInterrupt), one_at_a_time(lock):
                pass
        assert lock.exists()
    assert not lock.exists()
