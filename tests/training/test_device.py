"""Failures and synchronizations on a GPU, tested without one: by the ops of a micro-batch, and by a model on the meta device."""

from __future__ import annotations

import os
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from families import losses_by_default, noted_attention, some_pairs, tiny_model
from steps import small_loop
from torch.utils._python_dispatch import TorchDispatchMode

from penchant import cli
from penchant.algorithms.grpo import GroupConfig, GroupPolicyGradient, ScoredTokens
from penchant.algorithms.offline import Component, Offline
from penchant.algorithms.rollouts import Group
from penchant.base import machine
from penchant.data.packing import pack
from penchant.logprobs import Scorer, per_completion
from penchant.logprobs.reference import CachedReference, LiveReference, adapter_as_it_is, adapter_off
from penchant.losses import LOSSES
from penchant.losses.divergences import DivergenceKind, grad_of, value_of
from penchant.models import merge
from penchant.models.load import _random_state, resolve_device, widened
from penchant.models.lora import add_lora
from penchant.models.options import LoraConfig, ModelConfig
from penchant.models.tree_attention import tree_layout
from penchant.runs import record
from penchant.training import loop as loop_module
from penchant.training import steps
from penchant.training.loop import Loop
from penchant.training.optim import MasterAdamW
from penchant.types import LossOutput, Scored

# ops that a GPU sums in nondeterministic order
UNORDERED = {
    "index_add",
    "index_add_",
    "scatter_add",
    "scatter_add_",
    "scatter_reduce",
    "index_reduce",
    "bincount",
    "histc",
}
META, CPU = torch.device("meta"), torch.device("cpu")


class Ops(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def offline_of(name: str, policy: Any, reference: Any, **more: Any) -> Offline:
    return Offline(policy, [Component(LOSSES[name], LOSSES[name].params())], reference, **more)


def offline(name: str = "dpo", **more: Any) -> Offline:
    models = [tiny_model("llama", dtype=torch.float32, seed=s) for s in (0, 1)]
    policy, reference = (Scorer(m, "shared") for m in models)
    return offline_of(name, policy, LiveReference(reference), **more)


# ---- deterministic sums: equal log-probs of policy and reference give equal sums ----


@pytest.mark.parametrize("name", ["dpo", "sft", "pmpo"])
def test_no_sum_of_a_micro_batch_depends_on_the_order_of_threads(name: str) -> None:
    algorithm, batch = offline(name), pack([replace(t, labels=(True, False)) for t in some_pairs(4)])
    with Ops() as ops:
        algorithm.loss(algorithm.score(batch))
    assert not UNORDERED & ops.seen.keys()


def test_sums_of_completions_are_those_in_token_order() -> None:
    lengths = torch.tensor([3, 1, 300, 2])
    values = torch.randn(306, generator=torch.Generator().manual_seed(0), requires_grad=True)
    completion = torch.repeat_interleave(torch.arange(4), lengths)
    expected = values.new_zeros(4).index_add(0, completion, values)
    sums = per_completion(values, lengths)
    assert torch.equal(sums, expected)  # on a CPU, where results of older versions must not change
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    (grad,) = torch.autograd.grad(sums, values, weights)
    assert torch.equal(grad, weights[completion])


@pytest.mark.parametrize("name", ["rloo", "grpo", "gspo"])
def test_losses_of_groups_are_summed_in_token_order_too(name: str) -> None:
    """Also without reading the number of tokens from the device."""
    method = GroupPolicyGradient(None, None, None, GroupConfig(name=name, max_new_tokens=4), 64)  # type: ignore[arg-type]
    batch = pack(some_pairs(2))
    tokens = torch.randn(len(batch.target_ids), requires_grad=True)
    scored = ScoredTokens(tokens, tokens.detach(), tokens.detach(), torch.ones(4), batch.completion_of, batch.lengths)
    with Ops() as ops:
        method.loss(scored)
    assert not (UNORDERED | {"repeat_interleave", "nonzero"}) & ops.seen.keys()


# ---- the optimizer: one foreach call per pass over the parameters, without reading values ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_the_optimizer_makes_no_call_for_each_parameter(dtype: torch.dtype) -> None:
    calls = []
    for layers in (2, 12):
        model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(layers))).to(META)
        optimizer = MasterAdamW(model.named_parameters(), dtype=dtype)
        for master in optimizer.masters.values():
            master.grad = torch.ones_like(master)
        optimizer.optimizers[0].step = lambda: None  # type: ignore[method-assign, misc, assignment]  # torch's own, one call; it refuses the meta device
        with Ops() as ops:
            optimizer.clip(1.0)  # the meta device raises on a read
            optimizer.step(1e-3)
        assert any(name.startswith("_foreach_mul") for name in ops.seen)
        calls.append({n: c for n, c in ops.seen.items() if n in ("copy_", "zero_", "mul_", "_to_copy", "lerp_")})
    assert calls[0] == calls[1]


