"""`penchant plan`: its figures match the run, and it leaves no files behind."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import encoder_folder
from tiny import polite_rows, tiny_model_folder, tiny_tokenizer, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM

from penchant import api
from penchant.base.text import printable
from penchant.cli import main
from penchant.config import config_from_mapping, load_config, load_config_with_places
from penchant.data.packing import pack, plan_passes, tree_tokens
from penchant.errors import CheckpointError, ConfigError
from penchant.logprobs import Scorer, head
from penchant.models.cpu import ops
from penchant.models.cpu.decode import FastDecoder
from penchant.models.load import cast_parameters, load_causal_model
from penchant.models.options import ModelConfig
from penchant.plan import memory_warning
from penchant.plan.memory import (
    CAPACITY,
    KERNEL,
    MOMENTS,
    PRODUCT,
    WITH_GRADIENT,
    LiveBytes,
    _rule_of_thumb,
    activations_of,
    decoding_bytes,
    forward_bytes,
    packed_weights,
)
from penchant.plan.outline import OutlinedRun, outline, parameter_counts
from penchant.plan.ranks import SHAPES, Sizes, sizes_of
from penchant.plan.settings import settings_of
from penchant.plan.text import plan_text, size
from penchant.plan.work import work_of
from penchant.rollout.generate import sample
from penchant.runs import Run, parts
from penchant.training.optim import MasterAdamW
from penchant.types import TokenTree


def _config(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": {"path": tiny_model_folder(tmp_path / "model"), "dtype": "fp32"},
        "data": {
            "path": write_jsonl(tmp_path / "pairs.jsonl", polite_rows(30)),
            "validation_rows": 6,
            "max_length": 64,
        },
        "train": {"batch_size": 7, "lr": 3e-3, "tokens_per_step": 300, "epochs": 2},
        "evaluation": {"samples": 0, "kl_prompts": 2, "sample_tokens": 3},
        "output": str(tmp_path / "run"),
        **more,
    }


def _yaml(tmp_path: Path, **more: Any) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(_config(tmp_path, **more), indent=1))  # JSON is YAML
    return str(path)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the plan matches the run ----------------------------------------------------------------------------------------


def test_steps_tokens_passes_and_times_are_those_of_the_run(tmp_path: Path) -> None:
    config = _config(
        tmp_path,
        checkpoint={"every": 3, "keep_last": 2, "keep_best": False},
        evaluation={"every": 5, "samples": 0, "kl_prompts": 0},
    )
    plan = api.plan(config, probe=False)
    result = api.train(config, quiet=True)
    metrics = _lines(result.folder / "metrics.jsonl")
    steps = [m for m in metrics if m["kind"] == "train"]
    assert plan.work.steps == len(steps) == result.steps == 8
    assert plan.work.tokens == steps[-1]["tokens"] and plan.work.exact
    assert plan.work.evaluations == sum(m["kind"] == "eval" for m in metrics)
    assert plan.work.warmup == 1 and plan.work.checkpoints == 3
    kept = list((result.folder / "checkpoints").iterdir())
    assert len(kept) == plan.disk.kept
    written = sum(p.stat().st_size for p in kept[0].rglob("*") if p.is_file())
    assert plan.disk.checkpoint == pytest.approx(written, rel=0.05)
    after = api.plan(config, probe=False)
    assert after.folder == "holds step-8: finished"


def test_without_shared_prompts_every_prompt_is_repeated(tmp_path: Path) -> None:
    shared, separate = (
        api.plan(_config(tmp_path), f"train.packing={p}", probe=False).work for p in ("shared", "separate")
    )
    assert separate.tokens == separate.separate == shared.separate and separate.saving == 0.0
    assert shared.tokens < shared.separate and shared.saving == 1 - shared.tokens / shared.separate


def test_rows_kept_aside_and_cut_are_told(tmp_path: Path) -> None:
    rows = [*polite_rows(10), {"prompt": "p", "chosen": "same", "rejected": "same"}]
    data = {"path": write_jsonl(tmp_path / "d.jsonl", rows), "on_bad_row": "skip", "max_length": 40}
    train = api.plan(_config(tmp_path, data=data), probe=False).rows["train"]
    assert (train.read, train.accepted, train.aside, train.used) == (11, 10, 1, 10) and train.cut == 1.0
    whole = api.plan(_config(tmp_path, data={**data, "max_length": 256}), probe=False).rows["train"]
    assert whole.cut == 0.0 and whole.completions[-1] == max(len(r["rejected"]) for r in polite_rows(10)) + 1


def test_the_cache_is_known_before_and_after(tmp_path: Path) -> None:
    config = _config(tmp_path)
    before = api.plan(config, probe=False)
    assert "not there yet: training, held-out" in before.reference and before.disk.cache == 4 * 60
    api.train(config, quiet=True)
    after = api.plan(config, "train.lr=1e-4", f"output={tmp_path}/other", probe=False)
    assert "there already" in after.reference and after.disk.cache == 0


# ---- where values come from ------------------------------------------------------------------------------------------


def test_every_value_has_its_source(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {path: m}\ndata:\n  path: [a.jsonl, b.jsonl]\n  columns: {prompt: q}\nloss: kto\ntrain:\n  lr: 1e-5\noutput: o\n"
    )
    config, places = load_config_with_places(file, ["train.epochs=3", "loss.beta=0.3"])
    assert config == load_config(file, ["train.epochs=3", "loss.beta=0.3"])
    found = {s.key: s for s in settings_of(config, places, {"model.dtype": ("bf16", "native")})}
    sources = {
        k: found[k].source for k in ("model.path", "data.path", "data.columns.prompt", "train.lr", "train.epochs")
    }
    assert sources == {
        "model.path": f"{file}:1",
        "data.path": f"{file}:3",
        "data.columns.prompt": f"{file}:4",
        "train.lr": f"{file}:7",
        "train.epochs": "command line",
    }
    assert found["loss.beta"].source == "command line" and found["loss.name"].source == f"{file}:5"
    assert (
        found["loss.weight_desirable" if "loss.weight_desirable" in found else "loss.nll_weight"].source
        == "default of kto"
    )
    assert found["train.seed"].source == "default" and found["model.dtype"].became == "bf16"


def test_each_source_has_its_own_lines(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {path: m}\ndata:\n  - {path: a.jsonl, weight: 2}\n  - {path: b.jsonl, weight: 1}\noutput: o\n"
    )
    found = [s for s in settings_of(*load_config_with_places(file), {}) if s.key.startswith("data.sources")]
    assert [(s.key, s.value, s.source) for s in found] == [
        (f"data.sources.{i}.{key}", value, f"{file}:{3 + i}")
        for i, entry in enumerate(({"path": "a.jsonl", "weight": 2.0}, {"path": "b.jsonl", "weight": 1.0}))
        for key, value in entry.items()
    ]


def test_a_name_alone_says_nothing_of_its_settings(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: m}\ndata: {path: a}\nalgorithm: ppo\nreward: words\noutput: o\n")
    found = {s.key: s.source for s in settings_of(*load_config_with_places(file), {})}
    assert found["algorithm.name"] == f"{file}:3" and found["algorithm.gamma"] == "default of ppo"
    assert found["reward"] == f"{file}:4"


def test_autos_are_what_the_run_takes(tmp_path: Path) -> None:
    config = _config(tmp_path, train={"batch_size": 7})
    config["model"].pop("dtype")
    settings = {s.key: s for s in api.plan(config, probe=False).settings}
    run = Run(api.as_config(config), quiet=True)
    assert settings["train.lr"].became == run.make_loop().peak_lr
    assert settings["reference.kind"].became == run.built.reference_kind == "cached"
    assert settings["train.packing"].became == run.built.parts.engine.packing
    assert (settings["model.kernels"].became == "fast path") == run.built.parts.engine.fast
    assert settings["train.threads"].became == torch.get_num_threads()
    assert settings["data.template"].became == "plain" and settings["data.shape"].became == "pairs"


# ---- it leaves nothing behind ----------------------------------------------------------------------------------------


def _slow(more: dict[str, Any]) -> Any:
    return pytest.param(more, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "more",
    [
        {},
        _slow({"loss": "kto"}),
        _slow({"loss": "simpo"}),
        _slow({"loss": {"name": "pmpo"}}),
        {"lora": {"r": 2}},
        _slow({"loss": "sft"}),
        _slow({"reference": {"ema": 0.9}}),
        _slow({"algorithm": "reward_model"}),
        {"algorithm": {"name": "ppo", "max_new_tokens": 3}, "reward": "words"},
        _slow({"algorithm": {"name": "ppo", "max_new_tokens": 3, "value": "separate"}, "reward": "words"}),
        _slow({"algorithm": {"name": "rloo", "max_new_tokens": 3, "samples": 2}, "reward": "words"}),
        _slow({"algorithm": {"name": "online_dpo", "max_new_tokens": 3, "samples": 2}, "reward": "words"}),
    ],
    ids=lambda m: str(next(iter(m.values()), "dpo")),
)
def test_the_probe_times_any_method_and_leaves_nothing(tmp_path: Path, more: dict[str, Any]) -> None:
    file = _yaml(tmp_path, **more)
    cache = Path(os.environ["PENCHANT_CACHE"])
    plan = api.plan(file)
    assert not (tmp_path / "run").exists() and not list(cache.rglob("*.safetensors"))
    assert plan.probe is not None and plan.duration is not None
    assert 0 < plan.duration.low <= plan.duration.likely <= plan.duration.high
    assert plan.duration.parts["evaluations"] > 0 and len(plan.probe.steps) == 2
    assert plan.memory.peak > 100 << 20 and plan.memory.fits
    assert "optimizer steps" in plan_text(plan, whole=True)


def test_probed_steps_are_the_runs_first_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path)
    asked: list[Any] = []  # devices whose memory was measured: for a GPU, the GPU's own
    monkeypatch.setattr("penchant.plan.probe.peak_memory", lambda *device: asked.extend(device) or 7)
    plan = api.plan(config)
    assert plan.probe is not None and plan.probe.peak == 7 and asked == [torch.device("cpu")]
    lines = _lines(api.train(config, quiet=True).folder / "metrics.jsonl")
    tokens = [m["tokens"] for m in lines if m["kind"] == "train"]
    assert plan.probe.tokens == (tokens[1] - tokens[0], tokens[2] - tokens[1])


# ---- memory -----------------------------------------------------------------------------------------------------------


def _trees(*sizes: tuple[int, int, int]) -> list[TokenTree]:
    import numpy as np

    return [
        TokenTree(i, np.ones(p, np.int32), (np.ones(a, np.int32), np.ones(b, np.int32)), (False, False))
        for i, (p, a, b) in enumerate(sizes)
    ]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_kernels_on_shapes_alone_hold_what_a_real_pass_holds(tmp_path: Path, dtype: str, recompute: bool) -> None:
    """Peak bytes of forward and backward on the CPU, counted operation by operation."""
    config = _config(tmp_path, model={"path": tiny_model_folder(tmp_path / "model"), "dtype": dtype})
    run = OutlinedRun(api.as_config(config), quiet=True)
    run.model.model.gradient_checkpointing = recompute
    trees = _trees((90, 100, 60), (120, 40, 40), (60, 100, 90))
    model = load_causal_model(ModelConfig(path=config["model"]["path"]), torch.device("cpu"))
    MasterAdamW(model.named_parameters(), dtype=run.dtype)
    cast_parameters(model, run.dtype)
    model.model.gradient_checkpointing = recompute
    model.train()
    scorer = Scorer(model, "shared", "auto")
    assert scorer.fast
    batch = pack(trees)
    with LiveBytes(model.parameters()) as real:
        scorer.logps(batch).sums.sum().backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    found = activations_of(run, run.model, [trees], fast=True)
    assert found.counted_by == "kernels"
    assert found.total == pytest.approx(real.peak - gradients, rel=0.04)


def test_products_of_onednn_hold_on_shapes_alone_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where fp32 products are oneDNN's, one that is added to a gradient is made beside it first."""
    monkeypatch.setattr(ops, "_fp32_by_onednn", lambda: True)
    peaks = []
    for device in ("cpu", "meta"):
        total, a, b = (torch.zeros(shape, device=device) for shape in ((40, 30), (40, 20), (20, 30)))
        with LiveBytes([total, a, b]) as live:
            ops.addmm_(total, a, b)
        peaks.append(live.peak)
    assert peaks == [total.nbytes, total.nbytes]


