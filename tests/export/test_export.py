"""Every export format of a tiny run's model: loads in the usual way and equals the run's own model; errors are refused."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from parameters import by_default
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.cli import main
from penchant.errors import CheckpointError, ConfigError, ModelError
from penchant.export.card import _front_matter, strip_paths
from penchant.export.formats import DTYPES, FORMATS, compare_outputs
from penchant.export.subject import outputs

ROW = [[5, 99, 17, 240, 31, 8]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs: full, lora, reward, reward-lora."""
    tmp = tmp_path_factory.mktemp("export")
    base = tiny_model_folder(tmp / "model", chat=True)
    _add_a_merge(tmp / "model" / "tokenizer.json")
    config: dict[str, Any] = {
        "model": {"path": base, "dtype": "fp32"},
        "data": {
            "path": write_jsonl(tmp / "pairs|`x`.jsonl", polite_rows(12)),
            "validation_rows": 4,
            "max_length": 128,
        },
        "train": {"max_steps": 2, "batch_size": 4, "lr": 1e-2},
        "evaluation": {"samples": 2, "sample_tokens": 4, "kl_prompts": 0},
        "checkpoint": {"every": 1},
    }
    lora = {"lora": {"r": 4}}
    reward = {"algorithm": "reward_model"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENCHANT_CACHE", str(tmp / "cache"))
        for name, more in (("full", {}), ("lora", lora), ("reward", reward), ("reward-lora", {**reward, **lora})):
            api.train({**config, **more, "output": str(tmp / name)}, quiet=True)
        config["model"]["dtype"] = "bf16"
        for name, more in (("bf16", {}), ("bf16-lora", lora), ("bf16-reward", reward)):
            api.train({**config, **more, "output": str(tmp / name)}, quiet=True)
    return tmp


def _add_a_merge(path: Path) -> None:
    """Add a merge, since no reader accepts a GGUF file without any. The tiny model has a spare row for its token."""
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["er"] = 259
    tokenizer["model"]["merges"] = [["e", "r"]]
    path.write_text(json.dumps(tokenizer))


def _model(run: Path, step: int = 2) -> Path:
    return run / "checkpoints" / f"step-{step}" / "model"


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_safetensors_is_the_runs_model_to_the_last_bit(world: Path, tmp_path: Path) -> None:
    result = api.export(world / "full", to="safetensors", output=tmp_path / "out", step="1")
    assert result.check.own == result.check.read == 0.0 and result.check.greedy == 1.0 and result.step == 1
    assert torch.equal(outputs(_load(result.folder), ROW), outputs(_load(_model(world / "full", 1)), ROW))
    assert not torch.equal(outputs(_load(result.folder), ROW), outputs(_load(_model(world / "full")), ROW))
    assert not list(tmp_path.glob(".tmp-*"))


def test_shards_are_as_small_as_asked_for(world: Path, tmp_path: Path) -> None:
    result = api.export(world / "full", to="safetensors", output=tmp_path / "out", max_shard_size="30KB")
    assert len(list(result.folder.glob("*.safetensors"))) > 2 and result.check.own == 0.0


def test_pt_is_read_without_unpickling_anything(world: Path, tmp_path: Path) -> None:
    result = api.export(world / "lora", to="pt", output=tmp_path / "out")
    state = torch.load(result.folder / "state_dict.pt", weights_only=True)
    assert all(type(v) is torch.Tensor for v in state.values())
    # the tied head is listed under its name, but stored once
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert not list(result.folder.glob("*.safetensors")) and (result.folder / "tokenizer.json").exists()


def test_merged_and_adapter_are_the_same_model(world: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    merged = api.export(world / "lora", to="merged", output=tmp_path / "merged")
    adapter = api.export(world / "lora", to="adapter", output=tmp_path / "adapter")
    assert 0 < merged.check.own <= merged.check.own_limit and adapter.check.own == 0.0 == adapter.check.read
    read = PeftModel.from_pretrained(_load(world / "model"), str(adapter.folder)).eval()
    torch.testing.assert_close(outputs(read, ROW), outputs(_load(merged.folder), ROW), rtol=0, atol=1e-5)
    assert not torch.allclose(outputs(read, ROW), outputs(_load(world / "model"), ROW), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "to,dtype",
    by_default(
        itertools.product(("safetensors", "pt", "adapter"), ("bf16", "fp16")),
        [("safetensors", "bf16"), ("pt", "fp16"), ("adapter", "bf16")],
    ),
)
def test_a_narrower_type_holds_the_rounded_weights_exactly(world: Path, tmp_path: Path, to: str, dtype: str) -> None:
    result = api.export(world / "lora", to=to, output=tmp_path / "out", dtype=dtype)
    assert result.check.read == 0.0 and 0.0 < result.check.own <= result.check.own_limit
    assert result.dtype == dtype


def _names(folder: Path) -> dict[str, torch.dtype]:
    """Names of the tensors in a folder's safetensors files."""
    from safetensors.torch import load_file

    return {name: value.dtype for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize(
    "run,dtype",
    by_default(
        itertools.product(("bf16", "bf16-reward", "full", "bf16-lora", "lora"), ("auto", "fp16", "fp32")),
        [*((run, "auto") for run in ("bf16", "bf16-reward", "full", "bf16-lora")), ("bf16", "fp32"), ("lora", "fp16")],
    ),
)
def test_a_folder_loads_in_the_type_that_was_written_and_holds_no_tied_weight_twice(
    world: Path, tmp_path: Path, run: str, dtype: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    lora = run.endswith("lora")
    to = "merged" if lora else "safetensors"
    result = api.export(world / run, to=to, output=tmp_path / "out", dtype=dtype, max_shard_size="30KB")
    stored = _names(world / "model" if lora else _model(world / run))
    written = _names(result.folder)
    assert set(written) == set(stored) and "lm_head.weight" not in written and len(written) == 11 + ("reward" in run)
    if dtype == "auto" and not lora:
        assert written == stored
    loader = AutoModelForSequenceClassification if "reward" in run else AutoModelForCausalLM
    model = loader.from_pretrained(result.folder)  # as in the model card, without a dtype
    assert {p.dtype for p in model.parameters()} == set(written.values()) == {DTYPES[result.dtype]}
    assert json.loads((result.folder / "config.json").read_text())["dtype"] == str(DTYPES[result.dtype])[6:]


@pytest.mark.parametrize("run", by_default(["bf16", "bf16-lora", "bf16-reward", "full"], ["bf16-lora", "full"]))
def test_the_config_beside_a_state_dict_names_its_type(world: Path, tmp_path: Path, run: str) -> None:
    result = api.export(world / run, to="pt", output=tmp_path / "out")
    state = torch.load(result.folder / "state_dict.pt", weights_only=True)
    code = (result.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(result.folder)), names)
    assert {p.dtype for p in names["model"].parameters()} == {v.dtype for v in state.values()} == {DTYPES[result.dtype]}
    assert json.loads((result.folder / "config.json").read_text())["dtype"] == str(DTYPES[result.dtype])[6:]
    if "reward" not in run:
        assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


@pytest.mark.parametrize("to", ["safetensors", "pt", "merged", "adapter"])
def test_a_reward_model_keeps_its_scores_and_how_its_texts_are_made(world: Path, tmp_path: Path, to: str) -> None:
    result = api.export(world / "reward-lora", to=to, output=tmp_path / "out")
    assert result.check.greedy is None and result.check.read == 0.0 and result.check.good
    assert (result.folder / "reward_settings.json").exists()
    text = (result.folder / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in text and "Bradley-Terry" in text


def test_a_wrong_weight_is_found_and_kept_aside(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    form = FORMATS["safetensors"]

    def spoiled(subject: Any, request: Any, dtype: str, folder: Path) -> Any:
        written = form.write(subject, request, dtype, folder)
        (path,) = folder.glob("*.safetensors")
        state = safetensors.torch.load_file(path)
        state["model.norm.weight"][3] += 1e-3
        safetensors.torch.save_file(state, path, metadata={"format": "pt"})
        return written

    import dataclasses

    monkeypatch.setitem(FORMATS, "safetensors", dataclasses.replace(form, write=spoiled))
    with pytest.raises(ModelError, match="not the run's model"):
        api.export(world / "full", to="safetensors", output=tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.failed" / "export.json").exists()
    assert json.loads((tmp_path / "out.failed" / "export.json").read_text())["check"]["good"] is False


def test_what_cannot_be_is_refused_and_nothing_is_overwritten(world: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="onnx is not an export format; there are safetensors, pt, merged, adapter, gguf"
    ):
        api.export(world / "full", to="onnx")
    with pytest.raises(ConfigError, match="trained the whole model; use safetensors"):
        api.export(world / "full", to="merged")
    with pytest.raises(ConfigError, match="safetensors has no q8_0"):
        api.export(world / "full", to="safetensors", dtype="q8_0")
    with pytest.raises(ConfigError, match="is not a size"):
        api.export(world / "full", to="safetensors", max_shard_size="much")
    with pytest.raises(ConfigError, match="reward model"):
        api.export(world / "reward", to="gguf")
    with pytest.raises(CheckpointError, match=r"name one of its runs: .*full"):
        api.export(world, to="safetensors")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        api.export(world / "full", to="safetensors", step="7")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        api.export(world / "full", to="safetensors", output=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_checkpoint_that_was_changed_is_not_exported(world: Path, tmp_path: Path) -> None:
    for pattern in ("*.safetensors", "../state.json"):  # the loaded files, and one beside them
        shutil.copytree(world / "full", tmp_path / "run")
        (path,) = _model(tmp_path / "run").glob(pattern)
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        with pytest.raises(CheckpointError, match="differs from what was written"):
            api.export(tmp_path / "run", to="safetensors")
        shutil.rmtree(tmp_path / "run")


def test_the_card_is_valid_says_what_is_known_and_names_no_folder_of_this_machine(world: Path, tmp_path: Path) -> None:
    import hashlib

    from huggingface_hub import ModelCard

    for to in ("safetensors", "adapter", "gguf"):
        result = api.export(world / "lora", to=to, output=tmp_path / to)
        text = (result.folder / "README.md").read_text()
        card = ModelCard(text)
        data = card.data.to_dict()
        assert data["pipeline_tag"] == "text-generation" and "dpo" in data["tags"] and "lora" in data["tags"]
        assert "license" not in data and "No license is chosen" in text
        assert "`-(1-eps) log sigmoid(beta h)" in text and "fingerprint" in text and "held out from training" in text
        files = json.loads((result.folder / "export.json").read_text())["sha256"]
        for name, digest in files.items():
            assert digest in text and hashlib.sha256((result.folder / name).read_bytes()).hexdigest() == digest
        for path in result.folder.iterdir():
            if path.name != "adapter_config.json":
                assert str(world).encode() not in path.read_bytes(), path.name
        assert "`pairs\\|'x'.jsonl`" in text  # an untrusted name is not rendered as markup


def test_the_cards_code_loads_the_folder(world: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(world / "model")
    for to in ("safetensors", "pt", "gguf"):
        result = api.export(world / "full", to=to, output=tmp_path / to)
        code = (result.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        names: dict[str, Any] = {}
        exec(code.replace("FOLDER", str(result.folder)), names)
        assert not names["model"].training  # it is ready for use
        assert names["tokenizer"]("a water, é")["input_ids"] == own("a water, é")["input_ids"]
        found = outputs(names["model"], ROW)
        torch.testing.assert_close(found, outputs(_load(_model(world / "full")), ROW), rtol=0, atol=1e-5)


def test_the_card_names_data_sets_of_the_hub_and_no_files() -> None:
    data = SimpleNamespace(path=["owner/chats-v1.5", "rows/train.jsonl", "/home/me/rows"])
    config = SimpleNamespace(method=SimpleNamespace(name="dpo"), data=data)
    subject: Any = SimpleNamespace(config=config, reward=False, adapter=None, base=SimpleNamespace(path="owner/model"))
    front = yaml.safe_load(_front_matter(subject, FORMATS["safetensors"]).strip("-\n"))
    assert front["datasets"] == ["owner/chats-v1.5"] and front["base_model"] == "owner/model"


def test_paths_lose_their_folders_wherever_they_stand() -> None:
    settings = {"a": "/home/x/data.jsonl", "b": ["~/y.py:f", "owner/name"], "/tmp/reward": 1.0, "c": "words:20-60"}
    assert strip_paths(settings) == {
        "a": "data.jsonl",
        "b": ["y.py:f", "owner/name"],
        "reward": 1.0,
        "c": "words:20-60",
    }


def test_the_command_says_what_it_compared(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(world / "full"), "--to", "safetensors"]) == 0
    out = capsys.readouterr().out
    assert "logits differ by at most 0 " in out and str(world / "full" / "export" / "step-2-safetensors") in out
    assert main(["export", str(world / "full"), "--to", "safetensors"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Collects the folders that were pushed to the hub."""
    folders: list[Path] = []

    def push(folder: Path, repo: str, *, private: bool, message: str) -> str:
        folders.append(folder)
        return f"https://hub/{repo}"

    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr("penchant.export.export.push", push)
    return folders


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_finished_export_is_pushed_as_it_stands(world: Path, tmp_path: Path, pushed: list[Path]) -> None:
    first = api.export(world / "bf16", to="safetensors", output=tmp_path / "out")
    assert pushed == []
    card = first.folder / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nlicense: mit\n", 1))
    before = _files(first.folder)
    said: list[str] = []
    again = api.export(world / "bf16", to="safetensors", output=tmp_path / "out", push="me/tuned", say=said.append)
    assert pushed == [first.folder] and again.url == "https://hub/me/tuned" and _files(first.folder) == before
    assert (again.check, again.dtype, again.step) == (first.check, "bf16", 2) and "as it is" in said[-1]
    with pytest.raises(CheckpointError, match="nothing is overwritten"):  # without a push it is refused as usual
        api.export(world / "bf16", to="safetensors", output=tmp_path / "out")


def test_what_is_not_the_export_asked_for_is_not_pushed(world: Path, tmp_path: Path, pushed: list[Path]) -> None:
    out = tmp_path / "out"
    api.export(world / "full", to="safetensors", output=out)

    def refused(why: str, run: Path = world / "full", to: str = "safetensors", **more: Any) -> None:
        with pytest.raises(CheckpointError, match=f"already exists, and it.*{why}.*nothing is overwritten"):
            api.export(run, to=to, push="me/tuned", **{"output": out, **more})

    refused("another step", step="1")
    refused("another dtype", dtype="bf16")
    refused("another format", to="pt")
    refused("another run", world / "bf16")
    shutil.copytree(world / "bf16", tmp_path / "full")  # another run under the same name
    refused("another checkpoint", tmp_path / "full", dtype="fp32")
    (tmp_path / "empty").mkdir()
    refused("not a finished export", output=tmp_path / "empty")
    (tmp_path / "link").symlink_to(out)
    refused("not a finished export", output=tmp_path / "link")
    assert pushed == []


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda out: (out / "config.json").write_text("{}"), "'config.json' is not as the export wrote it"),
        (lambda out: (out / "notes.txt").write_text("mine"), "'notes.txt' is not as the export wrote it"),
        (lambda out: (out / "tokenizer.json").unlink(), "'tokenizer.json' is missing"),
        (lambda out: (out / "README.md").unlink(), "'README.md' is missing"),
        (lambda out: (out / "export.json").write_text("[1"), "not a finished export"),
        (lambda out: _record(out, checkpoint=None), "does not say which checkpoint"),
        (lambda out: _record(out, sha256=7), "is not as the export wrote it"),
        (lambda out: _record(out, check=[]), "no comparison that was passed"),
        (lambda out: _record(out, check={"tokens": 1}), "no comparison that was passed"),
        (lambda out: _record(out, check={**_about(out)["check"], "read": 9.0}), "no comparison that was passed"),
        (lambda out: _record(out, notes=["\x1b[2J"]), "no comparison that was passed"),
    ],
)
def test_an_export_that_was_changed_is_not_pushed(
    world: Path, tmp_path: Path, pushed: list[Path], spoil: Any, why: str
) -> None:
    out = api.export(world / "full", to="safetensors", output=tmp_path / "out").folder
    spoil(out)
    with pytest.raises(CheckpointError, match=why):
        api.export(world / "full", to="safetensors", output=out, push="me/tuned")
    assert pushed == []


def _about(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "export.json").read_text())
    return found


def _record(folder: Path, **values: Any) -> None:
    """Change the record. None removes a key."""
    kept = {k: v for k, v in {**_about(folder), **values}.items() if v is not None}
    (folder / "export.json").write_text(json.dumps(kept))


def test_a_comparison_is_with_the_weights_written_and_with_the_runs_own_model() -> None:
    """Either check alone would accept another model, and NaN must not count as close."""
    one = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    near, far, nan = one + 1e-6, one + 1.0, one.clone()
    nan[0, 0] = float("nan")

    def good(own: torch.Tensor, written: torch.Tensor, read: torch.Tensor) -> bool:
        return compare_outputs(own, written, read, equal=1e-5, dtype="fp32", exact=False, tokens=2).good

    assert good(one, one, one) and good(near, one, one)
    assert not good(far, one, one) and not good(one, far, one) and not good(one, one, nan)
    assert not good(one, one, one[:1])