# ---- placement: the meta device raises on tensors that are not on the model's device ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_optimizer_has_its_state_where_the_parameters_are(dtype: torch.dtype) -> None:
    """Fused AdamW reads `step` on the device, but a checkpoint's tensors are loaded to the CPU."""
    model = torch.nn.Linear(3, 2, device=META)
    optimizer = MasterAdamW(model.named_parameters(), dtype=dtype)
    stored = {f"master/{n}": torch.zeros(p.shape) for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        stored |= {f"exp_avg/{n}": torch.zeros(p.shape), f"exp_avg_sq/{n}": torch.zeros(p.shape)}
        stored[f"step/{n}"] = torch.tensor(3.0)
    optimizer.load_state_tensors(stored)
    held = optimizer.state_tensors()
    assert held.keys() == stored.keys() and {v.device for v in held.values()} == {META}


# ---- layouts are computed on the CPU, since on a GPU each small operation would be a kernel launch ----


@pytest.mark.parametrize("window", [None, 5])
def test_a_layout_reaches_the_device_in_two_copies_however_many_trees_there_are(window: int | None) -> None:
    made = []
    for pairs in (4, 64):
        batch = pack(some_pairs(pairs)).to(META)
        with Ops() as ops:
            layout = tree_layout(batch, window)
        assert {g.index.device for g in layout.groups} | {layout.inverse.device} == {META}
        made.append((ops.seen["_to_copy"], len(layout.groups), sum(ops.seen.values())))
    (_, few, _), (copies, many, every) = made
    assert copies == 2 and every <= 12 + 4 * many and many <= few + 2


def test_padded_rows_reach_the_device_in_three_copies_and_none_is_looked_for() -> None:
    counts = []
    for pairs in (2, 16):
        scorer = Scorer(tiny_model("llama", dtype=torch.float32).to(META), "padded")
        scorer.model.model.forward = lambda input_ids, attention_mask, **_: SimpleNamespace(
            last_hidden_state=torch.zeros(*(input_ids * attention_mask).shape, 32, device=META)
        )
        batch = pack(some_pairs(pairs), shared=False).to(META)
        with Ops() as ops:
            scorer.logps(batch)
        counts.append(ops.seen)
    assert counts[0]["copy_"] == counts[1]["copy_"] and counts[0]["_to_copy"] == counts[1]["_to_copy"]


# ---- a whole step: the meta device raises if a value is read, a mask is counted, or a tensor is on the wrong device ----


def loop_on(device: torch.device, folder: Path, name: str, **more: Any) -> Loop:
    algorithm = offline(name, **more)
    for scorer in (algorithm.scorer, algorithm.reference.scorer):  # type: ignore[union-attr]
        scorer.model.to(device)
    return loop_of(algorithm, device, folder)


def loop_of(algorithm: Any, device: torch.device, folder: Path) -> Loop:
    trees = [replace(t, labels=(True, False), scores=(1.0, 0.5)) for t in some_pairs(6)]
    optimizer = MasterAdamW(algorithm.scorer.model.named_parameters(), dtype=torch.float32)
    if device == META:
        optimizer.optimizers[0].step = lambda: None  # type: ignore[method-assign, misc, assignment]  # torch's own: it refuses the meta device
    train = {"batch_size": 6, "tokens_per_step": 40}
    more = {"write_model": lambda: lambda _: None, "start_tolerance": (0.0, 0.0)}  # the meta device has nothing to save
    return small_loop(algorithm, optimizer, trees, train, folder, **more)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records how many numbers each read from the device returns; values of the meta device are made up."""
    found: list[int] = []

    def read(vector: torch.Tensor) -> list[float]:
        found.append(len(vector))
        return [0.5] * len(vector) if vector.device == META else vector.tolist()

    for module in (steps, loop_module):
        monkeypatch.setattr(module, "on_host", read)
    return found


@pytest.mark.parametrize("name", losses_by_default())
def test_a_step_waits_for_the_device_once(name: str, tmp_path: Path, reads: list[int]) -> None:
    loop = loop_on(META, tmp_path, name, nll_weight=0.5)
    loop.take_step(1, loop.schedule)
    assert len(reads) == 1 and len(loop._micro_batches(loop.trees)) > 1


@pytest.mark.parametrize(("more", "start"), [({}, adapter_off), ({"dora": True, "rslora": True}, adapter_as_it_is)])
def test_nor_does_an_adapters(more: dict[str, Any], start: Any, tmp_path: Path, reads: list[int]) -> None:
    """peft's layers run unchanged. The reference is then not a copy, and reads nothing either."""
    model = add_lora(tiny_model("llama", dtype=torch.float32), LoraConfig(r=2, **more), 0).to(META)
    scorer = Scorer(model, "shared")
    loop = loop_of(offline_of("dpo", scorer, start(scorer)), META, tmp_path)
    loop.take_step(1, loop.schedule)
    assert len(reads) == 1 and len(loop._micro_batches(loop.trees)) > 1


@pytest.mark.parametrize("nll", [0.0, 0.5])
def test_no_loss_waits_for_the_device(nll: float) -> None:
    known = (
        "ref_logps",
        "labels",
        "scores",
        "alignment",
        "weighted_logps",
        "divergence",
        "policy_shared_logps",
        "ref_shared_logps",
    )
    column = torch.ones(4, device=META)
    slot = torch.tensor([0, 1, 0, 1], device=META)
    scored = Scored(
        tree=slot,
        slot=slot,
        lengths=column,
        policy_logps=column,
        pairs=True,
        shape=(2, 2),
        **dict.fromkeys(known, column),
    )
    for name, spec in LOSSES.items():
        if "z0" not in spec.needs:
            algorithm = offline_of(name, None, LiveReference(None), nll_weight=nll)
            algorithm.loss(scored)
            algorithm.loss(replace(scored, row_weights=column))


def test_a_norm_in_the_hosts_memory_is_read_with_losses_on_the_device(reads: list[int]) -> None:
    """With launch.offload, gradients are in host memory and losses on the device."""
    totals = steps.Totals()
    totals.add(LossOutput(torch.ones(3, device=META)))
    totals.read(torch.tensor(1.0))
    assert reads == [2]


@pytest.mark.parametrize("kind", [DivergenceKind(k) for k in ("kl", "js", "renyi")], ids=lambda k: k.kind)
def test_nor_does_a_divergence(kind: DivergenceKind) -> None:
    logits = torch.zeros(3, 5, device=META)
    value = value_of(logits, logits, kind)
    assert grad_of(logits, logits, value, kind).shape == logits.shape and value.device == META


# ---- a step's inputs are transferred ahead of time ----


def test_batches_that_are_packed_ahead_train_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []
    final = []
    real = loop_module.in_background
    monkeypatch.setattr(loop_module, "in_background", lambda make: packed.append(1) or real(make))
    for ahead in (False, True):
        monkeypatch.setattr(loop_module, "packs_ahead", lambda _device, ahead=ahead: ahead)
        loop = loop_on(CPU, tmp_path, "dpo")
        loop.start_tolerance = None
        loop.train = loop.train.model_copy(update={"batch_size": 2, "epochs": 2.0})
        lines = [loop.take_step(step, loop.schedule)[0] for step in range(6)]
        final.append((lines, torch.cat([p.detach().flatten() for p in loop.model.parameters()])))
    assert len(packed) == 5 and final[0][0] == final[1][0] and torch.equal(final[0][1], final[1][1])


def test_what_fails_in_the_background_is_raised_where_it_is_needed() -> None:
    with pytest.raises(KeyError, match="lost"):
        loop_module.in_background(lambda: {}["lost"])()


def test_what_runs_in_the_background_is_on_the_gpu_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread starts on the first GPU, where it would take memory for each process of the machine."""
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    assert loop_module.in_background(lambda: [*asked])() == [3]


def test_cached_log_probs_come_with_the_batch() -> None:
    algorithm, trees = offline("dpo"), some_pairs(3)
    cached = CachedReference({t.row: torch.tensor([float(t.row), 0.0]) for t in trees})
    algorithm.reference, batch = cached, pack(trees)
    batch.columns |= algorithm.columns(batch)
    there = batch.to(META)
    assert there.columns["ref_logps"].device == META and cached.logps(there) is there.columns["ref_logps"]
    assert cached.logps(batch).tolist() == [0.0, 0.0, 1.0, 0.0, 2.0, 0.0]


def test_what_rollouts_know_comes_with_the_batch() -> None:
    method = GroupPolicyGradient(None, None, None, GroupConfig(name="grpo", max_new_tokens=4), 64)  # type: ignore[arg-type]
    trees = some_pairs(3)
    groups = [Group(t, torch.zeros(2), (), {"advantages": torch.tensor([1.0, -1.0]) * t.row}) for t in trees]
    method._by_row = {g.tree.row: g for g in groups}
    batch = pack(trees[1:])
    batch.columns |= method.columns(batch)
    there = batch.to(META)
    assert (
        method.extra(there, "advantages") is there.columns["advantages"] and there.columns["advantages"].device == META
    )
    assert method.extra(batch, "advantages").tolist() == [1.0, -1.0, 2.0, -2.0]


# ---- GPU settings: deterministic in a step but not while sampling; TF32 only if requested ----

CUDA = torch.device("cuda")


class Watching(Offline):
    """Records when torch's deterministic mode is on."""

    seen: ClassVar[dict[str, bool]] = {}

    def begin_step(self, step: int, progress: float, trees: Any) -> Any:  # here an online method samples
        self.seen["begin_step"] = torch.are_deterministic_algorithms_enabled()
        return Offline.begin_step(self, step, progress, trees)

    def score(self, batch: Any) -> Any:
        self.seen["score"] = torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled() is not self.seen["score"]  # cuDNN's SDPA is not deterministic
        return Offline.score(self, batch)


@pytest.mark.parametrize("device,wanted,expected", [(CUDA, True, True), (CUDA, False, False), (CPU, True, False)])
def test_a_step_is_deterministic_and_sampling_is_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device, wanted: bool, expected: bool
) -> None:
    loop = loop_on(CPU, tmp_path, "sft")
    policy = loop.algorithm.scorer  # type: ignore[attr-defined]
    loop.algorithm = Watching(policy, [Component(LOSSES["sft"], LOSSES["sft"].params())])
    real = steps.repeatable
    monkeypatch.setattr(loop_module, "repeatable", lambda _device, on: real(device, on))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    loop.train = loop.train.model_copy(update={"deterministic": wanted})
    Watching.seen.clear()
    loop.take_step(0, loop.schedule)
    assert Watching.seen == {"begin_step": False, "score": expected}
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_models_own_attention_goes_back_in_order_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of an encoder or of padded rows, in a step, where deterministic mode only warns."""
    seen: list[bool] = []
    noted = noted_attention(seen)
    warns = torch.is_deterministic_algorithms_warn_only_enabled

    def attention(q: Any, k: Any, v: Any, **_: Any) -> Any:
        return noted(q, *(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)))

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model = tiny_model("llama", dtype=torch.float32)
    model.set_attn_implementation("sdpa")
    with steps.repeatable(CUDA, True):
        model(input_ids=torch.arange(6)[None]).logits.sum().backward()
        assert warns()
    assert len(seen) == model.config.num_hidden_layers and not any(seen)
    assert torch.nn.functional.scaled_dot_product_attention is attention


@pytest.mark.parametrize("tf32", [False, True])
def test_products_of_a_gpu_are_as_precise_as_asked(monkeypatch: pytest.MonkeyPatch, tf32: bool) -> None:
    matmul = SimpleNamespace(allow_tf32=None, allow_bf16_reduced_precision_reduction=None)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(allow_tf32=None))
    machine.set_precision(CPU, tf32)
    assert matmul.allow_tf32 is None
    machine.set_precision(CUDA, tf32)
    assert matmul.allow_tf32 is tf32 and matmul.allow_bf16_reduced_precision_reduction is False


def test_what_is_proved_in_fp32_is_not_multiplied_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards every setting is what it was, also in a process that never set them."""
    matmul = SimpleNamespace(allow_tf32=True, allow_bf16_reduced_precision_reduction=True)
    cudnn = SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    parameters = [SimpleNamespace(device=CUDA, dtype=torch.float32)]
    for asked in (True, False):
        matmul.allow_tf32 = asked
        with widened(SimpleNamespace(parameters=lambda: iter(parameters))):  # type: ignore[arg-type]
            assert not matmul.allow_tf32 and not cudnn.allow_tf32
        assert matmul.allow_tf32 is asked and cudnn.allow_tf32 and matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_tf32 = True
    with widened(tiny_model("llama", dtype=torch.float32)):
        assert matmul.allow_tf32  # a CPU has no TF32


