"""Faulty model folders give one error message, in bounded time and memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import LOOPS, damage, make, uses
from processes import forked
from safetensors.torch import load_file, save_file
from tiny import polite_rows, tiny_model_folder, tiny_tokenizer, write_jsonl

from penchant import api
from penchant.errors import ModelError, PenchantError
from penchant.models.folder import bound_templates, check_folder, check_template
from penchant.models.load import load_causal_model, load_tokenizer
from penchant.models.lora import with_adapter
from penchant.models.options import ModelConfig
from penchant.models.reward import load_reward_model
from penchant.serve.model import TemplateRefused, load_chat_model

CPU = torch.device("cpu")


def load(folder: Path) -> Any:
    load_tokenizer(str(folder))
    return load_causal_model(ModelConfig(path=str(folder)), CPU)


def config(**changed: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return changed


def first(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors["model.norm.weight"].view(-1)[:1].fill_(value)


def written(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


UP = "model.layers.0.mlp.up_proj.weight"
INDEX = {"metadata": {}, "weight_map": {"a": "../../x.safetensors"}}
CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a million layers": (config(num_hidden_layers=10**6), "config.json: num_hidden_layers is 1,000,000"),
    "a million experts' labels": (config(num_labels=10**8), "config.json: num_labels"),
    "an enormous vocabulary": (config(vocab_size=10**9), "config.json"),
    "a negative size": (config(hidden_size=-32), "config.json: the model could not be loaded"),
    "digits": (written("config.json", b'{"vocab_size": ' + b"9" * 5000 + b"}"), "config.json: is not JSON"),
    "nesting": (written("config.json", b"[" * 200_000), "config.json: is not JSON"),
    "a list": (written("generation_config.json", b"[1]"), "generation_config.json: holds list"),
    "a code": (
        config(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, model_type="evil"),
        "config",
    ),
    "another shape": (weights(lambda t: t.update({UP: t[UP].t().contiguous()})), rf"{UP} has the shape \[32, 48\]"),
    "whole numbers": (weights(lambda t: t.update({UP: t[UP].to(torch.int32)})), f"{UP} is of type I32"),
    "a missing tensor": (weights(lambda t: t.pop(UP)), f"weights are missing in the folder .{UP}"),
    "more layers": (
        weights(lambda t: t.update({n.replace("layers.0", "layers.1"): w.clone() for n, w in list(t.items())})),
        "holds model.layers.1",
    ),
    "NaN": (weights(first(float("nan"))), "the weight model.norm.weight holds NaN"),
    "infinite": (weights(first(float("-inf"))), "the weight model.norm.weight holds NaN or infinite"),
    "NaN in the config": (config(rms_norm_eps=float("nan")), "logits are NaN|could not be loaded"),
    "a long header": (written("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"), "header does not fit"),
    "half a file": (written("model.safetensors", (100).to_bytes(8, "little") + b'{"a":'), "header does not fit"),
    "a shard elsewhere": (written("model.safetensors.index.json", json.dumps(INDEX).encode()), "not a file of this"),
    "a tokenizer": (
        written("tokenizer.json", b'{"model": {"type": "BPE", "vocab": 7}}'),
        "tokenizer.json: no tokenizer",
    ),
    "a token's id": (
        lambda f: (f / "tokenizer.json").write_text(
            (f / "tokenizer.json").read_text().replace('"!": 3', f'"!": {2**31}')
        ),
        r"tokenizer.json: has a token with the id 2,147,483,648",
    ),
    "a pipe": (
        lambda f: ((f / "tokenizer_config.json").unlink(), os.mkfifo(f / "tokenizer_config.json")),
        "not a regular",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_odd_folder_is_one_sentence(tmp_path: Path, name: str) -> None:
    change, said = CASES[name]
    folder = Path(tiny_model_folder(tmp_path / "m"))
    change(folder)
    started = time.process_time()
    with pytest.raises(ModelError, match=said) as error:
        load(folder)
    assert time.process_time() - started < 60
    assert "\n" not in str(error.value)


def test_a_token_far_beyond_the_embeddings_is_a_sentence(tmp_path: Path) -> None:
    """The tokenizer has no more tokens than the model, but one has an id beyond the embedding."""
    folder = Path(tiny_model_folder(tmp_path / "m"))
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"e": ', '"e": 1000'))
    rows = write_jsonl(tmp_path / "rows.jsonl", polite_rows(6))
    values = {
        "model": {"path": str(folder), "device": "cpu"},
        "data": {"path": rows, "max_length": 128},
        "loss": {"name": "sft"},
        "output": str(tmp_path / "run"),
    }
    for call in (api.train, api.plan, lambda *_, **__: api.evaluate(str(folder), data=rows, quiet=True)):
        with pytest.raises(PenchantError, match=r"the tokenizer( has)? [0-9,]{6,} tokens") as error:
            call(values)
        assert "\n" not in str(error.value)
    with pytest.raises(TemplateRefused, match="embeddings"):
        load_chat_model(str(folder)).encode("Hello")


def test_sizes_are_no_counts_and_a_folder_that_changes_is_looked_at_again(tmp_path: Path) -> None:
    folder = Path(tiny_model_folder(tmp_path / "model"))
    config(block_size=8192, layer_dim=65536)(folder)
    check_folder(folder)
    config(n_layers=10**6)(folder)
    with pytest.raises(ModelError, match="n_layers is 1,000,000"):
        check_folder(folder)


def test_a_shard_that_is_gone_and_one_without_a_map(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    for index, said in (
        ({"weight_map": {"a": "b.safetensors"}}, "b.safetensors, which is not there"),
        ({}, "no weight_map"),
    ):
        path.write_text(json.dumps(index))
        with pytest.raises(ModelError, match=said):
            check_folder(tmp_path)


@pytest.mark.parametrize("template", LOOPS[:8])
def test_a_template_without_an_end_is_given_up(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.models.folder.SECONDS", 0.02)
    monkeypatch.setattr("penchant.models.folder.STEPS", 10_000)
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = template
    with pytest.raises(
        ModelError, match=r"chat template (does not end|takes more|computes something too large|writes)"
    ):
        check_template("folder", tokenizer)


def test_good_templates_are_rendered_as_before() -> None:
    """Loop properties, break, recursion, multiplication, and the generation tags."""
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template, render_jinja_template

    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    templates = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ m.content * 2 }}{% else %}no{% endfor %}",
        "{% for k, v in messages[0].items() if k != 'role' %}{{ k + v }}{% endfor %}{{ 1.5 * 2 + 2 ** 3 }}{{ [1] + [2] }}",
        "{% for x in [1, [2, 3]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}{% for x in none_ %}{% endfor %}",
        "{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ 'a' ~ i }}{% endfor %}{{ messages | tojson }}",
        "{% macro f(n) %}{% if n %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(4) }}{{ messages[0].content[::-1] }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    )
    bound_templates()
    for template in templates:
        expected = _cached_compile_jinja_template(template).render(messages=turns)
        assert render_jinja_template([turns], chat_template=template)[0] == [expected]


def test_a_template_that_loops_over_a_row_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not a bad row, because the next would take as long."""
    from penchant.data.templates import chat
    from penchant.types import Completion, PromptTree

    monkeypatch.setattr("penchant.models.folder.SECONDS", 0.1)
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% if 'loop' in messages[0].content %}" + LOOPS[0] + "{% endif %}{{ messages[0].content }}"
    )
    check_template("folder", tokenizer)
    with pytest.raises(ModelError, match="does not end"):
        chat(PromptTree("please loop", (Completion("a"),)), tokenizer)