@pytest.mark.parametrize("lora", [pytest.param(None, marks=pytest.mark.slow), {"r": 4}, {"r": 4, "dora": True}])
def test_shapes_alone_count_what_a_real_pass_holds(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    config = _config(tmp_path, lora=lora)
    config["model"]["kernels"] = "off"
    run = OutlinedRun(api.as_config(config), quiet=True)
    real = Run(api.as_config(config), quiet=True)
    trees = _trees((90, 100, 60), (120, 40, 40), (60, 100, 90))
    scorer = real.built.parts.engine
    scorer.model.train()
    with LiveBytes([*scorer.model.parameters(), *scorer.model.buffers()]) as live:
        scorer.logps(pack(trees)).sums.sum().backward()
    gradients = sum(p.grad.nbytes for p in scorer.model.parameters() if p.grad is not None)
    found = activations_of(run, run.model, [trees], fast=False)
    assert found.counted_by == "transformers"
    assert found.total == pytest.approx(live.peak - gradients, rel=0.05)
    with LiveBytes([*scorer.model.parameters(), *scorer.model.buffers()]) as live, torch.no_grad():
        scorer.model.eval()
        scorer.logps(pack(trees))
    assert found.forward == pytest.approx(live.peak, rel=0.15)


@pytest.mark.parametrize(("dtype", "width"), [("fp32", 4), ("bf16", 2)])
def test_the_rule_of_thumb_counts_logits_of_completions_up_to_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, width: int
) -> None:
    config = _config(tmp_path, lora={"r": 4})
    config["model"]["dtype"] = dtype
    run = OutlinedRun(api.as_config(config), quiet=True)
    trees = _trees((90, 300, 260), (120, 240, 240))
    work = replace(work_of(run), batch=(tuple(trees),), largest=sum(t.shared_tokens for t in trees))
    logits = 1040 * run.model.config.vocab_size * width
    assert _rule_of_thumb(run, work).head == logits
    monkeypatch.setattr("penchant.plan.memory.KEEP_BYTES", logits // 3)
    assert _rule_of_thumb(run, work).head == logits // 3


def test_attention_without_a_mask_is_counted_so(tmp_path: Path) -> None:
    """By the flash kernels' shapes, without a mask or all attention scores, which would otherwise dominate for long trees."""
    found = []
    for attention in ("groups", "varlen"):
        config = _config(tmp_path)
        config["model"] |= {"kernels": "off", "attention": attention}
        run = OutlinedRun(api.as_config(config), quiet=True)
        assert run.attention[0] == attention and not run.layout[1]
        found.append(activations_of(run, run.model, [_trees((300, 250, 260), (280, 240, 270))], fast=False))
    groups, varlen = found
    assert varlen.total < groups.total / 2 and varlen.layouts < groups.layouts / 20


def test_chunks_of_the_head_are_counted_as_where_the_run_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, chunks, rows_at_once = _config(tmp_path), [], head.rows_at_once
    config["model"]["kernels"] = "off"
    monkeypatch.setattr(head, "rows_at_once", lambda *of: chunks.append(rows_at_once(*of)) or chunks[-1])
    run = OutlinedRun(api.as_config(config), quiet=True)
    for device in ("cpu", "cuda"):
        run.device = torch.device(device)
        forward_bytes(run, run.model, _trees((4, 10, 10)), fast=False)
    vocabulary = run.model.config.vocab_size
    assert chunks == [(head._CHUNK_ELEMENTS * times) // vocabulary for times in (1, head._GPU_TIMES)]


def test_a_head_too_large_to_keep_is_counted_by_its_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.models.cpu.head.KEEP_BYTES", 1 << 16)
    monkeypatch.setattr("penchant.models.cpu.head._MATMUL_ROWS", 64)
    monkeypatch.setattr("penchant.models.cpu.head._SOFTMAX_ELEMENTS", 1 << 12)
    config = _config(tmp_path)
    run, real = (kind(api.as_config(config), quiet=True) for kind in (OutlinedRun, Run))
    trees, scorer = _trees((10, 500, 400)), real.built.parts.engine
    found = forward_bytes(run, run.model, trees, fast=True)
    scorer.model.eval()
    with LiveBytes(scorer.model.parameters()) as live, torch.no_grad():
        scorer.logps(pack(trees))
    assert found == pytest.approx(live.peak, rel=0.2)


@pytest.mark.parametrize("n,lengths", [(1, (9, 30, 17)), (4, (40, 5))])
def test_a_decoders_caches_and_weights_are_counted(
    tmp_path: Path, n: int, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with the sum of the tensors of `sample`'s decoder."""
    model = load_causal_model(ModelConfig(path=tiny_model_folder(tmp_path / "model")), torch.device("cpu"))
    made: list[FastDecoder] = []
    init = FastDecoder.__init__

    def kept(self: FastDecoder, *args: Any, **more: Any) -> None:
        init(self, *args, **more)
        made.append(self)

    monkeypatch.setattr(FastDecoder, "__init__", kept)
    sample(model, [[1] * length for length in lengths], n=n, max_new_tokens=20)
    (decoder,) = made
    caches = sum(getattr(decoder, f"_{name}").nbytes for name in ("keys", "values", "prompt_keys", "prompt_values"))
    weights = [p for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    packed = sum(p.nbytes for p in weights) + (model.get_output_embeddings().weight.nbytes if tied else 0)
    found = decoding_bytes(model, 4, lengths, n, 20)
    assert packed_weights(model) * 4 == packed
    config = model.config
    widest = max(
        (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim * 2,
        3 * config.intermediate_size,
    )
    read = 4 * len(lengths) * max(lengths) * (2 * config.hidden_size + widest)
    logits = n * len(lengths) * config.vocab_size * 12
    assert found == packed + caches + max(read, logits)


def test_evaluations_count_answers_and_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation's options change its moment and nothing else."""

    # exclude what this process happens to hold
    monkeypatch.setattr("penchant.plan.plan.resident", lambda: 300 << 20)

    def moments(*overrides: str) -> dict[str, int]:
        return api.plan(_config(tmp_path), *overrides, probe=False).memory.moments

    without = moments("evaluation.kl_prompts=0")
    assert "an evaluation" in without and "an evaluation, which loads the start again" not in without
    loading = moments("evaluation.kl_prompts=2")["an evaluation, which loads the start again"]
    weights = sum(p.stat().st_size for p in (tmp_path / "model").glob("*.safetensors"))
    assert loading >= without["a training step"] + weights
    with monkeypatch.context() as patched:
        patched.setattr("penchant.plan.memory.weight_file_bytes", lambda *_: weights + (1 << 30))
        larger = moments("evaluation.kl_prompts=2")["an evaluation, which loads the start again"]
    assert larger - loading == pytest.approx(1 << 30, abs=32 << 20)  # the process itself is measured again
    adapter = moments("evaluation.kl_prompts=2", "lora={r: 2}")
    assert "an evaluation" in adapter  # the adapter is switched off, so nothing is loaded
    long = moments("evaluation.kl_prompts=0", "evaluation.samples=4", "evaluation.sample_tokens=4000")
    assert long["an evaluation"] > without["an evaluation"]
    wide = moments("evaluation.kl_prompts=0", "evaluation.tokens_per_step=3000")
    assert wide["an evaluation"] > without["an evaluation"]


def test_prepared_products_follow_the_sizes_of_passes_and_the_capacity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path, loss="simpo")
    del config["data"]["validation_rows"]
    config["model"]["dtype"] = "bf16"

    def prepared(capacity: str) -> int:
        monkeypatch.setenv(CAPACITY, capacity)
        return api.plan(config, probe=False).memory.parts["prepared products, by size of pass"]

    sizes = api.plan(config, probe=False).work.sizes
    run = Run(api.as_config(config), quiet=True)
    met = set()
    for step in range(run.schedule.total_steps):
        tokens = [tree_tokens(run.rows.trees[0][i], True) for i in run.schedule.batch(step)]
        met |= {sum(tokens[i] for i in part) for part in plan_passes(tokens, 300, True)}
    assert sizes == len(met) > 1
    assert prepared("0") == sizes * WITH_GRADIENT[0] * KERNEL
    assert prepared("16") - prepared("0") == 16 * PRODUCT
    assert prepared("100000") - prepared("0") == sizes * WITH_GRADIENT[1] * PRODUCT
    config["model"]["dtype"] = "fp32"
    assert prepared("16") == 0


def test_computing_activations_again_saves_most_of_them(tmp_path: Path) -> None:
    config = _config(tmp_path)
    deep = AutoConfig.from_pretrained(config["model"]["path"], num_hidden_layers=6)  # with one layer nothing is saved
    AutoModelForCausalLM.from_config(deep).save_pretrained(config["model"]["path"])
    plain, again = (
        api.plan(config, f"train.gradient_checkpointing={value}", "model.kernels=off", probe=False).memory
        for value in ("false", "true")
    )
    name = "activations of the largest micro-batch"
    assert again.parts[name] < 0.5 * plain.parts[name] and not again.coarse


def test_outlines_have_the_models_parameters(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model")
    real = load_causal_model(ModelConfig(path=folder), torch.device("cpu"))
    outlined = outline(ModelConfig(path=folder))
    assert parameter_counts(outlined) == parameter_counts(real)
    assert all(p.device.type == "meta" for p in outlined.parameters())


@pytest.mark.parametrize(
    "dtype,lora", [("fp32", None), ("bf16", None), ("bf16", {"r": 4}), ("bf16", {"r": 4, "dora": True})]
)
def test_parts_are_what_the_optimizer_holds(tmp_path: Path, dtype: str, lora: dict[str, Any] | None) -> None:
    config = _config(tmp_path, lora=lora)
    config["model"]["dtype"] = dtype
    parts = api.plan(config, probe=False).memory.parts
    run = Run(api.as_config(config), quiet=True)
    masters = sum(m.nbytes for n, m in run.built.optimizer.masters.items() if m is not run.built.optimizer.params[n])
    assert parts["weights"] == sum(p.nbytes for p in run.built.parts.model.parameters())
    assert parts["fp32 master weights"] == masters
    assert (
        parts["gradients"]
        == parts["optimizer (two moments)"] // 2
        == 4 * sum(p.numel() for p in run.built.optimizer.params.values())
    )
    if lora is not None:  # a copy of the initial adapter, if switching it off does not give the start
        start = run.built.start
        assert start is not None and start.adapters is not None
        assert parts["reference"] == sum(p.nbytes for p in start.adapters.values())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_reference_from_a_file_in_bf16_takes_half_in_its_layers(tmp_path: Path, stored: torch.dtype) -> None:
    config = _config(tmp_path, reference={"kind": "frozen"})
    folder = config["model"]["path"]
    load_causal_model(ModelConfig(path=folder), torch.device("cpu")).to(stored).save_pretrained(folder)
    planned = api.plan(config, probe=False).memory.parts["reference"]
    scorer = Run(api.as_config(config), quiet=True).built.parts.live_reference.scorer
    assert scorer.narrowed == (stored == torch.bfloat16)
    assert planned == sum(p.nbytes for p in scorer.model.parameters())


def test_an_encoder_is_planned_for(tmp_path: Path) -> None:
    config = _config(
        tmp_path, algorithm="reward_model", model={"path": encoder_folder(tmp_path / "encoder"), "dtype": "fp32"}
    )
    config["data"]["max_length"] = 4096
    plan = api.plan(config)
    assert plan.probe is not None and not plan.memory.coarse
    assert next(s for s in plan.settings if s.key == "data.max_length").became is not None


@pytest.mark.parametrize("kind", ["images", "bare images", "states"])
def test_what_is_no_plain_decoder_is_planned_for(tmp_path: Path, kind: str) -> None:
    """Models of text and images by their text part, with or without a class of its own, and a model without attention heads."""
    import transformers

    folder, sizes = tmp_path / "odd", {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 260}
    layer = {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    if kind == "states":
        config: Any = transformers.MambaConfig(**sizes, state_size=4)
        made = transformers.MambaForCausalLM(config)
    else:
        eyes = {
            k: v for k, v in (sizes | layer).items() if k in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        }
        eyes |= {"intermediate_size": 16, "image_size": 16, "patch_size": 8}
        family = "Gemma3" if kind == "images" else "Llava"
        config = getattr(transformers, family + "Config")(
            text_config=sizes | layer, vision_config=eyes, image_token_index=259
        )
        made = getattr(transformers, family + "ForConditionalGeneration")(config)
    made.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    given = _config(
        tmp_path, model={"path": str(folder), "dtype": "fp32"}, evaluation={"samples": 1, "sample_tokens": 3}
    )
    plan = api.plan(given, probe=False)
    model = load_causal_model(ModelConfig(path=str(folder)), torch.device("cpu"))
    assert plan.parameters[0] == sum(p.numel() for p in model.parameters())


def test_train_says_before_the_model_is_loaded_that_it_will_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(config_from_mapping(_config(tmp_path)), quiet=True)
    assert memory_warning(run) is None
    monkeypatch.setattr("penchant.plan.memory.machine_memory", lambda: (1 << 10, 1 << 10))
    said = memory_warning(run)
    assert said is not None and "will probably be killed" in said and "built" not in vars(run)


@pytest.mark.parametrize("fits", [pytest.param(True, marks=pytest.mark.slow), False])
def test_auto_computes_activations_again_where_the_plan_says_it_would_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    config = _config(
        tmp_path, train={**_config(tmp_path)["train"], "gradient_checkpointing": "auto"}, checkpoint={"every": 3}
    )
    machine = 1 << (50 if fits else 10)
    monkeypatch.setattr("penchant.plan.memory.machine_memory", lambda: (machine, machine))
    chosen = "off" if fits else "layers"
    setting = next(s for s in api.plan(config, probe=False).settings if s.key == "train.gradient_checkpointing")
    assert (setting.value, setting.became) == ("auto", chosen)
    seen: list[Any] = []
    prepare = parts.prepared

    def watched(model: Any, config: Any, rows: Any) -> Any:
        seen.append(config.train.gradient_checkpointing)
        return prepare(model, config, rows)

    monkeypatch.setattr(parts, "prepared", watched)
    result = api.train(config, quiet=True)
    assert json.loads((result.folder / "manifest.json").read_text())["gradient_checkpointing"] == chosen
    shutil.rmtree(sorted((result.folder / "checkpoints").iterdir())[-1])
    monkeypatch.setattr("penchant.plan.memory.machine_memory", lambda: (1 << 60 - machine.bit_length(),) * 2)
    seen.clear()
    again = api.train(config, quiet=True)  # on another machine
    assert json.loads((again.folder / "manifest.json").read_text())["gradient_checkpointing"] == chosen
    assert seen == [not fits]


def test_offload_is_refused_on_a_cpu(tmp_path: Path) -> None:
    for act in (api.plan, api.train):
        with pytest.raises(ConfigError, match="CUDA GPU"):
            act(_config(tmp_path), "train.gradient_checkpointing=offload")


def test_memory_of_each_of_several_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adam on fp32 shards takes 16 bytes per parameter over all GPUs; gathered weights and activations do not shrink with more GPUs."""
    made = api.plan(_config(tmp_path, model={"path": tiny_model_folder(tmp_path / "model")}), gpus=(1, 2, 8))
    every = made.parameters[0]
    shares = "fp32 master weights", "gradients", "the optimizer's moments"
    for n in (2, 8):
        assert sum(made.ranks[n][name] for name in shares) == pytest.approx(16 * every / n, abs=4)
        assert made.ranks[n]["activations of a pass"] == made.ranks[1]["activations of a pass"] > 0
    assert sum(made.ranks[1][name] for name in ("weights", *shares)) == 18 * every
    assert made.probe is None and set(made.to_json()["ranks"]) == {"1", "2", "8"}
    path = _yaml(tmp_path, launch={"replicas": 2}, reference={"kind": "frozen"})
    assert main(["plan", path, "--gpus", "4"]) == 0
    said = capsys.readouterr().out
    assert "of each GPU" in said and "not measured" in said and "reference" in said
    assert main(["plan", path, "--gpus", "5"]) == 2 and "launch.replicas" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", path, "--gpus", "many"])


def test_known_models_have_their_known_sizes() -> None:
    """Llama 2 7B has 6,738,415,616 parameters, and Llama 3 70B has 70,553,706,496: the table in docs/many_gpus.md is of those shapes."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from penchant.models.load import on_meta
    from penchant.models.lora import add_lora
    from penchant.models.options import LoraConfig

    sizes = {name: sizes_of(SHAPES[name]) for name in ("7B", "70B")}
    assert {name: s.every for name, s in sizes.items()} == {"7B": 6_738_415_616, "70B": 70_553_706_496}
    assert sizes["70B"].every == 80 * sizes["70B"].layer + sizes["70B"].root
    shape = {**SHAPES["7B"], "num_hidden_layers": 4}
    whole = on_meta(AutoModelForCausalLM, LlamaConfig(**shape))  # type: ignore[arg-type]
    assert sizes_of(shape) == Sizes.of(whole)
    assert sizes_of(shape, lora=True) == Sizes.of(add_lora(whole, LoraConfig(), 0))


def test_advice_where_it_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.plan.memory.machine_memory", lambda: (200 << 20, 100 << 20))
    plan = api.plan(_config(tmp_path))
    assert not plan.memory.fits and plan.probe is None and plan.duration is None
    keys = [text for text, _ in plan.memory.advice]
    assert any("lora" in k for k in keys) and any("tokens_per_step" in k for k in keys)
    saved = [s for _, s in plan.memory.advice]
    assert saved == sorted(saved, reverse=True) and saved[-1] > 0
    assert "IT DOES NOT FIT" in plan_text(plan) and "no probe" in plan_text(plan)


# ---- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _yaml(tmp_path)
    assert main(["plan", file, "--no-probe", "train.epochs=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["work"]["steps"] == 4 and found["probe"] is None and found["memory"]["fits"]
    assert main(["plan", file, "--no-probe"]) == 0
    short = capsys.readouterr().out
    assert short.index("memory") < short.index("steps") < short.index("SETTINGS") and "train.adam_beta1" not in short
    assert main(["plan", file, "--all"]) == 0
    shown = capsys.readouterr().out
    for section in ("SETTINGS", "DATA", "WORK", "MEMORY", "DISK", "TIME"):
        assert f"\n{section}\n" in shown
    assert f"{file}:" in shown and "timed steps" in shown


@pytest.mark.parametrize(
    "wrong", ["train.lrr=1", "data.path=nowhere.jsonl", "data.max_length=4096", "model.path=./nowhere"]
)
def test_a_mistake_is_one_sentence(tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", _yaml(tmp_path), wrong]) == 2
    assert capsys.readouterr().err.startswith("penchant: ")


def test_an_output_that_train_would_refuse_is_refused(tmp_path: Path) -> None:
    config = _config(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        api.plan(config | {"output": config["data"]["path"]}, probe=False)


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert printable("a\x1b[31mb\x07") == "a\\x1b[31mb\\x07" and size(1536) == "2 kB" and size(3 << 29) == "1.50 GB"


def test_quantized_weights_and_small_moments_are_counted(tmp_path: Path) -> None:
    """Also without bitsandbytes, because a plan needs only shapes."""
    plain = _config(tmp_path, lora={"r": 4})
    parts = {
        bits: api.plan(plain, f"model.quantize={bits}", probe=False).memory.parts for bits in ("none", "int8", "nf4")
    }
    held = [parts[bits]["weights"] for bits in ("none", "int8", "nf4")]
    assert held == sorted(held, reverse=True) and len(set(held)) == 3
    assert "a layer's dequantized weight" in parts["nf4"] and "a layer's dequantized weight" not in parts["none"]
    moments = [
        api.plan(_config(tmp_path), f"train.optimizer={kind}", "train.lr=0.001", probe=False).memory.parts[MOMENTS]
        for kind in ("adamw", "muon", "sgd", "adafactor")
    ]
    assert moments == sorted(moments, reverse=True) and moments[0] == 2 * moments[2]