def test_a_merged_adapter_is_proved_without_tf32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen reference or a value model may be merged after the run's precision was set."""
    matmul, seen = SimpleNamespace(allow_tf32=True, allow_bf16_reduced_precision_reduction=False), []
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(allow_tf32=True))
    (tmp_path / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    for name in ("check_model_folder", "check_folder"):
        monkeypatch.setattr(merge, name, lambda _: None)
    stand_in = SimpleNamespace(merge_and_unload=lambda safe_merge: stand_in)
    monkeypatch.setattr(merge, "load_causal_model", lambda *_: stand_in)
    monkeypatch.setattr(merge, "with_adapter", lambda *_: stand_in)
    monkeypatch.setattr(merge, "_probe", lambda _: seen.append(matmul.allow_tf32) or torch.ones(1))
    assert merge.merged_model(ModelConfig(path="base"), tmp_path, CUDA) is stand_in
    assert seen == [False, False] and matmul.allow_tf32


def test_cublas_is_deterministic_from_the_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reads the variable once, at its first product on a GPU: when a loaded model is checked, long before a step."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("cpu") == CPU and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert resolve_device("auto").type == "cuda" and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_random_numbers_are_looked_for_on_the_models_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device=None: asked.append(device))
    _random_state(torch.device("cuda", 1))
    assert asked == [torch.device("cuda", 1)]


# ---- the process: the CPU's allocator settings would never give back a GPU host's memory ----


def test_a_process_has_the_settings_of_where_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {**cli.CPU_ENV, **cli.CUDA_ENV}:
        monkeypatch.delenv(name, raising=False)
    for gpu in (False, True):
        monkeypatch.setattr(cli, "gpu_visible", lambda gpu=gpu: gpu)
        for device, on_gpu in (("cpu", False), ("cuda", True), ("auto", gpu)):
            ours, others = (cli.CUDA_ENV, cli.CPU_ENV) if on_gpu else (cli.CPU_ENV, cli.CUDA_ENV)
            found = cli.environment_of(device)
            assert ours.items() <= found.items() and not others.keys() & found.keys()
    assert cli.environment_of("cpu", several=True)["MALLOC_MMAP_MAX_"] != cli.CPU_ENV["MALLOC_MMAP_MAX_"]
    assert cli.environment_of("cuda", several=True).items() >= cli.CUDA_ENV.items()
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    assert cli.environment_of("cpu")["MALLOC_TOP_PAD_"] == "1"


def test_a_command_is_one_of_several_by_its_option_its_config_or_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(processes: int | str) -> SimpleNamespace:
        return SimpleNamespace(launch=SimpleNamespace(processes=processes))

    assert not cli._is_distributed(Namespace(), None) and not cli._is_distributed(Namespace(), config("auto"))
    assert cli._is_distributed(Namespace(), config(2)) and cli._is_distributed(Namespace(processes=2), config(1))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli._is_distributed(Namespace(), None)


def test_gpus_that_were_asked_for_are_in_the_config_that_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def load(path: str, overrides: list[str]) -> Any:
        raise Asked(overrides)

    monkeypatch.delenv("PENCHANT_REEXECUTED", raising=False)
    monkeypatch.setattr("penchant.config.load_config", load)
    args = Namespace(command="train", reads="run", config="r.yaml", overrides=["train.lr=1"], gpus=8, processes=None)
    with pytest.raises(Asked) as asked:
        cli._check_config(args)
    assert asked.value.args[0] == ["train.lr=1", "launch.processes=8", "model.device=cuda"]


def test_where_a_command_computes_is_asked_of_its_option_its_config_and_the_machine() -> None:
    config = SimpleNamespace(model=SimpleNamespace(device="cpu"))
    assert cli._device_of(Namespace(device="cuda"), config) == "cuda"
    assert cli._device_of(Namespace(device=None), config) == "cpu"
    assert cli._device_of(Namespace(), None) == "auto"


def test_a_gpu_is_seen_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for files in ([], [Path("/dev/nvidia0")]):
        monkeypatch.setattr(machine.Path, "glob", lambda *_, files=files: iter(files))
        assert machine.gpu_visible() == bool(files)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not machine.gpu_visible()


def test_a_model_is_where_its_gathered_shards_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(kind: str, mesh: str | None) -> Any:
        more = {} if mesh is None else {"device_mesh": SimpleNamespace(device_type=mesh)}
        return SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device(kind), **more)]))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert machine.place_of(model("cpu", None)) == machine.place_of(model("cpu", "cpu")) == torch.device("cpu")
    assert machine.place_of(model("cuda:0", "cuda")) == torch.device("cuda:0")
    assert machine.place_of(model("cpu", "cuda")) == torch.device("cuda:1")  # offloaded


def test_the_manifest_says_which_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not {"gpus", "cuda", "nccl"} & set(record.hardware()) or torch.cuda.is_available()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13010, raising=False)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 3))
    found = record.hardware()
    wanted = {"gpu": "a GPU", "gpus": 8, "driver_cuda": "13.1", "cuda": "12.8", "nccl": "2.29.3"}
    assert {k: found[k] for k in wanted} == wanted