def test_an_odd_adapter_is_one_sentence(tmp_path: Path) -> None:
    adapter = make(tmp_path / "m", "adapter")
    base = load_causal_model(ModelConfig(path=f"{adapter}-base"), CPU)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = min(tensors)
    nan = {**tensors, name: tensors[name] * float("nan")}
    for changed, left, said in (
        ({"r": 10**9}, tensors, "says rank 1000000000"),
        ({"target_modules": ["q_proj"]}, tensors, "has, beyond what its config says"),
        ({}, {n: t for n, t in tensors.items() if n != name}, f"lacks {name}"),
        ({}, nan, "holds NaN"),
        ({"peft_type": "NONSENSE"}, tensors, "could not be loaded"),
        ({}, {n: t[:, :-1].contiguous() for n, t in tensors.items()}, "size mismatch"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, **changed}))
        save_file(left, adapter / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=said):
            with_adapter(base, adapter)


def test_an_odd_encoder_is_one_sentence(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "bert")
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.LayerNorm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"embeddings\.LayerNorm\.weight holds NaN"):
        load_reward_model(ModelConfig(path=str(folder)), CPU)
    config(vocab_size=10**8)(folder)
    with pytest.raises(ModelError, match=r"config\.json: describes a model of"):
        load_reward_model(ModelConfig(path=str(folder)), CPU)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "bert", "adapter", "shards"])
@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_odd_every_command_ends_in_a_sentence(tmp_path: Path, kind: str, seed: int) -> None:
    good = make(tmp_path / "good", kind)
    for i in range(40):
        rng, folder, work = random.Random(f"{seed}-{i}"), tmp_path / "m", tmp_path / "work"
        shutil.copytree(good, folder)
        work.mkdir()
        what = damage(folder, rng)
        for command, call in uses(folder, kind, work).items():

            def run(call: Callable[[], None] = call) -> int:
                try:
                    call()
                except PenchantError:
                    return 2
                return 0

            process = forked(run)
            process.join(60)
            code = process.exitcode
            process.kill()
            assert code in (0, 2), f"{command}, {what}: {code}"
        shutil.rmtree(folder)
        shutil.rmtree(work)


def test_a_tower_of_images_may_have_more_layers_than_the_text(tmp_path: Path) -> None:
    import transformers as t

    size = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2)
    text = t.LlamaConfig(vocab_size=64, num_hidden_layers=1, **size)
    images = t.CLIPVisionConfig(num_hidden_layers=3, image_size=8, patch_size=4, **size)
    made = t.LlavaForConditionalGeneration(t.LlavaConfig(text_config=text, vision_config=images))
    made.save_pretrained(tmp_path)
    assert type(load_causal_model(ModelConfig(path=str(tmp_path)), CPU)) is t.LlamaForCausalLM
